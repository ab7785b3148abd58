"""Tasks of every layout are read."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.data.queries import read_records
from ebr_lib.errors import DataError, MissingError
from ebr_lib.evaluate.corpus import Columns
from ebr_lib.evaluate.queries import query_slices
from tests.evaluate.tasks import DOCS, QRELS, jsonl, task_of


def test_a_row_without_id_is_refused(tmp_path, beir):
    jsonl(tmp_path / "beir" / "corpus.jsonl", [{"_id": "d0", "text": "a"}, {"_id": None, "text": "b"}])
    with pytest.raises(DataError, match=r"no id in column _id of rows 2"):
        task_of(beir)


def test_beir_folder(beir):
    task = task_of(beir, slices=["city"])
    assert task.query_ids == ["q0", "q1", "q2"] and task.unjudged == 1
    # d4 is the same text as d0, so the two are one document
    assert task.corpus.ids == ["d0", "d1", "d2", "d3", "d5"]
    assert task.relevant == [{0: 2, 3: 0}, {1: 1}, {2: 1, 4: 1}]
    assert list(query_slices(task)["city"]) == ["a", "b", "a"]


def test_id_column_of_the_documents_may_be_missing_in_the_queries(tmp_path):
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


@pytest.mark.parametrize(("yes", "no"), [(True, False), ("true", "False"), ("1", "0"), (1, 0)])
def test_seen_column_takes_true_false_1_and_0(tmp_path, yes, no):
    jsonl(tmp_path / "heldout.jsonl", [{"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": "y"}])
    # X and x are one document, which training has seen as one of them
    jsonl(tmp_path / "corpus.jsonl", [{"text": t, "seen": flag} for t, flag in (("X", no), ("x", yes), ("y", no))])
    task = task_of(tmp_path)
    assert task.corpus.seen == [True, False]
    assert list(query_slices(task)["document in training"]) == ["seen", "unseen"]


def test_seen_column_with_other_values_is_ignored_with_a_warning(tmp_path, caplog):
    jsonl(tmp_path / "heldout.jsonl", [{"anchor": "a", "positive": "x"}])
    jsonl(tmp_path / "corpus.jsonl", [{"text": "x", "seen": 17}, {"text": "y", "seen": 0}])
    assert task_of(tmp_path).corpus.seen is None
    assert "column seen is not used: '17' is neither" in caplog.text


def test_slice_by_training_is_shown_with_a_single_group(beir):
    slices = query_slices(task_of(beir, trained={"warm wool blanket"}))
    assert list(slices["document in training"]) == ["unseen"] * 3


def test_training_data_marks_documents_as_seen(beir):
    task = task_of(beir, trained={"red running shoes"})
    assert list(query_slices(task)["document in training"]) == ["seen", "unseen", "unseen"]


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
def test_error_names_the_bad_input(beir, case):
    name, text, said = BAD[case]
    (beir / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        task_of(beir)


@pytest.mark.parametrize("reads", [read_records, lambda path: task_of(path.parent / "beir", corpus=path)])
def test_error_names_a_truncated_parquet_file(beir, tmp_path, reads):
    place = tmp_path / "c.parquet"
    write_embeddings(place, {"id": ["d0"], "text": ["a"]}, np.eye(1, 4, dtype=np.float32))
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(DataError, match=r"c\.parquet is not a complete Parquet file"):
        reads(place)


def test_error_names_missing_files(tmp_path, beir):
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


def test_given_paths_replace_those_of_a_folder(beir, tmp_path):
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    (beir / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    assert task_of(beir, qrels=beir / "qrels" / "train.tsv").query_ids == ["q1"]  # as the error advises
    (beir / "corpus.jsonl").rename(tmp_path / "other.jsonl")
    task = task_of(beir, corpus=tmp_path / "other.jsonl", qrels=beir / "qrels" / "dev.tsv")
    assert len(task.queries) == 3
    with pytest.raises(MissingError, match=r"found dev\.tsv, train\.tsv; name it"):
        task_of(beir, corpus=tmp_path / "other.jsonl", qrels=beir / "qrels")


def test_blank_documents_are_counted(beir, caplog):
    jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate([*DOCS, "", "\u200b"])])
    task_of(beir)
    assert "2 of 8 documents have no text in column text" in caplog.text


def test_rows_with_text_but_no_vector_are_refused(tmp_path):
    vectors = np.array([[1, 0], [np.nan, np.nan]], dtype=np.float32)
    write_embeddings(tmp_path / "e.npy", {"id": ["1", "2"], "text": ["a", "b"]}, vectors)
    queries = jsonl(tmp_path / "q.jsonl", [{"query": "c", "positive": "a"}])
    with pytest.raises(DataError, match=r"e\.npy: 1 rows have text and no vector \(NaN\), such as 'b' \(row 1\)"):
        task_of(None, queries, tmp_path / "e.npy")


def test_without_texts_each_row_is_a_document_of_which_nobody_knows_whether_training_saw_it(tmp_path):
    write_embeddings(tmp_path / "e.npy", {"id": ["sku-A", "sku-a"]}, np.eye(2, dtype=np.float32))
    queries = jsonl(tmp_path / "q.jsonl", [{"_id": "q", "text": "red"}])
    (tmp_path / "r.tsv").write_text("q\tsku-a\t1\n")
    task = task_of(None, queries, tmp_path / "e.npy", qrels=tmp_path / "r.tsv", trained={"red"})
    assert (task.corpus.ids, task.relevant, task.corpus.seen) == (["sku-A", "sku-a"], [{1: 1}], None)


def test_error_names_rows_of_the_file_though_blank_ones_are_left_out(beir):
    jsonl(beir / "corpus.jsonl", [{"_id": "b", "text": ""}, {"_id": "d", "text": "x"}, {"_id": "d", "text": "y"}])
    with pytest.raises(DataError, match=r"\(rows 2 and 3\)"):
        task_of(beir)


@pytest.mark.parametrize(("leave_out_own", "own"), [
    ("text_and_id", [{0}, {1}, {2}]), ("text", [{0}, {1}, set()]), ("none", [set()] * 3),
])  # fmt: skip
def test_own_documents_are_neither_answers_nor_retrieved(arguments, caplog, leave_out_own, own):
    with (arguments / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\tq0\t2\nq1\tp1\t1\n")  # two judgements that name the query itself
    with caplog.at_level("INFO", "ebr_lib"):
        task = task_of(arguments, leave_out_own=leave_out_own)
    assert task.own == own
    count, kept = sum(map(len, own)), leave_out_own == "none"
    assert task.relevant == ([{3: 1, 0: 2}, {4: 1, 1: 1}, {5: 1}] if kept else [{3: 1}, {4: 1}, {5: 1}])
    assert task.left_out == ({} if kept else {"own_documents_left_out": count, "own_judgements_left_out": 2})
    assert (f"own documents are neither answers nor retrieved: those of {count} of 3" in caplog.text) != kept
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
    assert "numbered apart: the document with a query's id, of another text, is its only answer" in caplog.text


def test_own_document_is_found_by_its_text_without_the_title(arguments):
    rows = [json.loads(line) for line in (arguments / "corpus.jsonl").read_text().splitlines()]
    jsonl(arguments / "corpus.jsonl", [row | {"_id": f"d{i}", "title": f"Title {i}"} for i, row in enumerate(rows)])
    (arguments / "qrels" / "test.tsv").write_text("q0\td3\t1\nq1\td4\t1\nq2\td5\t1\n")
    assert task_of(arguments).own == [{0}, {1}, set()]


def test_answer_equal_to_the_query_is_left_out(tmp_path):
    rows = [{"query": "red shoe", "positive": ["Red  shoe", "crimson shoe"]}, {"query": "pan", "positive": "red shoe"}]
    task = task_of(jsonl(tmp_path / "q.jsonl", rows))
    assert (task.corpus.texts, task.own) == (["Red  shoe", "crimson shoe"], [{0}, frozenset()])
    assert task.relevant == [{1: 1}, {0: 1}]


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
    place.unlink()  # a missing part does not make a smaller table
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


def test_json_rows_inside_an_object_are_read(tmp_path):
    (tmp_path / "q.json").write_text('{"data": [{"query": "red shoe", "positive": ["crimson shoe"]}]}')
    assert task_of(tmp_path / "q.json").queries == ["red shoe"]


def test_rows_repeated_with_equal_id_and_text_count_once(beir):
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
