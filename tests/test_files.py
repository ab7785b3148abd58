"""Output places are checked before any work, and a full disk loses nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ebr_lib.errors import ConfigError, DataError
from ebr_lib.files import check_output_file, written_whole
from ebr_lib.finetune.run import train_sentence_transformer
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.visualize.run import visualize_embeddings


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        (train_sentence_transformer, {"output_dir": "file/models"}),
        (run_batch_inference, {"output_path": "file/e.txt"}),
        (visualize_embeddings, {"output_path": "file/map.png"}),
    ],
)
def test_an_output_folder_that_cannot_be_made_is_the_first_error(tmp_path: Path, monkeypatch, stage, knobs: dict):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"output folder file\S* cannot be made"):
        stage(knobs)  # the input does not exist either, which would be the next error


def test_the_folder_of_an_output_file_is_made_and_a_folder_in_its_place_refused(tmp_path: Path):
    check_output_file(tmp_path / "new" / "folder" / "e.txt")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_output_file(tmp_path / "new")


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error in write_index: write error in /a/index.faiss: 3842 != 10240 (No space left on device)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_an_error_with_the_place_and_loses_nothing(tmp_path: Path, raised: Exception):
    place = tmp_path / "out.txt"
    place.write_text("before")
    said = r"out\.txt: the disk is full .*; what was there before stays\. Make room"
    with pytest.raises(DataError, match=said), written_whole(place) as new:
        new.write_text("half")
        raise raised
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"] and place.read_text() == "before"
    with pytest.raises(OSError, match="another"), written_whole(place):
        raise OSError(errno.EACCES, "another fault")
