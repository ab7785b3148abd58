"""Which files of a folder are read, and why the others are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebr_lib.data import finder
from ebr_lib.data.finder import find_files
from ebr_lib.errors import MissingError


def put(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def names(found: finder.FoundFiles) -> list[str]:
    return [path.relative_to(found.root).as_posix() for path in found.files]


def test_every_file_is_taken_or_left_out_with_its_reason(tmp_path: Path):
    put(tmp_path, "b.csv", "a.CSV", "dt=1/000000_0", "dt=1/000000_0_copy_1", "notes.md", ".x.csv", "_tmp/0/a.csv")
    put(tmp_path, "_SUCCESS", ".b.csv.crc", "dt=1/._b.csv", ".DS_Store", "_temporary/0/a.csv")
    put(tmp_path, "dt=1/zero.csv", content="")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.csv")
    found = find_files(tmp_path, ["*.csv", "0*_[0-9]*"], "data_path")
    assert names(found) == ["a.CSV", "b.csv", "dt=1/000000_0", "dt=1/000000_0_copy_1"]
    assert found.named() == {
        ".DS_Store": finder.MARKER,
        ".b.csv.crc": finder.MARKER,
        ".x.csv": finder.HIDDEN,
        "_SUCCESS": finder.MARKER,
        "_temporary": finder.MARKER,
        "_tmp": finder.HIDDEN,
        "dt=1/._b.csv": finder.MARKER,
        "dt=1/zero.csv": finder.EMPTY,
        "gone.csv": finder.BROKEN,
        "notes.md": finder.PATTERN,
        "pipe.csv": finder.SPECIAL,
    }


def test_what_is_left_out_is_logged_by_reason(tmp_path: Path, caplog):
    caplog.set_level("INFO")
    put(tmp_path, "a.csv", "_SUCCESS", *(f"{i}.txt" for i in range(10)))
    find_files(tmp_path, ["*.csv"], "data_path").log("set file_patterns")
    marks = {record.levelname: record.getMessage() for record in caplog.records}
    assert "_SUCCESS" in marks["INFO"]
    assert marks["WARNING"].endswith(
        "0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt, … and 2 more; set file_patterns"
    )
    assert "not read: 10 under" in marks["WARNING"]


def test_links_are_followed_once_each(tmp_path: Path):
    root, other = tmp_path / "in", tmp_path / "disk"
    put(root, "dt=1/a.csv", "sub/b.csv")
    put(other, "dt=2/c.csv", "blob", "deep/d.csv")
    (root / "dt=2").symlink_to(other / "dt=2")
    (other / "dt=2" / "back").symlink_to(root)
    (root / "sub" / "up").symlink_to("..")
    (root / "above").symlink_to(tmp_path)
    (root / "latest").symlink_to("dt=1")
    (root / "again.csv").symlink_to("sub/b.csv")
    (root / "x.csv").symlink_to(other / "blob")
    (root / "y.csv").symlink_to(other / "blob")  # two names of one blob, as annex and DVC keep equal files
    found = find_files(root, ["*.csv"], "data_path")
    assert names(found) == ["dt=1/a.csv", "dt=2/c.csv", "sub/b.csv", "x.csv", "y.csv"]
    twice = dict.fromkeys(["above", "again.csv", "dt=2/back", "latest", "sub/up"], finder.TWICE)
    assert found.named() == twice
    (tmp_path / "link").symlink_to(root)
    assert names(find_files(tmp_path / "link", ["*.csv"], "data_path")) == names(found)


def test_subfolders_only_where_they_are_wanted(tmp_path: Path):
    put(tmp_path, "a.jsonl", "sub/b.jsonl")
    found = find_files(tmp_path, ["*.jsonl"], "data_path", subfolders=False)
    assert (names(found), found.named()) == (["a.jsonl"], {"sub": finder.SUBFOLDER})


def test_a_file_is_taken_as_it_is_and_a_missing_place_is_an_error(tmp_path: Path):
    put(tmp_path, "notes.md", content="")
    assert find_files(tmp_path / "notes.md", ["*.csv"], "data_path").files == [tmp_path / "notes.md"]
    with pytest.raises(MissingError, match=r"eval_data_path .*none: there is no such file or folder"):
        find_files(tmp_path / "none", ["*.csv"], "eval_data_path")


def test_files_can_be_left_out_later(tmp_path: Path):
    put(tmp_path, "a.csv", "b.csv")
    found = find_files(tmp_path, ["*.csv"], "data_path").without([tmp_path / "a.csv"], "written by this stage")
    assert (names(found), found.named()) == (["b.csv"], {"a.csv": "written by this stage"})


def test_partition_folders_are_columns(tmp_path: Path):
    path = tmp_path / "a=b" / "x" / "dt=2026-11-01" / "city=%E4%B8%8A%3A" / "HIVE_UNION_SUBDIR_1" / "h=" / "000000_0"
    default = tmp_path / "dt=__HIVE_DEFAULT_PARTITION__" / "000000_0"
    wanted = {"dt": b"2026-11-01", "city": "上:".encode(), "h": b""}
    assert finder.partitions_of(path, tmp_path / "a=b" / "x") == wanted
    assert finder.partitions_of(path, tmp_path / "a=b" / "x" / "dt=2026-11-01") == wanted
    assert finder.partitions_of(path, path) == {"h": b""}
    assert finder.partitions_of(default, tmp_path) == {"dt": None}
