"""Each knob that names a file or a column of the judgements is read."""

from __future__ import annotations

import json

import pytest

from ebr_lib import evaluate_retrieval
from ebr_lib.errors import DataError


@pytest.fixture
def judged(tmp_path) -> dict:
    """Queries, documents and judgements of which every file and column has a name of its own."""
    (tmp_path / "q.csv").write_text("_id,wish,text\nq0,blanket warm,wrong\n")
    (tmp_path / "c.csv").write_text("_id,body,text\nd0,warm blanket,wrong\nd1,steel pan,wrong too\n")
    (tmp_path / "j.tsv").write_text("q0\td0\t1\n")
    return {
        "queries_path": str(tmp_path / "q.csv"), "corpus_path": str(tmp_path / "c.csv"), "models": [],
        "qrels_path": str(tmp_path / "j.tsv"), "output_dir": str(tmp_path / "out"), "resamples": 100,
    }  # fmt: skip


def test_the_given_columns_of_queries_and_documents_are_read(judged):
    found = evaluate_retrieval(judged | {"query_column": "wish", "corpus_column": "body"})
    assert found.metrics["BM25"]["mrr@10"] == 1
    assert evaluate_retrieval(judged | {"query_column": "wish"}).metrics["BM25"]["mrr@10"] == 0


def test_judgements_of_their_own_file(judged, tmp_path):
    columns = {"query_column": "wish", "corpus_column": "body"}
    (tmp_path / "other.tsv").write_text("q0\td1\t1\n")
    other = evaluate_retrieval(judged | columns | {"qrels_path": str(tmp_path / "other.tsv")})
    assert other.metrics["BM25"]["mrr@10"] == 0


def test_the_label_column_decides_which_training_rows_are_read(tmp_path):
    rows = [{"anchor": f"want {i}", "positive": f"thing {i}", "score": 0.5, "click": i % 2} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"anchor": "ask", "positive": "thing 1"}))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "thing 1"}) + "\n" + json.dumps({"text": "other"}))
    config = {"data_path": str(tmp_path), "train_data_path": str(path), "label_column": "none"}
    config |= {"models": [], "resamples": 100, "output_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"`score` is 0\.5"):
        evaluate_retrieval(config | {"label_column": None})
    assert evaluate_retrieval(config).facts["queries"] == 1
