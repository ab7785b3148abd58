"""Embedding files as `.npy`, with a text file of the other columns beside."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings.base import (
    AGAIN,
    BATCH_ROWS,
    DELIMITER,
    SCALE,
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
from ebr_lib.data.embeddings.codes import DTYPES, dimensions, no_scales, own_columns, quantised, restored, stored_width
from ebr_lib.data.embeddings.text import ROWS, decoded_texts, line_of, vector_texts
from ebr_lib.errors import DataError


def read_batches(
    path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
) -> Iterator[tuple[int, Embeddings]]:
    """Batches of an array and of the texts beside it; see `files.Reader`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a complete .npy file ({error}); {AGAIN}") from error
    coded = array.dtype in (np.int8, np.uint8)
    if array.ndim != 2 or not (coded or array.dtype.kind == "f") or not array.shape[1]:
        raise DataError(f"{path}: wanted floats of rows × dimensions, found {array.dtype} of shape {array.shape}")
    if dim and (found := dimensions(array.shape[1], array.dtype)) != dim:
        raise DataError(f"{path}: vectors of {found} numbers, in the files before it {dim}")
    ids = _read_ids(path, columns, array, (VECTOR, SCALE) if coded else (VECTOR,))
    scales = _scales(path, ids.pop(SCALE)) if coded else None
    for start in range(0, max(1, len(array)), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        chunk = restored(np.asarray(array[part]), None if scales is None else scales[part])
        rows = np.flatnonzero(~np.isnan(chunk).all(axis=1))
        check_finite(path, chunk[rows], rows + start)
        kept = {name: values[part] for name, values in ids.items()}
        yield array[part].nbytes, Embeddings(chunk[rows], kept, rows, len(chunk))


def number_bytes(path: Path) -> int:
    """Bytes of each number of the vectors."""
    return int(np.load(path, mmap_mode="r", allow_pickle=False).dtype.itemsize)


def _scales(path: Path, texts: Sequence[str | None]) -> Vectors:
    """The scale of each row, NaN where it has no vector."""
    try:
        return np.array([np.nan if text is None else float(text) for text in texts], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{ids_path(path)}: `{SCALE}` holds no number ({error}); {AGAIN}") from error


def _read_ids(
    path: Path, columns: Sequence[str] | None, array: NDArray[Any], own: Sequence[str]
) -> dict[str, list[str | None]]:
    """The columns wanted, and the one of the scales, if that is among the vectors' `own`."""
    place, rows = place_beside(path, ids_path), len(array)
    if not place.is_file():
        if SCALE in own:
            raise no_scales(path, array.dtype)
        choose_columns(path, own, columns)
        return {}
    with open(place, "rb") as file:
        found = file.readline().rstrip(b"\n").decode().split("\x01")
        if SCALE in own and SCALE not in found:
            raise no_scales(path, array.dtype)
        wanted = [*choose_columns(place, found, columns, own), *own[1:]]
        fields = [line.removesuffix(b"\n").split(DELIMITER) for line in file]
    check_widths(place, fields, len(found), 0)
    if len(fields) != rows:
        raise DataError(f"{place} holds {len(fields)} rows, {path} {rows}; {AGAIN}")
    return {name: decoded_texts(place, [row[found.index(name)] for row in fields]) for name in wanted}


class NpySink(Sink):
    """An array (NaN where a row has no vector, 0 in whole numbers), and the kept columns as text beside it, at their
    end the scales of whole numbers."""

    ARRAY = "rows.npy"
    PLACES = {ROWS: ids_path, ARRAY: Path}  # noqa: RUF012 - not changed

    def begin(self, header: bool) -> None:
        """Write the array's header, and the names of the columns."""
        self.files[self.ARRAY].write(self._header(0))
        names = [*self.columns, *own_columns(self.vector_type)[1:]]
        self.files[ROWS].write("\x01".join(names).encode() + b"\n")

    def _header(self, rows: int) -> bytes:
        """The array's header; numpy leaves room in it for the first axis to grow, so its size is fixed."""
        head = io.BytesIO()
        shape = (rows, stored_width(self.dim, self.vector_type))
        descr = DTYPES[self.vector_type]
        np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
        return head.getvalue()

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows to the array and to the texts beside it; see `Sink`."""
        codes, scales = quantised(vectors, valid, self.vector_type)
        if scales is None:
            codes = np.where(valid[:, None], codes, codes.dtype.type("nan"))
        else:
            texts = [
                text if has_one else None for text, has_one in zip(vector_texts(scales[:, None]), valid, strict=True)
            ]
            rows = [[*row, text] for row, text in zip(rows, texts, strict=True)]
        self.files[self.ARRAY].write(codes.tobytes())
        self.files[ROWS].writelines(line_of(row) + b"\n" for row in rows)

    def commit(self) -> dict[str, int]:
        """Write the number of rows into the array's header, and bring both files to the disk; see `Sink`."""
        array = self.files[self.ARRAY]
        row_bytes = np.dtype(DTYPES[self.vector_type]).itemsize * stored_width(self.dim, self.vector_type)
        rows = (array.tell() - len(self._header(0))) // row_bytes
        array.seek(0)
        array.write(self._header(rows))
        array.seek(0, os.SEEK_END)
        return super().commit()
