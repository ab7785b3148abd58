"""Stage 2: encode a catalogue of Hive text, exactly, in bounded memory, and so that it can be interrupted."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.embeddings.base import VECTOR, ending_of, ids_path, is_plain, is_text, manifest_path, read_manifest
from ebr_lib.data.finder import EMPTY, OWN, FoundFiles, find_files, name_of, partitions_of
from ebr_lib.data.hive import EMPTY_LINE, Layout, Source, is_empty, need_columns, open_source, read_rows, readable
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.files import check_apart, check_output_file, followed, sha256_of, write_json
from ebr_lib.inference.config import InferenceConfig, delimiter_byte, escape_byte
from ebr_lib.inference.hints import HINT_ROWS, Reject, likely_knobs, read_rejects
from ebr_lib.inference.job import (
    SKIPPED,
    Job,
    Outcome,
    drop_run,
    new_inputs,
    refuse_other_engine,
    rejects_path,
    told_when_full,
    work_folder,
)
from ebr_lib.inference.local import EncoderFacts, LocalEngine
from ebr_lib.inference.moved import with_known_names
from ebr_lib.inference.ray_cluster import RayEngine, check_output_folder
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.bases import look_for_bases_in
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import find_model
from ebr_lib.model.provenance import ModelIdentity, files_of, identify
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, as_text, make_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ebr_lib.model.encoder import EncodeStats

COUNTS = (
    "read",
    "written",
    "rejected",
    "healed",
    "empty",
    "line_breaks",
    "altered",
    "encoded",
    "duplicates",
    "uncounted",
    "truncated",
    "tokens",
    "tokens_lost",
    "slots",
)
AS_THEY_ARE = "write Parquet (output_path ….parquet), or leave the column out of output_columns"
SAMPLED_BYTES, SAMPLED_ROWS = 1 << 24, 100_000  # of input from which on a sample is read first; rows in it
OF_TOKENS = ("truncated", "tokens", "tokens_lost", "slots")


@dataclass(frozen=True, repr=False)
class InferenceResult(TableRepr):
    """What an inference run wrote and counted.

    :param output: the embedding file.
    :param manifest: JSON beside it: model, prompt, inputs, counts. The config lies there too, as `<output>.yaml`.
    :param rejects: the rows that are not in the output, with the reason; None when there are none.
    :param counts: rows read, written, rejected, duplicates and so on, by name; those of tokens are None where a model
        prepares texts its own way, of so many rows as are `uncounted`.
    :param seconds: what the run took, loading the model included.
    """

    output: Path
    manifest: Path
    rejects: Path | None
    dimension: int
    counts: dict[str, int | None]
    seconds: float
    tables: dict[str, DataFrame] = field(compare=False)


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
    look_for_bases_in(config.base_model_path)
    output = followed(Path(config.output_path))
    check_apart([output, manifest_path(output), _config_path(output), rejects_path(output)], [config.presets])
    check = check_output_folder if config.engine == "ray" else check_output_file
    check(output)
    check_remote_code(config.model_name, config.trust_remote_code)
    sources, layout, found = _open_inputs(config, output)
    kept = _kept_columns(config, sources)
    _check_sample(_not_held(config, sources, output), [*kept, config.description_column], layout, config)
    logger.info("推理输入: %d 个文件, %.1f MB (input files)", len(sources), sum(s.size for s in sources) / 1e6)
    with _engine(config) as engine:
        # now that a model of the hub is here
        choice = check_remote_code(config.model_name, config.trust_remote_code)
        identity = identify(config.model_name, choice)
        job = _job(config, sources, layout, _settings(config, engine.facts, identity, kept))
        outcome, bar = _finished(job, engine, identity, config, found)
        if new_inputs(job, outcome.inputs):  # it finished an interrupted run, which did not know of these
            outcome, bar = _finished(job, engine, identity, config, found)
    return _result(job, outcome, bar, time.perf_counter() - started)


def _finished(
    job: Job, engine: LocalEngine | RayEngine, identity: ModelIdentity, config: InferenceConfig, found: FoundFiles
) -> tuple[Outcome, _Bar]:
    """Run a job to its end, the manifest included."""
    with told_when_full(job.folder), contextlib.closing(_Bar()) as bar:
        outcome = engine.run(job, bar, partial(_check_losses, job, config.max_rejected_share))
        write_json(manifest_path(job.output), _manifest(job, identity, outcome) | {"not_read": found.named()})
        config.save(_config_path(job.output))
        engine.finish(job)
    return outcome, bar


# --- input --------------------------------------------------------------------------------------------------------


def _open_inputs(config: InferenceConfig, output: Path) -> tuple[list[Source], Layout, FoundFiles]:
    layout = Layout(
        delimiter=delimiter_byte(config.delimiter),
        columns=config.columns or None,
        encoding=config.encoding,
        heal=config.heal_rows,
        quoting=config.quoting,
        escape=escape_byte(config.escaped_by),
    )
    found = find_files(config.data_path, config.file_patterns, "data_path")
    found = _with_rows(_not_written_here(found, output))
    found.log("set file_patterns to take them in")
    _need_files(found, config.file_patterns)
    sources = [_opened(file, layout, found.root) for file in found.files]
    _say_partitions(sources, found, config.output_columns)
    for source in sources:
        need_columns(source, [config.description_column, *config.output_columns], layout.delimiter)
    return sources, layout, found


def _opened(file: Path, layout: Layout, root: Path) -> Source:
    return open_source(file, layout, name_of(file, root), partitions_of(file, root))


def _say_partitions(sources: list[Source], found: FoundFiles, kept: tuple[str, ...]) -> None:
    """Log the columns that folders give, and warn of those that the files hold too."""
    given = dict.fromkeys(name for source in sources for name in source.partitions if name not in kept)
    if given:
        names = ", ".join(given)
        logger.info("分区列 partition columns: %s (name them in output_columns to keep them)", names)
    for source in sources:
        if both := [name for name in partitions_of(source.path, found.root) if name in source.columns]:
            logger.warning(
                "%s: column %s is in the file and in its folder's name: the file's is read", source.path, both[0]
            )
            return


def _need_files(found: FoundFiles, patterns: tuple[str, ...]) -> None:
    """Check that there is a file to read.

    :raises DataError: says what the folder holds, and why that is not read.
    """
    if found.files:
        return
    if found.root.is_file():
        raise DataError(f"data_path {found.root} is empty")
    held = "; ".join(f"{name} ({reason})" for name, reason in list(found.named().items())[:5]) or "nothing"
    raise DataError(
        f"data_path {found.root}: no file to read that matches {' or '.join(patterns)}; the folder holds {held}; "
        "give the file itself, or set file_patterns"
    )


def _not_written_here(found: FoundFiles, output: Path) -> FoundFiles:
    """The files without those that an earlier run wrote, where the output lies among the input.

    :raises ConfigError: the run would write over an input.
    """
    places = {place.resolve() for place in (output, ids_path(output), manifest_path(output), _config_path(output))}
    places |= {work_folder(output).resolve(), rejects_path(output).resolve()}
    own = [
        path
        for path in (*found.files, *found.left_out)
        if not places.isdisjoint((path.resolve(), *path.resolve().parents))
    ]
    taken = [path for path in own if path in found.files]
    written = manifest_path(output).is_file() or work_folder(output).is_dir()
    if taken and (len(taken) == len(found.files) or not written):
        raise ConfigError(f"output_path {output}: the run would write over its input {taken[0]}; give another place")
    return found.without(own, OWN)


def _with_rows(found: FoundFiles) -> FoundFiles:
    return found.without([file for file in found.files if is_empty(file)], EMPTY)


def _kept_columns(config: InferenceConfig, sources: list[Source]) -> tuple[str, ...]:
    kept = config.output_columns or _all_columns(sources)
    in_text = is_text(config.output_path)
    for name in kept:
        if "\ufffd" in name:
            raise DataError(
                f"{sources[0].path}: the column name {name!r} is no {sources[0].encoding}; set encoding to what the "
                "file is written in, or name the columns to keep in output_columns"
            )
        if in_text and not is_plain(name.encode()):
            raise DataError(
                f"{sources[0].path}: the column name {name!r} holds what separates fields or rows of text; "
                "name the columns to keep in output_columns, or write .parquet"
            )
    for source in sources:
        need_columns(source, kept, delimiter_byte(config.delimiter))
    return kept


def _all_columns(sources: list[Source]) -> tuple[str, ...]:
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
    return tuple({"path": s.name, "size": s.size, "sha256": _sha256(s)} for s in bar)


def _sha256(source: Source) -> str:
    with readable(source.path):
        return sha256_of(source.path)


# --- model --------------------------------------------------------------------------------------------------------


def _recipe(config: InferenceConfig) -> EncoderSpec:
    return EncoderSpec(
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


@contextlib.contextmanager
def _engine(config: InferenceConfig) -> Iterator[LocalEngine | RayEngine]:
    recipe = _recipe(config)
    if config.engine == "ray":
        recipe = replace(recipe, model_name=find_model(recipe.model_name))  # workers have another current folder
        engine: LocalEngine | RayEngine = RayEngine(recipe, config.num_actors, config.ray_address)
    else:
        engine = LocalEngine(recipe, config.num_processes)
    facts = engine.facts
    logger.info(
        "模型: %s, %d 维, %s, %s (model, dimensions, precision, backend)",
        config.model_name,
        facts.dim,
        facts.precision,
        facts.backend,
    )
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


def _model_files(config: InferenceConfig, identity: ModelIdentity) -> list[str | None]:
    """What the model is made of; as an earlier version would say it, where an output of that is appended to."""
    before = (read_manifest(config.output_path) if config.append else None) or {}
    earlier = list(files_of(identity, with_place=True))
    return earlier if (before.get("settings") or {}).get("model files") == earlier else list(files_of(identity))


def _settings(
    config: InferenceConfig, facts: EncoderFacts, identity: ModelIdentity, kept: tuple[str, ...]
) -> dict[str, Any]:
    """All that decides what is written; speed and place do not."""
    # only where it matters: an output of before may be appended to
    own_code = {"trust_remote_code": identity.trust_remote_code} if identity.trust_remote_code else {}
    backend = {"backend": facts.backend} if facts.backend != "torch" else {}
    return (
        own_code
        | backend
        | _other_than_usual(config)
        | {
            "model": identity.sha256 or identity.path,
            "base model": identity.base_sha256 or identity.base_model,
            "model files": _model_files(config, identity),
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
    )


def _other_than_usual(config: InferenceConfig) -> dict[str, Any]:
    """Settings that came later, where they are not their defaults: outputs from before them can be appended to."""
    names = ("quoting", "escaped_by", "output_header")
    usual = InferenceConfig()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}


# --- the job ------------------------------------------------------------------------------------------------------


def _check_sample(sources: Sequence[Source], wanted: Sequence[str], layout: Layout, config: InferenceConfig) -> None:
    """Check, before hours of work on large input, that rows can be read: the first ones of each file.

    A file counts by its size, and up to twice `max_rejected_share` is left to the count of all rows in the end.

    :raises DataError: far too many cannot.
    """
    size = sum(source.size for source in sources)
    if size < SAMPLED_BYTES:
        return
    reasons, rejects, share, seen = Counter[str](), list[Reject](), 0.0, 0
    for source in sources:
        read = lost = 0
        for row in itertools.islice(read_rows(source, wanted, layout), max(20, SAMPLED_ROWS // len(sources))):
            read += 1
            if row.reason and row.reason not in SKIPPED:
                lost += 1
                reasons[row.reason] += 1
                if len(rejects) < HINT_ROWS:
                    rejects.append(Reject(source.name.encode(), row.position.line, row.reason, row.raw.split(b"\n")[0]))
        seen += read
        share += source.size / size * lost / max(1, read)
    if share <= 2 * config.max_rejected_share:
        return
    accepted = min(1.0, math.ceil(100 * share + 1) / 100)
    raise DataError(
        f"{config.data_path}: of the first {seen} rows of its files, {share:.0%} cannot be read ({_most(reasons)}), "
        f"more than max_rejected_share {config.max_rejected_share:g}; nothing was encoded, and what was there stays"
        f"{_hints(rejects, layout, sources)}\nOr accept the loss with --max_rejected_share {accepted:g}"
    )


def _not_held(config: InferenceConfig, sources: list[Source], output: Path) -> list[Source]:
    """The sources that an output which is appended to does not hold yet."""
    before = (read_manifest(output) or {}) if config.append else {}
    held = {entry["path"] for entry in before.get("inputs", [])}
    return [source for source in sources if source.name not in held]


def _most(reasons: Counter[str]) -> str:
    return "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(5))


def _hints(rejects: Sequence[Reject], layout: Layout, sources: Sequence[Source]) -> str:
    return "".join(f"\n  - {hint}" for hint in likely_knobs(rejects, layout, _given(sources)))


def _check_losses(job: Job, most: float, outcome: Outcome, rejects: Sequence[Path]) -> None:
    """Check that what a run wrote is worth being put in its place.

    :param most: share of the rows that may be lost; those that held no text are not.
    :param rejects: files of the rows that are not in the output.
    :raises DataError: nothing was written, or too many rows were lost.
    """
    counts, reasons = outcome.new_counts, outcome.new_reasons
    skipped = sum(reasons[reason] for reason in SKIPPED)
    lost, read = counts["rejected"] - skipped, counts["read"] - reasons[EMPTY_LINE]
    if counts["written"] and lost <= most * read:
        return
    if not counts["read"] and job.append and outcome.counts["written"]:
        return  # new files without a row leave the output as it was
    why = _most(reasons) or "the files hold no rows"
    hints = _hints(read_rejects(rejects), job.layout, job.sources)
    where = f"\nThe rejects are in {rejects[0]}" if counts["rejected"] and rejects else ""
    if not counts["written"]:
        raise DataError(f"{job.output}: none of {read} rows was written ({why}); what was there stays{hints}{where}")
    share = math.ceil(1000 * lost / read) / 1000
    raise DataError(
        f"{job.output}: {lost} of {read} rows could not be read ({why}), more than max_rejected_share "
        f"{most:g}; what was there stays{hints}\nOr accept the loss with --max_rejected_share {share:g}: the same call "
        f"then ends at once{where}"
    )


def _given(sources: Sequence[Source]) -> list[str]:
    """Columns that the folders of the input give, whether the files hold them too or not."""
    return list(dict.fromkeys(name for source in sources for name in partitions_of(Path(source.name), Path())))


def _job(config: InferenceConfig, sources: list[Source], layout: Layout, settings: dict[str, Any]) -> Job:
    job = Job(
        sources=tuple(sources),
        layout=layout,
        text_column=config.description_column,
        kept=tuple(settings["output_columns"]),
        output=followed(Path(config.output_path)),
        settings=settings,
        inputs=_hashed(sources),
        on_empty_text=config.on_empty_text,
        window_rows=config.window_rows,
        append=config.append,
        with_header=config.output_header,
    )
    if config.restart and job.folder.exists():
        logger.info("放弃未完成的运行: %s (restart: the unfinished run is dropped)", job.folder)
        drop_run(job.folder)
    refuse_other_engine(job.folder, in_parts=config.engine == "ray")
    return with_known_names(job)


def _config_path(output: Path) -> Path:
    return Path(f"{output}.yaml")


class _Bar:
    """Shows how far a job is, an interrupted one from where it stopped; knows how many texts it has encoded."""

    def __init__(self) -> None:
        self.texts, self.speed = 0, 0.0
        self._began = time.perf_counter()
        self._bar: Any = None

    def __call__(self, rows: int, texts: int, share: float) -> None:
        from tqdm.auto import tqdm

        self.texts, self.speed = texts, texts / (time.perf_counter() - self._began)
        if self._bar is None:
            self._bar = tqdm(desc="编码 encode", unit="row", unit_scale=True, initial=rows)
        self._bar.total = round(rows / share) if share else None
        self._bar.set_postfix_str(f"{self.speed:.0f} texts/s", refresh=False)
        self._bar.update(rows - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _manifest(job: Job, identity: ModelIdentity, outcome: Outcome) -> dict[str, Any]:
    counts = outcome.counts
    return {
        "model": asdict(identity),
        "prompt": job.settings["prompt"],
        "dimension": job.settings["dimension"],
        "precision": job.settings["precision"],
        "settings": job.settings,
        "inputs": outcome.inputs,
        "bytes": outcome.size,
        "rows": _told(counts),
        "line_breaks": dict(outcome.breaks),
        "altered": dict(outcome.altered),
        "rejects": {"file": job.rejects.name if outcome.reasons else None, "reasons": dict(outcome.reasons)},
        "truncated": {
            "rows": _told(counts)["truncated"],
            "token_share": None if counts["uncounted"] else _stats(counts).lost_share,
            "examples": outcome.examples,
        },
    }


def _result(job: Job, outcome: Outcome, bar: _Bar, seconds: float) -> InferenceResult:
    counts = outcome.counts
    table = make_table(str(job.output), ("项目 what", "值 value"), _summary(counts, bar, outcome.size))
    logger.info("向量已保存: %s (%d 行, %.1f 秒)", job.output, counts["written"], seconds)
    logger.info("%s", as_text(table), extra=RESULT)
    for reason, number in outcome.reasons.most_common():
        logger.warning("拒收 %d rows rejected: %s (see %s)", number, reason, job.rejects)
    rejects = job.rejects if outcome.reasons else None
    for hint in likely_knobs(read_rejects([rejects]), job.layout, _given(job.sources)) if rejects else ():
        logger.warning("%s", hint)
    if outcome.altered:
        logger.warning(
            "保留列的 \\001、换行已写成空格，\\N 写成空值 kept values written with a space for \\001 or a newline, "
            "or as null for \\N: %s; %s",
            _by_column(outcome.altered),
            AS_THEY_ARE,
        )
    if outcome.breaks:
        logger.warning(
            "保留列含换行类字符 kept values with a line break such as \\r or U+2028: %s; Spark and pandas may split "
            "such rows: %s",
            _by_column(outcome.breaks),
            AS_THEY_ARE,
        )
    return InferenceResult(
        output=job.output,
        manifest=manifest_path(job.output),
        rejects=rejects,
        dimension=job.settings["dimension"],
        counts=_told(counts),
        seconds=seconds,
        tables={"counts": table},
    )


def _by_column(counts: Counter[str]) -> str:
    return ", ".join(f"{column} {number}" for column, number in counts.most_common())


def _told(counts: Counter[str]) -> dict[str, int | None]:
    """The counts by name; those of tokens are not known of a model that prepares texts its own way."""
    unknown = OF_TOKENS if counts["uncounted"] else ()
    return {name: None if name in unknown else counts[name] for name in COUNTS}


def _stats(counts: Mapping[str, int]) -> EncodeStats:
    from ebr_lib.model.encoder import EncodeStats

    return EncodeStats(**{name: counts[name] for name in ("tokens", "slots", "truncated", "tokens_lost")})


def _summary(counts: Counter[str], bar: _Bar, size: int) -> Iterator[tuple[str, Any]]:
    yield "rows read 读入", counts["read"]
    yield "written 写出", counts["written"]
    yield "rejected 拒收", counts["rejected"]
    yield "healed 接回", counts["healed"]
    yield "without text 无文本", counts["empty"]
    if counts["line_breaks"]:
        yield "kept line breaks 含换行类字符", counts["line_breaks"]
    if counts["altered"]:
        yield "kept values altered 保留值已改写", counts["altered"]
    yield "texts encoded 编码文本", counts["encoded"]
    yield "encoded in this run 本次编码", bar.texts
    yield "texts/s 每秒编码", f"{bar.speed:.0f}"
    yield "duplicates 重复", counts["duplicates"]
    yield "truncated 截断", "-" if counts["uncounted"] else counts["truncated"]
    yield "tokens lost 丢失 token", "-" if counts["uncounted"] else f"{_stats(counts).lost_share:.2%}"
    yield "padding 填充", f"{_stats(counts).padding_share:.1%}" if counts["slots"] else "-"
    yield "MB", f"{size / 1e6:.1f}"
