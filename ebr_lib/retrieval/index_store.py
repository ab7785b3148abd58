"""The folder of an index as several processes use it: one changes it at a time, and all files of it change together.

New files are written to `.building` in the folder. Its renaming to `.ready` is the moment at which they count: from
then on each is read from there until it has been moved to its place, by the writer or, after a kill, by the next one.
So the folder itself stays: it may be a link, a mount point or the current folder of somebody's shell.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ebr_lib.errors import ConfigError
from ebr_lib.files import make_folder, named_when_full
from ebr_lib.logs import logger

INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE = "index.faiss", "rows.arrow", "manifest.json", "deleted.npy"
VECTORS_FILE = "vectors.npz"
READ_FILES = (INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE, VECTORS_FILE)
LOCK, BUILDING, READY = ".lock", ".building", ".ready"
WAIT_SECONDS = 600.0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against every other process that would change its index; it is made where missing.

    The system releases the lock of a process that ends, however it ends.

    :raises ConfigError: the folder cannot be written to, or another process holds it for `WAIT_SECONDS`.
    :raises DataError: the disk is full.
    """
    import filelock

    is_new = not folder.exists()
    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("索引 %s 正被另一进程修改，等待中 (another process is changing it; waiting)", folder)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except filelock.Timeout as error:
            raise ConfigError(
                f"another process has been changing the index {folder} for {WAIT_SECONDS:.0f} seconds; run this again "
                "when it is done, or give another folder"
            ) from error
    try:
        make_folder(folder)  # whoever held it may have removed a folder that came to nothing
        settle(folder)
        with named_when_full(folder):
            yield
    finally:
        if is_new and [place.name for place in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)  # Windows keeps a file that is open
        lock.release()


@contextlib.contextmanager
def changed_together(folder: Path) -> Iterator[Path]:
    """Yield a folder to write the files of an index to, all of `READ_FILES` at least; they replace those of `folder`
    when the block ends well. The caller holds the lock."""
    new = folder / BUILDING
    new.mkdir()
    try:
        yield new
        os.replace(new, folder / READY)
    finally:
        settle(folder)


def settle(folder: Path) -> None:
    """Finish or remove what a writer that was killed left in an index folder. The caller holds the lock."""
    if (ready := folder / READY).is_dir():
        for place in ready.iterdir():
            os.replace(place, folder / place.name)
        ready.rmdir()
    if (building := folder / BUILDING).is_dir():
        shutil.rmtree(building)


def place_of(folder: Path, name: str) -> Path:
    """Where a file of an index is read from."""
    ready = folder / READY / name
    return ready if ready.exists() else folder / name


def index_stamp(folder: str | Path) -> tuple[tuple[int, ...], ...]:
    """What tells one state of an index folder from another: of each file its inode, time and size; none where it is not
    there."""
    stamp: list[tuple[int, ...]] = []
    for name in READ_FILES:
        try:
            found = place_of(Path(folder), name).stat()
            stamp.append((found.st_ino, found.st_mtime_ns, found.st_size))
        except FileNotFoundError:
            stamp.append(())
    return tuple(stamp)
