"""Embedding files: what all formats share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.fields import NULL
from ebr_lib.errors import DataError
from ebr_lib.names import VectorType

DELIMITER = b"\x01"
VECTOR = "vector"
SCALE = "vector_scale"  # the column of what int8 and bits are multiplied with
AGAIN = "write it again"  # the way out of most of what can be wrong with such a file
PART_PREFIX = "part-"  # of the files of a folder that is one embedding file
TEXT, PARQUET, NPY = ".txt", ".parquet", ".npy"
ENDINGS = (TEXT, ".csv", ".tsv", PARQUET, NPY)
BATCH_ROWS = 1 << 14

Fields = Sequence[bytes | None]


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embedding file.

    :param vectors: float32, rows × dimensions.
    :param columns: the other columns, one text (None for null) per row.
    :param rows: number of each row in the file, from 0. Rows without a vector are left out, unless asked for: then
        their vector is NaN.
    :param total: rows that were read, including those without a vector.
    """

    vectors: Vectors
    columns: dict[str, list[str | None]]
    rows: Ints
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which rows hold a vector."""
        return ~np.isnan(self.vectors[:, 0]) if self.vectors.shape[1] else np.zeros(len(self), dtype=bool)


def empty_batch(names: Iterable[str], dim: int | None) -> Embeddings:
    """A batch without rows: the first of every file, so that a file without rows has its columns too."""
    return Embeddings(np.empty((0, dim or 0), np.float32), {name: [] for name in names}, np.empty(0, np.int64), 0)


def ending_of(path: str | Path) -> str:
    """The ending that names the format of an embedding file, in lower case; `.txt` for any other name."""
    ending = Path(path).suffix.lower()
    return ending if ending in ENDINGS else TEXT


def is_text(path: str | Path) -> bool:
    """Whether the kept columns of an embedding file are delimited text, which cannot hold every value."""
    return ending_of(path) != PARQUET


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of an embedding file lies: beside it, as `<name>.json`."""
    return Path(f"{path}.json")


def ids_path(path: str | Path) -> Path:
    """Where the kept columns of an `.npy` file lie: delimited text beside it, row for row."""
    return Path(path).with_suffix(".ids.txt")


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """The manifest of an embedding file, or None where there is none.

    :raises DataError: it cannot be read.
    """
    place = place_beside(path, manifest_path)
    if not place.is_file():
        return None
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{place} is not a readable manifest ({error}); remove it, or {AGAIN}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{place}: wanted a JSON object, found {type(manifest).__name__}; {AGAIN}")
    return manifest


def place_beside(path: str | Path, place_of: Callable[[str | Path], Path]) -> Path:
    """A file beside an embedding file; for a link without one, the file beside the link's target."""
    here = place_of(path)
    return here if here.is_file() or not Path(path).is_symlink() else place_of(Path(path).resolve())


# --- checks of what is read ---------------------------------------------------------------------------------------


def choose_columns(
    path: Path, found: Sequence[str], columns: Sequence[str] | None, own: Sequence[str] = (VECTOR,)
) -> list[str]:
    """The columns to read; None takes all but the vectors' own.

    :raises DataError: a column is not in the file.
    """
    if columns is None:
        return [name for name in found if name not in own]
    if missing := [name for name in columns if name not in found]:
        raise DataError(f"{path}: no column {', '.join(missing)}; its columns are {', '.join(found)}")
    return list(columns)


def vector_column(path: Path, found: Sequence[str]) -> int:
    """The number of the column `vector`, from 0.

    :raises DataError: there is none.
    """
    if VECTOR not in found:
        shown = ", ".join(name[:40] for name in found[:20]) or "none"
        raise DataError(
            f"{path}: no column `{VECTOR}`; its columns are {shown} (fields are split by \\001). A file without a "
            "header row needs its manifest beside it, whose name ends in .json"
        )
    return list(found).index(VECTOR)


def check_widths(path: Path, fields: list[list[bytes]], wanted: int, done: int) -> None:
    """Check that every line has as many fields as the header.

    :raises DataError: names the first lines that differ.
    """
    wrong = [i for i, row in enumerate(fields) if len(row) != wanted]
    if wrong:
        shown = "; ".join(f"line {done + i + 2} has {len(fields[i])}" for i in wrong[:5])
        raise DataError(
            f"{path}: the header names {wanted} columns, but {shown}; the file was cut short or edited: {AGAIN}"
        )


def check_finite(path: Path, vectors: Vectors, rows: Ints) -> None:
    """Check that all vectors are finite.

    :raises DataError: names the first rows that are not.
    """
    wrong = rows[~np.isfinite(vectors).all(axis=1)]
    if wrong.size:
        more = f" and {wrong.size - 5} more" if wrong.size > 5 else ""
        raise DataError(
            f"{path}: `{VECTOR}` holds a non-finite number in row {', '.join(map(str, wrong[:5]))}{more}; {AGAIN}"
        )


# --- writing ------------------------------------------------------------------------------------------------------


class Sink:
    """Takes rows in order into append-only work files, so that an interrupted run can cut them to a known size.

    :param columns: names of the kept columns.
    :param dim: dimensions of the vectors.
    :param sizes: what `commit` returned when the run was interrupted; what was written since is cut off.
    :param header: text begins with the names of its columns.
    :param vector_type: numbers that are stored; text holds float32.
    """

    PLACES: ClassVar[Mapping[str, Callable[[Path], Path]]]
    """Names of the work files; where each goes for the place of the embedding file, in this order."""

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        dim: int,
        sizes: Mapping[str, int] | None,
        *,
        header: bool,
        vector_type: VectorType,
    ) -> None:
        self.columns, self.dim, self.vector_type = list(columns), dim, vector_type
        self.files = {name: open_work(folder / name, sizes) for name in self.PLACES}
        if sizes is None:
            self.begin(header)

    def begin(self, header: bool) -> None:
        """Write what comes before the first row."""
        raise NotImplementedError

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows: the kept fields as UTF-8 (None for null), their vectors, and which rows have one."""
        raise NotImplementedError

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; returns the size of each work file in bytes."""
        return {name: sync(file) for name, file in self.files.items()}

    def close(self) -> None:
        """Close the work files."""
        for file in self.files.values():
            file.close()

    @classmethod
    def reopen(cls, place: Path, folder: Path) -> dict[str, int]:
        """Copy a finished embedding file back into work files, to append to it; returns their sizes."""
        for name, place_of in cls.PLACES.items():
            shutil.copyfile(place_of(place), folder / name)
        return {name: (folder / name).stat().st_size for name in cls.PLACES}

    @classmethod
    def finish(cls, folder: Path, place: Path) -> None:
        """Move the work files to their places; may be called again after an interruption."""
        for name, place_of in cls.PLACES.items():
            if (folder / name).exists():  # else it was moved before the interruption
                os.replace(folder / name, place_of(place))


def open_work(path: Path, sizes: Mapping[str, int] | None) -> IO[bytes]:
    """Open a work file: a new one, or an interrupted run's, cut to the size that was committed."""
    if sizes is None:
        return open(path, "wb")
    file = open(path, "r+b")  # noqa: SIM115 - its user closes it
    file.truncate(sizes[path.name])
    file.seek(0, os.SEEK_END)
    return file


def sync(file: IO[bytes]) -> int:
    """Bring a file to the disk; returns its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def is_plain(value: bytes | None) -> bool:
    """Whether delimited text can hold a value: it has no `\\001` or newline, and is not the null `\\N`."""
    return value is None or not (DELIMITER in value or b"\n" in value or value == NULL)


def plain(value: bytes | None) -> bytes | None:
    """A value as delimited text can hold it: a space for each `\\001` or newline, None for `\\N`."""
    if value is None or value == NULL:
        return None
    if DELIMITER not in value and b"\n" not in value:
        return value
    return value.replace(b"\r\n", b" ").replace(b"\n", b" ").replace(DELIMITER, b" ")
