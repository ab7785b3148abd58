"""The verdict: its sentence, and what speaks against it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ebr_lib.evaluate.compare import Difference
from ebr_lib.evaluate.verdict import Change, verdict_on

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
