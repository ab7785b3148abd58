"""Delimited text as Hive writes it, and Parquet, streamed row by row.

Nothing is quoted and nothing escapes: rows end at `\\n` and nowhere else, fields at the delimiter, `\\N` is null and
differs from the empty string. Bytes are split first and decoded after, so one bad byte costs one row. Splitting bytes
is safe in UTF-8 and in GBK/GB18030, whose second bytes are 0x30 and above. A row that does not fit is handed over as
a reject, never dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from ebr_lib.errors import DataError, MissingError
from ebr_lib.logs import logger

if TYPE_CHECKING:
    import pyarrow as pa

NULL = b"\\N"
BOM = b"\xef\xbb\xbf"
SAMPLE_BYTES = 1 << 20  # read at once to tell the encoding by
SAMPLE_LIMIT = 1 << 26  # read in all, where all of it is ASCII
PARQUET_HEAD = b"PAR1\x15"  # its mark, and how the first header begins; a column of text may be named PAR1
HEAL_LINES, HEAL_BYTES = 10_000, 1 << 26  # of one row that is put together again
PARQUET_ROWS = 4096

Value = bytes | None


@dataclass(frozen=True)
class Layout:
    """How files are to be read.

    :param delimiter: one byte between the fields.
    :param columns: names of the columns of files without a header row; None takes each file's first row.
    :param encoding: auto (UTF-8, or GB18030 where most rows with other than ASCII are that and not UTF-8), or a codec.
    :param heal: put rows together again that a newline inside a field has broken; the newline becomes a space.
    """

    delimiter: bytes = b"\x01"
    columns: tuple[str, ...] | None = None
    encoding: str = "auto"
    heal: bool = False


@dataclass(frozen=True)
class Source:
    """One input file whose header is known; rows begin at byte `start`, which is line `first_line`.

    `extent` is where its positions end, in what they count: uncompressed bytes, or rows of a Parquet file. `stamp` is
    its size and time of change, to tell whether it is still the same.
    """

    path: Path
    name: str
    columns: tuple[str, ...]
    stamp: tuple[int, int]
    extent: int
    encoding: str = "utf-8"
    crlf: bool = False
    start: int = 0
    first_line: int = 1

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.stamp[0]

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was opened.

        :raises DataError: its size or time of change is another.
        :raises MissingError: it is no longer there.
        """
        with readable(self.path):
            now = stamp_of(self.path)
        if now != self.stamp:
            raise DataError(
                f"{self.path} changed while it was read ({self.size} bytes then, {now[0]} now); what "
                "was written stays. Run the same call again when it is whole: it reads that file anew"
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

    `values` are the wanted columns in UTF-8, None for null; empty for a reject, whose `reason` says why. `raw` are the
    bytes as they were, the newline left out, but for those inside of a row that was healed. `lines` counts the lines
    that were joined into it. Reading from `after` on gives the rows that follow only where a row is `resumable`:
    lines of which healing has made no row might find others to be joined with.
    """

    position: Position
    after: Position
    values: list[Value]
    raw: bytes
    reason: str = ""
    lines: int = 1
    resumable: bool = True


# --- opening ------------------------------------------------------------------------------------------------------


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        return True
    with open(path, "rb") as file:
        return file.read(len(PARQUET_HEAD)) == PARQUET_HEAD


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it.

    :raises MissingError: it is no longer there.
    :raises DataError: its data is damaged, or it cannot be read.
    """
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{path}: the file is no longer there; put it back and run the same call again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short ({error}); fetch the file again") from error
    except OSError as error:
        if error.errno is not None:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); see to it and run the same call again"
            ) from error
        raise _no_parquet(path, error) from error  # the codecs of Arrow tell of damaged data so
    except pa.ArrowInvalid as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no whole Parquet file ({error}); fetch it again")


def _open(path: Path) -> IO[bytes]:
    file = open(path, "rb")  # noqa: SIM115 - the callers close it
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20))


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing, compressed or not."""
    with readable(path), _open(path) as file:
        return not file.read(1)


def open_source(path: Path, layout: Layout, name: str | None = None) -> Source:
    """Read a file's header and tell its encoding.

    :raises DataError: the file is empty, is UTF-16, or names a column twice.
    """
    name = name or path.name
    with readable(path):
        source = _open_parquet(path, name) if _is_parquet(path) else _open_text(path, layout, name)
    twice = sorted({column for column in source.columns if source.columns.count(column) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} is there more than once; rename it")
    return source


def _open_parquet(path: Path, name: str) -> Source:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return Source(path, name, tuple(file.schema_arrow.names), stamp_of(path), file.metadata.num_rows)


def _open_text(path: Path, layout: Layout, name: str) -> Source:
    with _open(path) as file:
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
    encoding = "utf-8" if bom else _encoding_of(path, sample, layout)
    named = _header(first, layout.delimiter, encoding)
    stamp, extent = stamp_of(path), _extent(path)
    if layout.columns is None or named == layout.columns:
        return Source(path, name, named, stamp, extent, encoding, first.endswith(b"\r\n"), bom + len(first), 2)
    if set(named) == set(layout.columns):
        logger.warning(
            "%s: the first row holds the names in columns, in another order (%s); it is read as a row: "
            "leave columns out to take it as the header",
            path,
            ", ".join(named),
        )
    return Source(path, name, layout.columns, stamp, extent, encoding, _is_crlf(first + block), bom, 1)


def _is_crlf(sample: bytes) -> bool:
    """Whether every row ends in `\\r\\n`; a file without a header shows it in no other way."""
    newlines = sample.count(b"\n")
    return newlines > 0 and sample.count(b"\r\n") == newlines


class _Piece(NamedTuple):
    line: bytes
    cut: bool  # what follows in the file belongs to it


def _foreign_lines(file: IO[bytes], first: bytes, block: bytes) -> list[_Piece]:
    """Lines with other than ASCII, to tell the encoding by."""
    lines = _not_ascii(first + block, len(block) == SAMPLE_BYTES)
    read = len(block)
    while block and not lines and read < SAMPLE_LIMIT:
        block = file.read(SAMPLE_BYTES)
        lines = _not_ascii(block, len(block) == SAMPLE_BYTES)
        read += len(block)
    return lines


def _not_ascii(block: bytes, goes_on: bool) -> list[_Piece]:
    if block.isascii():
        return []
    *whole, last = block.split(b"\n")
    pieces = [*(_Piece(line, False) for line in whole), _Piece(last, goes_on)]
    return [piece for piece in pieces if not piece.line.isascii()]


def _extent(path: Path) -> int:
    """Bytes of a file, uncompressed; gzip notes them in its last four bytes, of one member and below 4 GiB."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        if is_gzip:
            file.seek(-4, io.SEEK_END)
            return int.from_bytes(file.read(4), "little")
        return file.seek(0, io.SEEK_END)


def _header(line: bytes, delimiter: bytes, encoding: str) -> tuple[str, ...]:
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    return tuple(field.decode(encoding, "replace") for field in line.split(delimiter))


def _encoding_of(path: Path, lines: list[_Piece], layout: Layout) -> str:
    if layout.encoding != "auto":
        return layout.encoding
    foreign = sum(not _decodes(*piece, "utf-8") and _decodes(*piece, "gb18030") for piece in lines)
    if 2 * foreign <= len(lines):
        return "utf-8"
    logger.info(
        "%s: 编码识别为 GB18030 (%d of %d rows are no UTF-8; set encoding to overrule)", path, foreign, len(lines)
    )
    if layout.delimiter >= b"0":
        raise DataError(
            f"{path} is GB18030, where {layout.delimiter!r} can be the second byte of a character; write the file with "
            "a delimiter below '0', like \\001, or as UTF-8 from the start"
        )
    return "gb18030"


def _decodes(line: bytes, cut: bool, encoding: str) -> bool:
    """Whether bytes are of an encoding; those that are `cut` may end within a character."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(line, final=False) if cut else line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(value: bytes) -> bool:
    return _decodes(value, False, "utf-8")


def need_columns(source: Source, wanted: Iterable[str], delimiter: bytes) -> None:
    """Check that a file has the columns, and that they can be read as text.

    :raises DataError: lists the columns wanted and found, and the likely way out; or names a Parquet column of lists.
    """
    wanted = list(wanted)
    missing = [column for column in wanted if column not in source.columns]
    if not missing:
        _need_texts(source, wanted)
        return
    found = ", ".join(column[:40] for column in source.columns[:20])
    hint = "for files without a header row, give their names: columns=[…]"
    if len(source.columns) == 1:
        others = {",": "a comma", "\t": "a tab", "|": "a bar", ";": "a semicolon"}
        near = [name for sign, name in others.items() if sign in source.columns[0]]
        hint = f"the first row holds {near[0]}: is that the delimiter?" if near else hint
    raise DataError(f"{source.path}: no column {', '.join(missing)}; found {found} (split by {delimiter!r}); {hint}")


# --- rows ---------------------------------------------------------------------------------------------------------


def read_rows(source: Source, wanted: Sequence[str], layout: Layout, start: Position | None = None) -> Iterator[Row]:
    """Stream a file's rows from a position on, rejects among them.

    :raises MissingError: the file is no longer there.
    :raises DataError: the compressed data ends early, or the file is no Parquet.
    """
    with readable(source.path):
        if _is_parquet(source.path):
            yield from _parquet_rows(source, wanted, start.line if start else 1)
            return
        lines = _lines(source, start or Position(source.first_line, source.start))
        choose = _Chooser(source, wanted, layout.delimiter)
        for line in _healed(lines, choose) if layout.heal else lines:
            yield choose.row(line)


class _Line(NamedTuple):
    position: Position
    after: Position
    fields: bytes  # the line without its newline, and without the \r of a CRLF file
    raw: bytes
    lines: int = 1
    resumable: bool = True


def _lines(source: Source, start: Position) -> Iterator[_Line]:
    here = start
    with _open(source.path) as file:
        file.seek(start.offset)
        for line in file:
            after = Position(here.line + 1, here.offset + len(line))
            raw = line[:-1] if line.endswith(b"\n") else line
            yield _Line(here, after, raw.removesuffix(b"\r") if source.crlf else raw, raw)
            here = after


class _Chooser:
    """Takes the wanted columns out of a line, as UTF-8."""

    def __init__(self, source: Source, wanted: Sequence[str], delimiter: bytes) -> None:
        self.delimiter = delimiter
        self.width = len(source.columns)
        self._places = [source.columns.index(name) for name in wanted]
        self._names = list(wanted)
        self._encoding = source.encoding
        self._is_utf8 = source.encoding == "utf-8"

    def row(self, line: _Line) -> Row:
        fields = line.fields.split(self.delimiter)
        if len(fields) != self.width:
            reason = f"{len(fields)} fields, wanted {self.width}"
            return self._reject(line, reason)
        values = [None if fields[place] == NULL else fields[place] for place in self._places]
        if not line.fields.isascii() and not (self._is_utf8 and _is_utf8(line.fields)):
            try:
                values = [self._as_utf8(value) for value in values]
            except UnicodeError:
                return self._reject(line, self._undecodable(values))
        return Row(line.position, line.after, values, line.raw, "", line.lines, line.resumable)

    def _reject(self, line: _Line, reason: str) -> Row:
        return Row(line.position, line.after, [], line.raw, reason, line.lines, line.resumable)

    def _as_utf8(self, value: Value) -> Value:
        return None if value is None else value.decode(self._encoding).encode("utf-8")

    def _undecodable(self, values: list[Value]) -> str:
        named = dict(zip(self._names, values, strict=True))
        bad = [name for name, value in named.items() if value and not self._is_good(value)]
        return f"not {self._encoding}: column {', '.join(bad)}"

    def _is_good(self, value: bytes) -> bool:
        try:
            self._as_utf8(value)
        except UnicodeError:
            return False
        return True


def _healed(lines: Iterator[_Line], choose: _Chooser) -> Iterator[_Line]:
    """Join short lines while together they have no more fields than a row.

    A line that is whole by itself is never joined to what stands before it. A line of one field after a whole row is
    the rest of that row's last field; a newline within the first column can therefore not be healed.
    """
    held: list[_Line] = []
    width = size = 0
    for line in lines:
        fields = line.fields.count(choose.delimiter) + 1
        fits = fields < choose.width and width + fields - 1 <= choose.width
        if held and fits and len(held) < HEAL_LINES and size < HEAL_BYTES:
            held.append(line)
            width, size = width + fields - 1, size + len(line.fields)
            continue
        yield from _released(held, width == choose.width)
        held, width, size = [line], fields, len(line.fields)
    yield from _released(held, width == choose.width)


def _released(held: list[_Line], whole: bool) -> Iterator[_Line]:
    if not whole or len(held) < 2:
        last = len(held) - 1
        yield from (line._replace(resumable=i == last) for i, line in enumerate(held))
        return
    fields = b" ".join(line.fields for line in held)
    raw = b"\n".join(line.raw for line in held)
    yield _Line(held[0].position, held[-1].after, fields, raw, len(held))


# --- Parquet ------------------------------------------------------------------------------------------------------


def _parquet_rows(source: Source, wanted: Sequence[str], start: int) -> Iterator[Row]:
    """Rows of a Parquet file; their line is the number of the row from 1, and so is their offset, from 0."""
    import pyarrow.parquet as pq

    done = 0
    with pq.ParquetFile(source.path) as file:
        groups: list[int] = []
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not groups and done + rows < start:  # whole groups before the start are not read
                done += rows
            else:
                groups.append(group)
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=list(wanted)):
            columns = [_as_bytes(batch.column(name)) for name in wanted]
            for values in zip(*columns, strict=True):
                done += 1
                if done >= start:
                    yield _parquet_row(Position(done, done - 1), wanted, list(values))


def _parquet_row(position: Position, wanted: Sequence[str], values: list[Value]) -> Row:
    after = Position(position.line + 1, position.offset + 1)
    bad = [name for name, value in zip(wanted, values, strict=True) if value and not _is_utf8(value)]
    if not bad:
        return Row(position, after, values, b"")
    return Row(position, after, [], _as_json(wanted, values), f"bytes that are no utf-8: column {', '.join(bad)}")


def _as_bytes(column: pa.Array) -> list[Any]:
    """A column as text in UTF-8; bytes are taken for text as they are."""
    import pyarrow as pa

    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return (plain if _holds_bytes(plain.type) else plain.cast(pa.string())).cast(pa.binary()).to_pylist()


def _need_texts(source: Source, wanted: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(source.path):
        if not _is_parquet(source.path):
            return
        schema = pq.read_schema(source.path)
    for name in wanted:
        try:
            _as_bytes(pa.array([], schema.field(name).type))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{source.path}: column {name} is {schema.field(name).type}, which is no text; "
                "name the columns to keep in output_columns, without it"
            ) from error


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def raw_of(wanted: Sequence[str], row: Row) -> bytes:
    """The bytes that a reject is reported with: the row's own, or for Parquet its values as JSON."""
    if row.raw or not row.values:
        return row.raw
    return _as_json(wanted, row.values)


def _as_json(wanted: Sequence[str], values: Sequence[Value]) -> bytes:
    """Values by their names; bytes that are no UTF-8 are spelled `\\xff`."""
    named = zip(wanted, values, strict=True)
    texts = {name: None if value is None else value.decode("utf-8", "backslashreplace") for name, value in named}
    return json.dumps(texts, ensure_ascii=False).encode()
