"""A reranker's look at candidates, worked by hand."""

from __future__ import annotations

import numpy as np

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.finetune.pool import remembered
from ebr_lib.finetune.reranking import accepted, highest_allowed

SCORES = {("tent", "big tent"): 4.0, ("tent", "kite"): 1.0, ("lamp", "bulb"): -2.0, ("tent", "rope"): -3.0}


def by_hand(pairs):
    return np.array([SCORES[pair] for pair in pairs])


def test_each_pair_is_scored_once():
    asked = []
    scores = remembered(lambda pairs: asked.append(list(pairs)) or by_hand(pairs))
    assert scores([("tent", "kite"), ("tent", "big tent"), ("tent", "kite")]).tolist() == [1, 4, 1]
    assert scores([("tent", "kite"), ("lamp", "bulb")]).tolist() == [1, -2]
    assert scores([("tent", "kite")]).tolist() == [1]
    assert asked == [[("tent", "kite"), ("tent", "big tent")], [("lamp", "bulb")]]


def test_negatives_stay_below_the_lowest_positive_of_their_anchor():
    rows = [TrainingRow("tent", "big tent"), TrainingRow("lamp", "bulb"), TrainingRow("tent", "kite")]
    assert highest_allowed(rows, np.array([7, 2, 7]), by_hand, 0.5).tolist() == [0.5, -2.5, 0.5]


def test_candidates_are_looked_at_in_order_and_no_more_than_needed():
    looked_at = []

    def even(asked):
        looked_at.append(list(asked))
        return np.array([candidate % 2 == 0 for _, candidate in asked])

    preferred = [np.array([8, 3, 6, 4, 2]), np.array([1, 5]), np.array([], dtype=np.int64)]
    taken = accepted(preferred, 2, even)
    assert [places.tolist() for places in taken] == [[6, 8], [], []]
    assert looked_at == [[(0, 8), (0, 3), (1, 1), (1, 5)], [(0, 6)]]
