"""The index stage and search, from an embedding file to a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ebr_lib
from ebr_lib.cli import main
from ebr_lib.config import IndexConfig
from ebr_lib.data.vectors import manifest_path, write_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.index import add_rows, build_faiss_index, delete_rows, search
from ebr_lib.model.loading import identify
from ebr_lib.retrieval.contenders import EncoderSettings
from ebr_lib.retrieval.faiss_index import open_index

TEXTS = ["red running shoes", "透明手机壳", "steel frying pan", "warm wool blanket", "南瓜的家常做法", "洗发水"]
KINDS = ["shoes", "phone", "kitchen", "home", "kitchen", "bath"]


def embedding_file(path: Path, model: Path, texts=TEXTS, kinds=KINDS, first=0) -> Path:
    settings = EncoderSettings(str(model))
    vectors = settings.encoder("document").encode(texts)
    columns = {"id": [f"p{i + first}" for i in range(len(texts))], "description": texts, "kind": kinds}
    write_embeddings(path, columns, vectors)
    identity = identify(str(model))
    made_by = {"name": identity.name, "path": identity.path, "sha256": identity.sha256}
    manifest_path(path).write_text(json.dumps({
        "model": made_by, "dimension": 32, "rows": {"written": len(texts)}, "settings": {"max_seq_length": 64},
    }))  # fmt: skip
    return path


@pytest.fixture
def embeds(tmp_path, tiny_bert) -> Path:
    return embedding_file(tmp_path / "embeds.txt", tiny_bert)


@pytest.fixture
def folder(embeds, tmp_path) -> Path:
    return build_faiss_index({
        "embedding_path": str(embeds), "output_dir": str(tmp_path / "index"), "id_column": "id",
    }).folder  # fmt: skip


def test_build_and_search(embeds, tmp_path):
    result = build_faiss_index({"embedding_path": str(embeds), "output_dir": str(tmp_path / "index")})
    assert (result.kind, result.rows, result.dimension) == ("Flat", 6, 32)
    assert result.chosen.recall == 1 and result.bytes_per_vector > 128
    assert (result.folder / "recall_latency.png").read_bytes()[:4] == b"\x89PNG"
    assert IndexConfig.resolve({"preset": str(result.folder / "index_config.yaml")}).kind == "auto"
    found = search(result.folder, "steel frying pan", 3)
    assert [row["rank"] for row in found.rows] == [1, 2, 3]
    assert found.rows[0]["description"] == "steel frying pan" and found.rows[0]["score"] == pytest.approx(1, abs=1e-5)
    assert "kitchen" in found._repr_html_() and list(found.table.columns) == [
        "rank",
        "score",
        "id",
        "description",
        "kind",
    ]
    assert ebr_lib.search is search


def test_filter_and_table(folder):
    found = search(folder, "steel frying pan", 5, where={"kind": "kitchen"})
    assert [row["kind"] for row in found.rows] == ["kitchen", "kitchen"]
    assert len(search(folder, "pan", 5, where={"kind": ["bath", "shoes"]}).rows) == 2
    with pytest.raises(DataError, match="no column colour to filter by"):
        search(folder, "pan", where={"colour": "red"})
    with pytest.raises(DataError, match="blank"):
        search(folder, " ")


def test_the_query_prompt_bites(folder):
    plain, prompted = search(folder, "pan"), search(folder, "pan", query_prompt="query: ")
    assert plain.rows[0]["score"] != prompted.rows[0]["score"]


def test_another_model_is_refused(folder, tiny_models, tmp_path):
    with pytest.raises(ModelError, match="their vectors cannot be compared"):
        search(folder, "pan", model_name=str(tiny_models("xlm-r")))
    queries = tmp_path / "q.jsonl"
    queries.write_text('{"text": "pan"}\n')
    config = {"embedding_path": str(tmp_path / "embeds.txt"), "queries_path": str(queries)}
    with pytest.raises(ModelError, match="their vectors cannot be compared"):
        build_faiss_index(config | {"model_name": str(tiny_models("xlm-r")), "output_dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_without_a_manifest_the_model_must_be_named(embeds, tmp_path, tiny_models, tiny_bert):
    manifest_path(embeds).unlink()
    place = build_faiss_index({"embedding_path": str(embeds), "output_dir": str(tmp_path / "index")}).folder
    with pytest.raises(ModelError, match="give model_name"):
        search(place, "pan")
    assert search(place, "warm wool blanket", model_name=str(tiny_bert)).rows[0]["id"] == "p3"


def test_a_model_of_fewer_dimensions_is_refused(tmp_path, tiny_bert):
    place = tmp_path / "wide.npy"
    write_embeddings(place, {"id": ["a", "b"]}, np.eye(2, 48, dtype=np.float32))
    folder = build_faiss_index({"embedding_path": str(place), "output_dir": str(tmp_path / "index")}).folder
    with pytest.raises(ModelError, match=r"48 dimensions, .* makes 32"):
        search(folder, "pan", model_name=str(tiny_bert))


def test_vectors_of_an_unknown_maker_are_not_matched_by_cutting(tmp_path, tiny_bert):
    place = tmp_path / "narrow.npy"
    write_embeddings(place, {"id": ["a", "b"]}, np.eye(2, dtype=np.float32))
    folder = build_faiss_index({"embedding_path": str(place), "output_dir": str(tmp_path / "index")}).folder
    with pytest.raises(ModelError, match=r"2 dimensions, .* makes 32"):
        search(folder, "pan", model_name=str(tiny_bert))


def test_a_model_that_is_not_there_is_told_as_such(folder):
    with pytest.raises(ModelError, match="no-such-model is no folder here"):
        search(folder, "pan", model_name="no-such-model")


def test_measured_on_real_queries(embeds, tmp_path):
    queries = tmp_path / "q.csv"
    queries.write_text("question,n\nfrying pan,1\nfrying pan,2\nwool,3\n")
    config = {"embedding_path": str(embeds), "queries_path": str(queries), "output_dir": str(tmp_path / "index")}
    assert "; 2 real queries" in build_faiss_index(config).table.title
    assert "; 1 real queries" in build_faiss_index(config | {"measure_queries": 1}).table.title


def test_add_and_delete(folder, tiny_bert, tmp_path, tiny_models):
    more = embedding_file(
        tmp_path / "more.parquet", tiny_bert, ["cast iron pan", "wool socks"], ["kitchen", "shoes"], 6
    )
    assert search(folder, "cast iron pan").rows[0]["score"] < 0.999
    assert add_rows(folder, more) == 8
    assert search(folder, "cast iron pan").rows[0]["id"] == "p6"
    assert delete_rows(folder, ["p6", "p0"]) == 6
    assert delete_rows(folder, "p1") == 5
    left = {row["id"] for row in search(folder, "cast iron pan", 99).rows}
    assert left == {"p2", "p3", "p4", "p5", "p7"}
    with pytest.raises(DataError, match=r"1 ids are not in column id \(p99\)"):
        delete_rows(folder, ["p99", "p2"])
    other = embedding_file(tmp_path / "other.txt", tiny_models("xlm-r"))
    with pytest.raises(ModelError, match="encode the new rows with the index's model"):
        add_rows(folder, other)
    manifest_path(other).unlink()
    with pytest.raises(ModelError, match="of a model that no manifest names, the index"):
        add_rows(folder, other)
    with pytest.raises(MissingError, match="there is no such file"):
        add_rows(folder, tmp_path / "none.txt")
    narrow = tmp_path / "narrow.npy"
    write_embeddings(narrow, {name: ["x"] for name in ("id", "description", "kind")}, np.ones((1, 8), np.float32))
    manifest_path(narrow).write_text(manifest_path(more).read_text().replace('"written": 2', '"written": 1'))
    with pytest.raises(DataError, match="8 dimensions, the index 32"):
        add_rows(folder, narrow)
    assert delete_rows(folder, 7, "_row") == 4  # the numbers of added rows go on
    assert len(open_index(folder)) == 4
    build_faiss_index({"preset": str(folder / "index_config.yaml")})
    assert len(open_index(folder)) == 6  # a build starts afresh


def test_a_failed_build_loses_nothing(folder, tmp_path):
    before = (folder / "index.faiss").read_bytes()
    config = {"embedding_path": str(tmp_path / "embeds.txt"), "output_dir": str(folder)}
    with pytest.raises(ConfigError, match=r"dimensions \(could not parse index string nonsense\); use auto"):
        build_faiss_index(config | {"kind": "nonsense"})
    with pytest.raises(DataError, match="cannot train 64 cells"):
        build_faiss_index(config | {"kind": "IVF64,Flat"})
    with pytest.raises(DataError, match="sku"):
        build_faiss_index(config | {"id_column": "sku"})
    assert (folder / "index.faiss").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_no_folder_with_other_files_is_replaced(embeds, tmp_path):
    with pytest.raises(ConfigError, match=r"holds other files \(embeds\.txt, embeds\.txt\.json"):
        build_faiss_index({"embedding_path": str(embeds), "output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="is a file"):
        build_faiss_index({"embedding_path": str(embeds), "output_dir": str(embeds)})
    with pytest.raises(ConfigError, match="cannot be made"):
        build_faiss_index({"embedding_path": str(embeds), "output_dir": str(embeds / "index")})
    assert embeds.is_file()


@pytest.mark.parametrize("name", ["index.faiss", "rows.arrow", "manifest.json"])
def test_a_truncated_file_is_named(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        search(folder, "pan")
    (folder / name).unlink()
    with pytest.raises((DataError, MissingError), match=name):
        search(folder, "pan")


def test_rows_of_another_index_are_noticed(folder, tmp_path):
    import shutil

    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, np.eye(2, 32, dtype=np.float32))
    other = build_faiss_index({"embedding_path": str(tmp_path / "two.npy"), "output_dir": str(tmp_path / "o")}).folder
    shutil.copy(other / "rows.arrow", folder / "rows.arrow")
    with pytest.raises(DataError, match="6 vectors, 2 rows of columns"):
        search(folder, "pan")


def test_knobs_bite(embeds, tmp_path):
    rng = np.random.default_rng(0)
    many = tmp_path / "many.npy"
    np.save(many, rng.normal(size=(3000, 24)).astype(np.float32))
    base = {"embedding_path": str(many), "output_dir": str(tmp_path / "i"), "kind": "HNSW8", "measure_queries": 100}
    base |= {"target_recall": 0.999}
    plain = build_faiss_index(base)
    careful = build_faiss_index(base | {"ef_construction": 400})
    assert careful.points[0].recall > plain.points[0].recall
    eager = build_faiss_index(base | {"target_recall": 0.5})
    assert eager.chosen.setting < plain.chosen.setting
    other = build_faiss_index(base | {"seed": 7})
    assert other.points[0].recall != plain.points[0].recall
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    assert manifest["search"]["setting"] == other.chosen.setting


def test_command_line(folder, capsys, tmp_path):
    arguments = ["search", "steel frying pan", "--index_dir", str(folder), "--k", "2", "--where", "kind=kitchen"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "steel frying pan" in out and "南瓜的家常做法" in out and "shoes" not in out
    assert main(["search", "pan", "--index_dir", str(tmp_path / "none")]) == 2
    assert "build the index first" in capsys.readouterr().err
    assert main(["search", "pan", "--where", "kitchen"]) == 2
    assert "wanted column=value" in capsys.readouterr().err
    assert main(["index", "--embedding_path", str(tmp_path / "none.txt")]) == 2
