"""What an encoding job remembers: which texts have a vector, and how far it is. A kill loses nothing.

One SQLite file holds the hashes of the texts and the progress of the job, so that both change in one transaction; the
vectors of the distinct texts lie beside it as raw float32. Memory stays the same however many texts there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints
from ebr_lib.data.hive import Position
from ebr_lib.errors import DataError
from ebr_lib.inference.job import Tally

ASKED_AT_ONCE = 5000  # hashes in one query; SQLite takes up to 32766
DIGEST_BYTES = 16
STATE_FILE = "state.sqlite"
TABLES = (
    "state (value TEXT)",
    "progress (file INTEGER PRIMARY KEY, value TEXT)",
    "seen (digest BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID",
    "reports (first INTEGER PRIMARY KEY, value TEXT)",
)


def digest_of(text: bytes) -> bytes:
    """A text's 128-bit hash: two of a billion texts share one with a chance of 1 in 10**20."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Progress:
    """How far a job is: what the rows written so far hold, and where reading continues.

    :param file: number of the source that is being read, from 0.
    :param position: its next row; None before the first window.
    :param texts: distinct texts of the rows written.
    :param sizes: of the work files, in bytes; None before they are made.
    :param share: of the input, by bytes.
    """

    file: int = 0
    position: Position | None = None
    texts: int = 0
    sizes: dict[str, int] | None = None
    share: float = 0.0
    tally: Tally = field(default_factory=Tally)

    @property
    def key(self) -> int:
        """Of the last progress within each source one is kept; -1 for the beginning."""
        return self.file if self.position else -1

    def to_json(self) -> str:
        """The progress as a line of JSON."""
        return json.dumps(vars(self) | {"tally": vars(self.tally)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Progress:
        """The progress that `to_json` wrote."""
        stored = json.loads(line)
        position = Position(*stored["position"]) if stored["position"] else None
        return cls(**stored | {"position": position, "tally": Tally.of(stored["tally"])})


class Store:
    """The distinct texts of a job, numbered by first appearance, their vectors, and the job's state and progress.

    Each vector is followed by the number of tokens cut off its text; NaN when unknown.

    Two steps make a window durable: `keep` its new vectors, so that they are never made again; and, when its rows are
    written, `save` the progress that says so.

    :ivar state: what stays the same during a run: settings, inputs and so on; None where there is no run.
    """

    VECTORS = "vectors.f32"

    def __init__(self, folder: Path) -> None:
        """Open or make the store in `folder`.

        :raises DataError: another run holds it.
        """
        self._folder = folder
        self._database = sqlite3.connect(folder / STATE_FILE, timeout=0, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")  # a second run on the same output must not start
        try:
            with self._transaction():
                for table in TABLES:
                    self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        except sqlite3.OperationalError as error:
            self._database.close()
            if "locked" not in str(error):
                raise
            raise DataError(f"{folder}: another run is writing this output; wait for it to end") from error
        row = self._database.execute("SELECT value FROM state").fetchone()
        self.state: dict[str, Any] | None = json.loads(row[0]) if row else None
        self._waiting: dict[bytes, int] = {}  # numbered, but not kept yet
        self._vectors: int | None = None

    @property
    def progress(self) -> list[Progress]:
        """How far the job is: the last progress within each of the last two sources, latest first."""
        rows = self._database.execute("SELECT value FROM progress ORDER BY file DESC LIMIT 2")
        return [Progress.from_json(value) for (value,) in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self._database.rollback()
            raise

    def begin(self, dim: int, first: int) -> None:
        """Open the vectors, and number from `first` on, where the windows that are not written yet begin."""
        self.dim, self._first, self._row_bytes = dim, first, (dim + 1) * 4
        (self.kept,) = self._database.execute("SELECT count(*) FROM seen").fetchone()
        self._next = self.kept
        binary = getattr(os, "O_BINARY", 0)  # of Windows, which else changes line ends
        self._vectors = os.open(self._folder / self.VECTORS, os.O_RDWR | os.O_CREAT | binary, 0o644)
        os.ftruncate(self._vectors, self.kept * self._row_bytes)

    def number(self, digests: Sequence[bytes]) -> tuple[list[int], int]:
        """Number a window's texts by their hashes: the place of each, and the first place that occurs here first."""
        known = self._known(list(dict.fromkeys(digests)))
        for digest in digests:
            if digest not in known:
                known[digest] = self._waiting[digest] = self._next
                self._next += 1
        first = self._first
        self._first += sum(place >= first for place in known.values())
        return [known[digest] for digest in digests], first

    def _known(self, digests: list[bytes]) -> dict[bytes, int]:
        known = {digest: place for digest in digests if (place := self._waiting.get(digest)) is not None}
        rest = [digest for digest in digests if digest not in known]
        for start in range(0, len(rest), ASKED_AT_ONCE):
            part = rest[start : start + ASKED_AT_ONCE]
            marks = ",".join("?" * len(part))
            query = f"SELECT digest, place FROM seen WHERE digest IN ({marks})"  # noqa: S608 - question marks
            known.update(self._database.execute(query, part))
        return known

    def keep(
        self, digests: Sequence[bytes], vectors: NDArray[np.float32], lost: NDArray[Any], report: dict[str, Any]
    ) -> None:
        """Make new vectors durable, those of the places from `kept` on, and what was counted over them."""
        assert self._vectors is not None
        first = self.kept
        rows = np.column_stack([vectors, lost]).astype(np.float32)
        _write_all(self._vectors, rows, first * self._row_bytes)
        os.fsync(self._vectors)
        with self._transaction():
            numbered = ((digest, first + i) for i, digest in enumerate(digests))
            self._database.executemany("INSERT INTO seen VALUES (?, ?)", numbered)
            self._database.execute("INSERT INTO reports VALUES (?, ?)", (first, json.dumps(report)))
        self.kept += len(digests)
        for digest in digests:
            del self._waiting[digest]

    def reports_of(self, first: int, after: int) -> list[dict[str, Any]]:
        """What was counted when the texts of the places from `first` to before `after` were encoded."""
        query = "SELECT value FROM reports WHERE first >= ? AND first < ? ORDER BY first"
        return [json.loads(value) for (value,) in self._database.execute(query, (first, after))]

    def vectors(self, places: Ints) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors of places, float32, places × dimensions; and how many tokens each text lost."""
        assert self._vectors is not None
        size = self._row_bytes
        chunks = [os.pread(self._vectors, size, place * size) for place in places.tolist()]
        rows = np.frombuffer(b"".join(chunks), dtype=np.float32).reshape(len(places), self.dim + 1)
        return rows[:, :-1], rows[:, -1]

    def save(self, progress: Progress | None = None, state: dict[str, Any] | None = None) -> None:
        """Make progress, or state, durable; what it describes was brought to the disk before."""
        with self._transaction():
            if state is not None:
                self._database.execute("DELETE FROM state")
                self._database.execute("INSERT INTO state VALUES (?)", (json.dumps(state, ensure_ascii=False),))
                self.state = state
            if progress is not None:
                row = (progress.key, progress.to_json())
                self._database.execute("INSERT OR REPLACE INTO progress VALUES (?, ?)", row)
                self._database.execute("DELETE FROM reports WHERE first < ?", (progress.texts,))

    def go_back(self, progress: Progress) -> None:
        """Make an earlier progress the last one, and drop what was kept of the texts that come after it."""
        with self._transaction():
            self._database.execute("DELETE FROM progress WHERE file > ?", (progress.key,))
            self._database.execute("DELETE FROM seen WHERE place >= ?", (progress.texts,))
            self._database.execute("DELETE FROM reports WHERE first >= ?", (progress.texts,))

    def drop_vectors(self) -> None:
        """Remove the vectors, when the job is done."""
        self._close_vectors()
        (self._folder / self.VECTORS).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        self._database.close()
        self._close_vectors()

    def _close_vectors(self) -> None:
        if self._vectors is not None:
            os.close(self._vectors)
            self._vectors = None


def _write_all(file: int, array: NDArray[np.float32], offset: int) -> None:
    data = memoryview(array.tobytes())
    while data:  # a write may take less than it was given
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
