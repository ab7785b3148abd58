"""Intervals, p-values, wins and losses, and the verdict: its sentence, and what speaks against it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from ebr_lib.evaluate.compare import Change, Difference, changed_most, compare, holm_corrected, verdict_on


def test_interval_and_p_by_hand():
    rng = np.random.default_rng(0)
    delta = rng.normal(0.1, 0.3, 400)
    none, shifted = {"m": np.zeros(400), "n": np.zeros(400)}, {"m": delta, "n": rng.permutation([-0.5, 0.5] * 200)}
    m, n = compare("a", "b", none, shifted, primary="m", resamples=2000, seed=1)
    half = 1.96 * delta.std() / 20
    assert (m.low, m.high) == pytest.approx((delta.mean() - half, delta.mean() + half), abs=0.004)
    assert m.p == pytest.approx(1 / 2001) and n.p > 0.5
    assert compare("a", "b", none, shifted, primary="m", resamples=2000, seed=1) == [m, n]
    assert compare("a", "b", none, shifted, primary="m", resamples=2000, seed=2) != [m, n]
    same = compare("a", "b", shifted, shifted, primary="m", resamples=200, seed=1)[0]
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_permutation_is_exact_in_the_limit():
    # 3 wins of equal size: 2 of 8 sign patterns are as large
    d = compare("a", "b", {"m": np.zeros(3)}, {"m": np.ones(3)}, primary="m", resamples=20000, seed=0)[0]
    assert d.p == pytest.approx(0.25, abs=0.01)


def test_the_measure_that_decides_is_not_corrected_and_repeated_measures_do_not_count():
    rng = np.random.default_rng(0)
    deltas = {name: rng.normal(0.03, 0.2, 200) for name in ("a", "b", "c")}
    after = deltas | {"a again": deltas["a"]}
    d = {
        d.metric: d
        for d in compare("x", "y", {n: np.zeros(200) for n in after}, after, primary="c", resamples=500, seed=1)
    }
    assert list(d) == ["c", "a", "b", "a again"]  # the one that decides comes first
    assert d["c"].p_holm == d["c"].p
    assert [d["a"].p_holm, d["b"].p_holm] == holm_corrected(np.array([d["a"].p, d["b"].p])).tolist()
    assert d["a again"].same_as == "a" and d["a again"].p_holm == d["a"].p_holm
    counted = deltas["a"] > 0
    assert (d["a"].won, d["a"].lost, d["a"].equal) == (counted.sum(), (~counted).sum(), 0)


def test_holm():
    np.testing.assert_allclose(holm_corrected(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_changed_most():
    assert changed_most(np.array([0, 1, 0.5, 0.2]), np.array([1, 0, 0.5, 0.3]), 5) == ([0, 3], [1])


# --- the verdict --------------------------------------------------------------------------------------------------

BETTER = Difference(
    "base", "tuned", "ndcg@10", before=0.47, after=0.558, difference=0.088, low=0.049, high=0.13, p=0.001, p_holm=0.001,
    won=41, lost=12, equal=63,
)  # fmt: skip


def test_the_sentence_has_values_interval_counts_and_unseen_documents():
    verdict = verdict_on(BETTER, Change(0.037, -0.01, 0.08), {"ndcg@10": 0.1})
    assert verdict.outcome == "better" and not verdict.notes
    assert verdict.sentence == (
        "更好 better: nDCG@10 0.470 → 0.558, +0.088 [+0.049, +0.130]; 41 胜 won, 12 负 lost, 63 平 equal; "
        "训练未见的文档 on unseen documents +0.037 [-0.010, +0.080]"
    )


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"p_holm": 0.06}, "unclear"),
        ({"low": -0.001}, "unclear"),
        ({"difference": -0.088, "low": -0.13, "high": -0.049}, "worse"),
    ],
)
def test_chance_is_not_called_better(change, outcome):
    assert verdict_on(replace(BETTER, **change), None, None).outcome == outcome


@pytest.mark.parametrize(
    ("change", "unseen", "bm25", "said"),
    [
        ({}, None, {"ndcg@10": 0.6}, r"below BM25 \(0\.558 against 0\.600\)"),
        ({"won": 20, "equal": 17}, None, None, "only 49 queries"),
        ({}, Change(-0.022, -0.05, 0.01), None, "fell by 0.022, which may be chance"),
        ({}, Change(-0.022, -0.03, -0.01), None, "fell by 0.022: it may"),
        ({}, Change(-0.022, None, None), None, "fell by 0.022, which may be chance"),
    ],
)
def test_each_reason_to_doubt_is_one_note(change, unseen, bm25, said):
    (note,) = verdict_on(replace(BETTER, **change), unseen, bm25).notes
    assert re.search(said, note)
