"""BM25 over texts: the floor that an embedding model has to beat, and the other half of a hybrid search.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, in Lucene's form. What is kept
are counts, not scores, which change with every text that is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.text import split_words

K1, B = 1.5, 0.75
_TOKEN = re.compile(r"\w+")
_KEPT = ("starts", "documents", "counts", "lengths")


def bm25_tokens(text: str, stopwords: frozenset[str]) -> list[str]:
    """Lower-case words, Chinese ones by jieba, without punctuation and stop words."""
    words = (token for word in split_words(text.casefold()) for token in _TOKEN.findall(word))
    return [word for word in words if word not in stopwords]


class Bm25:
    """BM25 in Lucene's form, with English and Chinese stop words left out.

    Word number w occurs `counts[i]` times in text `documents[i]`, for i from `starts[w]` to `starts[w + 1]`.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        from bm25s.stopwords import STOPWORDS_CHINESE, STOPWORDS_EN

        self._stopwords = frozenset(STOPWORDS_EN) | frozenset(STOPWORDS_CHINESE)
        self._vocabulary: dict[str, int] = {}
        self.starts, self.lengths = np.zeros(1, np.int64), np.empty(0, np.int32)
        self.documents, self.counts = np.empty(0, np.int32), np.empty(0, np.int32)
        self.add(texts)

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, texts: Iterable[str]) -> None:
        """Add texts, numbered from the last one on."""
        from scipy.sparse import coo_array, csc_array, vstack
        from tqdm.auto import tqdm

        numbers = self._vocabulary
        rows = [
            np.array([numbers.setdefault(word, len(numbers)) for word in bm25_tokens(text, self._stopwords)], np.int32)
            for text in tqdm(texts, desc="BM25", unit="doc", delay=2, leave=False)
        ]
        lengths = np.array([len(row) for row in rows], np.int32)
        words = np.concatenate([*rows, np.empty(0, np.int32)])
        texts_of_words = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        del rows
        ones, size = np.ones(len(words), np.int32), (len(lengths), len(numbers))
        new = coo_array((ones, (texts_of_words, words)), shape=size).tocsc()
        old = csc_array((self.counts, self.documents, self.starts), shape=(len(self), len(self.starts) - 1))
        old.resize(len(self), len(numbers))
        found = vstack((old, new), format="csc") if len(self) else new
        self.starts, self.documents, self.counts = found.indptr, found.indices, found.data
        self.lengths = np.concatenate([self.lengths, lengths])

    def scores(self, query: str) -> NDArray[np.float32] | None:
        """A score per text, -inf for those that share no word with the query; None if none does."""
        tokens = [self._vocabulary.get(token, -1) for token in bm25_tokens(query, self._stopwords)]
        known = [token for token in tokens if token >= 0]
        if not known:
            return None
        found = np.zeros(len(self), np.float32)
        mean = self.lengths.mean()
        for token in known:
            part = slice(self.starts[token], self.starts[token + 1])
            texts, counts = self.documents[part], self.counts[part]
            idf = np.log(1 + (len(self) - len(texts) + 0.5) / (len(texts) + 0.5))
            found[texts] += idf * counts / (counts + K1 * (1 - B + B * self.lengths[texts] / mean))
        found[found == 0] = -np.inf
        return found

    def save(self, path: Path) -> None:
        """Write words and counts to a `.npz` file, which is read without pickle."""
        words = np.frombuffer("\n".join(self._vocabulary).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez(file, words=words, **{name: getattr(self, name) for name in _KEPT})

    @classmethod
    def load(cls, path: Path) -> Bm25:
        """Read what `save` wrote.

        :raises OSError, ValueError, KeyError, zipfile.BadZipFile: the file is damaged.
        """
        self = cls()
        with np.load(path, allow_pickle=False) as file:
            words = file["words"].tobytes().decode()
            self._vocabulary = {word: number for number, word in enumerate(words.split("\n") if words else ())}
            for name in _KEPT:
                setattr(self, name, file[name])
        return self
