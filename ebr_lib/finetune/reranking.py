"""A reranker's look at rows and candidates: which candidates are answers, and its scores as a teacher's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Floats, Ints
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.model.reranker import Scores

Fine = Callable[[Sequence[tuple[int, int]]], NDArray[np.bool_]]
"""(row, candidate) pairs to whether the candidate may be a negative of the row, shape (pairs,)."""


def highest_allowed(rows: Sequence[TrainingRow], anchors: Ints, scores: Scores, margin: float) -> Floats:
    """For each row, the score that its negatives must stay below: the lowest of its anchor's positives, less `margin`.

    :param anchors: number of each row's anchor, shape (rows,).
    """
    own = scores([(row.anchor, row.positive) for row in rows])
    lowest = np.full(anchors.max() + 1, np.inf)
    np.minimum.at(lowest, anchors, own)
    return lowest[anchors] - margin


def accepted(preferred: Sequence[Ints], count: int, fine: Fine) -> list[Ints]:
    """For each row the first `count` of its candidates that are fine, in ascending order.

    Candidates are looked at in rounds, as many as a row still lacks: a reranker scores little more than is taken.

    :param preferred: each row's candidates, the preferred ones first.
    """
    taken: list[list[int]] = [[] for _ in preferred]
    seen = [0] * len(preferred)
    while True:
        asked = [
            (row, int(candidate))
            for row, candidates in enumerate(preferred)
            for candidate in candidates[seen[row] : seen[row] + count - len(taken[row])]
        ]
        if not asked:
            return [np.array(sorted(candidates), dtype=np.int64) for candidates in taken]
        for (row, candidate), is_fine in zip(asked, fine(asked), strict=True):
            seen[row] += 1
            if is_fine:
                taken[row].append(candidate)


def with_teacher_scores(rows: Sequence[TrainingRow], scores: Scores) -> list[TrainingRow]:
    """The rows with the scores of their positive and negatives, which replace those that they had."""
    texts = [(row.positive, *row.negatives) for row in rows]
    flat = scores([(row.anchor, text) for row, own in zip(rows, texts, strict=True) for text in own]).tolist()
    ends = np.cumsum([len(own) for own in texts])
    return [
        dataclasses.replace(row, scores=tuple(flat[end - len(own) : end]))
        for row, own, end in zip(rows, texts, ends, strict=True)
    ]
