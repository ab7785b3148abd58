"""Embedding files as `.npy`, with a text file of the other columns beside."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings.base import (
    AGAIN,
    BATCH_ROWS,
    DELIMITER,
    VECTOR,
    Embeddings,
    Fields,
    Sink,
    check_finite,
    check_widths,
    choose_columns,
    ids_path,
    place_beside,
)
from ebr_lib.data.embeddings.text import ROWS, decoded_texts, line_of
from ebr_lib.errors import DataError


def read_batches(
    path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
) -> Iterator[tuple[int, Embeddings]]:
    """Batches of an array and of the texts beside it; see `files.Reader`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a complete .npy file ({error}); {AGAIN}") from error
    if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        raise DataError(f"{path}: wanted floats of rows × dimensions, found {array.dtype} of shape {array.shape}")
    if dim and array.shape[1] != dim:
        raise DataError(f"{path}: vectors of {array.shape[1]} numbers, in the files before it {dim}")
    ids = _read_ids(path, columns, len(array))
    for start in range(0, max(1, len(array)), BATCH_ROWS):
        chunk = np.asarray(array[start : start + BATCH_ROWS], dtype=np.float32)
        rows = np.flatnonzero(~np.isnan(chunk).all(axis=1))
        check_finite(path, chunk[rows], rows + start)
        kept = {name: values[start : start + BATCH_ROWS] for name, values in ids.items()}
        yield chunk.nbytes, Embeddings(chunk[rows], kept, rows, len(chunk))


def _read_ids(path: Path, columns: Sequence[str] | None, rows: int) -> dict[str, list[str | None]]:
    place = place_beside(path, ids_path)
    if not place.is_file():
        choose_columns(path, [VECTOR], columns)
        return {}
    with open(place, "rb") as file:
        found = file.readline().rstrip(b"\n").decode().split("\x01")
        wanted = choose_columns(place, found, columns)
        fields = [line.removesuffix(b"\n").split(DELIMITER) for line in file]
    check_widths(place, fields, len(found), 0)
    if len(fields) != rows:
        raise DataError(f"{place} holds {len(fields)} rows, {path} {rows}; {AGAIN}")
    return {name: decoded_texts(place, [row[found.index(name)] for row in fields]) for name in wanted}


class NpySink(Sink):
    """A float32 array (NaN where a row has no vector), and the kept columns as text beside it."""

    ARRAY = "rows.npy"
    PLACES = {ROWS: ids_path, ARRAY: Path}  # noqa: RUF012 - not changed

    def begin(self, header: bool) -> None:
        """Write the array's header, and the names of the columns."""
        self.files[self.ARRAY].write(self._header(0))
        self.files[ROWS].write("\x01".join(self.columns).encode() + b"\n")

    def _header(self, rows: int) -> bytes:
        """The array's header; numpy leaves room in it for the first axis to grow, so its size is fixed."""
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (rows, self.dim)})
        return head.getvalue()

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows to the array and to the texts beside it; see `Sink`."""
        filled = np.where(valid[:, None], vectors, np.float32("nan")).astype("<f4", copy=False)
        self.files[self.ARRAY].write(filled.tobytes())
        self.files[ROWS].writelines(line_of(row) + b"\n" for row in rows)

    def commit(self) -> dict[str, int]:
        """Write the number of rows into the array's header, and bring both files to the disk; see `Sink`."""
        array = self.files[self.ARRAY]
        rows = (array.tell() - len(self._header(0))) // (4 * self.dim)
        array.seek(0)
        array.write(self._header(rows))
        array.seek(0, os.SEEK_END)
        return super().commit()
