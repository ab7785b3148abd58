"""Is one ranker better than another, query by query: interval, p-value, and the queries that changed most.

Paired tests as recommended by Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for
Information Retrieval Evaluation", CIKM 2007. One measure, chosen before, decides and needs no correction; the other
measures of a pair are corrected by Holm's method, those with equal values in every query once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ebr_lib.metrics import Values

SAME = 1e-12  # values of a query this close are equal
BLOCK_NUMBERS = 1 << 24  # samples × queries drawn at once, 8 bytes each: 128 MB


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
    def direction(self) -> str:
        """A significant difference is "up" or "down", another one is ""."""
        return "" if not self.significant else "up" if self.difference > 0 else "down"


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
    same = _repeats(names, before, after)
    corrected = p.copy()
    others = [i for i, name in enumerate(names) if i and name not in same]
    corrected[others] = holm_corrected(p[others])
    place = {name: i for i, name in enumerate(names)}
    return [
        Difference(
            baseline,
            contender,
            name,
            before=float(before[name].mean()),
            after=float(after[name].mean()),
            difference=float(deltas[:, i].mean()),
            low=float(low[i]),
            high=float(high[i]),
            p=float(p[i]),
            p_holm=float(corrected[place[same.get(name, name)]]),
            won=int((deltas[:, i] > SAME).sum()),
            lost=int((deltas[:, i] < -SAME).sum()),
            equal=int((np.abs(deltas[:, i]) <= SAME).sum()),
            same_as=same.get(name),
        )
        for i, name in enumerate(names)
    ]


def _repeats(names: Sequence[str], before: Mapping[str, Values], after: Mapping[str, Values]) -> dict[str, str]:
    """Measures with the values of an earlier one, for both rankers and in every query; and which one."""
    first: dict[bytes, str] = {}
    found = {}
    for name in names:
        key = np.stack([before[name], after[name]]).round(9).tobytes()
        if (earlier := first.setdefault(key, name)) != name:
            found[name] = earlier
    return found


def _blocks(resamples: int, queries: int) -> Sequence[int]:
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
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def changed_most(before: Values, after: Values, most: int) -> tuple[list[int], list[int]]:
    """The queries won and lost by most, the largest change first; unchanged ones are in neither list."""
    delta = after - before
    order = np.argsort(-delta, kind="stable")
    won = [int(i) for i in order[:most] if delta[i] > 0]
    lost = [int(i) for i in order[::-1][:most] if delta[i] < 0]
    return won, lost
