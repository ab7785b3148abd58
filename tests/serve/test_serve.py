"""The server: its vectors are the index's, requests are batched and limited, and marks are judgements."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ebr_lib import cli, search, verify_endpoint
from ebr_lib.data.advice import Advice, Reranking
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import ConfigError, DataError, MissingError, UserError
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.index.change import delete_rows
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.serve import engine as engine_module
from ebr_lib.serve.config import ServeConfig
from ebr_lib.serve.engine import Batcher, BusyError, Engine, Turns
from ebr_lib.serve.judgements import Judgements
from ebr_lib.serve.run import listening
from tests.children import a_free_port, ended, serve_until_asked, started
from tests.index.test_index import TEXTS, build, embedding_file
from tests.models import build_tiny_reranker

MARKUP = "<img src=x onerror=document.title='broken'>"
ITEMS = [*TEXTS, MARKUP]
ROUNDING = 5e-3  # both in bfloat16 where the processor has it, by two libraries


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_bert, tiny_models) -> Path:
    """Indexes of the same rows by two models."""
    folder = tmp_path_factory.mktemp("shop")
    for name, model in (("index", tiny_models("passage")), ("base", tiny_bert)):
        kinds = [f"kind{i % 2}" for i in range(len(ITEMS))]
        build(embedding_file(folder / f"{name}.txt", model, ITEMS, kinds), folder / name, id_column="id")
    return folder


@contextmanager
def running(shop: Path, **knobs):
    """A server in a thread; yields a function that asks it."""
    given = {"index_dir": str(shop / "index"), "base_index_dir": str(shop / "base"), "port": 0} | knobs
    with listening(ServeConfig.resolve(given)) as found:
        thread = threading.Thread(target=found.server.run, kwargs={"sockets": [found.listening]})
        thread.start()
        while not found.server.started:
            time.sleep(0.005)
        try:
            yield Client(found.url)
        finally:
            found.server.should_exit = True
            thread.join()


class Client:
    """Asks a server; answers are (status, JSON or text, headers)."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, path: str, body=None, *, raw: bytes | None = None, **headers):
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        names = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, names), timeout=30) as answer:
                status, content, found = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            status, content, found = error.code, error.read(), error.headers
        text = content.decode()
        return status, json.loads(text) if found.get_content_type() == "application/json" else text, found


@pytest.fixture(scope="module")
def ask(shop, tmp_path_factory):
    with running(shop, judgements_dir=str(tmp_path_factory.mktemp("marks"))) as client:
        yield client


# --- vectors and search -------------------------------------------------------------------------------------------


def vectors_in(answer) -> np.ndarray:
    status, found, _ = answer
    assert status == 200, found
    return np.array([row["embedding"] for row in found["data"]], np.float32)


def test_vectors_are_those_of_the_index_s_model(ask, shop, tiny_models):
    spec = EncoderSpec(str(tiny_models("passage")), max_seq_length=64, backend="torch")
    for side in ("query", "document"):
        wanted = spec.encoder(side).encode(TEXTS)
        found = vectors_in(ask("/v1/embeddings", {"input": TEXTS, "input_type": side}))
        np.testing.assert_allclose(found, wanted, atol=ROUNDING)
    status, coded, _ = ask(
        "/v1/embeddings", {"input": TEXTS[0], "prompt_name": "document", "encoding_format": "base64"}
    )
    assert status == 200
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4"), wanted[0], atol=ROUNDING
    )


def test_the_server_passes_the_check_of_endpoints(ask, tiny_models):
    knobs = {"target": ask.url, "model_name": str(tiny_models("passage")), "prompts": "name"}
    result = verify_endpoint(knobs)
    assert [cause.split(" (")[0] for cause in result.causes] == ["truncation length 64"]  # as the index was made
    assert verify_endpoint(knobs | {"prompts": "text", "request": {"input_type": "none"}}).causes == result.causes


def test_search_finds_what_the_library_finds_also_with_a_filter(ask, shop):
    wanted = search(shop / "index", "warm blanket", 3)
    status, found, headers = ask("/search", {"query": "warm blanket", "k": 3})
    assert status == 200
    assert [row["id"] for row in found["results"]] == wanted["id"].tolist()
    np.testing.assert_allclose([row["score"] for row in found["results"]], wanted["score"], atol=ROUNDING)
    assert found["results"][0]["text"] == wanted["description"].iloc[0]
    _, found, _ = ask("/search", {"query": "warm blanket", "where": {"kind": "kind1"}})
    assert {row["columns"]["kind"] for row in found["results"]} == {"kind1"} and len(found["results"]) == 3
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"


def test_systems_are_compared_and_deleted_rows_are_gone_at_once(shop, tmp_path, tiny_models):
    mine = build(embedding_file(tmp_path / "e.txt", tiny_models("passage")), tmp_path / "index", id_column="id").folder
    with running(shop, index_dir=str(mine), base_index_dir=None, judgements_dir=str(tmp_path / "marks")) as ask:
        _, found, _ = ask("/compare", {"query": "steel pan", "k": 2})
        assert [(system["name"], system["title"]) for system in found["systems"]] == [
            ("index", "tiny-passage"),
            ("bm25", "BM25"),
        ]
        assert [row["text"] for row in found["systems"][1]["results"]] == ["steel frying pan"]
        delete_rows(mine, ["p2"], column="id")
        _, found, _ = ask("/compare", {"query": "steel pan", "k": 20})
        assert "p2" not in [row["id"] for system in found["systems"] for row in system["results"]]
        assert found["systems"][1]["results"] == [] and len(found["systems"][0]["results"]) == 5


def test_a_hybrid_index_is_searched_as_evaluation_recommends_and_shown_beside_the_vectors(tmp_path, tiny_bert):
    knobs = {"id_column": "id", "hybrid": True, "evaluation_dir": str(tmp_path / "none")}
    mine = build(embedding_file(tmp_path / "e.txt", tiny_bert), tmp_path / "index", **knobs).folder
    words = {"query": "洗发水 pan", "k": 6}
    wanted = {name: search(mine, **words, fusion=name)["id"].tolist() for name in ("rrf", "none")}
    assert wanted["rrf"] != wanted["none"]
    with running(tmp_path, index_dir=str(mine), base_index_dir=None, judgements_dir=str(tmp_path / "marks")) as ask:

        def found(**more) -> tuple[list[str], str]:
            _, answer, _ = ask("/search", words | more)
            return [row["id"] for row in answer["results"]], answer["order"]

        assert found() == (wanted["rrf"], "与 BM25 融合 fused: RRF, k = 60")
        assert found(fusion="none") == (wanted["none"], "仅向量 vectors alone")
        assert set(found(fusion="weighted", bm25_weight=1.0)[0][:1]) <= {"p2", "p5"}
        status, refused, _ = ask("/search", words | {"fusion": "weighted"})
        assert status == 400 and "no evaluation chose a weight" in refused["error"]["message"]
        systems = {one["name"]: one for one in ask("/compare", words)[1]["systems"]}
        assert list(systems) == ["index", "bm25", "served"] and "RRF" in systems["served"]["title"]
        for name, key in (("index", "none"), ("served", "rrf")):
            assert [row["id"] for row in systems[name]["results"]] == wanted[key]
        assert {row["id"] for row in systems["bm25"]["results"]} == {"p2", "p5"}
        assert ask("/compare", words | {"fusion": "rrf"})[0] == 400


@pytest.fixture(scope="module")
def reranking(tmp_path_factory, tiny_bert) -> Path:
    """A folder with an index whose evaluation recommends to re-rank, and the reranker."""
    place = tmp_path_factory.mktemp("reranking")
    advice = Advice(Fusion("rrf"), Reranking(str(build_tiny_reranker(place / "tiny-reranker")), 3), "0.5 → 0.7, 9 ms")
    (place / "report.json").write_text(
        json.dumps({"recommended": {"m": advice.as_json(identify(str(tiny_bert)).sha256)}})
    )
    knobs = {"id_column": "id", "hybrid": True, "evaluation_dir": str(place)}
    build(embedding_file(place / "e.txt", tiny_bert, ITEMS, ["k"] * len(ITEMS)), place / "index", **knobs)
    return place


def test_searches_are_re_ranked_as_evaluation_recommends_one_at_a_time(reranking, tmp_path, caplog):
    caplog.set_level("INFO")
    queries = ["洗发水 pan", "steel", "warm blanket", "shoes 手机壳"]
    wanted = {query: search(reranking / "index", query, 6) for query in queries}
    plain = {query: search(reranking / "index", query, 6, reranker_name="none")["id"].tolist() for query in queries}
    assert any(wanted[query]["id"].tolist() != plain[query] for query in queries)
    order = wanted["steel"].attrs["order"]
    assert order.endswith("重排 re-ranked by tiny-reranker, first 3")
    with running(reranking, base_index_dir=None, judgements_dir=str(tmp_path / "marks")) as ask:
        assert f"searches: {order} (0.5 → 0.7, 9 ms)" in caplog.text

        def found(query: str, **more) -> tuple[list[str], str]:
            _, answer, _ = ask("/search", {"query": query, "k": 6} | more)
            return [row["id"] for row in answer["results"]], answer["order"]

        asked = queries * 6
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(found, asked))
        assert answers == [(wanted[query]["id"].tolist(), order) for query in asked]
        assert found("steel", rerank=False) == (plain["steel"], "与 BM25 融合 fused: RRF, k = 60")
        lines = ask("/metrics")[1].splitlines()
        assert "ebr_reranked_search_seconds_count 24.0" in lines and "ebr_waiting_reranks 0.0" in lines
        systems = {one["name"]: one for one in ask("/compare", {"query": "steel", "k": 6})[1]["systems"]}
        assert list(systems) == ["index", "bm25", "served"] and systems["served"]["title"] == order
        assert [row["id"] for row in systems["served"]["results"]] == wanted["steel"]["id"].tolist()
        alone = search(reranking / "index", "steel", 6, fusion="none", reranker_name="none")
        assert [row["id"] for row in systems["index"]["results"]] == alone["id"].tolist()
        assert ask("/compare", {"query": "a", "rerank": False})[0] == 400


def test_the_reranker_of_a_server_is_its_owner_s_choice(reranking, tmp_path):
    knobs = {"base_index_dir": None, "judgements_dir": str(tmp_path / "marks")}
    with running(reranking, reranker_name="none", **knobs) as ask:
        assert ask("/search", {"query": "steel"})[1]["order"] == "与 BM25 融合 fused: RRF, k = 60"
    with running(reranking, rerank_depth=2, **knobs) as ask:
        assert ask("/search", {"query": "steel"})[1]["order"].endswith("by tiny-reranker, first 2")
        assert ask("/search", {"query": "steel", "reranker_name": "/etc"})[0] == 422
    for wrong, error in (
        ({"reranker_name": "./nowhere"}, MissingError),
        ({"reranker_name": None, "rerank_depth": 2}, ConfigError),
    ):
        with pytest.raises(error), running(reranking, **knobs | wrong):
            pass


def test_a_search_that_would_wait_long_for_the_reranker_is_refused(monkeypatch):
    monkeypatch.setattr(engine_module, "MOST_RERANKS", 1)
    open_gate = threading.Event()

    async def two_at_once():
        turns = Turns()
        first = asyncio.create_task(turns.run(lambda: [open_gate.wait(20)]))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await turns.run(list)
        open_gate.set()
        assert await first == [True] and turns.waiting == 0
        turns.close()

    in_a_thread(two_at_once())


def test_an_index_replaced_by_one_of_another_model_is_served_as_what_it_is(tmp_path, tiny_bert, tiny_models):
    build(embedding_file(tmp_path / "one.txt", tiny_bert), tmp_path / "index")
    engine = Engine(str(tmp_path / "index"), None, {})
    assert (engine.label, engine.sides_differ) == ("tiny-bert", False)
    build(embedding_file(tmp_path / "other.txt", tiny_models("passage")), tmp_path / "index")
    assert (engine.label, engine.sides_differ) == ("tiny-passage", True)  # without a side a request is refused


def test_health_models_and_metrics(ask):
    assert ask("/health")[1] == {"status": "ok", "model": "tiny-passage", "dimensions": 32, "index": "index"}
    assert ask("/v1/models")[1]["data"][0]["id"] == "tiny-passage"
    ask("/nothing/here")
    text = ask("/metrics")[1]
    assert 'ebr_requests_total{path="/health",status="200"}' in text
    assert 'ebr_requests_total{path="other",status="404"}' in text
    assert "ebr_batch_texts_count" in text and "ebr_waiting_requests 0.0" in text


def test_requests_at_the_same_time_share_batches_and_get_their_own_answers(ask):
    texts = [f"item {i}" for i in range(48)]
    alone = {text: vectors_in(ask("/v1/embeddings", {"input": text, "input_type": "query"}))[0] for text in texts[:4]}
    before = batches_of(ask)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda t: vectors_in(ask("/v1/embeddings", {"input": t, "input_type": "query"})), texts))
    for text, vectors in zip(texts, found, strict=True):
        if text in alone:
            np.testing.assert_allclose(vectors[0], alone[text], atol=ROUNDING)
    assert batches_of(ask) - before < len(texts)


def batches_of(ask) -> float:
    line = next(line for line in ask("/metrics")[1].splitlines() if line.startswith("ebr_batch_texts_count"))
    return float(line.split()[1])


def test_one_bad_request_does_not_fail_those_in_its_batch():
    async def together():
        class Fussy:
            def encode(self, kind, texts):
                if "bad" in texts:
                    raise DataError("a bad text")
                return None, np.array([[len(text)] for text in texts], np.float32)

        batcher, engine = Batcher(), Fussy()
        jobs = [asyncio.create_task(batcher.vectors(engine, "query", [text])) for text in ("a", "bad", "ccc")]
        await asyncio.sleep(0)
        run = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*jobs, return_exceptions=True)
        run.cancel()
        return found

    first, bad, last = in_a_thread(together())
    assert first[1].tolist() == [[1]] and last[1].tolist() == [[3]] and isinstance(bad, DataError)


def in_a_thread(coroutine):
    """Run it to its end: the browser of another test keeps a loop running in this thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, coroutine).result()


def test_a_full_queue_refuses(monkeypatch):
    monkeypatch.setattr(engine_module, "MOST_WAITING", 1)

    async def too_many():
        batcher = Batcher()
        waiting = asyncio.create_task(batcher.vectors(None, "query", ["a"]))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.vectors(None, "query", ["b"])
        waiting.cancel()

    in_a_thread(too_many())


# --- bad requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/embeddings", {"input": "a"}, 400, "give input_type query, document, or none"),
        ("/v1/embeddings", {"input": "a", "input_type": "image"}, 400, "wanted query, document or none"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "this server has tiny-passage"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "vectors of 32"),
        ("/v1/embeddings", {"input": []}, 422, "input"),
        ("/v1/embeddings", {"input": ["a"] * 257, "input_type": "query"}, 422, "at most 256"),
        ("/v1/embeddings", {"input": [1, 2], "input_type": "query"}, 422, "valid string"),
        ("/v1/embeddings", {"input": "a" * 32_769, "input_type": "query"}, 422, "at most 32768"),
        ("/v1/embeddings", {"input": " ", "input_type": "query"}, 400, "blank"),
        ("/search", {"query": "a", "k": 0}, 422, "greater than or equal to 1"),
        ("/search", {"query": "a", "k": 101}, 422, "less than or equal to 100"),
        ("/search", {"query": "a", "where": {"colour": "red"}}, 400, "no column colour"),
        ("/search", {"query": "a", "fusion": "rrf"}, 400, "keeps no BM25"),
        ("/search", {"query": "a", "index_dir": "/etc"}, 422, "index_dir: Extra inputs"),
        ("/compare", {"query": "a", "where": {"kind": "kind1"}}, 400, "without filters"),
        ("/marks", {"query": "a", "id": "p0", "grade": 5}, 422, "grade"),
        ("/../index/manifest.json", None, 404, "Not Found"),
        ("/page.js/..%2f..%2frun.py", None, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence(ask, path, body, status, said):
    found, answer, _ = ask(path, body)
    assert found == status and said in answer["error"]["message"], answer


def test_limits_of_size_kind_and_host(ask):
    assert ask("/search", raw=b" " * (1 << 20) + b"{}")[0] == 413
    assert ask("/search", raw=b'{"query": "a"}', content_type="text/plain")[0] == 415
    assert ask("/search", raw=b"{")[0] == 422
    status, answer, _ = ask("/health", host="evil.example")
    assert status == 421 and "evil.example" in answer["error"]["message"]
    half = ask("/search", raw=b'{"query": "a \\ud83d"}')
    assert half[0] in (400, 422) and half[1]["error"]["message"]


def test_a_token_guards_everything_but_the_page_and_health(shop, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n", encoding="utf-8")
    knobs = {"host": "0.0.0.0", "token_file": str(token), "bm25": False, "judgements_dir": str(tmp_path / "m")}
    with running(shop, base_index_dir=None, **knobs) as ask:
        ask.url = ask.url.replace("0.0.0.0", "127.0.0.1")
        for path in ("/search", "/compare", "/marks", "/v1/embeddings"):
            assert ask(path, {"query": "a"})[0] == 401
            assert ask(path, {"query": "a"}, authorization="Bearer wrong")[0] == 401
        assert [ask(path)[0] for path in ("/", "/page.js", "/page.css", "/health")] == [200] * 4
        assert ask("/metrics")[0] == 401
        assert ask("/search", {"query": "a"}, authorization="Bearer secret", host="shop.example")[0] == 200


def test_what_cannot_be_served_is_a_sentence(shop, tmp_path, capsys):
    index = {"index_dir": str(shop / "index"), "judgements_dir": str(tmp_path / "m"), "port": 0}

    def refused(kind: type[UserError], match: str, **knobs) -> None:
        with pytest.raises(kind, match=match), listening(ServeConfig.resolve(index | knobs)):
            pass

    refused(MissingError, "build the index first", index_dir=str(tmp_path))
    refused(ConfigError, r"give a token_file", host="0.0.0.0")
    refused(DataError, r"text_column: .* keeps no column x; it has id, description, kind", text_column="x")
    refused(DataError, "id_column: .* keeps no column sku", id_column="sku")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(ConfigError, "cannot listen at 127.0.0.1, port", port=taken.getsockname()[1])
    held = Judgements(str(tmp_path / "m"))
    refused(ConfigError, "another server writes there")
    held.close()
    assert cli.main(["serve", "--index_dir", str(tmp_path / "nothing")]) == 2
    assert "build the index first" in capsys.readouterr().err


# --- judgements ---------------------------------------------------------------------------------------------------


def test_marks_are_judgements_that_evaluate_reads(ask, shop, tmp_path_factory):
    marked = [("warm  blanket", "p3", 1), ("Warm blanket", "p0", 0), ("手机壳 \u2028 x", "p1", 1), ("gone", "p5", 1)]
    for query, document, grade in marked:
        assert ask("/marks", {"query": query, "id": document, "grade": grade})[0] == 200
    status, state, _ = ask("/marks", {"query": "gone", "id": "p5", "grade": None})
    assert (status, state["queries"], state["right"], state["wrong"]) == (200, 2, 2, 1)
    assert ask("/compare", {"query": "WARM blanket"})[1]["marks"] == {"p3": 1, "p0": 0}
    words = state["command"].split()[3:]
    out = tmp_path_factory.mktemp("evaluation")
    assert words[0] == "evaluate"
    given = dict(zip([word.removeprefix("--") for word in words[1::2]], words[2::2], strict=True))
    result = evaluate_retrieval(given | {"models": [], "resamples": 100, "output_dir": str(out)})
    assert result.facts["queries"] == 2 and result.facts["judgements"] == 3
    assert result.metrics["BM25"]["recall@1"] == 1  # both right answers share words with their queries
    assert "q1 0 p0 0" in (out / "qrels.trec").read_text()


def test_judgements_survive_a_restart_and_a_damaged_file_is_named(tmp_path):
    first = Judgements(str(tmp_path))
    first.mark("红色 跑鞋", "p0", 1)
    first.mark("b", "p1", 0)
    first.close()
    again = Judgements(str(tmp_path))
    assert again.of("红色  跑鞋") == {"p0": 1} and again.counts() == {"queries": 2, "right": 1, "wrong": 1}
    again.mark("b", "p1", 1)
    again.close()
    (tmp_path / "qrels.jsonl").write_text('{"query-id": "q9", "corpus-id": "p", "score": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="that no page made"):
        Judgements(str(tmp_path))
    (tmp_path / "queries.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="move it away"):
        Judgements(str(tmp_path))


def test_a_new_judgement_takes_no_number_of_another_query(tmp_path):
    marks = Judgements(str(tmp_path))
    for query in ("a", "b", "c"):
        marks.mark(query, "p0", 1)
    marks.close()
    for name in ("queries.jsonl", "qrels.jsonl"):
        place = tmp_path / name
        place.write_text("".join(place.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    marks = Judgements(str(tmp_path))
    marks.mark("d", "p1", 0)
    marks.close()
    again = Judgements(str(tmp_path))
    assert [again.of(query) for query in ("a", "b", "c", "d")] == [{}, {"p0": 1}, {"p0": 1}, {"p1": 0}]
    again.close()
    with (tmp_path / "queries.jsonl").open("a", encoding="utf-8") as out:
        out.write('{"_id": "q3", "text": "e"}\n')
    with pytest.raises(DataError, match="has _id q3 twice"):
        Judgements(str(tmp_path))


def test_an_index_without_ids_is_searched_and_not_judged(tmp_path, tiny_bert, shop):
    mine = build(embedding_file(tmp_path / "e.txt", tiny_bert), tmp_path / "index").folder
    knobs = {"base_index_dir": None, "bm25": False, "judgements_dir": str(tmp_path / "marks")}
    with running(shop, index_dir=str(mine), **knobs) as ask:
        assert ask("/marks")[1]["possible"] is False
        assert ask("/marks", {"query": "a", "id": "p0", "grade": 1})[0] == 409
        assert len(vectors_in(ask("/v1/embeddings", {"input": "a"}))) == 1  # without prompts no side is needed
    assert not (tmp_path / "marks").exists()


# --- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_a_stopped_server_finishes_its_requests_and_exits_with_0(shop, tmp_path):
    port, said = a_free_port(), tmp_path / "said"
    words = ["serve", "--index_dir", str(shop / "index"), "--port", str(port), "--judgements_dir", str(tmp_path / "m")]
    child = started(serve_until_asked, words, said)
    while not (said.exists() and "open in a browser" in said.read_text(encoding="utf-8")) and child.is_alive():
        time.sleep(0.05)
    status, found, _ = Client(f"http://127.0.0.1:{port}")("/search", {"query": "blanket"})
    assert status == 200 and len(found["results"]) == len(ITEMS)
    assert ended(child) == [0] and "stopped" in said.read_text(encoding="utf-8")


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_compares_and_saves_marks(browser, shop, tmp_path):
    with running(shop, judgements_dir=str(tmp_path / "marks")) as ask:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(ask.url)
        page.fill("#query", "steel frying pan 手机壳")
        page.press("#query", "Enter")
        page.wait_for_selector("section")
        assert [s.get_attribute("data-name") for s in page.query_selector_all("section")] == ["base", "index", "bm25"]
        assert MARKUP in page.inner_text("section[data-name=index]") and page.title().startswith("检索对比")
        page.click("section[data-name=bm25] li[data-id=p2] button.yes")
        page.wait_for_selector("section[data-name=index] li.right[data-id=p2]")  # in every column
        page.click("section[data-name=index] li[data-id=p5] button.no")
        page.wait_for_selector("section[data-name=base] li.wrong[data-id=p5]")
        page.locator("#counts", has_text="1 ✓, 1 ✗").wait_for()
        assert "ebr_lib evaluate --data_path" in page.inner_text("#command")
        if place := os.environ.get("EBR_SCREENSHOTS"):
            page.screenshot(path=f"{place}/page.png", full_page=True)
            page.set_viewport_size({"width": 420, "height": 800})
            page.screenshot(path=f"{place}/narrow.png", full_page=True)
        page.reload()
        page.fill("#query", "Steel frying pan  手机壳")
        page.click("text=检索 Search")
        page.wait_for_selector("section[data-name=bm25] li.right[data-id=p2]")
        page.click("section[data-name=bm25] li[data-id=p2] button.yes")  # takes it back
        page.wait_for_selector("li.right", state="detached")
        page.close()
        assert errors == []
    kept = [json.loads(line) for line in (tmp_path / "marks" / "qrels.jsonl").read_text().splitlines()]
    assert kept == [{"query-id": "q1", "corpus-id": "p5", "score": 0}]
