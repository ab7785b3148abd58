"""What an encoding job knows: which texts have a vector already, and how far it is; kept so that a kill loses nothing.

One SQLite file holds the hashes of the texts and the state of the job, so that both change in one transaction; the
vectors of the distinct texts lie beside it as raw float32. Memory stays the same however many texts there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.errors import DataError

ASKED_AT_ONCE = 5000  # hashes in one query; SQLite takes up to 32766
DIGEST_BYTES = 16


def digest_of(text: bytes) -> bytes:
    """A text's 128-bit hash: two of a billion texts share one with a chance of 1 in 10**20."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


class Store:
    """The distinct texts of a job, numbered by first appearance, and the job's state."""

    STATE, VECTORS = "state.sqlite", "vectors.f32"

    def __init__(self, folder: Path) -> None:
        """Open or make the store in `folder`.

        :raises DataError: another run holds it.
        """
        self._folder = folder
        self._database = sqlite3.connect(folder / self.STATE, timeout=0, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")  # a second run on the same output must not start
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("CREATE TABLE IF NOT EXISTS state (value TEXT)")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID"
            )
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise DataError(f"{folder}: another run is writing this output ({error}); wait for it to end") from error
        row = self._database.execute("SELECT value FROM state").fetchone()
        self.state: dict[str, Any] | None = json.loads(row[0]) if row else None
        self._waiting: dict[bytes, int] = {}  # numbered, but not committed yet
        self._numbered = 0
        self._dim = 0

    def begin(self, dim: int) -> None:
        """Open the vectors, cut to what the last commit knows of."""
        self._dim = dim
        (self._numbered,) = self._database.execute("SELECT count(*) FROM seen").fetchone()
        self._vectors = os.open(self._folder / self.VECTORS, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._vectors, self._numbered * dim * 4)

    def number(self, digests: Sequence[bytes]) -> tuple[list[int], int]:
        """Number texts by their hashes: the place of each, and the first place that is new."""
        first_new = self._numbered
        known = self._known(list(dict.fromkeys(digests)))
        places = []
        for digest in digests:
            place = known.get(digest)
            if place is None:
                place = known[digest] = self._waiting[digest] = self._numbered
                self._numbered += 1
            places.append(place)
        return places, first_new

    def _known(self, digests: list[bytes]) -> dict[bytes, int]:
        known = {digest: place for digest in digests if (place := self._waiting.get(digest)) is not None}
        rest = [digest for digest in digests if digest not in known]
        for start in range(0, len(rest), ASKED_AT_ONCE):
            part = rest[start : start + ASKED_AT_ONCE]
            marks = ",".join("?" * len(part))
            known.update(self._database.execute(f"SELECT digest, place FROM seen WHERE digest IN ({marks})", part))
        return known

    def add(self, vectors: NDArray[np.float32], first: int) -> None:
        """Store the vectors of the places from `first` on."""
        _write_all(self._vectors, np.ascontiguousarray(vectors, dtype=np.float32), first * self._dim * 4)

    def vectors(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of places, float32, places × dimensions."""
        size = self._dim * 4
        chunks = [os.pread(self._vectors, size, place * size) for place in places.tolist()]
        return np.frombuffer(b"".join(chunks), dtype=np.float32).reshape(len(places), self._dim)

    def commit(self, digests: Sequence[bytes], first: int, state: dict[str, Any]) -> None:
        """Make the texts from place `first` on and the job's state durable, in one step."""
        if digests:
            os.fsync(self._vectors)
        self._database.execute("BEGIN IMMEDIATE")
        try:
            numbered = ((digest, first + i) for i, digest in enumerate(digests))
            self._database.executemany("INSERT INTO seen VALUES (?, ?)", numbered)
            self._database.execute("DELETE FROM state")
            self._database.execute("INSERT INTO state VALUES (?)", (json.dumps(state, ensure_ascii=False),))
            self._database.execute("COMMIT")
        except BaseException:
            self._database.rollback()
            raise
        self.state = state
        for digest in digests:
            self._waiting.pop(digest, None)

    def close(self) -> None:
        self._database.close()
        if self._dim:
            os.close(self._vectors)
            self._dim = 0


def _write_all(file: int, array: NDArray[np.float32], offset: int) -> None:
    data = memoryview(array.tobytes())
    while data:  # a write may take less than it was given
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
