"""Judgements of every format are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import DataError
from ebr_lib.evaluate.corpus import Columns
from tests.evaluate.tasks import jsonl, task_of


def test_grades_may_have_a_decimal_point(beir):
    qrels = beir / "q.txt"
    qrels.write_text("q0 d0 1.0\nq1 d1 3.0\n")  # without a header
    assert task_of(beir, qrels=qrels).relevant == [{0: 1}, {1: 3}]
    qrels.write_text("q0 d0 1\nq1 d1 0.5\n")
    with pytest.raises(DataError, match=r"line 2: wanted .* the grade a whole number; found 'q1 d1 0.5'"):
        task_of(beir, qrels=qrels)


def test_trec_qrels_without_header(beir):
    qrels = beir / "q.txt"
    qrels.write_text("q0 0 d0 1\nq1 0 d1 3\n")
    assert task_of(beir, qrels=qrels).relevant == [{0: 1}, {1: 3}]


def test_error_names_judgements_that_are_not_utf8(beir):
    (beir / "qrels" / "test.tsv").write_bytes("查询\td1\t1\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"test\.tsv is not UTF-8"):
        task_of(beir)


@pytest.mark.parametrize("without", ["q.csv", "c.jsonl", "e.txt"])
def test_ids_of_judgements_are_never_taken_for_row_numbers(tmp_path, without):
    names = {name: "number" if name == without else "id" for name in ("q.csv", "c.jsonl", "e.txt")}
    (tmp_path / "q.csv").write_text(f"{names['q.csv']},text\n1,shoes\n2,pan\n")
    jsonl(tmp_path / "c.jsonl", [{names["c.jsonl"]: i, "text": t} for i, t in (("1", "red shoes"), ("2", "a pan"))])
    write_embeddings(
        tmp_path / "e.txt", {names["e.txt"]: ["1", "2"], "text": ["red shoes", "a pan"]}, np.eye(2, dtype=np.float32)
    )
    (tmp_path / "qrels.tsv").write_text("1\t1\t1\n")
    corpus = tmp_path / ("c.jsonl" if without == "q.csv" else without)
    with pytest.raises(DataError, match=rf"{without}: judgements name its rows by their ids.*found number.*id_column"):
        task_of(None, tmp_path / "q.csv", corpus, qrels=tmp_path / "qrels.tsv")


def test_rows_labelled_negative_are_not_answers(tmp_path, caplog):
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "q.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"doc {i}"}) + "\n" for i in range(4)))
    rows = [{"query": f"ask {i}", "positive": f"doc {i}", "label": i % 2} for i in range(4)]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(None, queries, corpus)
    assert (task.queries, task.relevant) == (["ask 1", "ask 3"], [{1: 1}, {3: 1}])
    assert "rows labelled as negative are not answers: 2 of" in caplog.text
    assert len(task_of(None, queries, corpus, columns=Columns(label="none")).queries) == 4
    queries.write_text(json.dumps(rows[1] | {"label": 0.7}))
    with pytest.raises(DataError, match=r"q.jsonl: row 1: `label` is 0.7, neither yes .*set label_column: none"):
        task_of(None, queries, corpus)


@pytest.mark.parametrize("answer", [5, {"a": "b"}, ["x", 5], True])
def test_error_names_an_answer_that_is_not_text(tmp_path, answer):
    queries = jsonl(tmp_path / "q.jsonl", [{"query": "a", "positive": "x"}, {"query": "b", "positive": answer}])
    with pytest.raises(DataError, match=r"q\.jsonl: row 2: wanted an answer's text or a list of texts, found"):
        task_of(queries)


def test_answers_that_are_not_in_a_given_corpus_are_counted_and_left_out(tmp_path, caplog):
    rows = [{"query": "a", "positive": "nowhere"}, {"query": "b", "positive": ["x", "gone"]}]
    queries = jsonl(tmp_path / "q.jsonl", rows)
    corpus = jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    task = task_of(None, queries, corpus)
    assert (task.queries, task.relevant, task.unjudged) == (["b"], [{0: 1}], 0)
    assert task.left_out == {"judgements_of_unknown_documents": 2, "queries_without_answer_left": 1}
    assert "2 judgements of unknown documents (row 1: 'nowhere'; row 2: 'gone')" in caplog.text
    jsonl(queries, rows[:1])
    with pytest.raises(DataError, match="row 1: 'nowhere'"):
        task_of(None, queries, corpus)


def test_unknown_ids_and_blank_queries_are_counted_and_left_out(beir, caplog):
    with (beir / "queries.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"_id": f"b{i}", "text": text}) + "\n" for i, text in enumerate(["", " \u200b", None])
        )
    with (beir / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\td99\t1\nq99\td0\t1\nq3\td98\t1\nb0\td0\t0\n")
    task = task_of(beir)
    assert (task.query_ids, task.unjudged) == (["q0", "q1", "q2"], 0)
    assert task.relevant == [{0: 2, 3: 0}, {1: 1}, {2: 1, 4: 1}]
    assert task.left_out == {
        "judgements_of_unknown_documents": 2,
        "judgements_of_unknown_queries": 1,
        "queries_blank": 3,
        "queries_without_answer_left": 1,  # q3, of which only an unknown document was judged
    }
    assert task.facts() == task.facts() | task.left_out
    assert "line 7: document 'd99'; line 8: query 'q99'" in caplog.text and "blank queries left out: 3" in caplog.text


def test_judgements_of_rows_without_a_vector_or_text_are_counted_and_left_out(tmp_path, caplog):
    vectors = np.array([[1, 0], [np.nan, np.nan]], dtype=np.float32)
    write_embeddings(tmp_path / "e.txt", {"id": ["001", "009"], "text": ["a b", ""]}, vectors)
    jsonl(tmp_path / "c.jsonl", [{"id": "001", "text": "a b"}, {"id": "009", "text": " \u200b"}])
    queries = jsonl(tmp_path / "q.jsonl", [{"_id": "q", "text": "a"}])
    (tmp_path / "r.tsv").write_text("q\t001\t1\nq\t009\t1\n")
    for corpus in ("e.txt", "c.jsonl"):
        task = task_of(None, queries, tmp_path / corpus, qrels=tmp_path / "r.tsv")
        assert (task.relevant, len(task.corpus)) == ([{0: 1}], 1)
        assert task.left_out == {"judgements_of_blank_documents": 1}
    assert "line 2: document '009'" in caplog.text
    (tmp_path / "r.tsv").write_text("q\t009\t1\n")
    with pytest.raises(
        DataError, match="no judgement is of a known query and document: 1 judgements of blank documents"
    ):
        task_of(None, queries, tmp_path / "e.txt", qrels=tmp_path / "r.tsv")


JUDGED = [("1", "7", 2), ("1", "8", 0), ("2", "9", 1)]
TABLE = "query-id,corpus-id,score\n1,7,2\n1,8,0\n2,9,1\n"
AS_TEXT = {
    "test.tsv": TABLE.replace(",", "\t"),
    "test.csv": TABLE,
    "pandas.csv": ",score,doc_id,query_id\n0,2,7,1\n1,0,8,1\n2,1,9,2\n",
    "quoted.csv": '"qid","docid","relevance"\n"1","7","2.0"\n"1","8","0"\n"2","9","1"\n',
    "no_header.csv": TABLE.split("\n", 1)[1],
    "test.txt": "1 0 7 2\n1 0 8 0\n\n2 0 9 1\n",
    "commas.txt": TABLE,
    "test.trec": "1 Q0 7 2\n1 Q0 8 0\n2 Q0 9 1\n",
    "hive.txt": TABLE.replace(",", "\x01"),
    "test.jsonl": "".join(
        json.dumps(dict(zip(("query-id", "corpus-id", "score"), j, strict=True))) + "\n" for j in JUDGED
    ),
    "nested.json": '{"1": {"7": 2, "8": 0}, "2": {"9": 1}}',
    "nested.jsonl": '{"1": {"7": "2", "8": 0}}\n{"2": [9]}\n',
    "rows_within.json": json.dumps(
        {
            "data": [dict(zip(("query-id", "corpus-id", "score"), j, strict=True)) for j in JUDGED],
        }
    ),
    "tabs_within.parquet": TABLE.replace(",", "\t"),
    "numbers.json": json.dumps([{"corpus_id": int(d), "Query ID": int(q), "label": float(g)} for q, d, g in JUDGED]),
}


def numbered_texts(folder: Path) -> Path:
    jsonl(folder / "queries.jsonl", [{"_id": 1, "text": "shoes"}, {"_id": 2, "text": "pan"}])
    jsonl(folder / "corpus.jsonl", [{"_id": i, "text": f"item {i}"} for i in (7, 8, 9)])
    (folder / "qrels").mkdir()
    return folder


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", AS_TEXT)
def test_judgements_in_text(tmp_path, name, packed):
    place = numbered_texts(tmp_path) / "qrels" / f"{name}{packed}"
    text = AS_TEXT[name].encode()
    place.write_bytes(gzip.compress(text) if packed else text)
    assert task_of(tmp_path).relevant == [{0: 2, 1: 0}, {2: 1}]


@pytest.mark.parametrize("ids", ["int64", "float64", "string"])
def test_judgements_in_parquet(tmp_path, ids):
    import pandas

    frame = pandas.DataFrame(JUDGED, columns=["query-id", "corpus-id", "score"])
    numbers = frame.assign(**{name: frame[name].astype(int).astype(ids) for name in frame.columns[:2]})
    numbers.to_parquet(numbered_texts(tmp_path) / "qrels" / ("test.parquet" if ids == "int64" else "test.tsv"))
    assert task_of(tmp_path).relevant == [{0: 2, 1: 0}, {2: 1}]
