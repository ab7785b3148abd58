"""Log and catalogue files as one lazy table of text columns, whatever their formats."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import polars as pl

from ebr_lib.data.columnar import read_batches, read_schema
from ebr_lib.data.containers import BZ2, COLUMNAR, ORC, PARQUET, kind_of, opened, readable, unpacked_size
from ebr_lib.data.finder import find_files, partitions_of
from ebr_lib.data.queries import plain_name
from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import sha256_of
from ebr_lib.names import did_you_mean
from ebr_lib.pairs.columns import FILE, FITS

JSON_LINES, DELIMITED = "json lines", "delimited"
NULL = "\\N"  # of Hive
_PEEKED_LINES = 100
BYTES_PER_ROW = 80  # of a log as text, about


class _Layout(NamedTuple):
    """What files share that are scanned together: of text the separator, and columns that the folders give."""

    kind: str
    columns: tuple[str, ...]
    partitions: tuple[tuple[str, str | None], ...]
    separator: str = ""
    has_header: bool = False


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
    files: Sequence[Path]
    columns: Sequence[str]
    size: int
    layouts: Mapping[_Layout, list[Path]]
    copies: Mapping[str, str]

    def scan(self, wanted: Sequence[str], time: str | None = None) -> pl.LazyFrame:
        """The wanted columns as texts, null where a file lacks one, with `FILE` and `FITS`; `time` keeps its type."""
        frames = [_scanned(layout, files, wanted, time) for layout, files in self.layouts.items()]
        if time and len({frame.collect_schema()[time] for frame in frames}) > 1:
            frames = [frame.with_columns(pl.col(time).cast(pl.String)) for frame in frames]
        frame = pl.concat(frames) if len(frames) > 1 else frames[0]
        return frame.with_columns(pl.col(FILE).replace(self.copies)) if self.copies else frame

    def column(self, given: str | None, usual: Sequence[str], knob: str) -> str | None:
        """The column that a knob names, or the first of the usual ones; None if neither is there.

        :raises DataError: the named column is not there; names the nearest.
        """
        if given is None:
            plain = {plain_name(name): name for name in reversed(self.columns)}
            return next((plain[plain_name(name)] for name in usual if plain_name(name) in plain), None)
        if given not in self.columns:
            raise DataError(
                f"{knob}: {self.place} has no column {given}{did_you_mean(given, self.columns)}; its columns are "
                f"{', '.join(self.columns)}"
            )
        return given

    def need(self, given: str | None, usual: Sequence[str], knob: str) -> str:
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
    copies, size = {}, 0
    found = _files([places] if isinstance(places, str) else places, patterns, knob)
    if not found:
        raise MissingError(f"{knob} {places}: wanted files with names like {', '.join(patterns)}, found none")
    for file, root in found.items():
        folders = partitions_of(file, root)
        parts = tuple((name, None if value is None else value.decode()) for name, value in folders.items())
        with readable(file):
            kind = kind_of(file)
        if kind in COLUMNAR:
            schema, rows = read_schema(file, kind)
            size += BYTES_PER_ROW * rows
            place = _as_parquet(file, spill) if kind == ORC else file
            layout = _Layout(PARQUET, tuple(schema.names), parts)
        else:
            size += unpacked_size(file, kind)
            place = _unpacked(file, spill) if kind == BZ2 else file
            layout = _text_layout(place, columns, separator, parts)
        if twice := sorted(name for name, count in Counter(layout.columns).items() if count > 1):
            raise DataError(
                f"{file}: column {', '.join(twice)} is there more than once; if there is no header row, name all "
                f"columns with {names_knob}"
            )
        layouts.setdefault(layout, []).append(place)
        if place != file:
            copies[str(place)] = str(file)
    names = dict.fromkeys(name for layout in layouts for name in (*layout.columns, *dict(layout.partitions)))
    shown = places if isinstance(places, str) else ", ".join(places)
    return Table(shown, names_knob, list(found), list(names), size, layouts, copies)


def _files(places: Sequence[str], patterns: Sequence[str], knob: str) -> dict[Path, Path]:
    """The files, each with the place that it was found in; a copy of another file is left out."""
    found = [find_files(place, patterns, knob) for place in places]
    sizes = Counter(file.stat().st_size for one in found for file in one.files)
    seen: set[str] = set()
    files: dict[Path, Path] = {}
    for one in found:
        copies = []
        for file in one.files:
            if sizes[file.stat().st_size] > 1:  # only files of equal size can be equal
                digest = sha256_of(file)
                copies += [file] if digest in seen else []
                seen.add(digest)
        left = one.without(copies, "the same bytes as another file")
        left.log("add the pattern to file_patterns")
        files |= dict.fromkeys(left.files, one.root)
    return files


# --- what a file holds --------------------------------------------------------------------------------------------


def _text_layout(
    file: Path, columns: Sequence[str], separator: str | None, parts: tuple[tuple[str, str | None], ...]
) -> _Layout:
    with readable(file), opened(file) as raw:
        lines = [line.decode("utf-8", "replace").rstrip("\r\n") for line in islice(raw, _PEEKED_LINES)]
    if not lines:
        raise DataError(f"{file} is empty")
    lines[0] = lines[0].removeprefix("\ufeff")
    head = lines[0].lstrip()
    if head.startswith("{"):
        return _Layout(JSON_LINES, _keys(file, lines), parts)
    if head.startswith("["):
        raise DataError(f"{file} holds a JSON array, which is not read as a stream; write one object per line")
    mark = separator or next((mark for mark in ("\x01", "\t") if mark in lines[0]), ",")
    names = tuple(columns) or tuple(name.strip().strip('"') for name in lines[0].split(mark))
    return _Layout(DELIMITED, names, parts, mark, not columns)


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


def _scanned(layout: _Layout, files: list[Path], wanted: Sequence[str], time: str | None) -> pl.LazyFrame:
    there = [name for name in wanted if name in layout.columns]
    values, fits = {name: pl.col(name) for name in there}, pl.lit(True)
    if layout.kind == PARQUET:
        frame = pl.scan_parquet(files, glob=False, include_file_paths=FILE, hive_partitioning=False)
        schema = frame.collect_schema()
        values = {name: pl.col(name) if name == time else _as_text(name, schema[name]) for name in there}
    elif layout.kind == JSON_LINES:
        frame = pl.scan_ndjson(files, schema=dict.fromkeys(there, pl.String), include_file_paths=FILE)
    elif layout.separator == ",":
        frame = pl.scan_csv(
            files, has_header=False, skip_rows=int(layout.has_header), glob=False, include_file_paths=FILE,
            schema=dict.fromkeys(layout.columns, pl.String), null_values=NULL, empty_string_is_null=False,
            encoding="utf8-lossy",
        )  # fmt: skip
    else:
        frame = _split_lines(layout, files)
        fields = {name: pl.col("fields").list.get(layout.columns.index(name), null_on_oob=True) for name in there}
        values = {name: pl.when(value != NULL).then(value).alias(name) for name, value in fields.items()}
        fits = pl.col("fields").list.len() == len(layout.columns)
    of_folders = dict(layout.partitions)
    return frame.select(
        *(values.get(name, pl.lit(of_folders.get(name), dtype=pl.String).alias(name)) for name in wanted),
        FILE,
        fits.alias(FITS),
    )


def _as_text(name: str, kind: pl.DataType) -> pl.Expr:
    """A column as text; whole floats become whole numbers, as ids from pandas are."""
    text = pl.col(name).cast(pl.String, strict=False)
    whole = pl.col(name).cast(pl.Int64, strict=False)
    return pl.when(pl.col(name) == whole).then(whole.cast(pl.String)).otherwise(text) if kind.is_float() else text


def _split_lines(layout: _Layout, files: list[Path]) -> pl.LazyFrame:
    """`fields` between tabs or \\001 as Hive writes them: no quotes; a row with other fields than the header stays."""
    lines = pl.scan_csv(
        files, has_header=False, skip_lines=int(layout.has_header), glob=False, include_file_paths=FILE,
        schema={"line": pl.String}, quote_char=None, truncate_ragged_lines=True, empty_string_is_null=False,
        encoding="utf8-lossy", separator="\x00",  # in no text: a row is one field
    ).filter(pl.col("line").str.strip_chars() != "")  # fmt: skip
    return lines.with_columns(pl.col("line").str.strip_chars_end("\r").str.split(layout.separator).alias("fields"))
