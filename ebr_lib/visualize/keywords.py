"""Names for clusters: the words that their texts have and others lack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ebr_lib.arrays import Ints
from ebr_lib.data.text import HAN, normalised, split_words

READ = 20_000  # texts that words are counted in
STRIPPED = ".,;:!?\"'()[]{}<>*#“”‘’…—–-，。；：！？（）【】《》、"


def cluster_words(texts: Sequence[str | None], codes: Ints, count: int, most: int = 3) -> tuple[str, ...]:
    """The most distinctive words of each of `count` clusters, as one text per cluster; empty where none stands out.

    A word's score is p·ln(p/q), p the share of the cluster's texts that have it, q that of all texts: its part of the
    Kullback-Leibler divergence of the cluster from all.
    """
    rows = np.random.default_rng(0).permutation(len(codes))[:READ]
    inside, everywhere, sizes = [Counter[str]() for _ in range(count)], Counter[str](), Counter[int]()
    for row in rows.tolist():
        words = _words(texts[row] or "")
        everywhere.update(words)
        if (code := int(codes[row])) >= 0:
            inside[code].update(words)
            sizes[code] += 1

    def score(word: str, code: int) -> float:
        share = inside[code][word] / sizes[code]
        return share * math.log(share / (everywhere[word] / len(rows)))

    names = []
    for code, found in enumerate(inside):
        scores = {word: score(word, code) for word, times in found.items() if times > 1}
        best = sorted((word for word in scores if scores[word] > 0), key=lambda word: (-scores[word], word))[:most]
        names.append(("、" if any(map(HAN.search, best)) else ", ").join(best))
    return tuple(names)


def _words(text: str) -> set[str]:
    """Different words of a text, without punctuation, numbers, single characters and words such as "the"."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = (word.strip(STRIPPED) for word in split_words(normalised(text)))
    return {word for word in words if len(word) > 1 and not word.replace(".", "").isdigit()} - ENGLISH_STOP_WORDS
