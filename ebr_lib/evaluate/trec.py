"""Runs and judgements in TREC's format, which other tools read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.files import written_whole
from ebr_lib.logs import logger
from ebr_lib.metrics import Ranking

QRELS_FILE, RUN_ENDING = "qrels.trec", ".run.trec"


def run_files(folder: Path, rankers: Iterable[str]) -> dict[str, Path]:
    """The file of each ranker's run."""
    return {name: folder / f"{name.replace('%', '%25').replace('/', '%2F')}{RUN_ENDING}" for name in rankers}


def warn_of_earlier_runs(folder: Path, rankers: Iterable[str]) -> None:
    """Log the runs in the folder that this evaluation does not replace."""
    if others := sorted(set(folder.glob(f"*{RUN_ENDING}")) - set(run_files(folder, rankers).values())):
        names = ", ".join(path.name for path in others)
        logger.warning("%s 中还有以前评估的结果 also holds runs of an earlier evaluation: %s", folder, names)


def write_qrels(path: Path, task: RetrievalTask) -> None:
    """Write `query 0 document grade` per judgement."""
    documents = [_trec_id(id_) for id_ in task.corpus.ids]
    _write_lines(path, (
        f"{_trec_id(query)} 0 {documents[document]} {grade}"
        for query, grades in zip(task.query_ids, task.relevant, strict=True)
        for document, grade in grades.items()
    ))  # fmt: skip


def write_run(path: Path, task: RetrievalTask, ranking: Ranking, ranker: str) -> None:
    """Write `query Q0 document rank score ranker` per document found."""
    documents, tag = [_trec_id(id_) for id_ in task.corpus.ids], _trec_id(ranker)
    _write_lines(path, (
        f"{_trec_id(query)} Q0 {documents[document]} {rank} {score!s} {tag}"
        for query, ids, scores in zip(task.query_ids, ranking.ids, ranking.scores, strict=True)
        for rank, (document, score) in enumerate(zip(ids, scores, strict=True), 1)
        if document >= 0
    ))  # fmt: skip


def _trec_id(id_: str) -> str:
    """An id without blanks, which separate the fields: they become %20 and the like, and % becomes %25."""
    return re.sub(r"[\s%]", lambda found: quote(found[0]), id_)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with written_whole(path) as new, open(new, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
