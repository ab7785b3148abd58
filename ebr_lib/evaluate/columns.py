"""Names of columns, and the ids in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebr_lib.data.queries import Record, id_in, need_column
from ebr_lib.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None takes the first of the usual names that the file has.

    `id` is the documents' column, and the queries' if their file has it too. `label` says whether an answer counts;
    "none": no column says it.
    """

    query: str | None = None
    corpus: str | None = None
    id: str | None = None
    label: str | None = None


def read_ids(
    path: Path, records: Sequence[Record], name: str | None, usual: Sequence[str], *, needed: bool
) -> list[str]:
    """The ids of a file's rows; row numbers if it has no column of ids and judgements do not need them."""
    column = name or next((name for name in usual if name in records[0]), None)
    if column is None:
        if needed:
            raise no_ids(path, usual, list(records[0]))
        return [str(i) for i in range(len(records))]
    need_column(path, records, column)
    ids = [id_in(record.get(column)) for record in records]
    check_ids(path, column, ids)
    return ids


def check_ids(path: Path, column: str, ids: Sequence[str]) -> None:
    """Make sure that every row has an id.

    :raises DataError: names the first rows without one.
    """
    if blank := [str(row) for row, id_ in enumerate(ids, 1) if not id_]:
        raise DataError(f"{path}: no id in column {column} of rows {', '.join(blank[:5])}; every row needs one")


def id_twice(path: Path, id_: str, row: int, other: int) -> DataError:
    """The error for an id that two different texts have."""
    return DataError(
        f"{path}: id {id_!r} is there more than once, with different texts (rows {row + 1} and {other + 1}); ids must "
        "be unique: name another column with id_column"
    )


def no_ids(path: Path, usual: Sequence[str], found: Sequence[str]) -> DataError:
    """The error for a file without a column of ids."""
    return DataError(
        f"{path}: judgements name its rows by their ids, and no column has any; looked for {', '.join(usual)}, found "
        f"{', '.join(found) or 'none'}; name it with id_column"
    )
