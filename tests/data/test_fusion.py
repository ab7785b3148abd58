"""Fusing two rankings, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ebr_lib.data.fusion import Candidates, reranked_scores, untied

NONE = -np.inf
# two queries: documents 7 and 5 are retrieved by both rankers; the second ranker finds nothing for the other query
FIRST = (np.array([[7, 5, 2], [1, 4, -1]]), np.array([[0.9, 0.6, 0.5], [0.8, 0.8, NONE]], np.float32))
SECOND = (np.array([[5, 9, 7, 3], [-1] * 4]), np.array([[8.0, 8.0, 5.0, 4.0], [NONE] * 4], np.float32))


def fused(scores) -> list[dict[int, float]]:
    candidates = Candidates.of(FIRST, SECOND)
    return [
        {int(d): s for d, s in zip(ids, row, strict=True) if d >= 0}
        for ids, row in zip(candidates.ids, scores(candidates), strict=True)
    ]


def test_reciprocal_ranks_by_hand():
    one, other = fused(lambda c: c.rrf(60))
    # 5 and 9 share the second ranker's first place, so 7 is third there
    wanted = {7: 1 / 61 + 1 / 63, 5: 1 / 62 + 1 / 61, 2: 1 / 63, 9: 1 / 61, 3: 1 / 64}
    assert one == pytest.approx(wanted)
    assert other == pytest.approx({1: 1 / 61, 4: 1 / 61})


def test_weighted_sum_by_hand():
    one, other = fused(lambda c: c.convex(0.25))
    # scaled: 7 → 1, 5 → .25, 2 → 0; second: 5 and 9 → 1, 7 → .25, 3 → 0
    wanted = {7: 0.75 + 0.25 * 0.25, 5: 0.75 * 0.25 + 0.25, 2: 0, 9: 0.25, 3: 0}
    assert one == pytest.approx(wanted, abs=1e-6)
    assert other == pytest.approx({1: 0.75, 4: 0.75})  # equal scores of the only ranker that found any


def test_weight_0_keeps_the_first_ranker_s_order_and_1_the_second_s():
    best = [max(row, key=row.get) for row in (fused(lambda c: c.convex(0.0))[0], fused(lambda c: c.convex(1.0))[0])]
    assert best == [7, 5]


def order_of(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=scores.get, reverse=True)


def test_equal_sums_are_ordered_by_the_first_ranker_and_then_by_the_second():
    words = fused(lambda c: c.convex(1.0))[0]
    assert order_of(words) == [5, 9, 7, 2, 3]  # 5 and 9 → 1; 2 and 3 → 0, and only the first ranker has 2
    ranks, other = fused(lambda c: c.rrf(60))
    assert order_of(ranks) == [5, 7, 9, 2, 3]
    assert other[1] == other[4]  # equal for both rankers: evaluation takes the mean of both orders


def test_scores_keep_their_order_however_close_they_are():
    close, lists = np.nextafter(0.5, 1), np.array([[0.5, 0.5, 0.5, 0.0]])
    lists[0, 2] = close
    found = untied(lists, np.array([[1.0, 2.0, 0.0, 9.0]]))
    assert np.argsort(-found[0]).tolist() == [2, 1, 0, 3]
    np.testing.assert_allclose(found, lists, atol=1e-8)


def test_documents_that_a_reranker_scores_the_same_stay_in_their_order():
    found = reranked_scores(np.array([0.9, 0.5, 0.4, 0.3]), np.array([2.0, 2.0, 3.0]))
    assert np.argsort(-found).tolist() == [2, 0, 1, 3]
