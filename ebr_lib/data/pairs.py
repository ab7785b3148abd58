"""Training pairs: reading them from JSON, knowing equal texts, and splitting them by anchor.

A file is an array of objects or one object a line (told apart by content). A row has `anchor` (or `query`), `positive`
(`positives`, `pos`) and maybe `negative` (`negatives`, `neg`, `negative_1` …). FlagEmbedding's and KaLM's other keys
(`prompt`, `type`, `pos_scores`, `neg_scores`, `id` …) are read past, and the log names the columns that were not used.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import written_whole
from ebr_lib.logs import logger

_ALIASES = {
    "anchor": "anchor",
    "query": "anchor",
    "positive": "positive",
    "positives": "positive",
    "pos": "positive",
    "negative": "negative",
    "negatives": "negative",
    "neg": "negative",
}
_NUMBERED_NEGATIVE = re.compile(r"negative_\d+")
# zero-width characters and control codes show nothing, so a text of them is as empty as one of spaces
_VISIBLE = re.compile(r"[^\s\u0000-\u001f\u200b-\u200f\u2060\ufeff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CHUNK = 1 << 20
_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of a training file: texts as they stand there, and where (`line` counts from 1)."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One example of the contrastive loss: an anchor, one of its positives, and its hard negatives (any number)."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


def normalised(text: str) -> str:
    """The one definition of equal texts: NFKC, casefolded, runs of whitespace collapsed, ends trimmed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def expand(pairs: Sequence[Pair]) -> list[TrainingRow]:
    """One training row a positive, in order; every row carries all the negatives of its pair.

    Each positive is thus seen once an epoch. The siblings are known positives of the same anchor, so the loss masks
    them, and `BalancedBatchSampler` keeps them in different batches where it can.
    """
    return [TrainingRow(pair.anchor, positive, pair.negatives) for pair in pairs for positive in pair.positives]


# --- reading ------------------------------------------------------------------------------------------------------


class _BadRowError(Exception):
    """A row that cannot be used; the message says what was wanted and what was found."""


class _RawRow(NamedTuple):
    line: int
    raw: str
    value: Any  # the decoded JSON, or the _BadRowError that it is


@dataclass
class _Reading:
    """What reading has gathered so far, over all files."""

    pairs: list[Pair] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)


def read_pairs(
    path: str | Path | Sequence[str | Path],
    on_bad_row: Literal["error", "skip"] = "error",
    rejects: str | Path | None = None,
) -> list[Pair]:
    """Read training pairs from a JSON or JSON-lines file, a folder of them, or several of either.

    Of a folder, its own `*.json` and `*.jsonl` are read, sorted by name; subfolders and hidden files are not.

    :param on_bad_row: `error` raises and lists the first bad rows; `skip` counts them and writes them to `rejects`.
    :param rejects: JSON lines with file, line, reason and the row as it stands; with `skip` only.
    :raises MissingError: a path is not there, or a folder has no JSON.
    :raises DataError: bad rows (with `error`), a file that is not JSON or not UTF-8, or no rows at all.
    """
    files = [file for one in _listed(path) for file in _files_of(one)]
    reading = _Reading()
    for file in files:
        _read_file(file, reading)
    if reading.unused:
        logger.info("未使用的列 columns not used: %s", ", ".join(reading.unused))
    _settle_bad_rows(reading, on_bad_row, rejects)
    if not reading.pairs:
        raise DataError(f"no training rows in {', '.join(map(str, files))}; wanted objects with {_WANTED}")
    return reading.pairs


_WANTED = "`anchor` and `positive` (or `query` and `pos`), optional `negative`"


def _listed(path: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingError(f"training data {path}: there is no such file or folder (here is {Path.cwd()})")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".json", ".jsonl") and not p.name.startswith("."))
    if not files:
        there = ", ".join(sorted(p.name + "/" * p.is_dir() for p in path.iterdir())[:10]) or "nothing"
        raise MissingError(
            f"training data {path}: the folder has no *.json or *.jsonl; it holds {there} (subfolders are not read)"
        )
    return files


def _read_file(file: Path, reading: _Reading) -> None:
    for line, raw, value in _raw_rows(file):
        try:
            anchor, positives, negatives = _texts_of(value, reading.unused)
        except _BadRowError as reason:
            reading.bad.append({"file": str(file), "line": line, "reason": str(reason), "row": raw})
        else:
            reading.pairs.append(Pair(anchor, positives, negatives, str(file), line))


def _settle_bad_rows(reading: _Reading, on_bad_row: str, rejects: str | Path | None) -> None:
    bad = reading.bad
    if bad and on_bad_row == "error":
        shown = "\n".join(f"  {row['file']}, line {row['line']}: {row['reason']}" for row in bad[:_SHOWN_BAD_ROWS])
        more = f"\n  … and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
        total = len(bad) + len(reading.pairs)
        raise DataError(
            f"{len(bad)} of {total} rows cannot be used; mend them, or leave them out with `on_bad_row: skip`\n"
            f"{shown}{more}"
        )
    if rejects is not None:
        _write_rejects(bad, Path(rejects))
    if bad:
        where = f", 见 see {rejects}" if rejects is not None else ""
        logger.warning("跳过坏行 bad rows skipped: %d (first: %s)%s", len(bad), bad[0]["reason"], where)


def _write_rejects(bad: Sequence[dict[str, Any]], place: Path) -> None:
    if not bad:
        place.unlink(missing_ok=True)  # of an earlier run: it would claim rows that are fine now
        return
    with written_whole(place) as new, new.open("w", encoding="utf-8", newline="\n") as out:
        for row in bad:
            out.write(json.dumps(row, ensure_ascii=True) + "\n")  # ASCII: a rejected row may hold half a character


def _raw_rows(file: Path) -> Iterator[_RawRow]:
    """Stream the rows of a file, however it is laid out."""
    first = _first_letter(file)
    if first in (b"\xff", b"\xfe"):  # how UTF-16 begins, and UTF-8 never
        raise DataError(f"{file} is UTF-16; save it as UTF-8")
    return _array_rows(file) if first == b"[" else _line_rows(file)


def _first_letter(file: Path) -> bytes:
    with file.open("rb") as stream:
        while chunk := stream.read(4096):
            if text := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
                return text[:1]
    return b""


def _line_rows(file: Path) -> Iterator[_RawRow]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if row.strip():
                raw = row.decode("utf-8", "backslashreplace").strip()
                yield _RawRow(number, raw, _decoded(row))


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _BadRowError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return _BadRowError(f"not a JSON object on one line ({error}); a file is an array `[…]` or one object a line")


def _array_rows(file: Path) -> Iterator[_RawRow]:
    """The elements of a JSON array, one at a time, each with the line where it begins.

    A broken array ends the reading whatever `on_bad_row` says: nobody can know where its next row begins.
    """
    text = _Window(file)
    text.take("[")
    if text.next_letter() == "]":
        return
    while True:
        text.next_letter()
        line = text.line
        value, raw = text.value()
        yield _RawRow(line, raw, value)
        if text.take(",]") == "]":
            break
    if letter := text.next_letter():
        raise DataError(f"{file}, line {text.line}: {letter!r} after the end of the array")


class _Window:
    """A JSON text read forward in chunks; only the part that is still needed is held."""

    def __init__(self, file: Path) -> None:
        self.file, self.line = file, 1
        self._text, self._at = "", 0
        self._chunks = self._read()
        self._decoder = json.JSONDecoder()

    def _read(self) -> Iterator[str]:
        with self.file.open(encoding="utf-8-sig", newline="") as stream:
            size = _CHUNK
            while chunk := stream.read(size):
                yield chunk
                size = max(_CHUNK, len(self._text))  # doubling: an element of any size costs linear time

    def _more(self) -> bool:
        try:
            chunk = next(self._chunks, "")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}, after line {self.line}: not UTF-8 ({error.reason}); save it so") from error
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _step(self, end: int) -> str:
        passed = self._text[self._at : end]
        self.line += passed.count("\n")
        self._at = end
        return passed

    def next_letter(self) -> str:
        """Go to the next letter that is no space, and return it; at the end of the file, the empty string."""
        while True:
            rest = len(self._text)
            end = next((i for i in range(self._at, rest) if not self._text[i].isspace()), rest)
            self._step(end)
            if end < rest:
                return self._text[end]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Read one letter that must be one of `wanted`."""
        letter = self.next_letter()
        if not letter or letter not in wanted:
            found = repr(letter) if letter else "the end of the file"
            raise DataError(
                f"{self.file}, line {self.line}: wanted {' or '.join(map(repr, wanted))}, found {found}; the array is "
                "broken there (a missing comma or bracket?)"
            )
        self._step(self._at + 1)
        return letter

    def value(self) -> tuple[Any, str]:
        """Read one JSON value: what it is, and how it is written."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._more():
                    continue
                raise DataError(f"{self.file}, {self._place_of(error)}: the array is broken there ({error})") from error
            if end == len(self._text) and self._more():
                continue  # a number may go on in the next chunk
            return value, self._step(end)

    def _place_of(self, error: Exception) -> str:
        passed = self._text[self._at : getattr(error, "pos", self._at)]
        return f"line {self.line + passed.count(chr(10))}"


def _texts_of(value: Any, unused: dict[str, None]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The anchor, positives and negatives of one decoded row; names of columns without use go to `unused`."""
    if isinstance(value, _BadRowError):
        raise value
    if not isinstance(value, dict):
        raise _BadRowError(f"wanted an object with {_WANTED}, found {_kind(value)}")
    columns: dict[str, str] = {}
    negatives: list[str] = []
    for key in value:
        name = _ALIASES.get(key)
        if name is None and _NUMBERED_NEGATIVE.fullmatch(key):
            negatives += _texts(key, value[key], may_lack=True)
        elif name is None:
            unused[key] = None
        elif name in columns:
            raise _BadRowError(f"`{columns[name]}` and `{key}` both name the {name}; keep one")
        else:
            columns[name] = key
    for name in ("anchor", "positive"):
        if name not in columns:
            raise _BadRowError(_missing_column(name, list(value)))
    if "negative" in columns:
        negatives += _texts(columns["negative"], value[columns["negative"]], may_lack=True)
    anchor = _text(columns["anchor"], value[columns["anchor"]])
    return anchor, tuple(_texts(columns["positive"], value[columns["positive"]])), tuple(negatives)


def _texts(column: str, value: Any, may_lack: bool = False) -> list[str]:
    if may_lack and (value is None or value == []):
        return []
    if value == []:
        raise _BadRowError(f"`{column}` is an empty list; wanted at least one text")
    return [_text(column, one) for one in value] if isinstance(value, list) else [_text(column, value)]


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"`{column}`: wanted a text, found {_kind(value)}")
    if not _VISIBLE.search(value):
        raise _BadRowError(f"`{column}` is {'blank' if value else 'empty'}")
    if _LONE_SURROGATE.search(value):
        raise _BadRowError(
            f"`{column}` holds half a character (a lone surrogate, as in \\ud83d); no tokenizer takes it"
        )
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", bool: "true or false", str: "a text"}
    return names.get(type(value), f"the number {value!r}")


def _missing_column(name: str, found: list[str]) -> str:
    free = {column.casefold(): column for column in found if column not in _ALIASES}
    wanted = [alias for alias, meaning in _ALIASES.items() if meaning == name]
    near = next((free[m] for w in wanted for m in difflib.get_close_matches(w, free, n=1)), None)
    fix = f"rename `{near}` to `{name}`" if near else f"rename the column that holds the {name} to `{name}`"
    return f"no `{name}` column; found {', '.join(map(repr, found)) or 'none'}: {fix}"
