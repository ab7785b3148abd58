"""The folder of an index, which several processes may use: one changes it at a time, and all its files change together.

New files are written to `.building` in the folder. They count once that is renamed to `.ready`: from then on each is
read from there until it has been moved to its place, by the writer or, after a kill, by the next one. The folder itself
is never replaced: it may be a link, a mount point or the current folder of a shell.
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
from ebr_lib.data.bm25 import Bm25
from ebr_lib.data.faiss_library import load_faiss
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.files import check_replaceable, make_folder, named_when_full, written_whole
from ebr_lib.logs import logger

if TYPE_CHECKING:
    import pyarrow as pa

INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE = "index.faiss", "rows.arrow", "manifest.json", "deleted.npy"
VECTORS_FILE, BM25_FILE = "vectors.npz", "bm25.npz"
READ_FILES = (INDEX_FILE, ROWS_FILE, MANIFEST_FILE, DELETED_FILE, VECTORS_FILE, BM25_FILE)
LOCK, BUILDING, READY = ".lock", ".building", ".ready"
CONFIG_FILE, CURVE_FILE = "index_config.yaml", "recall_latency.png"
SHARED_FILES = (MANIFEST_FILE, CONFIG_FILE, CURVE_FILE, LOCK, BUILDING, READY)
OWN_FILES = (*READ_FILES, *SHARED_FILES)
UPLOAD_FILE, APPEND_FILE, DELETE_FILE, LITE_FILE = ".upload.json", ".append.json", ".delete.json", "milvus.db"
STATE_FILES = (UPLOAD_FILE, APPEND_FILE, DELETE_FILE)  # how far a change of a Milvus collection is
MILVUS_FILES = (*SHARED_FILES, *STATE_FILES, LITE_FILE, ROWS_FILE, BM25_FILE)
WAIT_SECONDS = 600.0


def check_folder(folder: Path, kind: str, *, is_milvus: bool) -> None:
    """Check that an index of a kind can be written to a folder without loss: neither engine removes the other's files.

    :raises ConfigError: it holds an index of the other engine, or other files.
    """
    held = "a Faiss index" if is_milvus else "a Milvus collection"
    engines: list[Sequence[str]] = [OWN_FILES, MILVUS_FILES]
    own, other = engines[::-1] if is_milvus else engines
    if there := [name for name in other if name not in own and (folder / name).exists()]:
        raise ConfigError(
            f"output_dir: {folder} holds {held} ({', '.join(there)}), which kind: {kind} does not replace; give "
            "another folder, or delete this one if that index is not needed any more"
        )
    check_replaceable(folder, own.__contains__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that would change its index; make it if it is missing.

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
        make_folder(folder)  # the process that held it may have removed it after a failed build
        settle(folder)
        with named_when_full(folder):
            yield
    finally:
        if is_new and [place.name for place in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder, ignore_errors=True)  # Windows keeps a file that is open
        lock.release()


@contextlib.contextmanager
def changed_together(folder: Path) -> Iterator[Path]:
    """Yield a folder for the files of an index, at least all of `READ_FILES` (`BM25_FILE` if it is hybrid); they
    replace those of `folder` if the block raises nothing. The caller holds the lock."""
    new = folder / BUILDING
    new.mkdir()
    try:
        yield new
        os.replace(new, folder / READY)
    finally:
        settle(folder)


def settle(folder: Path) -> None:
    """Finish or remove what a killed writer left in an index folder. The caller holds the lock."""
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
    """Inode, time and size of each file: equal for equal states of an index folder. Empty for a missing file."""
    stamp: list[tuple[int, ...]] = []
    for name in READ_FILES:
        try:
            found = place_of(Path(folder), name).stat()
            stamp.append((found.st_ino, found.st_mtime_ns, found.st_size))
        except FileNotFoundError:
            stamp.append(())
    return tuple(stamp)


DIGEST = 16  # bytes by which equal vectors are found
NO_ROWS = np.empty(0, np.int64)
ROW = "_row"  # sidecar column: number of the row in the embedding file


def digests_of(vectors: Vectors) -> Iterator[bytes]:
    """A digest per vector; equal vectors have the same."""
    rows = vectors + np.float32(0)  # -0.0 is 0.0
    return (hashlib.blake2b(row, digest_size=DIGEST).digest() for row in rows)


class Distinct:
    """Gives each row of an index the number of its vector; equal vectors share one. Many equal vectors would fill the
    lists of a graph, hide all others, and cost memory for nothing.

    :param digests: of each vector, in order.
    """

    def __init__(self, of_row: Ints | None = None, digests: Sequence[bytes] = ()) -> None:
        self._of_row = [of_row if of_row is not None else np.empty(0, np.int64)]
        self._numbers = {digest: i for i, digest in enumerate(digests)}

    def place(self, vectors: Vectors) -> NDArray[np.bool_]:
        """Number the vectors of the next rows; returns which of them are new."""
        known = len(self._numbers)
        numbers = np.array([self._numbers.setdefault(d, len(self._numbers)) for d in digests_of(vectors)], np.int64)
        self._of_row.append(numbers)
        return _is_new(numbers, known)

    @property
    def of_row(self) -> Ints:
        """The number of each row's vector."""
        return np.concatenate(self._of_row)

    @property
    def first(self) -> NDArray[np.bool_]:
        """Which rows are the first with their vector."""
        return _is_new(self.of_row, 0)

    def save(self, path: Path) -> None:
        """Write the digests, and the numbers of rows if some rows share a vector."""
        of_row = self.of_row
        listed = of_row if len(of_row) > len(self._numbers) else of_row[:0]
        digests = np.frombuffer(b"".join(self._numbers), np.uint8).reshape(-1, DIGEST)
        with open(path, "wb") as file:
            np.savez(file, of_row=listed, digests=digests)


def _is_new(numbers: Ints, known: int) -> NDArray[np.bool_]:
    """Where a number is above all before it and at least `known`: new vectors are numbered in order."""
    return np.diff(np.maximum.accumulate(np.r_[known - 1, numbers])) > 0


def save_vectors(folder: Path, index: Any) -> int:
    """Write the index file to a folder; returns its size in bytes."""
    place = folder / INDEX_FILE
    load_faiss().write_index(index, str(place))
    return place.stat().st_size


def read_vectors(place: Path, size: int) -> Any:
    """The index of a folder.

    :raises DataError: its file is damaged or of another size.
    """
    found = place.stat().st_size if place.exists() else 0
    if found != size:
        raise DataError(
            f"{place} holds {found:,} bytes, its manifest says {size:,}: it was cut short or replaced; build the index "
            "again"
        )
    with _complete(place):
        return load_faiss().read_index(str(place))


def read_distinct(path: Path) -> tuple[Ints, list[bytes]]:
    """What `Distinct` saved; empty for an index of an earlier version, which indexed equal vectors twice."""
    if not path.is_file():
        return np.empty(0, np.int64), []
    with _complete(path), np.load(path, allow_pickle=False) as file:
        return file["of_row"], [digest.tobytes() for digest in file["digests"]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index's folder.

    :raises MissingError: the folder holds no index.
    :raises DataError: its manifest cannot be read.
    """
    place = place_of(folder, MANIFEST_FILE)
    try:
        text = place.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"index {folder}: there is no {MANIFEST_FILE} in it; build the index first") from error
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror})") from error
    with _complete(place):
        manifest: dict[str, Any] = json.loads(text)
        _ = manifest["index_bytes"], manifest["rows"], manifest["search"]["knob"], manifest["model"]
    return manifest


def read_state(path: Path) -> dict[str, Any] | None:
    """One of `STATE_FILES`; None if it is not there."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def read_rows(path: Path) -> pa.Table:
    """The kept columns of every indexed row, mapped into memory.

    :raises DataError: the file is damaged.
    """
    import pyarrow as pa

    with _complete(path):
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def read_deleted(path: Path, rows: int) -> Ints:
    """Numbers of the deleted rows, sorted.

    :raises DataError: the file is damaged.
    """
    if not path.is_file():
        return np.empty(0, np.int64)
    with _complete(path, "remove it to see every row, or build the index again"):
        deleted = np.load(path)
    if deleted.dtype != np.int64 or not ((deleted >= 0) & (deleted < rows)).all():
        raise DataError(f"{path} names rows that the index does not have; remove it to see every row, or build again")
    return deleted


def read_bm25(path: Path, rows: int) -> Bm25:
    """BM25 over the texts of every row.

    :raises DataError: the file is damaged, or has other rows.
    """
    with _complete(path):
        bm25 = Bm25.load(path)
    if len(bm25) != rows:
        raise DataError(f"{path} holds {len(bm25):,} texts, the index {rows:,} rows; build the index again")
    return bm25


@contextlib.contextmanager
def _complete(path: Path, advice: str = "build the index again") -> Iterator[None]:
    """Name the file that cannot be read.

    :raises DataError: it cannot.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not complete ({error!r}); {advice}") from error


def write_deleted(folder: Path, numbers: Ints) -> None:
    """Hide rows, and no others, until the next build."""
    with written_whole(folder / DELETED_FILE) as new, open(new, "wb") as file:
        np.save(file, numbers.astype(np.int64))
