"""Noisy positives: rows whose positive the model, before training, ranks far below other documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebr_lib.arrays import Encode, Ints
from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.finetune.pool import Pool, make_pool

_CELLS = 1 << 24  # of the table of cosines at a time: 64 MB


@dataclass(frozen=True)
class Consistent:
    """Training rows whose positive ranks high enough, and the dropped ones, both in the order given.

    :ivar ranks: the rank of each dropped row's positive.
    """

    rows: list[TrainingRow]
    dropped: list[TrainingRow]
    ranks: list[int]


def consistent_rows(
    rows: Sequence[TrainingRow],
    encode_queries: Encode,
    encode_documents: Encode,
    *,
    rank_max: int,
    catalogue: Catalogue | None = None,
) -> Consistent:
    """Drop the rows whose positive ranks below `rank_max` (KaLM's ranking consistency filter, arXiv 2501.01028).

    :param encode_queries: returns vectors of length one, as `encode_documents` does.
    """
    ranks = positive_ranks(make_pool(rows, encode_queries, encode_documents, catalogue))
    kept = ranks <= rank_max
    dropped = np.flatnonzero(~kept).tolist()
    return Consistent(
        [row for row, keep in zip(rows, kept, strict=True) if keep],
        [rows[row] for row in dropped],
        ranks[dropped].tolist(),
    )


def positive_ranks(pool: Pool) -> Ints:
    """The rank of each row's positive for its anchor by cosine, shape (rows,); 1 is the nearest.

    Only documents that are nearer count, other than the anchor itself and its known positives.
    """
    anchor = np.searchsorted(pool.anchors, pool.known.anchors)
    positive = np.searchsorted(pool.documents, pool.known.documents)
    known = pool.pairs()
    ranks = np.empty(len(anchor), dtype=np.int64)
    step = max(1, _CELLS // len(pool.documents))
    for start in range(0, len(pool.anchors), step):
        cosines = pool.queries[start : start + step] @ pool.vectors.T
        rows = np.flatnonzero((anchor >= start) & (anchor < start + step))
        own = cosines[anchor[rows] - start, positive[rows]]
        here = (known.anchor >= start) & (known.anchor < start + step)
        cosines[known.anchor[here] - start, known.document[here]] = -np.inf
        for row, cosine in zip(rows, own, strict=True):
            ranks[row] = 1 + int((cosines[anchor[row] - start] > cosine).sum())
    return ranks
