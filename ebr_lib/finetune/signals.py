"""What rows say besides their texts, as tables that the loss looks up by row number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softmax

from ebr_lib.arrays import Floats, Ints
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.errors import ConfigError
from ebr_lib.logs import logger


def row_weights(rows: Sequence[TrainingRow]) -> Tensor | None:
    """The weight of each row divided by the mean of all, float32 (rows,); None where all are equal.

    Of all rows, not of a batch's: a row then counts alike in whatever batch it is, alone in it too.
    """
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
    return None if (weights == weights[:1]).all() else weights / weights.mean()


def teacher_scores(rows: Sequence[TrainingRow], width: int) -> Tensor | None:
    """A teacher's raw scores of each row's positive and negatives, float32 (rows, 1 + width), NaN where there is none.

    None where no row has two scores to compare.
    """
    table = torch.full((len(rows), 1 + width), torch.nan)
    for place, row in zip(table, rows, strict=True):
        known = torch.tensor(row.scores[: 1 + width])
        place[: len(known)] = known
    return table if (table.isfinite().sum(dim=1) > 1).any() else None


def check_scores(rows: Sequence[TrainingRow], distill_weight: float) -> None:
    """Check that there is a teacher, if one is to be learnt from; log that there is one, if not.

    :raises ConfigError: there is none.
    """
    scored = sum(sum(map(math.isfinite, row.scores)) > 1 for row in rows)
    if distill_weight and not scored:
        raise ConfigError(
            f"distill_weight: {distill_weight:g} wanted, and no training row has two scores (pos_scores, "
            "neg_scores) to compare; add a reranker's scores to the rows, or set distill_weight: 0"
        )
    if scored and not distill_weight:
        logger.info("教师分数未使用 scores of a teacher are not used: %d rows; distill_weight uses them", scored)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """mean(values · weights), both of shape (q,); without weights, the mean."""
    return values.mean() if weights is None else (values * weights).mean()


def teacher_divergence(logits: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) over each row's own documents, shape (q,); 0 for a row with fewer than two scores.

    The teacher's distribution is softmax(scores / temperature), the student's softmax(logits), over the documents that
    have a score. With temperature 1 its gradient is that of FlagEmbedding's `kd_loss_type: kl_div`.

    :param logits: cosines divided by the student's temperature, (q, documents).
    :param scores: the teacher's raw scores, (q, documents), NaN where it gave none.
    """
    known = scores.isfinite()
    known &= known.sum(dim=1, keepdim=True) > 1
    least = torch.finfo(logits.dtype).min  # not −∞: a row without any score must not become NaN
    teacher = softmax((scores / temperature).masked_fill(~known, least), dim=1)
    student = logits.masked_fill(~known, least).log_softmax(dim=1)
    terms = torch.xlogy(teacher, teacher) - teacher * student
    return terms.masked_fill(~known, 0.0).sum(dim=1)


class ExpectedCounts:
    """How often texts are among a batch's candidates on average, for the logQ correction (Yi et al. 2019,
    doi 10.1145/3298689.3346996): logits − ln(count).

    Each row is used once per epoch, so a text in c cells of N rows has c · b / N places in a batch of b rows, however
    batches are made. An anchor's own positive has no copies beside it where these are masked: it counts as often as a
    batch has the text at all, which is min(1, c · b / N) where copies are dealt to different batches.

    :param numbers: the text of each row's cells, shape (rows, columns), as numbers; the first column is the target.
    :param batch_size: rows that are compared, by all processes.
    :param masked: whether copies of an anchor's own positive leave the softmax.
    :param balanced: whether copies are dealt to different batches.
    :param rates: how often each row is in a batch, shape (rows,), where that differs (replay), of balanced batches.
    """

    def __init__(
        self, numbers: Ints, batch_size: int, *, masked: bool, balanced: bool, rates: Floats | None = None
    ) -> None:
        rows, batch = len(numbers), min(batch_size, len(numbers))
        cells = np.bincount(numbers.ravel())
        counts = cells * batch / rows
        if rates is not None:
            counts = np.bincount(numbers.ravel(), weights=np.repeat(rates, numbers.shape[1])).astype(np.float64)
        once = np.minimum(counts, 1.0) if balanced else _chance_of_any(np.minimum(cells, rows), batch, rows)
        self.log_counts = torch.from_numpy(np.log(counts[numbers])).float()
        self.log_own = torch.from_numpy(np.log((once if masked else counts)[numbers[:, 0]])).float()

    def of_batch(self, rows: Tensor, own: Tensor) -> Tensor:
        """ln(count) of the candidates of each anchor, shape (q, n · columns).

        :param rows: row numbers of all processes, shape (n,).
        :param own: which of these are this process's, shape (q,).
        """
        here = rows.cpu()
        logs = self.log_counts[here].T.flatten().to(rows.device).repeat(len(own), 1)
        logs[torch.arange(len(own), device=rows.device), own] = self.log_own[here].to(rows.device)[own]
        return logs


def _chance_of_any(copies: Ints, batch: int, rows: int) -> Floats:
    """The chance that a random batch has at least one of these copies (hypergeometric)."""
    from scipy.special import gammaln

    left = np.maximum(rows - copies - batch, 0)
    none = gammaln(rows - copies + 1) - gammaln(left + 1) - gammaln(rows + 1) + gammaln(rows - batch + 1)
    return np.where(rows - copies < batch, 1.0, -np.expm1(none))
