"""Embedding files: what all formats share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.fields import NULL
from ebr_lib.errors import DataError

DELIMITER = b"\x01"
VECTOR = "vector"
AGAIN = "run the inference again"  # what helps against most of what can be wrong with such a file
PART_PREFIX = "part-"  # of the files of a folder that is one embedding file
TEXT, PARQUET, NPY = ".txt", ".parquet", ".npy"
ENDINGS = (TEXT, ".csv", ".tsv", PARQUET, NPY)
BATCH_ROWS = 1 << 14

Fields = Sequence[bytes | None]


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embedding file.

    :param vectors: float32, rows × dimensions.
    :param columns: the other columns, one text (None for null) a row.
    :param rows: number of each row in the file, from 0. Rows without a vector are left out, unless asked for: then
        their vector is NaN.
    :param total: rows that were read, those without a vector included.
    """

    vectors: Vectors
    columns: dict[str, list[str | None]]
    rows: NDArray[np.int64]
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which rows hold a vector."""
        return ~np.isnan(self.vectors[:, 0]) if self.vectors.shape[1] else np.zeros(len(self), dtype=bool)


def ending_of(path: str | Path) -> str:
    """The ending that says which format an embedding file has, in lower case; `.txt` where a name has none of them."""
    ending = Path(path).suffix.lower()
    return ending if ending in ENDINGS else TEXT


def is_text(path: str | Path) -> bool:
    """Whether the kept columns of an embedding file are delimited text, which cannot hold every value."""
    return ending_of(path) != PARQUET


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of an embedding file lies: beside it, with `.json` put behind its whole name."""
    return Path(f"{path}.json")


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """The manifest of an embedding file, or None where there is none.

    :raises DataError: there is one and it cannot be read.
    """
    place = place_beside(path, manifest_path)
    if not place.is_file():
        return None
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{place} is no readable manifest ({error}); remove it, or {AGAIN}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{place}: wanted a JSON object, found {type(manifest).__name__}; {AGAIN}")
    return manifest


def place_beside(path: str | Path, place_of: Callable[[str | Path], Path]) -> Path:
    """A file that lies beside an embedding file; of a link, beside what it leads to where the link has none itself."""
    here = place_of(path)
    return here if here.is_file() or not Path(path).is_symlink() else place_of(Path(path).resolve())


def chosen(path: Path, found: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """The columns to read, checked against those that are there."""
    if columns is None:
        return [name for name in found if name != VECTOR]
    if missing := [name for name in columns if name not in found]:
        raise DataError(f"{path}: no column {', '.join(missing)}; its columns are {', '.join(found)}")
    return list(columns)


def need_vector(path: Path, found: Sequence[str]) -> int:
    """The place of the column `vector`.

    :raises DataError: there is none.
    """
    if VECTOR not in found:
        shown = ", ".join(name[:40] for name in found[:20]) or "none"
        raise DataError(
            f"{path}: no column `{VECTOR}`; its columns are {shown} (fields are split by \\001). A file without a "
            "header row (output_header: false) needs its manifest beside it, whose name ends in .json"
        )
    return list(found).index(VECTOR)


class Format(Protocol):
    """One kind of embedding file. `batches` yields (bytes read, rows): all columns' rows, vectors of the valid rows."""

    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]: ...

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink: ...

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]: ...

    def finish(self, folder: Path, place: Path) -> None: ...


def move(work: Path, place: Path) -> None:
    """Put a finished file in its place, unless an interrupted run has."""
    if work.exists():  # else it was moved before the run was interrupted
        os.replace(work, place)


def no_rows() -> NDArray[np.int64]:
    """Numbers of no row."""
    return np.empty(0, dtype=np.int64)


def check_widths(path: Path, fields: list[list[bytes]], wanted: int, done: int) -> None:
    """Make sure that every line has the header's number of fields.

    :raises DataError: names the first lines that have not.
    """
    wrong = [i for i, row in enumerate(fields) if len(row) != wanted]
    if wrong:
        shown = "; ".join(f"line {done + i + 2} has {len(fields[i])}" for i in wrong[:5])
        raise DataError(
            f"{path}: the header names {wanted} columns, but {shown}; the file was cut short or edited: {AGAIN}"
        )


def check_finite(path: Path, vectors: Vectors, rows: NDArray[np.int64]) -> None:
    """Make sure that no vector holds a NaN or an infinite value.

    :raises DataError: names the first rows that do.
    """
    wrong = rows[~np.isfinite(vectors).all(axis=1)]
    if wrong.size:
        more = f" and {wrong.size - 5} more" if wrong.size > 5 else ""
        raise DataError(
            f"{path}: `{VECTOR}` holds a value that is no finite number in row {', '.join(map(str, wrong[:5]))}{more}; "
            f"{AGAIN}"
        )


# --- npy ----------------------------------------------------------------------------------------------------------


def ids_path(path: str | Path) -> Path:
    """Where the kept columns of an `.npy` file lie: delimited text beside it, row for row."""
    return Path(path).with_suffix(".ids.txt")


# --- writing ------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes rows in order into append-only work files, so that an interrupted run can cut them to a known size."""

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows: the kept fields as UTF-8 (None for null), their vectors, and which rows have one."""

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; returns the size of each work file."""

    def close(self) -> None:
        """Let go of the work files."""


def open_work(path: Path, sizes: Mapping[str, int] | None) -> IO[bytes]:
    """Open a work file: a new one, or an interrupted run's, cut to the size that is known to be whole."""
    if sizes is None:
        return open(path, "wb")
    file = open(path, "r+b")  # noqa: SIM115 - the sink closes it
    file.truncate(sizes[path.name])
    file.seek(0, os.SEEK_END)
    return file


def sync(file: IO[bytes]) -> int:
    """Bring a file to the disk; returns its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def is_plain(value: bytes | None) -> bool:
    """Whether delimited text can hold a value: no `\\001` or newline in it, and not what stands for null."""
    return value is None or not (DELIMITER in value or b"\n" in value or value == NULL)


def plain(value: bytes | None) -> bytes | None:
    """A value as delimited text can hold it: a space for each `\\001` or newline; `\\N` alone, which is null there."""
    if value is None or value == NULL:
        return None
    if DELIMITER not in value and b"\n" not in value:
        return value
    return value.replace(b"\r\n", b" ").replace(b"\n", b" ").replace(DELIMITER, b" ")


def check_plain(path: Path, rows: Iterable[Fields]) -> None:
    """Make sure that delimited text can hold the rows.

    :raises DataError: names the first value that it cannot.
    """
    for number, row in enumerate(rows):
        for value in row:
            if not is_plain(value):
                raise DataError(f"{path}: row {number}: {value!r} cannot stand in delimited text; write .parquet")
