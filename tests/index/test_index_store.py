"""An index that several processes use: changed by one at a time, read in one state, wherever its folder is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.index import store as index_store
from ebr_lib.index.change import add_rows, delete_rows
from ebr_lib.index.opened import open_index
from ebr_lib.index.run import build_faiss_index
from tests.children import add_again_and_again, build_again_and_again, ended, hold_an_index_and_be_killed, started

MADE_BY = {"dimension": 8, "model": {"name": "m", "sha256": "0"}}


def embedding_file(path: Path, axis: int, rows: int = 20) -> Path:
    """Rows that all point along one axis, and say so in their column."""
    vectors = np.random.default_rng(axis).normal(scale=0.1, size=(rows, 8)).astype(np.float32)
    vectors[:, axis] = 1
    write_embeddings(path, {"axis": [str(axis)] * rows, "id": [f"{axis}-{i}" for i in range(rows)]}, vectors)
    manifest_path(path).write_text(json.dumps(MADE_BY | {"rows": {"written": rows}}), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return [embedding_file(tmp_path / f"{axis}.npy", axis) for axis in (0, 1)]


@pytest.fixture
def folder(files, tmp_path) -> Path:
    return build(files[0], tmp_path / "index")


def build(embeddings: Path, folder: Path) -> Path:
    return build_faiss_index(
        {"embedding_path": str(embeddings), "output_dir": str(folder), "measure_queries": 2, "id_column": "id"}
    ).folder


def axis_of(held) -> int:
    """Which file an opened index is of, by each of its parts; they must agree."""
    says = {int(value) for value in held.rows.column("axis").to_pylist()}
    says |= set(np.argmax(held.index.reconstruct_n(0, held.index.ntotal), axis=1).tolist())
    (axis,) = says | {int(Path(held.manifest["embedding_path"]).stem)}
    return axis


def test_reader_sees_one_state_while_a_writer_replaces_it(folder, files):
    stop = folder.with_name("stop")
    writer = started(build_again_and_again, folder, files, stop)
    seen = [0]
    while writer.is_alive() and not stop.exists():
        seen.append(axis_of(open_index(folder)))
        if np.count_nonzero(np.diff(seen)) == 6:
            stop.touch()
    assert ended(writer) == [0]


def test_two_writers_lose_no_rows(folder, files):
    assert ended(*(started(add_again_and_again, folder, file, 4) for file in files)) == [0, 0]
    assert len(open_index(folder)) == 20 + 2 * 4 * 20


def test_lock_of_a_killed_process_is_free(folder, files, monkeypatch):
    assert ended(started(hold_an_index_and_be_killed, folder)) == [-9]
    monkeypatch.setattr(index_store, "WAIT_SECONDS", 0.1)
    assert delete_rows(folder, "0-0") == 19


def test_waiting_for_the_lock_is_logged_and_ends(folder, files, monkeypatch, caplog):
    monkeypatch.setattr(index_store, "WAIT_SECONDS", 0.2)
    with index_store.locked(folder), caplog.at_level("INFO", "ebr_lib"):
        for change in (lambda: add_rows(folder, files[1]), lambda: delete_rows(folder, "0-0")):
            with pytest.raises(ConfigError, match="another process has been changing the index"):
                change()
    assert "waiting" in caplog.text
    assert len(open_index(folder)) == 20


def test_next_writer_removes_or_finishes_what_a_killed_one_left(folder, files):
    """Killed while it wrote: the old state holds. Killed while it moved in: the new one does, for readers at once."""
    (folder / index_store.BUILDING).mkdir()
    (folder / index_store.BUILDING / "index.faiss").write_bytes(b"half")
    assert axis_of(open_index(folder)) == 0
    new = build(files[1], folder.with_name("new"))
    (new / index_store.LOCK).unlink()
    for name in ("index.faiss", "deleted.npy"):
        os.replace(new / name, folder / name)
    shutil.copytree(new, folder / index_store.READY)
    assert axis_of(open_index(folder)) == 1
    assert delete_rows(folder, "1-3") == 19
    assert not any((folder / name).exists() for name in (index_store.BUILDING, index_store.READY))
    assert axis_of(open_index(folder)) == 1
    build(files[0], folder)
    assert axis_of(open_index(folder)) == 0 and len(open_index(folder)) == 20


def test_failed_build_leaves_no_folder(files, tmp_path):
    with pytest.raises(ConfigError, match="not a Faiss factory string"):
        build_faiss_index({"embedding_path": str(files[0]), "output_dir": str(tmp_path / "new"), "kind": "nonsense"})
    assert not (tmp_path / "new").exists()
    with pytest.raises(MissingError):
        add_rows(tmp_path / "new", files[0])
    assert not (tmp_path / "new").exists()


def test_the_folder_may_be_a_link_or_the_current_one(files, tmp_path, monkeypatch):
    place, link = tmp_path / "disk" / "index", tmp_path / "link"
    place.mkdir(parents=True)
    link.symlink_to(place)
    build(files[0], link)
    assert link.is_symlink() and axis_of(open_index(place)) == 0
    monkeypatch.chdir(place)
    build(files[1], Path())
    assert axis_of(open_index(".")) == 1 and Path.cwd() == place
    assert add_rows(".", files[1]) == 40 and axis_of(open_index(link)) == 1


def test_an_embedding_file_may_be_a_link(files, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "there" / "1.npy"
    link.symlink_to(files[1])
    folder = build(link, tmp_path / "index")
    held = open_index(folder)
    assert held.manifest["model"]["sha256"] == "0" and axis_of(held) == 1


def test_unwritable_folder_is_refused_before_building(files, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ebr_lib.files.tempfile.TemporaryFile", refused)  # root may write anywhere
    monkeypatch.setattr("ebr_lib.index.run.new_index", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\)"):
        build(files[0], tmp_path / "index")


def test_added_rows_share_equal_vectors(folder, files, tmp_path):
    again = embedding_file(tmp_path / "again.npy", 0, 25)  # the first 20 are those of the index
    vectors = np.load(again)
    vectors[:20] = np.load(files[0])
    vectors[20:] = vectors[20]
    with open(again, "wb") as file:
        np.save(file, vectors)
    assert delete_rows(folder, "0-1") == 19
    assert add_rows(folder, again) == 44
    held = open_index(folder)
    assert held.index.ntotal == 21 and len(held.rows) == 45
    query = vectors[1] / np.linalg.norm(vectors[1])
    assert [row["_row"] for _, row in held.find(query, 1, {})] == [21]  # its twin is hidden
    query = vectors[20] / np.linalg.norm(vectors[20])
    assert [row["_row"] for _, row in held.find(query, 9, {})][:5] == [40, 41, 42, 43, 44]
    assert add_rows(folder, files[0]) == 64 and open_index(folder).index.ntotal == 21


def test_index_of_an_earlier_version_still_opens(folder, files):
    (folder / "vectors.npz").unlink()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["vectors"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert add_rows(folder, files[0]) == 40
    held = open_index(folder)
    assert held.index.ntotal == 40
    assert sorted(row["_row"] for _, row in held.find(held.index.reconstruct(3), 2, {})) == [3, 23]


def test_equal_vectors_do_not_hide_others(tmp_path):
    """A graph over a tenth of equal vectors found .8 of the others' neighbours."""
    vectors = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    vectors[:2500:5] = vectors[0]
    np.save(tmp_path / "e.npy", vectors)
    config = {"embedding_path": str(tmp_path / "e.npy"), "output_dir": str(tmp_path / "index"), "kind": "HNSW16"}
    built = build_faiss_index(config | {"measure_queries": 100})
    assert built.chosen.recall >= 0.98 and built.rows == 4000
    held = open_index(built.folder)
    assert held.index.ntotal == 3501
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = [len({row["_row"] for _, row in held.find(unit[i], 10, {})} & set(np.argsort(-(unit @ unit[i]))[:10]))
            for i in range(3000, 3050)]  # fmt: skip
    assert np.mean(hits) / 10 >= 0.97


def test_kind_auto_counts_different_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_lib.index.build.FLAT_ROWS", 50)
    monkeypatch.setattr("ebr_lib.index.build.HNSW_ROWS", 100)
    np.save(tmp_path / "e.npy", np.eye(4, 16, dtype=np.float32).repeat(100, 0))
    built = build_faiss_index({"embedding_path": str(tmp_path / "e.npy"), "output_dir": str(tmp_path / "index")})
    assert (built.kind, built.rows) == ("Flat", 400)


def test_warning_names_kinds_that_reach_the_target(tmp_path, caplog):
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(1000, 24)).astype(np.float32))
    base = {"embedding_path": str(tmp_path / "e.npy"), "output_dir": str(tmp_path / "i"), "measure_queries": 50}
    built = build_faiss_index(base | {"kind": "IVF8,SQ4"})
    assert built.chosen.recall < 0.98
    assert "measured to reach it): IVF8,SQ4,RFlat (" in caplog.text
    assert build_faiss_index(base | {"kind": "IVF8,SQ4,RFlat"}).chosen.recall >= 0.98
