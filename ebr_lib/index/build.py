"""Build an index in one stream: which kind, training it, adding the vectors.

Sizes follow the Faiss wiki's "Guidelines to choose an index": exact up to 50,000 vectors, a graph to a million, cells
with compressed vectors above.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.base import AGAIN, Embeddings
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.faiss_tools import Plan, adding, cells_of, comparable_vectors, load_faiss, searched_part
from ebr_lib.index.measure import Truth, exact_neighbours
from ebr_lib.index.store import ROW, ROWS_FILE, VECTORS_FILE, Distinct, save_vectors, write_deleted
from ebr_lib.logs import logger
from ebr_lib.metrics import unit

if TYPE_CHECKING:
    import pyarrow as pa


MANIFEST_SAYS = "its manifest says"


@dataclass(frozen=True)
class Built:
    """An index that has been built, its size in bytes, how long it took, and exact neighbours to measure it with."""

    index: Any
    bytes: int
    seconds: float
    truth: Truth
    rows: int


def size_of_file(path: str, made_by: Mapping[str, Any]) -> tuple[int, int]:
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


def vector_batches(path: str | Path, columns: Sequence[str] | None, dim: int, wanted: str) -> Iterator[Embeddings]:
    """The batches of an embedding file, whose vectors must have as many dimensions as `wanted` says."""
    for batch in iter_embeddings(path, columns):
        if len(batch) and batch.vectors.shape[1] != dim:
            raise DataError(f"{path} holds vectors of {batch.vectors.shape[1]} dimensions, {wanted} {dim}")
        yield batch


def trained_index(config: IndexConfig, plan: Plan, index: Any, rows: int) -> tuple[Plan, Any]:
    """The index with its cells trained, where its kind has any; kind auto takes another where the vectors are too few.

    :raises DataError: the file holds no vectors, or fewer different ones than the cells of a kind that was asked for.
    """
    if index.is_trained:
        return plan, index
    wanted = min(rows, max(TRAIN_POINTS * cells_of(index), 20_000))
    sample = np.sort(np.random.default_rng(config.seed).choice(rows, wanted, replace=False))
    vectors = _gathered(vector_batches(config.embedding_path, (), index.d, MANIFEST_SAYS), sample)
    _need_vectors(config, len(vectors))
    vectors = vectors[Distinct().place(vectors)]
    if config.kind == "auto" and len(vectors) < cells_of(index):
        plan = plan_index(len(vectors), index.d)  # nearly all rows share their vectors
        return plan, new_index(plan, index.d, config.ef_construction)
    train(index, vectors, config.seed)
    return plan, index


def build_index(config: IndexConfig, index: Any, folder: Path, rows: int, real: Vectors | None) -> Built:
    """Fill the index and find the exact neighbours to measure against."""
    dim = index.d
    start = time.perf_counter()
    sampled = 0 if real is not None else min(rows, config.measure_queries)
    sample = np.sort(np.random.default_rng(config.seed).choice(rows, sampled, replace=False))
    batches = vector_batches(config.embedding_path, None, dim, MANIFEST_SAYS)
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
    return Built(index, written, seconds, truth, len(distinct.first))


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


FLAT_ROWS, HNSW_ROWS = 50_000, 1_000_000
TRAIN_POINTS = 64  # training vectors a cell; Faiss takes 39 at least, 256 at most


def plan_index(rows: int, dim: int, kind: str = "auto", compression: str = "sq8") -> Plan:
    """Choose a kind of index by the number of vectors, or take the factory string that is given."""
    if kind != "auto":
        return Plan(kind, "as asked for", _knob_of(kind))
    if rows <= FLAT_ROWS:
        return Plan("Flat", f"{rows:,} vectors: up to {FLAT_ROWS:,} exact search takes milliseconds", None)
    if rows <= HNSW_ROWS:
        why = f"{rows:,} vectors: up to {HNSW_ROWS:,} a graph is fast, and the vectors fit into memory as they are"
        return Plan("HNSW32", why, "efSearch")
    cells = 2 ** round(np.log2(4 * np.sqrt(rows)))
    packed = "SQ8" if compression == "sq8" else f"PQ{_pieces(dim)}x4fs,Refine(SQ8)"
    why = f"{rows:,} vectors: above {HNSW_ROWS:,} memory counts, so {cells:,} cells of compressed vectors"
    return Plan(f"IVF{cells},{packed}", why, "nprobe")


def _knob_of(factory: str) -> str | None:
    if "IVF" in factory:
        return "nprobe"
    return "efSearch" if "HNSW" in factory else None


def _pieces(dim: int) -> int:
    """Parts a vector is cut into for product quantisation: of two dimensions each, of one where the number is odd."""
    return dim // 2 if dim % 2 == 0 else dim


def new_index(plan: Plan, dim: int, ef_construction: int) -> Any:
    """An empty index of inner product.

    :raises ConfigError: Faiss does not know the factory string, or not for this dimension, or what it makes cannot be
        filled or searched as all kinds here are.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().rpartition(": ")[2]  # what stands before it is a place in Faiss's source
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
    """Whether rows can be numbered as they come, compared under a filter, and given back."""
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


def train(index: Any, sample: Vectors, seed: int) -> None:
    """Train the index's cells and quantisers, on a GPU where Faiss has one.

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
        ivf.cp.min_points_per_centroid = 1  # the sample's size is ours to choose; Faiss would print a warning
        if faiss.get_num_gpus():
            gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
            ivf.clustering_index = gpu
    index.train(sample)
    if gpu is not None:
        ivf.clustering_index = None


class RowsWriter:
    """The sidecar: the kept columns of every indexed row, as an Arrow file that is mapped, not loaded."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow as pa

        self.schema = pa.schema([(ROW, pa.int64()), *((name, pa.string()) for name in columns)])
        self._writer = pa.ipc.new_file(str(path), self.schema)

    def add(self, rows: Ints, columns: Mapping[str, Sequence[str | None]]) -> None:
        """Append rows of the embedding file by number, with their kept columns."""
        import pyarrow as pa

        arrays = [pa.array(rows), *(pa.array(columns[name], pa.string()) for name in self.schema.names[1:])]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Rows of another sidecar with the same columns."""
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()


def fill(index: Any, batches: Iterable[Embeddings], rows_file: Path, gather: Ints) -> tuple[Distinct, Vectors, Ints]:
    """Add all distinct vectors and write the sidecar, a batch at a time.

    :param gather: numbers, sorted, of rows.
    :returns: what rows share, the distinct vectors of the rows to gather, and their numbers.
    """
    distinct, done, gathered = Distinct(), 0, [np.empty((0, index.d), np.float32)]
    sidecar, add = None, adding(index)
    for batch in batches:
        sidecar = sidecar or RowsWriter(rows_file, list(batch.columns))
        if len(batch):
            vectors = unit(batch.vectors)
            low, high = np.searchsorted(gather, (done, done + len(vectors)))
            gathered.append(vectors[gather[low:high] - done])
            done += len(vectors)
            if (new := distinct.place(vectors)).any():
                add(vectors[new])
            sidecar.add(batch.rows, batch.columns)
    if sidecar is not None:
        sidecar.close()
    numbers, places = np.unique(distinct.of_row[gather[gather < done]], return_index=True)
    return distinct, np.concatenate(gathered)[places], numbers
