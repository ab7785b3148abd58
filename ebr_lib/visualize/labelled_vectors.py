"""The rows of an embedding file that can be drawn: their vectors, labels and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebr_lib.arrays import Floats, Ints, Vectors
from ebr_lib.data.embeddings.base import AGAIN, read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings, read_embeddings
from ebr_lib.errors import DataError
from ebr_lib.logs import logger
from ebr_lib.model.provenance import Provenance
from ebr_lib.tables import columns_of, shortened


@dataclass(frozen=True)
class LabelledVectors:
    """Rows whose vector has a direction, and how many rows of the file have none.

    :param unit: unit vectors, rows × dimensions.
    :param labels: label of each row; None where it has none. `texts` likewise.
    :param keys: identify the rows: values of an id column, or row numbers.
    :param columns: the kept columns that were asked for, whole.
    :param norms: lengths of the vectors before normalisation.
    :param zero: rows left out because their vector is all zeros; `without_vector`: because they have none.
    :param unmatched: rows left out because the file to compare with does not have them.
    """

    path: str
    unit: Vectors
    labels: Sequence[str | None]
    texts: Sequence[str | None]
    keys: Sequence[Any]
    norms: Floats
    zero: int
    without_vector: int
    unmatched: int = 0
    columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def rows_of_file(self) -> int:
        """All rows, including those left out."""
        return len(self) + self.zero + self.without_vector + self.unmatched

    def take(self, rows: Ints, **changes: Any) -> LabelledVectors:
        """Some of the rows, in the order given."""
        return dataclasses.replace(
            self,
            unit=self.unit[rows],
            labels=[self.labels[r] for r in rows],
            texts=[self.texts[r] for r in rows],
            keys=[self.keys[r] for r in rows],
            norms=self.norms[rows],
            columns={name: [values[r] for r in rows] for name, values in self.columns.items()},
            **changes,
        )


def columns_in(path: str) -> list[str]:
    """The kept columns of an embedding file."""
    return list(next(iter_embeddings(path)).columns)


def text_column_in(path: str) -> str | None:
    """The kept column that was encoded, by the manifest; else `description`, else the one with the longest texts."""
    columns = next(iter_embeddings(path)).columns
    encoded = Provenance.of(read_manifest(path) or {}).description_column
    if usual := next((name for name in (encoded, "description") if name in columns), None):
        return usual
    return max(columns, key=lambda name: sum(columns_of(value or "") for value in columns[name]), default=None)


def read_labelled(
    path: str, label: str | None, text: str | None, key: str | None, kept: Sequence[str] = ()
) -> LabelledVectors:
    """Read a file; without a `key` column, row numbers are the keys.

    :param kept: columns to keep whole beside label, text and key.

    :raises MissingError: the file does not exist.
    :raises DataError: it cannot be read, lacks a column, or all its vectors are zeros.
    """
    wanted = [name for name in (label, text, key, *kept) if name is not None]
    data = read_embeddings(path, list(dict.fromkeys(wanted)))
    vectors = data.vectors
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    rows = np.flatnonzero(norms > 0)
    if not len(rows):
        raise DataError(f"{path}: all {len(norms)} vectors are zeros; {AGAIN}")
    vectors /= np.maximum(norms, 1e-30)[:, None].astype(np.float32)
    nothing: list[str | None] = [None] * len(data)
    read = LabelledVectors(
        path,
        vectors,
        data.columns[label] if label else nothing,
        data.columns[text] if text else nothing,
        data.columns[key] if key else data.rows.tolist(),
        norms,
        zero=len(norms) - len(rows),
        without_vector=data.total - len(data),
        columns={name: data.columns[name] for name in kept},
    )
    return read if len(rows) == len(norms) else read.take(rows)


def read_both(
    path: str, path_before: str, *, label: str | None, text: str | None, key: str | None, kept: Sequence[str] = ()
) -> tuple[LabelledVectors, LabelledVectors]:
    """The rows that two files share, in the order of the first.

    :param key: the column that identifies rows; None matches them by their order.
    :raises DataError: rows cannot be matched, or none are in both files.
    """
    now = read_labelled(path, label, text, key, kept)
    if key is not None:
        return _matched(now, read_labelled(path_before, None, None, key), key)
    columns = columns_in(path)
    shared = [name for name in columns_in(path_before) if name in columns]
    witness = text if text in shared else next(iter(shared), None)
    before = read_labelled(path_before, None, witness, None)
    if now.rows_of_file != before.rows_of_file:
        raise DataError(
            f"{path} has {now.rows_of_file} rows, {path_before} has {before.rows_of_file}: "
            "set id_column to the column that identifies the rows"
        )
    now, before = _matched(now, before)
    if witness is None:
        logger.warning("按行序匹配 %s shares no column with the new file: rows are matched by their order", path_before)
    else:
        here = now if witness == text else read_labelled(path, None, witness, None)
        texts = dict(zip(here.keys, here.texts, strict=True))
        _check_same(witness, dataclasses.replace(now, texts=[texts[key] for key in now.keys]), before)
    return now, before


def _check_same(name: str, now: LabelledVectors, before: LabelledVectors) -> None:
    """Check rows that are matched by their order: a column of both files must be equal in them."""
    wrong = [i for i, (a, b) in enumerate(zip(now.texts, before.texts, strict=True)) if a != b]
    if wrong:
        row = wrong[0]
        raise DataError(
            f"{now.path} and {before.path} differ in {name} in {len(wrong)} rows. "
            f"Row {before.keys[row]}: {shortened(now.texts[row] or '')!r} here, {shortened(before.texts[row] or '')!r} "
            "there; set id_column to the column that identifies the rows"
        )


def _matched(
    now: LabelledVectors, before: LabelledVectors, key_column: str | None = None
) -> tuple[LabelledVectors, LabelledVectors]:
    """The rows whose keys are in both."""
    places = {key: row for row, key in enumerate(before.keys)}
    if key_column and len(places) < len(before):
        raise DataError(f"{before.path}: {key_column} is not unique; name a column that is in id_column")
    rows = np.array([row for row, key in enumerate(now.keys) if key in places], dtype=np.int64)
    if not len(rows):
        raise DataError(f"{now.path} and {before.path} have no item in common")
    if len(rows) < len(now):
        logger.warning("部分匹配 %d of %d items are in both files; the others are left out", len(rows), len(now))
    rows_before = np.array([places[now.keys[row]] for row in rows], dtype=np.int64)
    return (
        now.take(rows, unmatched=len(now) - len(rows)),
        before.take(rows_before, unmatched=len(before) - len(rows)),
    )
