"""The index stage and search, from an embedding file to a table."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ebr_lib
from ebr_lib.cli import main
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.index.change import add_rows, delete_rows
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.opened import open_index
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.index.store import BUILDING, index_stamp
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec

TEXTS = ["red running shoes", "透明手机壳", "steel frying pan", "warm wool blanket", "南瓜的家常做法", "洗发水"]
KINDS = ["shoes", "phone", "kitchen", "home", "kitchen", "bath"]


@functools.cache
def vectors_of(model: Path, texts: tuple[str, ...]) -> np.ndarray:
    return EncoderSpec(str(model), backend="torch").encoder("document").encode(texts)


def embedding_file(path: Path, model: Path, texts=TEXTS, kinds=KINDS, first=0) -> Path:
    columns = {"id": [f"p{i + first}" for i in range(len(texts))], "description": texts, "kind": kinds}
    write_embeddings(path, columns, vectors_of(model, tuple(texts)))
    identity = identify(str(model))
    made_by = {"name": identity.name, "path": identity.path, "sha256": identity.sha256}
    manifest_path(path).write_text(json.dumps({
        "model": made_by, "dimension": 32, "rows": {"written": len(texts)}, "settings": {"max_seq_length": 64},
    }))  # fmt: skip
    return path


@pytest.fixture
def embeds(tmp_path, tiny_bert) -> Path:
    return embedding_file(tmp_path / "embeds.txt", tiny_bert)


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_bert) -> Path:
    place = tmp_path_factory.mktemp("built")
    embeddings = embedding_file(place / "embeds.txt", tiny_bert)
    return build(embeddings, place / "index", id_column="id").folder


@pytest.fixture
def folder(built, embeds, tmp_path) -> Path:
    """An index of its own for each test, over `embeds`."""
    return shutil.copytree(built, tmp_path / "index")


def build(embeddings: Path, folder: Path, **knobs):
    return build_faiss_index({"embedding_path": str(embeddings), "output_dir": str(folder)} | knobs)


def test_build_and_search(embeds, tmp_path, draws):
    result = build(embeds, tmp_path / "index")
    assert (result.kind, result.rows, result.dimension) == ("Flat", 6, 32)
    assert result.chosen.recall == 1 and result.bytes_per_vector > 128
    assert (result.folder / "recall_latency.png").read_bytes()[:4] == b"\x89PNG"
    assert IndexConfig.resolve({"preset": str(result.folder / "index_config.yaml")}).kind == "auto"
    found = search(result.folder, "steel frying pan", 3)
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["description"].iloc[0] == "steel frying pan" and found["score"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert "kitchen" in found._repr_html_() and "kitchen" in str(found)
    assert list(found.columns) == ["rank", "score", "id", "description", "kind"] and found.index.name == "_row"
    assert ebr_lib.search is search


def test_search_takes_filters_and_refuses_bad_arguments(folder):
    found = search(folder, "steel frying pan", 5, where={"kind": "kitchen"})
    assert found["kind"].tolist() == ["kitchen", "kitchen"]
    assert len(search(folder, "pan", 5, where={"kind": ["bath", "shoes"]})) == 2
    with pytest.raises(DataError, match="no column colour to filter by"):
        search(folder, "pan", where={"colour": "red"})
    with pytest.raises(DataError, match="blank"):
        search(folder, " ")
    found = search(folder, "pan", 99, where={"kind": np.array(["bath", "home"])})
    assert set(found["kind"]) == {"bath", "home"}
    with pytest.raises(ConfigError, match="b'bath'; wanted a text, a number"):
        search(folder, "pan", where={"kind": b"bath"})
    with pytest.raises(ConfigError, match=r"\['bath'\]; wanted a text, a number"):
        search(folder, "pan", where={"kind": [["bath"]]})
    for query, where in (("pan \ud83d", None), ("pan", {"kind": ["bath", "\udcff"]})):
        with pytest.raises(DataError, match="holds half of a character"):
            search(folder, query, where=where)
    with pytest.raises(DataError, match="the query is None; wanted a text"):
        search(folder, None)
    assert len(search(folder, "pan", np.int64(99))) == 6
    with pytest.raises(ConfigError, match="where: 'kind=a'; wanted column to value"):
        search(folder, "pan", where="kind=a")
    for k in ("3", 0, 2.0, True):
        with pytest.raises(ConfigError, match=f"k: {k!r}; wanted a whole number from 1"):
            search(folder, "pan", k)


def test_filter_takes_nulls_and_values_of_numpy_and_pandas(tmp_path, tiny_bert, capsys):
    import pandas as pd

    place = tmp_path / "rated.npy"
    prices, cats = ["7", "7.0", "", None, "3.5", "1"], ["A", None, "B", "", "true", "True"]
    vectors = vectors_of(tiny_bert, tuple(TEXTS))
    write_embeddings(place, {"id": list("012345"), "price": prices, "cat": cats}, vectors)
    folder = build(place, tmp_path / "index").folder

    def ids(**where):
        found = search(folder, "pan", where=where, model_name=str(tiny_bert))
        return "".join(sorted(found["id"]))

    for null in (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT):
        assert ids(cat=null) == "1" and ids(price=[null]) == "3"
    assert ids(cat=[None, "A"]) == "01" and ids(cat="") == "3" and ids(cat=["", None]) == "13"
    assert ids(price=7) == ids(price=np.int32(7)) == ids(price=np.array(7)) == "0"
    assert ids(price=[np.float64(7), 3.5]) == "14" and ids(price=np.arange(8)) == "05"
    assert ids(cat=True) == ids(cat=np.bool_(True)) == ids(cat=[True]) == "45"
    assert ids(cat=None, price=["7.0", "7"]) == "1" and ids(cat=[]) == ""
    arguments = ["search", "pan", "--index_dir", str(folder), "--model_name", str(tiny_bert), "--where"]
    assert main([*arguments, r"cat=\N"]) == 0
    assert "7.0" in capsys.readouterr().out
    assert main([*arguments, "cat="]) == 0
    assert "7.0" not in capsys.readouterr().out


def test_kept_columns_named_rank_or_score_are_renamed_in_the_result(tmp_path, tiny_bert):
    place = tmp_path / "rated.npy"
    vectors = vectors_of(tiny_bert, tuple(TEXTS))
    kept = {name: [f"{name} {i}" for i in range(6)] for name in ("score", "rank", "score_kept")}
    write_embeddings(place, kept, vectors)
    folder = build(place, tmp_path / "index").folder
    found = search(folder, "warm wool blanket", 2, where={"score": ["score 3", "score 4"]}, model_name=str(tiny_bert))
    assert found["rank"].tolist() == [1, 2] and found["score"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert list(found.columns) == ["rank", "score", "score_kept_kept", "rank_kept", "score_kept"]
    assert found.iloc[0, 2:].tolist() == ["score 3", "rank 3", "score_kept 3"]


def test_kept_column_named_row_is_refused(tmp_path):
    place = tmp_path / "e.npy"
    write_embeddings(place, {"_row": ["a", "b"]}, np.eye(2, 8, dtype=np.float32))
    with pytest.raises(DataError, match="column _row is the index's own"):
        build(place, tmp_path / "index")


@pytest.mark.parametrize("kind", ["Flat", "IVF2,Flat"])
def test_manifest_with_another_dimension_is_refused(embeds, tmp_path, kind):
    manifest = json.loads(manifest_path(embeds).read_text()) | {"dimension": 16}
    manifest_path(embeds).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="vectors of 32 dimensions, its manifest says 16"):
        build(embeds, tmp_path / "index", kind=kind)


def test_without_a_model_in_the_manifest_model_name_is_needed(embeds, tmp_path, tiny_bert):
    manifest = json.loads(manifest_path(embeds).read_text()) | {"model": None, "settings": None}
    manifest_path(embeds).write_text(json.dumps(manifest))
    place = build(embeds, tmp_path / "index").folder
    with pytest.raises(ModelError, match="give model_name"):
        search(place, "pan")
    assert search(place, "warm wool blanket", model_name=str(tiny_bert))["id"].iloc[0] == "p3"


def test_query_prompt_changes_the_scores(folder):
    plain, prompted = search(folder, "pan"), search(folder, "pan", query_prompt="query: ")
    assert plain["score"].iloc[0] != prompted["score"].iloc[0]


def test_another_model_than_the_index_s_is_refused(folder, tiny_models, tmp_path):
    with pytest.raises(ModelError, match="their vectors cannot be compared"):
        search(folder, "pan", model_name=str(tiny_models("xlm-r")))
    queries = tmp_path / "q.jsonl"
    queries.write_text('{"text": "pan"}\n')
    knobs = {"queries_path": str(queries), "model_name": str(tiny_models("xlm-r"))}
    with pytest.raises(ModelError, match="their vectors cannot be compared"):
        build(tmp_path / "embeds.txt", tmp_path / "other", **knobs)
    assert not (tmp_path / "other").exists()


def test_without_a_manifest_model_name_is_needed(embeds, tmp_path, tiny_models, tiny_bert):
    manifest_path(embeds).unlink()
    place = build(embeds, tmp_path / "index").folder
    with pytest.raises(ModelError, match="give model_name"):
        search(place, "pan")
    assert search(place, "warm wool blanket", model_name=str(tiny_bert))["id"].iloc[0] == "p3"


def test_a_model_of_fewer_dimensions_is_refused(tmp_path, tiny_bert):
    place = tmp_path / "wide.npy"
    write_embeddings(place, {"id": ["a", "b"]}, np.eye(2, 48, dtype=np.float32))
    folder = build(place, tmp_path / "index").folder
    with pytest.raises(ModelError, match=r"48 dimensions, .* makes 32"):
        search(folder, "pan", model_name=str(tiny_bert))


def test_queries_are_not_cut_to_fit_vectors_of_an_unknown_model(tmp_path, tiny_bert):
    place = tmp_path / "narrow.npy"
    write_embeddings(place, {"id": ["a", "b"]}, np.eye(2, dtype=np.float32))
    folder = build(place, tmp_path / "index").folder
    with pytest.raises(ModelError, match=r"2 dimensions, .* makes 32"):
        search(folder, "pan", model_name=str(tiny_bert))


def test_error_names_a_missing_model(folder):
    with pytest.raises(ModelError, match="no-such-model is not a folder here"):
        search(folder, "pan", model_name="no-such-model")


def test_recall_is_measured_on_given_queries(embeds, tmp_path):
    queries = tmp_path / "q.csv"
    queries.write_text("question,n\nfrying pan,1\nfrying pan,2\nwool,3\n")
    for most in (2, 1):
        built = build(embeds, tmp_path / "index", queries_path=str(queries), measure_queries=most)
        assert f"; {most} real queries" in built.tables["settings"].attrs["title"]


def test_rows_are_added_and_deleted(folder, tiny_bert, tmp_path, tiny_models):
    more = embedding_file(
        tmp_path / "more.parquet", tiny_bert, ["cast iron pan", "wool socks"], ["kitchen", "shoes"], 6
    )
    assert search(folder, "cast iron pan")["score"].iloc[0] < 0.999
    assert add_rows(folder, more) == 8
    assert search(folder, "cast iron pan")["id"].iloc[0] == "p6"
    assert delete_rows(folder, ["p6", "p0"]) == 6
    assert delete_rows(folder, "p1") == 5
    left = set(search(folder, "cast iron pan", 99)["id"])
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
    with pytest.raises(ConfigError, match="None is not an id"):
        delete_rows(folder, ["p2", None])
    assert delete_rows(folder, np.int64(7), "_row") == 4  # the numbers of added rows go on
    assert len(open_index(folder)) == 4
    build_faiss_index({"preset": str(folder / "index_config.yaml"), "output_dir": str(folder)})
    assert len(open_index(folder)) == 6  # a build starts afresh


def test_new_rows_made_with_other_settings_are_refused(tmp_path, tiny_bert, caplog):
    made = {"prompt": "", "max_seq_length": 64, "precision": "float32"}

    def file(name, **settings):
        path = embedding_file(tmp_path / name, tiny_bert)
        manifest = json.loads(manifest_path(path).read_text())
        manifest_path(path).write_text(json.dumps(manifest | {"settings": made | settings}))
        return path

    folder = build(file("first.txt"), tmp_path / "index").folder
    with pytest.raises(ModelError, match=r"prompt '', not 'passage: '"):
        add_rows(folder, file("prompted.txt", prompt="passage: "))
    with pytest.raises(ModelError, match="max_seq_length 64, not 8"):
        add_rows(folder, file("short.txt", max_seq_length=8))
    assert len(open_index(folder)) == 6
    assert add_rows(folder, file("rounded.txt", precision="bfloat16")) == 12
    assert "precision 'float32', not 'bfloat16'" in caplog.text


@pytest.fixture
def query_adapter(tmp_path, tiny_bert) -> Path:
    """A model fine-tuned for queries only: its documents are those of its base, tiny_bert."""
    from ebr_lib.finetune.saving import make_contract, save_adapter
    from ebr_lib.model.adapters import add_lora
    from ebr_lib.model.loading import load_model

    model, identity = load_model(str(tiny_bert), device="cpu"), identify(str(tiny_bert))
    add_lora(model, r=2, alpha=4, dropout=0.0)
    save_adapter(model, tmp_path / "adapter", identity, make_contract(model, identity, adapter_side="query"))
    return tmp_path / "adapter"


def test_query_only_adapter_and_its_base_share_document_vectors(tmp_path, tiny_bert, tiny_models, query_adapter):
    by_base, by_adapter = (
        embedding_file(tmp_path / "a.txt", tiny_bert),
        embedding_file(tmp_path / "b.txt", query_adapter),
    )
    for first, second in ((by_base, by_adapter), (by_adapter, by_base)):
        folder = build(first, tmp_path / "index").folder
        assert add_rows(folder, second) == 12
        assert len(search(folder, "pan", model_name=str(query_adapter)))
    with pytest.raises(ModelError, match="encode the new rows with the index's model"):
        add_rows(folder, embedding_file(tmp_path / "c.txt", tiny_models("xlm-r")))


def test_queries_are_encoded_in_the_precision_of_the_index(embeds, tmp_path, monkeypatch):
    manifest = json.loads(manifest_path(embeds).read_text())
    manifest_path(embeds).write_text(json.dumps(manifest | {"settings": {"precision": "float32"}}))
    folder = build(embeds, tmp_path / "index").folder
    asked = []
    encoder = EncoderSpec.encoder
    monkeypatch.setattr(EncoderSpec, "encoder", lambda self, side: asked.append(self.precision) or encoder(self, side))
    search(folder, "pan")
    assert asked == ["float32"]


def test_a_failed_build_loses_nothing(folder, tmp_path):
    before = (folder / "index.faiss").read_bytes()
    for error, reason, knobs in (
        (ConfigError, r"dimensions \(could not parse index string nonsense\); use auto", {"kind": "nonsense"}),
        (DataError, "cannot train 64 cells", {"kind": "IVF64,Flat"}),
        (DataError, "sku", {"id_column": "sku"}),
    ):
        with pytest.raises(error, match=reason):
            build(tmp_path / "embeds.txt", folder, **knobs)
    assert (folder / "index.faiss").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_full_disk_names_the_folder_and_loses_nothing(folder, tiny_bert, tmp_path, monkeypatch):
    before = index_stamp(folder)
    more = embedding_file(tmp_path / "more.txt", tiny_bert, first=6)

    def full(index, place):
        Path(place).write_bytes(b"half")
        raise RuntimeError(f"write error in {place}: 4 != 776 (No space left on device)")

    monkeypatch.setattr("faiss.write_index", full)
    for change in (lambda: add_rows(folder, more), lambda: build(more, folder)):
        with pytest.raises(DataError, match=r"index: the disk is full \(No space left on device\); what was there"):
            change()
        assert index_stamp(folder) == before and not (folder / BUILDING).exists()


def test_folder_with_other_files_is_not_replaced(embeds, tmp_path):
    with pytest.raises(ConfigError, match=r"holds other files \(embeds\.txt, embeds\.txt\.json"):
        build(embeds, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        build(embeds, embeds)
    with pytest.raises(ConfigError, match="cannot be made"):
        build(embeds, embeds / "index")
    assert embeds.is_file()


@pytest.mark.parametrize("name", [".gitignore", ".git", ".env"])
def test_folder_with_hidden_files_is_not_replaced(folder, embeds, name):
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds other files \({name}\)"):
        build(embeds, folder)
    assert (folder / name).read_text() == "mine"


def test_leftovers_of_a_killed_run_do_not_stop_a_build(folder, embeds):
    (folder / ".deleted.npy.4711.new").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    build(embeds, folder)
    (folder / ".notes.txt.4711.new").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds other files"):
        build(embeds, folder)


def test_file_without_any_vector_is_refused_for_every_kind(tmp_path):
    place = tmp_path / "e.npy"
    write_embeddings(place, {"id": list("abcd")}, np.full((4, 8), np.nan, dtype=np.float32))
    manifest_path(place).write_text(json.dumps({"rows": {"written": 4}, "settings": {"dimension": 8}, "dimension": 8}))
    for kind in ("Flat", "IVF1,Flat"):
        with pytest.raises(DataError, match="holds no vectors"):
            build(place, tmp_path / "i", kind=kind)


@pytest.mark.parametrize("name", ["index.faiss", "rows.arrow", "manifest.json", "deleted.npy"])
def test_error_names_a_truncated_file(folder, name):
    delete_rows(folder, "p1")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        search(folder, "pan")
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=name):
        search(folder, "pan")
    (folder / name).unlink()
    if name == "deleted.npy":
        assert len(search(folder, "pan")) == 6
        return
    with pytest.raises((DataError, MissingError), match=name):
        search(folder, "pan")


def test_deleted_rows_of_another_index_are_refused(folder):
    np.save(folder / "deleted.npy", np.array([6]))
    with pytest.raises(DataError, match=r"deleted\.npy names rows that the index does not have"):
        search(folder, "pan")


def test_new_rows_with_known_ids_are_counted(folder, tiny_bert, tmp_path, caplog):
    delete_rows(folder, "p3")
    more = embedding_file(tmp_path / "more.txt", tiny_bert, TEXTS[:3], KINDS[:3], 2)
    assert add_rows(folder, more) == 8
    assert "ids in the index already: 2 of the new rows (column id)" in caplog.text  # p2, p4


def test_rows_of_another_index_are_refused(folder, tmp_path):
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, np.eye(2, 32, dtype=np.float32))
    other = build(tmp_path / "two.npy", tmp_path / "o").folder
    shutil.copy(other / "rows.arrow", folder / "rows.arrow")
    with pytest.raises(DataError, match="6 vectors, 2 rows of columns"):
        search(folder, "pan")


def test_knobs_change_the_index(tmp_path):
    many = tmp_path / "many.npy"
    np.save(many, np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32))

    def built(**knobs):
        base = {"kind": "HNSW8", "measure_queries": 100, "target_recall": 0.999}
        return build(many, tmp_path / "i", **base | knobs)

    plain = built()
    assert built(ef_construction=400).points[0].recall > plain.points[0].recall
    assert built(target_recall=0.5).chosen.setting < plain.chosen.setting
    other = built(seed=7)
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
    assert "use column=value" in capsys.readouterr().err
    assert main(["index", "--embedding_path", str(tmp_path / "none.txt")]) == 2
