"""A frozen model's opinion of a batch: which of its documents may answer an anchor that nobody paired them with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebr_lib.arrays import Encode, Ints
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.losses import Guided
from ebr_lib.logs import logger


def guide(
    columns: Sequence[Sequence[str]], known: KnownPositives, encode_queries: Encode, encode_documents: Encode
) -> Guided:
    """A function to the cosines of a batch's anchors and documents, in the order of `KnownPositives.mask`, float32.

    Each different text is encoded once, now. In memory the vectors take 2 bytes per number: 1 GB for a million texts of
    512 dimensions.

    :param columns: the texts of each column, the anchors first; equally many in each.
    :param known: the numbers of these texts.
    :param encode_queries: returns vectors of length one, as `encode_documents` does.
    """
    logger.info("计算参照向量 encoding the training texts once, to find false negatives")
    anchors, anchor_of = _encoded(columns[:1], known.anchors[:, None], encode_queries)
    documents, document_of = _encoded(columns[1:], known.columns, encode_documents)

    def cosines(rows: Tensor) -> Tensor:
        here = rows.cpu()
        queries = anchors[anchor_of[here, 0]].to(rows.device).float()
        return queries @ documents[document_of[here].T.flatten()].to(rows.device).float().T

    return cosines


def _encoded(columns: Sequence[Sequence[str]], numbers: Ints, encode: Encode) -> tuple[Tensor, Tensor]:
    """Vectors of the different texts of some columns, and each cell's place among them, shape (rows, columns)."""
    _, first, places = np.unique(numbers, return_index=True, return_inverse=True)
    texts = [columns[column][row] for row, column in zip(*np.divmod(first, numbers.shape[1]), strict=True)]
    vectors = torch.from_numpy(np.ascontiguousarray(encode(texts))).half()
    return vectors, torch.from_numpy(places.reshape(numbers.shape))
