"""Measures: by hand, by brute force over all orders of ties, and against trec_eval."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib.errors import DataError
from ebr_lib.metrics import Ranking, evaluate_vectors, measure, rank_vectors, unit

KS = (1, 2, 3, 5)


def ranked(scores, relevant, depth=100, chunk=None):
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float32))
    ranking = Ranking(relevant, depth)
    for start in range(0, scores.shape[1], chunk or scores.shape[1]):
        ranking.add(scores[:, start : start + (chunk or scores.shape[1])], 0, start)
    return ranking


def one(scores, relevant, **kw):
    return {name: float(value[0]) for name, value in measure(ranked(scores, [relevant], **kw), KS).items()}


def test_measures_by_hand():
    # ranks: d2 (grade 2), d0, d3 (grade 1), d1
    got = one([0.8, 0.1, 0.9, 0.5], {2: 2, 3: 1})
    assert got["recall@1"] == 0.5 and got["recall@2"] == 0.5 and got["recall@3"] == 1
    assert got["hit@1"] == 1 and got["mrr@10"] == 1
    assert got["ndcg@10"] == pytest.approx((2 + 1 / 2) / (2 + 1 / math.log2(3)))
    assert got["map@100"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_relevant_document_beyond_the_list_counts_as_missed():
    assert one([3, 2, 1], {2: 1, 0: 0})["mrr@10"] == pytest.approx(1 / 3)
    deep = one(list(range(200, 0, -1)), {150: 1})
    assert set(deep.values()) == {0.0}


def test_query_without_relevant_document_is_nan_and_unretrieved_is_zero():
    assert all(math.isnan(v) for v in one([1, 2], {0: 0}).values())
    assert set(one([1, -np.inf], {1: 1}).values()) == {0.0}


def _plain(order, relevant):
    """The measures of one order of documents, from their textbook definitions."""
    hits = [relevant.get(d, 0) for d in order]
    found = [i for i, g in enumerate(hits) if g > 0]
    ideal = sorted((g for g in relevant.values() if g > 0), reverse=True)
    dcg = sum(g / math.log2(i + 2) for i, g in enumerate(hits[:10]))
    out = {
        "mrr@10": 1 / (found[0] + 1) if found and found[0] < 10 else 0.0,
        "ndcg@10": dcg / sum(g / math.log2(i + 2) for i, g in enumerate(ideal[:10])),
        "map@100": sum((j + 1) / (i + 1) for j, i in enumerate(found)) / len(ideal),
    }
    for k in KS:
        out[f"recall@{k}"] = sum(i < k for i in found) / len(ideal)
        out[f"hit@{k}"] = float(any(i < k for i in found))
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=2, max_size=6),
    st.dictionaries(st.integers(0, 1), st.integers(1, 3), min_size=1),
    st.integers(1, 6),
)
def test_ties_give_the_mean_over_all_orders(scores, relevant, chunk):
    orders = [
        p
        for p in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(p))
    ]
    all_of_them = [_plain(order, relevant) for order in orders]
    wanted = {name: np.mean([values[name] for values in all_of_them]) for name in all_of_them[0]}
    assert one(scores, relevant, chunk=chunk) == pytest.approx(wanted)


def test_ties_across_the_end_of_the_list():
    # 3 better ones, then 500 alike of which 2 are relevant: places 4 to 100 of them count
    scores = np.r_[np.full(500, 0.5), 0.9, 0.8, 0.7]
    for chunk in (64, 503):
        got = measure(ranked(scores, [{7: 1, 499: 1}], chunk=chunk), (10, 100))
        assert got["recall@100"][0] == pytest.approx(97 / 500)
        assert got["hit@10"][0] == pytest.approx(1 - math.comb(493, 2) / math.comb(500, 2))


@pytest.mark.parametrize("chunk", [1, 60, 103])
def test_last_place_shared_by_four_ties_counts_a_quarter(chunk):
    scores = np.r_[np.arange(99) + 2, 1, 1, 1, 1]  # the last of a hundred places is one of four documents
    got = measure(ranked(scores, [{100: 1}], chunk=chunk), (100,))
    assert got["recall@100"][0] == pytest.approx(1 / 4)
    assert got["map@100"][0] == pytest.approx(1 / 4 / 100)


@pytest.mark.parametrize("documents", [130, 1000, 8200])
def test_constant_scorer_gets_what_chance_gives(documents):
    vector = np.random.default_rng(0).normal(size=48).astype(np.float32)
    queries, corpus = np.tile(vector, (3, 1)), np.tile(vector, (documents, 1))
    got = evaluate_vectors(queries, corpus, [{0: 1}, {documents - 1: 1}, {documents // 2: 1}])
    for k in (1, 10, 100):
        np.testing.assert_allclose(got[f"recall@{k}"], k / documents)
    np.testing.assert_allclose(got["mrr@10"], sum(1 / i for i in range(1, 11)) / documents)


@pytest.mark.parametrize("queries", [2, 3, 7])
@pytest.mark.parametrize("parts", [1, 3])
def test_equal_vectors_get_equal_scores_from_any_query(queries, parts):
    """Whatever number of queries and documents is left for the last product: BLAS takes other paths for small ones."""
    rng = np.random.default_rng(queries)
    for documents in (70, 8193, 8200):
        asked = rng.normal(size=(queries, 768)).astype(np.float32)
        corpus = np.tile(rng.normal(size=768).astype(np.float32), (documents, 1))
        got = evaluate_vectors(asked, np.array_split(corpus, parts), [{i: 1} for i in range(queries)])
        np.testing.assert_allclose(got["recall@10"], 10 / documents)


def test_chunks_and_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    queries, corpus = rng.normal(size=(7, 8)).astype(np.float32), rng.normal(size=(900, 8)).astype(np.float32)
    corpus = np.round(corpus)  # ties
    relevant = [{int(d): int(rng.integers(1, 4)) for d in rng.choice(900, 5)} for _ in queries]
    whole = rank_vectors(np.round(queries), corpus, relevant)
    parts = rank_vectors(np.round(queries), np.array_split(corpus, 13), relevant)
    monkeypatch.setattr("ebr_lib.metrics.BLOCK", 3)
    blocks = rank_vectors(np.round(queries), corpus, relevant)
    for other in (parts, blocks):
        np.testing.assert_array_equal(whole.scores, other.scores)
        for name, value in measure(whole).items():
            np.testing.assert_allclose(measure(other)[name], value, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 150, 400])
def test_list_equals_a_full_sort(chunk):
    rng = np.random.default_rng(4)
    scores = np.stack([rng.permutation(400) for _ in range(9)])
    got = ranked(scores, [{}] * 9, depth=20, chunk=chunk)
    np.testing.assert_array_equal(got.ids, np.argsort(-scores, axis=1)[:, :20])
    np.testing.assert_array_equal(got.scores, -np.sort(-scores, axis=1)[:, :20])


def test_of_equal_scores_the_first_documents_are_listed():
    scores = np.r_[np.zeros(300), 1, 1, 1, np.zeros(200)]
    for chunk in (7, 64, 503):
        got = ranked(scores, [{}], depth=10, chunk=chunk)
        np.testing.assert_array_equal(got.ids[0], [300, 301, 302, *range(7)], err_msg=str(chunk))


def test_a_list_longer_than_what_was_retrieved_ends_in_minus_one():
    got = ranked([[0.5, -np.inf, 0.7], [-np.inf] * 3], [{}, {}], depth=5)
    np.testing.assert_array_equal(got.ids, [[2, 0, -1, -1, -1], [-1] * 5])
    assert np.isneginf(got.scores[0, 2:]).all() and np.isneginf(got.scores[1]).all()


def test_a_relevant_document_that_was_never_scored_counts_as_missed():
    assert set(one([3, 2, 1], {7: 1}).values()) == {0.0}


def test_default_measures():
    ks = (1, 5, 10, 50, 100)
    wanted = [*(f"recall@{k}" for k in ks), *(f"hit@{k}" for k in ks), "mrr@10", "ndcg@10", "map@100"]
    assert list(measure(ranked(np.arange(3.0), [{0: 1}]))) == wanted


def test_depth_limits_the_list():
    documents = np.array([[0.5], [0.25], [1.0]], dtype=np.float32)
    got = rank_vectors(np.ones((1, 1), dtype=np.float32), documents, [{}], depth=2)
    np.testing.assert_array_equal(got.ids, [[2, 0]])


def test_unit_vectors_have_length_1_and_zero_stays_zero():
    vectors = np.array([[3, 4], [0, 0], [0, -0.5]], dtype=np.float32)
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0, 0], [0, -1]], atol=1e-7)


def test_equals_trec_eval_without_ties():
    trec = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(2)
    scores = np.stack([rng.permutation(400) / 512 for _ in range(20)]).astype(np.float32)
    relevant = [{int(d): int(rng.integers(0, 4)) for d in rng.choice(400, 30, replace=False)} for _ in scores]
    measures = {"recall.1,10,100", "ndcg_cut.10", "map_cut.100", "success.1,10", "recip_rank"}
    qrels = {str(q): {str(d): g for d, g in grades.items()} for q, grades in enumerate(relevant)}
    run = {str(q): {str(d): float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    wanted = trec.RelevanceEvaluator(qrels, measures).evaluate(run)
    got = measure(ranked(scores, relevant, chunk=97))
    names = {
        "recall@1": "recall_1", "recall@10": "recall_10", "recall@100": "recall_100", "ndcg@10": "ndcg_cut_10",
        "map@100": "map_cut_100", "hit@1": "success_1", "hit@10": "success_10",
    }  # fmt: skip
    for ours, theirs in names.items():
        np.testing.assert_allclose(got[ours], [wanted[str(q)][theirs] for q in range(20)], atol=1e-6, err_msg=ours)
    rank = np.array([wanted[str(q)]["recip_rank"] for q in range(20)])
    np.testing.assert_allclose(got["mrr@10"], np.where(rank >= 0.1, rank, 0), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_left_out_documents_change_the_ranking_as_if_missing(chunk):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 6, size=(9, 40)).astype(np.float32)  # many tie
    relevant = [{int(d): 1 for d in rng.choice(40, 3, replace=False)} for _ in scores]
    left_out = [{d for d in map(int, rng.choice(40, 4, replace=False)) if d not in r} for r in relevant]
    ranking = Ranking(relevant, depth=10, left_out=left_out)
    for start in range(0, 40, chunk):
        ranking.add(scores[:, start : start + chunk].copy(), 0, start)
    for i, out in enumerate(left_out):
        kept = [d for d in range(40) if d not in out]
        place = {d: n for n, d in enumerate(kept)}
        alone = Ranking([{place[d]: 1 for d in relevant[i]}], depth=10)
        alone.add(scores[i : i + 1, kept], 0, 0)
        assert [place[d] for d in ranking.ids[i].tolist()] == alone.ids[0].tolist()
        for name, groups in vars(ranking.groups()).items():
            mine = groups[ranking.groups().query == i]
            assert sorted(mine.tolist()) == sorted(vars(alone.groups())[name].tolist()) or name == "query"


def test_vectors_that_are_not_finite_are_refused():
    good, bad = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    bad[1, 2] = np.nan
    with pytest.raises(DataError, match=r"1 query vectors hold values that are not finite \(numbers 1\)"):
        evaluate_vectors(bad, good, [{0: 1}] * 3)
    with pytest.raises(DataError, match=r"1 document vectors .*\(numbers 4\)"):
        evaluate_vectors(good, iter([good, bad]), [{0: 1}] * 3)


def test_listed_documents_rank_as_if_all_others_were_not_retrieved():
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 6, (20, 30)).astype(np.float32)  # many ties
    scores[rng.random(scores.shape) < 0.4] = -np.inf
    relevant = [{int(d): 1 for d in rng.choice(30, 4, replace=False)} for _ in scores]
    order = np.stack([rng.permutation(30) for _ in scores])
    listed = np.take_along_axis(scores, order, axis=1)
    ids = np.where(listed > -np.inf, order, -1)
    for depth in (10, 100):
        wanted, got = ranked(scores, relevant, depth), Ranking.of_lists(relevant, ids, listed, depth)
        np.testing.assert_array_equal(got.ids, wanted.ids)
        np.testing.assert_array_equal(got.scores, wanted.scores)
    for name, values in measure(got, KS).items():
        np.testing.assert_array_equal(values, measure(wanted, KS)[name], err_msg=name)


def test_too_short_a_list_is_refused():
    with pytest.raises(ValueError, match="10 deep"):
        measure(Ranking([{0: 1}], depth=10), (1,))
