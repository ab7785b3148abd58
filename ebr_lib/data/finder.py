"""Input files of a folder: those that are read, and those that are not, each with its reason.

Links count as what they lead to; each real folder is visited once, so a link that leads back ends the walk, and a
second name of the same folder does not double its rows.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from ebr_lib.errors import DataError, MissingError
from ebr_lib.logs import logger

PATTERN = "no pattern matches the name"
HIDDEN = "hidden: the name begins with . or _"
MARKER = "a marker of Hive, Spark or the desktop"
EMPTY = "zero bytes"
BROKEN = "a link to nothing"
TWICE = "a link to what is read under its own name"
SUBFOLDER = "in a subfolder"
SPECIAL = "not a file"
OWN = "written by this stage"
MARKERS = ("_SUCCESS", "_committed_*", "_started_*", "_metadata", "_common_metadata", "_spark_metadata", "_temporary")
DOTTED_MARKERS = (".*.crc", "._*", ".DS_Store", ".hive-staging*", ".ipynb_checkpoints")
NULL_PARTITION = b"__HIVE_DEFAULT_PARTITION__"
QUIET = (MARKER, OWN, SUBFOLDER)  # expected: logged, without a warning
SHOWN = 8  # names in a log line; `FoundFiles.left_out` holds all of them


@dataclass(frozen=True)
class FoundFiles:
    """Files of an input place.

    :param root: the file or folder that was given.
    :param files: what to read, in order of their paths.
    :param left_out: what is not read, with the reason, in order of their paths; a folder stands for all in it.
    """

    root: Path
    files: list[Path]
    left_out: dict[Path, str]

    def without(self, files: Sequence[Path], reason: str) -> FoundFiles:
        """The same, with some of the files left out for a reason."""
        gone = set(files)
        kept = [file for file in self.files if file not in gone]
        return FoundFiles(self.root, kept, dict(sorted((self.left_out | dict.fromkeys(files, reason)).items())))

    def named(self) -> dict[str, str]:
        """What is left out by its name below the root, with the reason."""
        return {name_of(path, self.root): reason for path, reason in self.left_out.items()}

    def log(self, remedy: str = "") -> None:
        """Log what is left out, one line per reason; `remedy` says how to take in what no pattern matches."""
        reasons = dict.fromkeys(self.left_out.values())
        for reason in reasons:
            names = [name for name, why in self.named().items() if why == reason]
            shown = ", ".join(names[:SHOWN]) + (f", … and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            log = logger.info if reason in QUIET else logger.warning
            advice = f"; {remedy}" if remedy and reason == PATTERN else ""
            log("未读取 not read: %d under %s (%s): %s%s", len(names), self.root, reason, shown, advice)


def find_files(place: str | Path, patterns: Sequence[str], knob: str, *, subfolders: bool = True) -> FoundFiles:
    """Find the files below a folder whose names match a pattern; a file given by itself is always taken.

    Hidden files and folders (`.` or `_` first) are left out, as Hive and Spark do.

    :param patterns: globs such as `*.csv`, matched from the end of the path, ignoring case.
    :param knob: the knob that named the place, for the error.
    :raises MissingError: there is no such file or folder.
    :raises DataError: a folder cannot be listed.
    """
    root = Path(place).expanduser()
    if root.is_file():
        return FoundFiles(root, [root], {})
    if not root.is_dir():
        raise MissingError(f"{knob} {place}: there is no such file or folder (looked at {root.resolve()})")
    walk = _Walk(root, patterns, subfolders)
    walk.run()
    return FoundFiles(root, sorted(walk.files), dict(sorted(walk.left_out.items())))


def name_of(path: Path, root: Path) -> str:
    """Place of a file below the root, or its own name; bytes that are not UTF-8 are spelled `\\xff`."""
    name = path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def partitions_of(path: Path, root: Path) -> dict[str, bytes | None]:
    """Columns that the folders of a file give, as Hive writes them (`dt=2026-11-01/city=%E4%B8%8A`), outermost first.

    Those below the root, and those that the root itself ends in; `__HIVE_DEFAULT_PARTITION__` is null.
    """
    place = Path.cwd() / root  # as it is spelled: a link may lead elsewhere
    place = place.parent if path == root else place
    above = itertools.takewhile(lambda name: "=" in name, reversed(place.parts))
    below = path.relative_to(root).parts[:-1] if path != root else ()
    partitions: dict[str, bytes | None] = {}
    for folder in (*reversed(list(above)), *below):
        name, is_one, value = folder.partition("=")
        if name and is_one:
            raw = unquote_to_bytes(os.fsencode(value))
            text = raw.decode("utf-8", "backslashreplace").encode()
            partitions[unquote(name)] = None if raw == NULL_PARTITION else text
    return partitions


class _Walk:
    """Visits a folder's own files first, then where its links lead: a file counts by its own name, not by a link's."""

    def __init__(self, root: Path, patterns: Sequence[str], subfolders: bool) -> None:
        self.files: list[Path] = []
        self.left_out: dict[Path, str] = {}
        self._root, self._patterns, self._subfolders = root, patterns, subfolders
        self._folders: set[str] = set()
        self._own: set[str] = set()  # real paths of the files that are taken
        self._linked_files: list[Path] = []
        self._linked_folders: list[Path] = []

    def run(self) -> None:
        real = Path(os.path.realpath(self._root))
        self._folders.update(map(str, real.parents))  # a link to a folder above would take in everything
        self._visit(self._root)
        while self._linked_folders:
            self._visit(self._linked_folders.pop(0))
        for file in self._linked_files:
            if os.path.realpath(file) in self._own:
                self.left_out[file] = TWICE
            else:
                self._take(file)

    def _visit(self, folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in self._folders:
            self.left_out[folder] = TWICE
            return
        self._folders.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be listed ({error.strerror})") from error
        for entry in entries:
            self._sort_in(entry, folder / entry.name)

    def _sort_in(self, entry: os.DirEntry[str], path: Path) -> None:
        if reason := _hidden(entry.name):
            self.left_out[path] = reason
        elif entry.is_symlink() and not path.exists():
            self.left_out[path] = BROKEN
        elif entry.is_dir() and not self._subfolders:
            self.left_out[path] = SUBFOLDER
        elif entry.is_dir() and entry.is_symlink():
            self._linked_folders.append(path)
        elif entry.is_dir():
            self._visit(path)
        elif not entry.is_file():
            self.left_out[path] = SPECIAL
        elif not any(Path(str(path).lower()).match(pattern.lower()) for pattern in self._patterns):
            self.left_out[path] = PATTERN
        elif entry.is_symlink():
            self._linked_files.append(path)
        else:
            self._take(path)
            self._own.add(os.path.realpath(path))

    def _take(self, path: Path) -> None:
        if path.stat().st_size:
            self.files.append(path)
        else:
            self.left_out[path] = EMPTY


def _hidden(name: str) -> str:
    if any(fnmatch.fnmatchcase(name, marker) for marker in (*MARKERS, *DOTTED_MARKERS)):
        return MARKER
    return HIDDEN if name.startswith((".", "_")) else ""
