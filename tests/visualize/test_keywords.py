"""Names of clusters: words that their texts have and others lack."""

import numpy as np

from ebr_lib.visualize.keywords import cluster_words

ENGLISH = [
    "the red shoes, the best",
    "The shoes are red.",
    "a red shoe and shoes",
    "the tea is hot",
    "hot tea: the cup",
    "tea",
]


def test_words_that_set_a_cluster_apart_and_no_others():
    red, tea = cluster_words(ENGLISH, np.array([0, 0, 0, 1, 1, 1]), 2)
    assert red.split(", ")[:2] == ["red", "shoes"] and tea.split(", ")[:2] == ["tea", "hot"]
    assert "the" not in (red + tea).replace(",", "").split()


def test_chinese_texts_are_cut_into_words():
    texts = ["红色运动鞋 2024 新款", "运动鞋男款", "运动鞋 透气", "绿茶茶叶礼盒", "茶叶 送礼", "茶叶"]
    assert [name.split("、")[0] for name in cluster_words(texts, np.array([0, 0, 0, 1, 1, 1]), 2)] == ["运动鞋", "茶叶"]


def test_texts_that_are_alike_or_absent_have_no_words():
    assert cluster_words(["same text"] * 4, np.array([0, 0, 1, 1]), 2) == ("", "")
    assert cluster_words([None] * 4, np.array([0, -1, 1, 1]), 3) == ("", "", "")
