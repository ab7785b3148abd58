"""Numbers on vectors and their labels, all in the original space: purity, silhouette, confusions, k-means, health.

Vectors are unit vectors; labels are codes from 0. Rows without a label (-1) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Floats, Ints, Vectors
from ebr_lib.logs import logger

BLOCK = 16_384
NEARLY_EQUAL = 0.99  # cosine from which two vectors count as nearly equal
PAIRED = 2000  # rows whose pairs are compared
CHOICES = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)  # numbers of clusters to try
TRIED_ON = 20_000
SMALLEST = 5  # rows of a label that can be called confused
ROUNDING = 1e-12  # distances below this are rounding errors


# --- health -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Health:
    """What is wrong with the vectors themselves, before any map or cluster.

    :param rows: rows read; `without_vector` of them have none, `zero` only zeros.
    :param distinct: number of different vectors.
    :param mean_cosine: mean cosine of two different rows; 1 for a collapsed model, NaN for a single row.
    :param near_pairs: share of pairs of rows with a cosine above 0.99, among up to 2,000 rows; NaN for a single row.
    """

    rows: int
    without_vector: int
    zero: int
    dimensions: int
    distinct: int
    norm_min: float
    norm_median: float
    norm_max: float
    mean_cosine: float
    near_pairs: float

    @property
    def repeated(self) -> int:
        """Rows whose vector an earlier row has."""
        return self.rows - self.without_vector - self.zero - self.distinct

    def warnings(self) -> Iterator[str]:
        """A sentence for each problem to look at first."""
        if self.without_vector:
            yield f"{self.without_vector} of {self.rows} rows have no vector and are left out"
        if self.zero:
            yield f"{self.zero} vectors are all zeros and are left out: their texts were not encoded"
        here = self.rows - self.without_vector - self.zero
        if self.distinct == 1 and here > 1:
            yield f"all {here} vectors are the same: the model is collapsed, or every text was"
        elif self.repeated > 0.05 * here:
            yield f"{self.repeated} of {here} vectors repeat another: their texts are duplicates"
        if self.near_pairs > 0.01 and self.distinct > 1:
            yield (
                f"{self.near_pairs:.1%} of pairs have a cosine above {NEARLY_EQUAL}: near-duplicates, or a collapsing "
                "model"
            )


def health(
    unit: Vectors, norms: Floats, *, distinct: int, zero: int = 0, without_vector: int = 0, seed: int = 0
) -> Health:
    """Check the non-zero vectors; `norms` are their lengths before normalisation."""
    n = len(unit)
    total = unit.sum(axis=0, dtype=np.float64)
    chosen = unit[np.random.default_rng(seed).permutation(n)[:PAIRED]]
    m = len(chosen)
    near = max(int((chosen @ chosen.T > NEARLY_EQUAL).sum()) - m, 0)
    return Health(
        rows=n + zero + without_vector,
        without_vector=without_vector,
        zero=zero,
        dimensions=unit.shape[1],
        distinct=distinct,
        norm_min=0.0 if zero else float(norms.min()),
        norm_median=float(np.median(norms)),
        norm_max=float(norms.max()),
        mean_cosine=float((total @ total - n) / (n * (n - 1))) if n > 1 else float("nan"),
        near_pairs=near / (m * (m - 1)) if m > 1 else float("nan"),
    )


# --- neighbours with the same label -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Purity:
    """Share of nearest neighbours with the row's own label.

    :param at: k to the share among the k nearest, averaged over rows.
    :param chance: the share that vectors without meaning would reach.
    :param judged: rows that have a label and a neighbour with one.
    :param per_row: share per row among the largest k, but no more neighbours than its label has other rows: a label
        of three rows can reach 1 too. NaN without a label, or without another row of it.
    """

    at: dict[int, float]
    chance: float
    judged: int
    per_row: Floats


def label_purity(near: Ints, codes: Ints, ks: Sequence[int] = (1, 5, 10)) -> Purity:
    """Share of each row's nearest neighbours (rows × k) with its own label; unlabelled neighbours do not count."""
    sizes = np.bincount(codes[codes >= 0])
    others = np.where(codes >= 0, np.append(sizes, 0)[codes] - 1, 0)
    shares, per_row = {}, np.full(len(codes), np.nan)
    for k in ks:
        per_row = _share_of_label(near, codes, np.full(len(codes), k))
        shares[k] = float(np.nanmean(per_row)) if np.isfinite(per_row).any() else float("nan")
    total = sizes.sum()
    chance = float((sizes * (sizes - 1)).sum() / (total * (total - 1))) if total > 1 else 1.0
    return Purity(
        shares, chance, int(np.isfinite(per_row).sum()), _share_of_label(near, codes, np.minimum(max(ks), others))
    )


def _share_of_label(near: Ints, codes: Ints, most: Ints) -> Floats:
    """Share with the row's own label among its first `most` neighbours, of those that have a label."""
    counted = (codes[near] >= 0) & (np.arange(near.shape[1]) < most[:, None])
    same = counted & (codes[near] == codes[:, None])
    with np.errstate(invalid="ignore"):
        return np.where(codes < 0, np.nan, same.sum(axis=1) / counted.sum(axis=1))


# --- separation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Separation:
    """How well labels separate the vectors.

    :param silhouette: mean of `per_row`; -1 to 1, higher is better (Rousseeuw 1987), cosine distance, all rows.
    :param davies_bouldin: 0 up, lower is better (Davies and Bouldin 1979), Euclidean, unit vectors.
    :param calinski_harabasz: 0 up, higher is better, grows with the rows (Caliński and Harabasz 1974), Euclidean.
    :param per_row: silhouette of each row; NaN without a label.
    """

    silhouette: float
    davies_bouldin: float
    calinski_harabasz: float
    per_row: Floats


def separation(unit: Vectors, codes: Ints) -> Separation | None:
    """Measure the separation exactly, in n·k·d: the mean cosine distance of a unit vector x to a cluster is 1 - x·mean.

    Equal to scikit-learn's scores on all rows. None if undefined: needs 2 labels, and fewer labels than rows.
    """
    from scipy.sparse import csr_matrix

    rows = np.flatnonzero(codes >= 0)
    _, dense = np.unique(codes[rows], return_inverse=True)
    sizes = np.bincount(dense)
    k = len(sizes)
    if not 2 <= k < len(rows):
        return None
    sums = np.zeros((k, unit.shape[1]))
    for part, x in _blocks(unit, rows):
        member = csr_matrix((np.ones(len(x)), dense[part], np.arange(len(x) + 1)), shape=(len(x), k))
        sums += member.T @ x
    means = sums / sizes[:, None]
    inside, spread, per_row = np.zeros(k), np.zeros(k), np.full(len(codes), np.nan)
    for part, x in _blocks(unit, rows):
        per_row[rows[part]], squares = _row_silhouettes(x, dense[part], means, sizes)
        inside += np.bincount(dense[part], squares, k)
        spread += np.bincount(dense[part], np.sqrt(squares), k)
    return Separation(
        silhouette=float(per_row[rows].mean()),
        davies_bouldin=_davies_bouldin(means, spread / sizes),
        calinski_harabasz=_calinski_harabasz(means, sizes, float(inside.sum())),
        per_row=per_row,
    )


def _blocks(unit: Vectors, rows: Ints) -> Iterator[tuple[slice, Floats]]:
    """Rows as float64 normalised again, as in scikit-learn's cosine distance."""
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        x = unit[rows[part]].astype(np.float64)
        yield part, x / np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]


def _row_silhouettes(x: Floats, codes: Ints, means: Floats, sizes: Ints) -> tuple[Floats, Floats]:
    """Silhouette of each row of a block, and its squared distance to its own mean."""
    products = x @ means.T
    here = np.arange(len(x))
    own, size = products[here, codes], sizes[codes]
    with np.errstate(invalid="ignore", divide="ignore"):
        within = _real(size * (1 - own) / (size - 1))  # the row itself is at distance 0
        products[here, codes] = -np.inf
        nearest = _real(1 - products.max(axis=1))
        silhouettes = (nearest - within) / np.maximum(nearest, within)
    squares = _real(1 - 2 * own + np.einsum("ij,ij->i", means, means)[codes])
    return np.where(size > 1, np.nan_to_num(silhouettes), 0.0), squares


def _real(distances: Floats) -> Floats:
    """Distances with rounding errors set to zero: quotients of them would be noise."""
    return np.where(distances < ROUNDING, 0.0, distances)


def _davies_bouldin(means: Floats, spread: Floats) -> float:
    from scipy.spatial.distance import cdist

    gaps = cdist(means, means)
    if np.allclose(spread, 0) or np.allclose(gaps, 0):
        return 0.0
    gaps[gaps == 0] = np.inf
    return float(((spread[:, None] + spread[None, :]) / gaps).max(axis=1).mean())


def _calinski_harabasz(means: Floats, sizes: Ints, inside: float) -> float:
    centre = sizes @ means / sizes.sum()
    between = float((sizes * ((means - centre) ** 2).sum(axis=1)).sum())
    k, n = len(sizes), int(sizes.sum())
    return 1.0 if inside == 0 else between * (n - k) / (inside * (k - 1))


# --- labels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelScore:
    """One label: its rows, the mean of `Purity.per_row` over them, and their mean silhouette."""

    code: int
    rows: int
    purity: float
    silhouette: float


def label_scores(codes: Ints, rows: Ints, purity: Purity, separated: Separation | None) -> list[LabelScore]:
    """Scores of every label, largest label first; the purity was measured on `rows`."""
    k = int(codes.max(initial=-1)) + 1
    sizes = np.bincount(codes[codes >= 0], minlength=k)
    shares = _means(purity.per_row, codes[rows], k)
    silhouettes = _means(separated.per_row, codes, k) if separated else np.full(k, np.nan)
    order = np.argsort(-sizes, kind="stable")
    return [LabelScore(int(c), int(sizes[c]), float(shares[c]), float(silhouettes[c])) for c in order if sizes[c]]


def _means(values: Floats, codes: Ints, k: int) -> Floats:
    known = (codes >= 0) & ~np.isnan(values)
    counts = np.bincount(codes[known], minlength=k)
    with np.errstate(invalid="ignore"):
        return np.bincount(codes[known], values[known], k) / counts


@dataclass(frozen=True)
class Confusion:
    """Two labels among each other's neighbours.

    :param share: share of `second` among the neighbours of `first`; `share_back` the other way.
    :param example: positions of the two nearest rows, one of each label.
    """

    first: int
    second: int
    share: float
    share_back: float
    example: tuple[int, int]


def confusions(unit: Vectors, near: Ints, codes: Ints, most: int = 10) -> list[Confusion]:
    """The most confused pairs of labels by nearest neighbours (rows × k), worst first."""
    k = int(codes.max(initial=-1)) + 1
    sizes = np.bincount(codes[codes >= 0], minlength=k)
    source = np.repeat(np.arange(len(codes)), near.shape[1])
    target = near.ravel()
    fit = (codes >= 0) & (np.where(codes >= 0, sizes[codes], 0) >= min(SMALLEST, sizes.max(initial=0)))
    crossing = fit[source] & fit[target] & (codes[source] != codes[target])
    source, target = source[crossing], target[crossing]
    pairs, counts = np.unique(codes[source] * k + codes[target], return_counts=True)
    share = dict(zip(pairs.tolist(), (counts / (sizes[pairs // max(k, 1)] * near.shape[1])).tolist(), strict=True))
    found: dict[tuple[int, int], Confusion] = {}
    for pair in sorted(share, key=lambda p: (-share[p], p)):
        a, b = divmod(pair, k)
        if (b, a) in found:
            continue
        here = np.flatnonzero(np.isin(codes[source], (a, b)) & np.isin(codes[target], (a, b)))
        best = here[np.einsum("ij,ij->i", unit[source[here]], unit[target[here]]).argmax()]
        one, other = int(source[best]), int(target[best])
        example = (one, other) if codes[one] == a else (other, one)
        found[a, b] = Confusion(a, b, share[pair], share.get(b * k + a, 0.0), example)
        if len(found) == most:
            break
    return list(found.values())


# --- k-means ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """Clusters that k-means found.

    :param codes: cluster of each row, 0 is the largest.
    :param why: what chose the number of clusters.
    :param silhouette: mean of all rows; NaN for one cluster, or as many as rows.
    :param typical: rows nearest to each cluster's centre, nearest first.
    :param words: the words that set each cluster apart, once texts were read.
    """

    codes: Ints
    why: str
    silhouette: float
    sizes: tuple[int, ...]
    typical: tuple[tuple[int, ...], ...]
    words: tuple[str, ...] = ()

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.sizes)


def find_clusters(unit: Vectors, k: int | None, labels: int, seed: int, typical: int = 10) -> Clusters:
    """Spherical k-means.

    :param k: number of clusters; None takes the number of labels, or without labels the one with the best silhouette.
    """
    codes, why = _chosen(unit, k, labels, seed)
    _, codes = np.unique(codes, return_inverse=True)  # k-means may leave clusters empty
    sizes = np.bincount(codes)
    if len(sizes) < (k or labels):
        wanted = f"{k} were asked for" if k else f"there are {labels} labels"
        why = f"{wanted}; {len(unit)} vectors gave {len(sizes)}"
        logger.warning("聚类 k-means: %s", why)
    order = np.argsort(-sizes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    codes = place[codes]
    separated = separation(unit, codes)

    def nearest(rows: Ints) -> tuple[int, ...]:
        products = unit[rows] @ unit[rows].mean(axis=0)
        return tuple(rows[np.argsort(-products, kind="stable")[:typical]].tolist())

    return Clusters(
        codes=codes,
        why=why,
        silhouette=separated.silhouette if separated else float("nan"),
        sizes=tuple(int(s) for s in sizes[order]),
        typical=tuple(nearest(np.flatnonzero(codes == c)) for c in range(len(sizes))),
    )


def _chosen(unit: Vectors, k: int | None, labels: int, seed: int) -> tuple[Ints, str]:
    most = max(1, len(unit) - 1)
    if k is not None:
        return _kmeans(unit, min(k, most), seed), "as given"
    if labels > 1:
        return _kmeans(unit, min(labels, most), seed), "as many as labels"
    rows = np.random.default_rng(seed).permutation(len(unit))[:TRIED_ON]
    scores = {}
    for choice in CHOICES:
        separated = separation(unit[rows], _kmeans(unit[rows], choice, seed)) if choice <= most else None
        if separated:
            scores[choice] = separated.silhouette
    if not scores:
        return np.zeros(len(unit), dtype=np.int64), "too few vectors to divide"
    best = max(scores, key=lambda c: scores[c])
    why = f"best silhouette of k in {', '.join(f'{c} ({s:.3f})' for c, s in scores.items())}"
    return _kmeans(unit, best, seed), why


def _kmeans(unit: Vectors, k: int, seed: int) -> Ints:
    import faiss

    dim = unit.shape[1]
    trainer = faiss.Kmeans(dim, k, niter=25, nredo=2, spherical=True, seed=seed, min_points_per_centroid=1)
    trainer.train(unit)
    return np.asarray(trainer.index.search(unit, 1)[1][:, 0], dtype=np.int64)


def agreement(codes: Ints, others: Ints) -> tuple[float, float]:
    """Adjusted Rand index and normalised mutual information of two partitions, over rows in both."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    both = (codes >= 0) & (others >= 0)
    return (
        float(adjusted_rand_score(codes[both], others[both])),
        float(normalized_mutual_info_score(codes[both], others[both])),
    )


# --- before and after ---------------------------------------------------------------------------------------------


def neighbour_cosines(unit: Vectors, near: Ints) -> NDArray[np.float32]:
    """Cosine of each row with each of its neighbours (rows × k)."""
    products = [np.einsum("ij,ij->i", unit, unit[column]) for column in near.T]
    return np.stack(products, axis=1) if products else np.empty(near.shape, np.float32)


def neighbours_shared(before: Ints, after: Ints) -> Floats:
    """Share of each row's neighbours (rows × k) that are the same in both; NaN without neighbours."""
    if not before.shape[1]:
        return np.full(len(before), np.nan)
    return np.array([len(np.intersect1d(a, b)) / len(a) for a, b in zip(before, after, strict=True)])
