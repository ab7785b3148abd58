"""The arrays that most parts hand on, and what makes vectors: their types, named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""A row a text: (texts, dim)."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LOOKED_AT = 64  # texts without finite vectors that are encoded alone, to name the right ones

Encode = Callable[[Sequence[str]], Vectors]
"""Texts to their vectors."""


def not_finite(vectors: NDArray[np.floating]) -> Ints:
    """The rows that hold a NaN or an infinite value: their cosines say nothing."""
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1))
