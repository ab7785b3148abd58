"""Where a stage is to write is looked at before its work: a place that cannot be is one line, and comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebr_lib.errors import ConfigError
from ebr_lib.files import check_output_file
from ebr_lib.finetune import train_sentence_transformer
from ebr_lib.inference import run_batch_inference
from ebr_lib.visualize import visualize_embeddings


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        (train_sentence_transformer, {"output_dir": "file/models"}),
        (run_batch_inference, {"output_path": "file/e.txt"}),
        (visualize_embeddings, {"output_path": "file/map.png"}),
    ],
)
def test_a_folder_that_a_file_stands_in_the_way_of_is_told_first(tmp_path: Path, monkeypatch, stage, knobs: dict):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"output folder file\S* cannot be made"):
        stage(knobs)  # nor is there any input here, which comes after


def test_an_output_file_needs_a_folder_and_no_folder_in_its_place(tmp_path: Path):
    check_output_file(tmp_path / "new" / "folder" / "e.txt")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_output_file(tmp_path / "new")
