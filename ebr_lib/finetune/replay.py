"""Rows of a more general kind, of which every batch holds some, so that training does not forget that kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from statistics import fmean

from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.data.text import normalised
from ebr_lib.errors import DataError
from ebr_lib.logs import logger


def read_replay(path: str | Sequence[str], train: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Read pairs in the formats of training data; their weights are scaled to the mean of `train`.

    Weights of two sources are on two scales, clicks here and none there: by themselves they would decide how much
    replay counts, which is what its share says.

    :raises MissingError: a path does not exist.
    :raises DataError: the rows are broken, or all weigh 0.
    """
    rows = expand(read_pairs(path))
    wanted, found = fmean(row.weight for row in train), fmean(row.weight for row in rows)
    if not found:
        raise DataError(f"replay_data_path {path}: every row has the weight 0; correct the column `weight`")
    if wanted == found:
        return rows
    return [dataclasses.replace(row, weight=row.weight * wanted / found) for row in rows]


def without_asked(rows: Sequence[TrainingRow], queries: Collection[str], what: str) -> list[TrainingRow]:
    """The rows that do not have one of these queries as a text, because it is measured; the others are counted.

    :param what: whose queries these are, for the log.
    :raises DataError: no row is left.
    """
    asked = set(map(normalised, queries))
    kept = [row for row in rows if asked.isdisjoint((normalised(row.anchor), normalised(row.positive)))]
    if left_out := len(rows) - len(kept):
        logger.info(
            "回放中与%s相同的查询不训练 replayed rows left out, because they ask what is measured (%s): %d",
            *("防遗忘集" if what == "guard" else "验证集", what, left_out),
        )
    if not kept:
        raise DataError(f"replay_data_path: all {len(rows)} rows ask what is measured ({what}); give other pairs")
    return kept
