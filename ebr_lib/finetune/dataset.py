"""Training rows as the trainer takes them: equally many negatives, columns, noise, the batches of an epoch."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import text_keys
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.losses import HeldoutRows
from ebr_lib.finetune.processes import world_size
from ebr_lib.finetune.signals import row_weights, teacher_scores
from ebr_lib.logs import logger

Noise = Callable[[str, int, int, str], str]
"""(text, epoch, row, column) to the text with noise."""

# random tries before all documents are searched for one that does not answer an anchor
DRAWS = 32


def with_equal_negatives(
    rows: Sequence[TrainingRow],
    documents: Sequence[str],
    seed: int,
    known: Sequence[TrainingRow] = (),
    width: int | None = None,
) -> list[TrainingRow]:
    """Rows with equally many hard negatives: as many as the row with most has, or `width`.

    Missing ones are drawn from those of `documents` that are not known to answer the row's anchor, because a tensor has
    one width and a repeated negative would count twice. The draw depends only on the seed and the row's number.
    Negatives beyond `width` are dropped.

    :param known: other rows whose answers are known too.
    """
    most = max((len(row.negatives) for row in rows), default=0) if width is None else width
    if all(len(row.negatives) == most for row in rows):
        return list(rows)
    lacking = sum(max(0, most - len(row.negatives)) for row in rows)
    if width is None and lacking > len(rows) * most / 2:
        logger.warning(
            "负例数量悬殊 %d of %d negatives are drawn at random, because every row needs as many as the widest row, "
            "which has %d: give all rows about as many",
            lacking,
            len(rows) * most,
            most,
        )
    keys = text_keys(documents).tolist()
    filled = []
    for number, (row, answers) in enumerate(zip(rows, _known_answers(rows, known), strict=True)):
        draw = random.Random(f"{seed} {number}")
        more = tuple(documents[_other(keys, answers, draw)] for _ in range(most - len(row.negatives)))
        filled.append(dataclasses.replace(row, negatives=row.negatives[:most] + more, scores=row.scores[: 1 + most]))
    return filled


def _known_answers(rows: Sequence[TrainingRow], more: Sequence[TrainingRow]) -> list[set[int]]:
    """The keys of all texts known to answer each row's anchor, as `KnownPositives` counts them."""
    anchors = text_keys(row.anchor for row in (*rows, *more)).tolist()
    positives = text_keys(row.positive for row in (*rows, *more)).tolist()
    known = defaultdict[int, set[int]](set)
    for anchor, positive in zip(anchors, positives, strict=True):
        known[anchor] |= {anchor, positive}
        known[positive] |= {anchor, positive}
    return [known[anchor] for anchor in anchors[: len(rows)]]


def _other(keys: Sequence[int], answers: set[int], draw: random.Random) -> int:
    """The number of a key that is not among the answers; any number if all are."""
    for _ in range(DRAWS):
        number = draw.randrange(len(keys))
        if keys[number] not in answers:
            return number
    return draw.choice([number for number, key in enumerate(keys) if key not in answers] or range(len(keys)))


def to_dataset(rows: Sequence[TrainingRow], numbers: Sequence[int]) -> Dataset:
    """Rows as the columns that the trainer reads; the label is the row's number."""
    columns: dict[str, list[Any]] = {
        "anchor": [row.anchor for row in rows],
        "positive": [row.positive for row in rows],
    }
    for i in range(len(rows[0].negatives) if rows else 0):
        columns[f"negative_{i + 1}"] = [row.negatives[i] for row in rows]
    return Dataset.from_dict(columns | {"label": list(numbers)})


class Datasets:
    """What a run trains and evaluates on; a row's label is its number, training rows first.

    Evaluation compares as many documents per anchor as training does.

    :param batch_size: training rows that a process compares.
    """

    def __init__(
        self, train: Sequence[TrainingRow], heldout: Sequence[TrainingRow], batch_size: int, seed: int
    ) -> None:
        documents = [row.positive for row in train]
        rows = with_equal_negatives(train, documents, seed)
        self.width = len(rows[0].negatives)  # negatives per row
        held_out = with_equal_negatives(heldout, documents, seed, known=train, width=self.width)
        self.eval_batch = evaluation_batch(len(rows), batch_size, world_size())  # rows that a process compares
        at_once = self.eval_batch * world_size()
        fill = fill_rows(rows, len(held_out), at_once, seed) if held_out else ()
        compared = [*held_out, *(rows[row] for row in fill)]
        numbers = [*range(len(rows), len(rows) + len(held_out)), *fill]
        batches = max(1, -(-len(compared) // at_once) * world_size())
        self.train = to_dataset(rows, range(len(rows)))
        self.heldout = to_dataset(compared, numbers) if held_out else None
        self.counted = HeldoutRows(len(rows), len(held_out) / batches)  # that the evaluation loss is averaged over
        self.known = KnownPositives(rows)  # what training knows, whatever is held out
        self.all_known = KnownPositives([*rows, *held_out]) if held_out else self.known
        self.prompts = [row.prompt for row in (*rows, *held_out)]  # each row's own, by its number
        self.weights = row_weights(rows)
        self.scores = teacher_scores(rows, self.width)


def evaluation_batch(train_rows: int, batch_size: int, processes: int) -> int:
    """Rows that a process compares in evaluation: as many as in training, if the training set is large enough."""
    return max(1, min(batch_size, train_rows // processes))


def fill_rows(train: Sequence[TrainingRow], heldout_rows: int, batch_size: int, seed: int) -> tuple[int, ...]:
    """Numbers of the training rows, drawn by the seed, that fill the last evaluation batch.

    :param batch_size: rows compared at a time, by all processes.
    """
    missing = min(-heldout_rows % batch_size, len(train))
    return tuple(sorted(random.Random(seed).sample(range(len(train)), missing)))


class RowCollator:
    """Collates rows: adds noise to the training texts, and puts each anchor's own prompt before it, without noise.

    :param prompts: of each row, by its number; None leaves prompts to the trainer's arguments.
    :param noise: None adds none, as in evaluation; `columns` are those that get it.
    :ivar epoch: of the noise; in shared memory, so that worker processes see it change.
    """

    def __init__(
        self, collate: Any, prompts: Sequence[str] | None, noise: Noise | None = None, columns: Sequence[str] = ()
    ) -> None:
        self.collate, self.prompts, self.noise, self.columns = collate, prompts, noise, frozenset(columns)
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.valid_label_columns = collate.valid_label_columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows."""
        if self.noise is not None:
            epoch, noise = int(self.epoch), self.noise
            noisy = {name for name in rows[0] if name.split("_")[0] in self.columns}  # negative_1 … are all "negative"
            rows = [
                {n: noise(value, epoch, row["label"], n) if n in noisy else value for n, value in row.items()}
                for row in rows
            ]
        if self.prompts is not None:
            rows = [{**row, "anchor": self.prompts[row["label"]] + row["anchor"]} for row in rows]
        return self.collate(rows)


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch; passes the number of the epoch on to the noise.

    A row that is alone in the last batch has no negatives and would teach nothing: the epoch's first row that does not
    answer it is added. Several processes take turns and gather what they embed, so each needs equally many batches of
    one size: the last round is filled with the epoch's first rows once more; the mask knows their positives.

    :param batches: all full except the last.
    :param epoch_cell: where the noise reads the epoch.
    :param answers: whether the training set knows that two rows answer each other; None knows nothing.
    """

    drop_last = False

    def __init__(
        self,
        batches: Any,
        epoch_cell: Tensor | None,
        processes: int = 1,
        answers: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.batches = batches
        self._answers = answers or (lambda one, other: False)
        self.batch_size: int = batches.batch_size
        self.processes = processes
        self._cell = epoch_cell

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are drawn, for the noise too."""
        self.batches.set_epoch(epoch)
        if self._cell is not None:
            self._cell.fill_(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return self._none_alone() if self.processes == 1 else self._filled_up()

    def _none_alone(self) -> Iterator[list[int]]:
        before: list[int] = []
        for batch in self.batches:
            alone = len(batch) == 1 < self.batch_size
            others = (row for row in before if not self._answers(batch[0], row))
            added = next(others, before[0] if before else None) if alone else None
            yield batch if added is None else [*batch, added]
            before += batch

    def _filled_up(self) -> Iterator[list[int]]:
        rows = [row for batch in self.batches for row in batch]
        missing = len(self) * self.batch_size - len(rows)
        rows += islice(cycle(rows[:]), missing)
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes
