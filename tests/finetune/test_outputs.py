"""What a run returns says in one sentence what changed, and what speaks against it."""

from __future__ import annotations

from typing import Any

import pytest

from ebr_lib.finetune.outputs import FinetuneResult, before_after


def result_of(before: dict[str, Any], after: dict[str, Any], **more: Any) -> FinetuneResult:
    given = {
        "model_path": "m", "merged_path": None, "train_rows": 640, "heldout_rows": 60, "trainable_parameters": 1,
        "steps": 3, "seconds": 1.0, "temperature": 0.05, "adapter_strength": 1.0, "verdict": "", "doctor": None,
        "tables": {"before_after": before_after(before, after)},
    }  # fmt: skip
    return FinetuneResult(**given | {"before": before, "after": after} | more)


def group(ndcg: float, queries: int = 60) -> dict[str, float]:
    return {"queries": queries, "recall@1": 0.1, "recall@10": 0.2, "mrr@10": 0.3, "ndcg@10": ndcg}


def test_the_sentence_has_the_change_overall_and_on_unseen_documents():
    result = result_of({"all": group(0.4), "unseen": group(0.3)}, {"all": group(0.5), "unseen": group(0.31)})
    assert (
        "60 个验证查询" in result.sentence and "0.400 → 0.500" in result.sentence and "0.300 → 0.310" in result.sentence
    )
    assert result.notes == []
    shown = result._repr_html_()
    assert "0.400 → 0.500" in shown and "<details>" in shown


@pytest.mark.parametrize(
    ("before", "after", "more", "said"),
    [
        (
            {"all": group(0.4), "unseen": group(0.3)},
            {"all": group(0.5), "unseen": group(0.2)},
            {},
            "not seen ndcg@10 fell",
        ),
        ({"all": group(0.4, 49)}, {"all": group(0.5, 49)}, {}, "fewer than 50"),
        ({"all": group(0.4)}, {"all": group(0.4)}, {"verdict": "no <better>"}, "no <better>"),
    ],
)
def test_what_speaks_against_the_model_is_said(before, after, more, said):
    result = result_of(before, after, **more)
    (note,) = result.notes
    assert said in note and said.replace("<", "&lt;").replace(">", "&gt;") in result._repr_html_()


def test_without_held_out_rows_the_sentence_says_so():
    for measured in ({}, {"guard": group(0.4)}):
        result = result_of(measured, measured)
        assert "no rows were held out" in result.sentence and result.notes == [] and result._repr_html_()
