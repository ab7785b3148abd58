"""The input files of a run: which are read, which columns are kept, and a sample before hours of work."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebr_lib.data.columnar import NoTextError, need_texts
from ebr_lib.data.containers import COLUMNAR, readable
from ebr_lib.data.embeddings.base import is_plain, is_text, manifest_path
from ebr_lib.data.embeddings.codes import own_columns
from ebr_lib.data.finder import EMPTY, OWN, FoundFiles, find_files, name_of, partitions_of
from ebr_lib.data.hive import OLD_ORC_NAME, Layout, Source, is_empty, open_source, read_rows
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.files import sha256_of
from ebr_lib.inference.hints import HINT_ROWS, Reject, first_lines, likely_knobs
from ebr_lib.inference.job import SKIPPED, work_folder
from ebr_lib.logs import logger
from ebr_lib.names import VectorType, did_you_mean

SAMPLED_BYTES, SAMPLED_ROWS = 1 << 24, 100_000  # input of this size is sampled first; rows of the sample


def find_inputs(place: str, patterns: tuple[str, ...], output: Path, written: Sequence[Path]) -> FoundFiles:
    """The files to read, without empty ones and without those that an earlier run wrote among them.

    :param written: the output, and all that is written beside it.
    :raises ConfigError: the run would write over an input.
    :raises DataError: there is nothing to read; says what the folder holds, and why that is not read.
    """
    found = find_files(place, patterns, "data_path")
    own = _written_here(found, output, {path.resolve() for path in written})
    found = found.without(own, OWN)
    found = found.without([file for file in found.files if is_empty(file)], EMPTY)
    found.log("set file_patterns to take them in")
    if found.files:
        return found
    if found.root.is_file():
        raise DataError(f"data_path {found.root} is empty")
    held = "; ".join(f"{name} ({reason})" for name, reason in list(found.named().items())[:5]) or "nothing"
    raise DataError(
        f"data_path {found.root}: no file to read that matches {' or '.join(patterns)}; the folder holds {held}; "
        "give the file itself, or set file_patterns"
    )


def _written_here(found: FoundFiles, output: Path, written: set[Path]) -> list[Path]:
    """The files below the input that an earlier run wrote."""
    every = (*found.files, *found.left_out)
    own = [path for path in every if not written.isdisjoint((path.resolve(), *path.resolve().parents))]
    taken = [path for path in own if path in found.files]
    ran_before = manifest_path(output).is_file() or work_folder(output).is_dir()
    if taken and (len(taken) == len(found.files) or not ran_before):
        raise ConfigError(f"output_path {output}: the run would write over its input {taken[0]}; give another place")
    return own


def open_inputs(found: FoundFiles, layout: Layout, needed: Sequence[str], kept: Sequence[str]) -> list[Source]:
    """Open every file, and log the columns that folders give.

    :param needed: columns that each file must have.
    :param kept: columns that the user asked to keep.
    :raises DataError: a file cannot be read, or a column is missing.
    """
    sources = [open_source(f, layout, name_of(f, found.root), partitions_of(f, found.root)) for f in found.files]
    given = dict.fromkeys(name for source in sources for name in source.partitions if name not in kept)
    if given:
        names = ", ".join(given)
        logger.info("分区列 partition columns: %s (name them in output_columns to keep them)", names)
    for source in sources:
        if both := [name for name in partitions_of(source.path, found.root) if name in source.columns]:
            logger.warning(
                "列名重复 %s: column %s is in the file and in its folder's name: the file's is read",
                source.path,
                both[0],
            )
            break
    for source in sources:
        need_columns(source, needed, layout.delimiter)
    return sources


def need_columns(source: Source, wanted: Sequence[str], delimiter: bytes) -> None:
    """Check that a file has the columns, and that they can be read as text.

    :raises DataError: lists the columns wanted and found, and the likely way out; or names one that has no text.
    """
    missing = [name for name in wanted if name not in source.columns and name not in source.partitions]
    if missing:
        found = ", ".join(column[:40] for column in [*source.columns, *source.partitions][:20])
        near = did_you_mean(missing[0], [*source.columns, *source.partitions])
        raise DataError(
            f"{source.path}: no column {', '.join(missing)}{near or ';'} found {found}{_way_out(source, delimiter)}"
        )
    if source.kind in COLUMNAR:
        own = [name for name in wanted if name in source.columns]
        try:
            need_texts(source.path, source.kind, source.stored_names(own))
        except NoTextError as error:
            raise DataError(
                f"{error}; name the columns to keep in output_columns, without it, or write it as text"
            ) from error


def _way_out(source: Source, delimiter: bytes) -> str:
    """What may help when a column is missing."""
    if source.kind in COLUMNAR:
        return "; give their names in order: columns=[…]" if all(map(OLD_ORC_NAME.fullmatch, source.columns)) else ""
    hint = "for files without a header row, give their names: columns=[…]"
    if len(source.columns) == 1:
        signs = {",": "a comma", "\t": "a tab", "|": "a bar", ";": "a semicolon", "\x01": "\\001"}
        if sign := next((sign for sign in signs if sign in source.columns[0]), None):
            spelled = {"\t": "\\t", "\x01": "\\001"}.get(sign, sign)
            hint = f"the first row holds {signs[sign]}: is that the delimiter? (--delimiter '{spelled}')"
    return f" (split by {delimiter!r}); {hint}"


def given_columns(sources: Sequence[Source]) -> list[str]:
    """Columns that the folders of the input give, whether or not the files hold them too."""
    return list(dict.fromkeys(name for source in sources for name in partitions_of(Path(source.name), Path())))


def kept_columns(
    sources: list[Source], wanted: Sequence[str], output: str, layout: Layout, vector_type: VectorType
) -> tuple[str, ...]:
    """The columns to keep beside the vector: those wanted, else all of the files.

    :raises DataError: the files differ in their columns, or text cannot hold the name of one.
    """
    kept = tuple(wanted) or _all_columns(sources, own_columns(vector_type))
    path, encoding = sources[0].path, sources[0].encoding
    for name in kept:
        if "\ufffd" in name:
            raise DataError(
                f"{path}: the column name {name!r} is not {encoding}; set encoding to what the file is written in, or "
                "name the columns to keep in output_columns"
            )
        if is_text(output) and not is_plain(name.encode()):
            raise DataError(
                f"{path}: the column name {name!r} holds what separates fields or rows of text; "
                "name the columns to keep in output_columns, or write .parquet"
            )
    for source in sources:
        need_columns(source, kept, layout.delimiter)
    return kept


def _all_columns(sources: list[Source], own: Sequence[str]) -> tuple[str, ...]:
    first = sources[0]
    for source in sources[1:]:
        if set(source.columns) != set(first.columns):
            odd = ", ".join(sorted(set(source.columns) ^ set(first.columns)))
            raise DataError(
                f"{source.path} and {first.path} do not have the same columns ({odd} is in one of them only); "
                "name those to keep in output_columns"
            )
    if taken := [name for name in own if name in first.columns]:
        raise DataError(f"{first.path} has a column `{taken[0]}` already; name the columns to keep in output_columns")
    return first.columns


def hash_inputs(sources: list[Source]) -> tuple[dict[str, Any], ...]:
    """Name, size and sha256 of each file."""
    from tqdm.auto import tqdm

    entries = []
    for source in tqdm(sources, desc="sha256", unit="file", delay=2, leave=False):
        with readable(source.path):
            entries.append({"path": source.name, "size": source.size, "sha256": sha256_of(source.path)})
    return tuple(entries)


def check_sample(place: str, sources: Sequence[Source], wanted: Sequence[str], layout: Layout, most: float) -> None:
    """Check, before hours of work on large input, that rows can be read: the first ones of each file.

    A file counts by its size, and up to twice `most` is left to the count of all rows in the end.

    :param most: `max_rejected_share`.
    :raises DataError: far too many cannot.
    """
    size = sum(source.size for source in sources)
    if size < SAMPLED_BYTES:
        return
    reasons, rejects, share, seen = Counter[str](), list[Reject](), 0.0, 0
    for source in sources:
        read = lost = 0
        for row in itertools.islice(read_rows(source, wanted, layout), max(20, SAMPLED_ROWS // len(sources))):
            read += 1
            if row.reason and row.reason not in SKIPPED:
                lost += 1
                reasons[row.reason] += 1
                if len(rejects) < HINT_ROWS:
                    rejects.append(Reject(source.name.encode(), row.position.line, row.reason, row.raw.split(b"\n")[0]))
        seen += read
        share += source.size / size * lost / max(1, read)
    if share <= 2 * most:
        return
    accepted = min(1.0, math.ceil(100 * share + 1) / 100)
    raise DataError(
        f"{place}: of the first {seen} rows of its files, {share:.0%} cannot be read ({most_common(reasons)}), "
        f"more than max_rejected_share {most:g}; nothing was encoded, and what was there stays"
        f"{hints(rejects, layout, sources)}\nOr accept the loss with --max_rejected_share {accepted:g}"
    )


def most_common(reasons: Counter[str]) -> str:
    """The most common reasons of rejects, each with its number."""
    return "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(5))


def hints(rejects: Sequence[Reject], layout: Layout, sources: Sequence[Source]) -> str:
    """Lines that say where the first rejects are, and which knobs would probably read them."""
    found = [first_lines(rejects), *likely_knobs(rejects, layout, given_columns(sources))]
    return "".join(f"\n  - {hint}" for hint in found if hint)
