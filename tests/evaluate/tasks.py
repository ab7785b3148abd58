"""A small task in BEIR's layout, and how tests read one."""

from __future__ import annotations

import json
from pathlib import Path

from ebr_lib.evaluate.corpus import Columns
from ebr_lib.evaluate.task import find_sources, read_task

DOCS = [
    "red running shoes",
    "透明手机壳",
    "steel frying pan",
    "warm wool blanket",
    "  RED Running shoes ",
    "<b>pan & lid</b>",
]
QUERIES = ["shoes for running", "手机壳 透明", "pan <script>alert(1)</script>"]
QRELS = "query-id\tcorpus-id\tscore\nq0\td4\t2\nq1\td1\t1\nq2\td2\t1\nq2\td5\t1\nq0\td3\t0\n"


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_beir(folder: Path) -> Path:
    jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(DOCS)])
    queries = enumerate([*QUERIES, "nobody judged me"])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": t, "city": "ab"[i % 2]} for i, t in queries])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


def task_of(data_path=None, queries=None, corpus=None, *, qrels=None, columns=None, slices=(), trained=(), **more):
    sources = find_sources(*(str(p) if p else None for p in (data_path, queries, corpus, qrels)))
    return read_task(sources, columns or Columns(), slices, set(trained), **more)
