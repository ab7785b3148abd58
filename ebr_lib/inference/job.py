"""An encoding job: files in, one embedding file out, a window at a time: memory is bounded and a kill is harmless.

A window is a run of rows that depends on the input alone. Its new texts are encoded together, its rows are written in
order, all is brought to the disk, and only then the job's state moves on. A run that was killed cuts its files back to
the last state and makes the same windows again, hence the same batches, hence the same bits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors, broken_alone, not_finite
from ebr_lib.data.embeddings.base import DELIMITER, PART_PREFIX, Sink, is_text, plain, read_manifest
from ebr_lib.data.embeddings.files import finish_sink, open_sink, reopen, size_of
from ebr_lib.data.hive import EMPTY_LINE, HEADER_AGAIN, Layout, Position, Row, Source, Value, raw_of, read_rows
from ebr_lib.errors import DataError, NotFiniteError
from ebr_lib.files import full_disk
from ebr_lib.inference.store import STATE_FILE, Store, digest_of
from ebr_lib.logs import logger
from ebr_lib.tables import shortened

REJECTS = "rejects"
REJECT_HEADER = DELIMITER.join([b"file", b"line", b"offset", b"reason", b"raw"]) + b"\n"
STATE_VERSION = 3  # of what a state holds and what its windows are; another version's run is not continued
WINDOW_BYTES = 1 << 26  # a window of very long rows ends earlier
FIRST_ROWS = 1 << 10  # of the first window; each next one may hold as many as all before it
WRITE_ROWS = 1 << 12
EXAMPLES = 5
PROGRESS = (
    "file",
    "position",
    "first",
    "sizes",
    "rejects",
    "counts",
    "reasons",
    "breaks",
    "altered",
    "examples",
    "share",
)
EMPTY_TEXTS = ("null text", "blank text", "empty text")
SKIPPED = (*EMPTY_TEXTS, EMPTY_LINE, HEADER_AGAIN)  # rejects that are no loss: nothing was there to read
# what ends a line for Spark, pandas, Hive or Python's splitlines, but not here: the two bytes of U+0085 and so on
LINE_BREAKS = (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9")
BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode categories of what does not show: spaces, controls, marks of format

Told = Callable[[int], None]
Check = Callable[["Outcome", Sequence[Path]], None]  # raises where what was made is not to be put in its place
Progress = Callable[[int, int, float], None]  # rows done, texts encoded in this run, share of the input


class TextEncoder(Protocol):
    """What a job needs of an encoder; the model's own is `ebr_lib.model.encoder.Encoder`."""

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""

    def prepare(self, texts: list[str]) -> Any:
        """What can be done while other texts are encoded: tokens, say."""

    def encode(self, prepared: Any, told: Told) -> tuple[Vectors, EncodeReport]:
        """Vectors (texts, dim) of texts that `prepare` was given; `told` hears now and then how many are done."""


@dataclass(frozen=True)
class EncodeReport:
    """What was counted over texts that were encoded.

    `cut` names some that were cut: index, tokens, tokens kept. `lost` says of each text how many tokens were cut off;
    None when that is not known.
    """

    counts: Counter[str] = field(default_factory=Counter)
    cut: list[tuple[int, int, int]] = field(default_factory=list)
    lost: NDArray[Any] | None = None


def work_folder(output: Path) -> Path:
    """Where a job works, beside its output; gone when the job is done."""
    return Path(f"{output}.work")


def rejects_path(output: Path) -> Path:
    """Where the rejects of an output lie."""
    return Path(f"{output}.rejects")


@dataclass(frozen=True)
class Job:
    """What to encode, and where to.

    :param settings: all that decides what is written; a run that was interrupted goes on only under equal settings.
    :param inputs: name, size and sha256 of each source.
    :param append: write behind what a finished output holds already, and take new files into a run that goes on.
    """

    sources: tuple[Source, ...]
    layout: Layout
    text_column: str
    kept: tuple[str, ...]
    output: Path
    settings: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    on_empty_text: str = "skip"
    window_rows: int = 16384
    append: bool = False
    with_header: bool = True

    @property
    def folder(self) -> Path:
        """Where the job works."""
        return work_folder(self.output)

    @property
    def rejects(self) -> Path:
        """Where its rejects lie once it is done."""
        return rejects_path(self.output)

    @property
    def wanted(self) -> list[str]:
        """The columns to read: those kept, then the text."""
        return [*self.kept, self.text_column]


@dataclass(frozen=True)
class Outcome:
    """What the output holds: rows and tokens counted, reasons of rejects, texts that were cut, input files, bytes.

    `breaks` counts, by column, the kept values with a line break that other readers split rows at; `altered` those that
    text cannot hold, which were written with a space in place of each sign that ends fields or rows. `new_counts` and
    `new_reasons` are those of the rows that this job added to an output that was there before.
    """

    counts: Counter[str]
    reasons: Counter[str]
    breaks: Counter[str]
    altered: Counter[str]
    new_counts: Counter[str]
    new_reasons: Counter[str]
    examples: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    size: int


class Window(NamedTuple):
    """Rows that are encoded and brought to the disk together.

    `places` says which distinct text a row has, -1 for none. `fresh` of them, from `first_place` on, appear here first.
    `texts` are those that have no vector yet, the last of the fresh ones: an interrupted run has encoded the others.
    """

    rows: list[list[Value]]
    places: NDArray[np.int64]
    first_place: int
    fresh: int
    texts: list[str]
    prepared: Any
    digests: list[bytes]
    origins: list[tuple[str, int]]
    rejects: list[bytes]
    counts: Counter[str]
    reasons: Counter[str]
    breaks: Counter[str]
    altered: Counter[str]
    file: int
    after: Position
    share: float

    @property
    def after_place(self) -> int:
        """The place behind those that appear here first."""
        return self.first_place + self.fresh


def run_job(job: Job, encoder: TextEncoder, progress: Progress, check: Check | None = None) -> Outcome:
    """Encode all sources of a job, going on where an interrupted run stopped.

    :param check: looks at the outcome and the reject files before anything is put in its place; where it raises, all
        stays in the work folder: the same job asks it again, and another one takes its place.

    :param progress: told how many rows are done, how many texts this run encoded, and what share of the input is done.
    :raises DataError: a setting or an input is not what the interrupted run had; the disk is full; an input changed
        while it was read; or a text is empty and `on_empty_text` says error.
    """
    with told_when_full(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        _drop_failed(job)
        with contextlib.closing(Store(job.folder)) as store:
            return _run(job, store, encoder, progress, check)


def _drop_failed(job: Job) -> None:
    """Drop a run whose outcome was refused, where this job is another one."""
    if not (job.folder / STATE_FILE).exists():
        return
    with contextlib.closing(Store(job.folder)) as store:
        state = store.state
        if not state or not state.get("failed") or not _differs(job, state):
            return
        logger.info("放弃上次失败的运行: %s (the run that failed is dropped)", job.folder)
        shutil.rmtree(job.folder)
    job.folder.mkdir()


def _differs(job: Job, state: dict[str, Any]) -> bool:
    known = [*state["earlier"], *state["inputs"]]
    return state.get("version") != STATE_VERSION or bool(
        _changed_settings(state["settings"], job)
        or _changed_contents(known, job)
        or _gone(state["inputs"], job)
        or new_inputs(job, known)
    )


@contextlib.contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into an error that says what is left and what to do.

    :raises DataError: the disk is full.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if (said := full_disk(error)) is None:
            raise
        raise DataError(
            f"{folder}: the disk is full ({said}); the rows written so far are whole and stay there. "
            "Make room and run the same call again: it continues"
        ) from error


def refuse_other_engine(folder: Path, in_parts: bool) -> None:
    """Make sure that a work folder holds no unfinished run of the engine that works otherwise.

    :param in_parts: the engine that is to run writes a part a file.
    :raises DataError: it holds one.
    """
    state, part = folder / STATE_FILE, next(folder.glob(f"{PART_PREFIX}*"), None)
    if other := (state if state.exists() else None) if in_parts else part:
        engine = "local" if in_parts else "ray"
        raise DataError(
            f"{folder} holds an unfinished run of engine {engine} ({other.name}); end it with engine: {engine}, "
            "or drop it with restart: true"
        )


def drop_run(folder: Path) -> None:
    """Take away the work folder of an unfinished run.

    :raises DataError: the run is not ended, but at work.
    """
    with contextlib.ExitStack() as held:
        for state in [*folder.glob(STATE_FILE), *folder.glob(f"{PART_PREFIX}*/{STATE_FILE}")]:
            with contextlib.suppress(sqlite3.DatabaseError):  # a damaged one is nobody's
                held.enter_context(contextlib.closing(Store(state.parent)))
        shutil.rmtree(folder)


def _run(job: Job, store: Store, encoder: TextEncoder, progress: Progress, check: Check | None) -> Outcome:
    state = store.state or _first_state(job)
    _check_version(job, state)
    back, state = _without_changed(job, state)
    job = _continued(job, state)
    if back:
        store.go_back(state)
    if not state["done"]:
        store.begin(encoder.dim, state["first"])
        state = _write_all(job, store, encoder, state, progress)
    store.drop_vectors()  # all are written, and what comes may need the room
    outcome = _outcome(state)
    if check is not None and (job.folder / REJECTS).exists():  # else it was put in its place already
        try:
            check(outcome, [job.folder / REJECTS])
        except DataError:
            store.commit(state | {"failed": True})
            raise
    finish_sink(job.output, job.folder)
    _move_rejects(job, state)
    return replace(outcome, size=size_of(job.output))


def _outcome(state: dict[str, Any]) -> Outcome:
    counts, reasons = Counter(state["counts"]), Counter(state["reasons"])
    return Outcome(
        counts=counts,
        reasons=reasons,
        breaks=Counter(state["breaks"]),
        altered=Counter(state["altered"]),
        new_counts=counts - Counter(state["held"]["counts"]),
        new_reasons=reasons - Counter(state["held"]["reasons"]),
        examples=state["examples"],
        inputs=[*state["earlier"], *state["inputs"]],
        size=0,
    )


def _first_state(job: Job) -> dict[str, Any]:
    for leftover in job.folder.iterdir():  # of a run that was killed before its first state
        if not leftover.name.startswith(STATE_FILE):
            leftover.unlink()
    before = _before(job)
    earlier = job.rejects.read_bytes() if before and job.rejects.exists() else REJECT_HEADER
    (job.folder / REJECTS).write_bytes(earlier)
    counts = {name: count for name, count in before.get("rows", {}).items() if count is not None}
    reasons = before.get("rejects", {}).get("reasons", {})
    return {
        "version": STATE_VERSION,
        "settings": job.settings,
        "earlier": before.get("inputs", []),
        "inputs": new_inputs(job, before.get("inputs", [])),
        "file": 0,
        "position": None,
        "first": 0,
        "sizes": reopen(job.output, job.folder) if before else None,
        "rejects": len(earlier),
        "counts": counts,
        "reasons": reasons,
        "breaks": before.get("line_breaks", {}),
        "altered": before.get("altered", {}),
        "held": {"counts": counts, "reasons": reasons},
        "examples": before.get("truncated", {}).get("examples", []),
        "share": 0.0,
        "before": None,
        "done": False,
    }


def _before(job: Job) -> dict[str, Any]:
    """The manifest of the finished output that is appended to; empty where there is none."""
    if not (job.append and job.output.exists()):
        return {}
    before = read_manifest(job.output)
    if before is None or "inputs" not in before:
        raise DataError(
            f"{job.output} has no manifest, so which files it holds is not known; append needs the output of an "
            "earlier run: leave append out to write it anew"
        )
    if (size := size_of(job.output)) != before.get("bytes", size):
        raise DataError(
            f"{job.output} holds {size} bytes, its manifest says {before['bytes']}: the file was cut short or "
            "replaced; leave append out to write it anew"
        )
    changes = [*_changed_settings(before["settings"], job), *_changed_contents(before["inputs"], job)]
    if changes:
        raise DataError(
            f"{job.output} cannot be appended to, for these have changed since it was written:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nGo back to what they were, or leave append out to write it anew"
        )
    new = len(new_inputs(job, before["inputs"]))
    logger.info("追加: %d 个新文件 (append: %d of %d files are new)", new, new, len(job.inputs))
    return before


def new_inputs(job: Job, held: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The inputs that are not held yet."""
    names = {entry["path"] for entry in held}
    return [entry for entry in job.inputs if entry["path"] not in names]


# --- going on -----------------------------------------------------------------------------------------------------


def _check_version(job: Job, state: dict[str, Any]) -> None:
    if state.get("version") != STATE_VERSION:
        raise DataError(
            f"{job.folder} holds an unfinished run of another version of this program; end it with that version, or "
            "drop it with restart: true"
        )


def _continued(job: Job, state: dict[str, Any]) -> Job:
    """Check that the interrupted run was the same job, and take its files in its order.

    With `append`, new files go behind them; but not into a run that had written all of its rows: that one is finished
    as it was, and what is new is for the next.
    """
    known = [*state["earlier"], *state["inputs"]]
    new = new_inputs(job, known)
    changes = [*_changed_settings(state["settings"], job), *_changed_contents(known, job), *_gone(state["inputs"], job)]
    if not job.append:
        changes += [f"input {entry['path']}: new (append: true takes it in)" for entry in new]
    _refuse(job, changes)
    if not state["done"]:
        state["inputs"] = [*state["inputs"], *new]
    sources = {source.name: source for source in job.sources}
    taken = tuple(sources[entry["path"]] for entry in state["inputs"])
    return replace(job, sources=taken, inputs=tuple(state["inputs"]))


def _without_changed(job: Job, state: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """The state with inputs as they are now that have changed since, where no row of theirs was written.

    One that was being read is read anew: the state goes back to where the one before it ended. Says too whether
    anything has changed, for then texts that were kept ahead may not come.
    """
    now = {entry["path"]: entry for entry in job.inputs}
    changed = [i for i, e in enumerate(state["inputs"]) if now.get(e["path"], e)["sha256"] != e["sha256"]]
    if not changed or state["done"]:
        return False, state
    for earlier in (state, state | (state["before"] or {})):
        if changed[0] > earlier["file"] or not earlier["position"]:
            names = ", ".join(state["inputs"][i]["path"] for i in changed[:EXAMPLES])
            logger.info("输入有变，重新读取: %s (inputs that changed are read anew)", names)
            return True, earlier | {"inputs": [now.get(entry["path"], entry) for entry in state["inputs"]]}
    return False, state


def refuse_other_job(job: Job, settings: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Make sure that the interrupted run had the same settings and the same files, whatever these hold.

    :raises DataError: it had others.
    """
    new = [f"input {entry['path']}: new" for entry in new_inputs(job, inputs)]
    _refuse(job, [*_changed_settings(settings, job), *_gone(inputs, job), *new])


def _refuse(job: Job, changes: list[str]) -> None:
    if changes:
        raise DataError(
            f"{job.folder} holds an unfinished run that cannot be continued, for these have changed:\n"
            + "\n".join(f"  - {change}" for change in changes)
            + "\nGo back to what they were, or drop that run with restart: true"
        )


def _changed_settings(before: dict[str, Any], job: Job) -> list[str]:
    """A line for each setting that differs."""
    names, now = dict.fromkeys([*before, *job.settings]), job.settings
    return [f"{n}: {before.get(n)!r} then, {now.get(n)!r} now" for n in names if before.get(n) != now.get(n)]


def _changed_contents(before: Iterable[dict[str, Any]], job: Job) -> list[str]:
    """A line for each input file that holds something else."""
    then = {entry["path"]: entry["sha256"] for entry in before}
    now = {entry["path"]: entry["sha256"] for entry in job.inputs}
    return [f"input {path}: its contents changed" for path in then if now.get(path, then[path]) != then[path]]


def _gone(before: Iterable[dict[str, Any]], job: Job) -> list[str]:
    """A line for each input file that is no longer there."""
    now = {entry["path"] for entry in job.inputs}
    return [f"input {entry['path']}: no longer there" for entry in before if entry["path"] not in now]


# --- reading windows ----------------------------------------------------------------------------------------------


def _has_text(text: Value) -> bool:
    """Whether there is anything to encode: U+3000, the Chinese space, is nothing too, nor is U+200B."""
    return bool(text) and any(c.isalnum() or unicodedata.category(c) not in BLANK for c in (text or b"").decode())


class _Builder:
    """Collects rows until a window is full.

    The first windows are small, so that encoding begins while the next is read and tokenised; how many rows a window
    may hold follows from the rows before it, so that an interrupted run makes the same windows again.
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
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._altered: Counter[str] = Counter()
        self._bytes = 0

    @property
    def full(self) -> bool:
        most = min(self._job.window_rows, max(FIRST_ROWS, self._rows_before))
        return self._counts["read"] >= most or self._bytes >= WINDOW_BYTES

    @property
    def empty(self) -> bool:
        return not self._counts["read"]

    def add(self, source: Source, row: Row) -> None:
        self._counts["read"] += 1
        self._bytes += len(row.raw) or sum(len(value) for value in row.values if value)
        reason = row.reason or self._unfit(source, row)
        if reason:
            self._reject(source, row, reason)
            return
        *kept, text = row.values
        self._counts["healed"] += row.lines > 1
        self._rows.append(self._fitting(kept) if self._must_be_plain else kept)
        self._texts.append(text if _has_text(text) else None)
        self._origins.append((source.name, row.position.line))

    def _fitting(self, kept: list[Value]) -> list[Value]:
        """The kept values as text can hold them."""
        fitting = [plain(value) for value in kept]
        if fitting != kept:
            pairs = zip(self._job.kept, kept, fitting, strict=True)
            self._altered.update(name for name, value, written in pairs if value != written)
        return fitting

    def _unfit(self, source: Source, row: Row) -> str:
        """Why a row that was read well cannot be in the output, if so."""
        text = row.values[-1]
        if _has_text(text):
            return ""
        found = "null text" if text is None else "blank text" if text else "empty text"
        if self._job.on_empty_text == "error":
            raise DataError(
                f"{source.path}, line {row.position.line}: {found} in column {self._job.text_column}; "
                "set on_empty_text to skip or empty, and restart: true, to go on over such rows"
            )
        return found if self._job.on_empty_text == "skip" else ""

    def _reject(self, source: Source, row: Row, reason: str) -> None:
        self._counts["rejected"] += 1
        self._reasons[reason] += 1
        where = [str(row.position.line).encode(), str(row.position.offset).encode()]
        raw = raw_of(self._job.wanted, row)
        self._rejects.append(DELIMITER.join([source.name.encode(), *where, reason.encode(), raw]) + b"\n")

    def build(self, store: Store, encoder: TextEncoder, file: int, after: Position, share: float) -> Window:
        asked = [i for i, text in enumerate(self._texts) if text is not None]
        texts = [text for text in self._texts if text is not None]
        digests = [digest_of(text) for text in texts]
        numbers, first = store.number(digests)
        places = np.full(len(self._rows), -1, dtype=np.int64)
        places[asked] = numbers
        fresh = {number: i for i, number in reversed(list(enumerate(numbers))) if number >= first}
        new = [fresh[number] for number in sorted(fresh) if number >= store.kept]
        self._counts["written"] += len(self._rows)
        self._counts["empty"] += len(self._rows) - len(asked)
        self._counts["encoded"] += len(fresh)
        self._counts["duplicates"] += len(asked) - len(fresh)
        unknown = [texts[i].decode() for i in new]
        breaks = line_breaks(self._job.kept, self._rows) if self._must_be_plain else Counter[str]()
        self._counts["line_breaks"] += breaks.total()
        self._counts["altered"] += self._altered.total()
        window = Window(
            rows=self._rows,
            places=places,
            first_place=first,
            fresh=len(fresh),
            texts=unknown,
            prepared=encoder.prepare(unknown) if unknown else None,
            digests=[digests[i] for i in new],
            origins=[self._origins[asked[i]] for i in new],
            rejects=self._rejects,
            counts=self._counts,
            reasons=self._reasons,
            breaks=breaks,
            altered=self._altered,
            file=file,
            after=after,
            share=share,
        )
        self._rows_before += self._counts["read"]
        self._clear()
        return window


def line_breaks(names: Sequence[str], rows: Sequence[Sequence[Value]]) -> Counter[str]:
    """Values, by column, that hold a line break other than `\\n`."""
    every = b"\n".join([value for row in rows for value in row if value])
    if not _has_break(every):  # as nearly always
        return Counter()
    return Counter(name for row in rows for name, value in zip(names, row, strict=True) if value and _has_break(value))


def _has_break(value: bytes) -> bool:
    return any(sign in value for sign in LINE_BREAKS)


def _windows(job: Job, store: Store, encoder: TextEncoder, state: dict[str, Any]) -> Iterator[Window]:
    builder = _Builder(job, state["counts"].get("read", 0))
    file, position = state["file"], Position(*state["position"]) if state["position"] else None
    sizes = [source.size for source in job.sources]
    done, every = sum(sizes[:file]), max(1, sum(sizes))
    after = position or Position(1, 0)
    for number, source in enumerate(job.sources[file:], start=file):
        for row in read_rows(source, job.wanted, job.layout, position):
            builder.add(source, row)
            after = row.after
            if builder.full and row.resumable:
                source.check_unchanged()  # what another file held under this name must not come to the disk
                read = source.size * min(1.0, after.offset / max(1, source.extent))
                yield builder.build(store, encoder, number, after, (done + read) / every)
        source.check_unchanged()
        done += source.size
        position = None
    if not builder.empty:
        yield builder.build(store, encoder, len(job.sources) - 1, after, 1.0)


# --- encoding and writing -----------------------------------------------------------------------------------------


def _write_all(
    job: Job, store: Store, encoder: TextEncoder, state: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Encode and write all windows that are left; returns the last state."""
    sink = open_sink(job.output, job.folder, job.kept, encoder.dim, state["sizes"], header=job.with_header)
    with contextlib.closing(sink), open(job.folder / REJECTS, "r+b") as rejects:
        rejects.truncate(state["rejects"])
        rejects.seek(0, os.SEEK_END)
        writer = _Writer(store, sink, rejects, state)
        _pump(_windows(job, store, encoder, state), encoder, writer, progress)
        writer.commit({"done": True, "share": 1.0})
    return writer.state


def _pump(windows: Iterator[Window], encoder: TextEncoder, writer: _Writer, progress: Progress) -> None:
    """Encode window after window, while one other thread reads the next and writes the last."""
    meter = _Meter(progress, writer.state)
    with ThreadPoolExecutor(1, "ebr-files") as files:
        coming: Future[Window | None] = files.submit(next, windows, None)
        writing: Future[None] | None = None
        while (window := coming.result()) is not None:
            coming = files.submit(next, windows, None)
            if window.texts:
                vectors, report = encoder.encode(window.prepared, partial(meter.within, window))
                _check_finite(window, vectors, encoder)
                files.submit(writer.keep, window, vectors, report).result()
            if writing is not None:
                writing.result()
            writing = files.submit(writer.write, window)
            meter.after(window)
        if writing is not None:
            writing.result()


class _Meter:
    """Tells how far a job is, within windows too."""

    def __init__(self, progress: Progress, state: dict[str, Any]) -> None:
        self._progress = progress
        self._rows, self._texts, self._share = state["counts"].get("read", 0), 0, state["share"]
        progress(self._rows, 0, self._share)

    def within(self, window: Window, texts: int) -> None:
        part = texts / len(window.texts)
        share = self._share + part * (window.share - self._share)
        self._progress(self._rows + round(part * window.counts["read"]), self._texts + texts, share)

    def after(self, window: Window) -> None:
        self._rows, self._share = self._rows + window.counts["read"], window.share
        self._texts += len(window.texts)
        self._progress(self._rows, self._texts, self._share)


def _check_finite(window: Window, vectors: Vectors, encoder: TextEncoder) -> None:
    """Refuse NaN, and name texts that give it alone: in packed rows it spreads to the texts beside them."""
    wrong = not_finite(vectors).tolist()
    if not wrong:
        return
    found, count = broken_alone(wrong, lambda i: len(not_finite(_vector_of(window.texts[i], encoder))) > 0)
    named = "; ".join(
        f"{name}, line {line} ({shortened(window.texts[i], 60)!r})" for i in found for name, line in [window.origins[i]]
    )
    raise NotFiniteError(
        f"the model gives vectors that are not finite (NaN) for {count} texts, the first in {named}; set precision "
        "to float32 and restart: true, or check the model's weights, such as the embeddings of their tokens"
    )


def _vector_of(text: str, encoder: TextEncoder) -> Vectors:
    return encoder.encode(encoder.prepare([text]), lambda done: None)[0]


class _Writer:
    """Writes windows in order, and moves the job's state on behind each."""

    def __init__(self, store: Store, sink: Sink, rejects: IO[bytes], state: dict[str, Any]) -> None:
        self.state = state
        self._store, self._sink, self._rejects = store, sink, rejects
        self.commit({})

    def keep(self, window: Window, vectors: Vectors, report: EncodeReport) -> None:
        examples = [_example(window, *cut) for cut in report.cut[:EXAMPLES]]
        told = {"counts": dict(report.counts), "examples": examples}
        lost = np.full(len(vectors), np.nan) if report.lost is None else report.lost
        self._store.keep(window.digests, vectors, lost, told)

    def write(self, window: Window) -> None:
        counts = window.counts.copy()
        for start in range(0, len(window.rows), WRITE_ROWS):
            part = slice(start, start + WRITE_ROWS)
            valid = window.places[part] >= 0
            vectors = np.zeros((len(valid), self._store.dim), dtype=np.float32)
            vectors[valid], lost = self._store.vectors(window.places[part][valid])
            counts["truncated"] += int(np.count_nonzero(lost > 0))
            counts["uncounted"] += int(np.count_nonzero(np.isnan(lost)))
            self._sink.append(window.rows[part], vectors, valid)
        self._rejects.writelines(window.rejects)
        reports = self._store.reports_of(window.first_place, window.after_place)
        examples = [example for report in reports for example in report["examples"]]
        for report in reports:
            counts.update(report["counts"])
        changes = {
            "file": window.file,
            "position": list(window.after),
            "first": window.after_place,
            "counts": dict(Counter(self.state["counts"]) + counts),
            "reasons": dict(Counter(self.state["reasons"]) + window.reasons),
            "breaks": dict(Counter(self.state["breaks"]) + window.breaks),
            "altered": dict(Counter(self.state["altered"]) + window.altered),
            "examples": [*self.state["examples"], *examples][:EXAMPLES],
            "share": window.share,
        }
        if window.file != self.state["file"] or not self.state["position"]:
            changes["before"] = {name: self.state[name] for name in PROGRESS}
        self.commit(changes)

    def commit(self, changes: dict[str, Any]) -> None:
        """Bring all that was written to the disk, then the state that says so."""
        self._rejects.flush()
        os.fsync(self._rejects.fileno())
        self.state |= changes | {"sizes": self._sink.commit(), "rejects": self._rejects.tell()}
        self._store.commit(self.state)


def _example(window: Window, index: int, tokens: int, kept: int) -> dict[str, Any]:
    name, line = window.origins[index]
    return {"file": name, "line": line, "tokens": tokens, "kept": kept, "text": window.texts[index][:80]}


# --- the end ------------------------------------------------------------------------------------------------------


def _move_rejects(job: Job, state: dict[str, Any]) -> None:
    """Put the rejects beside the output; where there are none, take those of an earlier run away."""
    work = job.folder / REJECTS
    if not work.exists():  # moved before the run was interrupted
        return
    if state["reasons"]:
        os.replace(work, job.rejects)
    else:
        job.rejects.unlink(missing_ok=True)


def clean_up(job: Job) -> None:
    """Take the work folder away, when the manifest is in its place; the state first, as without it the rest is void."""
    (job.folder / STATE_FILE).unlink()
    shutil.rmtree(job.folder)
