"""Delimited text as Hive writes it, Parquet and ORC, streamed row by row.

Rows of plain text end at `\\n` and nowhere else, fields at the delimiter, `\\N` is null and differs from the empty
string; quotes and escapes count only where the layout has them. Bytes are split first and decoded after, so one bad
byte costs one row. Splitting bytes is safe in UTF-8 and in GBK/GB18030, whose second bytes are 0x30 and above. A row
that does not fit becomes a reject, and is never dropped.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple

from ebr_lib.data.columnar import column_texts, read_batches, read_schema
from ebr_lib.data.containers import COLUMNAR, TEXT, kind_of, open_bytes, readable, unpacked_size
from ebr_lib.data.fields import LOOSE_QUOTE, NULL, BrokenQuoteError, Dialect, Record
from ebr_lib.errors import DataError
from ebr_lib.logs import logger

BOM = b"\xef\xbb\xbf"
SAMPLE_BYTES = 1 << 20  # read at once to detect the encoding
SAMPLE_LIMIT = 1 << 26  # read in all where all of it is ASCII
HEAL_LINES, HEAL_BYTES = 10_000, 1 << 26  # of one row that is rejoined
CR_BLOCK = 1 << 20  # read at once of a file whose rows end in \\r alone
EMPTY_LINE = "empty line"
OPEN_QUOTE = "a quote that is not closed"
HEADER_AGAIN = "the header row again"
OLD_ORC_NAME = re.compile(r"_col\d+")  # written by Hive before 2.0: the table's column names are not in the file

Value = bytes | None


@dataclass(frozen=True)
class Layout:
    """How files are read.

    :param delimiter: one byte between the fields.
    :param columns: names of the columns of files without a header row; None takes each file's first row.
    :param encoding: a codec, or auto: UTF-8, or GB18030 where most rows that are not ASCII are that and not UTF-8.
    :param heal: rejoin rows that a newline inside a field has broken; the newline becomes a space.
    :param quoting: whether fields may be quoted, as in RFC 4180: none, csv, or auto. Auto is csv for commas, and for
        tabs and other signs in files named `.csv` or `.tsv`; none for control characters, and with `heal`.
    :param escape: one byte that takes the next one literally (Hive's ESCAPED BY); None for no escaping.
    """

    delimiter: bytes = b"\x01"
    columns: tuple[str, ...] | None = None
    encoding: str = "auto"
    heal: bool = False
    quoting: str = "auto"
    escape: bytes | None = None


@dataclass(frozen=True)
class Source:
    """One input file whose header is known.

    :param columns: those in the file.
    :param stamp: size and time of change, to detect changes.
    :param extent: where its positions end: in uncompressed bytes, or in rows of Parquet and ORC.
    :param newline: what ends its rows.
    :param start: byte at which the rows begin, which is line `first_line`.
    :param kind: what it holds; see `kind_of`.
    :param partitions: columns that its folders give, each with its value for all rows.
    :param stored: the columns' names in the file where they differ (`_col0`).
    """

    path: Path
    name: str
    columns: tuple[str, ...]
    stamp: tuple[int, int]
    extent: int
    encoding: str = "utf-8"
    newline: bytes = b"\n"
    start: int = 0
    first_line: int = 1
    kind: str = TEXT
    quoted: bool = False
    partitions: Mapping[str, Value] = field(default_factory=dict)
    stored: tuple[str, ...] = ()

    def stored_names(self, names: Iterable[str]) -> list[str]:
        """The names that columns have in the file itself."""
        return [self.stored[self.columns.index(name)] if self.stored else name for name in names]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.stamp[0]

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        :raises DataError: its size or time of change differs.
        :raises MissingError: it is no longer there.
        """
        with readable(self.path):
            now = stamp_of(self.path)
        if now != self.stamp:
            raise DataError(
                f"{self.path} changed while it was read ({self.size} bytes then, {now[0]} now); what "
                "was written stays. Run the same call again when it is whole: it reads that file again"
            )


def stamp_of(path: Path) -> tuple[int, int]:
    """A file's size and time of change in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Position(NamedTuple):
    """Where the next row of a file begins: its line from 1, and its byte offset (uncompressed)."""

    line: int
    offset: int


class Row(NamedTuple):
    """A row, or a reject.

    :param values: the wanted columns in UTF-8, None for null; empty for a reject.
    :param raw: the bytes as they were, without the newline at the end.
    :param reason: why it is a reject; empty for a row.
    :param lines: how many lines were joined into it.
    :param resumable: reading from `after` on gives the rows that follow. Not after lines that healing left apart: they
        might be joined with others.
    """

    position: Position
    after: Position
    values: list[Value]
    raw: bytes
    reason: str = ""
    lines: int = 1
    resumable: bool = True


# --- opening ------------------------------------------------------------------------------------------------------


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing, compressed or not.

    :raises DataError: a container that is not read.
    """
    with readable(path):
        if not path.stat().st_size:
            return True
        kind = kind_of(path)
        if kind in COLUMNAR:
            return False
        with open_bytes(path, kind) as file:
            return file.read(len(BOM) + 1) in (b"", BOM)


def open_source(
    path: Path, layout: Layout, name: str | None = None, partitions: Mapping[str, Value] | None = None
) -> Source:
    """Read a file's header, and find out what it holds, its encoding and its newlines.

    :param partitions: columns that the file's folders give; one of the same name in the file is read from the file.
    :raises DataError: the file is empty, is UTF-16, a container that is not read, or names a column twice.
    """
    name = name or path.name
    with readable(path):
        kind = kind_of(path)
        source = _open_columnar(path, kind, layout, name) if kind in COLUMNAR else _open_text(path, kind, layout, name)
    twice = sorted({column for column in source.columns if source.columns.count(column) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} is there more than once; rename it")
    given = {column: value for column, value in (partitions or {}).items() if column not in source.columns}
    return replace(source, partitions=given)


def _open_columnar(path: Path, kind: str, layout: Layout, name: str) -> Source:
    schema, rows = read_schema(path, kind)
    stored = tuple(schema.names)
    if layout.columns is None or not all(map(OLD_ORC_NAME.fullmatch, stored)):
        return Source(path, name, stored, stamp_of(path), rows, kind=kind)
    if len(stored) != len(layout.columns):
        raise DataError(
            f"{path} has {len(stored)} columns without names of their own, columns names {len(layout.columns)}"
        )
    return Source(path, name, layout.columns, stamp_of(path), rows, kind=kind, stored=stored)


def _open_text(path: Path, kind: str, layout: Layout, name: str) -> Source:
    with open_bytes(path, kind) as file:
        head = file.read(4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is UTF-16, whose bytes cannot be split; convert it: iconv -f UTF-16 -t UTF-8")
        bom = len(BOM) if head.startswith(BOM) else 0
        file.seek(bom)
        first = file.readline()
        block = file.read(SAMPLE_BYTES)
        sample = _foreign_lines(file, first, block)
    if not first and layout.columns is None:
        raise DataError(f"{path} is empty: wanted a header row")
    quoted = _is_quoted(path, layout)
    crlf = b"\r\n" if first.endswith(b"\r\n") and not quoted else b"\n"  # with quotes, rows may end in either
    is_cr = b"\n" not in first + block and b"\r" in (first + block).rstrip(b"\r")  # as on the first Macintosh
    source = Source(
        path,
        name,
        (),
        stamp_of(path),
        unpacked_size(path, kind),
        encoding="utf-8" if bom else _encoding_of(path, sample, layout),
        newline=b"\r" if is_cr else crlf,
        start=bom,
        kind=kind,
        quoted=quoted,
    )
    header = next(_split_rows(source, layout, Position(1, bom)), None)
    decoded = "utf-8" if _is_transcoded(source, layout.escape) else source.encoding
    names = header.values if header else ()
    named = tuple((NULL if name is None else name).decode(decoded, "replace") for name in names)
    is_header = layout.columns is None or named == layout.columns
    if _has_loose_quotes(source, header, layout, first + block):
        logger.info("%s: 引号按普通字符读取 (quotes are ordinary characters: they do not enclose fields)", path)
        return _open_text(path, kind, replace(layout, quoting="none"), name)
    if source.newline != b"\r" and not quoted:
        rows = (first + block)[header.after.offset - bom :] if header and is_header else first + block
        source = replace(source, newline=_newline_of(path, rows, crlf))
    if is_header and header:
        return replace(source, columns=named, start=header.after.offset, first_line=header.after.line)
    assert layout.columns is not None
    if set(named) == set(layout.columns):
        logger.warning(
            "首行列名顺序不同 %s: the first row has the names in columns in another order (%s) and is read as a row: "
            "leave columns out to take it as the header",
            path,
            ", ".join(named),
        )
    return replace(source, columns=layout.columns)


def _is_quoted(path: Path, layout: Layout) -> bool:
    if layout.quoting != "auto":
        return layout.quoting == "csv"
    if layout.heal or (layout.delimiter < b" " and layout.delimiter != b"\t"):
        return False
    return layout.delimiter == b"," or any(ending.lower() in (".csv", ".tsv") for ending in path.suffixes)


def _has_loose_quotes(source: Source, header: Row | None, layout: Layout, sample: bytes) -> bool:
    """Whether quotes do not enclose fields in the first rows of a file that is quoted only by its name.

    Tables of Hive and of databases are named `.tsv` too, where a quote is a letter: `"6 inch`.
    """
    if layout.quoting != "auto" or not source.quoted or layout.delimiter == b"," or b'"' not in sample or not header:
        return False
    source = replace(source, columns=("",) * len(header.values))
    rows = itertools.takewhile(
        lambda row: row.position.offset < SAMPLE_BYTES, _split_rows(source, layout, Position(1, source.start))
    )
    return any(row.reason in (OPEN_QUOTE, LOOSE_QUOTE) for row in rows)


def _newline_of(path: Path, rows: bytes, header: bytes) -> bytes:
    """What ends the rows: `\\r\\n` where most of them end so; the header's newline where there are no others."""
    newlines, carriage = rows.count(b"\n"), rows.count(b"\r\n")
    if not newlines:
        return header
    if 0 < carriage < newlines:
        logger.warning(
            "换行符不一致 %s: %d of its first %d rows end in \\r\\n, the others in \\n; the more common one ends rows",
            path,
            carriage,
            newlines,
        )
    return b"\r\n" if 2 * carriage > newlines else b"\n"


def _foreign_lines(file: IO[bytes], first: bytes, block: bytes) -> list[tuple[bytes, bool]]:
    """Lines that are not ASCII, which show the encoding; and whether each is cut, its end not being read."""
    text, read = first + block, len(block)
    while text.isascii():
        if not block or read >= SAMPLE_LIMIT:
            return []
        text = block = file.read(SAMPLE_BYTES)
        read += len(block)
    *whole, last = text.split(b"\n")
    lines = [*((line, False) for line in whole), (last, len(block) == SAMPLE_BYTES)]
    return [(line, cut) for line, cut in lines if not line.isascii()]


def _encoding_of(path: Path, lines: list[tuple[bytes, bool]], layout: Layout) -> str:
    if layout.encoding != "auto":
        return layout.encoding
    foreign = sum(not _decodes(*line, "utf-8") and _decodes(*line, "gb18030") for line in lines)
    if 2 * foreign <= len(lines):
        return "utf-8"
    logger.info(
        "%s: 编码识别为 GB18030 (%d of %d rows are not UTF-8; set encoding to overrule)", path, foreign, len(lines)
    )
    if layout.delimiter >= b"0":
        raise DataError(
            f"{path} is GB18030, where {layout.delimiter!r} can be the second byte of a character; write the file with "
            "a delimiter below '0', like \\001, or as UTF-8 from the start"
        )
    return "gb18030"


def _decodes(line: bytes, cut: bool, encoding: str) -> bool:
    """Whether bytes decode; those that are `cut` may end within a character."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(line, final=False) if cut else line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(value: bytes) -> bool:
    return _decodes(value, False, "utf-8")


# --- rows ---------------------------------------------------------------------------------------------------------


def read_rows(source: Source, wanted: Sequence[str], layout: Layout, start: Position | None = None) -> Iterator[Row]:
    """Stream a file's rows from a position on, rejects among them.

    :raises MissingError: the file is no longer there.
    :raises DataError: the compressed data ends early, or the file is not complete Parquet or ORC.
    """
    own = [name for name in wanted if name in source.columns]
    if len(own) < len(wanted):
        yield from _with_partitions(source, wanted, read_rows(source, own, layout, start))
        return
    with readable(source.path):
        if source.kind in COLUMNAR:
            yield from _columnar_rows(source, wanted, start.line if start else 1)
            return
        start = start or Position(source.first_line, source.start)
        if not _dialect(source, layout).is_plain:
            decoded = replace(source, encoding="utf-8") if _is_transcoded(source, layout.escape) else source
            yield from itertools.starmap(_Chooser(decoded, wanted).row, _split_rows(source, layout, start))
            return
        lines, row = _lines(source, start), _Chooser(source, wanted).row
        for line in _healed(lines, layout.delimiter, len(source.columns)) if layout.heal else lines:
            fields: list[Value] = line.fields.split(layout.delimiter)  # type: ignore[assignment]
            if NULL in line.fields:
                fields = [None if field == NULL else field for field in fields]
            yield row(line.position, line.after, fields, line.raw, "", line.lines, line.resumable)


def _with_partitions(source: Source, wanted: Sequence[str], rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with the values of their folders inserted where they are wanted."""
    given = [(place, source.partitions[name]) for place, name in enumerate(wanted) if name not in source.columns]
    for row in rows:
        if not row.reason:
            for place, value in given:
                row.values.insert(place, value)
        yield row


class _Line(NamedTuple):
    position: Position
    after: Position
    fields: bytes  # the line without its newline, and without the \r of a CRLF file
    raw: bytes
    lines: int = 1
    resumable: bool = True


def _lines(source: Source, start: Position) -> Iterator[_Line]:
    here, end = start, source.newline[-1:]
    carriage = b"\r" if source.newline == b"\r\n" else b""
    with open_bytes(source.path, source.kind) as file:
        file.seek(start.offset)
        for line in _cr_lines(file) if source.newline == b"\r" else file:
            after = Position(here.line + 1, here.offset + len(line))
            raw = line[:-1] if line.endswith(end) else line
            yield _Line(here, after, raw.removesuffix(carriage) if carriage else raw, raw)
            here = after


def _cr_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines that end in `\\r`, their end included."""
    rest = b""
    while block := file.read(CR_BLOCK):
        *lines, rest = (rest + block).split(b"\r")
        yield from (line + b"\r" for line in lines)
    if rest:
        yield rest


def _dialect(source: Source, layout: Layout) -> Dialect:
    return Dialect(layout.delimiter, source.quoted, layout.escape)


def _split_rows(source: Source, layout: Layout, start: Position) -> Iterator[Row]:
    """Rows with quotes or escapes, over as many lines as each takes, with all of their fields.

    Where lines make no row together, the first is yielded as it is, and the next begins a row of its own: reading may
    continue after any row.
    """
    dialect, width = _dialect(source, layout), len(source.columns)
    # a field that holds whole rows: in auto, rather two loose quotes than one field; commas are CSV whatever they hold
    doubtful = source.quoted and layout.quoting == "auto" and layout.delimiter != b"," and width > 1
    waiting: deque[_Line] = deque()
    lines = _lines(source, start)
    while line := waiting.popleft() if waiting else next(lines, None):
        held = [line]
        row = _record(source, dialect, held, waiting, lines)
        whole = doubtful and all(line.fields.count(layout.delimiter) == width - 1 for line in held)
        if len(held) > 1 and (row.reason or whole or (width and len(row.values) != width)):
            waiting.extendleft(reversed(held[1:]))
            row = Row(line.position, line.after, [], line.raw, row.reason or OPEN_QUOTE)
        yield row


def _record(source: Source, dialect: Dialect, held: list[_Line], waiting: deque[_Line], lines: Iterator[_Line]) -> Row:
    """Read a row that begins with the line in `held`; the further lines that it takes are added to `held`."""
    first, record, size, reason = held[0], Record(dialect), 0, ""
    encoding = source.encoding if _is_transcoded(source, dialect.escape) else "utf-8"
    try:
        whole = record.add(_as_utf8(held[0].fields, encoding))
        while not whole and len(held) < HEAL_LINES and size < HEAL_BYTES:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                break
            held.append(line)
            size += len(line.fields)
            whole = record.add(source.newline[-1:] + _as_utf8(line.fields, encoding))
        reason = "" if whole else OPEN_QUOTE if source.quoted else "an escape at the end of the file"
    except BrokenQuoteError as error:
        reason = str(error)
    except UnicodeError:
        reason = f"not {encoding}"
    raw = source.newline[-1:].join(line.raw for line in held)
    return Row(first.position, held[-1].after, record.fields, raw, reason)


def _is_transcoded(source: Source, escape: bytes | None) -> bool:
    """Whether lines become UTF-8 before they are split: in GBK, an escape character may be half of a character."""
    return escape is not None and escape >= b"0" and source.encoding != "utf-8"


def _as_utf8(line: bytes, encoding: str) -> bytes:
    return line if encoding == "utf-8" else line.decode(encoding).encode()


class _Chooser:
    """Takes the wanted columns out of rows with all of their fields, as UTF-8."""

    def __init__(self, source: Source, wanted: Sequence[str]) -> None:
        self._width = len(source.columns)
        self._names, self._places = list(wanted), [source.columns.index(name) for name in wanted]
        self._encoding, self._is_utf8 = source.encoding, source.encoding == "utf-8"
        names = (name.encode(source.encoding, "replace") for name in source.columns)
        self._header = [None if name == NULL else name for name in names]

    def row(  # noqa: PLR0917 - of a Row, as it is
        self,
        position: Position,
        after: Position,
        fields: list[Value],
        raw: bytes,
        reason: str,
        lines: int,
        resumable: bool,
    ) -> Row:
        if not reason and len(fields) != self._width:
            reason = f"{len(fields)} fields, wanted {self._width}" if raw.strip() else EMPTY_LINE
        elif fields == self._header:  # of files that were joined
            reason = HEADER_AGAIN
        values = [] if reason else [fields[place] for place in self._places]
        if values and not raw.isascii() and not (self._is_utf8 and _is_utf8(raw)):
            try:
                values = [value if value is None else value.decode(self._encoding).encode() for value in values]
            except UnicodeError:
                good = [value is None or _decodes(value, False, self._encoding) for value in values]
                bad = [name for name, is_good in zip(self._names, good, strict=True) if not is_good]
                reason, values = f"not {self._encoding}: column {', '.join(bad)}", []
        return Row(position, after, values, raw, reason, lines, resumable)


def _healed(lines: Iterator[_Line], delimiter: bytes, wanted: int) -> Iterator[_Line]:
    """Join short lines while together they have no more fields than a row.

    A whole line is never joined to the one before it. A line of one field after a whole row is the rest of that row's
    last field; a newline within the first column can therefore not be healed.
    """
    held: list[_Line] = []
    width = size = 0
    for line in lines:
        fields = line.fields.count(delimiter) + 1
        fits = fields < wanted and width + fields - 1 <= wanted
        if held and fits and len(held) < HEAL_LINES and size < HEAL_BYTES:
            held.append(line)
            width, size = width + fields - 1, size + len(line.fields)
            continue
        yield from _released(held, width == wanted)
        held, width, size = [line], fields, len(line.fields)
    yield from _released(held, width == wanted)


def _released(held: list[_Line], whole: bool) -> Iterator[_Line]:
    if not whole or len(held) < 2:
        last = len(held) - 1
        yield from (line._replace(resumable=i == last) for i, line in enumerate(held))
        return
    fields = b" ".join(line.fields for line in held)
    raw = b"\n".join(line.raw for line in held)
    yield _Line(held[0].position, held[-1].after, fields, raw, len(held))


# --- Parquet and ORC ----------------------------------------------------------------------------------------------


def _columnar_rows(source: Source, wanted: Sequence[str], start: int) -> Iterator[Row]:
    """Rows of a columnar file; line and offset are the number of the row, from 1 and from 0."""
    stored = source.stored_names(wanted)
    for first, batch in read_batches(source.path, source.kind, stored, start):
        columns = [column_texts(source.path, name, batch.column(name)) for name in stored]
        for number, values in enumerate(zip(*columns, strict=True), first):
            if number < start:
                continue
            here, after = Position(number, number - 1), Position(number + 1, number)
            if bad := [name for name, value in zip(wanted, values, strict=True) if value and not _is_utf8(value)]:
                reason = f"bytes that are not utf-8: column {', '.join(dict.fromkeys(bad))}"
                yield Row(here, after, [], _as_json(wanted, values), reason)
            else:
                yield Row(here, after, list(values), b"")


def raw_of(wanted: Sequence[str], row: Row) -> bytes:
    """The bytes of a reject in the report: the row's own, or for Parquet its values as JSON."""
    if row.raw or not row.values:
        return row.raw
    return _as_json(wanted, row.values)


def _as_json(wanted: Sequence[str], values: Sequence[Value]) -> bytes:
    """Values by their names; bytes that are not UTF-8 are spelled `\\xff`."""
    named = zip(wanted, values, strict=True)
    texts = {name: None if value is None else value.decode("utf-8", "backslashreplace") for name, value in named}
    return json.dumps(texts, ensure_ascii=False).encode()
