"""Retrieval measures, exact under ties: what a random order of equally scored documents gives on average.

Recall, hit rate, MRR, nDCG and MAP as trec_eval computes them if no scores are equal; if some are, the expectation
over all their orders (McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
Presence of Tied Scores", ECIR 2008). A scorer that gives every document the same score thus gets what chance gives, in
whatever order the documents are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors, not_finite
from ebr_lib.errors import DataError

KS = (1, 5, 10, 50, 100)
MRR_CUT, NDCG_CUT, MAP_CUT = 10, 10, 100
CHUNK = 1 << 13  # documents scored at once
BLOCK = 1 << 9  # queries scored at once: a block of scores takes 16 MB

Scores = NDArray[np.float32]
Values = NDArray[np.float64]
Grades = Sequence[Mapping[int, int]]
"""For each query: document number to grade; 0 and less is not relevant."""


class Ranking:
    """The best `depth` documents of each query, and where each relevant document is among equal scores.

    `ids` (-1 for none) and `scores` are queries × depth, best first. A document with score -inf is not retrieved. Feed
    it with `add`, in any number of chunks; only one chunk of scores is in memory at a time.

    :param left_out: for each query, documents that are not retrieved for it, whatever their scores; none of them may be
        relevant. Empty: no query leaves out any.
    """

    def __init__(self, relevant: Grades, depth: int = max(KS), left_out: Sequence[Collection[int]] = ()) -> None:
        self.depth = depth
        self.relevant = relevant
        self.ids = np.full((len(relevant), depth), -1, dtype=np.int64)
        self.scores: NDArray[np.floating] = np.full((len(relevant), depth), -np.inf, dtype=np.float32)
        self._last_tied = np.zeros(len(relevant), dtype=np.int64)  # documents with the score of the last one listed
        pairs = [(d, q, g) for q, grades in enumerate(relevant) for d, g in grades.items() if g > 0]
        table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 3)
        self._documents, self._queries, self._grades = table.T
        self._scores: NDArray[np.floating] = np.full(len(table), -np.inf, dtype=np.float32)
        out = sorted((d, q) for q, documents in enumerate(left_out) for d in documents)
        self._out_documents, self._out_queries = np.array(out, dtype=np.int64).reshape(-1, 2).T

    @classmethod
    def of_lists(cls, relevant: Grades, ids: Ints, scores: NDArray[np.floating], depth: int = max(KS)) -> Ranking:
        """A ranking of listed documents, in any order; no other document is retrieved.

        :param ids: document numbers (queries, places), each once per query; -1 where there is none.
        :param scores: the same shape; -inf where there is none.
        """
        ranking = cls(relevant, depth)
        given, take = scores, min(depth, ids.shape[1])
        ranking.scores, ranking._scores = ranking.scores.astype(given.dtype), ranking._scores.astype(given.dtype)
        order = np.lexsort((ids, -given), axis=1)[:, :take]
        ranking.scores[:, :take] = np.take_along_axis(given, order, axis=1)
        ranking.ids[:, :take] = np.where(ranking.scores[:, :take] > -np.inf, np.take_along_axis(ids, order, axis=1), -1)
        ranking._last_tied = (given == ranking.scores[:, -1:]).sum(axis=1)
        for start in range(0, len(ranking._queries), CHUNK):
            part = slice(start, start + CHUNK)
            rows, places = np.nonzero(ids[ranking._queries[part]] == ranking._documents[part, None])
            ranking._scores[start + rows] = given[ranking._queries[part][rows], places]
        return ranking

    def add(self, scores: Scores, first_query: int, first_document: int) -> None:
        """Add a block of scores (queries × documents) that begins at these two numbers.

        The block is changed: scores of documents that are left out become -inf.
        """

        def inside(queries: Ints, documents: Ints) -> tuple[Ints, tuple[Ints, Ints]]:
            low, high = np.searchsorted(documents, (first_document, first_document + scores.shape[1]))
            rows = queries[low:high] - first_query
            here = low + np.flatnonzero((rows >= 0) & (rows < len(scores)))
            return here, (queries[here] - first_query, documents[here] - first_document)

        scores[inside(self._out_queries, self._out_documents)[1]] = -np.inf
        here, places = inside(self._queries, self._documents)
        self._scores[here] = scores[places]
        worst = self.scores[first_query : first_query + len(scores), -1]
        best = scores.max(axis=1)
        rows = np.flatnonzero((best >= worst) & (best > -np.inf))  # deep in a corpus few queries still change
        if rows.size:
            self._merge(rows + first_query, scores[rows], first_document)

    def _merge(self, queries: Ints, scores: Scores, first_document: int) -> None:
        old_ids, old_scores = self.ids[queries], self.scores[queries]
        take = min(self.depth, scores.shape[1])
        best = _best(scores, take)
        ids = np.hstack([old_ids, best + first_document])
        merged = np.hstack([old_scores, np.take_along_axis(scores, best, axis=1)])
        # by score, then by number, so that the list does not depend on the size of the chunks
        order = np.lexsort((ids, -merged), axis=1)[:, : self.depth]
        self.ids[queries] = np.take_along_axis(ids, order, axis=1)
        self.scores[queries] = np.take_along_axis(merged, order, axis=1)
        last = self.scores[queries, -1][:, None]
        before = np.where(
            old_scores[:, -1] == last[:, 0], self._last_tied[queries], (old_scores == last).sum(axis=1, dtype=np.int64)
        )
        self._last_tied[queries] = before + (scores == last).sum(axis=1)
        self.ids[queries] = np.where(np.isneginf(self.scores[queries]), -1, self.ids[queries])

    def groups(self) -> Groups:
        """Where the relevant documents are: the group of equal scores that each is in."""
        found = self._scores > -np.inf
        query, score, grade = self._queries[found], self._scores[found], self._grades[found]
        listed = self.scores[query]
        above = (listed > score[:, None]).sum(axis=1)
        size = np.where(score == listed[:, -1], self._last_tied[query], (listed == score[:, None]).sum(axis=1))
        inside = size > 0  # otherwise it scores below the end of the list
        query, above = query[inside], above[inside]
        keys, group, same = np.unique(query * (self.depth + 1) + above, return_inverse=True, return_counts=True)
        first = np.searchsorted(keys, keys // (self.depth + 1) * (self.depth + 1))  # group of each group's query
        before = np.cumsum(same) - same
        return Groups(query, grade[inside], above, size[inside], same[group], (before - before[first])[group])


@dataclass(frozen=True)
class Groups:
    """One entry per relevant document in the list: query, grade, how many documents score above it, how many equal; and
    of its query's relevant documents, how many are in its group, itself included, and above it."""

    query: Ints
    grade: Ints
    above: Ints
    size: Ints
    same: Ints
    before: Ints


def measure(ranking: Ranking, ks: Sequence[int] = KS) -> dict[str, Values]:
    """Each measure, one value per query: `recall@k` and `hit@k` for every k, `mrr@10`, `ndcg@10`, `map@100`.

    nDCG takes the grade as the gain and 1 / log2(rank + 1) as the discount, as trec_eval does. All measures of a query
    without a relevant document are NaN.

    :raises ValueError: the ranking is not deep enough for the measures.
    """
    if max(*ks, MAP_CUT) > ranking.depth:
        raise ValueError(f"a ranking {ranking.depth} deep has no rank {max(*ks, MAP_CUT)}")
    groups = ranking.groups()
    grades = [sorted((g for g in grades.values() if g > 0), reverse=True) for grades in ranking.relevant]
    count = np.array([len(g) for g in grades], dtype=np.float64)
    count[count == 0] = np.nan
    values = {f"recall@{k}": _per_query(groups, _within(groups, k) / groups.size, len(count)) / count for k in ks}
    values |= {f"hit@{k}": _first(groups, k, np.ones(k), count) for k in ks}
    values[f"mrr@{MRR_CUT}"] = _first(groups, MRR_CUT, 1 / np.arange(1, MRR_CUT + 1), count)
    values[f"ndcg@{NDCG_CUT}"] = _ndcg(groups, grades, NDCG_CUT)
    values[f"map@{MAP_CUT}"] = _average_precision(groups, MAP_CUT, len(count)) / count
    return values


def _per_query(groups: Groups, values: Values, queries: int) -> Values:
    return np.bincount(groups.query, weights=values, minlength=queries).astype(np.float64, copy=False)


def _within(groups: Groups, k: int) -> Ints:
    """How many places of each group lie among the first k."""
    return np.clip(k - groups.above, 0, groups.size)


def _ndcg(groups: Groups, grades: Sequence[Sequence[int]], k: int) -> Values:
    discount = 1 / np.log2(np.arange(2, k + 2))
    total = np.r_[0.0, np.cumsum(discount)]
    first = np.minimum(groups.above, k)
    gained = groups.grade * (total[first + _within(groups, k)] - total[first]) / groups.size
    ideal = np.array([float(np.dot(g[:k], discount[: len(g[:k])])) for g in grades])
    ideal[ideal == 0] = np.nan
    return _per_query(groups, gained, len(grades)) / ideal


def _average_precision(groups: Groups, k: int, queries: int) -> Values:
    """Sum over relevant documents of the precision at their place, expected over the orders of their group.

    At place i of a group of n with r relevant ones, with A relevant and a documents above the group:
    (A + 1 + (i - 1)(r - 1)/(n - 1)) / (a + i), averaged over i; places beyond k count as 0.
    """
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, k + 1))]
    places = _within(groups, k)
    first = np.minimum(groups.above, k)
    inverse = harmonic[first + places] - harmonic[first]  # sum over the places of 1 / (a + i)
    slope = (groups.same - 1) / np.maximum(groups.size - 1, 1)
    total = (groups.before + 1) * inverse + slope * (places - (groups.above + 1) * inverse)
    return _per_query(groups, total / groups.size, queries)


def _first(groups: Groups, k: int, worth: Values, count: Values) -> Values:
    """Expected worth of the first relevant document's rank; ranks beyond k are worth 0.

    In a group of n with r relevant ones, the first is after place i with probability
    (n - r)/n · (n - r - 1)/(n - 1) · …, i factors.
    """
    lead = groups.before == 0
    query, above, size, same = groups.query[lead], groups.above[lead], groups.size[lead], groups.same[lead]
    value = np.zeros(len(query))
    none_yet = np.ones(len(query))
    for i in range(k):
        inside = i < size
        left = none_yet * np.clip(size - same - i, 0, None) / np.maximum(size - i, 1)
        rank = above + i
        value += np.where(inside & (rank < k), (none_yet - left) * worth[np.minimum(rank, k - 1)], 0.0)
        none_yet = np.where(inside, left, 0.0)
    result = np.zeros(len(count))
    result[query] = value  # equal for all entries of the leading group
    return np.where(np.isnan(count), np.nan, result)


# --- from vectors -------------------------------------------------------------------------------------------------


def _best(scores: Scores, take: int) -> Ints:
    """Columns of the best scores of each row, in any order; of ties for the last place, the first columns."""
    best = np.argpartition(-scores, take - 1, axis=1)[:, :take]
    last = np.take_along_axis(scores, best, axis=1).min(axis=1, keepdims=True)
    for row in np.flatnonzero((scores >= last).sum(axis=1) > take):
        best[row] = np.argsort(-scores[row], kind="stable")[:take]
    return best


def unit(vectors: Vectors) -> Vectors:
    """Vectors scaled to length 1; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def rank_vectors(
    queries: Vectors,
    documents: Vectors | Iterable[Vectors],
    relevant: Grades,
    depth: int = max(KS),
    left_out: Sequence[Collection[int]] = (),
) -> Ranking:
    """Rank documents by inner product, in bounded memory.

    :param queries: float32, queries × dimensions.
    :param documents: float32, documents × dimensions, or an iterable of such arrays (so that the corpus need not fit
        into memory).
    :param relevant: for each query, document number to grade.
    :param left_out: for each query, documents that are not retrieved for it; see `Ranking`.
    :raises DataError: a vector holds a value that is not finite, so it would be near nothing, whatever its text.
    """
    ranking = Ranking(relevant, depth, left_out)
    _check_finite("query", queries, 0)
    done = 0
    for chunk, filled in _chunks(documents):
        _check_finite("document", chunk[:filled], done)
        for start in range(0, len(queries), BLOCK):
            scores = queries[start : start + BLOCK] @ chunk.T
            ranking.add(scores[:, :filled], start, done)
        done += filled
    return ranking


def _check_finite(kind: str, vectors: Vectors, first: int) -> None:
    if len(wrong := not_finite(vectors)):
        numbers = ", ".join(str(first + row) for row in wrong[:5])
        raise DataError(
            f"{len(wrong)} {kind} vectors hold values that are not finite (numbers {numbers}); encode again"
        )


def _chunks(documents: Vectors | Iterable[Vectors]) -> Iterator[tuple[Vectors, int]]:
    """The documents in arrays of exactly `CHUNK` rows, and how many of these are documents. All products then have the
    same shape and take the same path through BLAS, so equal vectors get equal scores to the last bit."""
    chunk, filled = np.empty((0, 0), np.float32), 0
    for array in [documents] if isinstance(documents, np.ndarray) else documents:
        chunk = chunk if chunk.size else np.zeros((CHUNK, array.shape[1]), np.float32)
        taken = 0
        while taken < len(array):
            fits = min(CHUNK - filled, len(array) - taken)
            chunk[filled : filled + fits] = array[taken : taken + fits]
            taken, filled = taken + fits, filled + fits
            if filled == CHUNK:
                yield chunk, filled
                filled = 0
    if filled:
        yield chunk, filled


def evaluate_vectors(
    queries: Vectors,
    documents: Vectors | Iterable[Vectors],
    relevant: Grades,
    ks: Sequence[int] = KS,
    left_out: Sequence[Collection[int]] = (),
) -> dict[str, Values]:
    """Rank by inner product and measure: `rank_vectors`, then `measure`."""
    return measure(rank_vectors(queries, documents, relevant, max(*ks, MAP_CUT), left_out), ks)
