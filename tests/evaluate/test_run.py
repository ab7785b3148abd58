"""The evaluation stage, from data to report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ebr_lib.cli import main
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec
from tests.evaluate.tasks import DOCS, jsonl

IDS = [f"d{i}" for i in range(len(DOCS))]


@pytest.fixture
def evaluate(tmp_path):
    """The stage with models, without BM25 unless asked for or alone; paths may be Paths."""

    def run(*models: Path, **knobs):
        knobs = {"bm25": not models, "resamples": 100, "backend": "torch", "output_dir": tmp_path / "out"} | knobs
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in knobs.items()}
        return evaluate_retrieval(plain | {"models": [str(model) for model in models]})

    return run


@pytest.fixture(scope="module")
def result(module_beir, tiny_models):
    return evaluate_retrieval({
        "models": [str(tiny_models("bert")), str(tiny_models("xlm-r"))], "data_path": str(module_beir),
        "output_dir": str(module_beir.with_name("out")), "resamples": 100, "backend": "torch",
    })  # fmt: skip


def test_result_compares_all_rankers(result):
    models = ["tiny-bert", "tiny-xlm-r"]
    steps = [f"{name} + BM25 ({how})" for name in models for how in ("RRF", "weighted")]
    assert list(result.metrics) == [*models, "BM25", *steps]
    assert result.metrics["BM25"]["mrr@10"] == 1  # each query shares a word with its document
    pairs = {(d.baseline, d.contender) for d in result.differences}
    alone = {("tiny-bert", "tiny-xlm-r"), ("BM25", "tiny-bert"), ("BM25", "tiny-xlm-r")}
    assert pairs == alone | {(name.split(" + ")[0], name) for name in steps}
    assert list(result.verdicts) == ["tiny-xlm-r 对 against tiny-bert"]  # BM25 is a floor, not a contender
    report = json.loads(result.report_json.read_text())
    assert report["means"] == result.metrics and report["facts"]["queries"] == 3
    assert EvalConfig.resolve({"preset": str(result.report_json.with_name("eval_config.yaml"))}).resamples == 100
    assert "tiny-xlm-r" in (shown := result._repr_html_()) and 'report.html" target' in shown


def test_tables_have_means_and_differences(result):
    measures, differences = result.tables["measures"], result.tables["differences"]
    names = measures["指标 metric"].tolist()
    assert names[0] == "ndcg@10" and {"recall@1", "map@100"} < set(names) < set(result.metrics["BM25"])
    assert measures["BM25"].tolist() == [result.metrics["BM25"][name] for name in names]
    assert measures.columns.tolist() == [
        "指标 metric", "tiny-bert", "tiny-xlm-r", "tiny-xlm-r: difference [95 %]", "BM25",
    ]  # fmt: skip
    assert differences["p_holm"].tolist() == [d.p_holm for d in result.differences]
    d = result.differences[0]
    assert (d.baseline, d.contender, d.metric) == ("tiny-bert", "tiny-xlm-r", "ndcg@10")
    assert measures.iloc[0, 3].startswith(f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]")
    assert d.won + d.lost + d.equal == result.facts["queries"]


def test_queries_csv_has_a_row_per_query_that_excel_reads(result):
    assert result.queries_csv.read_bytes().startswith(b"\xef\xbb\xbf")  # without it Excel misreads Chinese
    table = pd.read_csv(result.queries_csv)
    assert table["query_id"].tolist() == ["q0", "q1", "q2"] and table["answers"].tolist() == ["d0", "d1", "d2 | d5"]
    assert table["BM25: ndcg@10"].mean() == pytest.approx(result.metrics["BM25"]["ndcg@10"])
    assert table["BM25: first answer at"].tolist() == [1, 1, 1]
    run = [line.split() for line in result.runs["tiny-bert"].read_text().splitlines()]
    assert table["tiny-bert: top document"].tolist() == [line[2] for line in run if line[3] == "1"]


def test_page_needs_no_network_and_escapes_texts(result):
    page = result.report_html.read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;pan &amp; lid&lt;/b&gt;" in page
    assert not re.search(r"(src|href|url)\s*[=(]|https?://|@import", page)
    assert 'name="viewport"' in page


def test_report_has_each_ranker_s_settings(beir, evaluate, tiny_bert, openvino):
    settings = {"query_prompt": "find <it>: ", "precision": "float32", "max_seq_length": 32, "backend": "auto"}
    report = evaluate(tiny_bert, bm25=True, data_path=beir, **settings)
    how = json.loads(report.report_json.read_text())["how"]
    assert how["tiny-bert"] == {
        "query prompt": "find <it>: ", "document prompt": "", "precision": "float32", "backend": "openvino",
        "max_seq_length": 32, "dimensions": 32, "unknown tokens": "0.0%", "documents": "encoded",
    }  # fmt: skip
    assert how["BM25"].pop("milliseconds per query") > 0
    assert how["BM25"] == {"k1": 1.5, "b": 0.75}
    page = report.report_html.read_text()
    assert "query prompt: find &lt;it&gt;: " in page and f"data: {beir}" in page and "date: 20" in page


def test_all_rankers_that_cannot_be_measured_are_reported_before_ranking(
    beir, evaluate, tiny_bert, tmp_path, monkeypatch
):
    monkeypatch.setattr("ebr_lib.evaluate.run.rank_with_model", lambda *_: pytest.fail("ranked"))
    place = tmp_path / "embeds.npy"
    write_embeddings(place, {"id": IDS}, np.eye(len(DOCS), 32, dtype=np.float32))
    with pytest.raises(MissingError, match=r"(?s)no-such: .*nor-this: .*no texts for BM25"):
        evaluate(tiny_bert, "./no-such", "./nor-this", bm25=True, data_path=beir, corpus_path=place)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"model {tmp_path / 'empty'}"):
        evaluate(tiny_bert, tmp_path / "empty", data_path=beir)


def test_trec_files_take_ids_with_blanks_and_any_script(evaluate, tiny_bert, tmp_path, caplog):
    shutil.copytree(tiny_bert, tmp_path / "BM25")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old model.run.trec").write_text("")
    corpus = jsonl(tmp_path / "c.jsonl", [{"_id": "商品 1%", "text": "red"}, {"_id": "商品2", "text": "blue"}])
    queries = jsonl(tmp_path / "q.jsonl", [{"_id": "问/1", "text": "red!"}])
    (tmp_path / "qrels.tsv").write_text("问/1\t商品 1%\t1\n", encoding="utf-8")
    paths = {"queries_path": queries, "corpus_path": corpus, "qrels_path": tmp_path / "qrels.tsv"}
    result = evaluate(tmp_path / "BM25", bm25=True, **paths)
    assert result.qrels.read_text(encoding="utf-8") == "问/1 0 商品%201%25 1\n"
    assert result.runs["BM25"].read_text(encoding="utf-8").startswith("问/1 Q0 商品%201%25 1 ")
    assert len(result.runs) == 4 and len(set(result.runs.values())) == 4  # a folder called BM25 is not BM25
    assert "runs of an earlier evaluation: old model.run.trec" in caplog.text


def test_pytrec_eval_gets_the_same_values_from_the_trec_files(result):
    for name in result.runs:
        expected = trec_measures(result, name)
        assert {m: result.metrics[name][m] for m in expected} == pytest.approx(expected, abs=1e-6)


def trec_measures(result, name: str, own: frozenset[tuple[str, str]] = frozenset()) -> dict[str, float]:
    """Means by pytrec_eval of a run from which some (query, document) pairs are taken out."""
    trec = pytest.importorskip("pytrec_eval")
    with open(result.qrels) as qrels, open(result.runs[name]) as run:
        judged, found = trec.parse_qrel(qrels), trec.parse_run(run)
    found = {q: {d: score for d, score in docs.items() if (q, d) not in own} for q, docs in found.items()}
    names = {"recall@1": "recall_1", "recall@5": "recall_5", "ndcg@10": "ndcg_cut_10", "map@100": "map_cut_100"}
    values = trec.RelevanceEvaluator(judged, {"recall.1,5", "ndcg_cut.10", "map_cut.100"}).evaluate(found)
    return {ours: sum(v[theirs] for v in values.values()) / len(judged) for ours, theirs in names.items()}


def test_own_documents_are_left_out_of_every_ranking(arguments, evaluate, tiny_bert, tmp_path):
    knobs = {"bm25": True, "data_path": arguments, "examples": 3}
    kept = evaluate(tiny_bert, **knobs, output_dir=tmp_path / "kept", leave_out_own="none")
    assert kept.metrics["tiny-bert"]["hit@1"] == kept.metrics["BM25"]["hit@1"] == 0.0  # each query finds itself
    result = evaluate(tiny_bert, **knobs)
    assert result.facts["own_documents_left_out"] == 3 and "own documents left out: 3" in result.report_html.read_text()
    assert result.metrics["BM25"]["hit@1"] == 1.0
    own = frozenset({("q0", "q0"), ("q1", "p1"), ("q2", "q2")})
    for name in ("tiny-bert", "BM25"):
        expected = trec_measures(kept, name, own)
        assert {m: result.metrics[name][m] for m in expected} == pytest.approx(expected)


# --- stored vectors -----------------------------------------------------------------------------------------------


def test_stored_vectors_are_used_only_for_the_model_that_made_them(beir, evaluate, tiny_bert, tmp_path):
    place, columns = tmp_path / "embeds.txt", {"id": IDS, "description": DOCS}
    vectors = EncoderSpec(str(tiny_bert), backend="torch").encoder("document").encode(DOCS)

    def metrics(**knobs):
        return evaluate(tiny_bert, data_path=beir, **knobs).metrics["tiny-bert"]

    write_embeddings(place, columns, vectors)
    manifest_path(place).write_text(json.dumps({"model": {"name": "tiny", "sha256": identify(str(tiny_bert)).sha256}}))
    encoded = metrics()
    assert metrics(corpus_path=place) == encoded
    # other vectors under the same manifest change the result, so the stored ones were read
    write_embeddings(place, columns, vectors[::-1].copy())
    assert metrics(corpus_path=place) != encoded
    manifest_path(place).write_text(json.dumps({"model": {"name": "other", "sha256": "0"}}))
    assert metrics(corpus_path=place) == encoded


@pytest.fixture
def titles(tiny_bert, tmp_path) -> dict[str, Path]:
    """Paths of queries, judgements and an embedding file of titles, whose descriptions are all equal."""
    titles = ["red running shoes", "steel frying pan", "warm wool blanket", "green tea"]
    vectors = EncoderSpec(str(tiny_bert), backend="torch").encoder("document").encode(titles)
    columns = {"id": list("1234"), "title": titles, "description": ["ships in two days"] * 4}
    write_embeddings(tmp_path / "e.txt", columns, vectors)
    settings = {"description_column": "title", "dimension": 32}
    made_by = {"model": {"sha256": identify(str(tiny_bert)).sha256}, "settings": settings}
    manifest_path(tmp_path / "e.txt").write_text(json.dumps(made_by))
    jsonl(tmp_path / "q.jsonl", [{"_id": f"q{i}", "text": f"{title}!"} for i, title in enumerate(titles, 1)])
    (tmp_path / "r.tsv").write_text("".join(f"q{i}\t{i}\t1\n" for i in range(1, 5)))
    return {"queries_path": tmp_path / "q.jsonl", "corpus_path": tmp_path / "e.txt", "qrels_path": tmp_path / "r.tsv"}


def test_documents_are_the_column_that_was_encoded(evaluate, titles, tiny_bert, caplog):
    result = evaluate(tiny_bert, bm25=True, **titles)
    assert result.facts["documents"] == 4
    assert result.metrics["tiny-bert"]["recall@1"] == result.metrics["BM25"]["recall@1"] == 1.0
    with caplog.at_level("INFO"):
        result = evaluate(tiny_bert, **titles, corpus_column="description")
    assert "its texts are encoded" in caplog.text and "description_column 'title', not 'description'" in caplog.text
    assert result.facts["documents"] == 1


def test_truncate_dim_must_match_stored_vectors_and_queries_are_cut_like_them(evaluate, titles, tiny_bert):
    def how(**knobs):
        result = evaluate(tiny_bert, **titles, **knobs)
        return json.loads(result.report_json.read_text())["how"]["tiny-bert"]

    encoded = how(truncate_dim=8)
    assert (encoded["documents"], encoded["dimensions"]) == ("encoded", 8)
    corpus = titles["corpus_path"]
    cut = EncoderSpec(str(tiny_bert), truncate_dim=8, backend="torch").encoder("document").encode(list("abcd"))
    write_embeddings(corpus, {"id": list("1234"), "title": list("abcd")}, cut)
    manifest_path(corpus).write_text(manifest_path(corpus).read_text().replace('"dimension": 32', '"dimension": 8'))
    assert (how()["documents"], how()["dimensions"]) == (f"vectors of {corpus}", 8)


def test_embedding_file_without_texts(beir, evaluate, tiny_bert, tmp_path):
    place = tmp_path / "embeds.npy"
    write_embeddings(place, {"id": IDS}, np.eye(len(DOCS), 32, dtype=np.float32))
    manifest_path(place).write_text(json.dumps({"model": {"name": "other", "sha256": "0"}}))
    with pytest.raises(DataError, match=r"made by model other\) and no texts"):
        evaluate(tiny_bert, data_path=beir, corpus_path=place)
    with pytest.raises(DataError, match="no texts for BM25"):
        evaluate(data_path=beir, corpus_path=place)
    manifest_path(place).unlink()
    assert evaluate(tiny_bert, data_path=beir, corpus_path=place).facts["documents"] == len(DOCS)
    write_embeddings(place, {"id": IDS}, np.eye(len(DOCS), 8, dtype=np.float32))
    with pytest.raises(ConfigError, match="8 dimensions, the queries' have 32"):
        evaluate(tiny_bert, data_path=beir, corpus_path=place)


# --- knobs --------------------------------------------------------------------------------------------------------


def test_bm25_finds_nothing_if_no_document_has_words(beir, evaluate):
    jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": "…" * i} for i in range(6)])
    assert set(evaluate(data_path=beir).metrics["BM25"].values()) == {0}


def test_error_names_an_output_folder_that_cannot_be_made(beir, evaluate):
    with pytest.raises(ConfigError, match=r"corpus\.jsonl cannot be made"):
        evaluate(data_path=beir, output_dir=beir / "corpus.jsonl")


def test_report_knobs_take_effect(beir, evaluate, tiny_bert):
    def report(**knobs):
        # one dimension: a model bad enough to lose against BM25
        result = evaluate(tiny_bert, bm25=True, fusion=False, data_path=beir, truncate_dim=1, **knobs)
        return json.loads(result.report_json.read_text())

    plain, none, other = report(slice_columns=["city"]), report(examples=0, seed=7), report(resamples=3000)
    assert {part["kind"] for part in plain["slices"]} >= {"city", "language"}
    assert "city" not in {part["kind"] for part in none["slices"]}
    (duel,), (without,), (more,) = plain["duels"], none["duels"], other["duels"]
    assert duel["baseline"] == "BM25"
    assert (duel["won"] or duel["lost"]) and not (without["won"] or without["lost"])
    assert [d["low"] for d in duel["differences"]] != [d["low"] for d in without["differences"]]
    assert [d["p"] for d in duel["differences"]] != [d["p"] for d in more["differences"]]


def test_another_measure_may_decide(beir, evaluate, tiny_models):
    models = (tiny_models("bert"), tiny_models("xlm-r"))
    result = evaluate(*models, data_path=beir, primary_metric="recall@5")
    assert result.differences[0].metric == "recall@5"
    (verdict,) = result.verdicts.values()
    assert "recall@5" in verdict.sentence and "only 3 queries" in verdict.notes[-1]
    with pytest.raises(ConfigError, match="recall@5 is not measured; add 5 to ks"):
        evaluate(*models, data_path=beir, primary_metric="recall@5", ks=[1])


def test_one_model_is_judged_against_bm25(beir, evaluate, tiny_bert):
    ((pair, verdict),) = evaluate(tiny_bert, bm25=True, data_path=beir, truncate_dim=1).verdicts.items()
    assert pair == "tiny-bert 对 against BM25" and not any("below BM25" in note for note in verdict.notes)


def test_modelling_code_runs_only_when_allowed(beir, evaluate, tiny_models):
    with pytest.raises(ModelError, match="trust_remote_code"):
        evaluate(tiny_models("kalm"), data_path=beir)
    knobs = {"trust_remote_code": True, "device": "cpu", "precision": "float32"}
    assert evaluate(tiny_models("kalm"), data_path=beir, **knobs).metrics


@pytest.mark.parametrize("pair", [("Shoes for  running", "透明手机壳"), ("透明手机壳", "Shoes for  running")])
def test_queries_in_either_column_of_the_training_data_are_counted(beir, evaluate, tmp_path, pair):
    train = jsonl(tmp_path / "train.jsonl", [dict(zip(("anchor", "positive"), pair, strict=True))])
    assert evaluate(data_path=beir, train_data_path=train).facts["queries_in_training"] == 1


def test_encoding_knobs_change_the_run(beir, evaluate, tiny_bert):
    def run(**knobs):
        return evaluate(tiny_bert, data_path=beir, **knobs).runs["tiny-bert"].read_text()

    plain = run()
    for knob in ({"query_prompt": "query: "}, {"document_prompt": "to: "}, {"max_seq_length": 8}, {"truncate_dim": 4}):
        assert run(**knob) != plain, knob


def test_command_line(beir, tmp_path, capsys):
    words = ["evaluate", "--models", "--data_path", str(beir)]
    assert main([*words, "--output_dir", str(tmp_path / "o"), "--ks", "1,5"]) == 0
    assert "hit@5" in capsys.readouterr().out
    assert main([*words, "--bm25", "false"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
