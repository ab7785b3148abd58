"""Is one ranker better than another, query by query: interval, p-value, verdict, and the queries that changed most.

Paired tests as recommended by Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for
Information Retrieval Evaluation", CIKM 2007. One measure, chosen before, decides and needs no correction; the other
measures of a pair are corrected by Holm's method, those with equal values in every query once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ebr_lib.metrics import Values

SAME = 1e-12  # values of a query this close are equal
BLOCK_NUMBERS = 1 << 24  # samples × queries drawn at once, 8 bytes each: 128 MB
Outcome = Literal["better", "worse", "unclear"]
FEW_QUERIES = 50  # fewer give intervals too wide to decide by
WORDS = {"better": "更好 better", "worse": "更差 worse", "unclear": "没有明确差别 no clear difference"}
SHOWN = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}


def shown_metric(name: str) -> str:
    """A measure as people write it: nDCG@10."""
    kind, at, k = name.partition("@")
    return f"{SHOWN.get(kind, kind)}{at}{k}"


@dataclass(frozen=True)
class Change:
    """Mean of a contender minus its baseline's over some queries, with its 95 % interval, None for few queries."""

    difference: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.difference:+.3f}{ends}"


@dataclass(frozen=True)
class Difference:
    """Mean of `contender` minus mean of `baseline` on one measure, with its 95 % bootstrap interval (percentiles).

    `p` is the two-sided p-value of the paired permutation test. `p_holm` is the same corrected over the pair's distinct
    measures, and `p` itself for the measure that decides. `won`, `lost` and `equal` count queries. `same_as` is an
    earlier measure of the pair with the same values in every query, as hit@k and recall@k of single answers have.
    """

    baseline: str
    contender: str
    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    won: int
    lost: int
    equal: int
    same_as: str | None = None

    @property
    def significant(self) -> bool:
        """Significant at 5 % after Holm's correction, with an interval that leaves 0 out."""
        return self.p_holm < 0.05 and self.low * self.high > 0

    @property
    def outcome(self) -> Outcome:
        """What a significant difference means for the contender."""
        return "unclear" if not self.significant else "better" if self.difference > 0 else "worse"

    @property
    def change(self) -> Change:
        """The difference and its interval."""
        return Change(self.difference, self.low, self.high)

    @property
    def sentence(self) -> str:
        """The outcome, both means and their difference."""
        means = f"{shown_metric(self.metric)} {self.before:.3f} → {self.after:.3f}"
        return f"{WORDS[self.outcome]}: {means}, {self.change}"


def compare(
    baseline: str,
    contender: str,
    before: Mapping[str, Values],
    after: Mapping[str, Values],
    *,
    primary: str,
    resamples: int,
    seed: int,
) -> list[Difference]:
    """Compare two rankers on every measure, the one that decides first: one value per query, in the same order.

    :param primary: the measure that decides.
    """
    names = [primary, *(name for name in before if name != primary)]
    deltas = np.stack([after[name] - before[name] for name in names], axis=1)
    low, high = bootstrap(deltas, resamples, np.random.default_rng([seed, 0]))
    p = _permutation(deltas, resamples, np.random.default_rng([seed, 1]))
    values = [np.stack([before[name], after[name]]).round(9).tobytes() for name in names]
    first = [values.index(found) for found in values]  # the first measure with the same values
    corrected = p.copy()
    others = [i for i, same in enumerate(first) if same == i > 0]
    corrected[others] = holm_corrected(p[others])
    return [
        Difference(
            baseline,
            contender,
            name,
            before=float(before[name].mean()),
            after=float(after[name].mean()),
            difference=float(delta.mean()),
            low=float(low[i]),
            high=float(high[i]),
            p=float(p[i]),
            p_holm=float(corrected[first[i]]),
            won=int((delta > SAME).sum()),
            lost=int((delta < -SAME).sum()),
            equal=int((np.abs(delta) <= SAME).sum()),
            same_as=names[first[i]] if first[i] < i else None,
        )
        for i, (name, delta) in enumerate(zip(names, deltas.T, strict=True))
    ]


def _blocks(resamples: int, queries: int) -> list[int]:
    size = max(1, min(resamples, BLOCK_NUMBERS // queries))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def bootstrap(deltas: Values, resamples: int, rng: np.random.Generator) -> tuple[Values, Values]:
    """The 2.5th and 97.5th percentile of the mean over queries drawn with replacement."""
    queries = len(deltas)
    even = np.full(queries, 1 / queries)
    means = [rng.multinomial(queries, even, size=size) @ deltas / queries for size in _blocks(resamples, queries)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return low, high


def _permutation(deltas: Values, resamples: int, rng: np.random.Generator) -> Values:
    """Share of random sign flips whose mean difference is at least as large, the observed one included."""
    observed = np.abs(deltas.sum(axis=0))
    as_large = np.ones(deltas.shape[1])
    for size in _blocks(resamples, len(deltas)):
        signs = rng.integers(0, 2, size=(size, len(deltas)), dtype=np.int8) * 2.0 - 1.0
        as_large += (np.abs(signs @ deltas) >= observed - 1e-9).sum(axis=0)
    return as_large / (resamples + 1)


def holm_corrected(p: Values) -> Values:
    """Holm's step-down correction: the i-th smallest of m times (m - i), never below the one before it."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


def changed_most(before: Values, after: Values, most: int) -> tuple[list[int], list[int]]:
    """The queries won and lost by most, the largest change first; unchanged ones are in neither list."""
    delta = after - before
    order = np.argsort(-delta, kind="stable")
    won, lost = order[:most], order[::-1][:most]
    return won[delta[won] > 0].tolist(), lost[delta[lost] < 0].tolist()


# --- the verdict --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`sentence` is the result in one line, each of `notes` a reason to doubt it or to do something."""

    outcome: Outcome
    sentence: str
    notes: Sequence[str]


def verdict_on(d: Difference, unseen: Change | None, bm25: Mapping[str, float] | None) -> Verdict:
    """The verdict on one pair.

    :param d: its difference on the measure that decides.
    :param unseen: the change over queries whose documents training has not seen, if that is known.
    :param bm25: BM25's means, if it was measured.
    """
    sentence = f"{d.sentence}; {d.won} 胜 won, {d.lost} 负 lost, {d.equal} 平 equal"
    if unseen:
        sentence += f"; 训练未见的文档 on unseen documents {unseen}"
    return Verdict(d.outcome, sentence, list(_notes(d, unseen, bm25)))


def _notes(d: Difference, unseen: Change | None, bm25: Mapping[str, float] | None) -> Iterator[str]:
    queries = d.won + d.lost + d.equal
    if bm25 and d.after < bm25[d.metric]:
        yield (
            f"低于 BM25：模型可能不适合这些文本 below BM25 ({d.after:.3f} against {bm25[d.metric]:.3f}): keyword "
            "search beats this model here; check that it reads the language of your texts, or train on more pairs"
        )
    if unseen and unseen.difference < 0:
        chance = ", which may be chance" if unseen.high is None or unseen.high > 0 else ""
        yield (
            f"训练未见的文档变差 on documents that training has not seen it fell by {-unseen.difference:.3f}{chance}: "
            "it may have learned these documents, not the task; train on more different documents, or for fewer epochs"
        )
    if queries < FEW_QUERIES:
        yield (
            f"查询太少 only {queries} queries: with fewer than {FEW_QUERIES} the interval is too wide to decide by; "
            "judge or hold out more"
        )
