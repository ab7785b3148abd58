"""An exported folder and its graphs give the model's vectors in other engines, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from ebr_lib import export_model, extras, verify_endpoint
from ebr_lib.errors import ConfigError, ModelError, NotInstalledError
from ebr_lib.export import run
from ebr_lib.model.contract import read_contract
from ebr_lib.model.loading import load_model
from ebr_lib.model.served import served_folder
from tests.models import adapted, build_shape

TEXTS = ["query: warm blanket", "query: 热水器不出热水怎么办", "query: " + "steel pan " * 200]


@pytest.fixture(scope="module")
def trained(tiny_models, tmp_path_factory) -> Path:
    return adapted(tiny_models("one_layer"), tmp_path_factory.mktemp("trained") / "shop-peft-lora")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "shop"
    return export_model({"model_name": str(trained), "output_dir": str(folder), "graphs": ["openvino", "onnx"]})


@pytest.fixture(scope="module")
def wanted(trained) -> np.ndarray:
    return load_model(str(trained), device="cpu").encode(TEXTS)


def test_sentence_transformers_alone_gives_the_vectors(exported, wanted):
    model = SentenceTransformer(str(exported.folder), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS, prompt=""), wanted, atol=1e-5)
    assert model.max_seq_length == 128 and model.prompts == {"query": "query: ", "document": "passage: "}
    assert read_contract(exported.folder).merged
    assert list(exported.distances) == ["sentence-transformers", "openvino", "onnx"]
    assert max(exported.distances.values()) < 1e-4


def test_the_onnx_graph_gives_the_vectors_in_onnxruntime(exported, wanted):
    """Another engine than the one that checked it, and padding on the right as TEI does."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported.folder / "onnx" / "model.onnx")
    tokenizer = Tokenizer.from_file(str(exported.folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    encoded = tokenizer.encode_batch(TEXTS)
    states, vectors = session.run(
        ["last_hidden_state", "sentence_embedding"],
        {
            "input_ids": np.array([text.ids for text in encoded]),
            "attention_mask": np.array([text.attention_mask for text in encoded]),
        },
    )
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)
    assert states.shape == (3, 128, 32)


@pytest.mark.parametrize("graph", ["openvino", "onnx"])
def test_a_graph_alone_with_its_tokenizer_is_verified(exported, trained, tmp_path, graph):
    for file in ("tokenizer.json", "sentence_bert_config.json"):
        (tmp_path / file).write_bytes((exported.folder / file).read_bytes())
    for file in (exported.folder / graph).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    knobs = {"target": str(tmp_path), "model_name": str(trained), "sides": ["query"]}
    assert verify_endpoint(knobs).is_same
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}', encoding="utf-8")
    assert verify_endpoint(knobs).causes == ("truncation length 32 (the model was trained with 128)",)
    (tmp_path / "sentence_bert_config.json").unlink()
    with pytest.raises(ModelError, match="says where texts are cut"):
        verify_endpoint(knobs)


def test_tei_finds_its_length_and_pooling(exported):
    """Its configs are read with `max_seq_length` and the four switches required."""
    assert json.loads((exported.folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 128
    pooling = json.loads((exported.folder / "1_Pooling" / "config.json").read_text())
    switches = {name: value for name, value in pooling.items() if name.startswith("pooling_mode_")}
    assert [name for name, value in switches.items() if value] == ["pooling_mode_mean_tokens"] and len(switches) == 6


def test_the_commands_name_the_folder_pooling_and_length(exported):
    assert set(exported.commands) == {"TEI", "vLLM", "verify", "vLLM, verify"}
    assert f"--model-id {exported.folder}" in exported.commands["TEI"] and "--pooling mean" in exported.commands["TEI"]
    assert "--max-model-len 128" in exported.commands["vLLM"]


def test_a_plain_model_and_one_without_a_graph(tiny_models, tmp_path):
    result = export_model({"model_name": str(tiny_models("last_token")), "output_dir": str(tmp_path / "a")})
    assert "--pooling last-token" in result.commands["TEI"]
    knobs = {"model_name": str(tiny_models("static")), "output_dir": str(tmp_path / "b")}
    assert export_model(knobs).commands == {}
    with pytest.raises(ModelError, match="has no graph"):
        export_model(knobs | {"output_dir": str(tmp_path / "c"), "graphs": ["openvino"]})
    assert not (tmp_path / "c").exists()


def test_each_tower_is_exported_by_itself(tmp_path, caplog):
    towers = build_shape("towers", tmp_path / "towers")
    for side in ("query", "document"):
        knobs = {"model_name": str(towers), "output_dir": str(tmp_path / side), "side": side}
        assert max(export_model(knobs).distances.values()) < 1e-4
        assert f"only the {side} side was exported" in caplog.text


def test_nothing_is_kept_that_gives_other_vectors(trained, tmp_path, monkeypatch):
    def wrong(folder, part):
        encode = served_folder(folder, part)
        return lambda texts: 2 * encode(texts)

    monkeypatch.setattr(run, "served_folder", wrong)
    with pytest.raises(ModelError, match="gives other vectors than the model, and was not kept; likely cause: normal"):
        export_model({"model_name": str(trained), "output_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_and_packages_that_are_missing(trained, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds something else than an export"):
        export_model({"model_name": str(trained), "output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="would replace the input"):
        export_model({"model_name": str(trained), "output_dir": str(trained)})
    extras.require.cache_clear()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match=r"pip install 'ebr-workflow\[onnx\]'"):
        export_model({"model_name": str(trained), "output_dir": str(tmp_path / "o"), "graphs": ["onnx"]})
    extras.require.cache_clear()
