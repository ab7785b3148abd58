"""A frozen model's opinion of a batch: which of its documents may answer an anchor that nobody paired them with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebr_lib.arrays import Encode, Ints
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.logs import logger


class Guide:
    """Vectors of all training texts by a model that does not change, made once; each different text is encoded once.

    In memory they take 2 bytes per number: 1 GB for a million texts of 512 dimensions.

    :param columns: the texts of each column, the anchors first; equally many in each.
    :param known: the numbers of these texts.
    :param encode_queries: returns vectors of length one, as `encode_documents` does.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[str]],
        known: KnownPositives,
        encode_queries: Encode,
        encode_documents: Encode,
    ) -> None:
        logger.info("计算参照向量 encoding the training texts once, to find false negatives")
        anchors, *documents = columns
        self._anchors, self._anchor_of = _encoded([anchors], known.anchors[:, None], encode_queries)
        self._documents, self._document_of = _encoded(documents, known.columns, encode_documents)

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosines between the anchors and the documents of a batch, in the order of `KnownPositives.mask`.

        :param rows: row numbers, shape (n,).
        :return: float32, shape (n, n · columns), on the device of `rows`.
        """
        here = rows.cpu()
        anchors = self._anchors[self._anchor_of[here, 0]].to(rows.device).float()
        return anchors @ self._documents[self._document_of[here].T.flatten()].to(rows.device).float().T


def _encoded(columns: Sequence[Sequence[str]], numbers: Ints, encode: Encode) -> tuple[Tensor, Tensor]:
    """Vectors of the different texts of some columns, and each cell's place among them, shape (rows, columns)."""
    _, first, places = np.unique(numbers, return_index=True, return_inverse=True)
    texts = [columns[column][row] for row, column in zip(*np.divmod(first, numbers.shape[1]), strict=True)]
    vectors = torch.from_numpy(np.ascontiguousarray(encode(texts))).half()
    return vectors, torch.from_numpy(places.reshape(numbers.shape))
