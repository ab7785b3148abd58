"""Build an index in one stream: which kind, training it, adding the vectors.

Sizes follow the Faiss wiki's "Guidelines to choose an index": exact up to 50,000 vectors, a graph to a million, cells
with compressed vectors above.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.bm25 import Bm25
from ebr_lib.data.embeddings.base import AGAIN, Embeddings
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.data.faiss_library import load_faiss
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.index.faiss_tools import Plan, adding, cells_of, comparable_vectors, searched_part
from ebr_lib.index.measure import Truth, exact_neighbours
from ebr_lib.index.store import (
    BM25_FILE,
    ROW,
    ROWS_FILE,
    VECTORS_FILE,
    Distinct,
    read_rows,
    save_vectors,
    write_deleted,
)
from ebr_lib.logs import logger
from ebr_lib.metrics import unit

if TYPE_CHECKING:
    import pyarrow as pa

FLAT_ROWS, HNSW_ROWS = 50_000, 1_000_000
TRAIN_POINTS = 64  # training vectors per cell; Faiss takes 39 at least, 256 at most
MANIFEST_SAYS = "its manifest says"


@dataclass(frozen=True)
class Built:
    """A filled index, its size in bytes, how long it took, and exact neighbours to measure it with."""

    index: Any
    bytes: int
    seconds: float
    truth: Truth
    rows: int


# --- the kind -----------------------------------------------------------------------------------------------------


def plan_index(rows: int, dim: int, kind: str = "auto", compression: str = "sq8") -> Plan:
    """Choose a kind of index by the number of vectors, or take the given factory string."""
    if kind != "auto":
        return Plan(kind, "as asked for", "nprobe" if "IVF" in kind else "efSearch" if "HNSW" in kind else None)
    if rows <= FLAT_ROWS:
        return Plan("Flat", f"{rows:,} vectors: up to {FLAT_ROWS:,} exact search takes milliseconds", None)
    if rows <= HNSW_ROWS:
        why = f"{rows:,} vectors: up to {HNSW_ROWS:,} a graph is fast, and the vectors fit into memory as they are"
        return Plan("HNSW32", why, "efSearch")
    cells = 2 ** round(np.log2(4 * np.sqrt(rows)))
    pieces = dim // 2 if dim % 2 == 0 else dim  # of product quantisation, two dimensions each if the number is even
    packed = "SQ8" if compression == "sq8" else f"PQ{pieces}x4fs,Refine(SQ8)"
    why = f"{rows:,} vectors: above {HNSW_ROWS:,} memory counts, so {cells:,} cells of compressed vectors"
    return Plan(f"IVF{cells},{packed}", why, "nprobe")


def new_index(plan: Plan, dim: int, ef_construction: int) -> Any:
    """An empty index of inner product.

    :raises ConfigError: Faiss does not know the factory string, or not for this dimension, or the index cannot be
        filled and searched as all kinds are here.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().rpartition(": ")[2]  # before it comes a place in Faiss's source
        raise ConfigError(
            f"kind {plan.factory!r} is not a Faiss factory string for {dim} dimensions ({reason}); "
            "use auto, Flat, HNSW32, IVF4096,SQ8 or the like"
        ) from error
    _check_usable(plan.factory, index)
    searched = searched_part(index)
    if hasattr(searched, "hnsw"):
        searched.hnsw.efConstruction = ef_construction
    return index


def _check_usable(factory: str, index: Any) -> None:
    """Make sure that rows can be numbered in order, compared under a filter, and given back."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexIDMap):
        raise ConfigError(f"kind {factory!r}: the numbers of the rows are the ids here; leave IDMap out")
    if isinstance(searched_part(index), faiss.IndexNSG | faiss.IndexNNDescent):
        raise ConfigError(f"kind {factory!r}: such a graph cannot be filled a part at a time; use HNSW32")
    part = comparable_vectors(index)
    if not isinstance(part, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexIVF):
        raise ConfigError(
            f"kind {factory!r}: {type(part).__name__} cannot search under a filter; give it cells (IVF4096,PQ32x4fs) "
            "or use Flat, SQ8 or HNSW32"
        )


# --- the embedding file -------------------------------------------------------------------------------------------


def size_of_file(path: str, made_by: Mapping[str, Any]) -> tuple[int, int]:
    """Number of vectors, or an upper bound for it, and their dimension."""
    if (made_by.get("rows") or {}).get("written") and made_by.get("dimension"):
        return int(made_by["rows"]["written"]), int(made_by["dimension"])
    rows, dim = 0, 0
    for batch in iter_embeddings(path, ()):
        rows += len(batch)
        dim = dim or batch.vectors.shape[1]
    need_vectors(path, rows)
    return rows, dim


def need_vectors(path: str, found: int) -> None:
    """Make sure that an embedding file holds vectors.

    :raises DataError: it holds none.
    """
    if not found:
        raise DataError(f"{path} holds no vectors; {AGAIN}")


def vector_batches(path: str | Path, columns: Sequence[str] | None, dim: int, wanted: str) -> Iterator[Embeddings]:
    """The batches of an embedding file, whose vectors must have the dimension that `wanted` says."""
    for batch in iter_embeddings(path, columns):
        if len(batch) and batch.vectors.shape[1] != dim:
            raise DataError(f"{path} holds vectors of {batch.vectors.shape[1]} dimensions, {wanted} {dim}")
        yield batch


def sample_rows(rows: int, count: int, seed: int) -> Ints:
    """Different row numbers, drawn at random and sorted."""
    return np.sort(np.random.default_rng(seed).choice(rows, min(rows, count), replace=False))


# --- training -----------------------------------------------------------------------------------------------------


def trained_index(
    path: str, plan: Plan, index: Any, rows: int, *, ef_construction: int, is_auto: bool, seed: int
) -> tuple[Plan, Any]:
    """Train the index's cells, if it has any, on vectors of the file.

    :param is_auto: take another kind if there are fewer different vectors than cells.
    :raises DataError: the file holds no vectors, or fewer different ones than the cells of a kind that was asked for.
    """
    if index.is_trained:
        return plan, index
    sample = sample_rows(rows, max(TRAIN_POINTS * cells_of(index), 20_000), seed)
    done, parts = 0, [np.empty((0, index.d), np.float32)]
    for batch in vector_batches(path, (), index.d, MANIFEST_SAYS):
        low, high = np.searchsorted(sample, (done, done + len(batch)))
        if high > low:
            parts.append(unit(batch.vectors[sample[low:high] - done]))
        done += len(batch)
    vectors = np.concatenate(parts)
    need_vectors(path, len(vectors))
    vectors = vectors[Distinct().place(vectors)]
    if is_auto and len(vectors) < cells_of(index):
        plan = plan_index(len(vectors), index.d)  # nearly all rows share their vectors
        return plan, new_index(plan, index.d, ef_construction)
    train(index, vectors, seed)
    return plan, index


def train(index: Any, sample: Vectors, seed: int) -> None:
    """Train the index's cells and quantisers, on a GPU if Faiss has one.

    :raises DataError: fewer vectors than cells.
    """
    faiss = load_faiss()
    cells = cells_of(index)
    if len(sample) < max(cells, 1):
        raise DataError(f"{len(sample)} vectors cannot train {cells} cells; use a kind with fewer, or auto")
    gpu = None  # must outlive the training
    if cells:
        ivf = faiss.extract_index_ivf(index)
        ivf.cp.seed = seed
        ivf.cp.min_points_per_centroid = 1  # the sample's size is chosen here; Faiss would print a warning
        if faiss.get_num_gpus():
            gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
            ivf.clustering_index = gpu
    index.train(sample)
    if gpu is not None:
        ivf.clustering_index = None


# --- filling ------------------------------------------------------------------------------------------------------


def build_index(path: str, index: Any, folder: Path, sample: Ints, queries: Vectors | None) -> Built:
    """Fill the index from an embedding file, write it to a folder, and find exact neighbours to measure it with.

    :param sample: rows whose vectors are the queries to measure with, if `queries` is None.
    """
    start = time.perf_counter()
    batches = vector_batches(path, None, index.d, MANIFEST_SAYS)
    distinct, taken, own = fill(index, batches, folder / ROWS_FILE, sample)
    need_vectors(path, index.ntotal)
    written = save_vectors(folder, index)
    distinct.save(folder / VECTORS_FILE)
    write_deleted(folder, sample[:0])
    seconds = time.perf_counter() - start
    first = distinct.first
    if shared := len(first) - index.ntotal:
        logger.info(
            "重复向量: %d 行的向量前面已有，只索引一次，仍可检索到 (rows with the vector of an earlier row)", shared
        )

    def once() -> Iterator[Vectors]:
        done = 0
        for batch in iter_embeddings(path, ()):
            if (new := first[done : done + len(batch)]).any():
                yield unit(batch.vectors[new])
            done += len(batch)

    if queries is not None:
        taken, own = queries, np.full(len(queries), -1)
    return Built(index, written, seconds, exact_neighbours(index, once(), taken, own), len(first))


def fill(index: Any, batches: Iterable[Embeddings], rows_file: Path, gather: Ints) -> tuple[Distinct, Vectors, Ints]:
    """Add all distinct vectors and write the kept columns, a batch at a time.

    :param gather: sorted numbers of rows.
    :returns: what rows share, the distinct vectors of the rows to gather, and their numbers.
    """
    batches = iter(batches)
    first = next(batches)
    distinct, done, gathered = Distinct(), 0, [np.empty((0, index.d), np.float32)]
    with appending(index, distinct, rows_file, list(first.columns)) as append:
        for batch in chain([first], batches):
            vectors = append(batch, 0)
            low, high = np.searchsorted(gather, (done, done + len(batch)))
            if high > low:
                gathered.append(vectors[gather[low:high] - done])
            done += len(batch)
    numbers, places = np.unique(distinct.of_row[gather[gather < done]], return_index=True)
    return distinct, np.concatenate(gathered)[places], numbers


@contextlib.contextmanager
def appending(
    index: Any, distinct: Distinct, rows_file: Path, columns: Sequence[str], before: Iterable[pa.RecordBatch] = ()
) -> Iterator[Callable[[Embeddings, int], Vectors]]:
    """Yield a function that appends a batch: its new vectors to the index, its kept columns to an Arrow file. It takes
    the number of the embedding file's first row, and returns the unit vectors.

    :param before: rows with which the Arrow file begins.
    """
    add = adding(index)

    def append(batch: Embeddings, first_row: int) -> Vectors:
        if not len(batch):
            return batch.vectors
        vectors = unit(batch.vectors)
        if (new := distinct.place(vectors)).any():
            add(vectors[new])
        write(batch, first_row)
        return vectors

    with writing_rows(rows_file, columns, before) as write:
        yield append


@contextlib.contextmanager
def writing_rows(
    rows_file: Path, columns: Sequence[str] | None, before: Iterable[pa.RecordBatch] = ()
) -> Iterator[Callable[[Embeddings, int], None]]:
    """Yield a function that writes columns of a batch to an Arrow file, which a search maps into memory; see
    `appending`. Without columns it writes nothing."""
    import pyarrow as pa

    if columns is None:
        yield lambda batch, first_row: None
        return

    def write(batch: Embeddings, first_row: int) -> None:
        kept = {name: pa.array(batch.columns[name], pa.string()) for name in columns}
        rows.write_batch(pa.record_batch({ROW: pa.array(batch.rows + first_row)} | kept))

    schema = pa.schema([(ROW, pa.int64()), *((name, pa.string()) for name in columns)])
    with pa.ipc.new_file(str(rows_file), schema) as rows:
        for part in before:
            rows.write_batch(part)
        yield write


def write_bm25(folder: Path, bm25: Bm25, column: str) -> None:
    """Add the texts of the rows in a folder that BM25 does not have yet, and write it to that folder."""
    texts = read_rows(folder / ROWS_FILE).slice(len(bm25)).column(column).to_pylist()
    bm25.add([text or "" for text in texts])
    bm25.save(folder / BM25_FILE)
