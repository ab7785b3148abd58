"""What is seen: the rows of an embedding file that have a direction, with their labels and texts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebr_lib.arrays import Floats, Ints, Vectors
from ebr_lib.data.embeddings.base import AGAIN
from ebr_lib.data.embeddings.files import iter_embeddings, read_embeddings
from ebr_lib.errors import DataError
from ebr_lib.logs import logger
from ebr_lib.tables import shortened


@dataclass(frozen=True)
class Items:
    """Rows that have a direction: unit vectors, labels, texts and lengths of each; and how many have none.

    :ivar keys: what tells the rows apart: values of an id column, or row numbers.
    :ivar norms: lengths of the vectors as they stand in the file.
    :ivar zero: rows of the file whose vector is zeros; `without_vector` have none at all.
    :ivar unmatched: rows that are left out because the file to compare with has no vector for them."""

    path: str
    unit: Vectors
    labels: list[str | None]
    texts: list[str | None]
    keys: list[Any]
    norms: Floats
    zero: int
    without_vector: int
    unmatched: int = 0

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def rows_of_file(self) -> int:
        """Those that are left out included."""
        return len(self) + self.zero + self.without_vector + self.unmatched

    def chosen(self, rows: Ints) -> Items:
        """Some of the items, in the order of `rows`."""
        return dataclasses.replace(
            self,
            unit=self.unit[rows],
            labels=[self.labels[r] for r in rows],
            texts=[self.texts[r] for r in rows],
            keys=[self.keys[r] for r in rows],
            norms=self.norms[rows],
        )


def columns_in(path: str) -> list[str]:
    """The kept columns of an embedding file."""
    return list(next(iter_embeddings(path)).columns)


def read_items(path: str, label: str | None, text: str | None, key: str | None) -> Items:
    """The items of a file; without a `key` column their keys are their row numbers.

    :raises MissingError: there is no such file.
    :raises DataError: it cannot be read, lacks a column, or holds nothing but zeros.
    """
    data = read_embeddings(path, list(dict.fromkeys(name for name in (label, text, key) if name is not None)))
    vectors = data.vectors
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    rows = np.flatnonzero(norms > 0)
    if not len(rows):
        raise DataError(f"{path}: all {len(norms)} vectors are zeros; {AGAIN}")
    vectors /= np.maximum(norms, 1e-30)[:, None].astype(np.float32)
    nothing: list[str | None] = [None] * len(data)
    items = Items(
        path,
        vectors,
        data.columns[label] if label else nothing,
        data.columns[text] if text else nothing,
        data.columns[key] if key else data.rows.tolist(),
        norms,
        len(norms) - len(rows),
        data.total - len(data),
    )
    return items if len(rows) == len(norms) else items.chosen(rows)


def read_both(
    path: str, path_before: str, *, label: str | None, text: str | None, key: str | None
) -> tuple[Items, Items]:
    """The rows that a file and the one to compare it with both have, in the order of the first.

    :param key: the column that says which rows are the same; None takes them by their order.
    :raises DataError: it is not to be told which rows are the same, or none are.
    """
    now = read_items(path, label, text, key)
    if key is not None:
        return _matched(now, read_items(path_before, None, None, key), key)
    columns = columns_in(path)
    shared = [name for name in columns_in(path_before) if name in columns]
    witness = text if text in shared else next(iter(shared), None)
    before = read_items(path_before, None, witness, None)
    if now.rows_of_file != before.rows_of_file:
        raise DataError(
            f"{path} has {now.rows_of_file} rows, {path_before} has {before.rows_of_file}: "
            "name the column that says which are the same in id_column"
        )
    now, before = _matched(now, before)
    if witness is None:
        logger.warning("%s shares no column with the new file: rows are the same by their order", path_before)
    else:
        here = now if witness == text else read_items(path, None, witness, None)
        told = dict(zip(here.keys, here.texts, strict=True))
        _check_same(witness, dataclasses.replace(now, texts=[told[key] for key in now.keys]), before)
    return now, before


def _check_same(name: str, now: Items, before: Items) -> None:
    """Rows that are matched by their order must be the same items: a column that both files have says whether."""
    wrong = [i for i, (a, b) in enumerate(zip(now.texts, before.texts, strict=True)) if a != b]
    if wrong:
        row = wrong[0]
        raise DataError(
            f"{now.path} and {before.path} differ in {name} in {len(wrong)} rows. "
            f"Row {before.keys[row]}: {shortened(now.texts[row] or '')!r} here, {shortened(before.texts[row] or '')!r} "
            "there; name the column that says which rows are the same in id_column"
        )


def _matched(now: Items, before: Items, key_column: str | None = None) -> tuple[Items, Items]:
    """The rows whose keys both have."""
    places = {key: row for row, key in enumerate(before.keys)}
    if key_column and len(places) < len(before):
        raise DataError(f"{before.path}: {key_column} is not unique; name a column that is in id_column")
    rows = np.array([row for row, key in enumerate(now.keys) if key in places], dtype=np.int64)
    if not len(rows):
        raise DataError(f"{now.path} and {before.path} have no item in common")
    if len(rows) < len(now):
        logger.warning("%d of %d items are in both files; the others are left out", len(rows), len(now))
    return _kept(now, rows), _kept(before, np.array([places[now.keys[row]] for row in rows], dtype=np.int64))


def _kept(items: Items, rows: Ints) -> Items:
    return dataclasses.replace(items.chosen(rows), unmatched=len(items) - len(rows))
