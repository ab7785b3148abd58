"""Writing so that nothing is lost, and knowing files by their contents."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ebr_lib.errors import ConfigError, DataError, UserError

LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?:(?P<machine>[^.]*)-)?(?P<process>\d+)\.(?P<kind>new|old)")
"""What `written_whole` writes beside a place, and where it puts a folder that it replaces."""
DAY = 86_400.0
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
FULL_ELSEWHERE = ("disk is full", "PytorchStreamWriter failed writing")  # SQLite; torch


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder at; it is moved in when the block ends well.

    What stood at `path` stays untouched until then, and for good when the block raises.
    """
    path = followed(Path(path))
    with room_beside(path) as beside:
        yield beside
        _move_in(beside, path)


def full_disk(error: BaseException | None) -> str | None:
    """What an error, or one that it came from, says of a full disk, in a few words; None where it says nothing of it.

    By its text: Faiss, safetensors, SQLite and torch raise errors of their own classes, without a number.
    """
    while error is not None:
        if said := next((text for text in (*FULL, *FULL_ELSEWHERE) if text in str(error)), None):
            return said
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def named_when_full(place: Path) -> Iterator[None]:
    """Turn what a full disk raises into a sentence with the place that is written to.

    :raises DataError: there is no room left.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own class
        if (said := full_disk(error)) is None:
            raise
        raise DataError(
            f"{place}: the disk is full ({said}); what was there before stays. Make room and run the same call again"
        ) from error


@contextlib.contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path` to work at. Nothing stays there afterwards; what killed processes left goes
    first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_left_over(path)
    beside = _beside(path, "new")
    _remove(beside)
    try:
        with named_when_full(path):
            yield beside
    finally:
        _remove(beside)


def followed(path: Path) -> Path:
    """The place itself that a link leads to; a path with a name, where it is `.` or ends in `..`."""
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path


def _beside(path: Path, kind: str) -> Path:
    machine = platform.node().partition(".")[0]
    return path.with_name(f".{path.name}.{machine}-{os.getpid()}.{kind}")


def _clear_left_over(path: Path) -> None:
    """Remove what killed processes left beside `path`; a folder that one was replacing goes back to its place."""
    for place in path.parent.iterdir():
        found = LEFT_OVER.fullmatch(place.name)
        if not found or found["name"] != path.name or not _is_abandoned(place, found):
            continue
        if found["kind"] == "old" and not path.exists():
            os.replace(place, path)
        else:
            _remove(place)


def _is_abandoned(place: Path, named: re.Match[str]) -> bool:
    """Whether the process that wrote here has ended; of another machine it is taken to have after a day of silence."""
    import psutil

    if named["machine"] in (None, platform.node().partition(".")[0]):
        return not psutil.pid_exists(int(named["process"]))
    with contextlib.suppress(FileNotFoundError):  # it has just moved it in
        newest = max(file.stat().st_mtime for file in (place, *place.rglob("*")))
        return time.time() - newest > DAY
    return False


def make_folder(folder: Path) -> Path:
    """Make an output folder where it is missing, and write to it once: its rights alone do not say whether one can.

    :raises ConfigError: it cannot be made (a file stands there, say) or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output folder {folder} cannot be made ({error.strerror}); give another place") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output folder {folder} cannot be written to ({error.strerror}); give another place"
        ) from error
    return folder


def check_output_file(path: Path) -> None:
    """Make sure, before the work, that a file can be written at `path`; its folder is made where missing.

    :raises ConfigError: a folder stands there, or its own folder cannot be made or written to.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise ConfigError(f"output file {path} is a folder; give the name of a file, in it say")
    if path.exists() and not path.is_file():
        raise ConfigError(f"output file {path} is a device or a pipe, which a file would replace; give another place")
    make_folder(followed(path).parent)


def check_apart(written: Iterable[Path], read: Iterable[str | Path | Sequence[str] | None]) -> None:
    """Make sure, before the work, that a stage writes over nothing that it reads, however either is spelled or linked.

    :param written: files, and folders that are replaced as a whole.
    :param read: files and folders, also several at a time; None is skipped.
    :raises ConfigError: two of them are one, or a folder that is replaced holds what is read.
    """
    given = itertools.chain.from_iterable(
        [places] if isinstance(places, str | Path) else places or () for places in read
    )
    inputs = [Path(place) for place in given if Path(place).exists()]
    for output in written:
        for place in inputs:
            inside = output.is_dir() and output.resolve() in place.resolve().parents
            if inside or (output.exists() and output.samefile(place)):
                raise ConfigError(f"output {output} would replace the input {place}; give another place for the output")


def check_replaceable(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Make sure that a folder, if it is there, can be replaced without loss.

    :param is_own: whether a file of this name is one that the stage writes; nothing else may be there, but for what a
        killed run left of such files and what a desktop puts everywhere.

    :raises ConfigError: it is a file, or holds others.
    """
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
    left_over = LEFT_OVER.fullmatch(name)
    return left_over["name"] if left_over else name


def _move_in(new: Path, place: Path) -> None:
    if not (new.is_dir() and place.is_dir()):
        os.replace(new, place)
        return
    old = _beside(place, "old")  # a folder cannot be replaced in one step
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


def has_home() -> bool:
    """Whether there is a HOME: in a container there may be none."""
    try:
        return bool(Path.home())
    except RuntimeError:
        return False


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, whole or not at all."""
    with written_whole(path) as new:
        new.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
