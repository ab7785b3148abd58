"""Stage 2: encode a catalogue of Hive text, exactly, in bounded memory, and so that it can be interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.embeddings.base import ending_of, ids_path, manifest_path, read_manifest
from ebr_lib.data.finder import FoundFiles
from ebr_lib.data.hive import Layout, Source
from ebr_lib.errors import ConfigError
from ebr_lib.files import check_apart, check_output_file, followed, named_when_full, write_json
from ebr_lib.inference.config import NOT_WHOLE_BYTES, InferenceConfig, escape_byte
from ebr_lib.inference.encode import FULL
from ebr_lib.inference.inputs import check_sample, find_inputs, hash_inputs, kept_columns, open_inputs
from ebr_lib.inference.job import Job, Outcome, rejects_path, work_folder
from ebr_lib.inference.local import EncoderFacts, LocalEngine
from ebr_lib.inference.ray_cluster import RayEngine, check_output_folder
from ebr_lib.inference.report import Bar, by_name, check_losses, count_rows, log_rejects, token_stats
from ebr_lib.inference.resume import drop_run, new_inputs, refuse_other_engine, with_known_names
from ebr_lib.knobs.fields import delimiter_byte
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import find_model
from ebr_lib.model.provenance import ModelIdentity, files_of, identify
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.model.unfit import unfit_advice
from ebr_lib.tables import TableRepr, as_text, html_folded, html_verdict, make_table

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class InferenceResult(TableRepr):
    """What an inference run wrote and counted.

    :param output: the embedding file.
    :param manifest: JSON beside it: model, prompt, inputs, counts. The config lies there too, as `<output>.yaml`.
    :param rejects: the rows that are not in the output, with the reason; None when there are none.
    :param counts: rows read, written, rejected, duplicates and so on, by name; `uncounted`: rows without token counts,
        because the model prepares texts its own way. Where there are any, the counts of tokens are None.
    :param seconds: of the run, loading the model included.
    """

    output: Path
    manifest: Path
    rejects: Path | None
    dimension: int
    counts: dict[str, int | None]
    seconds: float
    tables: dict[str, DataFrame] = field(compare=False)

    def _repr_html_(self) -> str:
        counts = self.counts
        rejects = f"; 拒收 rejected {counts['rejected']}, see {self.rejects}" if counts["rejected"] else ""
        said = f"已编码 encoded: {counts['written']} 行 rows × {self.dimension} 维 dimensions → {self.output}{rejects}"
        return html_verdict(said) + html_folded(self.tables.values(), "统计 counts")


def run_batch_inference(config: InferenceConfig | Mapping[str, Any] | None = None) -> InferenceResult:
    """Encode the text column of every input file and write the vectors beside the kept columns.

    A run that was interrupted, however, is continued by the same call, and ends in the same bytes.

    :param config: an `InferenceConfig`, or a dict of its knobs.
    :raises ConfigError: knobs that are unknown or out of range, all at once.
    :raises MissingError: the input or the model is not there.
    :raises DataError: a column is missing, nothing matches, the disk is full, an input changed, or an unfinished run
        of other settings is in the way.
    """
    started = time.perf_counter()
    config = InferenceConfig.resolve(config)
    look_for_models(config.base_model_path, config.hub)
    output = followed(Path(config.output_path))
    check_apart([output, manifest_path(output), _config_path(output), rejects_path(output)], [config.presets])
    (check_output_folder if config.engine == "ray" else check_output_file)(output)
    check_remote_code(config.model_name, config.trust_remote_code)
    found = find_inputs(config.data_path, config.file_patterns, output, written_beside(output))
    layout = layout_of(config)
    sources = open_inputs(found, layout, [config.description_column, *config.output_columns], config.output_columns)
    kept = kept_columns(sources, config.output_columns, config.output_path, layout, config.vector_type)
    wanted = [*kept, config.description_column]
    check_sample(config.data_path, _not_held(config, sources, output), wanted, layout, config.max_rejected_share)
    logger.info("推理输入: %d 个文件, %.1f MB (input files)", len(sources), sum(s.size for s in sources) / 1e6)
    with _engine(config) as engine:
        if config.vector_type == "binary" and engine.facts.dim % 8:
            raise ConfigError(f"vector_type: {NOT_WHOLE_BYTES.format(engine.facts.dim)}")
        # again: a model of the hub is here only now
        choice = check_remote_code(config.model_name, config.trust_remote_code)
        identity = identify(config.model_name, choice)
        job = _job(config, sources, layout, _settings(config, engine.facts, identity, kept))
        outcome, bar = _finish(job, engine, identity, config, found)
        if new_inputs(job, outcome.inputs):  # it finished an interrupted run, which did not know of these
            outcome, bar = _finish(job, engine, identity, config, found)
    return _result(job, outcome, bar, time.perf_counter() - started)


def _finish(
    job: Job, engine: LocalEngine | RayEngine, identity: ModelIdentity, config: InferenceConfig, found: FoundFiles
) -> tuple[Outcome, Bar]:
    """Run a job to its end, the manifest included."""
    with named_when_full(job.folder, FULL), contextlib.closing(Bar()) as bar:
        outcome = engine.run(job, bar, partial(check_losses, job, config.max_rejected_share))
        write_json(manifest_path(job.output), _manifest(job, identity, outcome) | {"not_read": found.named()})
        config.save(_config_path(job.output))
        engine.finish(job)
    return outcome, bar


# --- places and layout --------------------------------------------------------------------------------------------


def _config_path(output: Path) -> Path:
    return Path(f"{output}.yaml")


def written_beside(output: Path) -> list[Path]:
    """The output and all that the stage writes beside it."""
    return [place(output) for place in (Path, ids_path, manifest_path, _config_path, work_folder, rejects_path)]


def layout_of(config: InferenceConfig) -> Layout:
    """How the input is written."""
    return Layout(
        delimiter=delimiter_byte(config.delimiter),
        columns=config.columns or None,
        encoding=config.encoding,
        heal=config.heal_rows,
        quoting=config.quoting,
        escape=escape_byte(config.escaped_by),
    )


def _not_held(config: InferenceConfig, sources: list[Source], output: Path) -> list[Source]:
    """The sources that an output which is appended to does not hold yet."""
    before = (read_manifest(output) or {}) if config.append else {}
    held = {entry["path"] for entry in before.get("inputs", [])}
    return [source for source in sources if source.name not in held]


# --- model --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _engine(config: InferenceConfig) -> Iterator[LocalEngine | RayEngine]:
    spec = EncoderSpec(
        model_name=config.model_name,
        document_prompt=config.prompt,
        max_seq_length=config.max_seq_length,
        normalize=config.normalize,
        truncate_dim=config.truncate_dim,
        precision=config.precision,
        backend=config.backend,
        batch_tokens=config.batch_tokens,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
    )
    if config.engine == "ray":
        spec = replace(spec, model_name=find_model(spec.model_name))  # workers have another current folder
        engine: LocalEngine | RayEngine = RayEngine(spec, config.num_actors, config.ray_address)
    else:
        engine = LocalEngine(spec, config.num_processes)
    try:
        _log_model(config, engine.facts)
        yield engine
    finally:
        engine.close()


def _log_model(config: InferenceConfig, facts: EncoderFacts) -> None:
    shown = (config.model_name, facts.dim, facts.precision, facts.backend)
    logger.info("模型: %s, %d 维, %s, %s (model, dimensions, precision, backend)", *shown)
    if config.prompt is not None and config.prompt != facts.trained_prompt:
        logger.warning(
            "提示词与训练时不同 prompt %r is not what the model was trained with (%r): vectors may match queries less "
            "well; leave prompt at null to take the model's own",
            config.prompt,
            facts.trained_prompt,
        )
    if config.truncate_dim is not None and config.truncate_dim > facts.dim:
        logger.warning("模型维度不足 truncate_dim %d: the model has only %d dimensions", config.truncate_dim, facts.dim)


def _settings(
    config: InferenceConfig, facts: EncoderFacts, identity: ModelIdentity, kept: tuple[str, ...]
) -> dict[str, Any]:
    """All that decides what is written; speed and place do not."""
    # only where they matter
    later: dict[str, Any] = {"trust_remote_code": identity.trust_remote_code} if identity.trust_remote_code else {}
    later |= {"backend": facts.backend} if facts.backend != "torch" else {}
    usual = InferenceConfig()
    for name in ("quoting", "escaped_by", "output_header", "vector_type"):
        if (value := getattr(config, name)) != getattr(usual, name):
            later[name] = value
    return later | {
        "model": identity.sha256 or identity.path,
        "base model": identity.base_sha256 or identity.base_model,
        "model files": list(files_of(identity)),
        "prompt": facts.prompt,
        "max_seq_length": facts.max_seq_length,
        "precision": facts.precision,
        "dimension": facts.dim,
        "normalize": config.normalize,
        "description_column": config.description_column,
        "output_columns": list(kept),
        "format": ending_of(config.output_path),
        "delimiter": config.delimiter,
        "columns": list(config.columns),
        "encoding": config.encoding,
        "heal_rows": config.heal_rows,
        "on_empty_text": config.on_empty_text,
    }


# --- job and result -----------------------------------------------------------------------------------------------


def _job(config: InferenceConfig, sources: list[Source], layout: Layout, settings: dict[str, Any]) -> Job:
    job = Job(
        sources=tuple(sources),
        layout=layout,
        text_column=config.description_column,
        kept=tuple(settings["output_columns"]),
        output=followed(Path(config.output_path)),
        settings=settings,
        inputs=hash_inputs(sources),
        on_empty_text=config.on_empty_text,
        window_rows=config.window_rows,
        append=config.append,
        with_header=config.output_header,
        vector_type=config.vector_type,
    )
    if config.restart and job.folder.exists():
        logger.info("放弃未完成的运行: %s (restart: the unfinished run is dropped)", job.folder)
        drop_run(job.folder)
    refuse_other_engine(job.folder, in_parts=config.engine == "ray")
    return with_known_names(job)


def _manifest(job: Job, identity: ModelIdentity, outcome: Outcome) -> dict[str, Any]:
    tally = outcome.tally
    rows = by_name(tally.counts)
    return {
        "model": asdict(identity),
        "prompt": job.settings["prompt"],
        "dimension": job.settings["dimension"],
        "precision": job.settings["precision"],
        "settings": job.settings,
        "inputs": outcome.inputs,
        "bytes": outcome.size,
        "rows": rows,
        "line_breaks": dict(tally.breaks),
        "altered": dict(tally.altered),
        "rejects": {"file": job.rejects.name if tally.reasons else None, "reasons": dict(tally.reasons)},
        "truncated": {
            "rows": rows["truncated"],
            "token_share": None if tally.counts["uncounted"] else token_stats(tally.counts).lost_share,
            "examples": tally.examples,
        },
    }


def _result(job: Job, outcome: Outcome, bar: Bar, seconds: float) -> InferenceResult:
    counts = outcome.tally.counts
    table = make_table(str(job.output), ("项目 what", "值 value"), count_rows(counts, bar, outcome.size))
    logger.info("向量已保存: %s (%d 行 rows, %.1f 秒 s)", job.output, counts["written"], seconds)
    logger.info("%s", as_text(table), extra=RESULT)
    log_rejects(job, outcome.tally)
    if advice := unfit_advice(token_stats(counts).unknown_share):
        logger.warning("%s", advice)
    return InferenceResult(
        output=job.output,
        manifest=manifest_path(job.output),
        rejects=job.rejects if outcome.tally.reasons else None,
        dimension=job.settings["dimension"],
        counts=by_name(counts),
        seconds=seconds,
        tables={"counts": table},
    )
