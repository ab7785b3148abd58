"""A Faiss index over unit vectors: which kind, building it in one stream, measuring it, searching it.

Sizes follow the Faiss wiki's "Guidelines to choose an index": exact up to 50,000 vectors, a graph to a million, cells
with compressed vectors above. A folder holds the index, the kept columns row for row, and a manifest.

A GPU build of Faiss, where installed, trains cells, assigns vectors to them and searches exactly for the measurement;
the index itself stays on the CPU, so that every machine can load it.
"""

from __future__ import annotations

import functools
import json
import time
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
INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE = "index.faiss", "rows.arrow", "manifest.json", "deleted.npy"
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
            return [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
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
            f"kind {plan.factory!r} is no Faiss factory string for {dim} dimensions ({reason}); "
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


def fill(index: Any, batches: Iterable[Embeddings], rows_file: Path, gather: Ints) -> Vectors:
    """Add all vectors and write the sidecar, a batch at a time.

    :param gather: numbers, sorted, of the vectors to return.
    """
    gathered = [np.empty((0, index.d), np.float32)]
    sidecar, add = None, adding(index)
    for batch in batches:
        sidecar = sidecar or RowsWriter(rows_file, list(batch.columns))
        if len(batch):
            vectors = unit(batch.vectors)
            low, high = np.searchsorted(gather, (index.ntotal, index.ntotal + len(vectors)))
            gathered.append(vectors[gather[low:high] - index.ntotal])
            add(vectors)
            sidecar.add(batch.rows, batch.columns)
    if sidecar is not None:
        sidecar.close()
    return np.concatenate(gathered)


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


def recall_of(found: Ints, truth: Truth, index: Any) -> float:
    """Mean share of the ten nearest that were found; any that scores as the tenth does is as good.

    What is asked for is as many as there are, where the index holds fewer than ten others.
    """
    shares = []
    for i, own in enumerate(truth.own):
        there = truth.scores[i] > -np.inf
        near, scores = truth.ids[i][there], truth.scores[i][there]
        wanted = min(RECALL_AT, len(near))
        kept = found[i][(found[i] != own) & (found[i] >= 0)][:RECALL_AT]
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


def share_of_twins(truth: Truth) -> float:
    """How many of the queries that stand in the index themselves have an equal vector there, as a share."""
    inside = truth.own >= 0
    return float((truth.scores[inside].max(axis=1) >= 1 - SAME_SCORE).mean()) if inside.any() else 0.0


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
    """An opened index folder. `deleted` are the numbers of rows that are hidden."""

    folder: Path
    index: Any = field(repr=False)
    rows: pa.Table = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    deleted: Ints = field(repr=False)

    def __len__(self) -> int:
        return int(self.index.ntotal) - len(self.deleted)

    def find(self, query: Vectors, k: int, where: Mapping[str, Sequence[str]]) -> list[tuple[float, dict[str, Any]]]:
        """The k nearest rows of one unit vector: score (cosine) and kept columns, best first.

        :param where: column to the values allowed in it.
        :raises DataError: the vector has another dimension, or a column is not kept.
        """
        if query.shape != (self.index.d,):
            raise DataError(f"{self.folder}: the query has {query.shape[-1]} dimensions, the index {self.index.d}")
        allowed = self._allowed(where)
        if where:
            scores, ids = self._among(query, k, allowed)
        else:
            scores, ids = self._nearest(query, k, allowed)
        found = self.rows.take(ids).to_pylist()
        return [(float(score), row) for score, row in zip(scores, found, strict=True)]

    def _allowed(self, where: Mapping[str, Sequence[str]]) -> NDArray[np.bool_]:
        """Which rows may be found."""
        import pyarrow as pa
        import pyarrow.compute as pc

        allowed = np.ones(self.index.ntotal, dtype=bool)
        allowed[self.deleted] = False
        for name, values in where.items():
            if name not in self.rows.column_names[1:]:
                kept = ", ".join(self.rows.column_names[1:]) or "none"
                raise DataError(f"{self.folder}: no column {name} to filter by; kept columns are {kept}")
            mask = pc.is_in(self.rows.column(name), value_set=pa.array(values, pa.string()))
            allowed &= mask.to_numpy()
        return allowed

    def _among(self, query: Vectors, k: int, allowed: NDArray[np.bool_]) -> tuple[Vectors, Ints]:
        """The k nearest of the allowed rows, all of which are compared: where these lie far from the query, a graph or
        a few cells would find too few of them, or others than the nearest."""
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
        return (scores, ids) if len(ids) == min(k, len(self)) else self._among(query, k, allowed)

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
    """Open an index folder.

    :raises MissingError: it is none.
    :raises DataError: a file of it was cut short or does not fit the others.
    """
    faiss = _faiss()
    folder = Path(folder)
    manifest = _read_manifest(folder)
    place = folder / INDEX_FILE
    size = place.stat().st_size if place.is_file() else 0
    if size != manifest["index_bytes"]:
        raise DataError(
            f"{place} holds {size:,} bytes, its manifest says {manifest['index_bytes']:,}: it was cut short or "
            "replaced; build the index again"
        )
    try:
        index = faiss.read_index(str(place))
    except RuntimeError as error:
        raise DataError(f"{place} is no whole Faiss index; build the index again") from error
    rows = read_rows(folder / ROWS_FILE)
    if not index.ntotal == len(rows) == manifest["rows"]:
        raise DataError(
            f"{folder}: {index.ntotal} vectors, {len(rows)} rows of columns, {manifest['rows']} in the manifest; "
            "build the index again"
        )
    return SearchIndex(folder, index, rows, manifest, _read_deleted(folder / DELETED_FILE, len(rows)))


def _read_manifest(folder: Path) -> dict[str, Any]:
    place = folder / MANIFEST_FILE
    if not place.is_file():
        raise MissingError(f"index {folder}: there is no {MANIFEST_FILE} in it; build the index first")
    try:
        manifest: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        _ = manifest["index_bytes"], manifest["rows"], manifest["search"]["knob"], manifest["model"]
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


def write_deleted(index: SearchIndex, numbers: Ints) -> None:
    """Hide rows until the next build."""
    with written_whole(index.folder / DELETED_FILE) as new, open(new, "wb") as file:
        np.save(file, np.union1d(index.deleted, numbers).astype(np.int64))


@functools.lru_cache(maxsize=2)
def opened(folder: str, stamp: tuple[int, ...]) -> SearchIndex:
    """`open_index`, remembered while the folder's files keep their times (`index_stamp`)."""
    return open_index(folder)


def index_stamp(folder: str | Path) -> tuple[int, ...]:
    """The times at which an index's files were written; -1 for one that is not there."""
    files = [Path(folder) / name for name in (INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE)]
    return tuple(file.stat().st_mtime_ns if file.is_file() else -1 for file in files)
