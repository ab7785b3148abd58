"""Embedding files as delimited text, which Hive loads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.base import (
    AGAIN,
    DELIMITER,
    VECTOR,
    Embeddings,
    Fields,
    Sink,
    check_widths,
    choose_columns,
    empty_batch,
    vector_column,
)
from ebr_lib.data.fields import NULL
from ebr_lib.data.hive import BOM
from ebr_lib.errors import DataError

ROWS = "rows.txt"  # the work file of delimited text
BLOCK_BYTES = 1 << 24  # of text parsed at once
FORMAT_ROWS = 1 << 6  # formatted at once: their copies stay in the cache, and between them encoding gets the lock
SPACED = bytes.maketrans(b",", b" ")


def read_batches(
    path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
) -> Iterator[tuple[int, Embeddings]]:
    """Batches of delimited text; see `files.Reader`."""
    done = 0
    with open(path, "rb") as file:
        head = b"" if names else file.readline()
        if not head and not names:
            raise DataError(f"{path} is empty; {AGAIN}")
        header = head.rstrip(b"\r\n").removeprefix(BOM).decode("utf-8", "replace").split("\x01")
        found = list(names or header)
        place = vector_column(path, found)
        wanted = [(name, found.index(name)) for name in choose_columns(path, found, columns)]
        yield len(head), empty_batch((name for name, _ in wanted), dim)
        carriage = b"\r" if head.endswith(b"\r\n") else b""
        while block := file.readlines(BLOCK_BYTES):
            fields = [line.removesuffix(b"\n").removesuffix(carriage).split(DELIMITER) for line in block]
            check_widths(path, fields, len(found), done - bool(names))
            rows = np.array([i for i, row in enumerate(fields) if row[place]], dtype=np.int64)
            vectors = _parse_vectors(path, [fields[i][place] for i in rows], rows + done, dim)
            dim = dim or vectors.shape[1]
            kept = {name: decoded_texts(path, [row[at] for row in fields]) for name, at in wanted}
            yield sum(map(len, block)), Embeddings(vectors, kept, rows, len(block))
            done += len(block)


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


def _parse_vectors(path: Path, texts: list[bytes], rows: Ints, dim: int | None) -> Vectors:
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


def _vector_error(path: Path, texts: list[bytes], rows: Ints, dim: int) -> DataError:
    """What is wrong with a block that does not parse: lengths first, then the values that are not numbers."""
    numbered = list(zip(rows.tolist(), (text.split(b" ") for text in texts), strict=True))
    ragged = [f"row {row} (line {row + 2}) holds {len(values)}" for row, values in numbered if len(values) != dim]
    if ragged:
        return DataError(
            f"{path}: vectors of different lengths: {dim} numbers in its first row, but {_first_five(ragged)}; "
            f"every row needs the same model and dimensions: {AGAIN}"
        )
    bad = ((row, next((value for value in values if not _is_number(value)), None)) for row, values in numbered)
    wrong = [f"{value[:40]!r} in row {row} (line {row + 2})" for row, value in bad if value is not None]
    if not wrong:
        return DataError(f"{path}: the vectors of rows {rows[0]} to {rows[-1]} cannot be read")
    return DataError(f"{path}: `{VECTOR}` holds non-finite values: {_first_five(wrong)}; {AGAIN}")


def _first_five(found: Sequence[str]) -> str:
    return ", ".join(found[:5]) + (f" and {len(found) - 5} rows more" if len(found) > 5 else "")


def _is_number(value: bytes) -> bool:
    try:
        return bool(np.isfinite(np.float32(float(value))))
    except ValueError:
        return False


def vector_texts(vectors: Vectors) -> list[bytes]:
    """Each row as shortest round-trip decimals (Ryu, through orjson) separated by single spaces."""
    import orjson

    if not len(vectors):
        return []
    listed = orjson.dumps(np.ascontiguousarray(vectors, dtype=np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return listed[2:-2].translate(SPACED).split(b"] [")


def line_of(fields: Fields) -> bytes:
    """A row of delimited text, without its newline."""
    return DELIMITER.join([NULL if field is None else field for field in fields])


class TextSink(Sink):
    """Delimited text, with a header row where it is wanted: the kept columns, then the vector."""

    PLACES = {ROWS: Path}  # noqa: RUF012 - not changed

    def begin(self, header: bool) -> None:
        """Write the names of the columns."""
        if header:
            self.files[ROWS].write("\x01".join([*self.columns, VECTOR]).encode() + b"\n")

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows as lines; see `Sink`."""
        for start in range(0, len(rows), FORMAT_ROWS):
            part = slice(start, start + FORMAT_ROWS)
            texts = iter(vector_texts(vectors[part][valid[part]]))
            filled = zip(rows[part], valid[part].tolist(), strict=True)
            lines = [line_of([*row, next(texts) if has_one else b""]) for row, has_one in filled]
            self.files[ROWS].write(b"\n".join(lines) + b"\n")
