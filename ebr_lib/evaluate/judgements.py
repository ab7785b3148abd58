"""Which documents answer which query, and how well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ebr_lib.data.containers import COLUMNAR
from ebr_lib.data.pairs import is_positive_pair
from ebr_lib.data.queries import (
    ANSWERS,
    DAMAGED,
    GRADE,
    JSON,
    JUDGED_DOCUMENT,
    JUDGED_QUERY,
    Record,
    id_in,
    kind_in,
    letters_of,
    parts_of,
    plain_name,
    plain_suffix,
    records_of_file,
    split_rows,
)
from ebr_lib.data.text import text_keys
from ebr_lib.errors import DataError, UserError
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.logs import logger

SHOWN_LEFT_OUT = 3


@dataclass
class Judged:
    """Judgements of known documents, and counts of those left out.

    :ivar grades: for each row of the queries, document number to grade.
    :ivar asked: rows with a relevant document in the judgements, whether the corpus has it or not.
    """

    grades: list[dict[int, int]]
    asked: set[int] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def answers(self, row: int) -> set[int]:
        """The known relevant documents of a query."""
        return {document for document, grade in self.grades[row].items() if grade > 0}

    def leave_out(self, kind: str, example: str) -> None:
        """Count a judgement that cannot be used."""
        self.left_out[f"judgements_of_{kind}"] += 1
        if len(self.examples) < SHOWN_LEFT_OUT:
            self.examples.append(example)

    def check(self, path: Path, advice: str) -> Judged:
        """Warn of what was left out.

        :raises DataError: that is everything, so the files do not belong together.
        """
        if self.left_out:
            kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in self.left_out.items())
            reasons = f"{kinds} ({'; '.join(self.examples)}); {advice}"
            if not any(self.grades):
                raise DataError(f"{path}: no judgement is of a known query and document: {reasons}")
            logger.warning("%s: 部分标注已略过 left out: %s", path, reasons)
        return self


# --- answers given as texts ---------------------------------------------------------------------------------------


def read_answers(path: Path, records: Sequence[Record], label_column: str | None) -> list[list[str]]:
    """The texts that answer each query; none in rows whose label says that they do not."""
    column = next((name for name in ANSWERS if name in records[0]), None)
    if column is None:
        raise DataError(
            f"{path}: no judgements: wanted a column {', '.join(ANSWERS)} with the texts that answer a query, or a "
            f"file given as qrels_path; found {', '.join(records[0])}"
        )
    answers, refused = [], 0
    for row, record in enumerate(records, 1):
        value = record.get(column)
        texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: row {row}: wanted an answer's text or a list of texts, found {value!r}")
        try:
            is_answer = not texts or is_positive_pair(record, len(texts), label_column)
        except DataError as reason:
            raise DataError(f"{path}: row {row}: {reason}") from None
        refused += not is_answer
        answers.append(texts if is_answer else [])
    if refused:
        logger.warning("标签为否的行不算答案 rows labelled as negative are not answers: %d of %s", refused, path)
    return answers


def judged_by_text(path: Path, first: Sequence[int], answers: Sequence[Sequence[str]], corpus: Corpus) -> Judged:
    """Equal queries share their answers, and only the first of them stays.

    :param first: for each row, the first one whose query is equal.
    """
    judged = Judged([{} for _ in first])
    for number, (row, group) in enumerate(zip(first, answers, strict=True), 1):
        for answer, key in zip(group, text_keys(group).tolist(), strict=True):
            judged.asked.add(row)
            if key in corpus.number_of_text:
                judged.grades[row][corpus.number_of_text[key]] = 1
            else:
                judged.leave_out("unknown_documents", f"row {number}: {answer[:60]!r}")
    return judged.check(path, "an answer must be a document of the corpus")


# --- judgements by id ---------------------------------------------------------------------------------------------

Line = tuple[str, str, str, Any, Any]
"""A judgement as it is written: its place in the file, query id, document id, grade, and what to show of it."""


def read_qrels(path: Path, rows: int, queries: Mapping[str, int], corpus: Corpus) -> Judged:
    """Read judgements: tables that name their columns, or BEIR's three (query, document, grade) or TREC's four.

    Judgements of unknown queries and documents, and of documents without text or vector, are counted and left out; of
    several for one document the highest grade counts.

    :param rows: how many rows the queries have.
    :param queries: row by query id.
    """
    judged = Judged([{} for _ in range(rows)])
    for part in parts_of(path):
        is_table = plain_suffix(part) in JSON or kind_in(part) in COLUMNAR
        for place, query, document, value, shown in _table(part) if is_table else _lines(part, queries):
            number = number_in(value)
            if number is None or not number.is_integer():
                raise _wrong_judgement(part, place, shown)
            if (row := queries.get(query)) is None:
                judged.leave_out("unknown_queries", f"{place}: query {query!r}")
                continue
            if number > 0:
                judged.asked.add(row)
            if (known := corpus.number.get(document)) is not None:
                judged.grades[row][known] = max(int(number), judged.grades[row].get(known, int(number)))
            else:
                kind = "blank" if document in corpus.blank else "unknown"
                judged.leave_out(f"{kind}_documents", f"{place}: document {document!r}")
    return judged.check(path, "check that the three files belong together, and the id columns (id_column)")


def _table(path: Path) -> Iterator[Line]:
    records = records_of_file(path)
    if records and all(isinstance(value, (dict, list)) for value in records[0].values()):
        yield from _nested(path, records)
        return
    names = _judgement_columns(path, list(records[0])) if records else []
    for number, record in enumerate(records, 1):
        query, document, grade = (record.get(name) for name in names)
        yield f"row {number}", id_in(query), id_in(document), grade, record


def _nested(path: Path, records: Sequence[Record]) -> Iterator[Line]:
    """Judgements as pytrec_eval takes them, `{query: {document: grade}}`; in a list of documents each is relevant."""
    for query, documents in chain.from_iterable(record.items() for record in records):
        place = f"query {query!r}"
        grades = dict.fromkeys(map(id_in, documents), 1) if isinstance(documents, list) else documents
        if not isinstance(grades, dict) or any(isinstance(document, (dict, list)) for document in documents):
            raise _wrong_judgement(path, place, documents)
        yield from ((place, query, document, grade, {document: grade}) for document, grade in grades.items())


def _lines(path: Path, queries: Collection[str]) -> Iterator[Line]:
    chosen: Sequence[int] | None = None
    for number, (line, fields) in enumerate(_split_lines(path)):
        # a first line holds names if it names no query and has no number
        if number == 0 and fields[0].strip() not in queries and not any(number_in(f) is not None for f in fields):
            plain = set(map(plain_name, fields))
            if not plain.isdisjoint(JUDGED_QUERY) and not plain.isdisjoint(JUDGED_DOCUMENT):
                chosen = [fields.index(name) for name in _judgement_columns(path, fields)]
            continue
        shown = " ".join(fields)
        if len(fields) <= max(chosen) if chosen else len(fields) not in (3, 4):
            raise _wrong_judgement(path, f"line {line}", shown)
        query, document, grade = (fields[i].strip() for i in chosen or (0, -2, -1))
        yield f"line {line}", query, document, grade, shown


def _split_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is not blank, split at the mark of the first line: tab, \\001, comma or blank."""
    try:
        with letters_of(path) as file:
            head = file.readline()
        found = [mark for mark in "\t\x01" if mark in head]
        if "," in head and (plain_suffix(path) == ".csv" or len(head.split()) not in (3, 4)):  # else it is within an id
            found.append(",")
        if found:
            rows = split_rows(path, found[0])
            yield from ((line, fields) for line, fields in rows if any(map(str.strip, fields)))
            return
        with letters_of(path) as file:
            yield from ((line, text.split()) for line, text in enumerate(file, 1) if text.strip())
    except UserError:
        raise
    except DAMAGED as error:
        problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(f"{path} {problem}: {error}") from error


def _judgement_columns(path: Path, found: Sequence[str]) -> list[str]:
    """Which of the columns are query, document and grade."""
    named = {plain_name(name): name for name in reversed(found)}
    wanted = {"query-id": JUDGED_QUERY, "corpus-id": JUDGED_DOCUMENT, "score": GRADE}
    chosen = {name: next((named[n] for n in usual if n in named), None) for name, usual in wanted.items()}
    if missing := [name for name, column in chosen.items() if column is None]:
        raise DataError(
            f"{path}: wanted columns query-id, corpus-id and score, found {', '.join(found) or 'none'}; "
            f"{' and '.join(missing)} must be added, or another column renamed"
        )
    return [column for column in chosen.values() if column is not None]


def _wrong_judgement(path: Path, place: str, shown: Any) -> DataError:
    return DataError(
        f"{path}: {place}: wanted `query document grade` (or TREC's four columns), the grade a whole number; found "
        f"{shown!r}"
    )


def number_in(value: Any) -> float | None:
    """A value as a number, also if it is written 1.0 or true; None if it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
