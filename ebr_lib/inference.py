"""Stage 2: encode a catalogue of Hive text, exactly, in bounded memory, and so that it can be interrupted."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.config import InferenceConfig, delimiter_byte
from ebr_lib.data.hive import Layout, Source, find_files, need_columns, open_source
from ebr_lib.data.vectors import VECTOR, manifest_path, read_manifest
from ebr_lib.engines.job import Job, Outcome, changed_settings
from ebr_lib.engines.local import EncoderFacts, EncoderRecipe, LocalEngine
from ebr_lib.engines.ray_cluster import RayEngine
from ebr_lib.errors import DataError
from ebr_lib.files import sha256_of, write_json
from ebr_lib.logs import logger
from ebr_lib.model.loading import ModelIdentity, find_model, identify
from ebr_lib.tables import Shown, Table

if TYPE_CHECKING:
    from ebr_lib.model.encoder import EncodeStats

COUNTS = (
    "read",
    "written",
    "rejected",
    "healed",
    "empty",
    "encoded",
    "duplicates",
    "truncated",
    "tokens",
    "tokens_lost",
    "slots",
)


@dataclass(frozen=True, repr=False)
class InferenceResult(Shown):
    """What an inference run wrote and counted.

    :param output: the embedding file.
    :param manifest: JSON beside it: model, prompt, inputs, counts. The config lies there too, as `<output>.yaml`.
    :param rejects: the rows that are not in the output, with the reason; None when there are none.
    :param counts: rows read, written, rejected, duplicates and so on, by name.
    :param seconds: what the run took, loading the model included.
    """

    output: Path
    manifest: Path
    rejects: Path | None
    dimension: int
    counts: dict[str, int]
    seconds: float
    table: Table

    def _repr_html_(self) -> str:
        return self.table.html()


def run_batch_inference(config: InferenceConfig | Mapping[str, Any] | None = None) -> InferenceResult:
    """Encode the text column of every input file and write the vectors beside the kept columns.

    A run that was interrupted, by whatever, is continued by the same call, and ends in the same bytes.

    :param config: an `InferenceConfig`, or a dict of its knobs.
    :raises ConfigError: knobs that are unknown or out of range, all at once.
    :raises MissingError: the input or the model is not there.
    :raises DataError: a column is missing, nothing matches, the disk is full, an input changed, or an unfinished run
        of other settings is in the way.
    """
    started = time.perf_counter()
    config = InferenceConfig.resolve(config)
    sources, layout = _open_inputs(config)
    kept = _kept_columns(config, sources)
    logger.info("推理输入: %d 个文件, %.1f MB (input files)", len(sources), sum(s.size for s in sources) / 1e6)
    identity = identify(config.model_name)
    with _engine(config) as engine:
        job = _job(config, sources, layout, _settings(config, engine.facts, identity, kept))
        outcome = _run(job, engine)
        write_json(manifest_path(job.output), _manifest(job, identity, outcome))
        config.save(Path(f"{job.output}.yaml"))
        engine.finish(job)
    return _result(job, outcome, time.perf_counter() - started)


# --- input --------------------------------------------------------------------------------------------------------


def _open_inputs(config: InferenceConfig) -> tuple[list[Source], Layout]:
    layout = Layout(delimiter_byte(config.delimiter), config.columns or None, config.encoding, config.heal_rows)
    root = Path(config.data_path).expanduser()
    files = find_files(root, config.file_patterns)
    sources = [open_source(f, layout, f.relative_to(root).as_posix() if root.is_dir() else f.name) for f in files]
    for source in sources:
        need_columns(source, [config.description_column, *config.output_columns], layout.delimiter)
    return sources, layout


def _kept_columns(config: InferenceConfig, sources: list[Source]) -> tuple[str, ...]:
    if config.output_columns:
        return config.output_columns
    first = sources[0]
    for source in sources[1:]:
        if set(source.columns) != set(first.columns):
            odd = ", ".join(sorted(set(source.columns) ^ set(first.columns)))
            raise DataError(
                f"{source.path} and {first.path} do not have the same columns ({odd} is in one of them only); "
                "name those to keep in output_columns"
            )
    if VECTOR in first.columns:
        raise DataError(f"{first.path} has a column `{VECTOR}` already; name the columns to keep in output_columns")
    return first.columns


def _hashed(sources: list[Source]) -> tuple[dict[str, Any], ...]:
    from tqdm.auto import tqdm

    bar = tqdm(sources, desc="sha256", unit="file", delay=2, leave=False)
    return tuple({"path": s.name, "size": s.size, "sha256": sha256_of(s.path)} for s in bar)


# --- model --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _engine(config: InferenceConfig) -> Iterator[LocalEngine | RayEngine]:
    names = EncoderRecipe.__dataclass_fields__
    recipe = EncoderRecipe(**{name: getattr(config, name) for name in names})
    if config.engine == "ray":
        recipe = replace(recipe, model_name=find_model(recipe.model_name))  # workers have another current folder
        engine: LocalEngine | RayEngine = RayEngine(recipe, config.num_actors, config.ray_address)
    else:
        engine = LocalEngine(recipe, config.num_processes)
    facts = engine.facts
    logger.info("模型: %s, %d 维, %s (model, dimensions, precision)", config.model_name, facts.dim, facts.precision)
    if config.prompt is not None and config.prompt != facts.trained_prompt:
        logger.warning(
            "prompt %r is not what the model was trained with (%r): vectors may match queries less well; "
            "leave prompt at null to take the model's own",
            config.prompt,
            facts.trained_prompt,
        )
    if config.truncate_dim is not None and config.truncate_dim > facts.dim:
        logger.warning("truncate_dim %d: the model has only %d dimensions", config.truncate_dim, facts.dim)
    try:
        yield engine
    finally:
        engine.close()


def _settings(
    config: InferenceConfig, facts: EncoderFacts, identity: ModelIdentity, kept: tuple[str, ...]
) -> dict[str, Any]:
    """All that decides what is written; speed and place do not."""
    return {
        "model": identity.sha256 or identity.path,
        "base model": identity.base_sha256 or identity.base_model,
        "prompt": facts.prompt,
        "max_seq_length": facts.max_seq_length,
        "precision": facts.precision,
        "dimension": facts.dim,
        "normalize": config.normalize,
        "description_column": config.description_column,
        "output_columns": list(kept),
        "format": Path(config.output_path).suffix,
        "delimiter": config.delimiter,
        "columns": list(config.columns),
        "encoding": config.encoding,
        "heal_rows": config.heal_rows,
        "on_empty_text": config.on_empty_text,
    }


# --- the job ------------------------------------------------------------------------------------------------------


def _job(config: InferenceConfig, sources: list[Source], layout: Layout, settings: dict[str, Any]) -> Job:
    job = Job(
        sources=tuple(sources),
        layout=layout,
        text_column=config.description_column,
        kept=tuple(settings["output_columns"]),
        output=Path(config.output_path).expanduser(),
        settings=settings,
        inputs=_hashed(sources),
        on_empty_text=config.on_empty_text,
        window_rows=config.window_rows,
        append=config.append,
    )
    if config.restart and job.folder.exists():
        logger.info("放弃未完成的运行: %s (restart: the unfinished run is dropped)", job.folder)
        shutil.rmtree(job.folder)
    return _appended(job) if config.append and job.output.exists() else job


def _appended(job: Job) -> Job:
    """The job of the files that a finished output does not hold yet."""
    before = read_manifest(job.output)
    if before is None:
        raise DataError(
            f"{job.output} has no manifest, so which files it holds is not known; append needs the output of an "
            "earlier run: leave append out to write it anew"
        )
    held = {entry["path"]: entry["sha256"] for entry in before["inputs"]}
    changes = changed_settings(before["settings"], job.settings)
    changes += [
        f"input {entry['path']}: its contents changed"
        for entry in job.inputs
        if held.get(entry["path"], entry["sha256"]) != entry["sha256"]
    ]
    if changes:
        raise DataError(
            f"{job.output} cannot be appended to, for these have changed since it was written:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nGo back to what they were, or leave append out to write it anew"
        )
    new = [i for i, entry in enumerate(job.inputs) if entry["path"] not in held]
    logger.info("追加: %d 个新文件 (append: %d of %d files are new)", len(new), len(new), len(job.inputs))
    sources, inputs = tuple(job.sources[i] for i in new), tuple(job.inputs[i] for i in new)
    return replace(job, sources=sources, inputs=inputs, before=before)


def _run(job: Job, engine: LocalEngine | RayEngine) -> Outcome:
    from tqdm.auto import tqdm

    began = time.perf_counter()
    with tqdm(desc="编码 encode", unit="row", unit_scale=True) as bar:

        def progress(rows: int, texts: int, share: float) -> None:
            bar.total = round(rows / share) if share else None
            bar.set_postfix_str(f"{texts / (time.perf_counter() - began):.0f} texts/s", refresh=False)
            bar.update(rows - bar.n)

        return engine.run(job, progress)


def _manifest(job: Job, identity: ModelIdentity, outcome: Outcome) -> dict[str, Any]:
    counts = outcome.counts
    earlier = job.before["inputs"] if job.before else []
    return {
        "model": asdict(identity),
        "prompt": job.settings["prompt"],
        "dimension": job.settings["dimension"],
        "precision": job.settings["precision"],
        "settings": job.settings,
        "inputs": [*earlier, *job.inputs],
        "rows": {name: counts[name] for name in COUNTS},
        "rejects": {"file": job.rejects.name if outcome.reasons else None, "reasons": dict(outcome.reasons)},
        "truncated": {
            "rows": counts["truncated"],
            "token_share": _stats(counts).lost_share,
            "examples": outcome.examples,
        },
    }


def _result(job: Job, outcome: Outcome, seconds: float) -> InferenceResult:
    counts = {name: outcome.counts[name] for name in COUNTS}
    table = Table(str(job.output), ("", "value"), list(_summary(counts, _size(job.output))))
    logger.info("向量已保存: %s (%d 行, %.1f 秒)\n%s", job.output, counts["written"], seconds, table.text())
    for reason, number in outcome.reasons.most_common():
        logger.warning("%d rows rejected: %s (see %s)", number, reason, job.rejects)
    rejects = job.rejects if outcome.reasons else None
    return InferenceResult(
        output=job.output,
        manifest=manifest_path(job.output),
        rejects=rejects,
        dimension=job.settings["dimension"],
        counts=counts,
        seconds=seconds,
        table=table,
    )


def _stats(counts: Mapping[str, int]) -> EncodeStats:
    from ebr_lib.model.encoder import EncodeStats

    return EncodeStats(**{name: counts[name] for name in ("tokens", "slots", "truncated", "tokens_lost")})


def _size(output: Path) -> int:
    """Bytes of the embedding file, or of the part files of a folder."""
    parts = output.iterdir() if output.is_dir() else [output]
    return sum(part.stat().st_size for part in parts)


def _summary(counts: dict[str, int], size: int) -> Iterator[tuple[str, Any]]:
    yield "rows read 读入", counts["read"]
    yield "written 写出", counts["written"]
    yield "rejected 拒绝", counts["rejected"]
    yield "healed 接回", counts["healed"]
    yield "without text 无文本", counts["empty"]
    yield "texts encoded 编码", counts["encoded"]
    yield "duplicates 重复", counts["duplicates"]
    yield "truncated 截断", counts["truncated"]
    yield "tokens lost 丢失 token", f"{_stats(counts).lost_share:.2%}"
    yield "padding 填充", f"{_stats(counts).padding_share:.1%}" if counts["slots"] else "-"
    yield "MB", f"{size / 1e6:.1f}"
