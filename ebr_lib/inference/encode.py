"""Run an encoding job window by window: memory is bounded and a kill is harmless.

A window's new texts are encoded together, its rows are written in order, all is brought to the disk, and only then is
the job's progress saved. A run that was killed cuts its files back to the last progress and goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import IO, Any

import numpy as np

from ebr_lib.arrays import Vectors, broken_alone, not_finite
from ebr_lib.data.embeddings.base import Sink, open_work, sync
from ebr_lib.data.embeddings.files import finish_sink, open_sink, size_of
from ebr_lib.errors import DataError, NotFiniteError
from ebr_lib.files import named_when_full
from ebr_lib.inference.job import (
    EXAMPLES,
    REJECT_HEADER,
    Check,
    EncodeReport,
    Job,
    OnProgress,
    Outcome,
    Tally,
    TextEncoder,
)
from ebr_lib.inference.resume import REJECTS, drop_failed, start_or_continue
from ebr_lib.inference.store import STATE_FILE, Progress, Store
from ebr_lib.inference.windows import Window, read_windows
from ebr_lib.tables import shortened

WRITE_ROWS = 1 << 12
FULL = "the rows written so far are whole and stay there. Make room and run the same call again: it continues"
"""What a run says of a full disk."""


def run_job(job: Job, encoder: TextEncoder, on_progress: OnProgress, check: Check | None = None) -> Outcome:
    """Encode all sources of a job, continuing where an interrupted run stopped.

    :param on_progress: called with rows done, texts encoded in this run, and the share of the input that is done.
    :param check: looks at the outcome and the reject files before anything replaces an earlier output. Where it raises,
        all stays in the work folder: the same job asks it again, and another one takes its place.
    :raises DataError: a setting or an input differs from the interrupted run's; the disk is full; an input changed
        while it was read; or a text is empty and `on_empty_text` says error.
    """
    with named_when_full(job.folder, FULL):
        job.folder.mkdir(parents=True, exist_ok=True)
        drop_failed(job)
        with contextlib.closing(Store(job.folder)) as store:
            job, state, progress = start_or_continue(job, store)
            if not state["done"]:
                progress = _write_rows(job, store, encoder, state, progress, on_progress)
            store.drop_vectors()  # all are written, and what comes may need the room
            outcome = _outcome(state, progress.tally)
            if check is not None and (job.folder / REJECTS).exists():  # else it was moved to its place already
                try:
                    check(outcome, [job.folder / REJECTS])
                except DataError:
                    store.save(state=state | {"done": True, "failed": True})
                    raise
            finish_sink(job.output, job.folder)
            _move_rejects(job, outcome)
            return replace(outcome, size=size_of(job.output))


def _outcome(state: dict[str, Any], tally: Tally) -> Outcome:
    held = Tally.of(state["held"])
    inputs = [*state["earlier"], *state["inputs"]]
    return Outcome(tally, tally.counts - held.counts, tally.reasons - held.reasons, inputs)


def _move_rejects(job: Job, outcome: Outcome) -> None:
    """Move the rejects beside the output; where there are none, remove those of an earlier run."""
    work = job.folder / REJECTS
    if not work.exists():  # moved before the run was interrupted
        return
    if outcome.tally.reasons:
        os.replace(work, job.rejects)
    else:
        job.rejects.unlink(missing_ok=True)


def clean_up(job: Job) -> None:
    """Remove the work folder when the manifest is in its place; the state first, as the rest is useless without it."""
    (job.folder / STATE_FILE).unlink()
    shutil.rmtree(job.folder)


# --- encoding and writing -----------------------------------------------------------------------------------------


def _write_rows(  # noqa: PLR0917
    job: Job, store: Store, encoder: TextEncoder, state: dict[str, Any], progress: Progress, on_progress: OnProgress
) -> Progress:
    """Encode and write all windows that are left; returns the last progress."""
    sink = open_sink(
        job.output,
        job.folder,
        job.kept,
        encoder.dim,
        progress.sizes,
        header=job.with_header,
        vector_type=job.vector_type,
    )
    with contextlib.closing(sink), open_work(job.folder / REJECTS, progress.sizes) as rejects:
        if progress.sizes is None:
            rejects.write(REJECT_HEADER)
        store.begin(encoder.dim, progress.texts)
        writer = WindowWriter(store, sink, rejects, progress)
        writer.commit(progress, state)
        encode_windows(read_windows(job, store, encoder, progress), encoder, writer, on_progress)
    store.save(state=state | {"done": True})
    return writer.progress


def encode_windows(
    windows: Iterator[Window], encoder: TextEncoder, writer: WindowWriter, on_progress: OnProgress
) -> None:
    """Encode window after window, while one other thread reads the next and writes the last."""
    scaled = _ScaledProgress(on_progress, writer.progress)
    with ThreadPoolExecutor(1, "ebr-files") as files:
        coming: Future[Window | None] = files.submit(next, windows, None)
        writing: Future[None] | None = None
        while (window := coming.result()) is not None:
            coming = files.submit(next, windows, None)
            if window.texts:
                vectors, report = encoder.encode(window.prepared, partial(scaled.within, window))
                _check_finite(window, vectors, encoder)
                files.submit(writer.keep, window, vectors, report).result()
            if writing is not None:
                writing.result()
            writing = files.submit(writer.write, window)
            scaled.after(window)
        if writing is not None:
            writing.result()


class _ScaledProgress:
    """Reports how far a job is, within windows too."""

    def __init__(self, on_progress: OnProgress, start: Progress) -> None:
        self._on_progress = on_progress
        self._rows, self._texts, self._share = start.tally.counts["read"], 0, start.share
        on_progress(self._rows, 0, self._share)

    def within(self, window: Window, texts: int) -> None:
        part = texts / len(window.texts)
        share = self._share + part * (window.share - self._share)
        self._on_progress(self._rows + round(part * window.tally.counts["read"]), self._texts + texts, share)

    def after(self, window: Window) -> None:
        self._rows, self._share = self._rows + window.tally.counts["read"], window.share
        self._texts += len(window.texts)
        self._on_progress(self._rows, self._texts, self._share)


def _check_finite(window: Window, vectors: Vectors, encoder: TextEncoder) -> None:
    """Refuse NaN, and name texts that give it alone: in packed rows it spreads to the texts beside them."""
    wrong = not_finite(vectors).tolist()
    if not wrong:
        return

    def is_broken(i: int) -> bool:
        return len(not_finite(encoder.encode(encoder.prepare([window.texts[i]]), lambda done: None)[0])) > 0

    found, count = broken_alone(wrong, is_broken)
    named = "; ".join(
        f"{name}, line {line} ({shortened(window.texts[i], 60)!r})" for i in found for name, line in [window.origins[i]]
    )
    raise NotFiniteError(
        f"the model gives vectors that are not finite (NaN) for {count} texts, the first in {named}; set precision "
        "to float32 and restart: true, or check the model's weights, such as the embeddings of their tokens"
    )


class WindowWriter:
    """Writes windows in order, and saves the job's progress after each."""

    def __init__(self, store: Store, sink: Sink, rejects: IO[bytes], progress: Progress) -> None:
        self.progress = progress
        self._store, self._sink, self._rejects = store, sink, rejects

    def keep(self, window: Window, vectors: Vectors, report: EncodeReport) -> None:
        """Store new vectors, so that they are never made again."""
        examples = []
        for index, tokens, kept in report.cut[:EXAMPLES]:
            name, line = window.origins[index]
            text = window.texts[index][:80]
            examples.append({"file": name, "line": line, "tokens": tokens, "kept": kept, "text": text})
        lost = np.full(len(vectors), np.nan) if report.lost is None else report.lost
        self._store.keep(window.digests, vectors, lost, {"counts": dict(report.counts), "examples": examples})

    def write(self, window: Window) -> None:
        """Append a window's rows and rejects."""
        cut: Counter[str] = Counter()
        for start in range(0, len(window.rows), WRITE_ROWS):
            part = slice(start, start + WRITE_ROWS)
            valid = window.places[part] >= 0
            vectors = np.zeros((len(valid), self._store.dim), dtype=np.float32)
            vectors[valid], lost = self._store.vectors(window.places[part][valid])
            cut.update(truncated=int(np.count_nonzero(lost > 0)), uncounted=int(np.count_nonzero(np.isnan(lost))))
            self._sink.append(window.rows[part], vectors, valid)
        self._rejects.writelines(window.rejects)
        reports = self._store.reports_of(window.first_place, window.after_place)
        tally = self.progress.tally + window.tally + Tally(cut)
        for report in reports:
            tally += Tally(Counter(report["counts"]), examples=report["examples"])
        self.commit(Progress(window.file, window.after, window.after_place, None, window.share, tally))

    def commit(self, progress: Progress, state: dict[str, Any] | None = None) -> None:
        """Bring all that was written to the disk, then save the progress that says so."""
        sizes = self._sink.commit() | {REJECTS: sync(self._rejects)}
        self.progress = replace(progress, sizes=sizes)
        self._store.save(self.progress, state)
