"""Training pairs: what the rows of a file mean.

A row has `anchor` (or `query`), `positive` (`positives`, `pos`), maybe `negative` (`negatives`, `neg`, `negative_1` …).
Tevatron's rows (`positive_passages`) and ms-swift's (`messages`, `response`) are read as these. A row's `prompt`, as
FlagEmbedding and KaLM write it, replaces the prompt of its anchor; `pos_scores` and `neg_scores` are a teacher's scores
of its documents; `weight` is how much it counts. Other keys (`type`, `id` …) are ignored, and the log names the columns
that were not used. `records` reads the rows.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from ebr_lib.data.finder import find_files
from ebr_lib.data.records import BadRowError, raw_rows
from ebr_lib.data.text import HALF_CHARACTER, half_character, is_blank, normalised, text_keys
from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import written_whole
from ebr_lib.logs import logger
from ebr_lib.names import OnBadRow

_ALIASES = {
    "anchor": ("anchor", "query", "messages"),
    "positive": ("positive", "positives", "pos", "positive_passages", "positive_messages", "response"),
    "negative": ("negative", "negatives", "neg", "negative_passages", "negative_messages", "rejected_response"),
}
_MEANING = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_EXTRAS = ("prompt", "weight", "pos_scores", "neg_scores")  # what a row says besides its texts
_NUMBERED_NEGATIVE = re.compile(r"negative_\d+")
# two texts without a direction: a pair only where a label calls it one
_SIDES = {
    f"{stem}{gap}{end}": name
    for name, ends in (("anchor", "1a"), ("positive", "2b"))
    for stem in ("sentence", "text", "question", "query")
    for gap in ("", "_")
    for end in ends
}
# fmt: off
# words that the name of a label ends in, as in `gold_label`, `isRelevant`, `cosine score`
_LABEL_WORDS = frozenset([
    "label", "labels", "score", "scores", "similarity", "sim", "relevance", "rel", "relevant", "duplicate", "dup",
    "similar", "match", "grade", "judgement", "judgment", "is_positive",
    "标签", "分数", "得分", "相似度", "相关性", "是否相似", "是否相关",
])
_WORD_ENDS = re.compile(r"(?<=[a-z])(?=[A-Z])|[\W_]+")
NO_LABEL = "none"  # a `label_column` that says that no column is a label
_YES = frozenset(
    ["true", "yes", "positive", "relevant", "duplicate", "similar", "entailment", "是", "相似", "相关"]
)
_NO = frozenset([
    "false", "no", "negative", "irrelevant", "not_relevant", "not_duplicate", "dissimilar", "different", "neutral",
    "contradiction", "not_entailment", "否", "不相似", "不相关",
])
# fmt: on
_OFF, _ON = frozenset(["0", "0.0", "false"]), frozenset(["1", "1.0", "true"])
_MEDIA = ("images", "videos", "audios")
_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_PATTERNS = [f"*{ending}{packed}" for packed in ("", ".gz", ".bz2", ".zst") for ending in _ENDINGS]
_HELDOUT_NAME = re.compile(
    r"(?:^|[^a-z])(dev|test|valid|validation|val|eval|evaluation|heldout|holdout)s?(?:set|data|split)?(?:[^a-z]|$)|测试|验证"
)
_SHOWN_BAD_ROWS = 5
_SHOWN_FILES = 20


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of a training file: its texts, its place (`line` counts from 1), and what else it says.

    :ivar prompt: its anchor's own prompt, if any.
    :ivar weight: how much it counts, 0 or more.
    :ivar positive_scores: a teacher's raw score of each positive, NaN where it gave none; empty without a teacher.
    :ivar negative_scores: the same of each negative.
    """

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    file: str = ""
    line: int = 0
    prompt: str | None = None
    weight: float = 1.0
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One example of the contrastive loss: an anchor, one of its positives, and its hard negatives (any number).

    :ivar prompt: the anchor's own prompt; None leaves it to the model's.
    :ivar weight: how much the row counts, 0 or more.
    :ivar scores: a teacher's raw scores of the positive and of the negatives in order, NaN where it gave none; shorter
        where the last have none.
    """

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    prompt: str | None = None
    weight: float = 1.0
    scores: tuple[float, ...] = ()
    file: str = field(default="", compare=False, repr=False)


def texts_of(rows: Iterable[TrainingRow]) -> set[str]:
    """All texts of training rows, `normalised`: what training has seen."""
    return {normalised(text) for row in rows for text in (row.anchor, row.positive, *row.negatives)}


def keys_of(rows: Sequence[TrainingRow]) -> set[int]:
    """`text_keys` of all texts of training rows."""
    return set(text_keys(text for row in rows for text in (row.anchor, row.positive, *row.negatives)).tolist())


def expand(pairs: Sequence[Pair]) -> list[TrainingRow]:
    """One training row per positive, in order; every row has all the negatives and the weight of its pair.

    Each positive is thus seen once per epoch. Rows of the same anchor are known positives of each other: the loss masks
    them, and `BalancedBatchSampler` keeps them in different batches where it can.
    """
    return [
        TrainingRow(
            pair.anchor,
            positive,
            pair.negatives,
            pair.prompt,
            pair.weight,
            (*pair.positive_scores[i : i + 1], *pair.negative_scores),
            pair.file,
        )
        for pair in pairs
        for i, positive in enumerate(pair.positives)
    ]


# --- reading ------------------------------------------------------------------------------------------------------


class _DegreeError(Exception):
    """A label that is neither yes nor no: one row does not show what it means for the file."""


@dataclass
class _Reading:
    """What was read so far, from all files.

    :ivar unused: columns that are not used, each with up to three of its values.
    """

    label_column: str | None
    pairs: list[Pair] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    unused: dict[str, set[str]] = field(default_factory=dict)

    def is_label(self, name: str) -> bool:
        """Whether a column is a label of the pair: the given one, or by its name."""
        return _is_label(name) if self.label_column is None else name == self.label_column != NO_LABEL

    def is_column(self, name: str) -> bool:
        """Whether a column is read at all."""
        return _is_column(name) or self.is_label(name)

    def labels_of(self, row: Mapping[str, Any]) -> list[str]:
        """The labels of a row; the given one even where it is missing."""
        if self.label_column is None:
            return list(filter(_is_label, row))
        return [] if self.label_column == NO_LABEL else [self.label_column]

    def note_unused(self, column: str, value: Any) -> None:
        """Remember a column that is not used, and some of its values."""
        seen = self.unused.setdefault(column, set())
        if value is not None and len(seen) < 3:
            seen.add(str(value).strip().casefold()[:9])


def read_pairs(
    path: str | Path | Sequence[str | Path],
    on_bad_row: OnBadRow = "error",
    rejects: str | Path | None = None,
    label_column: str | None = None,
) -> list[Pair]:
    """Read training pairs from a file (JSON, JSON lines, CSV, TSV, Parquet), a folder of them, or several of either.

    A folder's own files are read, sorted by name; subfolders and hidden files are not. The log names every file read,
    with its rows, and every file left out, with the reason.

    :param on_bad_row: `error` raises and lists the first bad rows; `skip` counts them, and writes them to `rejects`.
    :param rejects: JSON lines of file, line, reason and the row as it is; only with `skip`.
    :param label_column: the column that tells positive pairs; None goes by the names of columns (`label`, `score` …),
        "none" means that there is no such column.
    :raises MissingError: a path is not there, or a folder has nothing to read.
    :raises DataError: bad rows (with `error`), a file that is broken or of another kind, or no rows at all.
    """
    files = find_pair_files(path)
    reading = _Reading(label_column)
    rows = {file: _read_file(file, reading) for file in files}
    logger.info("读取 read: %s", _shown([f"{_printable(str(file))} ({count} rows)" for file, count in rows.items()]))
    if empty := [str(file) for file, count in rows.items() if not count]:
        logger.warning("没有数据行 no rows in: %s", _shown(empty))
    _say_unused(reading)
    _settle_bad_rows(reading, on_bad_row, rejects)
    if not reading.pairs:
        raise DataError(f"no training rows in {', '.join(map(str, files))}; wanted objects with {_WANTED}")
    return reading.pairs


_WANTED = "`anchor` and `positive` (or `query` and `pos`), optional `negative`"


def find_pair_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `read_pairs` reads, each once, in order.

    :raises MissingError: a path is not there, or a folder has nothing to read.
    """
    return list({file.resolve(): file for one in _listed(path) for file in _files_of(one)}.values())


def _listed(path: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [path] if isinstance(path, str | Path) else path
    return [Path(one).expanduser() for one in paths]


def _files_of(path: Path) -> list[Path]:
    found = find_files(path, _PATTERNS, "training data", subfolders=False)
    if not found.files:
        named = ", ".join(f"{name} ({reason})" for name, reason in found.named().items())
        raise MissingError(
            f"training data {path}: the folder has no {' or '.join(_PATTERNS[: len(_ENDINGS)])}; it holds "
            f"{named or 'nothing'}"
        )
    found.log()
    return found.files


def warn_of_heldout_names(path: str | Path | Sequence[str | Path], pairs: Sequence[Pair]) -> None:
    """Warn of files in a folder of training data whose names sound like held-out data."""
    given = set(map(str, _listed(path)))
    for file in sorted({pair.file for pair in pairs} - given):
        if found := _HELDOUT_NAME.search(Path(file).name.lower()):
            logger.warning(
                "文件名像验证集，但会用于训练 %s is trained on although its name has %s: move it out of the folder "
                "if it is held-out data",
                _printable(file),
                found[1] or found[0],
            )


def _shown(names: Sequence[str]) -> str:
    more = f" … and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _say_unused(reading: _Reading) -> None:
    """Log the columns that are not used, and warn of those that may be labels."""
    if reading.unused:
        logger.info("未使用的列 columns not used: %s", ", ".join(map(_printable, reading.unused)))
    flags = [name for name, values in reading.unused.items() if values & _OFF and values <= _OFF | _ON]
    if flags and reading.label_column is None:
        logger.warning(
            "列 %s 只有 0/1，未当作标签：值为 0 的行也按正例训练 these columns of 0 and 1 are not used, so rows with 0 "
            "are trained on as positives; if one is a label, set label_column to it",
            ", ".join(map(_printable, flags)),
        )


def _read_file(file: Path, reading: _Reading) -> int:
    """Read a file's rows into `reading`; return how many it has, bad ones included."""
    count = 0
    for line, value, raw in raw_rows(file, reading.is_column):
        count += 1
        try:
            pair = _pair_of(value, reading, str(file), line)
        except BadRowError as reason:
            row = raw or json.dumps(value, ensure_ascii=False, default=str)
            reading.bad.append({"file": str(file), "line": line, "reason": str(reason), "row": row})
        except _DegreeError as reason:
            raise DataError(f"{file}, line {line}: {reason}") from None
        else:
            reading.pairs.append(pair)
    return count


def _settle_bad_rows(reading: _Reading, on_bad_row: str, rejects: str | Path | None) -> None:
    bad = reading.bad
    if bad and on_bad_row == "error":
        shown = "\n".join(f"  {row['file']}, line {row['line']}: {row['reason']}" for row in bad[:_SHOWN_BAD_ROWS])
        more = f"\n  … and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
        total = len(bad) + len(reading.pairs)
        raise DataError(
            f"{len(bad)} of {total} rows cannot be used; fix them, or leave them out with `on_bad_row: skip`\n"
            f"{shown}{more}"
        )
    if rejects is not None:
        _write_rejects(bad, Path(rejects))
    if bad:
        where = f", 见 see {rejects}" if rejects is not None else ""
        logger.warning("跳过坏行 bad rows skipped: %d (first: %s)%s", len(bad), bad[0]["reason"], where)


def _write_rejects(bad: Sequence[dict[str, Any]], place: Path) -> None:
    if not bad:
        place.unlink(missing_ok=True)  # of an earlier run, whose rows may be fine now
        return
    with written_whole(place) as new, new.open("w", encoding="utf-8", newline="\n") as out:
        for row in bad:
            out.write(json.dumps(row, ensure_ascii=True) + "\n")  # ASCII: a rejected row may hold half a character


# --- what a row means ---------------------------------------------------------------------------------------------


def _is_column(name: str) -> bool:
    known = name in _MEANING or name.casefold() in _SIDES or name in _MEDIA or name in _EXTRAS
    return known or bool(_NUMBERED_NEGATIVE.fullmatch(name))


def _is_label(name: str) -> bool:
    """Whether a column is a label of the pair by its name; `pos_scores` and `neg_scores` are of single documents."""
    words = _WORD_ENDS.sub(" ", name).casefold().split()
    of_documents = bool(words) and words[0] in ("pos", "neg", "positive", "negative")
    return bool(words) and not of_documents and (words[-1] in _LABEL_WORDS or "_".join(words) in _LABEL_WORDS)


def _pair_of(value: Any, reading: _Reading, file: str, line: int) -> Pair:
    """The texts of one decoded row, and what it says besides; columns that are not used are noted."""
    if isinstance(value, BadRowError):
        raise value
    if not isinstance(value, dict):
        raise BadRowError(f"wanted an object with {_WANTED}, found {_kind(value)}")
    columns = _columns_of(value, reading)
    for name in ("anchor", "positive"):
        if name not in columns:
            raise BadRowError(_missing_column(name, value))
    from_swift = {"messages", "response"} & set(value)
    if from_swift and (media := next((name for name in _MEDIA if value.get(name)), None)):
        raise BadRowError(f"`{media}`: only texts are trained on")
    column = columns["anchor"]
    anchor = (_conversation if column == "messages" else _text)(column, value[column])
    column = columns["positive"]
    if value[column] == []:
        raise BadRowError(f"`{column}` is an empty list; wanted at least one text")
    positives = [_text(column, one) for one in _each(column, value[column])]
    sources = [*filter(_NUMBERED_NEGATIVE.fullmatch, value), *filter(None, [columns.get("negative")])]
    given = [(column, one) for column in sources for one in _each(column, value[column])]
    negatives = [_text(column, one, wanted=False) for column, one in given if not _is_nothing(one)]
    of_positives, of_negatives = _scores_of(value, positives, given)
    for column in reading.labels_of(value):
        _check_label(column, value.get(column), len(positives), len(negatives))
    prompt = None if _is_nothing(value.get("prompt")) else _text("prompt", value["prompt"])
    weight = _number("weight", value.get("weight", 1.0))
    if not 0 <= weight < math.inf:
        raise BadRowError(f"`weight` is {value['weight']!r}: wanted a number of 0 or more")
    return Pair(anchor, tuple(positives), tuple(negatives), file, line, prompt, weight, of_positives, of_negatives)


def _scores_of(
    row: Mapping[str, Any], positives: Sequence[str], negatives: Sequence[tuple[str, Any]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A teacher's scores of the positives and of the negatives, without those of blank negatives; empty if not given.

    :param negatives: columns and values, blank ones included, which have scores too.
    """
    of_positives, of_negatives = (_score_list(row, name) for name in ("pos_scores", "neg_scores"))
    if not of_positives and not of_negatives:
        return (), ()
    for name, scores, wanted in (
        ("pos_scores", of_positives, len(positives)),
        ("neg_scores", of_negatives, len(negatives)),
    ):
        if len(scores) != wanted:
            raise BadRowError(f"`{name}` has {len(scores)} scores for {wanted} texts; wanted one for each")
    kept = (score for score, (_, one) in zip(of_negatives, negatives, strict=True) if not _is_nothing(one))
    return of_positives, tuple(kept)


def _score_list(row: Mapping[str, Any], column: str) -> tuple[float, ...]:
    value = row.get(column)
    if value is None:
        return ()
    scores = value if isinstance(value, list) else [value]
    return tuple(math.nan if one is None else _number(column, one) for one in scores)


def _number(column: str, value: Any) -> float:
    try:
        if not isinstance(value, int | float | str | Decimal) or isinstance(value, bool):
            raise ValueError
        return float(value)
    except ValueError:
        raise BadRowError(f"`{column}`: wanted a number, found {_kind(value)}") from None


def _columns_of(row: Mapping[str, Any], reading: _Reading) -> dict[str, str]:
    """The row's column of each meaning."""
    columns: dict[str, str] = {}
    others = []
    for key in row:
        name = _MEANING.get(key)
        if name is None:
            others.append(key)
        elif name in columns:
            raise BadRowError(f"`{columns[name]}` and `{key}` both name the {name}; keep one")
        else:
            columns[name] = key
    if not {"anchor", "positive"} & set(columns) and any(map(reading.is_label, row)):
        sides = {_SIDES[key.casefold()]: key for key in reversed(others) if key.casefold() in _SIDES}
        columns |= sides
        others = [key for key in others if key not in sides.values()]
    for key in others:
        if key.strip() and key not in _EXTRAS and not reading.is_label(key) and not _NUMBERED_NEGATIVE.fullmatch(key):
            reading.note_unused(key, row[key])
    return columns


def is_positive_pair(row: Mapping[str, Any], positives: int, label_column: str | None) -> bool:
    """Whether the labels of a row, as `read_pairs` knows them, call all of its positives positive.

    :raises DataError: a label is neither yes nor no.
    """
    try:
        for column in _Reading(label_column).labels_of(row):
            _check_label(column, row.get(column), positives, 0)
    except BadRowError:
        return False
    except _DegreeError as reason:
        raise DataError(str(reason)) from None
    return True


def _check_label(column: str, label: Any, positives: int, negatives: int) -> None:
    """Check that a label calls the positives positive: one label, a list for the positives, or for all documents.

    :raises BadRowError: it does not.
    :raises _DegreeError: it is a degree, or a word that is unknown.
    """
    if not isinstance(label, list):
        if not _says_yes(column, label):
            raise BadRowError(
                f"`{column}` is {label!r}: the row is not a positive pair; leave it out, or make it a `negative`"
            )
        return
    said = [_says_yes(column, one) for one in label]
    if said not in ([True] * positives, [True] * positives + [False] * negatives):
        raise BadRowError(f"`{column}` is {label!r}: it does not call every positive of the row positive")


def _says_yes(column: str, label: Any) -> bool:
    """Whether a label means yes: 1, true, "1" or a word such as entailment; 0, -1, false and the like mean no."""
    if isinstance(label, str):
        word = label.strip().casefold()
        if word in _YES or word in _NO:
            return word in _YES
        try:
            label = float(word)
        except ValueError:
            label = label if word else None
    if label is None or (isinstance(label, float) and math.isnan(label)):
        raise BadRowError(f"`{column}` is missing: so the row may not be a positive pair")
    if isinstance(label, int | float | Decimal) and label in (1, 0, -1):
        return label == 1
    raise _DegreeError(
        f"`{column}` is {label!r}, neither yes (1) nor no (0), and only positive pairs are used: keep the rows "
        f"that are positive, without the column `{column}`; if it is not a label of the pairs, set label_column: none"
    )


def _each(column: str, value: Any) -> list[Any]:
    one_conversation = column.endswith("_messages") and isinstance(value, list) and value and isinstance(value[0], dict)
    return value if isinstance(value, list) and not one_conversation else [value]


def _is_nothing(value: Any) -> bool:
    """Whether a value says nothing, as null and blank texts, which fill empty cells of tables."""
    if isinstance(value, dict):  # a passage without text
        return "text" in value and _is_nothing(value["text"])
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and is_blank(value))
    )


def _text(column: str, value: Any, wanted: bool = True) -> str:
    """The text of a value: itself, a passage's title and text, or a conversation's message.

    :param wanted: whether its labels must be yes, or no.
    """
    if isinstance(value, dict) and "text" in value:
        value = _passage(column, value, wanted)
    elif isinstance(value, list) and column.endswith("_messages"):
        value = _conversation(column, value)
    if not isinstance(value, str):
        raise BadRowError(f"`{column}`: wanted a text, found {_kind(value)}{_hint(value)}")
    if is_blank(value):
        raise BadRowError(f"`{column}` is {'blank' if value else 'empty'}")
    if half_character([value]) is not None:
        raise BadRowError(f"`{column}` holds {HALF_CHARACTER}")
    return value


def _passage(column: str, passage: Mapping[str, Any], wanted: bool) -> Any:
    """A passage as Tevatron writes it, `docid`, `title` and `text`: its title, a space, its text."""
    for name in filter(_is_label, passage):
        # a score of the search that found it
        degree = isinstance(passage[name], int | float) and passage[name] not in (0, 1, -1)
        if not degree and _says_yes(name, passage[name]) is not wanted:
            raise BadRowError(f"`{column}` has a passage whose `{name}` is {passage[name]!r}")
    title, text = passage.get("title"), passage["text"]
    has_title = isinstance(title, str) and isinstance(text, str) and not is_blank(title) and not is_blank(text)
    return f"{title} {text}" if has_title else text


def _conversation(column: str, messages: Any) -> str:
    """The text of ms-swift's list of messages: an optional system message and one other."""
    contents = (
        [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
        if isinstance(messages, list)
        else []
    )
    systems = [content for role, content in contents if role == "system"]
    others = [content for role, content in contents if role != "system"]
    if len(others) != 1 or len(systems) > 1 or len(contents) != len(messages):
        raise BadRowError(f"`{column}`: wanted one message with `role` and `content`, found {_kind(messages)}")
    return " ".join(_text(f"{column}.content", content) for content in systems + others)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", bool: "true or false", str: "a text"}
    return names.get(
        type(value), f"the number {value!r}" if isinstance(value, int | float) else f"{type(value).__name__}"
    )


def _hint(value: Any) -> str:
    columnar = isinstance(value, dict | list) and len(value) > 1
    if not columnar:
        return ""
    return (
        "; the file seems to hold whole columns, wanted is one object per row: pandas writes them with to_json(path, "
        "orient='records', lines=True, force_ascii=False)"
    )


def _missing_column(name: str, found: Mapping[str, Any]) -> str:
    there = f"no `{name}` column; found {', '.join(map(repr, found)) or 'none'}: "
    if sides := [key for key in found if key.casefold() in _SIDES]:
        return (
            f"{there}`{'` and `'.join(sides)}` do not tell whether they belong together; if they do, rename them to "
            "`anchor` and `positive`"
        )
    if known := next((why for key, why in _OTHER_ROWS.items() if key in found), None):
        return there + known
    if not any(map(_is_column, found)) and any(isinstance(value, dict | list) for value in found.values()):
        return f"{there}the rows seem to be inside of these; wanted is one object per row, at the top or in one list"
    free = {column.casefold(): column for column in found if column not in _MEANING}
    near = next((free[m] for w in _ALIASES[name] for m in difflib.get_close_matches(w, free, n=1)), None)
    return there + (f"rename `{near}` to `{name}`" if near else f"rename the column that holds the {name} to `{name}`")


_OTHER_ROWS = {
    "premise": "NLI's rows; keep the entailments alone, as `anchor` and `positive`, and leave the label out",
    "positive_document_ids": "Tevatron's rows that name documents by id; put their texts into `positive_passages`",
    "positive_ctxs": "DPR's rows; write `question` as `anchor` and the texts of `positive_ctxs` as `positive`",
    "texts": "the sides of a list of texts are unknown; write `anchor` and `positive`",
    "set": "the sides of a set of texts are unknown; write `anchor` and `positive`",
}


def _printable(name: str) -> str:
    """A name that any terminal can print: half a surrogate pair becomes its escape."""
    return name.encode("utf-8", "backslashreplace").decode()
