"""Types of the arrays that most parts use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""One row per text: (texts, dim)."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LOOKED_AT, NAMED = 4096, 3  # texts without finite vectors: at most this many encoded alone, and named in the error

Encode = Callable[[Sequence[str]], Vectors]
"""Texts to their vectors."""


def not_finite(vectors: NDArray[np.floating]) -> Ints:
    """Rows with a NaN or an infinite value, whose cosines mean nothing."""
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1))


def broken_alone(wrong: Sequence[int], is_broken: Callable[[int], bool]) -> tuple[Sequence[int], str]:
    """The first few rows whose vectors are not finite when encoded alone either, and their number as text.

    A NaN spreads to other texts in a batch: the number is an upper bound unless all were encoded alone.

    :param wrong: rows whose vectors were not finite.
    :param is_broken: encodes a row alone, and says whether its vector is not finite.
    """
    found = list(islice(filter(is_broken, wrong[:LOOKED_AT]), NAMED))
    exact = 0 < len(found) < NAMED and len(wrong) <= LOOKED_AT
    return found or wrong[:NAMED], str(len(found)) if exact else f"up to {len(wrong)}"
