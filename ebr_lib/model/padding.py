"""Batches of texts of several lengths as rectangles, the rest filled up."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Padded = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (texts, longest), and which of the places hold a token."""


def padded_batch(
    ids: NDArray[np.integer], lengths: NDArray[np.integer], filler: int, side: Literal["left", "right"] = "right"
) -> Padded:
    """A batch of texts whose tokens follow each other in `ids` (tokens,).

    :param lengths: tokens of each text (texts,).
    :param filler: stands where no token is.
    :param side: of a text where the filler goes.
    """
    places = np.arange(max(int(lengths.max()), 1))
    seen = (places[::-1] if side == "left" else places)[None] < lengths[:, None]
    padded = np.full(seen.shape, filler, dtype=np.int64)
    padded[seen] = ids
    return padded, seen
