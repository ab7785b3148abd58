"""Two rankings of the same queries as one: by reciprocal ranks, or by a weighted sum of scaled scores.

Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning Methods", SIGIR
2009; Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval", TOIS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Floats, Ints
from ebr_lib.names import FusionKind

RRF_K = 60
APART = 1e-9  # between scores that would tie

Listed = tuple[Ints, NDArray[np.floating]]
"""Document numbers and scores of a ranker's lists, (queries, depth) each; -1 and -inf where a list ends."""


@dataclass(frozen=True)
class Candidates:
    """Documents that one ranker or both retrieved for each query.

    Fused scores that would be equal are in the order of the first ranker, then of the second.

    :ivar ids: document numbers (queries, places); -1 where there is none.
    :ivar first: the first ranker's scores, -inf for documents that it did not retrieve; `second` likewise.
    """

    ids: Ints
    first: Floats
    second: Floats

    @classmethod
    def of(cls, first: Listed, second: Listed) -> Candidates:
        """Join the lists of two rankers, whose depths may differ."""
        ids = np.hstack([first[0], second[0]])
        a = np.hstack([first[1], np.full(second[1].shape, -np.inf)]).astype(np.float64)
        b = np.hstack([np.full(first[1].shape, -np.inf), second[1]]).astype(np.float64)
        order = np.argsort(ids, axis=1, kind="stable")  # a document of both: the first ranker's place, then the other's
        ids = np.take_along_axis(ids, order, axis=1)
        a, b = np.take_along_axis(a, order, axis=1), np.take_along_axis(b, order, axis=1)
        twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        b[:, :-1][twice] = b[:, 1:][twice]
        ids[:, 1:][twice] = -1
        b[ids < 0] = -np.inf
        return cls(ids, a, b)

    def rrf(self, k: int = RRF_K) -> Floats:
        """Sum of 1 / (k + rank) over the rankers that retrieved a document; equal scores share their best rank."""
        return self._retrieved(_reciprocal(self.first, k) + _reciprocal(self.second, k))

    def convex(self, weight: float) -> Floats:
        """(1 - weight) · first + weight · second, scores scaled to 0 to 1 per query; 0 for what was not retrieved."""
        return self._retrieved((1 - weight) * scaled(self.first) + weight * scaled(self.second))

    def _retrieved(self, scores: Floats) -> Floats:
        return np.where(self.ids >= 0, untied(scores, self.first, self.second), -np.inf)


@dataclass(frozen=True)
class Fusion:
    """How a model's ranking and BM25's become one. `weight`: BM25's part of a weighted sum."""

    kind: FusionKind = "none"
    weight: float = 0.0

    def scores(self, candidates: Candidates) -> Floats:
        """The fused scores of both rankers' documents, the model being the first ranker."""
        return candidates.convex(self.weight) if self.kind == "weighted" else candidates.rrf()

    @property
    def how(self) -> dict[str, object]:
        """Its settings, for a report."""
        if self.kind == "weighted":
            return {"fusion": "weighted sum of scaled scores", "weight of BM25": self.weight}
        return {"fusion": "reciprocal ranks", "k": RRF_K}

    @property
    def said(self) -> str:
        """Its name for people."""
        names = {"none": "仅向量 vectors alone", "rrf": f"与 BM25 融合 fused: RRF, k = {RRF_K}"}
        return names.get(self.kind, f"与 BM25 融合 fused: weighted sum, {self.weight:g} of it BM25")


def reranked_scores(scores: Floats, found: Floats) -> Floats:
    """A ranking's scores after a reranker has scored its first documents: the others stay below, in their order, which
    also decides between equal scores.

    :param scores: of a list (documents,), best first; `found` the reranker's, of the first documents.
    """
    new = scores.astype(np.float64)
    if len(found):
        new[len(found) :] += found.min() - 1 - new[0]
        new[: len(found)] = found
    return untied(new[None], scores[None])[0]


def untied(scores: Floats, *others: Floats) -> Floats:
    """Scores (queries, places) without ties, so that measured and served order are the same: of equal ones the one with
    the better other score, by the first of `others` that differs, is the better by `APART`. All move by at most `APART`
    per place. Those that are equal in everything stay equal."""
    order = np.lexsort([-each for each in (*others[::-1], scores)], axis=1)
    listed = [np.take_along_axis(each, order, axis=1) for each in (scores, *others)]
    differs = np.any([each[:, 1:] != each[:, :-1] for each in listed], axis=0)
    steps = np.zeros(scores.shape)
    steps[:, 1:] = np.cumsum(differs, axis=1)
    apart = np.empty(scores.shape)
    np.put_along_axis(apart, order, listed[0] - APART * steps, axis=1)
    return apart


def scaled(scores: Floats) -> Floats:
    """Scores (queries, places) from 0 to 1 per query; 0 where there is none (-inf), 1 where all are equal."""
    found = scores > -np.inf
    high = scores.max(axis=1, keepdims=True, initial=-np.inf)
    low = np.where(found, scores, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    width = np.where(high > low, high - low, 1.0)
    alone = np.where(high > low, 0.0, 1.0)  # equal scores count as the best
    return np.where(found, (np.where(found, scores, 0) - np.where(found, low, 0)) / width + alone, 0.0)


def _reciprocal(scores: Floats, k: int) -> Floats:
    order = np.argsort(-scores, axis=1, kind="stable")
    listed = np.take_along_axis(scores, order, axis=1)
    places = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    new = np.ones(scores.shape, bool)
    new[:, 1:] = listed[:, 1:] != listed[:, :-1]
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, order, np.maximum.accumulate(np.where(new, places, 0), axis=1) + 1.0, axis=1)
    return np.where(scores > -np.inf, 1 / (k + ranks), 0.0)
