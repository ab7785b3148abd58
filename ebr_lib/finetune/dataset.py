"""Training rows as the trainer takes them: equal negatives, columns, noise, the batches of an epoch."""

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
from ebr_lib.logs import logger

Noise = Callable[[str, int, int, str], str]
"""(text, epoch, row, column) to the text with noise."""

# tries at random before all documents are looked through for one that does not answer an anchor
DRAWS = 32


def with_equal_negatives(
    rows: Sequence[TrainingRow],
    documents: Sequence[str],
    seed: int,
    known: Sequence[TrainingRow] = (),
    width: int | None = None,
) -> list[TrainingRow]:
    """Rows that all have as many hard negatives as the one that has most, or `width`.

    What a row lacks is drawn from those of `documents` that are not known to answer its anchor: the tensor wants equal
    numbers, and a repeated negative would count twice. The draw depends on the seed and the row's number alone. What a
    row has beyond `width` is left out.

    :param known: other rows whose answers are known, too.
    """
    most = max((len(row.negatives) for row in rows), default=0) if width is None else width
    if all(len(row.negatives) == most for row in rows):
        return list(rows)
    lacking = sum(max(0, most - len(row.negatives)) for row in rows)
    if width is None and lacking > len(rows) * most / 2:
        logger.warning(
            "负例数量悬殊 %d of %d negatives are drawn at random, for every batch is as wide as the widest row, "
            "which has %d: give the rows about as many each",
            lacking,
            len(rows) * most,
            most,
        )
    keys = text_keys(documents).tolist()
    filled = []
    for number, (row, answers) in enumerate(zip(rows, _known_answers(rows, known), strict=True)):
        draw = random.Random(f"{seed} {number}")
        more = tuple(documents[_other(keys, answers, draw)] for _ in range(most - len(row.negatives)))
        filled.append(dataclasses.replace(row, negatives=row.negatives[:most] + more))
    return filled


def _known_answers(rows: Sequence[TrainingRow], more: Sequence[TrainingRow]) -> list[set[int]]:
    """Of each row the keys of all texts known to answer its anchor, as `KnownPositives` counts them."""
    anchors = text_keys(row.anchor for row in (*rows, *more)).tolist()
    positives = text_keys(row.positive for row in (*rows, *more)).tolist()
    known = defaultdict[int, set[int]](set)
    for anchor, positive in zip(anchors, positives, strict=True):
        known[anchor] |= {anchor, positive}
        known[positive] |= {anchor, positive}
    return [known[anchor] for anchor in anchors[: len(rows)]]


def _other(keys: Sequence[int], answers: set[int], draw: random.Random) -> int:
    """The number of a key that is not among the answers; any number where all are."""
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


def evaluation_batch(train_rows: int, batch_size: int, processes: int) -> int:
    """Rows that a process compares in evaluation: as many as in training, where the training set is large enough."""
    return max(1, min(batch_size, train_rows // processes))


def fill_rows(train: Sequence[TrainingRow], heldout_rows: int, batch_size: int, seed: int) -> tuple[int, ...]:
    """Numbers of the training rows, drawn by the seed, that fill up the last evaluation batch.

    :param batch_size: rows compared at a time, by all processes.
    """
    missing = min(-heldout_rows % batch_size, len(train))
    return tuple(sorted(random.Random(seed).sample(range(len(train)), missing)))


class NoisyCollator:
    """Puts noise into the training texts before they are tokenised; evaluation never sees it.

    The epoch lives in shared memory, so that worker processes see it change.
    """

    def __init__(self, collate: Callable[[Any], dict[str, Any]], noise: Noise, columns: Sequence[str]) -> None:
        self.collate = collate
        self.noise = noise
        self.columns = frozenset(columns)
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.valid_label_columns = getattr(collate, "valid_label_columns", ["label"])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows, their texts with the noise of this epoch."""
        epoch = int(self.epoch)
        return self.collate([self._noisy(row, epoch) for row in rows])

    def _noisy(self, row: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        return {
            name: self.noise(value, epoch, row["label"], name) if self._takes(name) else value
            for name, value in row.items()
        }

    def _takes(self, name: str) -> bool:
        return name.split("_", maxsplit=1)[0] in self.columns  # negative_1, negative_2 … are all "negative"


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch; tells the noise which epoch it is.

    A row that is alone in the last batch has no negatives there and would teach nothing: the epoch's first row that
    does not answer it keeps it company. Several processes take turns, and gather what they embed: batches of one size,
    as many for each. The last round is therefore filled up with the epoch's first rows once more; the mask knows their
    positives.

    :param batches: full ones, but for the last.
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
        """Draw the batches of this epoch anew, and tell the epoch to those who prepare them."""
        self.batches.set_epoch(epoch)
        if self._cell is not None:
            self._cell.fill_(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return self._in_company() if self.processes == 1 else self._filled_up()

    def _in_company(self) -> Iterator[list[int]]:
        before: list[int] = []
        for batch in self.batches:
            alone = len(batch) == 1 < self.batch_size
            others = (row for row in before if not self._answers(batch[0], row))
            company = next(others, before[0] if before else None) if alone else None
            yield batch if company is None else [*batch, company]
            before += batch

    def _filled_up(self) -> Iterator[list[int]]:
        rows = [row for batch in self.batches for row in batch]
        missing = len(self) * self.batch_size - len(rows)
        rows += islice(cycle(rows[:]), missing)
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes
