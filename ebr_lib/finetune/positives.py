"""Noisy positives: rows whose positive the model, before training, ranks far below other documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebr_lib.arrays import Encode, Ints
from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.errors import DataError
from ebr_lib.files import written_whole
from ebr_lib.finetune.outputs import save_rows
from ebr_lib.finetune.pool import Pool
from ebr_lib.logs import logger

_CELLS = 1 << 24  # of the table of cosines at a time: 64 MB


def without_noisy(
    rows: Sequence[TrainingRow],
    encode_queries: Encode,
    encode_documents: Encode,
    *,
    rank_max: int,
    catalogue: Catalogue | None = None,
    dropped_to: Path | None = None,
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Drop the rows whose positive ranks below `rank_max` (KaLM's ranking consistency filter, arXiv 2501.01028).

    :param encode_queries: returns vectors of length one, as `encode_documents` does.
    :param dropped_to: where dropped rows are written as training data, each with the rank of its positive; without
        such rows an earlier file is removed. None writes none.
    :return: the rows that are kept, and those that are dropped, both in the order given.
    :raises DataError: no row is kept.
    """
    ranks = positive_ranks(Pool(rows, encode_queries, encode_documents, catalogue))
    kept = [row for row, rank in zip(rows, ranks, strict=True) if rank <= rank_max]
    dropped = [row for row, rank in zip(rows, ranks, strict=True) if rank > rank_max]
    if dropped_to is not None and dropped:
        with written_whole(dropped_to) as new:
            save_rows(dropped, new, [{"rank": rank} for rank in ranks[ranks > rank_max].tolist()])
    elif dropped_to is not None:
        dropped_to.unlink(missing_ok=True)
    logger.info(
        "噪声正例 noisy positives dropped: %d of %d rows (rank over %d)%s",
        len(dropped), len(rows), rank_max, f", 见 see {dropped_to}" if dropped_to and dropped else "",
    )  # fmt: skip
    if not kept:
        raise DataError(
            f"positive_rank_max: {rank_max} leaves none of the {len(rows)} training rows, because the model ranks no "
            "positive that high; raise it, or check that anchors and positives belong together"
        )
    return kept, dropped


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
