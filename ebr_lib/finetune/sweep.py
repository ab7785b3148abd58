"""A sweep: several runs that try values of knobs, chosen by Optuna for the held-out metric; it goes on where it ended.

`sweep.json` in the sweep's folder is written before and after each trial. Each trial's proposal depends on the finished
trials and on its number alone, so that an interrupted sweep proposes what an uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ebr_lib.data.pairs import find_pair_files
from ebr_lib.errors import ConfigError, DataError, ModelError
from ebr_lib.extras import require
from ebr_lib.files import make_folder, sha256_of, write_json
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.processes import world_size
from ebr_lib.finetune.run import FREE_ON_RESUME, train_sentence_transformer
from ebr_lib.finetune.trackers import name_of_run
from ebr_lib.knobs.checks import shown_value, unknown_name, validated
from ebr_lib.knobs.presets import read_preset, read_yaml
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.packaged import model_label
from ebr_lib.names import Metric
from ebr_lib.tables import TableRepr, as_text, make_table

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from pandas import DataFrame

FOLDER, STATE_FILE, TABLE_FILE, BEST_FILE = "sweep", "sweep.json", "trials.csv", "best.yaml"
# a resumed run compares these by their contents; a sweep does not read them
NAMED = ("model_name", "mining_corpus_path", "label_column")
NOT_SWEPT = (
    "output_dir",
    "data_path",
    "eval_data_path",
    "eval_ratio",
    "eval_corpus_size",
    "leave_out_own",
    "label_column",
    "on_bad_row",
    "seed",
    "adapter_strength",
    "resume_from_checkpoint",
    "run_name",
    "report_to",
)


class Range(BaseModel):
    """Values from `low` to `high`: whole numbers if both are; `log` draws their logarithm evenly."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    low: int | float
    high: int | float
    log: bool = False


class Sweep(BaseModel):
    """What `sweep.yaml` says: the knobs, each with a range or a list of choices, and how many runs to try."""

    model_config = ConfigDict(extra="forbid", strict=True)
    knobs: dict[str, Range | list[Any]] = Field(min_length=1)
    trials: int = Field(20, ge=1)
    metric: Metric = "ndcg@10"
    seed: int = Field(42, ge=0, le=2**31)


@dataclass(frozen=True, repr=False)
class SweepResult(TableRepr):
    """What a sweep tried; `best_preset` repeats its best run in the given `output_dir`, `best_model` is that run's."""

    best_preset: str
    best_model: str
    best_value: float
    tables: dict[str, DataFrame] = field(compare=False)


def run_sweep(config: FinetuneConfig | Mapping[str, Any] | None, sweep_file: str | Path) -> SweepResult:
    """Fine-tune with several values of knobs; save table, models and best preset under `<output_dir>/sweep/`.

    A trial whose training fails (NaN, knobs that contradict each other) counts as failed, and the sweep goes on. Called
    again, it resumes: finished trials are kept, an interrupted one continues from its checkpoint.

    :param config: the knobs that all runs share.
    :param sweep_file: YAML of `knobs`, `trials`, `metric` and `seed`; see `Sweep`.
    :raises ConfigError: the file names unknown knobs or values, or the sweep in that folder is another one.
    :raises ModelError: every trial failed.
    """
    require("sweep")
    if world_size() > 1:
        raise ConfigError("--sweep runs one trial at a time in one process; start it without torchrun or accelerate")
    config = FinetuneConfig.resolve(config)
    if not (config.eval_ratio or config.eval_data_path):
        raise ConfigError("--sweep needs held-out data: set eval_ratio above 0, or eval_data_path")
    sweep = read_sweep(sweep_file, config)
    folder = make_folder(Path(config.output_dir) / FOLDER)
    asked = _what_decides(config, sweep)
    trials = _read_trials(folder / STATE_FILE, asked)

    def save() -> None:
        write_json(folder / STATE_FILE, {"asked": asked, "trials": trials})
        trials_table(trials, sweep).to_csv(folder / TABLE_FILE, index=False)

    for number in range(sweep.trials):
        if number == len(trials):
            trials.append(_propose(trials, sweep))
            save()
        trial = trials[number]
        if trial["state"] in ("done", "failed"):
            continue
        logger.info(
            "调参 %d/%d sweep, trial %d of %d: %s", number + 1, sweep.trials, number + 1, sweep.trials, trial["knobs"]
        )
        _run_trial(trial, config, sweep, folder)
        save()
    return _result(trials, config, sweep, folder)


# --- the file -----------------------------------------------------------------------------------------------------


def read_sweep(path: str | Path, config: FinetuneConfig) -> Sweep:
    """Read `sweep.yaml` and check every value in it.

    :raises ConfigError: lists all that is wrong.
    """
    try:
        sweep = Sweep.model_validate(read_preset(path))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'][:2]))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"sweep {path}: {'; '.join(dict.fromkeys(wrong))}") from error
    if wrong := [line for name, values in sweep.knobs.items() for line in _wrong(name, values, config)]:
        raise ConfigError("\n  - ".join([f"sweep {path}: {len(wrong)} errors", *wrong]))
    return sweep


def _wrong(name: str, values: Range | list[Any], config: FinetuneConfig) -> Iterator[str]:
    names = [one.name for one in dataclasses.fields(config)]
    if name not in names:
        yield unknown_name(name, names)
    elif name in NOT_SWEPT:
        yield f"{name}: cannot be swept, because trials would not be comparable"
    elif isinstance(values, Range) and (values.low >= values.high or (values.log and values.low <= 0)):
        yield f"{name}: wanted low < high, and low > 0 with log; found {values.low} … {values.high}"
    elif not values:
        yield f"{name}: no choices"
    else:
        tried = [values.low, values.high] if isinstance(values, Range) else values
        for value in tried:
            yield from validated(type(config), name, tuple(value) if isinstance(value, list) else value)[1]


def _distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """The values that Optuna draws from; choices are written as YAML, since it takes plain values only."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for name, values in sweep.knobs.items():
        if isinstance(values, list):
            found[name] = CategoricalDistribution([shown_value(value) for value in values])
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[name] = IntDistribution(values.low, values.high, log=values.log)
        else:
            found[name] = FloatDistribution(values.low, values.high, log=values.log)
    return found


# --- trials -------------------------------------------------------------------------------------------------------


def _read_trials(place: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials of the sweep so far, each with its drawn values, knobs, state, value and seconds.

    :raises ConfigError: the sweep there tried other knobs or trained on other data.
    """
    if not place.is_file():
        return []
    there = json.loads(place.read_text(encoding="utf-8"))
    if changed := [name for name in asked if there["asked"].get(name) != asked[name]]:
        raise ConfigError(
            f"{place} is of a sweep with other {', '.join(changed)}; give another output_dir, or move the folder"
        )
    return there["trials"]


def _what_decides(config: FinetuneConfig, sweep: Sweep) -> dict[str, Any]:
    """All that the trials of one sweep share; more of them may be asked for later."""
    knobs = {name: value for name, value in config.to_dict().items() if name in NAMED or name not in FREE_ON_RESUME}
    files = [file for path in (config.data_path, config.eval_data_path) if path for file in find_pair_files(path)]
    shared = knobs | {"data files": [sha256_of(file) for file in files]} | sweep.model_dump(exclude={"trials"})
    return json.loads(json.dumps(shared))


def _propose(trials: Sequence[Mapping[str, Any]], sweep: Sweep) -> dict[str, Any]:
    """The next trial, with values by Optuna's tree-structured Parzen estimator over the finished ones."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(trials))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = _distributions(sweep)
    for trial in trials:
        done = trial["state"] == "done"
        study.add_trial(
            optuna.trial.create_trial(
                params=trial["drawn"],
                distributions=distributions,
                value=trial["value"] if done else None,
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
            )
        )
    drawn = study.ask(distributions).params
    knobs = {name: read_yaml(v) if isinstance(sweep.knobs[name], list) else v for name, v in drawn.items()}
    return {"number": len(trials), "state": "running", "drawn": drawn, "knobs": knobs}


def _run_trial(trial: dict[str, Any], config: FinetuneConfig, sweep: Sweep, folder: Path) -> None:
    """Train with a trial's knobs, and note how it went."""
    name = f"trial-{trial['number']:03d}"
    own = {
        "output_dir": str(folder / name),
        "run_name": f"{name_of_run(config.run_name, model_label(config.model_name))}-{name}",
        "resume_from_checkpoint": "auto",
    }
    start = time.perf_counter()
    try:
        result = train_sentence_transformer(config.to_dict() | trial["knobs"] | own)
    except (ConfigError, ModelError) as error:
        logger.warning("该次尝试失败 %s failed: %s", name, error)
        trial |= {"state": "failed", "reason": str(error)}
    else:
        if "all" not in result.after:
            raise DataError("--sweep: no rows were held out, so trials cannot be compared; give eval_data_path")
        before, after = (means["all"][sweep.metric] for means in (result.before, result.after))
        trial |= {"state": "done", "value": after, "before": before, "model": result.model_path}
    trial["seconds"] = round(time.perf_counter() - start, 1)


# --- the outcome --------------------------------------------------------------------------------------------------


def trials_table(trials: Sequence[Mapping[str, Any]], sweep: Sweep) -> DataFrame:
    """One row per trial, best first: number, swept knobs, metric before and after, seconds, state."""
    columns = ("trial", *sweep.knobs, "before", sweep.metric, "seconds", "state")
    ranked = sorted(trials, key=lambda trial: -trial.get("value", -1.0))
    rows = [
        (
            trial["number"],
            *(shown_value(trial["knobs"][name]) for name in sweep.knobs),
            trial.get("before"),
            trial.get("value"),
            trial.get("seconds"),
            trial["state"],
        )
        for trial in ranked
    ]
    return make_table("调参 sweep", columns, rows)


def _result(trials: Sequence[Mapping[str, Any]], config: FinetuneConfig, sweep: Sweep, folder: Path) -> SweepResult:
    done = [trial for trial in trials if trial["state"] == "done"]
    if not done:
        raise ModelError(f"--sweep: every trial failed; the first: {trials[0]['reason']}")
    best = max(done, key=lambda trial: trial["value"])
    preset = folder / BEST_FILE
    FinetuneConfig.resolve(config.to_dict() | best["knobs"]).save(preset)
    table = trials_table(trials, sweep)
    logger.info("%s", as_text(table), extra=RESULT)
    logger.info(
        "最佳 best: trial %d, %s %.4f; 预设 preset: %s "
        "(挑出来的最好值偏乐观，请用别的数据复核 the best of %d is optimistic: check it on other data)",
        best["number"], sweep.metric, best["value"], preset, len(done),
    )  # fmt: skip
    return SweepResult(str(preset), best["model"], best["value"], {"trials": table})
