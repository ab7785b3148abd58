"""Windows: runs of input rows that are encoded together and written together.

Where a window ends depends on the input alone, so an interrupted run makes the same windows again, hence the same
batches, hence the same bits.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ebr_lib.arrays import Ints
from ebr_lib.data.embeddings.base import DELIMITER, is_text, plain
from ebr_lib.data.hive import Position, Row, Source, Value, raw_of, read_rows
from ebr_lib.errors import DataError
from ebr_lib.inference.job import Job, Tally, TextEncoder
from ebr_lib.inference.store import Progress, Store, digest_of

WINDOW_BYTES = 1 << 26  # a window of very long rows ends earlier
FIRST_ROWS = 1 << 10  # of the first window; each next one may hold as many as all before it
# what ends a line for Spark, pandas, Hive or Python's splitlines, but not here: the two bytes of U+0085 and so on
LINE_BREAKS = (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9")
BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode categories of what does not show: spaces, controls, format marks


class Window(NamedTuple):
    """Rows that are encoded and brought to the disk together.

    :param places: number of each row's distinct text, -1 for none; `first_place` up to `after_place` occur here first.
    :param texts: those without a vector yet, the last of the new ones: an interrupted run may have encoded the others.
    :param origins: file and line of each of `texts`.
    :param rejects: lines of the reject file.
    :param file: number of the source in which it ends; `after` is the next row there.
    :param share: of the input that is done after it.
    """

    rows: list[list[Value]]
    places: Ints
    first_place: int
    after_place: int
    texts: list[str]
    prepared: Any
    digests: list[bytes]
    origins: list[tuple[str, int]]
    rejects: list[bytes]
    tally: Tally
    file: int
    after: Position
    share: float


def read_windows(job: Job, store: Store, encoder: TextEncoder, progress: Progress) -> Iterator[Window]:
    """Read the windows that follow what is written."""
    builder = _Builder(job, progress.tally.counts["read"])
    file, position = progress.file, progress.position
    done, total = sum(source.size for source in job.sources[:file]), max(1, sum(source.size for source in job.sources))
    after = position or Position(1, 0)
    for number, source in enumerate(job.sources[file:], start=file):
        for row in read_rows(source, job.wanted, job.layout, position):
            builder.add(source, row)
            after = row.after
            if builder.full and row.resumable:
                source.check_unchanged()  # rows of another file under this name must not come to the disk
                read = source.size * min(1.0, after.offset / max(1, source.extent))
                yield builder.build(store, encoder, number, after, (done + read) / total)
        source.check_unchanged()
        done += source.size
        position = None
    if not builder.empty:
        yield builder.build(store, encoder, len(job.sources) - 1, after, 1.0)


class _Builder:
    """Collects rows until a window is full.

    The first windows are small, so that encoding begins while the next is read and tokenised; the limit of a window
    follows from the number of rows before it.
    """

    def __init__(self, job: Job, rows_before: int) -> None:
        self._job, self._rows_before = job, rows_before
        self._must_be_plain = is_text(job.output)
        self._clear()

    def _clear(self) -> None:
        self._rows: list[list[Value]] = []
        self._texts: list[bytes | None] = []
        self._origins: list[tuple[str, int]] = []
        self._rejects: list[bytes] = []
        self._tally = Tally()
        self._bytes = 0

    @property
    def full(self) -> bool:
        most = min(self._job.window_rows, max(FIRST_ROWS, self._rows_before))
        return self._tally.counts["read"] >= most or self._bytes >= WINDOW_BYTES

    @property
    def empty(self) -> bool:
        return not self._tally.counts["read"]

    def add(self, source: Source, row: Row) -> None:
        self._tally.counts["read"] += 1
        self._bytes += len(row.raw) or sum(len(value) for value in row.values if value)
        if reason := row.reason or self._unfit(source, row):
            self._reject(source, row, reason)
            return
        *kept, text = row.values
        self._tally.counts["healed"] += row.lines > 1
        self._rows.append(self._as_plain(kept) if self._must_be_plain else kept)
        self._texts.append(text if _has_text(text) else None)
        self._origins.append((source.name, row.position.line))

    def _unfit(self, source: Source, row: Row) -> str:
        """Why a row that was read well cannot be in the output, if so."""
        text = row.values[-1]
        if _has_text(text):
            return ""
        found = "null text" if text is None else "blank text" if text else "empty text"
        if self._job.on_empty_text == "error":
            raise DataError(
                f"{source.path}, line {row.position.line}: {found} in column {self._job.text_column}; "
                "set on_empty_text to skip or empty, and restart: true, to accept such rows"
            )
        return found if self._job.on_empty_text == "skip" else ""

    def _reject(self, source: Source, row: Row, reason: str) -> None:
        self._tally.counts["rejected"] += 1
        self._tally.reasons[reason] += 1
        fields = [source.name, str(row.position.line), str(row.position.offset), reason]
        self._rejects.append(DELIMITER.join([*map(str.encode, fields), raw_of(self._job.wanted, row)]) + b"\n")

    def _as_plain(self, kept: list[Value]) -> list[Value]:
        """The kept values as text can hold them."""
        written = [plain(value) for value in kept]
        if written != kept:
            pairs = zip(self._job.kept, kept, written, strict=True)
            self._tally.altered.update(name for name, value, new in pairs if value != new)
        return written

    def build(self, store: Store, encoder: TextEncoder, file: int, after: Position, share: float) -> Window:
        """The window of the rows collected; the next one begins."""
        asked = [i for i, text in enumerate(self._texts) if text is not None]
        texts = [text for text in self._texts if text is not None]
        digests = [digest_of(text) for text in texts]
        numbers, first = store.number(digests)
        places = np.full(len(self._rows), -1, dtype=np.int64)
        places[asked] = numbers
        fresh = {number: i for i, number in reversed(list(enumerate(numbers))) if number >= first}
        new = [fresh[number] for number in sorted(fresh) if number >= store.kept]
        unknown = [texts[i].decode() for i in new]
        if self._must_be_plain:
            self._tally.breaks.update(line_breaks(self._job.kept, self._rows))
        self._tally.counts.update(
            written=len(self._rows),
            empty=len(self._rows) - len(asked),
            encoded=len(fresh),
            duplicates=len(asked) - len(fresh),
            line_breaks=self._tally.breaks.total(),
            altered=self._tally.altered.total(),
        )
        window = Window(
            rows=self._rows,
            places=places,
            first_place=first,
            after_place=first + len(fresh),
            texts=unknown,
            prepared=encoder.prepare(unknown) if unknown else None,
            digests=[digests[i] for i in new],
            origins=[self._origins[asked[i]] for i in new],
            rejects=self._rejects,
            tally=self._tally,
            file=file,
            after=after,
            share=share,
        )
        self._rows_before += self._tally.counts["read"]
        self._clear()
        return window


def _has_text(text: Value) -> bool:
    """Whether there is anything to encode: U+3000, the Chinese space, is nothing too, nor is U+200B."""
    return bool(text) and any(c.isalnum() or unicodedata.category(c) not in BLANK for c in (text or b"").decode())


def line_breaks(names: Sequence[str], rows: Sequence[Sequence[Value]]) -> Counter[str]:
    """Values, by column, that hold a line break other than `\\n`."""
    if not _has_break(b"\n".join([value for row in rows for value in row if value])):  # as nearly always
        return Counter()
    return Counter(name for row in rows for name, value in zip(names, row, strict=True) if value and _has_break(value))


def _has_break(value: bytes) -> bool:
    return any(sign in value for sign in LINE_BREAKS)
