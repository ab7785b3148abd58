"""Rows of a training file: JSON, JSON lines, CSV, TSV or Parquet, compressed or not, by its content."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ebr_lib.data.containers import opened, readable
from ebr_lib.errors import DataError

IsColumn = Callable[[str], bool]
"""Whether a column of that name is one that is read."""

UTF8_ADVICE = "save the file as UTF-8 (from GBK: iconv -f GB18030 -t UTF-8)"
_CHUNK = 1 << 20
_HEAD = 1 << 20
_MOST_LETTERS = 1 << 24  # of one CSV field: an unclosed quote must not read the whole file
_DELIMITERS = "\x01\t,;|"
_TABLE_ENDINGS = (".csv", ".tsv", ".txt")
_MISSING = frozenset({r"\N", "NaN", "nan", "NULL", "null", "None", "<NA>"})  # nulls of pandas and Hive
_VISIBLE = re.compile(r"\S")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_PARQUET_ROWS = 1024


class BadRowError(Exception):
    """A row that cannot be used; the message says what was wanted and what was found."""


class RawRow(NamedTuple):
    """A row: its line from 1 (its number in Parquet), and its value, or a BadRowError.

    :param raw: the row as it is in the file; empty for rows of tables, whose value shows it.
    """

    line: int
    value: Any
    raw: str = ""


def raw_rows(file: Path, is_column: IsColumn) -> Iterator[RawRow]:
    """Stream the rows of a file, one in memory at a time.

    JSON is an array of objects, one object per line, objects over several lines, or an object that holds the list of
    rows. A table has a header row; of Parquet, only the columns that `is_column` knows are read.

    :raises DataError: the file is none of these, is broken so that the next row cannot be found, or is not UTF-8.
    """
    with readable(file):
        if _is_parquet(file):
            yield from _parquet_rows(file, is_column)
            return
        head = _head(file)
        if head.startswith(("[", "{")):
            yield from json_rows(file, is_column)
        elif delimiter := _delimiter_of(head, is_column):
            yield from _table_rows(file, delimiter, is_column)
        elif file.suffix.lower() in _TABLE_ENDINGS and head:
            raise DataError(
                f"{file}: wanted a header row with names such as `anchor` and `positive` (in lower case), found "
                f"{_first_line(head)[:80]!r}"
            )
        else:
            yield from _line_rows(file)


def json_rows(file: Path, is_column: IsColumn) -> Iterator[RawRow]:
    """Stream the rows of a JSON file; see `raw_rows`.

    :raises DataError: an array or object is broken, or the file is not UTF-8.
    """
    first = _head(file)[:1]
    if first == "[":
        yield from _array_rows(file)
    elif first == "{":
        yield from _object_rows(file, is_column)
    else:
        yield from _line_rows(file)


# --- the first bytes --------------------------------------------------------------------------------------------


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(4)
    return start == b"PAR1" or (bool(start) and file.suffix.lower() == ".parquet")


def _head(file: Path) -> str:
    """The beginning of a file from its first visible character, in general more than its first line."""
    with opened(file) as stream:
        chunk = stream.read(_HEAD).removeprefix(codecs.BOM_UTF8)
        if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in chunk[:64]:
            raise DataError(f"{file} is UTF-16, or not text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        while chunk and not chunk.strip():
            chunk = stream.read(_HEAD)
    return chunk.lstrip().decode("utf-8", "replace")


# --- JSON ---------------------------------------------------------------------------------------------------------


class _Decoder:
    """A JSON decoder that refuses objects with a key twice, of which the last would silently win."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice.append(next(key for key in keys if keys.count(key) > 1))
        return found

    def decode(self, text: str) -> Any:
        """The value of a text."""
        self._twice.clear()
        return self._checked(self._decoder.decode(text))

    def decode_at(self, text: str, at: int) -> tuple[Any, int]:
        """The JSON value that begins at `at`, and where it ends."""
        self._twice.clear()
        value, end = self._decoder.raw_decode(text, at)
        return self._checked(value), end

    def _checked(self, value: Any) -> Any:
        return BadRowError(f"the key `{self._twice[0]}` is there twice; keep one") if self._twice else value


def _line_rows(file: Path) -> Iterator[RawRow]:
    decoder = _Decoder()
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if row.strip():
                yield RawRow(number, _decoded(row, decoder), row.decode("utf-8", "backslashreplace").strip())


def _decoded(line: bytes, decoder: _Decoder) -> Any:
    try:
        return decoder.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 (byte {error.start + 1} of the line); {UTF8_ADVICE}")
    except json.JSONDecodeError as error:
        return BadRowError(
            f"not a JSON object on one line ({error.msg}, column {error.colno}); a file is an array `[…]` or one "
            "object per line"
        )
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not a JSON object on one line ({error})")


def _array_rows(file: Path) -> Iterator[RawRow]:
    """The elements of a JSON array, one at a time, each with the line where it begins.

    A broken array always ends the reading, as the next row cannot be found.
    """
    text = _JsonText(file)
    yield from _elements(text)
    letter = text.next_letter()
    if letter == "[":
        raise DataError(
            f"{file}, line {text.line}: each line is an array; wanted objects, which name their columns (`anchor`, "
            "`positive`)"
        )
    if letter:
        raise DataError(f"{file}, line {text.line}: {letter!r} after the end of the array")


def _elements(text: _JsonText) -> Iterator[RawRow]:
    text.take("[")
    if text.next_letter() == "]":
        text.take("]")
        return
    while True:
        yield text.row()
        if text.take(",]") == "]":
            return


def _object_rows(file: Path, is_column: IsColumn) -> Iterator[RawRow]:
    """Rows of a file that begins with an object, which holds the rows or is the first of them."""
    if wrapper := _wrapper_of(file, is_column):
        yield from _wrapped_rows(file, wrapper, is_column)
    elif _spans_lines(file):
        text = _JsonText(file)
        while text.next_letter():
            yield text.row()
    else:
        yield from _line_rows(file)


def _wrapper_of(file: Path, is_column: IsColumn) -> str:
    """The key of the first list of rows in the object that a file begins with; empty where the object is a row."""
    text = _JsonText(file)
    try:
        for key in _keys(text):
            if is_column(key):
                return ""
            if text.next_letter() == "[":
                if any(_is_row(row.value, is_column) for row in _elements(text)):
                    return key
            else:
                text.row()
    except DataError:  # raised again where the rows are read
        pass
    return ""


def _is_row(value: Any, is_column: IsColumn) -> bool:
    return isinstance(value, dict) and any(map(is_column, value))


def _wrapped_rows(file: Path, wrapper: str, is_column: IsColumn) -> Iterator[RawRow]:
    text = _JsonText(file)
    for key in _keys(text):
        if key == wrapper:
            yield from _elements(text)
        elif text.next_letter() != "[":
            text.row()
        elif any(_is_row(row.value, is_column) for row in _elements(text)):
            raise DataError(f"{file}: both `{wrapper}` and `{key}` are lists of rows; give each a file of its own")
    if letter := text.next_letter():
        raise DataError(f"{file}, line {text.line}: {letter!r} after the end of the object")


def _keys(text: _JsonText) -> Iterator[str]:
    """The keys of an object; the caller reads the value of each before the next."""
    text.take("{")
    seen = set[str]()
    while text.next_letter() == '"':
        key = text.row().value
        if key in seen:
            raise DataError(f"{text.file}, line {text.line}: the key `{key}` is there twice; keep one")
        seen.add(key)
        text.take(":")
        yield key
        if text.take(",}") == "}":
            return
    text.take("}")


def _spans_lines(file: Path) -> bool:
    try:
        return "\n" in _JsonText(file).row().raw
    except DataError:
        return False


class _JsonText:
    """JSON read forward in chunks; only the part that is still needed is held."""

    def __init__(self, file: Path) -> None:
        self.file, self.line = file, 1
        self._text, self._at = "", 0
        self._chunks = self._read()
        self._decoder = _Decoder()

    def _read(self) -> Iterator[str]:
        with opened(self.file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            size = _CHUNK
            while chunk := stream.read(size):
                yield chunk
                size = max(_CHUNK, len(self._text))  # doubling: an element of any size costs linear time

    def _more(self) -> bool:
        try:
            chunk = next(self._chunks, "")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.file}, after line {self.line}: not UTF-8 ({error.reason}); {UTF8_ADVICE}"
            ) from error
        if chunk:  # at the end of the file the text stays: the line of an error is counted in it
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _step(self, end: int) -> str:
        passed = self._text[self._at : end]
        self.line += passed.count("\n")
        self._at = end
        return passed

    def next_letter(self) -> str:
        """Go to the next character that is not white space, and return it; empty at the end of the file."""
        while not (found := _VISIBLE.search(self._text, self._at)):
            self._step(len(self._text))
            if not self._more():
                return ""
        self._step(found.start())
        return found[0]

    def take(self, wanted: str) -> str:
        """Read one character that must be one of `wanted`."""
        letter = self.next_letter()
        if not letter or letter not in wanted:
            found = repr(letter) if letter else "the end of the file"
            raise DataError(
                f"{self.file}, line {self.line}: wanted {' or '.join(map(repr, wanted))}, found {found}; the JSON is "
                "broken there (a missing comma or bracket?)"
            )
        self._step(self._at + 1)
        return letter

    def row(self) -> RawRow:
        """Read one JSON value: the line where it begins, the value, and its text."""
        self.next_letter()
        line = self.line
        while True:
            try:
                value, end = self._decoder.decode_at(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._is_cut(error) and self._more():
                    continue
                # the decoder's own line and column are those of the text held, not of the file
                lines = self._text[self._at : getattr(error, "pos", self._at)].count("\n")
                where, what = f"{self.file}, line {self.line + lines}", getattr(error, "msg", error)
                raise DataError(f"{where}: the JSON is broken there ({what})") from error
            if end == len(self._text) and self._more():
                continue  # a number may go on in the next chunk
            return RawRow(line, value, self._step(end))

    def _is_cut(self, error: Exception) -> bool:
        """Whether the end of the chunk may have cut the value off; else it is broken, and more text cannot help."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16  # \\ud83d\\ude00 is the longest


# --- tables -------------------------------------------------------------------------------------------------------


def _delimiter_of(head: str, is_column: IsColumn) -> str:
    """The delimiter by which the first line has most known columns; empty where it has none."""
    line = _first_line(head)
    known = {mark: sum(is_column(name.strip().strip('"')) for name in line.split(mark)) for mark in _DELIMITERS}
    best = max(_DELIMITERS, key=known.__getitem__)
    return best if known[best] else ""


def _first_line(head: str) -> str:
    return head.partition("\n")[0].rstrip("\r")


def _table_rows(file: Path, delimiter: str, is_column: IsColumn) -> Iterator[RawRow]:
    """Rows of delimited text as dicts; a cell that is missing, or is a null of pandas or Hive, is None."""
    rows = _split_rows(file, delimiter, is_quoted(file, delimiter))
    names = [name.strip() for name in next(rows)[1]]
    _check_once(file, names)
    for line, cells in rows:
        if len(cells) > len(names):
            error = BadRowError(
                f"{len(cells)} fields, the header has {len(names)}; put fields that hold the delimiter in quotes"
            )
            yield RawRow(line, error, delimiter.join(cells))
            continue
        row = dict.fromkeys(names) | {name: _cell(cell) for name, cell in zip(names, cells, strict=False)}
        bad = next((row[name] for name in names if is_column(name) and isinstance(row[name], BadRowError)), None)
        yield RawRow(line, bad or row, delimiter.join(cells) if bad else "")


def _check_once(file: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file}: column {', '.join(twice)} is there more than once; rename it")


def _cell(cell: str) -> Any:
    if cell in _MISSING:
        return None
    if _ESCAPED_BYTE.search(cell):
        return BadRowError(f"not UTF-8; {UTF8_ADVICE}")
    if cell.startswith("[") and cell.endswith("]"):
        return _list_cell(cell)
    return cell


def _list_cell(cell: str) -> Any:
    """A list in JSON; a Python list is refused, because a numpy array looks the same."""
    try:
        value = json.loads(cell)
    except ValueError:
        value = None
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if cell.startswith(("['", '["')):
        return BadRowError("a cell holds a Python list as text; write lists as JSON lines or Parquet")
    return cell


def is_quoted(file: Path, delimiter: str) -> bool:
    """Whether fields are quoted as in CSV: never with `\\001`; with tabs, where the whole file can be read so.

    Not where a field would then hold whole rows: those are two loose quotes.
    """
    if delimiter == "\x01":
        return False
    if delimiter != "\t":
        return True
    try:
        rows = _split_rows(file, delimiter, True)
        width = len(next(rows)[1])
        return all(len(cells) == width and not _holds_rows(cells, delimiter) for _, cells in rows)
    except DataError:
        return False


def _holds_rows(cells: list[str], delimiter: str) -> bool:
    """Whether every line of a row has as many fields as the row itself."""
    lines = delimiter.join(cells).split("\n")
    return len(cells) > 1 < len(lines) and all(line.count(delimiter) == len(cells) - 1 for line in lines)


def _split_rows(file: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows of delimited text, each with the line where it begins, without empty lines."""
    # bytes that are not UTF-8 are kept, so that they cost one row
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv_rows(stream, f"{file},", delimiter, quoted=quoted, most_letters=_MOST_LETTERS)
        yield from ((line, cells) for line, cells in rows if cells)


def csv_rows(
    stream: IO[str], where: str, delimiter: str, *, quoted: bool, most_letters: int
) -> Iterator[tuple[int, list[str]]]:
    """The rows of delimited text, empty ones too, each with the line where it begins.

    :param where: the file, as an error names it before the line.
    :param most_letters: of a field.
    :raises DataError: a quote is not closed, or text follows a closing one.
    """
    csv.field_size_limit(most_letters)
    unquoted: Any = {} if quoted else {"quoting": csv.QUOTE_NONE}
    rows = csv.reader(stream, delimiter=delimiter, strict=True, **unquoted)
    line = 1
    try:
        for cells in rows:
            yield line, cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{where} line {line}: a quote that is not closed, or text after a closing one ({error})"
        ) from error


def _parquet_rows(file: Path, is_column: IsColumn) -> Iterator[RawRow]:
    import pyarrow.parquet as pq
    from pyarrow.types import is_boolean, is_integer

    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        _check_once(file, names)
        if not any(map(is_column, names)):
            raise DataError(f"{file}: none of its columns is known ({', '.join(names)})")
        # integers are cheap, and may be a label that its name does not show
        schema = table.schema_arrow
        known = [f.name for f in schema if is_column(f.name) or is_boolean(f.type) or is_integer(f.type)]
        number = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=known):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(number, dict.fromkeys(names) | {name: _decoded_bytes(cell) for name, cell in row.items()})


def _decoded_bytes(value: Any) -> Any:
    """Bytes of text that Spark or Hive wrote without marking them as text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
