"""BM25 over texts in memory, the floor that an embedding model has to beat."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.text import split_words

K1, B = 1.5, 0.75
_TOKEN = re.compile(r"\w+")


def bm25_tokens(text: str, stopwords: frozenset[str]) -> list[str]:
    """Lower-case words, Chinese ones by jieba, without punctuation and stop words."""
    words = (token for word in split_words(text.casefold()) for token in _TOKEN.findall(word))
    return [word for word in words if word not in stopwords]


class Bm25:
    """BM25 in Lucene's form, with English and Chinese stop words left out."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s
        from bm25s.stopwords import STOPWORDS_CHINESE, STOPWORDS_EN
        from tqdm.auto import tqdm

        self._stopwords = frozenset(STOPWORDS_EN) | frozenset(STOPWORDS_CHINESE)
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
        # numbers, not texts: each word is in memory once, however often the texts have it
        self._vocabulary: dict[str, int] = {}
        numbers = self._vocabulary
        bar = tqdm(texts, desc="BM25", unit="doc", delay=2, leave=False)
        words = [[numbers.setdefault(word, len(numbers)) for word in bm25_tokens(t, self._stopwords)] for t in bar]
        if numbers:
            self._index.index((words, numbers), show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32] | None:
        """A score per text, -inf for those that share no word with the query; None if none does."""
        tokens = [token for token in bm25_tokens(query, self._stopwords) if token in self._vocabulary]
        if not tokens:
            return None
        found = self._index.get_scores(tokens).astype(np.float32)
        return np.where(found > 0, found, np.float32("-inf"))
