"""Extension stage: a Faiss index over an embedding file, measured; and searching it."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.config import IndexConfig, SearchConfig
from ebr_lib.data.vectors import AGAIN, Embeddings, files_of, iter_embeddings, read_manifest
from ebr_lib.errors import ConfigError, DataError, ModelError
from ebr_lib.files import check_apart, check_replaceable, make_folder, write_json
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.loading import look_for_bases_in
from ebr_lib.model.precision import Asked
from ebr_lib.model.recipe import EncoderRecipe
from ebr_lib.model.remote_code import Choice
from ebr_lib.names import OnChangedVectors
from ebr_lib.retrieval.faiss_index import (
    ROW,
    TRAIN_POINTS,
    Distinct,
    Plan,
    Point,
    RowsWriter,
    SearchIndex,
    Truth,
    adding,
    cells_of,
    distinct_of,
    draw_curve,
    exact_neighbours,
    fill,
    new_index,
    open_index,
    opened,
    plan_index,
    read_rows,
    remedies,
    save_vectors,
    sweep,
    train,
    write_deleted,
)
from ebr_lib.retrieval.index_store import (
    BUILDING,
    LOCK,
    MANIFEST_FILE,
    READ_FILES,
    READY,
    ROWS_FILE,
    VECTORS_FILE,
    changed_together,
    index_stamp,
    locked,
)
from ebr_lib.retrieval.maker import Maker, check_same_code, say_changed_files, weights_of
from ebr_lib.retrieval.metrics import unit
from ebr_lib.retrieval.task import read_queries
from ebr_lib.tables import Shown, Table

if TYPE_CHECKING:
    from ebr_lib.model.encoder import Encoder

MANIFEST_SAYS = "its manifest says"
CONFIG_FILE, CURVE_FILE = "index_config.yaml", "recall_latency.png"
OWN_FILES = (*READ_FILES, CONFIG_FILE, CURVE_FILE, LOCK, BUILDING, READY)


@dataclass(frozen=True, repr=False)
class IndexResult(Shown):
    """What was built and measured. `points` are the settings tried, `chosen` the one that is saved."""

    folder: Path
    kind: str
    why: str
    rows: int
    dimension: int
    build_seconds: float
    bytes_per_vector: float
    points: tuple[Point, ...]
    chosen: Point
    knob: str | None
    measured_on: str
    table: Table = field(repr=False)


@dataclass(frozen=True, repr=False)
class SearchResult(Shown):
    """What a query found; `rows` hold rank, score and the kept columns. `milliseconds` include the query's encoding."""

    query: str
    rows: tuple[dict[str, Any], ...]
    milliseconds: float
    table: Table = field(repr=False)


def build_faiss_index(config: IndexConfig | Mapping[str, Any] | None = None) -> IndexResult:
    """Build an index over an embedding file, measure it, choose its setting; written to `output_dir` when whole.

    :param config: an IndexConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed), `kind` is no factory string, or
        `output_dir` holds other files than an index.
    :raises DataError: the embedding file is broken, or the queries' model is not the one that made it.
    :raises MissingError: the embedding file is not there; run the inference stage first.
    """
    config = IndexConfig.resolve(config)
    look_for_bases_in(config.base_model_path)
    folder = Path(config.output_dir)
    make_folder(folder if folder.is_dir() else folder.parent)
    check_replaceable(folder, OWN_FILES.__contains__)
    check_apart([folder], [*files_of(config.embedding_path), config.queries_path, config.presets])
    made_by = read_manifest(config.embedding_path) or {}
    rows, dim = _size(config.embedding_path, made_by)
    _check_columns(config.embedding_path, config.id_column)
    if not made_by:
        logger.warning("%s has no manifest: no search can check that its model made it", config.embedding_path)
    with locked(folder):
        plan = plan_index(rows, dim, config.kind, config.compression)
        index = new_index(plan, dim, config.ef_construction)  # refuse unusable kinds before encoding the queries
        real = _real_queries(config, made_by, dim)
        plan, index = _trained(config, plan, index, rows)
        logger.info("索引类型: %s (%s; %d dimensions)", plan.factory, plan.why, dim)
        with changed_together(folder) as new:
            built = _build(config, index, new, rows, real)
            result = _measure(config, plan, built, new)
            write_json(new / MANIFEST_FILE, _manifest(config, made_by, result, built))
            config.save(new / CONFIG_FILE)
    logger.info("%s", result.table.text(), extra=RESULT)
    logger.info("索引已保存: %s", result.folder)
    return result


@dataclass(frozen=True)
class _Built:
    index: Any
    bytes: int
    seconds: float
    truth: Truth
    rows: int


def _size(path: str, made_by: Mapping[str, Any]) -> tuple[int, int]:
    """How many vectors the file holds, or a few fewer than are told, and their dimension."""
    if (made_by.get("rows") or {}).get("written") and made_by.get("dimension"):
        return int(made_by["rows"]["written"]), int(made_by["dimension"])
    rows, dim = 0, 0
    for batch in iter_embeddings(path, ()):
        rows += len(batch)
        dim = dim or batch.vectors.shape[1]
    if not rows:
        raise DataError(f"{path} holds no vectors; {AGAIN}")
    return rows, dim


def _check_columns(path: str, id_column: str | None) -> None:
    """What is wrong with the kept columns is told before anything is built."""
    if id_column is not None:
        next(iter_embeddings(path, [id_column]))
    if ROW in next(iter_embeddings(path)).columns:
        raise DataError(f"{path}: the name of its column {ROW} is the index's own; give it another in output_columns")


def _batches(path: str | Path, columns: Sequence[str] | None, dim: int, wanted: str) -> Iterator[Embeddings]:
    """The batches of an embedding file, whose vectors must have as many dimensions as `wanted` says."""
    for batch in iter_embeddings(path, columns):
        if len(batch) and batch.vectors.shape[1] != dim:
            raise DataError(f"{path} holds vectors of {batch.vectors.shape[1]} dimensions, {wanted} {dim}")
        yield batch


def _real_queries(config: IndexConfig, made_by: Mapping[str, Any], dim: int) -> Vectors | None:
    """Vectors of the user's queries, a sample of them where there are many."""
    if config.queries_path is None:
        return None
    texts = read_queries(Path(config.queries_path), config.query_column)
    if len(texts) > config.measure_queries:
        chosen = np.random.default_rng(config.seed).choice(len(texts), config.measure_queries, replace=False)
        texts = [texts[i] for i in sorted(chosen)]
    recipe = _recipe(
        made_by,
        dim,
        config.model_name,
        query_prompt=config.query_prompt,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
    )
    return _encoder(recipe, Maker.of(made_by), dim, str(config.embedding_path)).encode(texts, show_bar=True)


def _trained(config: IndexConfig, plan: Plan, index: Any, rows: int) -> tuple[Plan, Any]:
    """The index with its cells trained, where its kind has any; kind auto takes another where the vectors are too few.

    :raises DataError: the file holds no vectors, or fewer different ones than the cells of a kind that was asked for.
    """
    if index.is_trained:
        return plan, index
    wanted = min(rows, max(TRAIN_POINTS * cells_of(index), 20_000))
    sample = np.sort(np.random.default_rng(config.seed).choice(rows, wanted, replace=False))
    vectors = _gathered(_batches(config.embedding_path, (), index.d, MANIFEST_SAYS), sample)
    _need_vectors(config, len(vectors))
    vectors = vectors[Distinct().place(vectors)]
    if config.kind == "auto" and len(vectors) < cells_of(index):
        plan = plan_index(len(vectors), index.d)  # nearly all rows share their vectors
        return plan, new_index(plan, index.d, config.ef_construction)
    train(index, vectors, config.seed)
    return plan, index


def _build(config: IndexConfig, index: Any, folder: Path, rows: int, real: Vectors | None) -> _Built:
    """Fill the index and find the exact neighbours to measure against."""
    dim = index.d
    start = time.perf_counter()
    sampled = 0 if real is not None else min(rows, config.measure_queries)
    sample = np.sort(np.random.default_rng(config.seed).choice(rows, sampled, replace=False))
    batches = _batches(config.embedding_path, None, dim, MANIFEST_SAYS)
    distinct, taken, own = fill(index, batches, folder / ROWS_FILE, sample)
    _need_vectors(config, index.ntotal)
    written = save_vectors(folder, index)
    distinct.save(folder / VECTORS_FILE)
    write_deleted(folder, sample[:0])
    seconds = time.perf_counter() - start
    if (shared := len(distinct.first) - index.ntotal) > 0:
        logger.info(
            "重复向量: %d 行的向量前面已有，只索引一次，仍可检索到 (rows with the vector of an earlier row)", shared
        )
    queries, own = (taken, own) if real is None else (real, np.full(len(real), -1))
    truth = exact_neighbours(index, _once(config.embedding_path, distinct.first), queries, own)
    return _Built(index, written, seconds, truth, len(distinct.first))


def _once(path: str, first: NDArray[np.bool_]) -> Iterator[Vectors]:
    """The distinct vectors of an embedding file, in order."""
    done = 0
    for batch in iter_embeddings(path, ()):
        if (new := first[done : done + len(batch)]).any():
            yield unit(batch.vectors[new])
        done += len(batch)


def _need_vectors(config: IndexConfig, found: int) -> None:
    if not found:
        raise DataError(f"{config.embedding_path} holds no vectors; {AGAIN}")


def _gathered(batches: Iterable[Embeddings], rows: Ints) -> Vectors:
    """Unit vectors of some rows of a file, counting those that have one."""
    done, parts = 0, []
    for batch in batches:
        low, high = np.searchsorted(rows, (done, done + len(batch)))
        parts.append(unit(batch.vectors[rows[low:high] - done]) if high > low else batch.vectors[:0])
        done += len(batch)
    return np.concatenate([part for part in parts if len(part)] or [np.empty((0, 0), np.float32)])


def _measure(config: IndexConfig, plan: Plan, built: _Built, folder: Path) -> IndexResult:
    points, chosen = sweep(built.index, built.truth, plan, config.target_recall)
    if chosen.recall < config.target_recall:
        better = remedies(built.index, built.truth, plan, config.target_recall)
        logger.warning(
            "召回不足: recall@10 %.4f is the best that %s gives here, target_recall is %.4f; "
            "以下 kind 实测可达到 (measured to reach it): %s",
            chosen.recall, plan.factory, config.target_recall,
            ", ".join(f"{kind} ({recall:.4f})" for kind, recall in better),
        )  # fmt: skip
    draw_curve(folder / CURVE_FILE, plan, points, chosen, config.target_recall)
    size = built.bytes / built.index.ntotal
    kind = "real queries" if config.queries_path else "vectors of the index, themselves left out"
    count = f"{built.rows:,}" + (f" rows, {n:,} vectors" if (n := built.index.ntotal) < built.rows else "")
    title = f"{plan.factory}, {count} × {built.index.d}: {size:,.0f} bytes per vector, built in "
    title += f"{built.seconds:.1f} s; {len(built.truth.queries)} {kind}"
    rows = [
        (
            "→" if p is chosen else "",
            p.setting if plan.knob else "all",
            p.recall,
            p.p50,
            p.p95,
            p.p99,
            f"{p.qps:,.0f}",
        )
        for p in points
    ]
    columns = ("", plan.knob or "compared", "recall@10", "p50 ms", "p95 ms", "p99 ms", "queries/s (batch)")
    return IndexResult(
        folder=Path(config.output_dir),
        kind=plan.factory,
        why=plan.why,
        rows=built.rows,
        dimension=built.index.d,
        build_seconds=built.seconds,
        bytes_per_vector=size,
        points=tuple(points),
        chosen=chosen,
        measured_on=kind,
        knob=plan.knob,
        table=Table(title, columns, rows),
    )


def _manifest(config: IndexConfig, made_by: Mapping[str, Any], result: IndexResult, built: _Built) -> dict[str, Any]:
    maker = Maker.of(made_by)
    return {
        "index_bytes": built.bytes,
        "vectors": int(built.index.ntotal),
        "kind": result.kind,
        "why": result.why,
        "metric": "inner product of unit vectors",
        "rows": result.rows,
        "dimension": result.dimension,
        "id_column": config.id_column,
        "search": {"knob": result.knob, "setting": result.chosen.setting, "target_recall": config.target_recall},
        "measured": {
            "queries": result.measured_on,
            "points": [asdict(point) for point in result.points],
            "build_seconds": result.build_seconds,
            "bytes_per_vector": result.bytes_per_vector,
        },
        "embedding_path": config.embedding_path,
        "model": (made_by.get("model") or {}) | ({"asked_for": config.model_name} if config.model_name else {}),
        "settings": {name: getattr(maker, name) for name in ("max_seq_length", "prompt", "precision")}
        | {"model files": list(maker.files)},
    }


# --- the model of an index ----------------------------------------------------------------------------------------


def _recipe(manifest: Mapping[str, Any], dim: int, model_name: str | None, **knobs: Any) -> EncoderRecipe:
    """How to encode queries for an index: with the model that made it, cut to its dimension.

    Where the maker is not known nothing is cut: another dimension then most likely means another model.
    """
    maker = Maker.of(manifest)
    moved = maker.path is None or not Path(maker.path).is_dir()
    name = model_name or (maker.name if moved else maker.path)
    if name is None:
        raise ModelError("which model made these vectors is not known (they had no manifest); give model_name")
    return EncoderRecipe(
        model_name=name,
        max_seq_length=maker.max_seq_length,
        truncate_dim=dim if maker.sha256 else None,
        precision=cast(Asked, maker.precision) if maker.precision in get_args(Asked) else "auto",
        backend="torch",  # converting a model takes longer than encoding some queries: the first answer comes sooner
        **knobs,
    )


@functools.lru_cache(maxsize=2)
def _encoder(recipe: EncoderRecipe, maker: Maker, dim: int, where: str) -> Encoder:
    """The query encoder of an index; remembered, so that a search need not load the model again.

    :raises ModelError: the model is not the one that made the vectors, or has fewer dimensions.
    """
    check_same_code(maker, recipe.model_name, recipe.trust_remote_code)
    encoder = recipe.encoder("query")
    found = weights_of(recipe.model_name)
    if maker.sha256 is None:
        logger.warning("%s: which model made these vectors is not known; taken to be %s", where, recipe.model_name)
    elif not maker.weights & found:
        raise ModelError(
            f"{where} holds vectors of model {maker.name} (weights sha256 {maker.sha256[:12]}…), but "
            f"{recipe.model_name} has {', '.join(f'{sha[:12]}…' for sha in sorted(found)) or 'none'}: "
            "their vectors cannot be compared; "
            "give the model that made them, or encode and index again with this one"
        )
    say_changed_files(maker, recipe.model_name, where, recipe.on_changed_vectors)
    if encoder.dim != dim:
        raise ModelError(
            f"{where} holds vectors of {dim} dimensions, {recipe.model_name} makes {encoder.dim}; "
            "give the model that made them, or encode and index again with this one"
        )
    return encoder


# --- searching ----------------------------------------------------------------------------------------------------


def search(
    index: str | Path | SearchIndex,
    query: str,
    k: int = 10,
    *,
    where: Mapping[str, object] | None = None,
    model_name: str | None = None,
    query_prompt: str | None = None,
    trust_remote_code: Choice = False,
    base_model_path: str | Sequence[str] | None = None,
    on_changed_vectors: OnChangedVectors = "error",
) -> SearchResult:
    """Find the k rows nearest to a query. Index and model stay loaded for the next search.

    :param index: an index folder, or an opened one (`open_index`).
    :param where: filter on kept columns: column to the value, or values, allowed. Numbers stand for their texts, None
        and NaN for null.
    :param model_name: the model, where it is not at the place that the index remembers.
    :param query_prompt: put before the query; None takes what the model was trained with.
    :param trust_remote_code: as when the index's vectors were made; see `load_model`.
    :param base_model_path: where the base of a fine-tuned model is now, if it was moved.
    :param on_changed_vectors: raise an error when the model is no longer what it was, or only warn.
    :raises ConfigError: `k` is no whole number from 1, or `where` no mapping.
    :raises ModelError: the model is not the one that made the index's vectors.
    :raises DataError: a blank query, a filter on a column that is not kept, an index that is not whole.
    :raises MissingError: there is no index at this place.
    """
    _check_query(query)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k: {k!r}; wanted a whole number from 1")
    allowed = _allowed_values({} if where is None else where)
    held = index if isinstance(index, SearchIndex) else opened(str(index), index_stamp(index))
    look_for_bases_in(base_model_path)
    knobs = {
        "query_prompt": query_prompt,
        "trust_remote_code": trust_remote_code,
        "on_changed_vectors": on_changed_vectors,
    }
    recipe = _recipe(held.manifest, held.index.d, model_name, **knobs)
    encoder = _encoder(recipe, Maker.of(held.manifest), held.index.d, str(held.folder))
    start = time.perf_counter()
    vector = encoder.encode([query])[0]
    found = held.find(vector, int(k), allowed)
    milliseconds = 1000 * (time.perf_counter() - start)
    names = _answer_names([ROW, *held.rows.column_names[1:]])
    rows = tuple(
        {"rank": i, "score": score} | {names[name]: value for name, value in row.items()}
        for i, (score, row) in enumerate(found, 1)
    )
    return SearchResult(query, rows, milliseconds, _shown(query, list(names.values())[1:], rows))


def _answer_names(columns: Sequence[str]) -> dict[str, str]:
    """Names of the kept columns in an answer: one called as the answer's own rank or score has `_kept` behind it."""
    names = {}
    for name in columns:
        shown = name
        while shown in ("rank", "score") or (shown != name and shown in columns):
            shown += "_kept"
        names[name] = shown
    return names


def _check_query(query: object) -> None:
    if not isinstance(query, str):
        raise DataError(f"the query is {query!r}; wanted a text")
    if not query.strip():
        raise DataError("the query is blank; give some words")
    _check_unicode("the query", query)


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} {text!r} holds half of a character ({text[error.start]!r}), which UTF-8 cannot write; it was "
            "cut or decoded wrongly before it came here"
        ) from error


def _allowed_values(where: object) -> dict[str, list[str | None]]:
    """A filter with its values as the kept columns hold them: texts, and None for null."""
    if not isinstance(where, Mapping):
        raise ConfigError(f"where: {where!r}; wanted column to value, such as {{'kind': 'a'}}")
    allowed = {str(name): _texts(values) for name, values in where.items()}
    for name, values in allowed.items():
        for value in values:
            _check_unicode(f"where: the value of {name}", value or "")
    return allowed


def _texts(values: object) -> list[str | None]:
    """One value or several, as kept columns hold them; a text is one value, not its letters."""
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if isinstance(values, np.ndarray) and not values.ndim:
        several, values = False, values[()]
    return [text for value in (cast(Iterable[object], values) if several else [values]) for text in _spelled(value)]


def _spelled(value: object) -> list[str | None]:
    """How a value can be written in a kept column: null as null, true in Hive's letters and in Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (type(value) is float and np.isnan(value)):
        return [None]
    if isinstance(value, bool):
        return [str(value).lower(), str(value)]
    if isinstance(value, bytes | Mapping) or (isinstance(value, Iterable) and not isinstance(value, str)):
        raise ConfigError(f"{value!r}; wanted a text, a number, a truth value or None, or a list of them")
    return [str(value)]


def _shown(query: str, kept: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["rank", "score", *kept]

    def cell(value: Any) -> Any:
        if value is None:
            return ""
        return f"{value[:100]}…" if isinstance(value, str) and len(value) > 100 else value

    return Table(f"检索 search: {query}", columns, [[cell(row[name]) for name in columns] for row in rows])


def run_search(config: SearchConfig | Mapping[str, Any] | None = None) -> SearchResult:
    """The command `python -m ebr_lib search "…"`: search once and show the table.

    :raises ConfigError: a knob is unknown or out of range.
    """
    config = SearchConfig.resolve(config)
    where: dict[str, list[str | None]] = {}
    for condition in config.where:
        column, _, value = condition.partition("=")
        where.setdefault(column, []).append(None if value == "\\N" else value)
    result = search(
        config.index_dir,
        config.query,
        config.k,
        where=where,
        model_name=config.model_name,
        query_prompt=config.query_prompt,
        trust_remote_code=config.trust_remote_code,
        base_model_path=config.base_model_path,
        on_changed_vectors=config.on_changed_vectors,
    )
    logger.info("%s", result.table.text(), extra=RESULT)
    return result


# --- changing -----------------------------------------------------------------------------------------------------


def add_rows(index_dir: str | Path, embedding_path: str | Path) -> int:
    """Add the rows of an embedding file to an index; returns how many it then has, hidden ones not counted.

    The setting that was measured stays; build anew when the index has grown by much.

    :raises ModelError: another model made the new vectors, or another prompt or length.
    :raises DataError: another dimension, or a kept column is missing.
    :raises MissingError: there is no index, or no embedding file, at its place.
    """
    folder = Path(index_dir)
    open_index(folder)  # a place that holds none is not made one
    with locked(folder):
        held = open_index(folder)
        columns = held.rows.column_names[1:]
        next(iter_embeddings(embedding_path, columns))  # report a missing file or column before the rest
        _check_same_maker(held, embedding_path)
        with changed_together(folder) as new:
            known = _add(held, embedding_path, new)
        left = len(held.rows) + known.added - len(held.deleted)
    if known.twice:
        logger.warning(
            "%d of the new rows have an id (column %s) that stood in the index already: both are found, delete_rows "
            "hides both", known.twice, held.manifest["id_column"],
        )  # fmt: skip
    return left


@dataclass(frozen=True)
class _Added:
    """Rows that were added, and how many have an id that the index had."""

    added: int
    twice: int


def _add(held: SearchIndex, embedding_path: str | Path, folder: Path) -> _Added:
    """Write an opened index with the rows of an embedding file behind its own to a folder."""
    for name in (CONFIG_FILE, CURVE_FILE):
        if (place := held.folder / name).is_file():
            shutil.copyfile(place, folder / name)
    columns, distinct, add = held.rows.column_names[1:], distinct_of(held), adding(held.index)
    write_deleted(folder, held.deleted)
    sidecar = RowsWriter(folder / ROWS_FILE, columns)
    for part in held.rows.to_batches():
        sidecar.add_batch(part)
    first = held.rows.column(ROW)[-1].as_py() + 1  # row numbers go on, so that each stands for one row
    for batch in _batches(embedding_path, columns, held.index.d, "the index"):
        if len(batch):
            vectors = unit(batch.vectors)
            if (new := distinct.place(vectors)).any():
                add(vectors[new])
            sidecar.add(batch.rows + first, batch.columns)
    sidecar.close()
    rows = read_rows(folder / ROWS_FILE)
    size = save_vectors(folder, held.index)
    distinct.save(folder / VECTORS_FILE)
    numbers = {"rows": len(rows), "vectors": int(held.index.ntotal), "index_bytes": size}
    write_json(folder / MANIFEST_FILE, held.manifest | numbers)
    return _Added(len(rows) - len(held.rows), held.known_among(rows.slice(len(held.rows))))


def _check_same_maker(held: SearchIndex, embedding_path: str | Path) -> None:
    """New rows must be made as the index's were; another precision is near enough."""
    maker, new = Maker.of(held.manifest), Maker.of(read_manifest(embedding_path) or {})
    if maker.sha256 != new.sha256 and not maker.weights & new.weights:
        raise ModelError(
            f"{embedding_path} holds vectors of {new.said}, the index {held.folder} of {maker.said}; "
            "encode the new rows with the index's model"
        )
    known = {name for name in ("prompt", "max_seq_length", "trust_remote_code") if getattr(maker, name) is not None}
    if wrong := maker.differences({name: getattr(new, name) for name in known}):
        raise ModelError(
            f"{embedding_path} was not made as the index {held.folder} was ({'; '.join(wrong)}); "
            "encode the new rows with the index's settings"
        )
    if maker.precision and (wrong := maker.differences({"precision": new.precision})):
        logger.warning("%s: another precision than the index's (%s)", embedding_path, wrong[0])


def delete_rows(index_dir: str | Path, ids: object, column: str | None = None) -> int:
    """Hide rows from every search, until the index is built again; returns how many rows are left.

    :param ids: one id or several.
    :param column: the kept column that holds the ids; None takes the index's `id_column`, else the row numbers.
    :raises DataError: an id is in no row, or the column is not kept.
    """
    folder, wanted = Path(index_dir), _ids(ids)
    open_index(folder)
    with locked(folder):
        held = open_index(folder)
        numbers = held.numbers_of(wanted, column or held.manifest["id_column"] or ROW)
        deleted = np.union1d(held.deleted, numbers)
        write_deleted(folder, deleted)
    return len(held.rows) - len(deleted)


def _ids(ids: object) -> list[str]:
    """One id or several, as texts."""
    found = _texts(ids)
    if None in found:
        raise ConfigError("ids: None is not an id; leave it out")
    return [text for text in found if text is not None]
