"""Fusion chooses its weight on other queries; a reranker reorders the best documents only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ebr_lib.data.advice import Reranking
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import ModelError
from ebr_lib.evaluate.compare import Difference
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.evaluate.steps import WEIGHTS, StepResult, advice_on, cross_fitted, fused, reranked
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.metrics import Ranking, measure
from ebr_lib.model.provenance import identify
from tests.models import build_tiny_reranker


def ranking_of(scores, relevant) -> Ranking:
    ranking = Ranking(relevant)
    ranking.add(np.array(scores, dtype=np.float32), 0, 0)
    return ranking


def test_a_query_never_uses_a_weight_that_it_chose():
    """Each query is best served by its own choice; with one query per half it gets the other's."""
    chosen, overall = cross_fitted(np.array([[1.0, 0.0], [0.0, 0.9]]), seed=0)
    assert chosen.tolist() == [1, 0]
    assert overall == 0


def test_fusion_finds_the_weight_of_the_ranker_that_is_right():
    rng = np.random.default_rng(0)
    relevant = [{int(d): 1} for d in rng.integers(0, 30, 40)]
    right = np.array([[2.0 if d in grades else rng.random() for d in range(30)] for grades in relevant])
    model, bm25 = ranking_of(rng.random((40, 30)), relevant), ranking_of(right, relevant)
    settings = {"bm25_milliseconds": 1.0, "metric": "mrr@10", "ks": (1,), "seed": 0}
    rrf, weighted = fused("m", model, bm25, **settings)
    assert measure(weighted.ranking, (1,))["mrr@10"].mean() == 1.0
    assert weighted.adds.weight > 0.5
    assert 0 < measure(rrf.ranking, (1,))["mrr@10"].mean() < 1.0
    _, other = fused("m", bm25, model, **settings)  # the model is right: nothing of BM25
    assert other.adds.weight == WEIGHTS[0] == 0
    np.testing.assert_array_equal(other.ranking.ids[:, 0], bm25.ids[:, 0])


def test_documents_of_equal_sums_are_measured_in_the_order_in_which_they_are_served():
    """Each is first for one ranker and second for the other: the model decides, and no mean of both orders is taken."""
    relevant = [{1: 1}]
    settings = {"bm25_milliseconds": 1.0, "metric": "mrr@10", "ks": (1,), "seed": 0}
    rrf, _ = fused("m", ranking_of([[0.9, 0.8]], relevant), ranking_of([[1.0, 2.0]], relevant), **settings)
    assert rrf.ranking.ids[0, :2].tolist() == [0, 1]
    assert measure(rrf.ranking, (1,))["mrr@10"].tolist() == [0.5]


def test_a_reranker_reorders_the_best_documents_and_the_rest_follow():
    relevant = [{3: 1}]
    first = ranking_of([[0.9, 0.8, 0.7, 0.6, 0.5]], relevant)
    task = RetrievalTask(["q"], ["q"], {}, Corpus(list("abcde"), list("abcde"), {}, {}), relevant, 0)
    asked = []

    def by_letter(pairs):
        asked.extend(pairs)
        return np.array([float(ord(document)) for _, document in pairs])

    step = reranked("m", "letters", first, task, by_letter, depth=3)
    assert asked == [("q", "a"), ("q", "b"), ("q", "c")]
    assert step.ranking.ids[0, :6].tolist() == [2, 1, 0, 3, 4, -1]
    assert step.adds == Reranking("letters", 3)


def result_of(adds, after: float, p: float) -> StepResult:
    low = after - 0.51 if p < 0.05 else -0.1
    return StepResult(
        "s", "m", adds, Difference("m", "s", "ndcg@10", 0.5, after, after - 0.5, low, 1, p, p, 1, 1, 1), 2
    )


def test_the_best_step_of_each_kind_that_is_clearly_better_is_recommended():
    rrf, weighted, reranking = Fusion("rrf"), Fusion("weighted", 0.2), Reranking("r", 50)
    sure = advice_on([result_of(rrf, 0.6, 0.01), result_of(weighted, 0.62, 0.01), result_of(reranking, 0.7, 0.2)])
    assert (sure.fusion, sure.reranking) == (weighted, None) and "0.500 → 0.620" in sure.why and "0.600" not in sure.why
    unsure = advice_on([result_of(rrf, 0.6, 0.06), result_of(weighted, 0.4, 0.01), result_of(reranking, 0.7, 0.01)])
    assert (unsure.fusion, unsure.reranking) == (Fusion("none"), reranking)
    unmeasured = advice_on([result_of(reranking, 0.5, 0.9)])
    assert (unmeasured.fusion, unmeasured.reranking) == (None, None)


def test_a_reranker_is_measured_beside_its_model(beir, tiny_bert, tmp_path):
    knobs = {"models": [str(tiny_bert)], "data_path": str(beir), "bm25": False, "resamples": 100, "backend": "torch"}
    reranker = build_tiny_reranker(tmp_path / "tiny-reranker")
    result = evaluate_retrieval(knobs | {"output_dir": str(tmp_path / "out"), "reranker_name": str(reranker)})
    assert list(result.metrics) == ["tiny-bert", "tiny-bert, re-ranked"]
    alone = evaluate_retrieval(
        knobs | {"output_dir": str(tmp_path / "one"), "reranker_name": str(reranker), "rerank_depth": 1}
    )
    assert alone.metrics["tiny-bert, re-ranked"] == alone.metrics["tiny-bert"]  # one document has one order
    table = result.tables["steps"].iloc[0]
    assert table["before"] == result.metrics["tiny-bert"]["ndcg@10"]
    assert table["after"] == result.metrics["tiny-bert, re-ranked"]["ndcg@10"]
    assert "Fused and re-ranked" in result.report_html.read_text()
    assert json.loads(result.report_json.read_text())["steps"][0]["milliseconds"] > 0
    recommended = json.loads(result.report_json.read_text())["recommended"]["tiny-bert"]
    assert recommended["sha256"] == identify(str(tiny_bert)).sha256 and recommended["fusion"] is None
    assert "recommended: " in result.report_html.read_text()
    with pytest.raises(ModelError, match="not a cross-encoder"):
        evaluate_retrieval(knobs | {"output_dir": str(tmp_path / "no"), "reranker_name": str(tiny_bert)})
