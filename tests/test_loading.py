"""Models are found, loaded, and refused with a sentence that says what to do."""

import shutil

import numpy as np
import pytest

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


def test_a_folder_whose_parts_cannot_be_read_is_named(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[{")
    with pytest.raises(ModelError, match="does not load as a sentence-transformers model"):
        load_model(str(tmp_path / "model"), device="cpu")
