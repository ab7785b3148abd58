"""The evaluation stage: what it reads, what it says, what it writes."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ebr_lib.cli import main
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.data.queries import read_records
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.evaluate.columns import Columns
from ebr_lib.evaluate.compare import Difference, changed_most, compare, holm_corrected
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.rankers import bm25_tokens, labels, rank_with_bm25
from ebr_lib.evaluate.report import Duel, Example, Report, Slice
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.evaluate.slices import query_slices
from ebr_lib.evaluate.task import RetrievalTask, find_sources, read_task
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec

DATA = Path(__file__).parents[2] / "shared" / "data"
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


@pytest.fixture
def beir(tmp_path) -> Path:
    folder = tmp_path / "beir"
    jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(DOCS)])
    jsonl(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": t, "city": "ab"[i % 2]} for i, t in enumerate([*QUERIES, "nobody judged me"])],
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


def test_tables_are_read_as_hive_writes_them(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_bytes('id\x01text\x01city\r\n1\x01左\r右\x01\\N\r\n2\x01red\u2028shoe "x\x01\r\n\r\n'.encode())
    assert read_records(path) == [
        {"id": "1", "text": "左\r右", "city": None},
        {"id": "2", "text": 'red\u2028shoe "x', "city": ""},
    ]
    path.write_bytes("id\x01text\n1\x01透明手机壳\n2\x01红鞋\n".encode("gb18030"))
    assert [row["text"] for row in read_records(path)] == ["透明手机壳", "红鞋"]
    path.write_bytes(b"id\x01text\n1\x01a\n2\n")
    with pytest.raises(DataError, match=r"line 3: 1 fields, wanted 2"):
        read_records(path)


def test_an_array_of_json_may_begin_after_white_space(tmp_path):
    path = tmp_path / "queries.json"
    path.write_text('\ufeff\n  [{"text": "a"}]', encoding="utf-8")
    assert read_records(path) == [{"text": "a"}]


def test_a_row_without_id_is_an_error(tmp_path, beir):
    jsonl(tmp_path / "beir" / "corpus.jsonl", [{"_id": "d0", "text": "a"}, {"_id": None, "text": "b"}])
    with pytest.raises(DataError, match=r"no id in column _id of rows 2"):
        task_of(beir)


def task_of(data_path=None, queries=None, corpus=None, *, qrels=None, columns=None, slices=(), trained=(), **more):
    sources = find_sources(*(str(p) if p else None for p in (data_path, queries, corpus, qrels)))
    return read_task(sources, columns or Columns(), slices, set(trained), **more)


# --- reading ------------------------------------------------------------------------------------------------------


def test_beir_folder(beir):
    task = task_of(beir, slices=["city"])
    assert task.query_ids == ["q0", "q1", "q2"] and task.unjudged == 1
    # d4 is the same text as d0, so the two are one document
    assert task.corpus.ids == ["d0", "d1", "d2", "d3", "d5"]
    assert task.relevant == [{0: 2, 3: 0}, {1: 1}, {2: 1, 4: 1}]
    assert query_slices(task)["city"]["a"].tolist() == [True, False, True]


def test_ids_of_the_documents_may_have_a_name_that_the_queries_have_not(tmp_path):
    queries = jsonl(tmp_path / "q.jsonl", [{"_id": "q0", "text": "a"}])
    corpus = jsonl(tmp_path / "c.jsonl", [{"item_id": "7", "text": "x"}, {"item_id": "8", "text": "y"}])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("q0\t8\t1\n")
    task = task_of(None, queries, corpus, qrels=qrels, columns=Columns(id="item_id"))
    assert (task.query_ids, task.corpus.ids, task.relevant) == (["q0"], ["7", "8"], [{1: 1}])


def test_heldout_folder(tmp_path):
    jsonl(tmp_path / "heldout.jsonl", [
        {"anchor": "a", "positive": ["x", "y"]}, {"anchor": "b", "positive": "z"}, {"anchor": "A", "positive": "z"},
    ])  # fmt: skip
    jsonl(tmp_path / "corpus.jsonl", [{"text": t, "seen": t == "z"} for t in "wxyz"])
    task = task_of(tmp_path)
    assert task.queries == ["a", "b"]  # "A" is "a": its answers are shared
    assert (task.unjudged, task.repeated) == (0, 1)
    assert task.relevant == [{1: 1, 2: 1, 3: 1}, {3: 1}]
    assert task.corpus.seen == [False, False, False, True]


@pytest.mark.parametrize(("query_id", "document_id"), [("qid", "doc_id"), ("query_id", "docid"), ("id", "_id")])
def test_usual_names_of_ids_are_found(tmp_path, query_id, document_id):
    queries, corpus = tmp_path / "q.csv", tmp_path / "c.jsonl"
    queries.write_text(f"{query_id},text\n1,shoes\n2,pan\n")
    jsonl(corpus, [{document_id: "2", "text": "steel pan"}, {document_id: "1", "text": "red shoes"}])
    (tmp_path / "qrels.tsv").write_text("1\t1\t1\n2\t2\t1\n")
    task = task_of(None, queries, corpus, qrels=tmp_path / "qrels.tsv")
    assert (task.query_ids, task.relevant) == (["1", "2"], [{1: 1}, {0: 1}])


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


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "txt", "parquet"])
def test_query_files_of_every_kind(tmp_path, kind):
    rows = [{"query": 'a "quoted", one', "positive": "x"}, {"query": "二", "positive": "y"}]
    path = tmp_path / f"q.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("txt", "tsv"):  # nothing is quoted in these
        between = "\x01" if kind == "txt" else "\t"
        path.write_text("".join(between.join(r) + "\n" for r in (["query", "positive"], *(x.values() for x in rows))))
    else:
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["query", "positive"], *(row.values() for row in rows)])
    task = task_of(path)
    assert task.queries == [row["query"] for row in rows]
    assert task.corpus.texts == ["x", "y"]  # the answers are the corpus where none is given


def test_a_quote_swallows_no_rows(tmp_path):
    place = tmp_path / "q.tsv"
    place.write_text('query\tpositive\n"5 inch pan\tx\nb\ty\n"c" d\tz\n')
    assert [row["query"] for row in read_records(place)] == ['"5 inch pan', "b", '"c" d']
    place.write_text('query\tpositive\n"5 inch pan\tx\nb\ty"\n')
    assert [row["query"] for row in read_records(place)] == ['"5 inch pan', "b"]
    place.write_text('query\tpositive\n"two\tparts"\t"x\ny"\nb\ty\n')  # as pandas writes it
    assert [row["query"] for row in read_records(place)] == ["two\tparts", "b"]
    place = tmp_path / "q.csv"
    place.write_text('query,positive\n"two\nlines, 5"" pan",x\nb,y\n')
    assert [row["query"] for row in read_records(place)] == ['two\nlines, 5" pan', "b"]
    place.write_text('query,positive\n"two\nlines",x\n"not closed,y\nc,z\n')
    with pytest.raises(DataError, match=r"q\.csv: line 4: a quote that is not closed"):
        read_records(place)
    place.write_text('query,positive\n"two\nlines",x\nb,y,z\n')
    with pytest.raises(DataError, match=r"q\.csv: line 4: 3 fields, the header has 2"):
        read_records(place)


def test_grades_may_be_written_with_a_point(beir):
    qrels = beir / "q.txt"
    qrels.write_text("q0 d0 1.0\nq1 d1 3.0\n")  # the first line is no header
    assert task_of(beir, qrels=qrels).relevant == [{0: 1}, {1: 3}]
    qrels.write_text("q0 d0 1\nq1 d1 0.5\n")
    with pytest.raises(DataError, match=r"line 2: wanted .* the grade a whole number; found 'q1 d1 0.5'"):
        task_of(beir, qrels=qrels)


def test_trec_qrels_without_header(beir):
    qrels = beir / "q.txt"
    qrels.write_text("q0 0 d0 1\nq1 0 d1 3\n")
    assert task_of(beir, qrels=qrels).relevant == [{0: 1}, {1: 3}]


@pytest.mark.parametrize(("yes", "no"), [(True, False), ("true", "False"), ("1", "0"), (1, 0)])
def test_seen_is_read_as_it_is_written(tmp_path, yes, no):
    jsonl(tmp_path / "heldout.jsonl", [{"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": "y"}])
    # X and x are one document, which training has seen as one of them
    jsonl(tmp_path / "corpus.jsonl", [{"text": t, "seen": flag} for t, flag in (("X", no), ("x", yes), ("y", no))])
    task = task_of(tmp_path)
    assert task.corpus.seen == [True, False]
    assert query_slices(task)["document in training"]["seen"].tolist() == [True, False]


def test_a_column_seen_of_something_else_is_not_used(tmp_path, caplog):
    jsonl(tmp_path / "heldout.jsonl", [{"anchor": "a", "positive": "x"}])
    jsonl(tmp_path / "corpus.jsonl", [{"text": "x", "seen": 17}, {"text": "y", "seen": 0}])
    assert task_of(tmp_path).corpus.seen is None
    assert "column seen is not used: '17' is neither" in caplog.text


def test_all_seen_is_shown_too(beir):
    slices = query_slices(task_of(beir, trained={"warm wool blanket"}))
    assert {name: mask.tolist() for name, mask in slices["document in training"].items()} == {"unseen": [True] * 3}


def test_training_data_tells_seen_from_unseen(beir):
    task = task_of(beir, trained={"red running shoes"})
    assert query_slices(task)["document in training"]["seen"].tolist() == [True, False, False]


BAD = {
    "unknown documents alone": ("qrels/test.tsv", "q0\td77\t1\n", "no judgement is of a known query and document: 1 "),
    "unknown queries alone": ("qrels/test.tsv", "q9\td1\t1\nq8\td1\t1\n", "line 1: query 'q9'; line 2: query 'q8'"),
    "qrels of two columns": ("qrels/test.tsv", "q0\t1\n", "line 1: wanted `query document grade`"),
    "nothing relevant": ("qrels/test.tsv", "q0\td1\t0\n", "no query has a relevant document"),
    "empty corpus": ("corpus.jsonl", "", "holds no rows; an evaluation needs documents"),
    "judged query without text": (
        "queries.jsonl",
        '{"_id": "q0", "text": " "}\n{"_id": "q1", "text": "a"}\n',
        "queries.jsonl: 1 judged queries without text (rows 1)",
    ),
    "no query has text": ("queries.jsonl", '{"_id": "q0", "text": " "}\n', "none of its 1 queries has text"),
    "judgements without grades": ("qrels/test.tsv", "query-id\tcorpus-id\nq0\td0\n", "found query-id, corpus-id"),
    "grade that is not whole": ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0.5\n", "line 2: wanted"),
    "no text column": ("queries.jsonl", '{"_id": "q0", "sentence": "x"}\n', "name it with query_column"),
    "id twice": ("queries.jsonl", '{"_id": "q", "text": "x"}\n{"_id": "q", "text": "y"}\n', "more than once"),
    "document's id twice": ("corpus.jsonl", '{"_id": "q", "text": "x"}\n{"_id": "q", "text": "y"}\n', "(rows 1 and 2)"),
    "all documents blank": ("corpus.jsonl", '{"_id": "d1", "text": " "}\n', "none of its 1 documents has text"),
    "no grade in the first line": ("qrels/test.tsv", "q0\td1\tx\nq1\td1\t1\n", "line 1: wanted `query document grade`"),
    "not JSON": ("corpus.jsonl", "{", "line 1: not a JSON object on one line"),
    "not objects": ("corpus.jsonl", "[1]", "line 1: wanted an object, found int"),
    "half a character in a query": (
        "queries.jsonl",
        '{"_id": "1", "text": "warm"}\n{"_id": "2", "text": "cold \\ud83d"}',
        "line 2: `text` holds half a character",
    ),
    "half a character in a document": (
        "corpus.jsonl",
        '[{"text": "a"},\n{"text": "\\ude00"}]',
        "line 2: `text` holds half",
    ),
    "half a character in an id": ("corpus.jsonl", '{"_id": "\\ud83d", "text": "a"}', "line 1: `_id` holds half"),
    "a key twice": ("corpus.jsonl", '{"_id": "1", "text": "a", "text": "b"}', "line 1: the key `text` is there twice"),
    "a broken array": ("corpus.jsonl", '[{"text": "a"},\n{"text" "b"}]', "line 2: the JSON is broken there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(beir, case):
    name, text, said = BAD[case]
    (beir / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        task_of(beir)


def test_judgements_that_are_not_utf8_are_named(beir):
    (beir / "qrels" / "test.tsv").write_bytes("查询\td1\t1\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"test\.tsv is not UTF-8"):
        task_of(beir)


@pytest.mark.parametrize("reads", [read_records, lambda path: task_of(path.parent / "beir", corpus=path)])
def test_a_parquet_file_that_was_cut_short_is_named(beir, tmp_path, reads):
    place = tmp_path / "c.parquet"
    write_embeddings(place, {"id": ["d0"], "text": ["a"]}, np.eye(1, 4, dtype=np.float32))
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(DataError, match=r"c\.parquet is not a complete Parquet file"):
        reads(place)


def test_damaged_data_of_a_parquet_file_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tmp_path / "q.parquet"
    pq.write_table(pa.table({"text": [f"query {i} {i * i}" for i in range(500)]}), place, compression="snappy")
    whole = bytearray(place.read_bytes())
    whole[60:560] = b"\xff" * 500
    place.write_bytes(whole)
    with pytest.raises(DataError, match=r"q\.parquet"):
        read_records(place)


def test_a_field_of_a_table_may_be_long(tmp_path):
    (tmp_path / "c.csv").write_text(f"id,text\n1,{'ab ' * 70_000}\n")
    assert len(read_records(tmp_path / "c.csv")[0]["text"]) == 210_000


def test_missing_files_are_named(tmp_path, beir):
    with pytest.raises(MissingError, match=r"heldout\.jsonl"):
        task_of(tmp_path)
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    (beir / "qrels" / "train.tsv").write_text(QRELS)
    with pytest.raises(MissingError, match=r"found dev\.tsv, train\.tsv"):
        task_of(beir)
    with pytest.raises(DataError, match="no judgements"):
        task_of(beir / "queries.jsonl")
    with pytest.raises(MissingError, match="give the file that holds them as corpus_path"):
        task_of(beir / "queries.jsonl", qrels=beir / "qrels" / "dev.tsv")


def test_paths_that_are_given_stand_in_for_those_of_a_folder(beir, tmp_path):
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    (beir / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    assert task_of(beir, qrels=beir / "qrels" / "train.tsv").query_ids == ["q1"]  # as the error tells to
    (beir / "corpus.jsonl").rename(tmp_path / "other.jsonl")
    task = task_of(beir, corpus=tmp_path / "other.jsonl", qrels=beir / "qrels" / "dev.tsv")
    assert len(task.queries) == 3
    with pytest.raises(MissingError, match=r"found dev\.tsv, train\.tsv; name it"):
        task_of(beir, corpus=tmp_path / "other.jsonl", qrels=beir / "qrels")


@pytest.mark.parametrize("answer", [5, {"a": "b"}, ["x", 5], True])
def test_an_answer_that_is_no_text_is_named(tmp_path, answer):
    queries = jsonl(tmp_path / "q.jsonl", [{"query": "a", "positive": "x"}, {"query": "b", "positive": answer}])
    with pytest.raises(DataError, match=r"q\.jsonl: row 2: wanted an answer's text or a list of texts, found"):
        task_of(queries)


def test_blank_documents_are_counted(beir, caplog):
    jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate([*DOCS, "", "\u200b"])])
    task_of(beir)
    assert "2 of 8 documents have no text in column text" in caplog.text


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


def test_rows_with_text_and_without_a_vector_are_an_error(tmp_path):
    vectors = np.array([[1, 0], [np.nan, np.nan]], dtype=np.float32)
    write_embeddings(tmp_path / "e.npy", {"id": ["1", "2"], "text": ["a", "b"]}, vectors)
    queries = jsonl(tmp_path / "q.jsonl", [{"query": "c", "positive": "a"}])
    with pytest.raises(DataError, match=r"e\.npy: 1 rows have text and no vector \(NaN\), such as 'b' \(row 1\)"):
        task_of(None, queries, tmp_path / "e.npy")


# --- a query's own document ---------------------------------------------------------------------------------------

PLEAS = ["Uniforms save money.", "Zoos protect animals.", "Tourism brings jobs."]
REBUTTALS = ["Uniforms are dear for the poor.", "Zoos cage wild animals.", "Tourism drives rents up."]


@pytest.fixture
def arguments(tmp_path) -> Path:
    """Queries that are documents: q0 by id and text, q1 by text alone (and written otherwise), q2 by id alone."""
    folder = tmp_path / "arguments"
    own = [("q0", PLEAS[0]), ("p1", f"  {PLEAS[1].upper()} "), ("q2", f"On tourism. {PLEAS[2]}")]
    rows = [*own, *((f"c{i}", text) for i, text in enumerate(REBUTTALS))]
    jsonl(folder / "corpus.jsonl", [{"_id": id_, "text": text} for id_, text in rows])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(PLEAS)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\tc{i}\t1\n" for i in range(3)))
    return folder


@pytest.mark.parametrize(("leave_out_own", "own"), [
    ("text_and_id", [{0}, {1}, {2}]), ("text", [{0}, {1}, set()]), ("none", [set()] * 3),
])  # fmt: skip
def test_a_query_is_neither_its_answer_nor_a_competitor(arguments, caplog, leave_out_own, own):
    with (arguments / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\tq0\t2\nq1\tp1\t1\n")  # two judgements that name the query itself
    with caplog.at_level("INFO", "ebr_lib"):
        task = task_of(arguments, leave_out_own=leave_out_own)
    assert task.own == own
    count, kept = sum(map(len, own)), leave_out_own == "none"
    assert task.relevant == ([{3: 1, 0: 2}, {4: 1, 1: 1}, {5: 1}] if kept else [{3: 1}, {4: 1}, {5: 1}])
    assert task.left_out == ({} if kept else {"own_documents_left_out": count, "own_judgements_left_out": 2})
    assert (f"own documents left out, as answers and as competitors: those of {count} of 3" in caplog.text) != kept
    assert ("judgements that name the query itself are left out: 2" in caplog.text) != kept
    assert ("for their id alone, of another text: 1" in caplog.text) == (leave_out_own == "text_and_id")


def test_a_query_left_without_an_answer_is_counted_and_left_out(arguments):
    (arguments / "qrels" / "test.tsv").write_text("q0\tq0\t1\nq1\tc1\t1\nq1\tq0\t1\n")
    task = task_of(arguments)
    assert (task.query_ids, task.relevant) == (["q1"], [{4: 1, 0: 1}])  # q0's document stays one of others
    assert task.facts()["queries_without_answer_left"] == 1 and task.unjudged == 1
    (arguments / "qrels" / "test.tsv").write_text("q0\tq0\t1\n")
    with pytest.raises(DataError, match=r"no query has a relevant document.*set leave_out_own: none"):
        task_of(arguments)


def test_ids_that_pair_queries_with_their_answers_are_numbered_apart(arguments, caplog):
    (arguments / "qrels" / "test.tsv").write_text("q2\tq2\t1\n")
    task = task_of(arguments)
    assert (task.relevant, task.facts()["answers_of_the_query_id_kept"]) == ([{2: 1}], 1)
    assert "numbered apart: the document of a query's id is its only answer" in caplog.text


def test_a_title_does_not_hide_the_query_s_own_text(arguments):
    rows = [json.loads(line) for line in (arguments / "corpus.jsonl").read_text().splitlines()]
    jsonl(arguments / "corpus.jsonl", [row | {"_id": f"d{i}", "title": f"Title {i}"} for i, row in enumerate(rows)])
    (arguments / "qrels" / "test.tsv").write_text("q0\td3\t1\nq1\td4\t1\nq2\td5\t1\n")
    assert task_of(arguments).own == [{0}, {1}, set()]


def test_answers_given_as_texts_leave_out_the_query(tmp_path):
    rows = [{"query": "red shoe", "positive": ["Red  shoe", "crimson shoe"]}, {"query": "pan", "positive": "red shoe"}]
    task = task_of(jsonl(tmp_path / "q.jsonl", rows))
    assert (task.corpus.texts, task.own) == (["Red  shoe", "crimson shoe"], [{0}, frozenset()])
    assert task.relevant == [{1: 1}, {0: 1}]


def test_own_documents_are_left_out_of_every_ranking(arguments, tiny_bert, tmp_path):
    config = {"models": [str(tiny_bert)], "data_path": str(arguments), "resamples": 100, "examples": 3}
    kept = evaluate_retrieval(config | {"output_dir": str(tmp_path / "kept"), "leave_out_own": "none"})
    assert kept.metrics["tiny-bert"]["hit@1"] == kept.metrics["BM25"]["hit@1"] == 0.0  # each query finds itself
    result = evaluate_retrieval(config | {"output_dir": str(tmp_path / "out")})
    assert result.facts["own_documents_left_out"] == 3 and "own documents left out: 3" in result.report_html.read_text()
    assert result.metrics["BM25"]["hit@1"] == 1.0
    own = {("q0", "q0"), ("q1", "p1"), ("q2", "q2")}
    for name in ("tiny-bert", "BM25"):
        expected = trec_measures(kept, name, own)
        assert {m: result.metrics[name][m] for m in expected} == pytest.approx(expected)


def trec_measures(result, name: str, own: set[tuple[str, str]]) -> dict[str, float]:
    """Means by pytrec_eval of a run from which some (query, document) pairs are taken out."""
    import pytrec_eval

    run: dict[str, dict[str, float]] = {}
    for line in result.runs[name].read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        if (query, document) not in own:
            run.setdefault(query, {})[document] = float(score)
    qrels: dict[str, dict[str, int]] = {}
    for query, _, document, grade in map(str.split, result.qrels.read_text().splitlines()):
        qrels.setdefault(query, {})[document] = int(grade)
    names = {"recall@1": "recall_1", "ndcg@10": "ndcg_cut_10", "map@100": "map_cut_100"}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"recall.1", "ndcg_cut.10", "map_cut.100"}).evaluate(run)
    return {ours: sum(values[theirs] for values in found.values()) / len(qrels) for ours, theirs in names.items()}


# --- judgements of every format -----------------------------------------------------------------------------------

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


@pytest.mark.parametrize("judged", ["qrels/test-{}", "qrels/test/{}", "data/test-{}", "qrels-{}"])
def test_folders_of_parquet_parts(beir, judged):
    """As data sets on Hugging Face are laid out: each table in parts, with or without a folder of its own."""
    import pandas

    qrels = pandas.read_csv(beir / "qrels" / "test.tsv", sep="\t")
    shutil.rmtree(beir / "qrels")
    tables = {judged: qrels}
    for name in ("corpus", "queries"):
        tables[f"{name}/{name}-{{}}"] = pandas.read_json(beir / f"{name}.jsonl", lines=True)
        (beir / f"{name}.jsonl").unlink()
    for name, frame in tables.items():
        for i in range(2):
            place = beir / f"{name.format(f'0000{i}-of-00002')}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            frame[i::2].to_parquet(place)
    task = task_of(beir)
    grades = {
        query: {task.corpus.ids[d]: grade for d, grade in grades.items()}
        for query, grades in zip(task.query_ids, task.relevant, strict=True)
    }
    assert grades == {"q0": {"d0": 2, "d3": 0}, "q1": {"d1": 1}, "q2": {"d2": 1, "d5": 1}}
    place.unlink()  # a part that is not there is no smaller table
    with pytest.raises(MissingError, match=f"{re.escape(place.name)}: there is no such file"):
        task_of(beir, qrels=place.with_name(place.name.replace("00001-", "00000-")))


@pytest.mark.parametrize("ending", ["txt", "parquet", "npy"])
def test_a_folder_of_parts_is_a_corpus_of_texts_or_of_vectors(beir, tmp_path, caplog, ending):
    import pandas

    texts, vectors = tmp_path / "texts", tmp_path / "vectors"
    texts.mkdir(), vectors.mkdir()
    (texts / "_SUCCESS").touch()
    frame = pandas.read_json(beir / "corpus.jsonl", lines=True)
    for i in range(2):
        part = frame[i::2]
        part.to_parquet(texts / f"part-0000{i}-c000.snappy.parquet")
        columns = {name: part[name].tolist() for name in ("_id", "text")}
        write_embeddings(vectors / f"part-0000{i}.{ending}", columns, np.ones((len(part), 4), np.float32))
    with caplog.at_level("INFO", "ebr_lib"):
        of_texts = task_of(beir, corpus=texts)
    assert caplog.text.count("_SUCCESS") == 1
    of_vectors = task_of(beir, corpus=vectors)
    assert of_texts.corpus.vectors is None and of_vectors.corpus.vectors == vectors
    assert of_texts.query_ids == of_vectors.query_ids == ["q0", "q1", "q2"]


def test_rows_within_an_object_are_read_as_in_training(tmp_path):
    (tmp_path / "q.json").write_text('{"data": [{"query": "red shoe", "positive": ["crimson shoe"]}]}')
    assert task_of(tmp_path / "q.json").queries == ["red shoe"]


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


def test_rows_of_one_id_and_one_text_are_one(beir):
    for name in ("queries", "corpus"):
        place = beir / f"{name}.jsonl"
        place.write_text(place.read_text() + place.read_text().splitlines()[0] + "\n")
    task = task_of(beir)
    assert (task.repeated, task.unjudged, len(task.corpus)) == (1, 1, 5)
    assert task.relevant == [{0: 2, 3: 0}, {1: 1}, {2: 1, 4: 1}]


def test_a_folder_may_hold_tables_of_any_kind_and_the_test_split_is_taken(beir, caplog):
    import pandas

    pandas.read_json(beir / "corpus.jsonl", lines=True).to_parquet(beir / "corpus.parquet")
    queries = pandas.read_json(beir / "queries.jsonl", lines=True)
    queries.to_csv(beir / "queries.csv.gz", index=False)
    (beir / "corpus.jsonl").unlink(), (beir / "queries.jsonl").unlink()
    (beir / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    with caplog.at_level("INFO", "ebr_lib"):
        task = task_of(beir)
    assert (task.query_ids, task.corpus.ids) == (["q0", "q1", "q2"], ["d0", "d1", "d2", "d3", "d5"])
    assert re.search(r"judgements: .*test\.tsv \(not train\.tsv\)", caplog.text)


# --- comparing ----------------------------------------------------------------------------------------------------


def test_interval_and_p_by_hand():
    rng = np.random.default_rng(0)
    delta = rng.normal(0.1, 0.3, 400)
    none, shifted = {"m": np.zeros(400), "n": np.zeros(400)}, {"m": delta, "n": rng.permutation([-0.5, 0.5] * 200)}
    m, n = compare("a", "b", none, shifted, resamples=2000, seed=1)
    half = 1.96 * delta.std() / 20
    assert (m.low, m.high) == pytest.approx((delta.mean() - half, delta.mean() + half), abs=0.004)
    assert m.p == pytest.approx(1 / 2001) and n.p > 0.5
    assert compare("a", "b", none, shifted, resamples=2000, seed=1) == [m, n]
    assert compare("a", "b", none, shifted, resamples=2000, seed=2) != [m, n]
    same = compare("a", "b", shifted, shifted, resamples=200, seed=1)[0]
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_permutation_is_exact_in_the_limit():
    # 3 wins of equal size: 2 of 8 sign patterns are as large
    d = compare("a", "b", {"m": np.zeros(3)}, {"m": np.ones(3)}, resamples=20000, seed=0)[0]
    assert d.p == pytest.approx(0.25, abs=0.01)


def test_holm():
    np.testing.assert_allclose(holm_corrected(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_changed_most():
    assert changed_most(np.array([0, 1, 0.5, 0.2]), np.array([1, 0, 0.5, 0.3]), 5) == ([0, 3], [1])


def test_labels():
    assert labels(["a/x", "b/x", "y"]) == ["a/x", "b/x", "y"]
    assert labels(["./m/one/", "two"]) == ["one", "two"]
    assert labels(["m/BM25", "two"], ["BM25"]) == ["m/BM25", "two"]
    assert labels(["BM25"], ["BM25"]) == ["./BM25"]


def test_bm25_tokens_in_both_languages():
    assert bm25_tokens("The RED shoes, of 2024!", frozenset({"the", "of"})) == ["red", "shoes", "2024"]
    assert bm25_tokens("透明手机壳，很快", frozenset()) == ["透明", "手机", "壳", "很快"]


def test_bm25_holds_each_word_once():
    """50 bytes a word are 2 GB for a million documents of 40 words; a text for each word would take 4.6 GB."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}x" for i in range(3000)])
    texts = [" ".join(row) for row in words[rng.integers(0, 3000, (4000, 40))]]
    corpus = Corpus([str(i) for i in range(4000)], texts, {}, {})
    task = RetrievalTask(["q"], [texts[7]], {}, corpus, [{7: 1}], 0)
    rank_with_bm25(replace(task, corpus=replace(corpus, texts=texts[:10])))  # what is loaded on first use
    tracemalloc.start()
    try:
        ranking = rank_with_bm25(task)
        assert tracemalloc.get_traced_memory()[1] < 64 * 4000 * 40
    finally:
        tracemalloc.stop()
    assert ranking.ids[0, 0] == 7


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def result(beir, tiny_models, tmp_path):
    models = [str(tiny_models("bert")), str(tiny_models("xlm-r"))]
    return evaluate_retrieval(
        {"models": models, "data_path": str(beir), "output_dir": str(tmp_path / "out"), "resamples": 100}
    )


def test_contenders_side_by_side(result):
    assert list(result.metrics) == ["tiny-bert", "tiny-xlm-r", "BM25"]
    assert result.metrics["BM25"]["mrr@10"] == 1  # each query shares a word with its document
    pairs = {(d.baseline, d.contender) for d in result.differences}
    assert pairs == {("tiny-bert", "tiny-xlm-r"), ("tiny-bert", "BM25"), ("tiny-xlm-r", "BM25")}
    report = json.loads(result.report_json.read_text())
    assert report["means"] == result.metrics and report["facts"]["queries"] == 3
    assert EvalConfig.resolve({"preset": str(result.report_json.with_name("eval_config.yaml"))}).resamples == 100
    assert "tiny-xlm-r" in (shown := result._repr_html_()) and 'report.html" target' in shown


def test_page_is_whole_offline_and_escaped(result):
    page = result.report_html.read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;pan &amp; lid&lt;/b&gt;" in page
    assert not re.search(r"(src|href|url)\s*[=(]|https?://|@import", page)
    assert 'name="viewport"' in page


def test_on_a_phone_wide_tables_scroll_and_the_page_does_not(browser, tmp_path):
    names = [f"a-contender-with-a-long-name-{i}" for i in range(6)]
    means = {name: {"recall@1": 0.25, "recall@100": 0.5} for name in names}
    difference = Difference(names[0], names[1], "recall@1", 0.25, 0.25, 0.0, -0.1, 0.1, 1.0, 1.0)
    example = Example("一" * 300, 0.0, 1.0, ["w" * 300], [("v" * 300, True)], [])
    duel = Duel(names[0], names[1], "recall@1", [difference], [example], [example])
    slices = [Slice("city", "b" * 100, 3, means)]
    place = tmp_path / "report.html"
    how = {name: {"query prompt": "p" * 99} for name in names}
    report = Report("r", {"queries": 3}, means, [duel], slices, ["recall@1"], {"data": "d" * 99}, how)
    place.write_text(report.html(), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(place.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator(".wide").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && (e.scrollLeft = 999) && e.scrollLeft > 100")
    differences = page.locator(".wide").nth(1)
    assert differences.evaluate("e => e.scrollWidth <= e.clientWidth")
    # the measure's name stays in sight
    assert table.locator("td").first.bounding_box()["x"] == table.bounding_box()["x"]


def test_only_what_holm_s_correction_leaves_is_coloured():
    wins = {"low": 0.01, "high": 0.1, "p": 0.03}  # without correction the interval and p both exclude chance
    chance, sure = (Difference("a", "b", "mrr@10", 0.5, 0.55, 0.05, **wins, p_holm=p) for p in (0.2, 0.049))
    report = Report("r", {}, {"a": {"mrr@10": 0.5}, "b": {"mrr@10": 0.55}}, [], [], [], {}, {})
    pages = [replace(report, duels=[Duel("a", "b", "mrr@10", [d], [], [])]).html() for d in (chance, sure)]
    assert ['class="up"' in page for page in pages] == [False, True]


def test_the_report_says_how_each_model_was_used(beir, tiny_bert, tmp_path):
    config = {"models": [str(tiny_bert)], "data_path": str(beir), "output_dir": str(tmp_path), "resamples": 100}
    config |= {"query_prompt": "find <it>: ", "precision": "float32", "max_seq_length": 32}
    report = evaluate_retrieval(config)
    how = json.loads(report.report_json.read_text())["how"]
    assert how["tiny-bert"] == {
        "query prompt": "find <it>: ", "document prompt": "", "precision": "float32", "backend": "openvino",
        "max_seq_length": 32, "dimensions": 32, "documents": "encoded",
    }  # fmt: skip
    assert how["BM25"] == {"k1": 1.5, "b": 0.75}
    page = report.report_html.read_text()
    assert "query prompt: find &lt;it&gt;: " in page and f"data: {beir}" in page and "date: 20" in page


def test_contenders_that_cannot_be_measured_are_told_before_any_is_ranked(beir, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_lib.evaluate.run.rank_with_model", lambda *_: pytest.fail("ranked"))
    place = tmp_path / "embeds.npy"
    write_embeddings(place, {"id": [f"d{i}" for i in range(len(DOCS))]}, np.eye(len(DOCS), 32, dtype=np.float32))
    config = {"models": [str(tiny_bert), "./no-such", "./nor-this"], "data_path": str(beir), "resamples": 100}
    with pytest.raises(MissingError, match=r"(?s)no-such: .*nor-this: .*no texts for BM25"):
        evaluate_retrieval(config | {"corpus_path": str(place), "output_dir": str(tmp_path / "o")})


def test_a_label_of_no_is_never_an_answer(tmp_path, caplog):
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "q.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{i}", "text": f"doc {i}"}) + "\n" for i in range(4)))
    rows = [{"query": f"ask {i}", "positive": f"doc {i}", "label": i % 2} for i in range(4)]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(None, queries, corpus)
    assert (task.queries, task.relevant) == (["ask 1", "ask 3"], [{1: 1}, {3: 1}])
    assert "rows whose label says no are no answers: 2 of" in caplog.text
    assert len(task_of(None, queries, corpus, columns=Columns(label="none")).queries) == 4
    queries.write_text(json.dumps(rows[1] | {"label": 0.7}))
    with pytest.raises(DataError, match=r"q.jsonl: row 1: `label` is 0.7, neither yes .*set label_column: none"):
        task_of(None, queries, corpus)


def test_models_that_do_not_load_are_told_before_any_is_ranked(beir, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_lib.evaluate.run.rank_with_model", lambda *_: pytest.fail("ranked"))
    other = tmp_path / "empty"
    other.mkdir()
    (other / "config.json").write_text("{}")
    config = {"models": [str(tiny_bert), str(other)], "data_path": str(beir)}
    with pytest.raises(ModelError, match=rf"model {other}"):
        evaluate_retrieval(config | {"output_dir": str(tmp_path / "o")})


def test_ids_and_labels_of_every_script_in_trec_files(tiny_bert, tmp_path, caplog):
    shutil.copytree(tiny_bert, tmp_path / "BM25")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old model.run.trec").write_text("")
    corpus = jsonl(tmp_path / "c.jsonl", [{"_id": "商品 1%", "text": "red"}, {"_id": "商品2", "text": "blue"}])
    queries = jsonl(tmp_path / "q.jsonl", [{"_id": "问/1", "text": "red!"}])
    (tmp_path / "qrels.tsv").write_text("问/1\t商品 1%\t1\n", encoding="utf-8")
    result = evaluate_retrieval({
        "models": [str(tmp_path / "BM25")], "queries_path": str(queries), "corpus_path": str(corpus),
        "qrels_path": str(tmp_path / "qrels.tsv"), "output_dir": str(tmp_path / "out"), "resamples": 100,
    })  # fmt: skip
    assert result.qrels.read_text(encoding="utf-8") == "问/1 0 商品%201%25 1\n"
    assert result.runs["BM25"].read_text(encoding="utf-8").startswith("问/1 Q0 商品%201%25 1 ")
    assert len(result.runs) == 2 and len(set(result.runs.values())) == 2  # a folder called BM25 is not BM25
    assert "runs of an earlier evaluation stand there, too: old model.run.trec" in caplog.text


def test_trec_export_gives_the_same_numbers(result):
    trec = pytest.importorskip("pytrec_eval")
    with open(result.qrels) as file:
        qrels = trec.parse_qrel(file)
    for name, path in result.runs.items():
        with open(path) as file:
            values = trec.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.5"}).evaluate(trec.parse_run(file))
        for ours, theirs in {"ndcg@10": "ndcg_cut_10", "recall@5": "recall_5"}.items():
            mean = np.mean([v[theirs] for v in values.values()])
            assert mean == pytest.approx(result.metrics[name][ours], abs=1e-6)


def test_embedding_file_as_corpus(beir, tiny_bert, tmp_path):
    """Vectors are used for the model that made them; for another, their texts are encoded."""
    model = EncoderSpec(str(tiny_bert))
    place = tmp_path / "embeds.txt"
    vectors = model.encoder("document").encode(DOCS)
    write_embeddings(place, {"id": [f"d{i}" for i in range(len(DOCS))], "description": DOCS}, vectors)
    manifest_path(place).write_text(json.dumps({"model": {"name": "tiny", "sha256": identify(str(tiny_bert)).sha256}}))
    common = {"models": [str(tiny_bert)], "data_path": str(beir), "bm25": False, "resamples": 100}
    common |= {"corpus_path": str(place), "output_dir": str(tmp_path / "out")}
    encoded = evaluate_retrieval(common | {"corpus_path": None}).metrics["tiny-bert"]
    assert evaluate_retrieval(common).metrics["tiny-bert"] == encoded
    # other vectors under the same manifest change the result: it is they that are read
    write_embeddings(place, {"id": [f"d{i}" for i in range(len(DOCS))], "description": DOCS}, vectors[::-1].copy())
    assert evaluate_retrieval(common).metrics["tiny-bert"] != encoded
    manifest_path(place).write_text(json.dumps({"model": {"name": "other", "sha256": "0"}}))
    assert evaluate_retrieval(common).metrics["tiny-bert"] == encoded


@pytest.mark.parametrize("told", [{"document_prompt": "passage: "}, {"max_seq_length": 8}, {"precision": "bfloat16"}])
def test_vectors_made_otherwise_than_told_are_not_used(beir, tiny_bert, tmp_path, told):
    """With stored vectors at hand, what is told changes the ranking as it does without them."""
    place, docs = tmp_path / "embeds.txt", {"id": [f"d{i}" for i in range(len(DOCS))], "description": DOCS}
    settings = {"prompt": "", "max_seq_length": 128, "precision": "float32"}
    made_by = {"model": {"name": "tiny", "sha256": identify(str(tiny_bert)).sha256}, "settings": settings}
    write_embeddings(place, docs, np.eye(len(DOCS), 32, dtype=np.float32))  # none of the model's, so that use shows
    manifest_path(place).write_text(json.dumps(made_by))
    common = {"models": [str(tiny_bert)], "data_path": str(beir), "bm25": False, "resamples": 100}
    common |= {"output_dir": str(tmp_path / "out")}
    stored = common | {"corpus_path": str(place)}

    def run(config):
        return evaluate_retrieval(config).runs["tiny-bert"].read_text()

    assert run(stored) != run(common)
    assert run(stored | told) == run(common | told)
    as_made = {"document_prompt": "", "max_seq_length": 128, "precision": "float32"}
    assert run(stored | as_made) == run(stored | {"precision": "float32"})
    place = tmp_path / "embeds.npy"
    write_embeddings(place, {"id": docs["id"]}, np.eye(len(DOCS), 32, dtype=np.float32))
    manifest_path(place).write_text(json.dumps(made_by))
    with pytest.raises(DataError, match=f"{next(iter(told)).removeprefix('document_')} .* and no texts to encode"):
        evaluate_retrieval(stored | told | {"corpus_path": str(place)})


def items_with_titles(place: Path, model: Path, **settings) -> tuple[Path, Path, Path]:
    """Queries, judgements and an embedding file of titles, whose descriptions are equal and tell nothing."""
    titles = ["red running shoes", "steel frying pan", "warm wool blanket", "green tea"]
    vectors = EncoderSpec(str(model)).encoder("document").encode(titles)
    columns = {"id": list("1234"), "title": titles, "description": ["ships in two days"] * 4}
    write_embeddings(place / "e.txt", columns, vectors)
    made_by = {"model": {"sha256": identify(str(model)).sha256}, "settings": {"description_column": "title"} | settings}
    manifest_path(place / "e.txt").write_text(json.dumps(made_by))
    jsonl(place / "q.jsonl", [{"_id": f"q{i}", "text": f"{title}!"} for i, title in enumerate(titles, 1)])
    (place / "r.tsv").write_text("".join(f"q{i}\t{i}\t1\n" for i in range(1, 5)))
    return place / "q.jsonl", place / "e.txt", place / "r.tsv"


def test_the_documents_are_the_texts_that_were_encoded(tiny_bert, tmp_path):
    queries, corpus, qrels = items_with_titles(tmp_path, tiny_bert)
    config = {"models": [str(tiny_bert)], "resamples": 100, "output_dir": str(tmp_path / "o")}
    config |= {"queries_path": str(queries), "corpus_path": str(corpus), "qrels_path": str(qrels)}
    result = evaluate_retrieval(config)
    assert result.facts["documents"] == 4
    assert result.metrics["tiny-bert"]["recall@1"] == result.metrics["BM25"]["recall@1"] == 1.0


def test_vectors_of_another_column_are_not_used(tiny_bert, tmp_path, caplog):
    queries, corpus, qrels = items_with_titles(tmp_path, tiny_bert)
    config = {"models": [str(tiny_bert)], "resamples": 100, "output_dir": str(tmp_path / "o")}
    config |= {"queries_path": str(queries), "corpus_path": str(corpus), "qrels_path": str(qrels)}
    with caplog.at_level("INFO"):
        result = evaluate_retrieval(config | {"corpus_column": "description"})
    assert "its texts are encoded" in caplog.text and "description_column 'title', not 'description'" in caplog.text
    assert result.facts["documents"] == 1


def test_vectors_of_other_dimensions_are_not_used_and_queries_are_cut_as_the_stored_ones(tiny_bert, tmp_path):
    queries, corpus, qrels = items_with_titles(tmp_path, tiny_bert, dimension=32)
    config = {"models": [str(tiny_bert)], "resamples": 100, "output_dir": str(tmp_path / "o"), "bm25": False}
    config |= {"queries_path": str(queries), "corpus_path": str(corpus), "qrels_path": str(qrels)}
    evaluate_retrieval(config | {"truncate_dim": 8})
    how = json.loads((tmp_path / "o" / "report.json").read_text())["how"]["tiny-bert"]
    assert (how["documents"], how["dimensions"]) == ("encoded", 8)
    cut = EncoderSpec(str(tiny_bert), truncate_dim=8).encoder("document").encode(["a", "b", "c", "d"])
    write_embeddings(corpus, {"id": list("1234"), "title": list("abcd")}, cut)
    made_by = json.loads(manifest_path(corpus).read_text())
    made_by["settings"]["dimension"] = 8
    manifest_path(corpus).write_text(json.dumps(made_by))
    evaluate_retrieval(config)
    how = json.loads((tmp_path / "o" / "report.json").read_text())["how"]["tiny-bert"]
    assert how["documents"] == f"vectors of {corpus}" and how["dimensions"] == 8


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


def test_embedding_file_without_texts(beir, tiny_bert, tmp_path):
    place = tmp_path / "embeds.npy"
    write_embeddings(place, {"id": [f"d{i}" for i in range(len(DOCS))]}, np.eye(len(DOCS), 32, dtype=np.float32))
    manifest_path(place).write_text(json.dumps({"model": {"name": "other", "sha256": "0"}}))
    common = {"models": [str(tiny_bert)], "data_path": str(beir), "bm25": False, "resamples": 100}
    common |= {"corpus_path": str(place), "output_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match=r"made by model other\) and no texts"):
        evaluate_retrieval(common)
    with pytest.raises(DataError, match="no texts for BM25"):
        evaluate_retrieval(common | {"models": [], "bm25": True})
    manifest_path(place).unlink()
    assert evaluate_retrieval(common).facts["documents"] == len(DOCS)
    write_embeddings(place, {"id": [f"d{i}" for i in range(len(DOCS))]}, np.eye(len(DOCS), 8, dtype=np.float32))
    with pytest.raises(ValueError, match="8 dimensions, the queries' have 32"):
        evaluate_retrieval(common)


def test_bm25_finds_nothing_where_no_document_has_a_word(beir, tmp_path):
    jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": "…" * i} for i in range(6)])
    result = evaluate_retrieval({"models": [], "data_path": str(beir), "output_dir": str(tmp_path), "resamples": 100})
    assert set(result.metrics["BM25"].values()) == {0}


def test_an_output_folder_that_cannot_be_is_told(beir):
    with pytest.raises(ConfigError, match=r"corpus\.jsonl cannot be made"):
        evaluate_retrieval({"models": [], "data_path": str(beir), "output_dir": str(beir / "corpus.jsonl")})


def test_columns_can_be_named(tmp_path):
    rows = [
        {"sku": "a", "id": "1", "text": "no", "words": "shoes"},
        {"sku": "b", "id": "2", "text": "no", "words": "pan"},
    ]
    corpus = jsonl(tmp_path / "c.jsonl", [{"sku": f"d{r['id']}", "text": "same", "body": r["words"]} for r in rows])
    (tmp_path / "qrels.tsv").write_text("a\td1\t1\nb\td2\t1\n")
    queries = jsonl(tmp_path / "q.jsonl", rows)
    columns = Columns(query="words", corpus="body", id="sku")
    task = task_of(None, queries, corpus, qrels=tmp_path / "qrels.tsv", columns=columns, leave_out_own="none")
    assert task.queries == task.corpus.texts == ["shoes", "pan"] and task.query_ids == ["a", "b"]
    with pytest.raises(DataError, match="no column nowhere; its columns are sku"):
        task_of(None, queries, corpus, qrels=tmp_path / "qrels.tsv", columns=Columns(query="nowhere", id="sku"))
    with pytest.raises(DataError, match="no column mood"):
        task_of(None, queries, corpus, qrels=tmp_path / "qrels.tsv", columns=columns, slices=["mood"])


def test_report_knobs_bite(beir, tiny_bert, tmp_path):
    base = {"models": [str(tiny_bert)], "data_path": str(beir), "resamples": 100, "output_dir": str(tmp_path / "o")}
    base |= {"truncate_dim": 1}  # a model bad enough to lose against BM25

    def report(**knobs):
        return json.loads(evaluate_retrieval(base | knobs).report_json.read_text())

    plain = report(slice_columns=["city"])
    assert {part["kind"] for part in plain["slices"]} >= {"city", "language"}
    duel = plain["duels"][0]
    assert duel["won"] or duel["lost"]
    none = report(examples=0, seed=7)
    assert not (none["duels"][0]["won"] or none["duels"][0]["lost"])
    assert "city" not in {part["kind"] for part in none["slices"]}
    assert [d["low"] for d in duel["differences"]] != [d["low"] for d in none["duels"][0]["differences"]]
    other = report(resamples=3000)
    assert [d["p"] for d in duel["differences"]] != [d["p"] for d in other["duels"][0]["differences"]]


def test_modelling_code_runs_only_when_allowed(beir, tiny_models, tmp_path):
    config = {"models": [str(tiny_models("kalm"))], "data_path": str(beir), "bm25": False, "resamples": 100}
    config |= {"output_dir": str(tmp_path / "o")}
    with pytest.raises(ModelError, match="trust_remote_code"):
        evaluate_retrieval(config)
    assert evaluate_retrieval(config | {"trust_remote_code": True, "device": "cpu", "precision": "float32"}).metrics


def test_leakage_is_reported(beir, tmp_path, caplog):
    train = jsonl(tmp_path / "train.jsonl", [{"anchor": "Shoes for  running", "positive": "透明手机壳"}])
    config = {"models": [], "data_path": str(beir), "train_data_path": str(train), "resamples": 100}
    assert evaluate_retrieval(config | {"output_dir": str(tmp_path / "o")}).facts["queries_in_training"] == 1
    jsonl(tmp_path / "train.jsonl", [{"anchor": "透明手机壳", "positive": "Shoes for  running"}])  # the other column
    assert evaluate_retrieval(config | {"output_dir": str(tmp_path / "o")}).facts["queries_in_training"] == 1


def test_prompts_bite(beir, tiny_bert, tmp_path):
    base = {
        "models": [str(tiny_bert)],
        "data_path": str(beir),
        "bm25": False,
        "resamples": 100,
        "output_dir": str(tmp_path),
    }

    def scores(**knobs):
        return (evaluate_retrieval(base | knobs).runs["tiny-bert"]).read_text()

    plain = scores()
    for knobs in (
        {"query_prompt": "query: "},
        {"document_prompt": "passage: "},
        {"max_seq_length": 8},
        {"truncate_dim": 4},
    ):
        assert scores(**knobs) != plain, knobs


def test_command_line(beir, tmp_path, capsys):
    assert (
        main(["evaluate", "--models", "--data_path", str(beir), "--output_dir", str(tmp_path / "o"), "--ks", "1,5"])
        == 0
    )
    assert "hit@5" in capsys.readouterr().out
    assert main(["evaluate", "--models", "--bm25", "false", "--data_path", str(beir)]) == 2
    assert "nothing to measure" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_cranfield_equals_the_library_on_the_same_vectors():
    """sentence-transformers' own evaluator and ours, on one set of vectors: those of latent semantic analysis."""
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    from ebr_lib.metrics import evaluate_vectors

    docs = [json.loads(line) for line in (DATA / "cranfield" / "docs.jsonl").open()]
    queries = [json.loads(line) for line in (DATA / "cranfield" / "queries.jsonl").open()]
    texts = list({row["text"]: None for row in docs + queries})
    semantic = TruncatedSVD(64, random_state=0).fit_transform(TfidfVectorizer().fit_transform(texts))
    vectors = dict(zip(texts, semantic.astype(np.float32), strict=True))

    class Fixed:
        model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_, **__: None)

        def encode_query(self, texts, **_):
            return torch.from_numpy(np.stack([vectors[text] for text in texts]))

        encode_document = encode_query

    relevant: dict[str, set[str]] = {}
    for line in (DATA / "cranfield" / "qrels.tsv").open():
        query, document, _ = line.split()
        relevant.setdefault(query, set()).add(document)
    place = {row["id"]: i for i, row in enumerate(docs)}
    evaluator = InformationRetrievalEvaluator(
        {q["id"]: q["text"] for q in queries}, {d["id"]: d["text"] for d in docs}, relevant,
        precision_recall_at_k=[1, 5, 10, 50, 100], accuracy_at_k=[1, 5, 10, 50, 100], main_score_function="dot",
        score_functions={"dot": lambda a, b: a @ b.T}, write_csv=False,
    )  # fmt: skip
    theirs = evaluator(Fixed())
    ours = evaluate_vectors(
        np.stack([vectors[q["text"]] for q in queries]),
        np.stack([vectors[d["text"]] for d in docs]),
        [{place[d]: 1 for d in relevant[q["id"]]} for q in queries],
    )
    for k in (1, 5, 10, 50, 100):
        assert ours[f"recall@{k}"].mean() == pytest.approx(theirs[f"dot_recall@{k}"], abs=1e-6)
        assert ours[f"hit@{k}"].mean() == pytest.approx(theirs[f"dot_accuracy@{k}"], abs=1e-6)
    for name in ("mrr@10", "ndcg@10", "map@100"):
        assert ours[name].mean() == pytest.approx(theirs[f"dot_{name}"], abs=1e-6)
