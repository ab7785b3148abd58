"""Models are found, loaded, and refused with a sentence that says what to do."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.model.loading import find_model, load_model, packaged_model


def test_packaged_model_is_the_original():
    assert (packaged_model() / "modules.json").is_file()
    assert find_model("all-MiniLM-L6-v2") == str(packaged_model())


def test_missing_folder_says_where_it_looked():
    with pytest.raises(MissingError, match=r"no such folder.*nothing-here.*packaged all-MiniLM-L6-v2"):
        load_model("./model/nothing-here")


def test_unreachable_hub_says_what_to_do():
    with pytest.raises(ModelError, match="check the name and the network"):
        load_model("nobody/no-such-model")


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "modernbert", "qwen2"])
def test_every_shape_loads_and_encodes(tiny_models, kind):
    vectors = load_model(str(tiny_models(kind)), device="cpu").encode(["hello 南瓜", "x"])
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_remote_code_is_off_and_the_error_names_the_knob(tiny_models):
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(str(tiny_models("kalm")), device="cpu")


def test_remote_code_runs_when_allowed_and_looks_both_ways(tiny_models):
    import torch

    model = load_model(str(tiny_models("kalm")), trust_remote_code=True, device="cpu")
    assert type(model[0].model).__name__ == "TinyKalmModel"
    features = model.preprocess(["a b c d", "a b c e"])
    with torch.no_grad():
        states = model[0](dict(features))["token_embeddings"]
    # a causal model could not let the last word change the first token's state
    assert (states[0, 0] - states[1, 0]).abs().max() > 1e-6


# --- what may be loaded -------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def pickled(tiny_bert, tmp_path) -> Path:
    """The tiny model with its weights as a pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_and_the_error_tells_how_to_convert_them(pickled, tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle.*use_safetensors=False") as refused:
        load_model(str(pickled), device="cpu")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*?)" and give that folder', str(refused.value))[1])
    converted = load_model("./pickled-safetensors", device="cpu")
    wanted = load_model(str(tiny_bert), device="cpu")
    assert np.array_equal(converted.encode(["hello 南瓜"]), wanted.encode(["hello 南瓜"]))


@pytest.mark.parametrize(
    "place", ["2_Dense/pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_a_pickle_in_the_stead_of_safetensors_is_not_opened(tiny_bert, tmp_path, place):
    folder, mark = tmp_path / "model", tmp_path / "opened"
    shutil.copytree(tiny_bert, folder)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(pickle.dumps(Bomb(mark)))
    if place.startswith("pytorch_model"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=re.escape(place.rpartition("/")[2])):
        load_model(str(folder), device="cpu")
    assert not mark.exists()


def test_a_folder_whose_parts_cannot_be_read_is_named(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[{")
    with pytest.raises(ModelError, match="does not load as a sentence-transformers model"):
        load_model(str(tmp_path / "model"), device="cpu")


def test_pickles_that_nothing_loads_do_no_harm(tiny_bert, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "opened"
    shutil.copytree(tiny_bert, folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    load_model(str(folder), device="cpu")
    assert not mark.exists()


def test_a_model_that_sees_pictures_reads_their_paths_as_texts(tiny_bert, tmp_path):
    folder, picture = tmp_path / "model", tmp_path / "cat.png"
    shutil.copytree(tiny_bert, folder)
    picture.write_bytes(b"not for the model")
    texts = [str(picture), "https://example.invalid/cat.jpg"]
    wanted = load_model(str(folder), device="cpu").encode(texts)
    place = folder / "sentence_bert_config.json"
    config = json.loads(place.read_text())
    config["modality_config"]["image"] = config["modality_config"]["text"]
    place.write_text(json.dumps(config))
    assert np.array_equal(load_model(str(folder), device="cpu").encode(texts), wanted)
