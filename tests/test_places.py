"""Odd places: outputs that would replace inputs, terminals without Chinese, machines without a HOME."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import read_embeddings, write_embeddings
from ebr_lib.errors import ConfigError
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.files import check_apart, written_whole
from ebr_lib.finetune.run import train_sentence_transformer
from ebr_lib.index.run import build_faiss_index
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.logs import logger, show_logs
from ebr_lib.visualize import projection
from ebr_lib.visualize.config import VisConfig
from ebr_lib.visualize.run import visualize_embeddings


@pytest.fixture
def embeddings(tmp_path) -> Path:
    place = tmp_path / "e.txt"
    write_embeddings(place, {"id": list("abcd")}, np.eye(4, 8, dtype=np.float32))
    manifest_path(place).write_text('{"rows": {"written": 4}}', encoding="utf-8")
    return place


# --- outputs and inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["e.txt.png", "./sub/../e.txt.PNG", "linked/e.txt.svg", "hard.png"])
def test_the_files_beside_a_picture_do_not_replace_the_manifest(embeddings, tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("linked").symlink_to(tmp_path)
    os.link("e.txt.json", "hard.json")
    before = manifest_path(embeddings).read_bytes()
    with pytest.raises(ConfigError, match=r"would replace the input e\.txt\.json"):
        visualize_embeddings({"embedding_path": "e.txt", "output_path": spelled})
    assert manifest_path(embeddings).read_bytes() == before


def test_nor_the_preset_that_was_given(embeddings, tmp_path):
    preset = tmp_path / "map.yaml"
    preset.write_text("# mine\nseed: 3\n", encoding="utf-8")
    config = {"embedding_path": str(embeddings), "output_path": str(tmp_path / "map.png"), "preset": str(preset)}
    with pytest.raises(ConfigError, match=r"would replace the input .*map\.yaml"):
        visualize_embeddings(config)
    VisConfig.resolve(config).save(preset)
    assert VisConfig.resolve(config).presets == []  # a run's own config repeats it


def test_no_stage_writes_over_its_input(embeddings, tmp_path):
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"would replace the input .*report\.json"):
        evaluate_retrieval({"data_path": str(tmp_path / "report.json"), "output_dir": str(tmp_path)})
    inside = tmp_path / "models" / "m-peft-lora" / "mined_negatives.jsonl"
    inside.parent.mkdir(parents=True)
    inside.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"would replace the input .*mined_negatives\.jsonl"):
        train_sentence_transformer(
            {"model_name": "m", "data_path": str(inside), "output_dir": str(tmp_path / "models")}
        )
    preset = tmp_path / "out.txt.yaml"
    preset.write_text("precision: float32", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)would replace the input .*out\.txt\.yaml"):
        run_batch_inference({"preset": str(preset), "output_path": str(tmp_path / "out.txt")})
    folder = tmp_path / "index"
    folder.mkdir()
    shutil.copy(embeddings, folder / "deleted.npy")
    with pytest.raises(ConfigError, match=r"would replace the input .*deleted\.npy"):
        build_faiss_index({"embedding_path": str(folder / "deleted.npy"), "output_dir": str(folder)})


def test_what_is_apart_may_be_written(tmp_path):
    (tmp_path / "in.txt").touch()
    check_apart([tmp_path / "out.txt", tmp_path / "sub"], [tmp_path / "in.txt", None, (str(tmp_path / "none"),)])


# --- what a killed run left ---------------------------------------------------------------------------------------


def test_the_next_run_removes_what_killed_ones_left(tmp_path):
    ended, alive = 2**22 + 1, os.getppid()
    place = tmp_path / "r.json"
    left = [tmp_path / f".r.json.{ended}.new", tmp_path / f".r.json.elsewhere-{ended}.new"]
    others = [tmp_path / f".r.json.{alive}.new", tmp_path / f".q.json.{ended}.new"]
    for file in (*left, *others):
        file.write_text("half", encoding="utf-8")
    with written_whole(place) as new:
        new.write_text("1", encoding="utf-8")
    assert [file.exists() for file in (*left, *others)] == [False, True, True, True]
    os.utime(left[1], (0, 0))  # of another machine: after a day of silence
    with written_whole(place) as new:
        new.write_text("2", encoding="utf-8")
    assert not left[1].exists() and place.read_text(encoding="utf-8") == "2"


def test_a_folder_whose_replacement_was_killed_goes_back_to_its_place(tmp_path):
    old = tmp_path / f".model.{2**22 + 1}.old"
    old.mkdir()
    (old / "weights").touch()
    with pytest.raises(RuntimeError), written_whole(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").exists() and not old.exists()


def test_the_encoding_stage_writes_through_a_link_too(tmp_path, tiny_bert):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "e.npy"
    link.symlink_to(tmp_path / "disk" / "e.npy")
    (tmp_path / "in.csv").write_text("id\x01description\n1\x01pan\n", encoding="utf-8")
    run_batch_inference({"model_name": str(tiny_bert), "data_path": str(tmp_path / "in.csv"), "output_path": str(link)})
    assert link.is_symlink() and read_embeddings(link).columns["id"] == ["1"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "e.npy", "in.csv"]


def test_links_are_written_through(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "file")
    for _ in range(2):
        with written_whole(tmp_path / "out") as new:
            new.write_text("1", encoding="utf-8")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "file").read_text(encoding="utf-8") == "1"
    monkeypatch.chdir(tmp_path / "disk")
    with written_whole(".") as new:
        new.mkdir()
    assert list((tmp_path / "disk").iterdir()) == []


# --- terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii", "utf-8"])
def test_a_terminal_of_any_encoding_shows_any_line(encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    show_logs()
    logger.info("训练集大小: 640 ✓ → ü \udcff")
    err.write("训练 ✓ ü")
    out.flush()
    err.flush()
    assert b": 640 " in out.buffer.getvalue() and err.buffer.getvalue()
    logging.getLogger("ebr_lib").handlers.clear()


# --- no home ------------------------------------------------------------------------------------------------------


def test_umap_loads_where_numba_can_keep_nothing(monkeypatch):
    """As in a container: site-packages and HOME cannot be written to, or there is no HOME."""
    import numba

    loaded = projection.importlib.import_module
    tried: list[str] = []

    def refuses(name):
        if name == "umap":
            tried.append(numba.config.CACHE_DIR)
            if not numba.config.CACHE_DIR:
                raise RuntimeError("cannot cache function 'f': no locator available for file 'umap.py'")
            return "umap"
        return loaded(name)

    monkeypatch.setattr(projection.importlib, "import_module", refuses)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert projection._imported_umap() == "umap"
    assert tried[0] == "" and Path(tried[1]).is_dir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(projection, "has_home", lambda: False)
    assert projection._imported_umap() == "umap"
    assert len(tried) == 3 and Path(tried[2]).is_dir()


def test_the_columns_beside_a_linked_array_are_found(tmp_path):
    (tmp_path / "there").mkdir()
    place = tmp_path / "e.npy"
    write_embeddings(place, {"id": list("abcd")}, np.eye(4, 8, dtype=np.float32))
    link = tmp_path / "there" / "e.npy"
    link.symlink_to(place)
    assert read_embeddings(link).columns == {"id": list("abcd")}
