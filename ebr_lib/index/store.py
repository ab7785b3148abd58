"""The folder of an index as several processes use it: one changes it at a time, and all files of it change together.

New files are written to `.building` in the folder. Its renaming to `.ready` is the moment at which they count: from
then on each is read from there until it has been moved to its place, by the writer or, after a kill, by the next one.
So the folder itself stays: it may be a link, a mount point or the current folder of somebody's shell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.files import make_folder, named_when_full, written_whole
from ebr_lib.index.faiss_tools import load_faiss
from ebr_lib.logs import logger

if TYPE_CHECKING:
    import pyarrow as pa

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


DIGEST = 16  # bytes that stand for a vector where equal ones are looked for
ROW = "_row"  # sidecar column: number of the row in the embedding file


class Distinct:
    """Gives each row of an index the number of its vector. Equal vectors have one: many equal ones fill the lists of
    a graph and hide all others, and cost memory for nothing.

    :ivar digests: of each vector, in order.
    """

    def __init__(self, of_row: Ints | None = None, digests: Sequence[bytes] = ()) -> None:
        self._of_row = [of_row if of_row is not None else np.empty(0, np.int64)]
        self._first: list[NDArray[np.bool_]] = []
        self._numbers = {digest: i for i, digest in enumerate(digests)}
        self.digests = list(digests)

    def place(self, vectors: Vectors) -> NDArray[np.bool_]:
        """Number the vectors of the next rows; returns which of them are new."""
        numbers, first = [], []
        for row in vectors + np.float32(0):  # -0.0 is 0.0
            digest = hashlib.blake2b(row, digest_size=DIGEST).digest()
            first.append(digest not in self._numbers)
            numbers.append(self._numbers.setdefault(digest, len(self.digests)))
            if first[-1]:
                self.digests.append(digest)
        self._of_row.append(np.array(numbers, np.int64))
        self._first.append(np.array(first, bool))
        return self._first[-1]

    @property
    def of_row(self) -> Ints:
        """The number of each row's vector."""
        return np.concatenate(self._of_row)

    @property
    def first(self) -> NDArray[np.bool_]:
        """Of the rows that were placed, which were the first with their vector."""
        return np.concatenate([np.empty(0, bool), *self._first])

    def save(self, path: Path) -> None:
        """Write both; the numbers of rows only where they say something."""
        of_row = self.of_row
        listed = of_row if len(of_row) > len(self.digests) else of_row[:0]
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, DIGEST)
        with open(path, "wb") as file:
            np.savez(file, of_row=listed, digests=digests)


def save_vectors(folder: Path, index: Any) -> int:
    """Write the index file into a folder that is being written; returns its size in bytes."""
    place = folder / INDEX_FILE
    load_faiss().write_index(index, str(place))
    return place.stat().st_size


def read_vectors(place: Path, size: int) -> Any:
    """The index of a folder, checked to be whole."""
    try:
        found = place.stat().st_size
    except FileNotFoundError:
        found = 0
    if found != size:
        raise DataError(
            f"{place} holds {found:,} bytes, its manifest says {size:,}: it was cut short or replaced; build the index "
            "again"
        )
    try:
        return load_faiss().read_index(str(place))
    except RuntimeError as error:
        raise DataError(f"{place} is not a complete Faiss index; build the index again") from error


def read_distinct(path: Path) -> tuple[Ints, list[bytes]]:
    """What `Distinct` saved; nothing for an index from before equal vectors were indexed once."""
    if not path.is_file():
        return np.empty(0, np.int64), []
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["of_row"], [digest.tobytes() for digest in file["digests"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not complete ({error}); build the index again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index's folder.

    :raises MissingError: the folder holds no index.
    :raises DataError: its manifest cannot be read.
    """
    place = place_of(folder, MANIFEST_FILE)
    try:
        manifest: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        _ = manifest["index_bytes"], manifest["rows"], manifest["search"]["knob"], manifest["model"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"index {folder}: there is no {MANIFEST_FILE} in it; build the index first") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is no readable manifest ({error!r}); build the index again") from error
    return manifest


def read_rows(path: Path) -> pa.Table:
    """The sidecar of an index, mapped into memory: a row an indexed vector.

    :raises DataError: the file is not whole.
    """
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not whole ({error}); build the index again") from error


def read_deleted(path: Path, rows: int) -> Ints:
    """Numbers of the deleted rows, sorted.

    :raises DataError: the file is damaged.
    """
    if not path.is_file():
        return np.empty(0, np.int64)
    try:
        deleted = np.load(path)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is not whole ({error}); remove it to see every row, or build the index again"
        ) from error
    if deleted.dtype != np.int64 or not ((deleted >= 0) & (deleted < rows)).all():
        raise DataError(f"{path} names rows that the index does not have; remove it to see every row, or build again")
    return deleted


def write_deleted(folder: Path, numbers: Ints) -> None:
    """Hide rows, and no others, until the next build."""
    with written_whole(folder / DELETED_FILE) as new, open(new, "wb") as file:
        np.save(file, numbers.astype(np.int64))
