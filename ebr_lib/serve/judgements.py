"""The answers that people have marked right or wrong: a folder that `evaluate` reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import filelock

from ebr_lib.data.text import normalised
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.files import make_folder, named_when_full, written_whole
from ebr_lib.names import QUERIES_FILE

QRELS_FILE, LOCK = "qrels.jsonl", ".lock"


class Judgements:
    """Grades of documents per query, 1 right and 0 wrong, on disk after every mark.

    The folder has `queries.jsonl` (`_id`, `text`) and `qrels.jsonl` (`query-id`, `corpus-id`, `score`). Queries that
    differ only in case and blanks are one. One server writes to a folder at a time.
    """

    def __init__(self, folder: str) -> None:
        """Read what is there, and keep other servers out.

        :raises ConfigError: the folder cannot be written to, or another server writes there.
        :raises DataError: a file there is damaged.
        """
        self.folder = make_folder(Path(folder))
        self._files, self._changing = filelock.FileLock(self.folder / LOCK, timeout=0), threading.Lock()
        try:
            self._files.acquire()
        except filelock.Timeout as error:
            raise ConfigError(f"judgements_dir {folder}: another server writes there; give another folder") from error
        self._texts: dict[str, str] = {}  # by id
        self._ids: dict[str, str] = {}  # by normalised text
        self._grades: dict[str, dict[str, int]] = {}  # by query id, by document id
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        for row in _rows(self.folder / QUERIES_FILE, ("_id", "text")):
            if row["_id"] in self._texts:
                raise DataError(
                    f"{self.folder / QUERIES_FILE} has _id {row['_id']} twice; give one of them another number"
                )
            self._texts[row["_id"]] = row["text"]
            self._ids[normalised(row["text"])] = row["_id"]
        for row in _rows(self.folder / QRELS_FILE, ("query-id", "corpus-id")):
            if row["query-id"] not in self._texts or row.get("score") not in (0, 1):
                raise DataError(f"{self.folder / QRELS_FILE} has a judgement that no page made ({row}); move it away")
            self._grades.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]

    def close(self) -> None:
        """Let another server write."""
        self._files.release()

    def of(self, query: str) -> dict[str, int]:
        """Grades of a query's documents, by id."""
        return dict(self._grades.get(self._ids.get(normalised(query), ""), {}))

    def mark(self, query: str, document: str, grade: int | None) -> None:
        """Judge a document, or take its judgement back (None), and write it.

        :raises DataError: the disk is full.
        """
        with self._changing, named_when_full(self.folder):
            # not the count: a person may have deleted lines
            unused = f"q{max((int(key[1:]) for key in self._texts), default=0) + 1}"
            number = self._ids.get(normalised(query)) or unused
            texts = {number: query} | self._texts
            grades = {key: dict(found) for key, found in self._grades.items()}
            grades.setdefault(number, {}).pop(document, None)
            if grade is not None:
                grades[number][document] = grade
            self._write(dict(sorted(texts.items(), key=lambda item: int(item[0][1:]))), grades)
            self._texts, self._grades = texts, grades
            self._ids[normalised(query)] = number

    def _write(self, texts: Mapping[str, str], grades: Mapping[str, Mapping[str, int]]) -> None:
        """Queries first: a reader in between finds a query without a judgement, and leaves it out."""
        _write_rows(self.folder / QUERIES_FILE, ({"_id": key, "text": text} for key, text in texts.items()))
        rows = (
            {"query-id": query, "corpus-id": document, "score": grade}
            for query, found in grades.items()
            for document, grade in found.items()
        )
        _write_rows(self.folder / QRELS_FILE, rows)

    def counts(self) -> dict[str, int]:
        """Queries with a judgement, and documents judged right and wrong."""
        grades = [grade for found in self._grades.values() for grade in found.values()]
        queries = sum(bool(found) for found in self._grades.values())
        return {"queries": queries, "right": sum(grades), "wrong": len(grades) - sum(grades)}


def _rows(path: Path, texts: Iterable[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if not all(isinstance(row[name], str) for row in rows for name in texts):
            raise ValueError("an id or a text is missing")
        if not all(row["_id"][1:].isdigit() for row in rows if "_id" in row):
            raise ValueError("an id is not q1, q2 …")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file that this page wrote ({error!r}); move it away") from error
    return rows


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with written_whole(path) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
