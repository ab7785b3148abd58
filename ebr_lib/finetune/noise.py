"""Noise for training texts, drawn by (seed, epoch, row, column) alone."""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass

from ebr_lib.data.text import is_blank, words_and_gaps
from ebr_lib.names import NoiseKind

# a letter with its accents and variation selectors
_CHARACTER = re.compile(r"\S[\u0300-\u036f\ufe00-\ufe0f]*")


def add_noise(text: str, kind: NoiseKind, strength: float, rng: random.Random) -> str:
    """The text with about `strength` of its words (of its characters, for `char_delete`) dropped or moved.

    At least one changes if there are two words to drop from or two different ones to swap, or two characters.
    Something visible always stays. The expected number of changes is `strength` times the number of words, and never
    less than one word dropped or two swapped.
    """
    if strength <= 0 or kind == "none":
        return text
    noisy = {"random_delete": _random_delete, "random_swap": _random_swap, "char_delete": _char_delete}[kind]
    changed = noisy(text, strength, rng)
    return text if is_blank(changed) else changed


def _rounded(expected: float, most: int, rng: random.Random) -> int:
    """A whole number with mean `expected`, limited to 1 … `most`."""
    whole = math.floor(expected)
    return min(most, max(1, whole + (rng.random() < expected - whole)))


def _random_delete(text: str, strength: float, rng: random.Random) -> str:
    words, gaps = words_and_gaps(text)
    if len(words) < 2:
        return text
    count = _rounded(strength * len(words), len(words) - 1, rng)
    dropped = set(rng.sample(range(len(words)), count))
    kept = [i for i in range(len(words)) if i not in dropped]
    # the space or comma after a dropped word goes too; the end of the text stays
    inner = "".join(words[i] + gaps[i + 1] for i in kept[:-1])
    return gaps[0] + inner + words[kept[-1]] + gaps[-1]


def _random_swap(text: str, strength: float, rng: random.Random) -> str:
    """Swap disjoint pairs of neighbouring, different words; spaces and punctuation keep their places.

    Pairs are taken in random order while they are free, so at most about 0.86 of a long text's words move (Flory 1939).
    """
    words, gaps = words_and_gaps(text)
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if not places:
        return text
    count = _rounded(strength * len(words) / 2, len(places), rng)
    rng.shuffle(places)
    moved: set[int] = set()
    for i in places:
        if count and not moved & {i, i + 1}:
            words[i], words[i + 1] = words[i + 1], words[i]
            moved |= {i, i + 1}
            count -= 1
    return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:], strict=True))


def _char_delete(text: str, strength: float, rng: random.Random) -> str:
    characters = [found.span() for found in _CHARACTER.finditer(text)]
    if len(characters) < 2:
        return text
    count = _rounded(strength * len(characters), len(characters) - 1, rng)
    dropped = sorted(rng.sample(range(len(characters)), count))
    pieces, end = [], 0
    for i in dropped:
        start, after = characters[i]
        pieces.append(text[end:start])
        end = after
    return "".join([*pieces, text[end:]])


@dataclass(frozen=True, slots=True)
class TextNoise:
    """Noise on a share of the rows, different in each epoch.

    Whether a row changes depends only on (seed, epoch, row), and holds for all its columns; how a text changes depends
    on its column too. The number of workers, the batch and earlier draws make no difference.

    :param prob: share of the rows that change.
    :param strength: share of a changed text's words or characters that are dropped or moved (see `add_noise`).
    """

    kind: NoiseKind
    prob: float
    strength: float
    seed: int = 0

    def __call__(self, text: str, epoch: int, row: int, column: str) -> str:
        """The text in this epoch; `row` is its index in the training set."""
        if _draw(self.seed, epoch, row) >= self.prob * 2**64:
            return text
        return add_noise(text, self.kind, self.strength, random.Random(_draw(self.seed, epoch, row, column)))


def _draw(*coordinates: int | str) -> int:
    """A number from 0 up to 2**64, the same for the same coordinates."""
    key = "\0".join(map(str, coordinates)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
