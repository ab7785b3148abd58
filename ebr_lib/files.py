"""Write files and folders without losing what was there, and check output places before the work."""

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

from ebr_lib.errors import ConfigError, DataError, MissingError, UserError

LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?:(?P<machine>[^.]*)-)?(?P<process>\d+)\.(?P<kind>new|old)")
"""Names of unfinished files of `written_whole`, and of folders that it is replacing."""
DAY = 86_400.0
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
FULL_ELSEWHERE = ("disk is full", "PytorchStreamWriter failed writing")  # SQLite; torch


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder at, which replaces `path` when the block ends.

    If the block raises, `path` is not changed.
    """
    path = followed(Path(path))
    with room_beside(path) as beside:
        yield beside
        old = _beside(path, "old")
        if beside.is_dir() and path.is_dir():  # a folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(beside, path)
        _remove(old)


def full_disk(error: BaseException | None) -> str | None:
    """The words for a full disk in an error, or in one that caused it; None for any other error.

    Found by text: Faiss, safetensors, SQLite and torch raise errors of their own classes, without a number.
    """
    while error is not None:
        if said := next((text for text in (*FULL, *FULL_ELSEWHERE) if text in str(error)), None):
            return said
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def named_when_full(
    place: Path, advice: str = "what was there before stays. Make room and run the same call again"
) -> Iterator[None]:
    """Turn any library's error about a full disk into one that names the place.

    :param advice: what is left, and what to do.
    :raises DataError: the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own class
        if (said := full_disk(error)) is None:
            raise
        raise DataError(f"{place}: the disk is full ({said}); {advice}") from error


@contextlib.contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path`, which is removed afterwards, as are leftovers of killed processes before."""
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
    """The target of a link; a path with a name instead of `.` or one that ends in `..`."""
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path


def _beside(path: Path, kind: str) -> Path:
    machine = platform.node().partition(".")[0]
    return path.with_name(f".{path.name}.{machine}-{os.getpid()}.{kind}")


def _clear_left_over(path: Path) -> None:
    """Remove leftovers of killed processes beside `path`, or put back a folder that one of them was replacing."""
    for place in path.parent.iterdir():
        found = LEFT_OVER.fullmatch(place.name)
        if not found or found["name"] != path.name or not _is_abandoned(place, found):
            continue
        if found["kind"] == "old" and not path.exists():
            os.replace(place, path)
        else:
            _remove(place)


def _is_abandoned(place: Path, named: re.Match[str]) -> bool:
    """Whether the process that wrote here has ended; on another machine, whether nothing was written for a day."""
    import psutil

    if named["machine"] in (None, platform.node().partition(".")[0]):
        return not psutil.pid_exists(int(named["process"]))
    with contextlib.suppress(FileNotFoundError):  # the process has just moved it
        newest = max(file.stat().st_mtime for file in (place, *place.rglob("*")))
        return time.time() - newest > DAY
    return False


def make_folder(folder: Path) -> Path:
    """Make an output folder if missing, and test that it can be written to, which its permissions alone do not say.

    :raises ConfigError: it cannot be made (a file has its name, say) or written to.
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
    """Check, before the work, that a file can be written at `path`; its folder is made if missing.

    :raises ConfigError: `path` is a folder or a device, or its folder cannot be made or written to.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise ConfigError(f"output file {path} is a folder; give the name of a file, such as one in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"output file {path} is a device or a pipe, which a file would replace; give another place")
    make_folder(followed(path).parent)


def check_apart(written: Iterable[Path], read: Iterable[str | Path | Sequence[str] | None]) -> None:
    """Check, before the work, that no output replaces an input, however paths are spelled or linked.

    :param written: files, and folders that are replaced as a whole.
    :param read: files, folders, or lists of them; None is skipped.
    :raises ConfigError: an output is an input, or a folder that contains one.
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
    """Check that a folder, if it exists, can be replaced without loss.

    :param is_own: whether the stage writes files of this name. Leftovers of killed runs and .DS_Store may be there too.
    :raises ConfigError: it is a file, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output folder {folder} is a file; give another place")
    found = [place.name for place in folder.iterdir()] if folder.is_dir() else []
    finished = {name: left_over["name"] if (left_over := LEFT_OVER.fullmatch(name)) else name for name in found}
    if others := sorted(name for name in found if not is_own(finished[name]) and name != ".DS_Store"):
        raise ConfigError(
            f"output folder {folder} is replaced as a whole and holds other files ({', '.join(others[:5])}); "
            "give a folder of its own"
        )


def replace_folder(folder: Path, place: Path) -> None:
    """Move a folder to `place`, replacing what is there."""
    _remove(place)
    os.replace(folder, place)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def has_home() -> bool:
    """Whether there is a home folder, which a container may lack."""
    try:
        return bool(Path.home())
    except RuntimeError:
        return False


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_token(path: str | None) -> str | None:
    """The token in a file; None without one.

    :raises MissingError: there is no such file.
    :raises ConfigError: it is empty, or holds anything that a header cannot.
    """
    if path is None:
        return None
    place = Path(path)
    if not place.is_file():
        raise MissingError(f"token_file {path}: there is no such file")
    token = place.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"token_file {path}: wanted one word of ASCII letters, digits and signs")
    return token


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, in one step."""
    with written_whole(path) as new:
        new.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
