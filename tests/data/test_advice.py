"""The advice of an evaluation: written, read, and followed for the model that it measured alone."""

from __future__ import annotations

import json

import pytest

from ebr_lib.data.advice import Advice, Reranking, read_advice
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import DataError


def report(folder, **advice) -> str:
    entries = {name: found.as_json(f"sha of {name}") for name, found in advice.items()}
    (folder / "report.json").write_text(json.dumps({"recommended": entries}))
    return str(folder)


def test_advice_is_that_of_the_model_with_these_weights(tmp_path):
    base = Advice(Fusion("rrf"), None, "r")
    tuned = Advice(Fusion("weighted", 0.3), Reranking("a/reranker", 20), "w")
    folder = report(tmp_path, base=base, tuned=tuned)
    assert read_advice(folder, "sha of tuned") == tuned
    assert read_advice(folder, "sha of base") == base
    assert tuned.sentence == "与 BM25 融合 fused: weighted sum, 0.3 of it BM25, 重排 re-ranked by a/reranker (w)"


def test_without_advice_on_the_model_ranks_are_fused_and_the_reason_is_said(tmp_path):
    assert "no evaluation in" in read_advice(str(tmp_path), "s").why
    folder = report(tmp_path, base=Advice(Fusion("weighted", 0.3), None, "w"))
    other = read_advice(folder, "s")
    assert other.fusion == Fusion("rrf") and "measured base, not this model" in other.why
    assert read_advice(folder, None) == other
    folder = report(tmp_path, base=Advice(None, Reranking("a/reranker", 20), "w"))
    reranked = read_advice(folder, "sha of base")
    assert reranked.fusion == Fusion("rrf") and reranked.reranking and "measured no fusion; w" in reranked.why
    (tmp_path / "report.json").write_text("{}")  # of an earlier version
    assert "measured nothing after a model" in read_advice(folder, "sha of base").why


@pytest.mark.parametrize("text", ["", "[]", '{"recommended": {"m": {"fusion": {"kind": 1, "no": 2}}}}'])
def test_a_damaged_report_is_named(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=r"report\.json is not a report of evaluate"):
        read_advice(str(tmp_path), "s")
