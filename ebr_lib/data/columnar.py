"""Parquet and ORC as rows of text, for every kind of column that has one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.containers import ORC, readable
from ebr_lib.errors import DataError
from ebr_lib.logs import logger

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4096


class NoTextError(DataError):
    """A column of a columnar file has no text."""


def read_schema(path: Path, kind: str) -> tuple[pa.Schema, int]:
    """Columns of a file, and its number of rows.

    :raises MissingError, DataError: see `readable`.
    """
    with readable(path, kind):
        if kind == ORC:
            from pyarrow import orc

            file = orc.ORCFile(str(path))
            return file.schema, file.nrows
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows


def read_batches(path: Path, kind: str, columns: Sequence[str], start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of rows, each with the number of its first row from 1; whole groups before row `start` are not read.

    :raises MissingError, DataError: see `readable`.
    """
    with readable(path, kind):
        yield from (_orc_batches if kind == ORC else _parquet_batches)(path, columns, start)


def _parquet_batches(path: Path, columns: Sequence[str], start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    import pyarrow.parquet as pq

    done = 0
    with pq.ParquetFile(path) as file:
        groups: list[int] = []
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not groups and done + rows < start:
                done += rows
            else:
                groups.append(group)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns)):
            yield done + 1, batch
            done += len(batch)


def _orc_batches(path: Path, columns: Sequence[str], start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    from pyarrow import orc

    done, file = 0, orc.ORCFile(str(path))
    for stripe in range(file.nstripes):
        if start > 1 and done + (rows := len(file.read_stripe(stripe, columns=list(columns[:1])))) < start:
            done += rows
            continue
        batch = file.read_stripe(stripe, columns=list(columns))
        for first in range(0, len(batch), BATCH_ROWS):
            yield done + first + 1, batch.slice(first, BATCH_ROWS)
        done += len(batch)


def read_columns(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows as Python values by column; columns whose type Python does not have are left out, with a warning.

    :raises MissingError, DataError: see `readable`.
    """
    schema, _ = read_schema(path, kind)
    names = list(schema.names)
    for _, batch in read_batches(path, kind, schema.names, 1):
        columns = {name: _values(path, name, batch.column(name)) for name in names}
        names = [name for name, values in columns.items() if values is not None]
        known = [values for values in columns.values() if values is not None]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*known, strict=True))


def _values(path: Path, name: str, column: pa.Array) -> list[Any] | None:
    import pyarrow as pa

    try:
        if not isinstance(column, pa.ExtensionArray):
            return column.to_pylist()
        return [None if value is None else value.decode() for value in _as_bytes(column)]
    except (pa.ArrowException, UnicodeError) as error:
        logger.warning("列已略过 %s: column %s is %s and left out (%s)", path, name, column.type, error)
        return None


# --- as text ------------------------------------------------------------------------------------------------------


def column_texts(path: Path, name: str, column: pa.Array) -> list[Any]:
    """A column as bytes of UTF-8, None for null; binary columns are taken as text.

    :raises NoTextError: names the column and its type.
    """
    import pyarrow as pa

    try:
        return _as_bytes(column)
    except (pa.ArrowException, UnicodeError) as error:
        raise _no_text(path, name, str(column.type)) from error


def _as_bytes(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        if str(column.type) == "extension<arrow.uuid>":
            return [
                None if value is None else str(uuid.UUID(bytes=value)).encode() for value in column.storage.to_pylist()
            ]
        return _as_bytes(column.storage)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    plain = column if any(holds_bytes(column.type) for holds_bytes in binary) else column.cast(pa.string())
    return plain.cast(pa.binary()).to_pylist()


def need_texts(path: Path, kind: str, columns: Iterable[str]) -> None:
    """Check, before the work, that columns have a text.

    :raises NoTextError: names one that has none, and its type.
    """
    import pyarrow as pa

    schema, _ = read_schema(path, kind)
    intervals = _intervals(path) if kind != ORC else []
    for name in columns:
        type_ = schema.field(name).type
        if name in intervals:
            raise _no_text(path, name, "interval")
        try:
            _as_bytes(pa.nulls(1, type_))  # not zero: a time zone is looked up only for a value
        except (pa.ArrowException, UnicodeError) as error:
            raise _no_text(path, name, str(type_)) from error


def _intervals(path: Path) -> list[str]:
    """Columns of Parquet's type INTERVAL, which Arrow reads as twelve bytes."""
    import pyarrow.parquet as pq

    schema = pq.read_metadata(path).schema
    return [schema.column(i).path for i in range(len(schema)) if schema.column(i).converted_type == "INTERVAL"]


def _no_text(path: Path, name: str, type_: str) -> NoTextError:
    zone = re.search(r"tz=([^\]]+)", type_)
    why = f"whose time zone {zone[1]} is not known here" if zone else "which has no text"
    return NoTextError(f"{path}: column {name} is {type_}, {why}")
