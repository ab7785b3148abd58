"""Models of ModelScope: its own client downloads from a stand-in of its server, and the names lead back to it."""

import hashlib
import json
import logging
import re
import shutil
import urllib.parse
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from ebr_lib import check_configs, extras
from ebr_lib.errors import ConfigError, MissingError, ModelError
from ebr_lib.model import hubs
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.contract import read_contract
from ebr_lib.model.handover import Handover
from ebr_lib.model.loading import load_model
from ebr_lib.model.packaged import find_model, local_folder, model_label
from ebr_lib.model.pickles import to_safetensors
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec
from tests.models import adapted, build_shape, edit_json
from tests.servers import as_json, serving

NAME = "modelscope:shop/tiny.1-bert"
TEXTS = ["red shoes", "热水器 heater"]


class Shelf:
    """Answers as ModelScope's server does about the folders in it, and lists the files that were asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.sent, self.is_down, self.refused = folders, [], False, set[str]()

    def __call__(self, path, body, headers):
        parts = urllib.parse.urlsplit(path)
        asked = dict(urllib.parse.parse_qsl(parts.query))
        folder = self.folders.get(parts.path.removeprefix("/api/v1/models/").rpartition("/repo")[0])
        if folder is None or self.is_down:
            return as_json({"Code": 404, "Message": "no such model"}, 404)
        if parts.path.endswith("/repo/files"):
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            listed = [
                {
                    "Path": file.relative_to(folder).as_posix(),
                    "Size": file.stat().st_size,
                    "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "Type": "blob",
                }
                for file in files
            ]
            return as_json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        if asked["FilePath"] in self.refused:
            return as_json({"Code": 404, "Message": "no such file"}, 404)
        self.sent.append(asked["FilePath"])
        return 200, "application/octet-stream", (folder / asked["FilePath"]).read_bytes()


@pytest.fixture
def shelf(tiny_bert, tmp_path, monkeypatch):
    """ModelScope, with a model; its cache is empty."""
    from modelscope_hub import HubConfig, set_default_config
    from modelscope_hub.config import get_default_config

    before, found = get_default_config(), Shelf({"shop/tiny.1-bert": tiny_bert})
    with serving(found) as url:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        set_default_config(HubConfig())
        yield found
    set_default_config(before)
    hubs.ask_hub("auto")
    hubs._elsewhere.clear()


def vectors(name: str):
    return load_model(name, device="cpu").encode(TEXTS)


def test_a_model_of_modelscope_is_downloaded_once_and_loads(shelf, tiny_bert, caplog):
    with caplog.at_level(logging.INFO, "ebr_lib"):
        found = vectors(NAME)
    np.testing.assert_array_equal(found, vectors(str(tiny_bert)))
    assert "asking ModelScope" in caplog.text and model_label(NAME) == "tiny.1-bert"
    assert shelf.sent[-1].endswith("model.safetensors") and shelf.sent.count("config.json") == 1
    sent = list(shelf.sent)
    shelf.is_down = True
    np.testing.assert_array_equal(vectors(NAME), found)
    assert shelf.sent == sent


def test_an_adapter_finds_its_base_on_modelscope_again(shelf, tiny_bert, tmp_path):
    folder = adapted(NAME, tmp_path / "saved")
    before = vectors(str(folder))
    assert read_contract(folder).base_model == identify(str(folder)).base_model == NAME
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert Path(config["base_model_name_or_path"]) == local_folder(NAME)  # which PEFT alone can load
    shutil.move(tmp_path / "cache", tmp_path / "gone")
    np.testing.assert_array_equal(vectors(str(folder)), before)
    assert shelf.sent.count("model.safetensors") == 2
    edit_json(folder / "ebr_contract.json", base_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"trained on modelscope:shop/tiny\.1-bert with weights of sha256 0000"):
        vectors(str(folder))


def test_the_knob_sends_bare_names_to_modelscope_and_folders_stay_folders(shelf, tmp_path, monkeypatch):
    look_for_models(None, "modelscope")
    monkeypatch.chdir(tmp_path)
    Path("shop/here").mkdir(parents=True)
    assert find_model("shop/tiny.1-bert") == NAME and find_model("all-MiniLM-L6-v2").startswith("/")
    assert find_model("shop/here") == str(tmp_path / "shop" / "here")
    vectors("shop/tiny.1-bert")
    assert identify("shop/tiny.1-bert").name == NAME
    assert EncoderSpec("shop/tiny.1-bert").hub == "modelscope"  # other processes ask there too
    look_for_models(None, "huggingface")
    assert find_model("shop/tiny.1-bert") == "shop/tiny.1-bert" and find_model(NAME) == NAME


def test_auto_asks_modelscope_where_hugging_face_cannot_be_reached(shelf, monkeypatch, caplog):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    raised = LocalEntryNotFoundError("no network")

    def fails(name, **which):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ModelError, match=r"Hugging Face did not provide it \(no network\)"):
        load_model("shop/tiny.1-bert", device="cpu")  # HF_HUB_OFFLINE: no hub is asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with caplog.at_level(logging.INFO, "ebr_lib"):
        load_model("shop/tiny.1-bert", device="cpu")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert re.search(r"asking Hugging Face.*\n.*cannot be reached.*\n.*asking ModelScope", said)
    assert identify("shop/tiny.1-bert").name == NAME
    look_for_models(None, "huggingface")
    with pytest.raises(ModelError, match="Hugging Face did not provide"):
        load_model("shop/tiny.1-bert", device="cpu")
    hubs._elsewhere.clear()
    look_for_models(None, "auto")
    raised = RepositoryNotFoundError("404 no such repository", response=Mock())
    with pytest.raises(ModelError, match=r"Hugging Face did not provide it \(404"):
        load_model("shop/tiny.1-bert", device="cpu")  # it was reached, and has no such model


def test_a_download_that_was_interrupted_goes_on(shelf, monkeypatch):
    hubs.fetch_configs(NAME)
    assert "model.safetensors" not in shelf.sent and hubs.cached(NAME) is not None
    shelf.is_down = True
    with pytest.raises(ModelError, match=r"ModelScope did not provide it"):
        vectors(NAME)
    shelf.is_down = False
    assert vectors(NAME).shape == (2, 32)


@pytest.mark.parametrize("cut", ["model.safetensors", "2_Dense/model.safetensors"])
def test_weights_of_one_module_alone_are_not_the_weights(shelf, tmp_path, cut):
    shelf.folders["shop/tiny.1-bert"] = whole = build_shape("dense", tmp_path / "dense")
    expected = vectors(str(whole))
    vectors(NAME)
    (hubs.cached(NAME) / cut).unlink()  # the download ended before it
    np.testing.assert_array_equal(vectors(NAME), expected)


def test_configs_are_whole_before_weights_come(shelf):
    hubs.fetch_configs(NAME)
    (hubs.cached(NAME) / "modules.json").unlink()  # without it, any model would be one with mean pooling
    shelf.refused.add("modules.json")
    with pytest.raises(hubs.HubError):
        hubs.fetch_weights(NAME)
    assert not list(hubs.cached(NAME).glob("*.safetensors"))
    shelf.refused.clear()
    hubs.fetch_weights(NAME)
    assert (hubs.cached(NAME) / "modules.json").is_file()


def test_pickles_of_modelscope_are_refused_and_can_be_converted(shelf, tiny_bert, tmp_path):
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_bert, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    shelf.folders["shop/tiny.1-bert"] = pickled
    with pytest.raises(ModelError, match=r"what ModelScope holds is a pickle.*to_safetensors\('modelscope:shop"):
        vectors(NAME)
    converted = to_safetensors(NAME, str(tmp_path / "converted"))
    np.testing.assert_array_equal(vectors(str(converted)), vectors(str(tiny_bert)))


def test_mistakes_are_one_sentence(shelf, monkeypatch):
    with pytest.raises(ModelError, match=r"ModelScope did not provide it \(.*404.*check the name and the network, or"):
        load_model("modelscope:shop/none")
    for name in ("modelscope:bert", "modelscope:/b", "modelscope:../b", "modelscope:b/..", "modelscope:./."):
        with pytest.raises(MissingError, match=rf"{name}: .*OWNER/NAME"):
            load_model(name)
    assert not list(Handover().check_model("model_name", NAME))  # the check cell asks no hub
    extras.require.cache_clear()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    missing = r"model_name: .*modelscope; run: pip install 'ebr-workflow\[modelscope\]'"
    with pytest.raises(ConfigError, match=missing):
        check_configs(inference={"model_name": NAME}, run={"inference": True})
    extras.require.cache_clear()
