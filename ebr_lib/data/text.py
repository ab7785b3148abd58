"""Texts: when two are equal, when one is blank, its words and its language.

`split_words` cuts at whitespace, and Chinese into the words of jieba.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f]+")


def language_of(text: str) -> str:
    """Chinese, English (any Latin script), mixed or other, by script.

    A Chinese character counts as much as a Latin word; with less than nine tenths of one, the text is mixed. Other: no
    letters of either, or mostly those of another script.
    """
    chinese, words = len(HAN.findall(text)), _LATIN_WORD.findall(text)
    foreign = 0 if text.isascii() else sum(c.isalpha() for c in text) - chinese - sum(map(len, words))
    if not chinese + len(words) or foreign > chinese + sum(map(len, words)):
        return "other"
    share = chinese / (chinese + len(words))
    return "Chinese" if share >= 0.9 else "English" if share <= 0.1 else "mixed"


_CHUNK = re.compile(r"\S+")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f]")


def split_words(text: str) -> list[str]:
    """The words of a text, in order: "买iPhone 13 数据线，很快" has 买, iPhone, 13, 数据线, 很快.

    Chunks between whitespace are words as they stand, punctuation included; a chunk with Chinese in it is cut by
    jieba's dictionary, and its punctuation belongs to no word.
    """
    return words_and_gaps(text)[0]


def words_and_gaps(text: str) -> tuple[list[str], list[str]]:
    """The words, and what is before, between and after them: one gap more than words.

    `gaps[0] + words[0] + gaps[1] + … + gaps[-1]` is the text, exactly.
    """
    words: list[str] = []
    gaps = [""]
    end = 0
    for chunk in _CHUNK.finditer(text):
        gaps[-1] += text[end : chunk.start()]
        end = chunk.end()
        for word in _words_of_chunk(chunk[0]):
            if word == chunk[0] or any(letter.isalnum() for letter in word):
                words.append(word)
                gaps.append("")
            else:
                gaps[-1] += word
    gaps[-1] += text[end:]
    return words, gaps


def _words_of_chunk(chunk: str) -> list[str]:
    if not HAN.search(chunk):
        return [chunk]
    import rjieba

    return rjieba.cut(chunk)


# a text of zero-width characters and control codes is as empty as one of spaces
_VISIBLE = re.compile(r"[^\s\u0000-\u001f\u200b-\u200f\u2060\ufeff]")
_ZERO_WIDTH = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")  # the soft hyphen, which shows nothing either
HALF_CHARACTER = "half a character (a lone surrogate, as in \\ud83d); no tokenizer takes it"


def normalised(text: str) -> str:
    """The form in which equal texts are equal: NFKC, casefolded, no zero-width characters, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join((text if text.isascii() else _ZERO_WIDTH.sub("", text)).split())


def text_keys(texts: Iterable[str]) -> NDArray[np.int64]:
    """One 64-bit key per text, shape (texts,): the same for equal texts (`normalised`), on every machine.

    Different texts share a key with probability 3e-8 among a million.
    """
    digests = b"".join(hashlib.blake2b(normalised(text).encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<i8")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: only whitespace, control codes and zero-width characters."""
    return not _VISIBLE.search(text)


def half_character(texts: Iterable[str]) -> int | None:
    """Number of the first text, from 0, with half of a surrogate pair; None where all are whole."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            return number
    return None
