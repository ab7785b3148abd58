"""Training pairs: reading them from JSON, knowing equal texts, and splitting them by anchor.

A file is an array of objects or one object a line (told apart by content). A row has `anchor` (or `query`), `positive`
(`positives`, `pos`) and maybe `negative` (`negatives`, `neg`, `negative_1` …). FlagEmbedding's and KaLM's other keys
(`prompt`, `type`, `pos_scores`, `neg_scores`, `id` …) are read past, and the log names the columns that were not used.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import written_whole
from ebr_lib.logs import logger
from ebr_lib.names import OnBadRow

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


def text_keys(texts: Iterable[str]) -> NDArray[np.int64]:
    """A 64-bit key a text, shape (texts,): equal for texts that are equal (`normalised`), on every machine.

    Different texts share a key with probability 3e-8 among a million.
    """
    digests = b"".join(hashlib.blake2b(normalised(text).encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<i8")


def is_blank(text: str) -> bool:
    """Is there nothing to see: no letter but whitespace, control codes and zero-width characters?"""
    return not _VISIBLE.search(text)


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
    on_bad_row: OnBadRow = "error",
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
        logger.info("未使用的列 columns not used: %s", ", ".join(map(_printable, reading.unused)))
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
                if self._may_go_on(error) and self._more():
                    continue
                raise DataError(f"{self.file}, {self._place_of(error)}: the array is broken there ({error})") from error
            if end == len(self._text) and self._more():
                continue  # a number may go on in the next chunk
            return value, self._step(end)

    def _may_go_on(self, error: Exception) -> bool:
        """Was the value cut off by the end of the chunk, or is it broken where more text cannot mend it?"""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16  # \\ud83d\\ude00 is the longest

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
    if is_blank(value):
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


# --- splitting ----------------------------------------------------------------------------------------------------

_LETTERS = re.compile(r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u1cff]+")  # the ranges: vowel signs
_TYPO_LETTERS = 5  # one typo is at most a fifth of a text
_TYPO_LONGEST = 64  # beyond, one typo is found by overlap: a key a letter would fill the memory
_OVERLAP_LETTERS = 25
_GRAM = 4
_OVERLAP = 0.8
_BANDS, _BAND_ROWS = 8, 3  # finds a pair of overlap 0.8 with probability 0.997, of 0.88 with 0.9999
_BLOCK_LETTERS = 1 << 22


def _printable(name: str) -> str:
    """A name as a terminal can take it: half a surrogate pair becomes its escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def split_by_anchor(pairs: Sequence[Pair], eval_ratio: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split into training and held-out pairs, each in the order given, so that no anchor is on both sides.

    Anchors that are equal (`normalised`) or near-duplicates (`near_duplicate_groups`) stay together; documents may be
    on both sides, as in production. Which anchors are held out hangs on the seed and the texts, not on row order.
    About `eval_ratio` of the anchors are held out: at least one where there are two, and never all.
    """
    keys = [normalised(pair.anchor) for pair in pairs]
    anchors = sorted(set(keys))
    if eval_ratio <= 0 or len(anchors) < 2:
        if eval_ratio > 0:
            logger.warning("只有一种 anchor，无法划分验证集 there is one anchor only: nothing can be held out")
        return list(pairs), []
    held_out = _held_out_anchors(anchors, eval_ratio, seed)
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held_out]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held_out]


def _held_out_anchors(anchors: Sequence[str], eval_ratio: float, seed: int) -> set[str]:
    """Whole groups in a seeded order, as long as they fit."""
    groups = near_duplicate_groups(anchors)
    if groups.max() == 0:
        logger.warning(
            "所有 anchor 彼此近似，仅按相同文本划分 all anchors are near-duplicates: split by equal text only"
        )
        groups = np.arange(len(anchors))
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = sorted(range(len(first)), key=lambda group: _seeded(seed, anchors[int(first[group])]))
    wanted = min(round(eval_ratio * len(anchors)), len(anchors) - 1)
    taken, count = set[int](), 0
    for group in order:
        if count + sizes[group] <= wanted:
            taken.add(group)
            count += int(sizes[group])
    taken = taken or {min(order, key=lambda group: int(sizes[group]))}
    if (share := sizes[list(taken)].sum() / len(anchors)) > 2 * eval_ratio and len(anchors) * eval_ratio >= 1:
        logger.warning(
            "近似 anchor 不可拆分 near-duplicate anchors stay together: %.0f %% of them are held out, eval_ratio is %g",
            100 * share,
            eval_ratio,
        )
    return {anchor for anchor, group in zip(anchors, groups.tolist(), strict=True) if group in taken}


def _seeded(seed: int, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, salt=str(seed).encode()[:16]).digest()


def near_duplicate_groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of near-duplicates among normalised texts; equal numbers, same group.

    Only letters and digits count. Two texts are near-duplicates when they are then the same, when they have the same
    words in another order, or when they get equal by dropping at most one letter from each: one letter changed, added,
    lost, moved, or two swapped. That takes five letters, and digits do not drop: "iphone 13" is not "iphone 14".
    Texts from 25 letters on are near-duplicates also when they share 0.8 of their 4-grams, and over 64 letters only
    then (Jaccard; candidates by MinHash, Broder 1997, each then checked). A near-duplicate of a near-duplicate is in
    the group too.

    :return: shape (texts,), numbered from 0 in order of first appearance.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    words = [_LETTERS.findall(text.replace("_", " ")) for text in texts]
    letters = ["".join(found) or text for found, text in zip(words, texts, strict=True)]
    edges = [
        _equal(letters),
        _equal([" ".join(sorted(found)) or text for found, text in zip(words, texts, strict=True)]),
    ]
    edges += [_one_letter_apart(letters), _overlapping(letters)]
    rows, columns = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(len(texts), len(texts)))
    _, labels = connected_components(graph, directed=False)
    _, first, groups = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups]


def _equal(texts: Sequence[str]) -> NDArray[np.int64]:
    """Edges, shape (2, edges), from every text to the first that equals it."""
    first: dict[str, int] = {}
    return np.array([(first.setdefault(text, i), i) for i, text in enumerate(texts)], dtype=np.int64).reshape(-1, 2).T


def _sharing(keys: NDArray[np.uint64], owners: NDArray[np.int64], gap: int = 1) -> NDArray[np.int64]:
    """Edges between the owners of equal keys that stand `gap` apart in sorted order."""
    order = np.argsort(keys)
    keys, owners = keys[order], owners[order]
    same = (keys[gap:] == keys[:-gap]) & (owners[gap:] != owners[:-gap])
    return np.stack([owners[:-gap][same], owners[gap:][same]])


class _Block(NamedTuple):
    """Some texts laid end to end: letters as 64-bit hashes, and which text (its number) each letter belongs to."""

    letters: NDArray[np.uint64]
    is_digit: NDArray[np.bool_]
    text: NDArray[np.int64]  # index of the text within the block, a letter
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    owners: NDArray[np.int64]


def _blocks(texts: Sequence[str], chosen: Sequence[int]) -> Iterator[_Block]:
    at = 0
    while at < len(chosen):
        end, size = at, 0
        while end < len(chosen) and size < _BLOCK_LETTERS:
            size += len(texts[chosen[end]])
            end += 1
        yield _block([texts[i] for i in chosen[at:end]], np.array(chosen[at:end]))
        at = end


def _block(texts: Sequence[str], owners: NDArray[np.int64]) -> _Block:
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    text = np.repeat(np.arange(len(texts)), lengths)
    return _Block(_mixed(codes), (codes >= 48) & (codes <= 57), text, starts, lengths, owners)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): every bit of the result hangs on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _one_letter_apart(letters: Sequence[str]) -> NDArray[np.int64]:
    """Edges between texts that get equal by dropping at most one letter each.

    A text's keys are the hashes of itself and of itself without each one letter. The hash is sum(letter_i * base^i),
    so that a prefix sum gives each key in constant time: what follows the dropped letter moves down by one power.
    """
    chosen = [i for i, text in enumerate(letters) if len(text) <= _TYPO_LONGEST]
    parts = [_dropping_keys(block) for block in _blocks(letters, chosen)]
    if not parts:
        return np.empty((2, 0), dtype=np.int64)
    return _sharing(np.concatenate([keys for keys, _ in parts]), np.concatenate([owners for _, owners in parts]))


def _dropping_keys(block: _Block) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    base = 0x9E3779B97F4A7C15  # odd, which has an inverse
    inverse = np.uint64(pow(base, -1, 1 << 64))
    powers = np.array([pow(base, i, 1 << 64) for i in range(_TYPO_LONGEST)], dtype=np.uint64)
    place = np.arange(len(block.text)) - block.starts[block.text]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(block.letters * powers[place], dtype=np.uint64)])
    begin, end = sums[block.starts], sums[block.starts + block.lengths]
    dropped = (sums[:-1] - begin[block.text]) + (end[block.text] - sums[1:]) * inverse
    may_drop = ~block.is_digit & (block.lengths[block.text] >= _TYPO_LETTERS)
    keys = np.concatenate([end - begin, dropped[may_drop]])
    return keys, np.concatenate([block.owners, block.owners[block.text[may_drop]]])


def _overlapping(letters: Sequence[str]) -> NDArray[np.int64]:
    """Edges between texts that are not short and share most of their 4-grams."""
    chosen = np.array([i for i, text in enumerate(letters) if len(text) >= _OVERLAP_LETTERS], dtype=np.int64)
    if not len(chosen):
        return np.empty((2, 0), dtype=np.int64)
    hashes = np.concatenate([_min_hashes(block) for block in _blocks(letters, chosen.tolist())], axis=1)
    edges = [_sharing(key, np.arange(len(chosen)), gap) for key in _band_keys(hashes) for gap in (1, 2)]
    candidates = np.unique(np.concatenate(edges, axis=1), axis=1)
    # the share of equal hashes estimates the overlap: most candidates need no exact look
    likely = (hashes[:, candidates[0]] == hashes[:, candidates[1]]).mean(axis=0) >= _OVERLAP - 0.3
    candidates = chosen[candidates[:, likely]]
    near = [_overlap(letters[a], letters[b]) >= _OVERLAP for a, b in candidates.T.tolist()]
    return candidates[:, np.array(near, dtype=bool)]


def _min_hashes(block: _Block) -> NDArray[np.uint32]:
    """MinHash of every text's 4-grams, shape (hash functions, texts)."""
    begins = np.delete(np.arange(len(block.letters)), (block.starts + block.lengths)[:, None] - np.arange(1, _GRAM))
    gram = block.letters[begins]
    for step in range(1, _GRAM):
        gram = _mixed(gram + block.letters[begins + step])
    counts = block.lengths - (_GRAM - 1)
    starts = np.cumsum(counts) - counts
    hashes = np.empty((_BANDS * _BAND_ROWS, len(block.lengths)), dtype=np.uint32)
    for function in range(len(hashes)):
        flip, factor = _mixed(np.array([2 * function, 2 * function + 1], dtype=np.uint64)) | np.uint64(1)
        hashes[function] = np.minimum.reduceat((gram ^ flip) * factor, starts) >> np.uint64(32)
    return hashes


def _band_keys(hashes: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """One key a text (texts,) for each band: equal where all hashes of the band are."""
    for band in hashes.reshape(_BANDS, _BAND_ROWS, -1):
        key = np.zeros(band.shape[1], dtype=np.uint64)
        for row in band:
            key = _mixed(key + row)
        yield key


def _overlap(one: str, other: str) -> float:
    a, b = ({text[i : i + _GRAM] for i in range(len(text) - _GRAM + 1)} for text in (one, other))
    return len(a & b) / len(a | b)
