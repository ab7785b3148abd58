"""An opened index: the rows nearest to a vector, under filters."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.bm25 import Bm25
from ebr_lib.data.faiss_library import load_faiss
from ebr_lib.errors import DataError, MissingError
from ebr_lib.index import store
from ebr_lib.index.after import POOL, VECTORS_ALONE, After, Found, ordered, words_column
from ebr_lib.index.faiss_tools import (
    comparable_vectors,
    of_all_cells,
    reconstructed,
    search_parameters,
    transformed,
)
from ebr_lib.index.milvus import KIND, MilvusIndex, open_collection
from ebr_lib.index.store import NO_ROWS
from ebr_lib.metrics import unit

if TYPE_CHECKING:
    import pyarrow as pa

EXACT_ROWS = 20_000  # up to this many allowed rows, comparing them one by one is faster than scanning all
SPARE_ROWS = 100  # rows to look for at least, if some may be deleted
TRIES, PAUSE = 3, 0.02  # a reader reads a folder so often, with pauses in seconds, before it believes a fault


@dataclass
class SearchIndex:
    """An opened index folder.

    :ivar deleted: numbers of hidden rows.
    :ivar of_row: the number of each row's vector; empty if no two rows share one.
    :ivar bm25: over the rows' texts (`words_column`), if it is kept.
    """

    folder: Path
    index: Any = field(repr=False)
    rows: pa.Table = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    deleted: Ints = field(repr=False)
    of_row: Ints = field(repr=False, default_factory=lambda: np.empty(0, np.int64))
    bm25: Bm25 | None = field(repr=False, default=None)
    unfinished = ""  # all files change together

    def __len__(self) -> int:
        return len(self.rows) - len(self.deleted)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return int(self.index.d)

    @property
    def columns(self) -> list[str]:
        """Names of the kept columns."""
        return list(self.rows.column_names[1:])

    def find(
        self,
        query: Vectors,
        k: int,
        where: Mapping[str, Sequence[str | None]],
        *,
        hidden: Ints = NO_ROWS,
        distinct: bool = False,
        diversity: float = 0.0,
        after: After = VECTORS_ALONE,
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k best rows for one unit vector: score (cosine) and kept columns, best first; rows with the same vector
        in their order.

        :param where: column to the allowed values; None is null. All rankers see the allowed rows alone.
        :param hidden: rows that are not found, nor others with their vectors.
        :param distinct: of rows with the same vector find only the first.
        :param diversity: see `search`.
        :param after: what changes the order that the vectors give.
        :raises DataError: the vector has another dimension, or a column is not kept.
        """
        if query.shape != (self.dim,):
            raise DataError(f"{self.folder}: the query has {query.shape[-1]} dimensions, the index {self.dim}")
        allowed = self._allowed(where, hidden, distinct)
        found = self._nearest_rows(query, after.rows(POOL * k if diversity else k), allowed, all_compared=bool(where))
        words = self._words(after.text, allowed) if after.is_fused else None
        found = ordered(
            found, words, after, query=query, k=k, diversity=diversity, texts=self.texts, vectors=self._vectors
        )
        rows = self.rows.take(found.ids).to_pylist()
        return [(float(score), row) for score, row in zip(found.cosines, rows, strict=True)]

    def texts(self, rows: Ints, column: str) -> list[str]:
        """The texts of rows, empty for null."""
        return [text or "" for text in self.rows.column(column).take(rows).to_pylist()]

    def _words(self, query: str, allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
        """BM25's score of every row, -inf for those that share no word with the query or may not be found."""
        assert self.bm25 is not None
        scores = self.bm25.scores(query)
        return np.where(allowed, np.float32("-inf") if scores is None else scores, np.float32("-inf"))

    def _allowed(self, where: Mapping[str, Sequence[str | None]], hidden: Ints, distinct: bool) -> NDArray[np.bool_]:
        """Which rows may be found."""
        import pyarrow as pa
        import pyarrow.compute as pc

        allowed = np.ones(len(self.rows), dtype=bool)
        allowed[self.deleted] = False
        for name, values in where.items():
            if name not in self.columns:
                kept = ", ".join(self.columns) or "none"
                raise DataError(f"{self.folder}: no column {name} to filter by; kept columns are {kept}")
            allowed &= pc.is_in(self.rows.column(name), value_set=pa.array(values, pa.string())).to_numpy()
        if not len(self.of_row):
            allowed[hidden] = False
            return allowed
        if len(hidden):
            allowed &= ~np.isin(self.of_row, self.of_row[hidden])
        return self._first_of_vectors(allowed) if distinct else allowed

    def _first_of_vectors(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of the allowed rows with one vector, the first alone."""
        order, _ = self._rows_by_vector
        rows = order[allowed[order]]
        first = np.zeros_like(allowed)
        first[rows[np.diff(self.of_row[rows], prepend=-1) > 0]] = True
        return first

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

    def _nearest_rows(self, query: Vectors, k: int, allowed: NDArray[np.bool_], *, all_compared: bool) -> Found:
        """The k nearest of the allowed rows."""
        search = self._nearest_of_allowed if all_compared else self._nearest
        scores, ids = search(query, k, self._with_rows(allowed))
        if len(self.of_row):
            order, starts = self._rows_by_vector
            rows = [sharing[allowed[sharing]][:k] for i in ids for sharing in [order[starts[i] : starts[i + 1]]]]
            scores = np.repeat(scores, [len(part) for part in rows])[:k]
            ids = np.concatenate([np.empty(0, np.int64), *rows])[:k]
        return Found(ids, scores, scores)

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

    def _vectors(self, rows: Ints) -> Vectors:
        return reconstructed(self.index, self.of_row[rows] if len(self.of_row) else rows)

    def mean_vector(self, rows: Ints) -> Vectors:
        """The mean of rows' vectors, scaled to length 1."""
        return unit(self._vectors(rows).mean(axis=0, keepdims=True))[0]

    def rows_like(self, ids: Sequence[str], column: str | None) -> Ints:
        """Numbers of the rows with these ids, without deleted ones.

        :param column: the kept column that holds the ids; None takes the index's.
        :raises DataError: no row has an id, or all that had it are deleted; which column holds ids is not known.
        """
        if (name := column or self.manifest.get("id_column")) is None:
            kept = ", ".join(self.columns) or "none"
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
            raise DataError(f"{self.folder}: no column {column}; kept are {', '.join(self.columns)}")
        values = pc.cast(self.rows.column(column), pa.string())
        if unknown := set(ids) - set(values.to_pylist()):
            shown = ", ".join(sorted(unknown)[:5])
            raise DataError(f"{self.folder}: {len(unknown)} ids are not in column {column} ({shown})")
        return np.flatnonzero(pc.is_in(values, value_set=pa.array(list(ids), pa.string())).to_numpy())

    def first_texts(self, column: str, most: int) -> list[str | None]:
        """Values of a kept column, of the first rows."""
        return list(self.rows.column(column).slice(0, most).to_pylist())

    def known_among(self, added: pa.Table) -> int:
        """How many added rows have an id that a row here, not hidden, has; 0 if no column is known to hold ids."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if (name := self.manifest.get("id_column")) is None:
            return 0
        hidden = np.isin(np.arange(len(self.rows)), self.deleted)
        known = pc.is_in(added.column(name), value_set=self.rows.column(name).filter(pa.array(~hidden)))
        return int(pc.sum(known).as_py() or 0)


def _found(scores: Vectors, ids: Ints) -> tuple[Vectors, Ints]:
    """What one query found, without the -1 that Faiss fills up with."""
    there = ids[0] >= 0
    return scores[0][there], ids[0][there]


Opened = SearchIndex | MilvusIndex


def open_index(folder: str | Path) -> Opened:
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


def _open_once(folder: Path) -> Opened:
    manifest = store.read_manifest(folder)
    if KIND in manifest:
        return open_collection(folder, manifest)
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
    bm25 = store.read_bm25(store.place_of(folder, store.BM25_FILE), len(rows)) if words_column(manifest) else None
    return SearchIndex(folder, index, rows, manifest, deleted, of_row, bm25)


@functools.lru_cache(maxsize=2)
def opened(folder: str, stamp: tuple[tuple[int, ...], ...]) -> Opened:
    """`open_index`, cached while the folder's files stay as they are (`index_stamp`)."""
    return open_index(folder)
