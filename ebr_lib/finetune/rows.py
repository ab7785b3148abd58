"""The rows of a run: read, split into training and held-out ones, and checked for leaks between the two."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from ebr_lib.data.pairs import Pair, TrainingRow, expand, read_pairs, texts_of, warn_of_heldout_names
from ebr_lib.data.text import normalised
from ebr_lib.errors import DataError
from ebr_lib.finetune.heldout import HeldoutTask, build_task
from ebr_lib.finetune.replay import read_replay, without_asked
from ebr_lib.finetune.split import near_duplicate_groups, split_pairs
from ebr_lib.logs import logger
from ebr_lib.names import OnBadRow

Places = str | Sequence[str]


@dataclass(frozen=True)
class Rows:
    """Training rows, held-out rows, and the held-out rows as a retrieval task (None when nothing is held out).

    `sha256` is that of all rows as they were read. `replay` has the rows of another kind that are trained on beside.
    """

    train: Sequence[TrainingRow]
    heldout: Sequence[TrainingRow]
    task: HeldoutTask | None
    sha256: str
    replay: Sequence[TrainingRow] = ()

    @property
    def trained(self) -> list[TrainingRow]:
        """All rows that are trained on, the replayed ones last."""
        return [*self.train, *self.replay]

    def with_replay(self, path: Places) -> Rows:
        """Read what is replayed, without rows that ask what is held out; held-out queries know what is seen."""
        rows = without_asked(read_replay(path, self.train), {row.anchor for row in self.heldout}, "held out")
        if self.heldout:
            warn_of_leaks(*([Pair(row.anchor, (row.positive,)) for row in side] for side in (rows, self.heldout)))
        task = self.task and self.task.seen_by(texts_of([*self.train, *rows]))
        return replace(self, replay=rows, task=task, sha256=_sha256(self.train, self.heldout, rows))

    def without_guarded(self, queries: Collection[str]) -> Rows:
        """Leave out replayed rows that ask what the guard asks."""
        if not self.replay:
            return self
        rows = without_asked(self.replay, queries, "guard")
        return replace(self, replay=rows, sha256=_sha256(self.train, self.heldout, rows))


def read_rows(
    data_path: Places,
    eval_data_path: Places | None,
    *,
    on_bad_row: OnBadRow,
    rejects: Path | None,
    heldout_rejects: Path | None,
    label_column: str | None,
    eval_ratio: float,
    eval_corpus_size: int,
    leave_out_own: bool,
    seed: int,
) -> Rows:
    """Read the pairs; hold out those under `eval_data_path`, or a share of the anchors.

    :param rejects, heldout_rejects: where bad rows are written; None writes none.
    :param eval_corpus_size, leave_out_own: see `build_task`.
    :raises DataError: the data is broken, or no held-out anchor can be measured.
    :raises MissingError: a path does not exist.
    """
    pairs = read_pairs(data_path, on_bad_row, rejects, label_column)
    warn_of_heldout_names(data_path, pairs)
    if eval_data_path is not None:
        train, heldout = pairs, read_pairs(eval_data_path, on_bad_row, heldout_rejects, label_column)
        warn_of_leaks(train, heldout)
    else:
        train, heldout = split_pairs(pairs, eval_ratio, seed)
    train_rows, heldout_rows = expand(train), expand(heldout)
    if train_rows and not any(row.weight for row in train_rows):
        raise DataError(
            "every training row has the weight 0, so there is nothing to learn; correct the column `weight`"
        )
    logger.info("训练集大小: %d (training rows)", len(train_rows))
    logger.info("验证集大小: %d (held-out rows)", len(heldout_rows))
    task = None
    if heldout_rows:
        task = build_task(heldout_rows, train_rows, eval_corpus_size, seed, leave_out_own)
        _report_own_documents(task)
    return Rows(train_rows, heldout_rows, task, _sha256(train_rows, heldout_rows))


def _report_own_documents(task: HeldoutTask) -> None:
    """Log for how many anchors a document of their own text is left out, and how many have no other answer."""
    if not task.queries:
        raise DataError(
            "every held-out anchor has itself as its only answer, so nothing can be measured; set leave_out_own: none "
            "to count it as an answer, or eval_ratio: 0"
        )
    if own := sum(map(bool, task.own)):
        logger.info("自身文档不参与验证检索 own documents left out: those of %d of %d anchors", own, len(task.queries))
    if task.without_answer:
        logger.warning(
            "除自身外没有答案的 anchor 不参与评估 held-out anchors that are their only answer are not measured: %d; "
            "leave_out_own: none keeps them",
            task.without_answer,
        )


def warn_of_leaks(train: Sequence[Pair], heldout: Sequence[Pair]) -> None:
    """Warn of held-out texts that training has, or nearly has, in either column: they measure memory.

    A document that answers training anchors too is not a leak, but its queries are `seen`.
    """
    columns = [
        [normalised(text) for text in texts]
        for pairs in (train, heldout)
        for texts in ([pair.anchor for pair in pairs], [text for pair in pairs for text in pair.positives])
    ]
    groups = near_duplicate_groups([text for column in columns for text in column])
    ends = np.cumsum([len(column) for column in columns])
    train_anchors, train_documents, anchors, documents = np.split(groups, ends[:-1])
    known = np.isin(anchors, np.union1d(train_anchors, train_documents))
    if known.any():
        logger.warning(
            "验证集泄漏: %d 条 held-out anchors are in the training data (as anchors or documents), or near-duplicates "
            "of it",
            known.sum(),
        )
    if (asked := np.isin(documents, train_anchors)).any():
        logger.warning(
            "验证集泄漏: %d 条 held-out documents are anchors of the training data, or near-duplicates of them",
            asked.sum(),
        )
    seen = np.isin(columns[3], columns[1])
    if seen.any():
        logger.info("训练中出现过的验证文档 held-out documents that training has too (seen): %d", seen.sum())
    if (near := np.isin(documents, train_documents) & ~seen).any():
        logger.info("近似文档 held-out documents that are near-duplicates of training documents: %d", near.sum())


def _sha256(*sets: Sequence[TrainingRow]) -> str:
    digest = hashlib.sha256(repr([len(rows) for rows in sets]).encode())
    for row in chain(*sets):
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
