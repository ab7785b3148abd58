"""BM25: its tokens, and its scores against the formula."""

from __future__ import annotations

import math

import bm25s
import numpy as np
import pytest

from ebr_lib.data.bm25 import K1, B, Bm25, bm25_tokens


def test_bm25_tokens_in_both_languages():
    assert bm25_tokens("The RED shoes, of 2024!", frozenset({"the", "of"})) == ["red", "shoes", "2024"]
    assert bm25_tokens("透明手机壳，很快", frozenset()) == ["透明", "手机", "壳", "很快"]


def test_scores_are_those_of_the_formula():
    texts = ["red shoes for running", "red red blanket", "透明手机壳"]
    scores = Bm25(texts).scores("red shoes")
    lengths = [3, 3, 3]  # without the stop word

    def term(containing: int, count: int, length: int) -> float:
        idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
        return idf * count / (count + K1 * (1 - B + B * length / (sum(lengths) / len(lengths))))

    assert scores[0] == pytest.approx(term(2, 1, 3) + term(1, 1, 3), rel=1e-5)
    assert scores[1] == pytest.approx(term(2, 2, 3), rel=1e-5)
    assert scores[2] == float("-inf")


def test_nothing_is_found_for_words_that_no_text_has():
    assert Bm25(["red shoes"]).scores("毯子") is None
    assert Bm25(["", "the"]).scores("the") is None


TEXTS = ["red shoes, red laces", "透明手机壳 red", "", "the", "steel pan for shoes", "手机 手机 pan"]


def test_scores_are_those_of_another_library():
    other = bm25s.BM25(k1=K1, b=B, method="lucene")
    other.index([bm25_tokens(text, Bm25()._stopwords) for text in TEXTS], show_progress=False)
    for query in ("red pan", "手机壳 shoes shoes"):
        wanted = other.get_scores(bm25_tokens(query, Bm25()._stopwords))
        found = Bm25(TEXTS).scores(query)
        np.testing.assert_allclose(np.where(found > 0, found, 0), wanted, rtol=1e-6)


def test_added_and_loaded_texts_score_as_those_given_at_once(tmp_path):
    bm25 = Bm25(TEXTS[:2])
    bm25.save(tmp_path / "b.npz")
    bm25 = Bm25.load(tmp_path / "b.npz")
    bm25.add(TEXTS[2:3])
    bm25.add([])
    bm25.add(TEXTS[3:])
    assert len(bm25) == len(TEXTS)
    for query in ("red pan", "手机 shoes"):
        np.testing.assert_array_equal(bm25.scores(query), Bm25(TEXTS).scores(query))
    Bm25().save(tmp_path / "empty.npz")
    assert Bm25.load(tmp_path / "empty.npz").scores("red") is None
