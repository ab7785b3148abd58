"""Writing so that nothing is lost, and knowing files by their contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ebr_lib.errors import ConfigError


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder at; it is moved in when the block ends well.

    What stood at `path` stays untouched until then, and for good when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    _remove(beside)
    try:
        yield beside
        _move_in(beside, path)
    finally:
        _remove(beside)


def make_folder(folder: Path) -> Path:
    """Make an output folder where it is missing.

    :raises ConfigError: it cannot be made: a file stands there, say.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output folder {folder} cannot be made ({error.strerror}); give another place") from error
    return folder


def check_output_file(path: Path) -> None:
    """Make sure, before the work, that a file can be written at `path`; its folder is made where missing.

    :raises ConfigError: a folder stands there, or its own folder cannot be made or written to.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise ConfigError(f"output file {path} is a folder; give the name of a file, in it say")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output folder {path.parent} cannot be written to; give another place")


def check_replaceable(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Make sure that a folder, if it is there, can be replaced without loss.

    :param is_own: whether a file of this name is one that the stage writes; nothing else may be there, but for what a
        killed run left of such files and what a desktop puts everywhere.

    :raises ConfigError: it is a file, or holds others.
    """
    make_folder(folder.parent)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output folder {folder} is a file; give another place")
    found = [place.name for place in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in found if not is_own(_of_unfinished(name)) and name != ".DS_Store")
    if others:
        raise ConfigError(
            f"output folder {folder} is replaced as a whole and holds other files ({', '.join(others[:5])}); "
            "give a folder of its own"
        )


def _of_unfinished(name: str) -> str:
    """The name under which `written_whole` would have moved a file in; of another file its own."""
    beside = re.fullmatch(r"\.(.+)\.\d+\.(?:new|old)", name)
    return beside[1] if beside else name


def _move_in(new: Path, place: Path) -> None:
    if not (new.is_dir() and place.is_dir()):
        os.replace(new, place)
        return
    old = place.with_name(f".{place.name}.{os.getpid()}.old")  # a folder cannot be replaced in one step
    os.replace(place, old)
    os.replace(new, place)
    _remove(old)


def replace_folder(folder: Path, place: Path) -> None:
    """Move a folder to `place`, in the stead of what is there."""
    _remove(place)
    os.replace(folder, place)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, whole or not at all."""
    with written_whole(path) as new:
        new.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
