"""Embedding files as `.npy`, with a text file of the other columns beside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
    chosen,
    ids_path,
    move,
    open_work,
    place_beside,
    sync,
)
from ebr_lib.data.embeddings.text import TextSink, decoded_texts
from ebr_lib.errors import DataError


class NpyFormat:
    """Vectors as one array, the other columns as delimited text beside it."""

    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]:
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

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink:
        return NpySink(folder, columns, dim, sizes)

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]:
        places = {NpySink.NAME: path, TextSink.NAME: ids_path(path)}
        for name, place in places.items():
            shutil.copyfile(place, folder / name)
        return {name: place.stat().st_size for name, place in places.items()}

    def finish(self, folder: Path, place: Path) -> None:
        move(folder / TextSink.NAME, ids_path(place))
        move(folder / NpySink.NAME, place)


def _read_ids(path: Path, columns: Sequence[str] | None, rows: int) -> dict[str, list[str | None]]:
    place = place_beside(path, ids_path)
    if not place.is_file():
        chosen(path, [VECTOR], columns)
        return {}
    with open(place, "rb") as file:
        found = file.readline().rstrip(b"\n").decode().split("\x01")
        wanted = chosen(place, found, columns)
        fields = [line.removesuffix(b"\n").split(DELIMITER) for line in file]
    check_widths(place, fields, len(found), 0)
    if len(fields) != rows:
        raise DataError(f"{place} holds {len(fields)} rows, {path} {rows}; {AGAIN}")
    return {name: decoded_texts(place, [row[found.index(name)] for row in fields]) for name in wanted}


class NpySink:
    """A float32 array (NaN where a row has no vector), and the kept columns as text beside it."""

    NAME = "rows.npy"

    def __init__(self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None) -> None:
        self._path = folder / self.NAME
        self._file = open_work(self._path, sizes)
        self._dim = dim
        self._ids = TextSink(folder, columns, sizes, with_vector=False)
        if sizes is None:
            self._file.write(self._header(0))

    def _header(self, rows: int) -> bytes:
        """The header for so many rows; numpy leaves room in it for the first axis to grow, so its size is fixed."""
        import io

        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (rows, self._dim)})
        return head.getvalue()

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows to the array and to the texts beside it; see `Sink`."""
        filled = np.where(valid[:, None], vectors, np.float32("nan")).astype("<f4", copy=False)
        self._file.write(filled.tobytes())
        self._ids.append_fields(rows)

    def commit(self) -> dict[str, int]:
        """Write into the array's header how many rows it has, and bring both files to the disk; see `Sink`."""
        rows = (self._file.tell() - len(self._header(0))) // (4 * self._dim)
        self._file.seek(0)
        self._file.write(self._header(rows))
        self._file.seek(0, os.SEEK_END)
        return {self.NAME: sync(self._file)} | self._ids.commit()

    def close(self) -> None:
        """Let go of both work files."""
        self._file.close()
        self._ids.close()
