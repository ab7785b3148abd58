"""Search an index."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.index import store
from ebr_lib.index.config import SearchConfig
from ebr_lib.index.faiss_tools import (
    comparable_vectors,
    load_faiss,
    of_all_cells,
    reconstructed,
    search_parameters,
    transformed,
)
from ebr_lib.index.filters import allowed_values, check_unicode
from ebr_lib.logs import RESULT, logger
from ebr_lib.metrics import unit
from ebr_lib.model.bases import look_for_bases_in
from ebr_lib.model.provenance import Provenance, check_same_code, say_changed_files, weights_of
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.names import Asked, Choice, OnChangedVectors
from ebr_lib.tables import as_html, as_text, make_table

if TYPE_CHECKING:
    import pyarrow as pa

    from ebr_lib.model.encoder import Encoder


class SearchResult(pd.DataFrame):
    """What a query found, best first: rank, score (cosine) and the kept columns, which are texts or null.

    The index is the row number, as `delete_rows` takes it. `attrs` has `query`, `milliseconds`, which include the
    encoding of the query, and `text_column`, the column that was encoded.
    """

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def query_spec(manifest: Mapping[str, Any], dim: int, model_name: str | None, **knobs: Any) -> EncoderSpec:
    """How to encode queries for an index: with the model that made it, cut to its dimension.

    If the model is not known nothing is cut: another dimension then most likely means another model.
    """
    maker = Provenance.of(manifest)
    moved = maker.path is None or not Path(maker.path).is_dir()
    name = model_name or (maker.name if moved else maker.path)
    if name is None:
        raise ModelError("which model made these vectors is not known (they had no manifest); give model_name")
    return EncoderSpec(
        model_name=name,
        max_seq_length=maker.max_seq_length,
        truncate_dim=dim if maker.sha256 else None,
        precision=cast(Asked, maker.precision) if maker.precision in get_args(Asked) else "auto",
        backend="torch",  # converting a model takes longer than encoding a few queries
        **knobs,
    )


@functools.lru_cache(maxsize=2)
def query_encoder(spec: EncoderSpec, maker: Provenance, dim: int, where: str) -> Encoder:
    """The query encoder of an index, cached, so that the next search does not load the model again.

    :raises ModelError: the model is not the one that made the vectors, or has fewer dimensions.
    """
    check_same_code(maker, spec.model_name, spec.trust_remote_code)
    encoder = spec.encoder("query")
    found = weights_of(spec.model_name)
    advice = "give the model that made them, or encode and index again with this one"
    if maker.sha256 is None:
        logger.warning(
            "%s: 未知由哪个模型生成 which model made these vectors is not known; assumed: %s", where, spec.model_name
        )
    elif not maker.weights & found:
        raise ModelError(
            f"{where} holds vectors of model {maker.name} (weights sha256 {maker.sha256[:12]}…), but "
            f"{spec.model_name} has {', '.join(f'{sha[:12]}…' for sha in sorted(found)) or 'none'}: "
            f"their vectors cannot be compared; {advice}"
        )
    say_changed_files(maker, spec.model_name, where, spec.on_changed_vectors)
    if encoder.dim != dim:
        raise ModelError(f"{where} holds vectors of {dim} dimensions, {spec.model_name} makes {encoder.dim}; {advice}")
    return encoder


def search(
    index: str | Path | SearchIndex,
    query: str | None = None,
    k: int = 10,
    *,
    like: str | Sequence[str] | None = None,
    id_column: str | None = None,
    where: Mapping[str, object] | None = None,
    distinct: bool | None = None,
    diversity: float = 0.0,
    model_name: str | None = None,
    query_prompt: str | None = None,
    trust_remote_code: Choice = False,
    base_model_path: str | Sequence[str] | None = None,
    on_changed_vectors: OnChangedVectors = "error",
) -> SearchResult:
    """Find the k rows nearest to a query, or to rows of the index. Index and model stay loaded for the next search.

    :param index: an index folder, or an opened one (`open_index`).
    :param query: the text to search for; None if `like` is given.
    :param like: find rows similar to the one with this id, or to the mean of several, as their vectors are in the
        index; these rows, and rows with the same vector, are not found. No model is loaded.
    :param id_column: the kept column that holds the ids of `like`; None takes the index's.
    :param where: filter on kept columns: column to the allowed value or values. Numbers mean their texts, None and NaN
        mean null.
    :param distinct: of rows with the same vector find only the first; None does so if `like` or `diversity` is given.
    :param diversity: from 0, the nearest, towards 1, those unlike what was found before: the next row has the largest
        (1 - diversity) · cosine to the query - diversity · largest cosine to the rows before it (maximal marginal
        relevance; Carbonell and Goldstein, SIGIR 1998), among the first 5 · k.
    :param model_name: the model, if it is not where the index's manifest says.
    :param query_prompt: put before the query; None takes what the model was trained with.
    :param trust_remote_code: as when the index's vectors were made; see `load_model`.
    :param base_model_path: where the base of a fine-tuned model is now, if it was moved.
    :param on_changed_vectors: raise an error when the model is no longer what it was, or only warn.
    :raises ConfigError: `k` is not a whole number from 1, `diversity` not from 0 to 1, `where` not a mapping, or both
        `query` and `like` are given.
    :raises ModelError: the model is not the one that made the index's vectors.
    :raises DataError: a blank query, an id that no row has, a filter on a column that is not kept, a damaged index.
    :raises MissingError: there is no index at this place.
    """
    if query is not None and like is not None:
        raise ConfigError("search: give a query, or ids as like, and not both")
    text = _checked_query(query) if like is None else f"like {like}"
    if not 0 <= diversity < 1:
        raise ConfigError(f"diversity: {diversity!r}; wanted a number from 0 to below 1")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k: {k!r}; wanted a whole number from 1")
    allowed = allowed_values({} if where is None else where)
    held = index if isinstance(index, SearchIndex) else opened(str(index), store.index_stamp(index))
    start = time.perf_counter()
    if like is not None:
        own = held.rows_like([like] if isinstance(like, str) else list(like), id_column)
        vector = held.mean_vector(own)
    else:
        look_for_bases_in(base_model_path)
        knobs = {
            "query_prompt": query_prompt,
            "trust_remote_code": trust_remote_code,
            "on_changed_vectors": on_changed_vectors,
        }
        spec = query_spec(held.manifest, held.index.d, model_name, **knobs)
        encoder = query_encoder(spec, Provenance.of(held.manifest), held.index.d, str(held.folder))
        own, start = np.empty(0, np.int64), time.perf_counter()
        vector = encoder.encode([text])[0]
    distinct = like is not None or diversity > 0 if distinct is None else distinct
    found = held.find(vector, int(k), allowed, hidden=own, distinct=distinct, diversity=diversity)
    milliseconds = 1000 * (time.perf_counter() - start)
    names = _answer_names([store.ROW, *held.rows.column_names[1:]])
    columns = ["rank", "score", *names.values()]
    rows = [(rank, score, *row.values()) for rank, (score, row) in enumerate(found, 1)]
    table = make_table(f"检索 search: {text}", columns, rows, width=SHOWN).set_index(names[store.ROW])
    result = SearchResult(table)
    encoded = Provenance.of(held.manifest).description_column
    result.attrs = table.attrs | {"query": text, "milliseconds": milliseconds, "text_column": encoded}
    return result


def _checked_query(query: object) -> str:
    """The query, if it is a text with some words.

    :raises DataError: it is not.
    """
    if not isinstance(query, str):
        raise DataError(f"the query is {query!r}; wanted a text")
    if not query.strip():
        raise DataError("the query is blank; give some words")
    check_unicode("the query", query)
    return query


def _answer_names(columns: Sequence[str]) -> dict[str, str]:
    """Names of the kept columns in an answer, which has a rank and a score of its own: `score` becomes `score_kept`."""
    names = {}
    for name in columns:
        shown = name
        while shown in ("rank", "score") or (shown != name and shown in columns):
            shown += "_kept"
        names[name] = shown
    return names


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
        None if config.like else config.query,
        config.k,
        like=config.like or None,
        id_column=config.id_column,
        where=where,
        distinct=config.distinct,
        diversity=config.diversity,
        model_name=config.model_name,
        query_prompt=config.query_prompt,
        trust_remote_code=config.trust_remote_code,
        base_model_path=config.base_model_path,
        on_changed_vectors=config.on_changed_vectors,
    )
    logger.info("%s", result, extra=RESULT)
    return result


NO_ROWS = np.empty(0, np.int64)
POOL = 5  # times k: nearest rows that diverse ones are chosen from
SHOWN = 100  # half-width columns of a kept text that a table shows
EXACT_ROWS = 20_000  # up to this many allowed rows, comparing them one by one is faster than scanning all
SPARE_ROWS = 100  # rows to look for at least, if some may be deleted
TRIES, PAUSE = 3, 0.02  # a reader reads a folder so often, with pauses in seconds, before it believes a fault


@dataclass
class SearchIndex:
    """An opened index folder.

    :ivar deleted: numbers of hidden rows.
    :ivar of_row: the number of each row's vector; empty if no two rows share one.
    """

    folder: Path
    index: Any = field(repr=False)
    rows: pa.Table = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    deleted: Ints = field(repr=False)
    of_row: Ints = field(repr=False, default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.rows) - len(self.deleted)

    def find(
        self,
        query: Vectors,
        k: int,
        where: Mapping[str, Sequence[str | None]],
        *,
        hidden: Ints = NO_ROWS,
        distinct: bool = False,
        diversity: float = 0.0,
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k nearest rows of one unit vector: score (cosine) and kept columns, best first; rows with the same
        vector in their order.

        :param where: column to the allowed values; None is null.
        :param hidden: rows that are not found, nor others with their vectors.
        :param distinct: of rows with the same vector find only the first.
        :param diversity: see `search`.
        :raises DataError: the vector has another dimension, or a column is not kept.
        """
        if query.shape != (self.index.d,):
            raise DataError(f"{self.folder}: the query has {query.shape[-1]} dimensions, the index {self.index.d}")
        allowed = self._allowed(where)
        vectors = self._with_rows(allowed)
        vectors[self._vectors_of(hidden)] = False
        search = self._nearest_of_allowed if where else self._nearest
        pool = POOL * k if diversity else k
        scores, ids = self._rows_of(*search(query, pool, vectors), allowed, pool, distinct=distinct)
        if diversity:
            chosen = marginal(scores, reconstructed(self.index, self._vectors_of(ids)), k, diversity)
            scores, ids = scores[chosen], ids[chosen]
        found = self.rows.take(ids).to_pylist()
        return [(float(score), row) for score, row in zip(scores, found, strict=True)]

    def _allowed(self, where: Mapping[str, Sequence[str | None]]) -> NDArray[np.bool_]:
        """Which rows may be found."""
        import pyarrow as pa
        import pyarrow.compute as pc

        allowed = np.ones(len(self.rows), dtype=bool)
        allowed[self.deleted] = False
        for name, values in where.items():
            if name not in self.rows.column_names[1:]:
                kept = ", ".join(self.rows.column_names[1:]) or "none"
                raise DataError(f"{self.folder}: no column {name} to filter by; kept columns are {kept}")
            allowed &= pc.is_in(self.rows.column(name), value_set=pa.array(values, pa.string())).to_numpy()
        return allowed

    def _with_rows(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which vectors have a row that may be found."""
        if not len(self.of_row):
            return allowed.copy()
        some = np.zeros(self.index.ntotal, dtype=bool)
        some[self.of_row[allowed]] = True
        return some

    @functools.cached_property
    def _rows_by_vector(self) -> tuple[Ints, Ints]:
        """Rows in the order of their vectors, and where each vector's rows begin."""
        order = np.argsort(self.of_row, kind="stable")
        return order, np.searchsorted(self.of_row[order], np.arange(self.index.ntotal + 1))

    def _rows_of(
        self, scores: Vectors, ids: Ints, allowed: NDArray[np.bool_], k: int, *, distinct: bool
    ) -> tuple[Vectors, Ints]:
        """The first k rows that have the vectors and may be found."""
        if not len(self.of_row):
            return scores, ids
        order, starts = self._rows_by_vector
        most = 1 if distinct else k
        rows = [sharing[allowed[sharing]][:most] for i in ids for sharing in [order[starts[i] : starts[i + 1]]]]
        counts = [len(part) for part in rows]
        return np.repeat(scores, counts)[:k], np.concatenate([np.empty(0, np.int64), *rows])[:k]

    def _nearest(self, query: Vectors, k: int, allowed: NDArray[np.bool_]) -> tuple[Vectors, Ints]:
        """The k nearest vectors by the index's own search, without those of deleted rows.

        These are few as a rule, so look for more than k and leave them out; if too few vectors are left, or the cells
        that were searched held too few, compare all.
        """
        wanted = min(k if allowed.all() else max(2 * k, SPARE_ROWS), self.index.ntotal)
        knob, setting = self.manifest["search"]["knob"], self.manifest["search"]["setting"]
        setting = max(setting, wanted) if knob == "efSearch" else setting
        scores, ids = _found(
            *self.index.search(query[None, :], wanted, params=search_parameters(self.index, knob, setting))
        )
        scores, ids = scores[allowed[ids]][:k], ids[allowed[ids]][:k]
        return (scores, ids) if len(ids) == min(k, allowed.sum()) else self._nearest_of_allowed(query, k, allowed)

    def _nearest_of_allowed(self, query: Vectors, k: int, allowed: NDArray[np.bool_]) -> tuple[Vectors, Ints]:
        """The k nearest of the allowed vectors, all of which are compared: if they lie far from the query, a graph or a
        few cells would find too few of them, or not the nearest."""
        if allowed.sum() <= EXACT_ROWS:
            ids = np.flatnonzero(allowed)
            if not len(ids):
                return np.empty(0, np.float32), ids
            scores = reconstructed(self.index, ids) @ query
            order = np.argsort(-scores, kind="stable")[:k]
            return scores[order], ids[order]
        part, wanted = comparable_vectors(self.index), transformed(self.index, query)
        bits = np.packbits(allowed, bitorder="little")  # must outlive the search
        selector = load_faiss().IDSelectorBitmap(bits)
        return _found(*part.search(wanted[None, :], min(k, len(allowed)), params=of_all_cells(part, selector)))

    def _vectors_of(self, rows: Ints) -> Ints:
        """The numbers of rows' vectors."""
        return self.of_row[rows] if len(self.of_row) else rows

    def mean_vector(self, rows: Ints) -> Vectors:
        """The mean of rows' vectors, scaled to length 1."""
        return unit(reconstructed(self.index, self._vectors_of(rows)).mean(axis=0, keepdims=True))[0]

    def rows_like(self, ids: Sequence[str], column: str | None) -> Ints:
        """Numbers of the rows with these ids, without deleted ones.

        :param column: the kept column that holds the ids; None takes the index's.
        :raises DataError: no row has an id, or all that had it are deleted; which column holds ids is not known.
        """
        if (name := column or self.manifest.get("id_column")) is None:
            kept = ", ".join(self.rows.column_names[1:]) or "none"
            raise DataError(f"{self.folder}: which column holds ids is not known; give id_column (kept: {kept})")
        rows = self.numbers_of(ids, name)
        rows = rows[~np.isin(rows, self.deleted)]
        if gone := set(ids) - set(map(str, self.rows.column(name).take(rows).to_pylist())):
            raise DataError(
                f"{self.folder}: the rows with ids {', '.join(sorted(gone)[:5])} are deleted; leave them out"
            )
        return rows

    def numbers_of(self, ids: Sequence[str], column: str) -> Ints:
        """Numbers of the rows that hold one of the ids.

        :raises DataError: no row has an id, or the column is not kept.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if column not in self.rows.column_names:
            raise DataError(f"{self.folder}: no column {column}; kept are {', '.join(self.rows.column_names[1:])}")
        values = pc.cast(self.rows.column(column), pa.string())
        if unknown := set(ids) - set(values.to_pylist()):
            shown = ", ".join(sorted(unknown)[:5])
            raise DataError(f"{self.folder}: {len(unknown)} ids are not in column {column} ({shown})")
        return np.flatnonzero(pc.is_in(values, value_set=pa.array(list(ids), pa.string())).to_numpy())

    def known_among(self, added: pa.Table) -> int:
        """How many added rows have an id that a row here, not hidden, has; 0 if no column is known to hold ids."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if (name := self.manifest.get("id_column")) is None:
            return 0
        hidden = np.isin(np.arange(len(self.rows)), self.deleted)
        known = pc.is_in(added.column(name), value_set=self.rows.column(name).filter(pa.array(~hidden)))
        return int(pc.sum(known).as_py() or 0)


def marginal(scores: Vectors, vectors: Vectors, k: int, diversity: float) -> Ints:
    """Places of k rows by maximal marginal relevance, see `search`; of equal ones the first.

    :param scores: cosines to the query (rows,).
    :param vectors: unit vectors (rows, dim).
    """
    chosen, nearest = list[int](), np.zeros(len(scores))
    left = np.ones(len(scores), bool)
    for _ in range(min(k, len(scores))):
        worth = np.where(left, (1 - diversity) * scores - diversity * nearest, -np.inf)
        best = int(worth.argmax())
        chosen.append(best)
        left[best] = False
        likeness = vectors @ vectors[best]
        nearest = likeness if len(chosen) == 1 else np.maximum(nearest, likeness)
    return np.array(chosen, np.int64)


def _found(scores: Vectors, ids: Ints) -> tuple[Vectors, Ints]:
    """What one query found, without the -1 that Faiss fills up with."""
    there = ids[0] >= 0
    return scores[0][there], ids[0][there]


def open_index(folder: str | Path) -> SearchIndex:
    """Open an index folder, all its files in one state, even while another process replaces them.

    :raises MissingError: it is not an index folder.
    :raises DataError: a file of it was cut short or does not fit the others.
    """
    folder, failed = Path(folder), 0
    for _ in range(100):
        before = store.index_stamp(folder)
        try:
            held = _open_once(folder)
        except (DataError, MissingError):
            failed = failed + 1 if store.index_stamp(folder) == before else 0
            if failed == TRIES:
                raise
        else:
            if store.index_stamp(folder) == before:
                return held
        time.sleep(PAUSE)
    raise DataError(f"{folder} is being rewritten all the time; search when that is done")


def _open_once(folder: Path) -> SearchIndex:
    manifest = store.read_manifest(folder)
    index = store.read_vectors(store.place_of(folder, store.INDEX_FILE), manifest["index_bytes"])
    rows = store.read_rows(store.place_of(folder, store.ROWS_FILE))
    of_row, _ = store.read_distinct(store.place_of(folder, store.VECTORS_FILE))
    vectors = manifest.get("vectors", manifest["rows"])
    if not (index.ntotal == vectors and len(rows) == manifest["rows"] and len(of_row) in (0, len(rows))):
        raise DataError(
            f"{folder}: {index.ntotal} vectors, {len(rows)} rows of columns, {manifest['rows']} in the manifest; "
            "build the index again"
        )
    deleted = store.read_deleted(store.place_of(folder, store.DELETED_FILE), len(rows))
    return SearchIndex(folder, index, rows, manifest, deleted, of_row)


@functools.lru_cache(maxsize=2)
def opened(folder: str, stamp: tuple[tuple[int, ...], ...]) -> SearchIndex:
    """`open_index`, cached while the folder's files stay as they are (`index_stamp`)."""
    return open_index(folder)
