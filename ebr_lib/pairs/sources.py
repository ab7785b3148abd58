"""Log and catalogue files as one lazy table of text columns, whatever their formats."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_lib.data.columnar import read_batches, read_schema
from ebr_lib.data.containers import BZ2, COLUMNAR, ORC, PARQUET, kind_of, opened, readable, unpacked_size
from ebr_lib.data.finder import find_files, partitions_of
from ebr_lib.data.queries import plain_name
from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import sha256_of
from ebr_lib.names import did_you_mean

if TYPE_CHECKING:
    import polars as pl

FILE, FITS = "__file__", "__fits__"  # columns beside those of the files: where a row is from, whether it fits
JSON_LINES, DELIMITED = "json lines", "delimited"
NULL = "\\N"  # of Hive
_PEEKED_LINES = 100
BYTES_PER_ROW = 80  # of a log as text, about
COPY = "the same bytes as another file"


@dataclass(frozen=True)
class _Layout:
    """What files share that are scanned together.

    :ivar separator: of delimited text; None for Parquet and JSON lines.
    :ivar partitions: columns that the folders give.
    """

    kind: str
    columns: tuple[str, ...]
    separator: str | None = None
    has_header: bool = False
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.columns, *(name for name, _ in self.partitions if name not in self.columns))


@dataclass(frozen=True)
class Table:
    """Files that make one table.

    :ivar names_knob: the knob that names the columns of files without a header row.
    :ivar columns: those of every file together, in order.
    :ivar size: bytes of the texts, unpacked; an estimate.
    :ivar copies: the place of a copy that is read in place of a file, to that file.
    """

    place: str
    names_knob: str
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    size: int
    layouts: Mapping[_Layout, Sequence[Path]]
    copies: Mapping[str, str]

    def scan(self, wanted: Sequence[str], time: str | None = None) -> pl.LazyFrame:
        """The wanted columns as texts, null where a file lacks one, with `FILE` and `FITS`; `time` keeps its type."""
        import polars as pl

        frames = [_scanned(layout, files, wanted, time) for layout, files in self.layouts.items()]
        if time and len({frame.collect_schema()[time] for frame in frames}) > 1:
            frames = [frame.with_columns(pl.col(time).cast(pl.String)) for frame in frames]
        frame = pl.concat(frames) if len(frames) > 1 else frames[0]
        return frame.with_columns(pl.col(FILE).replace(self.copies)) if self.copies else frame

    def column(self, given: str | None, usual: Sequence[str], knob: str) -> str | None:
        """The column that a knob names, or the first of the usual ones; None if neither is there.

        :raises DataError: the named column is not there; names the nearest.
        """
        if given is not None:
            return self.need(given, knob)
        plain = {plain_name(name): name for name in reversed(self.columns)}
        return next((plain[plain_name(name)] for name in usual if plain_name(name) in plain), None)

    def need(self, name: str, knob: str) -> str:
        """The name, if there is such a column.

        :raises DataError: there is none; names the nearest.
        """
        if name not in self.columns:
            raise DataError(
                f"{knob}: {self.place} has no column {name}{did_you_mean(name, self.columns)}; its columns are "
                f"{', '.join(self.columns)}"
            )
        return name

    def some(self, given: str | None, usual: Sequence[str], knob: str) -> str:
        """As `column`, and one must be there.

        :raises DataError: none is; names those that are.
        """
        if (found := self.column(given, usual, knob)) is None:
            raise DataError(
                f"{self.place}: looked for a column {', '.join(usual)}, found {', '.join(self.columns)}; name it with "
                f"{knob}, or, if there is no header row, all of them with {self.names_knob}"
            )
        return found


def open_table(
    places: str | Sequence[str],
    patterns: Sequence[str],
    knob: str,
    names_knob: str,
    spill: Path,
    *,
    columns: Sequence[str] = (),
    separator: str | None = None,
) -> Table:
    """Find the files of a table and what is in each.

    :param places: files and folders, which `knob` names.
    :param names_knob: the knob that gives `columns`.
    :param spill: folder for what polars does not read itself, ORC and bz2, as Parquet and text.
    :param columns: names for files without a header row.
    :param separator: of delimited text; None looks at each first line.
    :raises MissingError: a place is not there, or has no files.
    :raises DataError: a file is of another kind.
    """
    layouts: dict[_Layout, list[Path]] = {}
    files: list[Path] = []
    copies: dict[str, str] = {}
    for file, root in _files(places, patterns, knob):
        folders = partitions_of(file, root)
        parts = tuple((name, None if value is None else value.decode()) for name, value in folders.items())
        layout, place = _layout_of(file, spill, columns, separator, parts)
        if twice := sorted(name for name, count in Counter(layout.columns).items() if count > 1):
            raise DataError(
                f"{file}: column {', '.join(twice)} is there more than once; if there is no header row, name all "
                f"columns with {names_knob}"
            )
        layouts.setdefault(layout, []).append(place)
        if place != file:
            copies[str(place)] = str(file)
        files.append(file)
    names = tuple(dict.fromkeys(name for layout in layouts for name in layout.names))
    shown = places if isinstance(places, str) else ", ".join(places)
    return Table(shown, names_knob, tuple(files), names, sum(map(_size_of, files)), layouts, copies)


def _files(places: str | Sequence[str], patterns: Sequence[str], knob: str) -> Iterator[tuple[Path, Path]]:
    """The files with the place that each was found in; a copy of another file is left out."""
    seen: dict[tuple[int, str], Path] = {}
    sizes: dict[int, Path] = {}
    count = 0
    for place in [places] if isinstance(places, str) else places:
        found = find_files(place, patterns, knob)
        copies = []
        for file in found.files:
            size = file.stat().st_size
            if size in sizes:  # only files of equal size can be equal
                first = sizes[size]
                seen.setdefault((size, sha256_of(first)), first)
                if (key := (size, sha256_of(file))) in seen:
                    copies.append(file)
                    continue
                seen[key] = file
            sizes.setdefault(size, file)
        left = found.without(copies, COPY)
        left.log("add the pattern to file_patterns")
        count += len(left.files)
        yield from ((file, found.root) for file in left.files)
    if not count:
        raise MissingError(f"{knob} {places}: wanted files with names like {', '.join(patterns)}, found none")


def _size_of(file: Path) -> int:
    kind = kind_of(file)
    return BYTES_PER_ROW * read_schema(file, kind)[1] if kind in COLUMNAR else unpacked_size(file, kind)


# --- what a file holds --------------------------------------------------------------------------------------------


def _layout_of(
    file: Path, spill: Path, columns: Sequence[str], separator: str | None, parts: tuple[tuple[str, str | None], ...]
) -> tuple[_Layout, Path]:
    with readable(file):
        kind = kind_of(file)
    if kind in COLUMNAR:
        schema, _ = read_schema(file, kind)
        place = _as_parquet(file, spill) if kind == ORC else file
        return _Layout(PARQUET, tuple(schema.names), partitions=parts), place
    if kind == BZ2:
        file = _unpacked(file, spill)
    if not (lines := _first_lines(file)):
        raise DataError(f"{file} is empty")
    head = lines[0].lstrip()
    if head.startswith("{"):
        return _Layout(JSON_LINES, _keys(file, lines), partitions=parts), file
    if head.startswith("["):
        raise DataError(f"{file} holds a JSON array, which is not read as a stream; write one object per line")
    mark = separator or next((mark for mark in ("\x01", "\t") if mark in lines[0]), ",")
    names = tuple(columns) or tuple(name.strip().strip('"') for name in lines[0].split(mark))
    return _Layout(DELIMITED, names, mark, not columns, parts), file


def _first_lines(file: Path) -> list[str]:
    with readable(file), opened(file) as raw:
        head = [line.decode("utf-8", "replace").rstrip("\r\n") for line in islice(raw, _PEEKED_LINES)]
    return [head[0].removeprefix("\ufeff"), *head[1:]] if head else []


def _keys(file: Path, lines: Sequence[str]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                names |= dict.fromkeys(json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file}, line {number}: wanted one JSON object per line ({error})") from error
    return tuple(names)


def _as_parquet(file: Path, spill: Path) -> Path:
    """Copy an ORC file as Parquet, stripe by stripe."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = spill / f"orc-{sum(1 for _ in spill.iterdir())}.parquet"
    schema, _ = read_schema(file, ORC)
    with pq.ParquetWriter(place, pa.schema(list(schema)).remove_metadata()) as writer:
        for _, batch in read_batches(file, ORC, schema.names, 1):
            writer.write_batch(batch)
    return place


def _unpacked(file: Path, spill: Path) -> Path:
    """Unpack a file of bz2, which polars does not read."""
    place = spill / f"bz2-{sum(1 for _ in spill.iterdir())}{Path(file.stem).suffix}"
    with readable(file), opened(file) as raw, place.open("wb") as out:
        shutil.copyfileobj(raw, out)
    return place


# --- scanning -----------------------------------------------------------------------------------------------------


def _scanned(layout: _Layout, files: Sequence[Path], wanted: Sequence[str], time: str | None) -> pl.LazyFrame:
    import polars as pl

    there = [name for name in wanted if name in layout.columns]
    if layout.kind == PARQUET:
        frame = _parquet(files, there, time)
    else:
        frame = (_json_lines if layout.kind == JSON_LINES else _delimited)(layout, files, there)
    fixed = {name: value for name, value in layout.partitions if name not in layout.columns}
    return frame.select(
        *(
            pl.col(name) if name in layout.columns else pl.lit(fixed.get(name), dtype=pl.String).alias(name)
            for name in wanted
        ),
        FILE,
        FITS,
    )


def _parquet(files: Sequence[Path], wanted: Sequence[str], time: str | None) -> pl.LazyFrame:
    import polars as pl

    frame = pl.scan_parquet(list(files), glob=False, include_file_paths=FILE, hive_partitioning=False)
    schema = frame.collect_schema()
    return frame.select(
        *(pl.col(name) if name == time else _as_text(name, schema[name]) for name in wanted),
        FILE,
        pl.lit(True).alias(FITS),
    )


def _as_text(name: str, kind: pl.DataType) -> pl.Expr:
    """A column as text; whole floats become whole numbers, as ids from pandas are."""
    import polars as pl

    column = pl.col(name)
    if kind == pl.String:
        return column
    if kind.is_float():
        whole = column.cast(pl.Int64, strict=False)
        return pl.when(column == whole).then(whole.cast(pl.String)).otherwise(column.cast(pl.String)).alias(name)
    return column.cast(pl.String, strict=False)


def _json_lines(layout: _Layout, files: Sequence[Path], wanted: Sequence[str]) -> pl.LazyFrame:
    import polars as pl

    schema = dict.fromkeys(wanted, pl.String)
    frame = pl.scan_ndjson(list(files), schema=schema, include_file_paths=FILE)
    return frame.select(*wanted, FILE, pl.lit(True).alias(FITS))


def _delimited(layout: _Layout, files: Sequence[Path], wanted: Sequence[str]) -> pl.LazyFrame:
    if layout.separator == ",":
        return _comma_separated(layout, files, wanted)
    return _split_lines(layout, files, wanted)


def _comma_separated(layout: _Layout, files: Sequence[Path], wanted: Sequence[str]) -> pl.LazyFrame:
    import polars as pl

    frame = pl.scan_csv(
        list(files),
        has_header=False,
        skip_rows=int(layout.has_header),
        schema=dict.fromkeys(layout.columns, pl.String),
        null_values=NULL,
        empty_string_is_null=False,
        encoding="utf8-lossy",
        include_file_paths=FILE,
        glob=False,
    )
    return frame.select(*wanted, FILE, pl.lit(True).alias(FITS))


def _split_lines(layout: _Layout, files: Sequence[Path], wanted: Sequence[str]) -> pl.LazyFrame:
    """Fields between tabs or \\001 as Hive writes them: no quotes; a row with other fields than the header is kept,
    and marked."""
    import polars as pl

    frame = pl.scan_csv(
        list(files),
        has_header=False,
        skip_lines=int(layout.has_header),
        separator="\x00",  # in no text: a row is one field
        quote_char=None,
        schema={"line": pl.String},
        empty_string_is_null=False,
        truncate_ragged_lines=True,
        encoding="utf8-lossy",
        include_file_paths=FILE,
        glob=False,
    ).filter(pl.col("line").str.strip_chars() != "")
    fields = pl.col("line").str.strip_chars_end("\r").str.split(layout.separator or "\x01")
    frame = frame.with_columns(fields.alias("fields"))

    def field(name: str) -> pl.Expr:
        value = pl.col("fields").list.get(layout.columns.index(name), null_on_oob=True)
        return pl.when(value != NULL).then(value).alias(name)

    fits = (pl.col("fields").list.len() == len(layout.columns)).alias(FITS)
    return frame.select(*map(field, wanted), FILE, fits)
