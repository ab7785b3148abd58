"""Sweeps: what is tried, resumed, saved and refused; only the last test trains."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from ebr_lib import cli
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.finetune import sweep
from ebr_lib.finetune.config import FinetuneConfig
from tests.finetune.conftest import train

pytest.importorskip("optuna")
SWEEP = """
trials: 6
metric: mrr@10
knobs:
  learning_rate: {low: 1e-5, high: 1e-3, log: true}
  lora_r: [4, 8]
  num_epochs: {low: 1, high: 3}
"""


@pytest.fixture
def asked(settings, tmp_path) -> tuple[FinetuneConfig, Path]:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    return FinetuneConfig.resolve(settings), file


class Trainings:
    """In place of training: a metric that is best near a learning rate of 1e-4 with rank 8; may end at some trial."""

    def __init__(self, ends_at: int = -1, fails_at: int = -1) -> None:
        self.configs: list[FinetuneConfig] = []
        self.ends_at, self.fails_at = ends_at, fails_at

    def __call__(self, config):
        config = FinetuneConfig.resolve(config)
        self.configs.append(config)
        if len(self.configs) - 1 == self.ends_at:
            raise KeyboardInterrupt
        if len(self.configs) - 1 == self.fails_at:
            raise ModelError("training ended in NaN")
        value = 1 / (1 + abs(config.learning_rate - 1e-4) * 1e4) + config.lora_r / 100
        means = {"all": {"mrr@10": value, "ndcg@10": 0.0}}
        return SimpleNamespace(before={"all": {"mrr@10": 0.5}}, after=means, model_path=f"{config.output_dir}/model")


def run(monkeypatch, asked, trainings):
    monkeypatch.setattr(sweep, "train_sentence_transformer", trainings)
    return sweep.run_sweep(*asked)


def tried(trainings) -> list[tuple]:
    return [(one.learning_rate, one.lora_r, one.num_epochs) for one in trainings.configs]


def test_the_best_trial_is_saved_as_a_preset_and_all_as_a_table(monkeypatch, asked):
    trainings = Trainings(fails_at=1)
    result = run(monkeypatch, asked, trainings)
    config, folder = asked[0], Path(asked[0].output_dir) / "sweep"
    assert len(set(tried(trainings))) == 6
    assert all(
        1e-5 <= rate <= 1e-3 and rank in (4, 8) and epochs in (1, 2, 3) for rate, rank, epochs in tried(trainings)
    )
    assert {one.output_dir for one in trainings.configs} == {str(folder / f"trial-{i:03d}") for i in range(6)}
    values = {i: Trainings()(one).after["all"]["mrr@10"] for i, one in enumerate(trainings.configs) if i != 1}
    best = max(values, key=values.__getitem__)
    assert result.best_value == values[best]
    assert result.best_model == f"{trainings.configs[best].output_dir}/model"
    preset = FinetuneConfig.resolve({}, [result.best_preset])
    assert (preset.learning_rate, preset.lora_r, preset.num_epochs) == tried(trainings)[best]
    assert preset.output_dir == config.output_dir
    table = pd.read_csv(folder / "trials.csv")
    assert table["trial"].tolist()[0] == best and table["state"].tolist()[-1] == "failed"
    assert table["mrr@10"].dropna().is_monotonic_decreasing and len(table) == 6


def test_an_interrupted_sweep_tries_what_an_uninterrupted_one_does(monkeypatch, asked, tmp_path):
    whole = Trainings()
    run(monkeypatch, asked, whole)
    again = asked[0].to_dict() | {"output_dir": str(tmp_path / "again")}
    first, rest = Trainings(ends_at=3), Trainings()
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, (again, asked[1]), first)
    run(monkeypatch, (again, asked[1]), rest)
    assert tried(first)[:3] + tried(rest) == tried(whole)  # the fourth was interrupted, and runs again
    assert rest.configs[0].resume_from_checkpoint == "auto"
    more = Trainings()
    asked[1].write_text(SWEEP.replace("trials: 6", "trials: 8"), encoding="utf-8")
    run(monkeypatch, (again, asked[1]), more)
    assert len(more.configs) == 2  # more trials of the same sweep
    others = {"lora_alpha": 99, "model_name": "other/model", "label_column": "none"}
    for changed, word in (*((again | {name: value}, name) for name, value in others.items()), (again, "seed")):
        asked[1].write_text(SWEEP + ("seed: 3\n" if word == "seed" else ""), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"is of a sweep with other {word}; give another output_dir"):
            run(monkeypatch, (changed, asked[1]), Trainings())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("knobs: {lora_rr: [1]}", "lora_rr: unknown; did you mean lora_r?"),
        ("knobs: {lora_r: [4, 0]}", "lora_r: 0 is not allowed"),
        ("knobs: {lora_r: {low: 8, high: 4}}", "wanted low < high"),
        ("knobs: {learning_rate: {low: 0, high: 1, log: true}}", "low > 0 with log"),
        ("knobs: {lora_r: []}", "lora_r: no choices"),
        ("knobs: {output_dir: [a, b]}", "output_dir: cannot be swept"),
        ("knobs: {eval_corpus_size: [10, 99]}", "eval_corpus_size: cannot be swept"),
        ("knobs: {adapter_strength: [1, auto]}", "adapter_strength: cannot be swept"),
        ("knobs: {lora_r: [4]}\nmetric: loss", "metric"),
        ("knobs: {lora_r: [4]}\ntrails: 3", "trails"),
        ("trials: 3", "knobs"),
    ],
)
def test_mistakes_in_the_file_are_refused_before_any_trial(monkeypatch, asked, text, words):
    asked[1].write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        run(monkeypatch, asked, None)


def test_without_held_out_rows_or_with_failures_alone_there_is_no_best(monkeypatch, asked):
    with pytest.raises(ConfigError, match="--sweep needs held-out data"):
        run(monkeypatch, (asked[0].to_dict() | {"eval_ratio": 0.0}, asked[1]), None)
    asked[1].write_text(SWEEP.replace("trials: 6", "trials: 1"), encoding="utf-8")
    with pytest.raises(ModelError, match="every trial failed; the first: training ended in NaN"):
        run(monkeypatch, asked, Trainings(fails_at=0))


def test_the_command_trains_each_trial(settings, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("trials: 2\nknobs: {prompt: [null, {anchor: 'query: '}]}\nseed: 1\n", encoding="utf-8")
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert cli.main(["finetune", *flags, "--sweep", str(file)]) == 0
    folder = Path(settings["output_dir"]) / "sweep"
    state = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    for trial in state["trials"]:
        saved = FinetuneConfig.resolve({}, [Path(trial["model"]) / "finetune_config.yaml"])
        assert saved.prompt == trial["knobs"]["prompt"] and trial["state"] == "done"
    alone = train(settings, prompt=state["trials"][0]["knobs"]["prompt"], output_dir=str(tmp_path / "alone"))
    assert state["trials"][0]["value"] == alone.after["all"]["ndcg@10"]
    assert "best: trial" in capsys.readouterr().out
