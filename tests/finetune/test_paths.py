"""Output paths: what a run would replace is checked before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebr_lib.errors import ConfigError
from ebr_lib.finetune.paths import Paths
from ebr_lib.model.provenance import identify


@pytest.fixture
def paths(tmp_path) -> Paths:
    return Paths(str(tmp_path / "out"), "models/bert")


def test_an_adapter_trained_further_keeps_one_suffix(tmp_path):
    assert Paths(str(tmp_path), "out/bert-peft-lora").adapter == tmp_path / "bert-peft-lora"


@pytest.mark.parametrize("name", ["adapter", "merged", "checkpoints"])
def test_a_file_at_the_place_of_the_output_is_refused(paths, name):
    place = getattr(paths, name)
    place.parent.mkdir()
    place.write_text("mine")
    with pytest.raises(ConfigError, match=f"{place.name} is a file"):
        paths.check([])
    assert place.read_text() == "mine"


def test_a_folder_that_is_not_our_model_is_refused(paths):
    notes = paths.adapter / "my_notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(ConfigError, match="holds no model of this stage"):
        paths.check([])


def test_an_input_is_not_replaced(paths):
    paths.checkpoints.mkdir(parents=True)
    with pytest.raises(ConfigError, match="would replace the input"):
        paths.check([None, [str(paths.checkpoints)]])


def test_a_model_of_another_base_is_not_replaced(paths, trained, tiny_models):
    paths.adapter = Path(trained.model_path)
    paths.check_base(identify(str(tiny_models("bert"))))
    with pytest.raises(ConfigError, match=r"trained from another base .* would be replaced; give another output_dir"):
        paths.check_base(identify(str(tiny_models("qwen2"))))
