"""Embedding files as delimited text, which Hive loads."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings.base import (
    AGAIN,
    DELIMITER,
    VECTOR,
    Embeddings,
    Fields,
    Sink,
    check_widths,
    chosen,
    move,
    need_vector,
    no_rows,
    open_work,
    sync,
)
from ebr_lib.data.fields import NULL
from ebr_lib.data.hive import BOM
from ebr_lib.errors import DataError

BLOCK_BYTES = 1 << 24  # of text parsed at once
FORMAT_ROWS = 1 << 6  # formatted at once: their copies stay in the cache, and between them encoding gets the lock
SPACED = bytes.maketrans(b",", b" ")


def _line_blocks(file: IO[bytes], carriage: bytes) -> Iterator[list[bytes]]:
    """Whole lines of a file, about `BLOCK_BYTES` at a time, without their newlines and the `carriage` before them."""
    while lines := file.readlines(BLOCK_BYTES):
        yield [line.removesuffix(b"\n").removesuffix(carriage) for line in lines]


class TextFormat:
    """Vectors as decimals between the other fields."""

    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]:
        done = 0
        with open(path, "rb") as file:
            head = b"" if names else file.readline()
            if not head and not names:
                raise DataError(f"{path} is empty; {AGAIN}")
            found = (
                list(names)
                if names
                else head.rstrip(b"\r\n").removeprefix(BOM).decode("utf-8", "replace").split("\x01")
            )
            place = need_vector(path, found)
            wanted = [(name, found.index(name)) for name in chosen(path, found, columns)]
            yield len(head), Embeddings(np.empty((0, dim or 0), np.float32), {n: [] for n, _ in wanted}, no_rows(), 0)
            for lines in _line_blocks(file, b"\r" if head.endswith(b"\r\n") else b""):
                fields = [line.split(DELIMITER) for line in lines]
                check_widths(path, fields, len(found), done - bool(names))
                rows = np.array([i for i, row in enumerate(fields) if row[place]], dtype=np.int64)
                vectors = _parse_vectors(path, [fields[i][place] for i in rows], rows + done, dim)
                dim = dim or vectors.shape[1]
                kept = {name: decoded_texts(path, [row[at] for row in fields]) for name, at in wanted}
                yield sum(map(len, lines)) + len(lines), Embeddings(vectors, kept, rows, len(lines))
                done += len(lines)

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink:
        return TextSink(folder, columns, sizes, header=header)

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]:
        shutil.copyfile(path, folder / TextSink.NAME)
        return {TextSink.NAME: path.stat().st_size}

    def finish(self, folder: Path, place: Path) -> None:
        move(folder / TextSink.NAME, place)


def decoded_texts(path: Path, values: list[bytes]) -> list[str | None]:
    """Fields as texts, None for null.

    :raises DataError: they are not UTF-8.
    """
    try:
        return [None if value == NULL else value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); embedding files are UTF-8") from error


@functools.cache
def _float_columns(dim: int) -> dict[str, Any]:
    import polars

    return {str(i): polars.Float32 for i in range(dim)}


def _parse_vectors(path: Path, texts: list[bytes], rows: NDArray[np.int64], dim: int | None) -> Vectors:
    """Parse the decimals of whole rows; polars rounds each to the nearest float32, hence the same bits come back."""
    import polars

    if not texts:
        return np.empty((0, dim or 0), np.float32)
    dim = dim or texts[0].count(b" ") + 1
    try:
        frame = polars.read_csv(
            b"\n".join(texts), has_header=False, separator=" ", schema=_float_columns(dim), quote_char=None
        )
    except polars.exceptions.PolarsError:
        raise _vector_error(path, texts, rows, dim) from None
    vectors = frame.to_numpy(order="c")
    if len(vectors) != len(texts) or not np.isfinite(vectors).all():  # a short row is filled with nulls
        raise _vector_error(path, texts, rows, dim)
    return vectors


def _vector_error(path: Path, texts: list[bytes], rows: NDArray[np.int64], dim: int) -> DataError:
    """Say what is wrong with a block that does not parse: lengths first, then the values that are no numbers."""
    ragged = [(int(row), len(text.split(b" "))) for row, text in zip(rows, texts, strict=True)]
    ragged = [(row, length) for row, length in ragged if length != dim]
    if ragged:
        shown = ", ".join(f"row {row} (line {row + 2}) holds {length}" for row, length in ragged[:5])
        more = f" and {len(ragged) - 5} rows more" if len(ragged) > 5 else ""
        return DataError(
            f"{path}: vectors of different lengths: {dim} numbers in its first row, but {shown}{more}; "
            f"every row needs the same model and truncate_dim: {AGAIN}"
        )
    wrong = [(row, value) for row, text in zip(rows, texts, strict=True) if (value := _no_number(text)) is not None]
    if not wrong:
        return DataError(f"{path}: the vectors of rows {rows[0]} to {rows[-1]} cannot be read")
    shown = ", ".join(f"{value[:40]!r} in row {row} (line {row + 2})" for row, value in wrong[:5])
    more = f" and {len(wrong) - 5} rows more" if len(wrong) > 5 else ""
    return DataError(f"{path}: `{VECTOR}` holds values that are no finite numbers: {shown}{more}; {AGAIN}")


def _no_number(vector: bytes) -> bytes | None:
    """The first of a vector's values that is no finite number."""
    return next((value for value in vector.split(b" ") if not _is_number(value)), None)


def _is_number(value: bytes) -> bool:
    try:
        return bool(np.isfinite(np.float32(float(value))))
    except ValueError:
        return False


def _vector_texts(vectors: Vectors) -> list[bytes]:
    """Each row as shortest round-trip decimals (Ryu, through orjson) separated by single spaces."""
    import orjson

    if not len(vectors):
        return []
    listed = orjson.dumps(np.ascontiguousarray(vectors, dtype=np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return listed[2:-2].translate(SPACED).split(b"] [")


def _line(fields: Fields) -> bytes:
    return DELIMITER.join([NULL if field is None else field for field in fields])


class TextSink:
    """Delimited text, with a header row where it is wanted: the kept columns, then the vector."""

    NAME = "rows.txt"

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        sizes: Mapping[str, int] | None,
        with_vector: bool = True,
        header: bool = True,
    ) -> None:
        self._path = folder / self.NAME
        self._file = open_work(self._path, sizes)
        if sizes is None and header:
            names = [*columns, VECTOR] if with_vector else list(columns)
            self._file.write("\x01".join(names).encode() + b"\n")

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows as lines; see `Sink`."""
        for start in range(0, len(rows), FORMAT_ROWS):
            part = slice(start, start + FORMAT_ROWS)
            texts = iter(_vector_texts(vectors[part][valid[part]]))
            filled = zip(rows[part], valid[part].tolist(), strict=True)
            lines = [_line([*row, next(texts) if has_one else b""]) for row, has_one in filled]
            self._file.write(b"\n".join(lines) + b"\n")

    def append_fields(self, rows: Sequence[Fields]) -> None:
        """Append rows of a file that holds no vectors."""
        self._file.writelines(_line(row) + b"\n" for row in rows)

    def commit(self) -> dict[str, int]:
        """Bring the lines to the disk; see `Sink`."""
        return {self.NAME: sync(self._file)}

    def close(self) -> None:
        """Let go of the work file."""
        self._file.close()
