"""Ways to serve the same vectors: fewer dimensions, fewer bytes per dimension, faster kinds of index. Faiss does the
work.

Bits are searched by Hamming distance for more candidates than are wanted, which the float query then scores: against
their bits, or against int8 vectors, which may lie on a disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.codes import BITS, Codes, quantised, restored
from ebr_lib.data.faiss_library import load_faiss, one_thread
from ebr_lib.metrics import unit

FLOATS = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}  # as Faiss names them
BINARY, RESCORED = "binary", "binary + int8"
PRECISIONS = (*FLOATS, BINARY, RESCORED)
CANDIDATES = 10  # of bits, per result
FLAT, HNSW, IVF = "Flat", "HNSW32", "IVF"
MANY = 5_000  # documents from which a graph or cells can be faster than comparing all
EF_CONSTRUCTION = 80
SMALLEST = 64  # dimensions that halving ends at
TIMED = 200  # queries

Search = Callable[[Vectors, int], tuple[Vectors, Ints]]
"""Queries and k to scores and numbers of documents (queries, k), best first; -1 where there is none."""


@dataclass(frozen=True)
class Size:
    """A way to serve vectors. `effort` is the search's efSearch or nprobe; None where all are compared. `bytes` are
    those of the index, per vector, and of the int8 vectors beside it."""

    dimensions: int
    precision: str
    kind: str
    effort: int | None
    bytes: float

    @property
    def name(self) -> str:
        """The size in a few words."""
        knob = f" {'nprobe' if self.kind.startswith(IVF) else 'efSearch'} {self.effort}" if self.effort else ""
        return f"{self.dimensions} {self.precision} {self.kind}{knob}"


def halves(dim: int) -> list[int]:
    """A dimension, its half and so on, down to `SMALLEST`."""
    return [dim, *(halves(dim // 2) if dim // 2 >= SMALLEST else [])]


def kinds_for(documents: int) -> list[str]:
    """Kinds of index that make sense for a number of documents."""
    if documents < MANY:
        return [FLAT]
    return [FLAT, HNSW, f"{IVF}{2 ** round(np.log2(2 * np.sqrt(documents)))}"]


def sizes(documents: Vectors, dims: Sequence[int], kinds: Sequence[str], seed: int) -> Iterator[tuple[Size, Search]]:
    """Every size and its search, with one index in memory at a time.

    :param documents: float32, documents × dimensions. Cut vectors are scaled to length 1.
    :param kinds: `Flat`, `HNSW32`, `IVF` with a number of cells.
    """
    for dim in dims:
        cut = unit(documents[:, :dim])
        for kind in kinds:
            for precision, index, size, search in _indexes(cut, kind, seed):
                for effort in _efforts(kind):
                    _set_effort(index, kind, effort)
                    yield Size(dim, precision, kind, effort, size), partial(_cut, search, dim)


def _cut(search: Search, dim: int, queries: Vectors, k: int) -> tuple[Vectors, Ints]:
    return search(unit(queries[:, :dim]), k)


def _indexes(vectors: Vectors, kind: str, seed: int) -> Iterator[tuple[str, Any, float, Search]]:
    """An index per precision: precision, index, bytes per vector, search."""
    faiss = load_faiss()
    rows, dim = vectors.shape
    for precision, code in FLOATS.items():
        index = faiss.index_factory(dim, code if kind == FLAT else f"{kind},{code}", faiss.METRIC_INNER_PRODUCT)
        _fill(index, vectors, seed)
        yield precision, index, faiss.serialize_index(index).nbytes / rows, index.search
    if dim % BITS:
        return
    valid = np.ones(rows, bool)
    bits, int8 = (quantised(vectors, valid, name)[0] for name in ("binary", "int8"))  # cosines need no scales
    index = faiss.index_binary_factory(dim, f"B{kind}")
    _fill(index, bits, seed)
    size = faiss.serialize_index_binary(index).nbytes / rows
    yield BINARY, index, size, partial(_search_bits, index, bits)
    yield RESCORED, index, size + dim, partial(_search_bits, index, int8)


def _fill(index: Any, vectors: Codes, seed: int) -> None:
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = EF_CONSTRUCTION
    if hasattr(index, "cp"):
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # else Faiss prints a warning
    index.train(vectors)
    index.add(vectors)


def _efforts(kind: str) -> list[int | None]:
    """A quick and a thorough search."""
    if kind == FLAT:
        return [None]
    return [32, 128] if kind == HNSW else [max(1, int(kind.removeprefix(IVF)) // share) for share in (32, 8)]


def _set_effort(index: Any, kind: str, effort: int | None) -> None:
    if kind == HNSW:
        index.hnsw.efSearch = effort
    elif kind != FLAT:
        index.nprobe = effort


def _search_bits(index: Any, codes: Codes, queries: Vectors, k: int) -> tuple[Vectors, Ints]:
    """The k best, by their cosines, of the candidates that are nearest by Hamming distance."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    _, found = index.search(np.packbits(queries > 0, axis=1), CANDIDATES * k)
    for row, (query, candidates) in enumerate(zip(queries, found, strict=True)):
        near = candidates[candidates >= 0]
        cosines = unit(restored(codes[near], np.ones(len(near), np.float32))) @ query
        best = np.argsort(-cosines, kind="stable")[:k]
        scores[row, : len(best)], ids[row, : len(best)] = cosines[best], near[best]
    return scores, ids


def milliseconds(search: Search, queries: Vectors, k: int) -> float:
    """Median time of one query in one thread."""
    times = []
    with one_thread():
        for query in queries[:TIMED]:
            start = time.perf_counter()
            search(query[None, :], k)
            times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))
