"""The arrays that most parts hand on, and what makes vectors: their types, named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""A row a text: (texts, dim)."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LOOKED_AT, NAMED = 4096, 3  # texts without finite vectors: encoded alone at most, and named in the error

Encode = Callable[[Sequence[str]], Vectors]
"""Texts to their vectors."""


def not_finite(vectors: NDArray[np.floating]) -> Ints:
    """The rows that hold a NaN or an infinite value: their cosines say nothing."""
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1))


def broken_alone(wrong: Sequence[int], is_broken: Callable[[int], bool]) -> tuple[Sequence[int], str]:
    """The first few rows of those without finite vectors that have none alone either, and their number as text.

    A NaN spreads to the texts beside it in a batch: the number is an upper bound where not all were looked at.

    :param is_broken: whether a row has no finite vector when it is encoded alone.
    """
    found = list(islice(filter(is_broken, wrong[:LOOKED_AT]), NAMED))
    exact = 0 < len(found) < NAMED and len(wrong) <= LOOKED_AT
    return found or wrong[:NAMED], str(len(found)) if exact else f"up to {len(wrong)}"
