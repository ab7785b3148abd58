"""Two-dimensional maps of vectors, t-SNE and UMAP, from ready neighbours; and how far to trust them.

All functions take unit vectors: ordered by Euclidean distance, they are ordered by cosine similarity.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.files import has_home, written_whole
from ebr_lib.logs import logger

Coords = NDArray[np.float32]

# PCA draws fewer points than this: of 5 to 7 points it kept neighbours better than t-SNE (trustworthiness 0.92 against
# 0.87), of 8 both reached 0.90
FEWEST = 8
BLOCK = 4096
COMPONENTS = 50  # principal components in which UMAP's neighbours are searched
MAP_NEIGHBOURS = 15  # neighbours that a map is judged on; fewer if there are few points
JUDGED = 5000  # points on which a map is judged
# points from which interpolation replaces Barnes-Hut: it took 2.1 of its processor time at 1,000 MiniLM vectors, 0.97
# at 3,000 and 0.4 at 12,000 (150 iterations, 2 cores)
FFT_FROM = 3000
# coarseness of the interpolation: half of openTSNE's grid took 0.4 of the time and lost 0.6 % of the neighbours kept
# (12,000 points, one run)
GRID = 2
STEPS = ((250, 12.0, 0.5), (500, 1.0, 0.8))  # iterations, exaggeration, momentum: van der Maaten 2014, openTSNE
# fewer points are drawn without exaggeration, which collapsed up to 30 random vectors into one dot (never 50), and on
# one thread
EXAGGERATED_FROM = 100


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of each row, nearest first, without the row itself.

    :param indices: int32, rows × k.
    :param distances: float32, rows × k, Euclidean between unit vectors (0 to 2).
    """

    indices: NDArray[np.int32]
    distances: NDArray[np.float32]

    @property
    def k(self) -> int:
        """Neighbours per row."""
        return self.indices.shape[1]


@dataclass(frozen=True)
class MapQuality:
    """How far a map can be trusted, measured on a sample of its points; NaN if there are too few points.

    :param trustworthiness: 0 to 1, higher is better: whether neighbours on the map are near in the original space
        (Venna and Kaski 2001), within the sample.
    :param neighbours_kept: 0 to 1, higher is better: share of a point's nearest neighbours in the original space that
        are among its nearest on the map.
    :param points: size of the sample.
    :param neighbours: neighbours per point that both look at: 15, or fewer if there are few points.
    """

    trustworthiness: float
    neighbours_kept: float
    points: int
    neighbours: int


# --- rows to project ----------------------------------------------------------------------------------------------


def sample_rows(codes: Ints, limit: int, seed: int, at_least: int = 20) -> Ints:
    """Sample rows by label, in proportion to its size but at least `at_least` of its rows.

    :param codes: label of each row, any integers.
    :returns: ascending row numbers, `limit` of them or all.
    """
    if len(codes) <= limit:
        return np.arange(len(codes))
    order = np.random.default_rng(seed).permutation(len(codes))
    _, label, sizes = np.unique(codes[order], return_inverse=True, return_counts=True)
    by_label = np.argsort(label, kind="stable")
    rank = np.empty(len(label), dtype=np.int64)  # rows of the same label before each row
    rank[by_label] = np.arange(len(label)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.where(rank < min(at_least, limit // len(sizes)), -1.0, rank / sizes[label])
    return np.sort(order[np.argsort(turn, kind="stable")[:limit]])


def distinct_rows(unit: Vectors) -> tuple[Ints, Ints]:
    """Find equal vectors (to six decimals: the same text encoded in another batch differs by less).

    :returns: the first row of each distinct vector, ascending; and for every row the position of its vector among them.
    """
    factors = np.random.default_rng(0).integers(1, 2**63, unit.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(unit), dtype=np.uint64)  # sorting a million whole rows would not fit in memory
    for start in range(0, len(unit), BLOCK):
        rounded = np.rint(unit[start : start + BLOCK] * 1e6).astype(np.int64).view(np.uint64)
        hashes[start : start + BLOCK] = rounded @ factors
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def exact_neighbours(unit: Vectors, k: int) -> Neighbours:
    """The k nearest rows of every row, by an exhaustive search.

    :param unit: unit vectors, n × d; k is lowered to n - 1.
    """
    import faiss

    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    products, found = _others(index, unit, k)
    return Neighbours(found, np.sqrt(np.maximum(2 - 2 * products, 0)))


def component_neighbours(unit: Vectors, k: int) -> Neighbours:
    """The k nearest rows of every row in the first 50 principal components, approximate for many rows.

    UMAP is drawn from these: its maps were more trustworthy (0.84) than from neighbours in all 384 dimensions (0.82).
    """
    index = _search_index(reduced := np.ascontiguousarray(components(unit, COMPONENTS), np.float32), "L2", probes=32)
    squares, found = _others(index, reduced, k)
    return Neighbours(found, np.sqrt(np.maximum(squares, 0)))


def _others(index: Any, vectors: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Search an index for each of its own vectors: measures and rows of the k nearest others."""
    from tqdm.auto import tqdm

    n = len(vectors)
    k = min(k, n - 1)
    measures, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int32)
    for start in tqdm(range(0, n, BLOCK), desc="neighbours", unit_scale=BLOCK, unit="row", delay=3, leave=False):
        rows = slice(start, min(start + BLOCK, n))
        near, found = _found_all(index, vectors[rows], k + 1)
        others = _others_than(np.arange(rows.start, rows.stop), found)
        indices[rows] = found[others].reshape(len(found), k)
        measures[rows] = near[others].reshape(len(found), k)
    return measures, indices


def _others_than(rows: Ints, found: Ints) -> NDArray[np.bool_]:
    """Mask of the k + 1 found for each row without the row itself, or the last if equal vectors crowded it out."""
    others = found != rows[:, None]
    others[others.all(axis=1), -1] = False
    return others


def _found_all(index: Any, vectors: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search; if the nearest lists of an inverted file hold fewer than k rows, search all lists."""
    near, found = index.search(vectors, k)
    if len(short := np.flatnonzero((found < 0).any(axis=1))):
        probes, index.nprobe = index.nprobe, index.nlist
        near[short], found[short] = index.search(vectors[short], k)
        index.nprobe = probes
    return near, found


def neighbours_of_rows(distinct: Neighbours, place: Ints, k: int, seed: int) -> Ints:
    """Turn neighbours among distinct vectors into neighbours among rows: equal rows are each other's nearest.

    Which of many equal rows come first is random per row: the order of the file must not decide what labels a row's
    neighbours have.

    :param place: for every row the position of its vector among the distinct ones.
    :returns: row numbers, rows × min(k, rows - 1), nearest first.
    """
    n, k = len(place), min(k, len(place) - 1)
    rng = np.random.default_rng(seed)
    members, starts, sizes, position = _shuffled_groups(place, rng)
    groups = np.hstack([np.arange(len(sizes))[:, None], distinct.indices[:, :k]])[place]
    here = sizes[groups]
    here[:, 0] -= 1  # the row itself
    ends = np.cumsum(here, axis=1)
    begin = rng.integers(0, n, n)
    rows, found = np.arange(n), np.empty((n, k), dtype=np.int64)
    for slot in range(k):
        turn = (ends <= slot).sum(axis=1)
        group, before = groups[rows, turn], ends[rows, turn] - here[rows, turn]
        step = np.where(turn == 0, position + 1, begin) + slot - before
        found[:, slot] = members[starts[group] + step % sizes[group]]
    return found


def _shuffled_groups(place: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints, Ints]:
    """Rows by group, each group shuffled; start and size of each group; and the position of each row in its group."""
    order = rng.permutation(len(place))
    members = order[np.argsort(place[order], kind="stable")]
    sizes = np.bincount(place)
    starts = np.cumsum(sizes) - sizes
    position = np.empty_like(members)
    position[members] = np.arange(len(place)) - starts[place[members]]
    return members, starts, sizes, position


# --- maps ---------------------------------------------------------------------------------------------------------


def fitting_perplexity(wanted: float, points: int) -> float:
    """The perplexity, lowered with a warning if there are too few points: it must be below (n - 1) / 3."""
    limit = (points - 1) / 3
    if wanted < limit:
        return wanted
    lowered = round(max(1.0, limit * 0.99), 2)
    logger.warning(
        "点数太少 t-SNE: perplexity %g lowered to %g: it must be below (n - 1) / 3 for %d points",
        wanted,
        lowered,
        points,
    )
    return lowered


def fitting_neighbors(wanted: int, points: int) -> int:
    """UMAP's neighbours, lowered with a warning if there are too few points."""
    if wanted < points:
        return wanted
    logger.warning("点数太少 UMAP: %d neighbours lowered to %d: there are %d points", wanted, points - 1, points)
    return points - 1


def components(unit: Vectors, count: int) -> NDArray[np.float64]:
    """The first principal components, n × min(count, d), with fixed signs: the same data look the same."""
    centred = unit - unit.mean(axis=0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = axes[:, -count:][:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return np.asarray(centred @ axes)


def pca_map(unit: Vectors) -> NDArray[np.float64]:
    """The first two principal components, n × 2."""
    found = np.zeros((len(unit), 2))
    found[:, : unit.shape[1]] = components(unit, 2)
    return found


def tsne_map(
    neighbours: Neighbours,
    start: NDArray[np.float64],
    *,
    perplexity: float,
    learning_rate: float | Literal["auto"],
    seed: int,
) -> Coords:
    """Draw a t-SNE map from ready neighbours (openTSNE: Barnes-Hut when small, FFT interpolation when large).

    :param start: n × 2, initial positions; their scale is ignored.
    :param perplexity: below (n - 1) / 3.
    :param learning_rate: openTSNE's; "auto" is n / exaggeration (Belkina et al. 2019).
    """
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors
    from tqdm.auto import tqdm

    n, k = len(neighbours.indices), min(neighbours.k, max(1, int(3 * perplexity)))
    index = PrecomputedNeighbors(neighbours.indices[:, :k], neighbours.distances[:, :k].astype(np.float64))
    few = n < EXAGGERATED_FROM
    jobs = 1 if few else -1
    affinities = PerplexityBasedNN(perplexity=perplexity, knn_index=index, n_jobs=jobs)
    tiny = start / (start[:, 0].std() or 1.0) * 1e-4
    method = "bh" if n < FFT_FROM else "fft"
    drawn = TSNEEmbedding(
        tiny, affinities, negative_gradient_method=method, ints_in_interval=GRID, n_jobs=jobs, random_state=seed
    )
    every = 50
    with tqdm(total=sum(step[0] for step in STEPS), desc="t-SNE", delay=3, leave=False) as bar:
        for iterations, exaggeration, momentum in STEPS:
            drawn.optimize(
                iterations,
                inplace=True,
                exaggeration=1.0 if few else exaggeration,
                momentum=momentum,
                learning_rate=learning_rate,
                callbacks=lambda *_: bar.update(every) and None,
                callbacks_every_iters=every,
            )
    return np.asarray(drawn, dtype=np.float32)


def umap_map(
    neighbours: Neighbours,
    start: NDArray[np.float64],
    *,
    n_neighbors: int,
    min_dist: float,
    seed: int | None,
) -> Coords:
    """Draw a UMAP map from ready neighbours, starting from `start` (n × 2).

    :param seed: None uses all cores, and each map differs.
    """
    from threadpoolctl import threadpool_limits

    # numba's first run sets the whole process's OpenMP to one thread per processor: the old limits are restored
    with warnings.catch_warnings(), threadpool_limits(limits=None):
        warnings.simplefilter("ignore")  # that it cannot place new points without a search index
        umap = _imported_umap()
        itself = np.arange(len(start), dtype=np.int32)[:, None]
        k = min(n_neighbors - 1, neighbours.k)  # umap-learn counts the point itself
        indices = np.hstack([itself, neighbours.indices[:, :k]])
        distances = np.hstack([np.zeros_like(itself, dtype=np.float32), neighbours.distances[:, :k]])
        model = umap.UMAP(
            n_neighbors=k + 1,
            min_dist=min_dist,
            init=start.astype(np.float32),
            precomputed_knn=(indices, distances),
            force_approximation_algorithm=True,  # otherwise it ignores the ready neighbours of small data
            random_state=seed,
            n_jobs=-1 if seed is None else 1,
        )
        return np.asarray(model.fit_transform(start), dtype=np.float32)  # of the data it only uses the number of rows


def _imported_umap() -> Any:
    """UMAP, with a temporary folder for numba's cache if numba can write neither beside UMAP's code nor to HOME.

    It would fail then, as in a container; without a HOME it would make a folder called `~`.
    """
    settings: Any = importlib.import_module("numba").config
    if settings.CACHE_DIR or has_home():
        try:
            return importlib.import_module("umap")
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
    settings.CACHE_DIR = tempfile.mkdtemp(prefix="numba-")
    atexit.register(shutil.rmtree, settings.CACHE_DIR, ignore_errors=True)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("umap", "pynndescent")]:
        del sys.modules[name]  # loaded before the failure
    return importlib.import_module("umap")


def place_rest(unit: Vectors, rest: Ints, projected: Vectors, coords: Coords, k: int = 5) -> Coords:
    """Place rows that were not projected at the mean of their k nearest projected vectors, weighted by nearness.

    :param unit: all unit vectors; `rest` are the rows to place.
    :param projected: the unit vectors that were projected, to `coords`.
    :returns: coordinates of `rest`.
    """
    from tqdm.auto import tqdm

    index = _search_index(projected, "IP", probes=8)
    placed = np.empty((len(rest), 2), dtype=np.float32)
    for start in tqdm(range(0, len(rest), BLOCK), desc="placing", unit_scale=BLOCK, unit="row", delay=3, leave=False):
        part = slice(start, start + BLOCK)
        products, found = index.search(unit[rest[part]], min(k, len(projected)))
        weights = np.where(found < 0, 0, 1 / np.maximum(1 - products, 1e-6)) ** 2
        weights /= weights.sum(axis=1, keepdims=True)
        placed[part] = (weights[:, :, None] * coords[found]).sum(axis=1)
    return placed


def _search_index(vectors: Vectors, measure: Literal["IP", "L2"], probes: int) -> Any:
    """Exact for few vectors, an inverted file for many: positions on a picture need not be exact."""
    import faiss

    n, dim = vectors.shape
    metric = {"IP": faiss.METRIC_INNER_PRODUCT, "L2": faiss.METRIC_L2}[measure]
    if n < BLOCK:
        index: Any = faiss.IndexFlat(dim, metric)
    else:
        index = faiss.index_factory(dim, f"IVF{int(np.sqrt(n))},Flat", metric)
        index.cp.niter, index.nprobe = 5, probes
        index.train(vectors)
    index.add(vectors)
    return index


def aligned(coords: Coords, onto: Coords) -> Coords:
    """Turn, mirror, scale and shift a map as near as possible to `onto` (Procrustes)."""
    here, there = coords.mean(axis=0), onto.mean(axis=0)
    left, sizes, right = np.linalg.svd((coords - here).T @ (onto - there))
    scale = sizes.sum() / max(float(((coords - here) ** 2).sum()), 1e-12)
    return np.asarray(scale * (coords - here) @ left @ right + there, dtype=np.float32)


# --- trust --------------------------------------------------------------------------------------------------------


def map_quality(unit: Vectors, neighbours: Neighbours, coords: Coords, seed: int) -> MapQuality:
    """Judge a map on up to 5,000 of its points: trustworthiness within the sample, neighbours kept among all points."""
    n = len(unit)
    k = min(MAP_NEIGHBOURS, neighbours.k, (n - 1) // 2)
    if k < 1:
        return MapQuality(float("nan"), float("nan"), n, 0)
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:JUDGED])
    near = _near_on_map(coords, rows, k)
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(near, neighbours.indices[rows, :k], strict=True)])
    return MapQuality(trustworthiness(unit[rows], coords[rows], k), float(kept), len(rows), k)


def _near_on_map(coords: Coords, rows: Ints, k: int) -> Ints:
    from scipy.spatial import cKDTree

    found = cKDTree(coords).query(coords[rows], k + 1, workers=-1)[1]
    return found[_others_than(rows, found)].reshape(len(found), k)


def trustworthiness(unit: Vectors, coords: Coords, k: int) -> float:
    """Trustworthiness of a map (Venna and Kaski 2001), equal to scikit-learn's, without its n × n table of ranks."""
    n = len(unit)
    near = _near_on_map(coords, np.arange(n), k)
    penalty = 0
    for start in range(0, n, 512):
        rows = np.arange(start, min(start + 512, n))
        products = unit[rows] @ unit.T
        products[np.arange(len(rows)), rows] = np.inf
        for column in near[rows].T:
            rank = (products > products[np.arange(len(rows)), column][:, None]).sum(axis=1)
            penalty += int(np.maximum(rank - k, 0).sum())
    return 1 - penalty * 2 / (n * k * (2 * n - 3 * k - 1))


# --- cache --------------------------------------------------------------------------------------------------------


def fingerprint(unit: Vectors, *settings: object) -> str:
    """A cache key: equal vectors and settings give equal keys."""
    digest = hashlib.sha256(np.ascontiguousarray(unit).data)
    digest.update(repr((unit.shape, *settings)).encode())
    return digest.hexdigest()[:32]


class Cache:
    """Arrays kept in a file beside the picture: recolouring reuses cached maps.

    :param path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, NDArray[Any]] = {}
        self._used: dict[str, NDArray[Any]] = {}
        if path is None or not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                self._found = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("缓存无法读取 %s is not readable (%s); computing the maps again", path, error)

    def get(self, name: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of this name, computed if it is not cached."""
        if name not in self._used:
            self._used[name] = self._found[name] if name in self._found else make()
        return self._used[name]

    def save(self) -> None:
        """Keep the arrays that were used since the file was opened; the others are dropped."""
        if self._path is None or self._used.keys() == self._found.keys():
            return
        with written_whole(self._path) as new, open(new, "wb") as file:
            np.savez(file, **self._used)  # type: ignore[arg-type]
