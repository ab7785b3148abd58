"""A Faiss index over unit vectors: which kind, building it in one stream, measuring it, searching it.

Sizes follow the Faiss wiki's "Guidelines to choose an index": exact up to 50,000 vectors, a graph to a million, cells
with compressed vectors above. A folder holds the index, the kept columns row for row, and a manifest.

A GPU build of Faiss, where installed, trains cells, assigns vectors to them and searches exactly for the measurement;
the index itself stays on the CPU, so that every machine can load it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.vectors import Embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.files import written_whole
from ebr_lib.retrieval.index_store import (
    DELETED_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    ROWS_FILE,
    VECTORS_FILE,
    index_stamp,
    place_of,
)
from ebr_lib.retrieval.metrics import CHUNK, unit

if TYPE_CHECKING:
    import pyarrow as pa

FLAT_ROWS, HNSW_ROWS = 50_000, 1_000_000
EXACT_ROWS = 20_000  # of so few rows that a filter leaves, one by one is faster than a scan of all
SPARE_ROWS = 100  # rows to look for at least, where some of them may be deleted
TRAIN_POINTS = 64  # training vectors a cell; Faiss takes 39 at least, 256 at most
TRUTH_DEPTH = 100  # exact neighbours kept a query, so that those which tie with the k-th are known
RECALL_AT = 10
SAME_SCORE = 1e-6  # scores so near are a tie
TIMED_QUERIES = 200
REFINE_FACTOR = 16.0  # candidates a result that compressed vectors hand to re-ranking
DIGEST = 16  # bytes that stand for a vector where equal ones are looked for
TRIES, PAUSE = 3, 0.02  # of a reader, in seconds: as often as this a folder is read before its fault counts
ROW = "_row"  # sidecar column: number of the row in the embedding file


def _faiss() -> Any:
    """Faiss, loaded on first use; its own type stubs lack much of it."""
    import faiss

    return faiss


# --- the kind -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A Faiss factory string, why it was chosen, and the knob that trades speed for recall (None: exact)."""

    factory: str
    why: str
    knob: str | None

    def settings(self, cells: int) -> list[int]:
        """Values of the knob to try, cheapest first."""
        if self.knob is None:
            return [0]
        if self.knob == "efSearch":
            return [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n < cells] + [cells]


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


# --- building -----------------------------------------------------------------------------------------------------


def new_index(plan: Plan, dim: int, ef_construction: int) -> Any:
    """An empty index of inner product.

    :raises ConfigError: Faiss does not know the factory string, or not for this dimension, or what it makes cannot be
        filled or searched as all kinds here are.
    """
    faiss = _faiss()
    try:
        index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().rpartition(": ")[2]  # what stands before it is a place in Faiss's source
        raise ConfigError(
            f"kind {plan.factory!r} is not a Faiss factory string for {dim} dimensions ({reason}); "
            "use auto, Flat, HNSW32, IVF4096,SQ8 or the like"
        ) from error
    _check_usable(plan.factory, index)
    searched = _searched(index)
    if hasattr(searched, "hnsw"):
        searched.hnsw.efConstruction = ef_construction
    return index


def _check_usable(factory: str, index: Any) -> None:
    """Whether rows can be numbered as they come, compared under a filter, and given back."""
    faiss = _faiss()
    if isinstance(index, faiss.IndexIDMap):
        raise ConfigError(f"kind {factory!r}: the numbers of the rows are the ids here; leave IDMap out")
    if isinstance(_searched(index), faiss.IndexNSG | faiss.IndexNNDescent):
        raise ConfigError(f"kind {factory!r}: such a graph cannot be filled a part at a time; use HNSW32")
    part = _comparable(index)
    if not isinstance(part, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexIVF):
        raise ConfigError(
            f"kind {factory!r}: {type(part).__name__} cannot search under a filter; give it cells (IVF4096,PQ32x4fs) "
            "or use Flat, SQ8 or HNSW32"
        )


def _searched(index: Any) -> Any:
    """The part of an index that is searched first: behind its transforms, before re-ranking."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _searched(index.index)
    return _searched(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _comparable(index: Any) -> Any:
    """The part of an index that holds every vector in one place: behind its transforms, its re-ranking, its graph."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _comparable(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _comparable(index.refine_index)
    return faiss.downcast_index(getattr(index, "storage", index))


def train(index: Any, sample: Vectors, seed: int) -> None:
    """Train the index's cells and quantisers, on a GPU where Faiss has one.

    :raises DataError: fewer vectors than cells.
    """
    faiss = _faiss()
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


def cells_of(index: Any) -> int:
    """Cells of an inverted file, 0 for other kinds."""
    faiss = _faiss()
    ivf = faiss.try_extract_index_ivf(index)
    return ivf.nlist if ivf is not None else 0


def adding(index: Any) -> Callable[[Vectors], None]:
    """How unit vectors are added to the index: their cells are found on the GPUs, where Faiss has any and the index is
    a plain inverted file."""
    faiss = _faiss()
    if not (faiss.get_num_gpus() and isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer)):
        return index.add
    from faiss.contrib.ivf_tools import add_preassigned

    centroids = faiss.index_cpu_to_all_gpus(faiss.downcast_index(index.quantizer))

    def add(vectors: Vectors) -> None:
        _, cells = centroids.search(vectors, 1)
        add_preassigned(index, vectors, cells[:, 0])

    return add


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


class Distinct:
    """Gives each row of an index the number of its vector. Equal vectors have one: many equal ones fill the lists of
    a graph and hide all others, and cost memory for nothing.

    :ivar digests: of each vector, in order.
    """

    def __init__(self, of_row: Ints | None = None, digests: Sequence[bytes] = ()) -> None:
        self._of_row = [of_row if of_row is not None else np.empty(0, np.int64)]
        self._first: list[NDArray[np.bool_]] = []
        self._numbers = {digest: i for i, digest in enumerate(digests)}
        self.digests = list(digests)

    def place(self, vectors: Vectors) -> NDArray[np.bool_]:
        """Number the vectors of the next rows; returns which of them are new."""
        numbers, first = [], []
        for row in vectors + np.float32(0):  # -0.0 is 0.0
            digest = hashlib.blake2b(row, digest_size=DIGEST).digest()
            first.append(digest not in self._numbers)
            numbers.append(self._numbers.setdefault(digest, len(self.digests)))
            if first[-1]:
                self.digests.append(digest)
        self._of_row.append(np.array(numbers, np.int64))
        self._first.append(np.array(first, bool))
        return self._first[-1]

    @property
    def of_row(self) -> Ints:
        """The number of each row's vector."""
        return np.concatenate(self._of_row)

    @property
    def first(self) -> NDArray[np.bool_]:
        """Of the rows that were placed, which were the first with their vector."""
        return np.concatenate([np.empty(0, bool), *self._first])

    def save(self, path: Path) -> None:
        """Write both; the numbers of rows only where they say something."""
        of_row = self.of_row
        listed = of_row if len(of_row) > len(self.digests) else of_row[:0]
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, DIGEST)
        with open(path, "wb") as file:
            np.savez(file, of_row=listed, digests=digests)


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


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What one setting of the knob gives: recall@10 against exact search, latency of single queries in one thread
    (milliseconds), and queries a second of one batch on all threads."""

    setting: int
    recall: float
    p50: float
    p95: float
    p99: float
    qps: float


@dataclass(frozen=True)
class Truth:
    """Queries with their exact neighbours: ids and scores, queries × depth. `own` are the ids of queries that stand in
    the index themselves, and are left out of what they find; -1 else."""

    queries: Vectors
    own: Ints
    ids: Ints
    scores: Vectors


def exact_neighbours(index: Any, batches: Iterable[Vectors], queries: Vectors, own: Ints) -> Truth:
    """Search exactly, on GPUs where Faiss has any: in the vectors that the index itself holds, else in the batches."""
    from faiss.contrib.exhaustive_search import knn_ground_truth

    flat = _flat_of(index)
    vectors = batches if flat is None else _stored(flat)
    scores, ids = knn_ground_truth(queries, vectors, TRUTH_DEPTH + 1, _faiss().METRIC_INNER_PRODUCT)
    return Truth(queries, own, ids, np.where((ids < 0) | (ids == own[:, None]), np.float32("-inf"), scores))


def _flat_of(index: Any) -> Any:
    """The part of an index that holds the vectors as they are; None where there is none."""
    faiss = _faiss()
    held = faiss.downcast_index(getattr(index, "storage", index))
    return held if isinstance(held, faiss.IndexFlat) else None


def _stored(flat: Any) -> Iterator[Vectors]:
    for start in range(0, flat.ntotal, CHUNK):
        yield flat.reconstruct_n(start, min(CHUNK, flat.ntotal - start))


def recall_of(found: Ints, truth: Truth, index: Any, among: int = RECALL_AT) -> float:
    """Mean share of the ten nearest rows that an index found; any row that scores as the tenth does is as good.

    Where the index holds fewer than ten other rows, all of them are wanted.

    :param among: how many of the rows found, best first, are looked at.
    """
    shares = []
    for i, own in enumerate(truth.own):
        there = truth.scores[i] > -np.inf
        near, scores = truth.ids[i][there], truth.scores[i][there]
        wanted = min(RECALL_AT, len(near))
        kept = found[i][(found[i] != own) & (found[i] >= 0)][:among]
        hits = _hits(index, truth.queries[i], kept, near, scores) if wanted else 0
        shares.append(min(hits, wanted) / wanted if wanted else 1.0)
    return float(np.mean(shares))


def _hits(index: Any, query: Vectors, found: Ints, near: Ints, scores: Vectors) -> int:
    """How many of the ids score as the tenth nearest does, or better."""
    tenth = np.argsort(-scores, kind="stable")[min(RECALL_AT, len(near)) - 1]
    good = scores >= scores[tenth] - SAME_SCORE
    hits = np.isin(found, near[good])
    if good.all() and index.ntotal > len(near) and not hits.all():
        # more may tie with the tenth than the list holds: what is equal scores the same in the index, too
        held = reconstructed(index, np.r_[near[tenth], found]) @ query
        hits |= np.abs(held[1:] - held[0]) <= SAME_SCORE
    return int(hits.sum())


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with so many Faiss threads; 0 leaves them as they are."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def measure_point(index: Any, truth: Truth, knob: str | None, setting: int) -> Point:
    """Recall and speed of one setting."""
    parameters = search_parameters(index, knob, setting)
    start = time.perf_counter()
    _, found = index.search(truth.queries, RECALL_AT + 1, params=parameters)
    qps = len(truth.queries) / (time.perf_counter() - start)
    times = []
    with threads(1):
        for query in truth.queries[:TIMED_QUERIES]:
            start = time.perf_counter()
            index.search(query[None, :], RECALL_AT, params=parameters)
            times.append(1000 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return Point(setting, recall_of(found, truth, index), float(p50), float(p95), float(p99), qps)


def sweep(index: Any, truth: Truth, plan: Plan, target: float) -> tuple[list[Point], Point]:
    """Measure settings, cheapest first, until the target is well passed; choose the first that reaches it.

    Where none does, the last one, which is the most thorough, is chosen.
    """
    from tqdm.auto import tqdm

    points: list[Point] = []
    for setting in tqdm(plan.settings(cells_of(index)), desc=f"测量 {plan.knob or plan.factory}", delay=2, leave=False):
        points.append(measure_point(index, truth, plan.knob, setting))
        if sum(point.recall >= target for point in points) == 2:  # one point beyond the chosen one shows the curve
            break
    chosen = next((point for point in points if point.recall >= target), points[-1])
    return points, chosen


def search_parameters(index: Any, knob: str | None, setting: int) -> Any:
    """Faiss's parameters for one search with a setting of the knob."""
    faiss = _faiss()
    inner = None
    if knob == "efSearch":
        inner = faiss.SearchParametersHNSW(efSearch=setting)
    if knob == "nprobe":
        inner = faiss.SearchParametersIVF(nprobe=setting)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=inner)
    return inner


def remedies(index: Any, truth: Truth, plan: Plan, target: float) -> list[tuple[str, float]]:
    """Kinds that reach a recall which no setting of this one reaches, each with the recall that was measured for it.

    Re-ranking by whole vectors finds what is among the candidates of the most thorough search; Flat finds all.
    """
    found = [("Flat", 1.0)]
    if _flat_of(_searched(index)) is None and "RFlat" not in plan.factory:
        parameters = search_parameters(index, plan.knob, plan.settings(cells_of(index))[-1])
        _, candidates = index.search(truth.queries, int(REFINE_FACTOR) * RECALL_AT, params=parameters)
        kind = f"{plan.factory.partition(',Refine')[0]},RFlat"
        found.insert(0, (kind, recall_of(candidates, truth, index, among=candidates.shape[1])))
    return [(kind, recall) for kind, recall in found if recall >= target]


def draw_curve(path: Path, plan: Plan, points: Sequence[Point], chosen: Point, target: float) -> None:
    """Recall against the median latency, one dot a setting, the chosen one filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.p50 for p in points], [p.recall for p in points], "-", color="0.6", zorder=1)
    for point in points:
        face = "C0" if point is chosen else "white"
        axes.plot([point.p50], [point.recall], "o", color="C0", markerfacecolor=face, zorder=2)
        label = f"{plan.knob} {point.setting}" if plan.knob else "all compared"
        axes.annotate(label, (point.p50, point.recall), fontsize=8, va="top", ha="left", xytext=(3, -3),
                      textcoords="offset points")  # fmt: skip
    axes.axhline(target, color="C3", linewidth=1, linestyle="--", label=f"target {target:g}")
    axes.set(xlabel="median latency of one query, one thread (ms)", ylabel=f"recall@{RECALL_AT}", title=plan.factory)
    axes.margins(x=0.15)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)


# --- an index in use ----------------------------------------------------------------------------------------------


@dataclass
class SearchIndex:
    """An opened index folder. `deleted` are the numbers of rows that are hidden; `of_row` has the number of each row's
    vector, and is empty where no two rows share one."""

    folder: Path
    index: Any = field(repr=False)
    rows: pa.Table = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    deleted: Ints = field(repr=False)
    of_row: Ints = field(repr=False, default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.rows) - len(self.deleted)

    def find(
        self, query: Vectors, k: int, where: Mapping[str, Sequence[str | None]]
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k nearest rows of one unit vector: score (cosine) and kept columns, best first; rows with one vector in
        their order.

        :param where: column to the values allowed in it; None is null.
        :raises DataError: the vector has another dimension, or a column is not kept.
        """
        if query.shape != (self.index.d,):
            raise DataError(f"{self.folder}: the query has {query.shape[-1]} dimensions, the index {self.index.d}")
        allowed = self._allowed(where)
        near = self._among if where else self._nearest
        scores, ids = self._rows_of(*near(query, k, self._with_rows(allowed)), allowed, k)
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
            mask = pc.is_in(self.rows.column(name), value_set=pa.array(values, pa.string()))
            allowed &= mask.to_numpy()
        return allowed

    def _with_rows(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which vectors have a row that may be found."""
        if not len(self.of_row):
            return allowed
        some = np.zeros(self.index.ntotal, dtype=bool)
        some[self.of_row[allowed]] = True
        return some

    @functools.cached_property
    def _sharing(self) -> tuple[Ints, Ints]:
        """Rows in the order of their vectors, and where each vector's begin."""
        order = np.argsort(self.of_row, kind="stable")
        return order, np.searchsorted(self.of_row[order], np.arange(self.index.ntotal + 1))

    def _rows_of(self, scores: Vectors, ids: Ints, allowed: NDArray[np.bool_], k: int) -> tuple[Vectors, Ints]:
        """The first k rows that have the vectors and may be found."""
        if not len(self.of_row):
            return scores, ids
        order, starts = self._sharing
        rows = [sharing[allowed[sharing]][:k] for i in ids for sharing in [order[starts[i] : starts[i + 1]]]]
        counts = [len(part) for part in rows]
        return np.repeat(scores, counts)[:k], np.concatenate([np.empty(0, np.int64), *rows])[:k]

    def _among(self, query: Vectors, k: int, allowed: NDArray[np.bool_]) -> tuple[Vectors, Ints]:
        """The k nearest of the allowed vectors, all of which are compared: where these lie far from the query, a graph
        or a few cells would find too few of them, or others than the nearest."""
        if allowed.sum() <= EXACT_ROWS:
            return self._one_by_one(query, k, np.flatnonzero(allowed))
        part, wanted = _comparable(self.index), _transformed(self.index, query)
        bits = np.packbits(allowed, bitorder="little")  # must outlive the search
        selector = _faiss().IDSelectorBitmap(bits)
        return _there(*part.search(wanted[None, :], min(k, len(allowed)), params=_of_all_cells(part, selector)))

    def _one_by_one(self, query: Vectors, k: int, ids: Ints) -> tuple[Vectors, Ints]:
        if not len(ids):
            return np.empty(0, np.float32), ids
        scores = reconstructed(self.index, ids) @ query
        order = np.argsort(-scores, kind="stable")[:k]
        return scores[order], ids[order]

    def _nearest(self, query: Vectors, k: int, allowed: NDArray[np.bool_]) -> tuple[Vectors, Ints]:
        """Deleted rows are few as a rule: look for more than is asked for and leave them out; where too few are left,
        or the cells that were looked at held too few, compare all."""
        scores, ids = self._approximately(query, max(2 * k, SPARE_ROWS) if len(self.deleted) else k)
        scores, ids = scores[allowed[ids]][:k], ids[allowed[ids]][:k]
        return (scores, ids) if len(ids) == min(k, allowed.sum()) else self._among(query, k, allowed)

    def _approximately(self, query: Vectors, k: int) -> tuple[Vectors, Ints]:
        knob, setting = self.manifest["search"]["knob"], self.manifest["search"]["setting"]
        if knob == "efSearch":
            setting = max(setting, k)
        parameters = search_parameters(self.index, knob, setting)
        return _there(*self.index.search(query[None, :], min(k, self.index.ntotal), params=parameters))

    def numbers_of(self, ids: Sequence[str], column: str) -> Ints:
        """Numbers of the rows that hold one of the ids.

        :raises DataError: an id is in no row.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if column not in self.rows.column_names:
            raise DataError(f"{self.folder}: no column {column}; kept are {', '.join(self.rows.column_names[1:])}")
        values = pc.cast(self.rows.column(column), pa.string())
        unknown = set(ids) - set(values.to_pylist())
        if unknown:
            shown = ", ".join(sorted(unknown)[:5])
            raise DataError(f"{self.folder}: {len(unknown)} ids are not in column {column} ({shown})")
        return np.flatnonzero(pc.is_in(values, value_set=pa.array(list(ids), pa.string())).to_numpy())

    def known_among(self, added: pa.Table) -> int:
        """How many added rows have an id that a row here, not hidden, has; 0 where no column is known to hold ids."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if (name := self.manifest.get("id_column")) is None:
            return 0
        hidden = np.isin(np.arange(len(self.rows)), self.deleted)
        known = pc.is_in(added.column(name), value_set=self.rows.column(name).filter(pa.array(~hidden)))
        return int(pc.sum(known).as_py() or 0)


def _transformed(index: Any, query: Vectors) -> Vectors:
    """A query as the comparable part of an index wants it."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return query
    for i in range(index.chain.size()):
        query = index.chain.at(i).apply(query[None, :])[0]
    return _transformed(index.index, query)


def _of_all_cells(index: Any, allowed: Any) -> Any:
    faiss = _faiss()
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=index.nlist, sel=allowed)
    return faiss.SearchParameters(sel=allowed)


def _there(scores: Vectors, ids: Ints) -> tuple[Vectors, Ints]:
    """What was found for one query; Faiss fills up with -1 where there is no more."""
    found = ids[0] >= 0
    return scores[0][found], ids[0][found]


def reconstructed(index: Any, ids: Ints) -> Vectors:
    """Vectors as the index holds them."""
    ivf = _faiss().try_extract_index_ivf(index)
    if ivf is not None and ivf.direct_map.no():
        ivf.make_direct_map()  # an inverted file cannot give back single vectors without it
    vectors: Vectors = index.reconstruct_batch(ids)
    return vectors


def save_vectors(folder: Path, index: Any) -> int:
    """Write the index file into a folder that is being written; returns its size in bytes."""
    place = folder / INDEX_FILE
    _faiss().write_index(index, str(place))
    return place.stat().st_size


def open_index(folder: str | Path) -> SearchIndex:
    """Open an index folder, all files of it in one state, also while another process replaces them.

    :raises MissingError: it is none.
    :raises DataError: a file of it was cut short or does not fit the others.
    """
    folder, failed = Path(folder), 0
    for _ in range(100):
        before = index_stamp(folder)
        try:
            held = _open_once(folder)
        except (DataError, MissingError):
            failed = failed + 1 if index_stamp(folder) == before else 0
            if failed == TRIES:
                raise
        else:
            if index_stamp(folder) == before:
                return held
        time.sleep(PAUSE)
    raise DataError(f"{folder} is being rewritten all the time; search when that is done")


def _open_once(folder: Path) -> SearchIndex:
    manifest = _read_manifest(folder)
    index = _read_vectors(place_of(folder, INDEX_FILE), manifest["index_bytes"])
    rows = read_rows(place_of(folder, ROWS_FILE))
    of_row, _ = _read_distinct(place_of(folder, VECTORS_FILE))
    vectors = manifest.get("vectors", manifest["rows"])
    if not (index.ntotal == vectors and len(rows) == manifest["rows"] and len(of_row) in (0, len(rows))):
        raise DataError(
            f"{folder}: {index.ntotal} vectors, {len(rows)} rows of columns, {manifest['rows']} in the manifest; "
            "build the index again"
        )
    deleted = _read_deleted(place_of(folder, DELETED_FILE), len(rows))
    return SearchIndex(folder, index, rows, manifest, deleted, of_row)


def _read_vectors(place: Path, size: int) -> Any:
    try:
        found = place.stat().st_size
    except FileNotFoundError:
        found = 0
    if found != size:
        raise DataError(
            f"{place} holds {found:,} bytes, its manifest says {size:,}: it was cut short or replaced; build the index "
            "again"
        )
    try:
        return _faiss().read_index(str(place))
    except RuntimeError as error:
        raise DataError(f"{place} is not a complete Faiss index; build the index again") from error


def _read_distinct(path: Path) -> tuple[Ints, list[bytes]]:
    """What `Distinct` saved; nothing for an index from before equal vectors were indexed once."""
    if not path.is_file():
        return np.empty(0, np.int64), []
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["of_row"], [digest.tobytes() for digest in file["digests"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not complete ({error}); build the index again") from error


def distinct_of(held: SearchIndex) -> Distinct:
    """What the rows of an opened index share, to add rows to."""
    of_row, digests = _read_distinct(place_of(held.folder, VECTORS_FILE))
    unknown = (i.to_bytes(DIGEST) for i in range(len(digests), held.index.ntotal))  # equal to no digest
    return Distinct(of_row if len(of_row) else np.arange(len(held.rows)), [*digests, *unknown])


def _read_manifest(folder: Path) -> dict[str, Any]:
    place = place_of(folder, MANIFEST_FILE)
    try:
        manifest: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        _ = manifest["index_bytes"], manifest["rows"], manifest["search"]["knob"], manifest["model"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"index {folder}: there is no {MANIFEST_FILE} in it; build the index first") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is no readable manifest ({error!r}); build the index again") from error
    return manifest


def read_rows(path: Path) -> pa.Table:
    """The sidecar of an index, mapped into memory: a row an indexed vector.

    :raises DataError: the file is not whole.
    """
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not whole ({error}); build the index again") from error


def _read_deleted(path: Path, rows: int) -> Ints:
    if not path.is_file():
        return np.empty(0, np.int64)
    try:
        deleted = np.load(path)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is not whole ({error}); remove it to see every row, or build the index again"
        ) from error
    if deleted.dtype != np.int64 or not ((deleted >= 0) & (deleted < rows)).all():
        raise DataError(f"{path} names rows that the index does not have; remove it to see every row, or build again")
    return deleted


def write_deleted(folder: Path, numbers: Ints) -> None:
    """Hide rows, and no others, until the next build."""
    with written_whole(folder / DELETED_FILE) as new, open(new, "wb") as file:
        np.save(file, numbers.astype(np.int64))


@functools.lru_cache(maxsize=2)
def opened(folder: str, stamp: tuple[tuple[int, ...], ...]) -> SearchIndex:
    """`open_index`, remembered while the folder's files stay as they are (`index_stamp`)."""
    return open_index(folder)
