"""The guard against forgetting: a search of another kind than the training data, measured before and after."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.data.queries import read_records, split_rows
from ebr_lib.errors import DataError, MissingError
from ebr_lib.finetune.heldout import HeldoutTask, build_task
from ebr_lib.logs import logger
from ebr_lib.names import CORPUS_FILE, QUERIES_FILE

MOST_QUERIES = 500


def read_guard(path: str | Sequence[str], corpus_size: int, seed: int) -> HeldoutTask:
    """Read a BEIR folder, or pairs in the formats of training data: the positives of all rows are then the documents,
    and rows' own prompts count.

    At most `MOST_QUERIES` queries are drawn by the seed, and documents up to `corpus_size`, answers first.

    :raises MissingError: a path does not exist.
    :raises DataError: the files cannot be read, or no query has an answer.
    """
    folder = Path(path) if isinstance(path, str) else None
    if folder and (folder / CORPUS_FILE).is_file() and (folder / QUERIES_FILE).is_file():
        rows, others = _read_beir(folder)
    else:
        rows = others = expand(read_pairs(path))
    queries = sorted({row.anchor for row in rows})
    kept = set(random.Random(seed).sample(queries, min(MOST_QUERIES, len(queries))))
    task = build_task([row for row in rows if row.anchor in kept], others, corpus_size, seed).seen_by(())
    if not task.queries:
        raise DataError(f"guard_data_path {path}: every query has itself as its only answer, so nothing is measured")
    logger.info("防遗忘集 guard: %d queries, %d documents from %s", len(task.queries), len(task.documents), path)
    return task


def _read_beir(folder: Path) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """The answers and all documents of `corpus.jsonl`, `queries.jsonl` and `qrels/test.tsv`, or the only one there."""
    texts = {str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in _rows(folder / CORPUS_FILE)}
    queries = {str(row["_id"]): str(row["text"]) for row in _rows(folder / QUERIES_FILE)}
    answers = [
        TrainingRow(queries[query], texts[document])
        for query, document, grade in _judgements(folder)
        if grade > 0 and query in queries and document in texts
    ]
    if not answers:
        raise DataError(f"guard_data_path {folder}: no judgement is of a known query and document")
    return answers, [TrainingRow(text, text) for text in texts.values()]


def _rows(path: Path) -> list[dict[str, str]]:
    records = [dict(record) for record in read_records(path)]
    for number, record in enumerate(records, 1):
        if record.get("_id") is None or not isinstance(record.get("text"), str):
            raise DataError(f"{path}: row {number}: wanted _id and text, found {', '.join(record)}")
    return records


def _judgements(folder: Path) -> list[tuple[str, str, float]]:
    there = sorted((folder / "qrels").glob("*.tsv"))
    path = next((file for file in there if file.name == "test.tsv"), there[0] if len(there) == 1 else None)
    if path is None:
        names = ", ".join(file.name for file in there) or "none"
        raise MissingError(f"guard_data_path {folder}: wanted qrels/test.tsv, or one .tsv alone, found {names}")
    found = []
    for line, fields in split_rows(path, "\t"):
        try:
            query, document, grade = fields
            found.append((query, document, float(grade)))
        except ValueError:
            if found or line > 1:  # else a header
                raise DataError(f"{path}: line {line}: wanted query, document and grade, found {fields}") from None
    return found
