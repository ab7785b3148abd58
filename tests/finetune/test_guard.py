"""The guard against forgetting: what it reads, what it refuses, where it is reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ebr_lib.errors import DataError, MissingError
from ebr_lib.finetune import guard as guards
from ebr_lib.finetune import strength
from ebr_lib.finetune.guard import read_guard
from tests.finetune.conftest import train, write_rows

SCORES = "query-id\tcorpus-id\tscore\n"


@pytest.fixture
def beir(tmp_path) -> Path:
    """Six documents; the first two queries have answers, the third has none."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "Title" if i == 1 else "", "text": f"document {i}"} for i in range(6)]
    write_rows(folder / "corpus.jsonl", documents)
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)])
    rows = "q0\td0\t1\nq0\td1\t2\nq1\td5\t1\nq1\td2\t0\nq9\td0\t1\n"
    (folder / "qrels" / "test.tsv").write_text(SCORES + rows, encoding="utf-8")
    (folder / "qrels" / "dev.tsv").write_text(SCORES + "q2\td0\t1\n", encoding="utf-8")
    return folder


def test_a_beir_folder_becomes_a_search(beir):
    task = read_guard(str(beir), 100, seed=1)
    answers = {
        query: {task.documents[i] for i in found} for query, found in zip(task.queries, task.relevant, strict=True)
    }
    assert answers == {"query 0": {"document 0", "Title document 1"}, "query 1": {"document 5"}}
    assert sorted(task.documents) == sorted(["Title document 1", *(f"document {i}" for i in (0, 2, 3, 4, 5))])
    assert len(read_guard(str(beir), 4, seed=1).documents) == 4


def test_pairs_search_their_positives_and_many_queries_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MOST_QUERIES", 2)
    path = write_rows(tmp_path / "g.jsonl", [{"anchor": f"a{i}", "positive": [f"p{i}", f"r{i}"], "prompt": f"{i}: "}
                                                for i in range(5)])  # fmt: skip
    task = read_guard(path, 100, seed=1)
    assert len(task.queries) == 2 and len(task.documents) == 10
    assert len(read_guard(path, 7, seed=1).documents) == 7
    assert all(task.prompts[query] == f"{query[1]}: " for query in task.queries)
    assert task.queries == read_guard([path], 100, seed=1).queries != read_guard(path, 100, seed=4).queries


@pytest.mark.parametrize(
    ("file", "text", "error", "said"),
    [
        ("qrels/test.tsv", "q7\td0\t1\n", DataError, "no judgement is of a known query and document"),
        ("qrels/test.tsv", SCORES + "q0\td0\n", DataError, "line 2: wanted query, document and grade"),
        ("queries.jsonl", json.dumps({"id": 1, "text": "x"}) + "\n", DataError, "row 1: wanted _id and text, found id"),
        ("qrels/test.tsv", None, MissingError, "wanted qrels/test.tsv, or one .tsv alone, found dev.tsv, train.tsv"),
    ],
)
def test_broken_folders_are_named(beir, file, text, error, said):
    if text is None:
        (beir / file).rename(beir / "qrels" / "train.tsv")
    else:
        (beir / file).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=said):
        read_guard(str(beir), 100, seed=1)


def found(metrics: dict[float, float], guard: dict[float, float]):
    """Means as `settle_strength` makes them."""

    def means(strength: float) -> dict:
        return {"all": {"mrr@10": metrics[strength]}} if metrics else {}

    return {s: (means(s), means(s) | {"guard": {"ndcg@10": value}}) for s, value in guard.items()}


def test_no_strength_costs_more_than_the_tolerance(caplog):
    rising = {0.0: 0.1, 0.25: 0.2, 0.5: 0.3, 0.75: 0.4, 1.0: 0.5}
    guard = {0.0: 0.5, 0.25: 0.52, 0.5: 0.49, 0.75: 0.485, 1.0: 0.3}
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        assert strength._choose(found(rising, guard), "mrr@10", 0.01) == 0.5
    assert "the guard refuses: 0.75 (0.4850), 1 (0.3000), from 0.5000 before" in caplog.text
    assert strength._choose(found(rising, guard), "mrr@10", 0.2) == 1
    assert strength._choose(found({}, guard), "mrr@10", 0.02) == 0.75  # no held-out queries: the largest
    assert strength._choose(found(rising, {0.0: 0.5, 1.0: 0.4}), "mrr@10", 0.01) == 0


@pytest.mark.parametrize("eval_ratio", [0.25, 0.0])
def test_a_run_reports_the_guard_beside_the_metric(settings, beir, eval_ratio):
    knobs = {"guard_data_path": str(beir), "guard_tolerance": 1.0, "eval_ratio": eval_ratio}
    result = train(settings, adapter_strength="auto", **knobs)
    assert result.before["guard"]["queries"] == result.after["guard"]["queries"] == 2
    table = result.tables["strengths"]
    assert set(table["half"]) == ({"all", "guard"} if eval_ratio else {"guard"})
    saved = table[(table["half"] == "guard") & (table["strength"] == result.adapter_strength)]
    assert saved["ndcg@10"].item() == result.after["guard"]["ndcg@10"]
    assert "guard" in set(result.tables["before_after"]["documents"])
    if not eval_ratio:
        assert result.adapter_strength == 1 and result.verdict == ""
