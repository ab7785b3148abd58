"""Sizes for serving: every number of the table against brute force in numpy, and what the stage writes."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import is_exact, write_embeddings
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.evaluate import frontier, sizes
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.metrics import unit
from ebr_lib.model.contract import CONTRACT_FILE, trained_dims
from ebr_lib.model.provenance import identify
from tests.evaluate.tasks import DOCS

K, DOCUMENTS, QUERIES, DIM = 5, 120, 24, 32


@pytest.fixture(scope="module")
def vectors():
    generator = np.random.default_rng(3)
    documents = unit(generator.standard_normal((DOCUMENTS, DIM)).astype(np.float32))
    noise = generator.standard_normal((2, QUERIES, DIM)).astype(np.float32)
    queries = unit(documents[:QUERIES] + 0.25 * noise[0])
    documents[60 : 60 + QUERIES] = unit(queries + 0.1 * noise[1])  # each query's own, for every other one
    return queries, documents


RELEVANT = [{i: 2, i + QUERIES: 1} for i in range(QUERIES)]
OWN = [frozenset({i + 60}) if i % 2 else frozenset() for i in range(QUERIES)]


def measured(vectors, **more):
    knobs = {"metric": "recall@5", "dims": [16], "tolerance": 0.05, "resamples": 200, "seed": 0} | more
    return frontier.measure_sizes("m", *vectors, RELEVANT, OWN, **knobs)


def as_served(documents: np.ndarray, dim: int, precision: str) -> np.ndarray:
    """Documents as an index of a precision holds them, by its definition."""
    cut = documents[:, :dim] / np.linalg.norm(documents[:, :dim], axis=1, keepdims=True)
    if precision == "float16":
        return cut.astype(np.float16).astype(np.float64)
    if precision == "int8":  # Faiss: 255 steps from the least to the largest of each dimension, read at their middle
        low, high = cut.min(axis=0), cut.max(axis=0)
        return low + (np.floor((cut - low) / (high - low) * 255).clip(0, 255) + 0.5) / 255 * (high - low)
    if precision == "binary":
        return np.where(cut > 0, 1, -1) / np.sqrt(dim)
    if precision == "binary + int8":
        codes = np.round(cut / np.abs(cut).max(axis=1, keepdims=True) * 127)
        return codes / np.linalg.norm(codes, axis=1, keepdims=True)
    return cut


def ranked(queries: np.ndarray, held: np.ndarray) -> list[list[int]]:
    cut = queries[:, : held.shape[1]].astype(np.float64)
    orders = np.argsort(-(cut @ held.T), axis=1, kind="stable")
    return [[d for d in order.tolist() if d not in own][:K] for order, own in zip(orders, OWN, strict=True)]


def test_every_row_is_what_brute_force_finds(vectors, monkeypatch):
    monkeypatch.setattr(sizes, "CANDIDATES", DOCUMENTS)  # bits hand over all
    found = measured(vectors)
    assert [(row.size.dimensions, row.size.precision) for row in found.rows] == [
        (dim, precision) for dim in (DIM, 16) for precision in sizes.PRECISIONS
    ]
    queries, documents = vectors
    exact = ranked(queries, documents.astype(np.float64))
    baseline = np.array([len(set(best) & {i, i + QUERIES}) / 2 for i, best in enumerate(exact)])
    assert 0.3 < baseline.mean() < 0.9
    for row in found.rows:
        lists = ranked(queries, as_served(documents.astype(np.float64), row.size.dimensions, row.size.precision))
        values = np.array([len(set(best) & {i, i + QUERIES}) / 2 for i, best in enumerate(lists)])
        overlap = np.mean([len(set(best) & set(near)) / K for best, near in zip(lists, exact, strict=True)])
        # two documents within rounding of each other may change places in Faiss's float32
        assert row.mean == pytest.approx(values.mean(), abs=0.5 / QUERIES + 1e-9), row.size.name
        assert row.recall == pytest.approx(overlap, abs=2 / QUERIES / K + 1e-9), row.size.name
        assert row.change.difference == pytest.approx(row.mean - found.rows[0].mean)
        assert row.change.low <= row.change.difference <= row.change.high
        assert row.milliseconds > 0
    assert (found.rows[0].mean, found.rows[0].recall) == (pytest.approx(baseline.mean()), 1)


def test_bytes_are_those_of_the_definition(vectors):
    for row in measured(vectors).rows:
        dim = row.size.dimensions
        wanted = {
            "float32": 4 * dim,
            "float16": 2 * dim,
            "int8": dim,
            "binary": dim / 8,
            "binary + int8": dim / 8 + dim,
        }
        over = row.size.bytes - wanted[row.size.precision]  # the file's head, and the ranges of int8
        assert 0 < over * DOCUMENTS < 200 + 8 * dim


def test_bits_hand_over_the_nearest_by_hamming_distance(monkeypatch):
    monkeypatch.setattr(sizes, "CANDIDATES", 1)
    query = np.array([[0.9, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]], np.float32)
    documents = unit(np.array([[1, -0.1, -0.1, -0.1, 0, 0, 0, 0], [0.1, 1, 1, 1, 1, 1, 1, 1]], np.float32))
    assert (query @ documents.T).argmax() == 0
    found = {size.precision: search(query, 1)[1].tolist() for size, search in sizes.sizes(documents, [8], ["Flat"], 0)}
    assert found == {"float32": [[0]], "float16": [[0]], "int8": [[0]], "binary": [[1]], "binary + int8": [[1]]}


def test_graphs_and_cells_are_tried_for_many_documents(monkeypatch):
    generator = np.random.default_rng(0)
    documents = unit(generator.standard_normal((600, 16)).astype(np.float32))
    monkeypatch.setattr(sizes, "MANY", 600)
    kinds = sizes.kinds_for(600)
    assert (kinds, sizes.kinds_for(599)) == (["Flat", "HNSW32", "IVF64"], ["Flat"])
    found = [(size, search(documents[:50], 1)[1]) for size, search in sizes.sizes(documents, [16], kinds, 0)]
    tried = [(size.precision, size.kind, size.effort) for size, _ in found]
    efforts = {"Flat": [None], "HNSW32": [32, 128], "IVF64": [2, 8]}
    assert tried == [(p, kind, effort) for kind in kinds for p in sizes.PRECISIONS for effort in efforts[kind]]
    for size, ids in found:
        if size.precision == "float32":
            assert (ids[:, 0] == np.arange(50)).mean() > 0.95  # each finds itself
    assert found[-1][0].name == "16 binary + int8 IVF64 nprobe 8"


def test_the_smallest_size_within_the_tolerance_is_recommended(vectors):
    found = measured(vectors, tolerance=1.0)
    assert found.recommended is min(found.rows, key=lambda row: row.size.bytes)
    assert "建议 use 16 binary Flat" in found.sentence and "loses less than 1" in found.sentence
    least = -found.recommended.change.low
    assert measured(vectors, tolerance=least + 1e-6).recommended.size == found.recommended.size
    strict = measured(vectors, tolerance=least - 1e-6)
    assert strict.recommended.size.bytes > found.recommended.size.bytes
    worse = frontier.Frontier("m", "recall@5", DOCUMENTS, QUERIES, 0.05, strict.rows, strict.rows[0])
    assert "保持 keep 32 float32 Flat" in worse.sentence
    best = strict.best
    assert all(a.size.bytes < b.size.bytes and a.mean < b.mean for a, b in itertools.pairwise(best))
    table = strict.table()
    assert table[table.columns[0]].tolist().count("→") == 1 and table["bytes"].is_monotonic_increasing


def test_dimensions_that_do_not_fill_bytes_have_no_bits(vectors):
    found = [(row.size.dimensions, row.size.precision) for row in measured(vectors, dims=[12]).rows]
    assert found[-3:] == [(12, "float32"), (12, "float16"), (12, "int8")]


def test_halves_end_at_64():
    assert (sizes.halves(768), sizes.halves(384), sizes.halves(100)) == ([768, 384, 192, 96], [384, 192, 96], [100])


def test_models_name_the_dimensions_they_were_trained_for(tmp_path):
    assert trained_dims(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"matryoshka_dimensions": [64, 32]}')
    assert trained_dims(tmp_path) == (64, 32)
    (tmp_path / "config_sentence_transformers.json").write_text('{"matryoshka_dims": [128]}')
    assert trained_dims(tmp_path) == (128,)
    contract = {"base_model": "b", "base_sha256": None, "trust_remote_code": False, "prompts": {}, "max_seq_length": 8}
    more = {"pooling": "mean", "normalize": True, "dimension": 32, "matryoshka_dims": [16]}
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(contract | more))
    assert trained_dims(tmp_path) == (16,)


# --- the stage ----------------------------------------------------------------------------------------------------


def test_the_stage_writes_table_picture_and_sentence(beir, tiny_bert, tmp_path, caplog):
    knobs = {
        "models": [str(tiny_bert)], "data_path": str(beir), "output_dir": str(tmp_path / "out"), "resamples": 100,
        "backend": "torch", "bm25": False,
    }  # fmt: skip
    result = evaluate_retrieval(knobs | {"frontier": True, "frontier_dims": [8, 64]})
    assert "frontier_dims: 略过 left out: 64; the vectors have 32 dimensions" in caplog.text
    assert result.frontier is not None and set(result.tables["frontier"]["dimensions"]) == {32, 8}
    assert result.frontier.rows[0].mean == pytest.approx(result.metrics["tiny-bert"]["ndcg@10"], abs=1e-6)
    report = json.loads(result.report_json.read_text())
    assert report["frontier"]["sentence"] == result.frontier.sentence
    assert [row["size"]["precision"] for row in report["frontier"]["rows"]] == [*sizes.PRECISIONS, *sizes.PRECISIONS]
    picture = result.report_html.with_name("frontier.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result.frontier.sentence in result.report_html.read_text(encoding="utf-8")
    assert result.frontier.sentence in repr(result) and "各种体积 all sizes" in result._repr_html_()
    again = evaluate_retrieval(knobs)
    assert again.frontier is None and not picture.exists()
    assert again.metrics == result.metrics


def test_a_frontier_does_not_start_from_rounded_vectors(beir, tiny_bert, tmp_path):
    knobs = {
        "models": [str(tiny_bert)], "data_path": str(beir), "output_dir": str(tmp_path / "out"), "resamples": 100,
        "backend": "torch", "bm25": False, "frontier": True,
    }  # fmt: skip
    for name, vector_type in (("a.npy", "float16"), ("b.parquet", "int8"), ("c.npy", "float32"), ("d.txt", "float32")):
        place = tmp_path / name
        columns = {"id": [f"d{i}" for i in range(len(DOCS))]}
        write_embeddings(place, columns, np.eye(len(DOCS), 32, dtype=np.float32), vector_type=vector_type)
        assert is_exact(place) == (vector_type == "float32")
        if vector_type == "float32":
            assert evaluate_retrieval(knobs | {"corpus_path": str(place)}).frontier is not None
            continue
        with pytest.raises(DataError, match="stored in fewer bytes than float32"):
            evaluate_retrieval(knobs | {"corpus_path": str(place)})
        assert evaluate_retrieval(knobs | {"corpus_path": str(place), "frontier": False}).frontier is None


def test_models_are_not_compared_on_rounded_vectors(beir, tiny_bert, tmp_path):
    """Random documents find nothing; encoded again, both find what the model alone does."""
    twin = shutil.copytree(tiny_bert, tmp_path / "twin")
    docs = {"id": [f"d{i}" for i in range(len(DOCS))], "description": DOCS}
    place, made_by = tmp_path / "a.parquet", {"model": {"name": "tiny", "sha256": identify(str(tiny_bert)).sha256}}
    rounded = np.random.default_rng(0).normal(size=(len(DOCS), 32)).astype(np.float32)
    write_embeddings(place, docs, rounded, vector_type="int8")
    manifest_path(place).write_text(json.dumps(made_by))
    knobs = {"data_path": str(beir), "output_dir": str(tmp_path / "out"), "resamples": 100, "backend": "torch"}
    knobs |= {"bm25": False}
    wanted = evaluate_retrieval(knobs | {"models": [str(tiny_bert)]}).metrics["tiny-bert"]
    found = evaluate_retrieval(knobs | {"models": [str(tiny_bert), str(twin)], "corpus_path": str(place)}).metrics
    assert list(found.values()) == [wanted, wanted]


def test_knobs_that_do_not_go_together():
    with pytest.raises(ConfigError, match="frontier_dims: only with frontier"):
        EvalConfig.resolve({"data_path": "d", "frontier_dims": [8]})
    with pytest.raises(ConfigError, match="models is empty"):
        EvalConfig.resolve({"data_path": "d", "frontier": True, "models": []})
