"""Files of queries and of documents, read as records whatever their format."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ebr_lib.data.columnar import read_columns
from ebr_lib.data.containers import COLUMNAR, kind_of, opened, readable
from ebr_lib.data.embeddings.base import PARQUET
from ebr_lib.data.finder import FoundFiles, find_files
from ebr_lib.data.hive import HEADER_AGAIN, Layout, open_source, read_rows
from ebr_lib.data.records import BadRowError, csv_rows, is_quoted, json_rows
from ebr_lib.data.text import HALF_CHARACTER, half_character, is_blank
from ebr_lib.errors import DataError, MissingError, UserError
from ebr_lib.logs import logger

QUERY_TEXTS = ("text", "query", "question", "anchor")
DOCUMENT_TEXTS = ("text", "description", "document", "passage", "positive", "content")
ANSWERS = ("positive", "pos", "positives")
QUERY_IDS = ("_id", "id", "query_id", "qid")
DOCUMENT_IDS = ("_id", "id", "doc_id", "docid")
JSON = (".jsonl", ".json", ".ndjson")
TABLES = (*JSON, PARQUET, ".orc", ".csv", ".tsv", ".txt")  # if two files have one name, the first of these is read
JUDGEMENTS = (*TABLES, ".qrels", ".trec")
COMPRESSED = ("", ".gz", ".bz2", ".zst")
PART = re.compile(r"(.+-)(\d+)(-of-(\d+).*)")  # one of a table's files, as Hugging Face names them
# names of a judgement's columns, without case, "-", "_" and spaces
JUDGED_QUERY = ("queryid", "qid", "query", "topic")
JUDGED_DOCUMENT = ("corpusid", "docid", "documentid", "did", "passageid", "pid", "itemid", "document", "doc")
GRADE = ("score", "grade", "relevance", "rel", "label", "judgement", "judgment")
USUAL = frozenset((*QUERY_TEXTS, *DOCUMENT_TEXTS, *ANSWERS, *QUERY_IDS, *DOCUMENT_IDS, *JUDGED_QUERY))
DAMAGED = (ValueError, OSError, EOFError, zlib.error)  # UnicodeDecodeError is a ValueError
MOST_LETTERS = 2**31 - 1  # in a field of CSV
Record = Mapping[str, Any]


def plain_suffix(path: Path) -> str:
    """The ending that names the format: `.csv` of `test.csv.gz`."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix


def warn_of_blank_queries(path: Path, count: int) -> None:
    """Log how many queries of a file are blank."""
    logger.warning("空查询已略过 blank queries left out: %d of %s", count, path)


def read_records(path: Path) -> list[Record]:
    """Read a table of texts: JSON (an array, or one object per line), Parquet, ORC, or delimited text with a header
    row; one file, all files of a folder, or all parts of `NAME-00000-of-00002.parquet`.

    Delimited text is split at `\\001` if its header has one; a quote is then a plain character. A `.tsv` is split at
    tabs, with quoted fields if the whole file can be read that way. All else is CSV with quotes.

    :raises MissingError: there is no such file.
    :raises DataError: it cannot be read, or has no rows.
    """
    records = [record for part in parts_of(path) for record in records_of_file(part)]
    if not records:
        raise DataError(f"{path} holds no rows")
    return records


def parts_of(path: Path) -> list[Path]:
    """The files of a table: those of a folder, all parts if the path is one of several, otherwise the file alone."""
    if path.is_dir():
        found = tables_in(path)
        found.log()
        return found.files
    if (part := PART.fullmatch(path.name)) is None:
        parts = [path]
    else:
        numbers = (str(number).zfill(len(part[2])) for number in range(int(part[4])))
        parts = [path.with_name(f"{part[1]}{number}{part[3]}") for number in numbers]
    if missing := [file for file in parts if not file.is_file()]:
        raise MissingError(f"{missing[0]}: there is no such file")
    return parts


def tables_in(folder: Path) -> FoundFiles:
    """The tables of a folder.

    :raises MissingError: it has none.
    """
    patterns = [f"*{ending}{packed}" for ending in JUDGEMENTS for packed in COMPRESSED]
    found = find_files(folder, patterns, "evaluation data")
    if not found.files:
        raise MissingError(f"{folder}: wanted a table ({', '.join(TABLES)}) in the folder, found none")
    return found


def records_of_file(path: Path) -> list[Record]:
    """The records of one file.

    :raises DataError: it cannot be read in the format that its name says.
    """
    try:
        return list(_records(path))
    except UserError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as {path.suffix or 'text'}: {error}") from error


def _records(path: Path) -> Iterator[Record]:
    if (kind := kind_in(path)) in COLUMNAR:
        yield from read_columns(path, kind)
    elif plain_suffix(path) in JSON:
        yield from _json_records(path)
    else:
        yield from _delimited_records(path)


def kind_in(path: Path) -> str:
    """Format of a file; see `kind_of`."""
    with readable(path):
        return kind_of(path)


def letters_of(path: Path, newline: str | None = None) -> IO[str]:
    """Open a file, compressed or not, as text."""
    return io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline=newline)


def _json_records(path: Path) -> Iterator[Record]:
    for line, row, _ in json_rows(path, lambda name: name in USUAL or plain_name(name) in USUAL):
        if isinstance(row, BadRowError):
            raise DataError(f"{path}, line {line}: {row}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: wanted an object, found {type(row).__name__}")
        for column, value in row.items():
            values = value if isinstance(value, list) else [value]
            if half_character(text for text in values if isinstance(text, str)) is not None:
                raise DataError(f"{path}, line {line}: `{column}` holds {HALF_CHARACTER}")
        yield row


def _delimited_records(path: Path) -> Iterator[Record]:
    with opened(path) as raw:
        is_hive = b"\x01" in raw.readline()
    if is_hive:
        yield from _hive_records(path)
        return
    rows = split_rows(path, "\t" if plain_suffix(path) == ".tsv" else ",")
    _, names = next(rows, (1, []))
    for line, row in rows:
        if row and len(row) != len(names):
            raise DataError(f"{path}: line {line}: {len(row)} fields, the header has {len(names)}")
        if row:
            yield dict(zip(names, row, strict=True))


def split_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of delimited text, each with the line where it begins; see `is_quoted`."""
    with letters_of(path, newline="") as file:
        quoted = is_quoted(path, delimiter)
        yield from csv_rows(file, f"{path}:", delimiter, quoted=quoted, most_letters=MOST_LETTERS)


def _hive_records(path: Path) -> Iterator[Record]:
    source = open_source(path, Layout())
    for row in read_rows(source, source.columns, Layout()):
        if not row.raw.strip() or row.reason == HEADER_AGAIN:  # an empty last line; a header inside joined files
            continue
        if row.reason:
            raise DataError(f"{path}: line {row.position.line}: {row.reason}")
        values = [None if value is None else value.decode() for value in row.values]
        yield dict(zip(source.columns, values, strict=True))


def text_in(value: Any) -> str:
    """A value as text; null is empty."""
    return "" if value is None else str(value)


def id_in(value: Any) -> str:
    """An id as text; whole floats (as pandas makes them of a column with nulls) are written as whole numbers."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text_in(value)


def need_column(path: Path, records: Sequence[Record], name: str) -> None:
    """Make sure that a column is there.

    :raises DataError: it is not; the message names the columns that are.
    """
    if not any(name in record for record in records):
        raise DataError(f"{path}: no column {name}; its columns are {', '.join(records[0])}")


def text_column(path: Path, records: Sequence[Record], name: str | None, usual: Sequence[str], knob: str) -> str:
    """The column of the texts: `name`, which the knob gives, or the first of the usual ones.

    :raises DataError: it is not there.
    """
    if name is not None:
        need_column(path, records, name)
        return name
    found = next((name for name in usual if name in records[0]), None)
    if found is None:
        raise DataError(
            f"{path}: no column of text; looked for {', '.join(usual)}, found {', '.join(records[0])}; "
            f"name it with {knob}"
        )
    return found


def query_texts(path: Path, records: Sequence[Record], name: str | None) -> list[str]:
    """The queries' texts; empty for a row without one."""
    column = text_column(path, records, name, QUERY_TEXTS, "query_column")
    texts = [text if isinstance(text := record.get(column), str) else "" for record in records]
    if all(map(is_blank, texts)):
        raise DataError(
            f"{path}: none of its {len(texts)} queries has text in column {column}; name another with query_column"
        )
    return texts


def read_queries(path: Path, column: str | None) -> list[str]:
    """The distinct texts of a file of queries; blank ones are left out and counted in the log."""
    texts = query_texts(path, read_records(path), column)
    kept = [text for text in texts if not is_blank(text)]
    if len(kept) < len(texts):
        warn_of_blank_queries(path, len(texts) - len(kept))
    return list(dict.fromkeys(kept))


def plain_name(name: str) -> str:
    """A column's name without case, `-`, `_` and spaces."""
    return re.sub(r"[-_ ]", "", name.casefold())
