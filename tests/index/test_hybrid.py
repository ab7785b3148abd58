"""Vectors fused with BM25: against a brute force of its own, under filters, after changes, and as evaluation says."""

from __future__ import annotations

import json
from pathlib import Path

import bm25s
import numpy as np
import pytest

from ebr_lib.cli import main
from ebr_lib.config import check_configs
from ebr_lib.data.advice import Advice, Reranking
from ebr_lib.data.bm25 import K1, B, Bm25, bm25_tokens
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.index.after import After, Found, diverse, reranked
from ebr_lib.index.change import add_rows, delete_rows
from ebr_lib.index.opened import open_index
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.index.side_by_side import search_examples
from ebr_lib.index.store import BUILDING, READY, changed_together, locked
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import identify
from tests.index.test_index import TEXTS, embedding_file
from tests.models import build_tiny_reranker

RRF, WEIGHTED = Fusion("rrf"), Fusion("weighted", 0.3)
WORDS = ["red", "blue", "steel", "pan", "shoes", "wool", "毯子", "手机壳", "透明", "南瓜", "lamp", "洗发水"]
ROWS = 400


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """An embedding file without a model: 400 rows of a few words, some with the vector of another row."""
    rng = np.random.default_rng(3)
    vectors = unit(rng.normal(size=(ROWS, 8)).astype(np.float32))
    vectors[50:90] = vectors[:40]
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(ROWS)]
    columns = {
        "id": [f"p{i}" for i in range(ROWS)], "text": [t if i % 17 else None for i, t in enumerate(texts)],
        "kind": ["ab"[i % 2] for i in range(ROWS)],
    }  # fmt: skip
    place = tmp_path_factory.mktemp("shop") / "e.npy"
    write_embeddings(place, columns, vectors)
    manifest_path(place).write_text(json.dumps({"model": {"name": "m", "sha256": "0"}, "dimension": 8}))
    return place


def build(embeddings: Path, folder: Path, **knobs):
    given = {"embedding_path": str(embeddings), "output_dir": str(folder), "hybrid": True, "id_column": "id"}
    return build_faiss_index(given | {"evaluation_dir": str(folder.with_name("none"))} | knobs).folder


# --- the truth ----------------------------------------------------------------------------------------------------


def ranks(scores: dict[int, float]) -> dict[int, int]:
    """Ranks of the first 100 documents, equal scores sharing the best one."""
    best = sorted(scores, key=lambda row: (-scores[row], row))[:100]
    return {row: 1 + sum(scores[other] > scores[row] for other in best) for row in best}


def scaled(scores: dict[int, float]) -> dict[int, float]:
    best = ranks(scores)
    low, high = min(scores[row] for row in best), max(scores[row] for row in best)
    return {row: (scores[row] - low) / (high - low) for row in best}


def wanted(held, query, text, fusion, *, kind=None, hidden=(), distinct=False) -> list[int]:
    """All rows of both rankers in their fused order, from texts and vectors alone."""
    texts = [value or "" for value in held.rows.column("text").to_pylist()]
    vectors = held.index.reconstruct_n(0, held.index.ntotal)[held.of_row]
    gone = {*held.deleted, *(row for row in range(ROWS) if any((vectors[row] == vectors[h]).all() for h in hidden))}
    allowed = [row for row in range(ROWS) if row not in gone and kind in (None, "ab"[row % 2])]
    if distinct:
        allowed = list({vectors[row].tobytes(): row for row in reversed(allowed)}.values())
    stop = Bm25()._stopwords
    ranker = bm25s.BM25(k1=K1, b=B, method="lucene")
    ranker.index([bm25_tokens(t, stop) for t in texts], show_progress=False)
    of_words = ranker.get_scores(bm25_tokens(text, stop)) if bm25_tokens(text, stop) else np.zeros(ROWS)
    cosines = {row: round(float(vectors[row] @ query), 6) for row in allowed}
    words = {row: float(of_words[row]) for row in allowed if of_words[row] > 0}
    if fusion.kind == "rrf":
        first, second = ({row: 1 / (60 + rank) for row, rank in ranks(s).items()} for s in (cosines, words))
        weights = (1.0, 1.0)
    else:
        first, second, weights = scaled(cosines), scaled(words), (1 - fusion.weight, fusion.weight)
    both = {row: weights[0] * first.get(row, 0) + weights[1] * second.get(row, 0) for row in {*first, *second}}
    ties = {row: (-cosines[row] if row in first else np.inf, -words[row] if row in second else np.inf) for row in both}
    return sorted(both, key=lambda row: (-both[row], ties[row], row))


def rows_of(found) -> list[int]:
    return [row["_row"] for _, row in found]


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,Flat"])
@pytest.mark.parametrize("fusion", [RRF, WEIGHTED, Fusion("weighted", 1.0)])
def test_filtered_deleted_hidden_and_equal_rows_are_as_if_they_were_not_there(shop, tmp_path, kind, fusion):
    folder = build(shop, tmp_path / "index", kind=kind, target_recall=1.0)
    delete_rows(folder, [f"p{i}" for i in range(100, 160)])
    held = open_index(folder)
    cases = [
        {},
        {"kind": "a"},
        {"hidden": 3},
        {"distinct": True},
        {"kind": "b", "hidden": 2, "distinct": True},
    ]
    rng = np.random.default_rng(5)
    for case in cases:
        query, text = unit(rng.normal(size=(1, 8)).astype(np.float32))[0], " ".join(rng.choice(WORDS, 2)) + " the"
        where = {"kind": [case["kind"]]} if "kind" in case else {}
        if "hidden" in case:  # the best ones
            case["hidden"] = wanted(held, query, text, fusion, **case | {"hidden": ()})[: case["hidden"]]
        more = {"hidden": np.array(case.get("hidden", ()), np.int64), "distinct": case.get("distinct", False)}
        found = held.find(query, 12, where, after=After(text, fusion), **more)
        assert rows_of(found) == wanted(held, query, text, fusion, **case)[:12], case
        cosines = held.index.reconstruct_n(0, held.index.ntotal)[held.of_row[rows_of(found)]] @ query
        np.testing.assert_allclose([score for score, _ in found], cosines, atol=1e-5)
    alone = held.find(query, 12, {})
    assert rows_of(held.find(query, 12, {}, after=After("nothing has this", fusion))) == rows_of(alone)
    assert rows_of(held.find(query, 300, {}, after=After("red", fusion))) == rows_of(
        held.find(query, 300, {}, after=After("red " * 3, fusion))
    )


def test_diverse_rows_are_weighed_by_what_orders_them():
    """Scaled, the fused scores are 1, .5 and 0; the second row is a copy of the first and gives way."""
    found = Found(np.array([4, 2, 9]), np.zeros(3), np.array([0.04, 0.03, 0.02]))
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert diverse(found, vectors, 3, 0.5, After("q", RRF)).ids.tolist() == [4, 9, 2]
    assert diverse(found, vectors, 3, 0.1, After("q", RRF)).ids.tolist() == [4, 2, 9]


def test_a_reranker_orders_the_first_rows_and_the_others_stay_below():
    found = Found(np.array([4, 2, 9, 1]), np.zeros(4), np.array([0.9, 0.8, 0.7, 0.7]))
    asked = []

    def scores(pairs):
        asked.extend(pairs)
        return np.array([-3.0, 5.0])

    after = reranked(found, ["four", "two"], After("q", scores=scores, depth=2))
    assert asked == [("q", "four"), ("q", "two")] and after.ids.tolist() == [2, 4, 9, 1]


# --- the folder ---------------------------------------------------------------------------------------------------


def more_rows(shop: Path, place: Path) -> Path:
    write_embeddings(place, {"id": ["new"], "text": ["wool aquamarine"], "kind": ["a"]}, np.eye(1, 8, dtype=np.float32))
    manifest_path(place).write_text(manifest_path(shop).read_text())
    return place


def test_added_rows_are_found_by_their_words_as_if_built_with_them(shop, tmp_path):
    folder = build(shop, tmp_path / "index")
    add_rows(folder, more_rows(shop, tmp_path / "more.npy"))
    held = open_index(folder)
    whole = Bm25([text or "" for text in held.rows.column("text").to_pylist()])
    assert len(held.bm25) == len(held) == ROWS + 1
    for query in ("aquamarine", "red wool"):
        np.testing.assert_array_equal(held.bm25.scores(query), whole.scores(query))
    after = After("aquamarine", Fusion("weighted", 0.9))
    far = -np.eye(1, 8, dtype=np.float32)[0]
    assert held.find(far, 1, {}, after=after)[0][1]["id"] == "new"
    delete_rows(folder, "new")
    assert "new" not in [row["id"] for _, row in open_index(folder).find(far, 50, {}, after=after)]


def test_words_change_together_with_the_rest_or_not_at_all(shop, tmp_path, monkeypatch):
    """Killed while it wrote: the old words hold. Killed while it moved in: the new ones do, for readers at once."""
    folder = build(shop, tmp_path / "index")
    new = tmp_path / "new.npy"
    more_rows(shop, new)
    with locked(folder), pytest.raises(RuntimeError), changed_together(folder) as half:
        (half / "bm25.npz").write_bytes(b"half")
        raise RuntimeError
    assert len(open_index(folder).bm25) == ROWS and not (folder / BUILDING).exists()
    monkeypatch.setattr("ebr_lib.index.store.settle", lambda folder: None)
    add_rows(folder, new)
    assert (folder / READY / "bm25.npz").exists() and len(open_index(folder).bm25) == ROWS + 1


def test_damaged_or_foreign_words_are_named_and_go_with_the_next_build(shop, tmp_path):
    folder = build(shop, tmp_path / "index")
    whole = (folder / "bm25.npz").read_bytes()
    for part in (whole[: len(whole) // 2], b""):
        (folder / "bm25.npz").write_bytes(part)
        with pytest.raises(DataError, match=r"bm25\.npz is not complete.*build the index again"):
            open_index(folder)
    Bm25(["one"]).save(folder / "bm25.npz")
    with pytest.raises(DataError, match="holds 1 texts, the index 400 rows"):
        open_index(folder)
    build(shop, folder, hybrid=False)
    assert not (folder / "bm25.npz").exists() and open_index(folder).bm25 is None


def test_an_index_without_texts_is_refused_before_anything_is_built(shop, tmp_path):
    with pytest.raises(DataError, match=r"keeps no texts \(looked for title; kept are id, text, kind"):
        build(shop, tmp_path / "index", text_column="title")
    np.save(tmp_path / "bare.npy", np.eye(3, dtype=np.float32))
    knobs = {"embedding_path": str(tmp_path / "bare.npy"), "output_dir": str(tmp_path / "i"), "hybrid": True}
    with pytest.raises(ConfigError, match=r"index:\n  - .*bare\.npy keeps no texts"):
        check_configs(index=knobs, run={"index": True})
    assert main(["index", "--embedding_path", knobs["embedding_path"], "--hybrid", "true", "--dry-run"]) == 2
    assert main(["index", "--text_column", "text", "--dry-run"]) == 2
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text('{"recommended": {"m": {}}}')
    with pytest.raises(DataError, match=r"report\.json is not a report of evaluate"):
        build(shop, tmp_path / "index", evaluation_dir=str(tmp_path / "evaluation"))


# --- as evaluation says -------------------------------------------------------------------------------------------


@pytest.fixture
def embeds(tmp_path, tiny_bert) -> Path:
    return embedding_file(tmp_path / "embeds.txt", tiny_bert)


def evaluated(folder: Path, model: Path, advice: Advice) -> str:
    """An evaluation that says this of a model."""
    folder.mkdir()
    entry = advice.as_json(identify(str(model)).sha256)
    (folder / "report.json").write_text(json.dumps({"recommended": {"mine": entry}}))
    return str(folder)


def test_searches_do_what_evaluation_recommends_and_say_why(embeds, tiny_bert, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    plain = build(embeds, tmp_path / "plain", hybrid=False)
    by_default = build(embeds, tmp_path / "index")
    found = search(by_default, "steel frying pan", 3)
    assert found.attrs["order"].endswith("RRF, k = 60") and "no evaluation in" in found.attrs["why"]
    assert "RRF, k = 60" in found.attrs["title"] and "searches: 与 BM25 融合 fused: RRF, k = 60" in caplog.text
    words = Advice(Fusion("weighted", 1.0), None, "nDCG@10 0.5 → 0.7")
    folder = build(embeds, tmp_path / "two", evaluation_dir=evaluated(tmp_path / "words", tiny_bert, words))
    first = search(folder, "洗发水 blanket", 1)
    assert first["id"].tolist() == ["p5"] and first.attrs["why"] == "nDCG@10 0.5 → 0.7"
    cosines = dict(search(plain, "洗发水 blanket", 6)[["id", "score"]].values.tolist())
    assert dict(first[["id", "score"]].values.tolist()) == pytest.approx({k: cosines[k] for k in first["id"]}, abs=1e-5)
    alone = search(folder, "洗发水 blanket", 6, fusion="none")
    assert alone["id"].tolist() == list(cosines) and "vectors alone" in alone.attrs["order"]
    weighted = search(by_default, "洗发水 blanket", 1, fusion="weighted", bm25_weight=1)
    assert weighted["id"].tolist() == first["id"].tolist() and weighted.attrs["why"] == ""
    none = Advice(Fusion(), None, "no clear difference")
    folder = build(embeds, tmp_path / "three", evaluation_dir=evaluated(tmp_path / "no", tiny_bert, none))
    assert search(folder, "洗发水 blanket", 6)["id"].tolist() == list(cosines)
    assert main(["search", "red shoes", "--index_dir", str(folder), "--fusion", "rrf", "--k", "1"]) == 0
    assert "red running shoes" in capsys.readouterr().out
    table = search_examples({"a": plain, "b": folder}, ["red shoes"], k=1, fusion="auto").tables["found"]
    assert list(table.columns) == ["query", "rank", "a", "b · 仅向量 vectors alone"]


def test_rows_like_others_are_found_by_their_words_too(embeds, tmp_path):
    folder = build(embeds, tmp_path / "index")
    more = embedding_file(tmp_path / "more.txt", Path(json.loads(manifest_path(embeds).read_text())["model"]["path"]),
                          ["pan of steel", "frying 洗发水"], ["new", "new"], 6)  # fmt: skip
    add_rows(folder, more)
    found = search(folder, like="p2", k=7)
    assert "p2" not in found["id"].tolist() and set(found["id"][:2]) == {"p6", "p7"}
    only = search(folder, like="p2", k=7, where={"kind": "bath"}, diversity=0.2)
    assert only["id"].tolist() == ["p5"]


def test_a_recommended_reranker_is_used_unless_it_is_switched_off(embeds, tiny_bert, tmp_path):
    reranker = build_tiny_reranker(tmp_path / "reranker")
    advice = Advice(Fusion("rrf"), Reranking(str(reranker), 2), "nDCG@10 0.5 → 0.7, 9 ms")
    knobs = {"evaluation_dir": evaluated(tmp_path / "evaluation", tiny_bert, advice)}
    folder = build(embeds, tmp_path / "index", **knobs)
    before = search(folder, "steel pan", 6, reranker_name="none")
    after = search(folder, "steel pan", 6)
    assert after["id"].tolist() != before["id"].tolist()
    assert set(after["id"][:2]) == set(before["id"][:2]) and after["id"][2:].tolist() == before["id"][2:].tolist()
    assert after.attrs["order"].endswith("RRF, k = 60, 重排 re-ranked by reranker, first 2")
    assert "re-ranked" not in before.attrs["order"] and after.attrs["why"] == advice.why
    assert search(folder, "steel pan", 6, reranker_name=None)["id"].tolist() == before["id"].tolist()
    assert "re-ranked" not in search(folder, like="p2").attrs["order"]  # evaluation measured queries
    deep = search(folder, "steel pan", 6, reranker_name=str(reranker), rerank_depth=6)
    from ebr_lib.model.reranker import load_reranker

    scores = load_reranker(str(reranker))([("steel pan", text) for text in TEXTS])
    assert deep["id"].tolist() == [f"p{i}" for i in np.argsort(-scores)]
    plain = build(embeds, tmp_path / "plain", hybrid=False, **knobs)  # re-ranks as well, and fuses nothing
    assert search(plain, "steel pan", 6, reranker_name=str(reranker))["id"].tolist() == deep["id"].tolist()
    found = search(plain, "steel pan", 6, rerank_depth=6)
    assert found["id"].tolist() == deep["id"].tolist()
    assert (found.attrs["order"], found.attrs["why"]) == ("重排 re-ranked by reranker, first 6", advice.why)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/not-here", "not on this machine; reranker_name: owner/not-here downloads it"),
        ("./moved", "model ./moved: no such folder"),
        ("bi-encoder", "is a SentenceTransformer, not a cross-encoder"),
    ],
)
def test_a_recommended_reranker_that_is_not_at_hand_is_left_out_with_a_warning(embeds, tiny_bert, caplog, name, reason):
    advice = Advice(Fusion("rrf"), Reranking(str(tiny_bert) if name == "bi-encoder" else name, 2), "nDCG@10 0.5 → 0.7")
    place = evaluated(embeds.with_name("evaluation"), tiny_bert, advice)
    folder = build(embeds, embeds.with_name("i"), evaluation_dir=place)
    found = search(folder, "steel pan", 6)
    assert found["id"].tolist() == search(folder, "steel pan", 6, reranker_name="none")["id"].tolist()
    assert "re-ranked" not in found.attrs["order"]
    warnings = [record.getMessage() for record in caplog.records if "not re-ranked by" in record.getMessage()]
    assert len(warnings) == 1 and reason in warnings[0] and "(nDCG@10 0.5 → 0.7)" in warnings[0]
    assert "reranker_name: none stops this warning" in warnings[0]
    search(folder, "steel pan", 6)  # says it once
    assert len([record for record in caplog.records if "not re-ranked by" in record.getMessage()]) == 1


def test_an_index_of_an_earlier_version_keeps_its_advice(embeds, tiny_bert, tmp_path):
    words = Advice(Fusion("weighted", 1.0), None, "words")
    folder = build(embeds, tmp_path / "index", evaluation_dir=evaluated(tmp_path / "evaluation", tiny_bert, words))
    wanted = search(folder, "洗发水 blanket", 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["hybrid"]["advice"] = manifest.pop("advice")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = search(folder, "洗发水 blanket", 3)
    assert found["id"].tolist() == wanted["id"].tolist() and found.attrs["why"] == "words"


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"fusion": "rrf"}, "fusion: rrf: .* keeps no BM25; build it again with hybrid: true"),
        ({"fusion": "RRF"}, "wanted auto, none, rrf or weighted"),
        ({"fusion": "weighted", "bm25_weight": 2}, "bm25_weight: 2; wanted a number from 0 to 1"),
        ({"bm25_weight": 0.5}, "bm25_weight: 0.5; wanted .* with fusion: weighted"),
        ({"reranker_name": "./r", "rerank_depth": 0}, "rerank_depth: 0; wanted a whole number from 1"),
        ({"rerank_depth": 5}, "there is no reranker; give reranker_name"),
    ],
)
def test_what_an_index_cannot_do_is_a_sentence(shop, tmp_path_factory, knobs, said):
    folder = tmp_path_factory.getbasetemp() / "vectors-alone"
    folder = folder if folder.is_dir() else build(shop, folder, hybrid=False)
    with pytest.raises(ConfigError, match=said):
        search(folder, "pan", **knobs)


def test_a_weighted_sum_needs_a_weight(shop, tmp_path):
    with pytest.raises(ConfigError, match="no evaluation chose a weight for this index; give bm25_weight"):
        search(build(shop, tmp_path / "index"), "pan", fusion="weighted")
    assert main(["search", "pan", "--bm25_weight", "0.2"]) == 2
    assert main(["search", "pan", "--rerank_depth", "9"]) == 2
