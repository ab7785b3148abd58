"""What is served: an index with its encoder, BM25 over the same rows, and requests encoded together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ebr_lib.arrays import Vectors
from ebr_lib.data.bm25 import Bm25
from ebr_lib.data.queries import DOCUMENT_TEXTS
from ebr_lib.errors import DataError, UserError
from ebr_lib.index import store
from ebr_lib.index.after import words_column
from ebr_lib.index.opened import Opened, SearchIndex, opened
from ebr_lib.index.search import query_encoder, query_spec
from ebr_lib.model.bases import sides_have_own_weights
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import prompt_of
from ebr_lib.model.packaged import model_label
from ebr_lib.model.provenance import Provenance
from ebr_lib.model.spec import EncoderSpec

Kind = Literal["query", "document", "none"]
"""What a text is: with its side's prompt, or as it is given."""
Hit = tuple[float, dict[str, Any]]
"""Score and kept columns of a row, its number as `store.ROW`."""
MOST_TEXTS = 64  # per batch of requests
MOST_WAITING = 512  # requests; the next one is refused
MOST_RERANKS = 64  # requests that wait for the reranker, which takes long
SHOWN_FIRST = (*DOCUMENT_TEXTS, "title", "name")


class Engine:
    """An index folder and the encoder of its model, both as they are on disk now."""

    def __init__(self, folder: str, model_name: str | None, knobs: Mapping[str, Any]) -> None:
        """Open the index and load its model.

        :param knobs: prompt, own code and changed vectors, as `search` takes them.
        :raises MissingError: there is no index.
        :raises ModelError: its model does not load, or is another one now.
        """
        self.folder, self._model_name, self._knobs = folder, model_name, knobs
        self._kinds: dict[Kind, Encoder] = {}
        held, encoder = self.current()
        encoder.encode(["a"])
        self.columns = held.columns

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.current()[1].dim

    @property
    def sides_differ(self) -> bool:
        """Whether a text has another vector as a query than as a document."""
        held, encoder = self.current()
        return self._own_weights(held) or encoder.prompt != "" or self._document_prompt(held, encoder) != ""

    @property
    def label(self) -> str:
        """The model's short name, as it was given when the vectors were made."""
        held = self.current()[0]
        made_by = Provenance.of(held.manifest).name
        return model_label(self._model_name or made_by or self._spec(held).model_name)

    def current(self) -> tuple[Opened, Encoder]:
        """The index and its query encoder, read again if the folder has changed."""
        held = opened(self.folder, store.index_stamp(self.folder))
        encoder = query_encoder(self._spec(held), Provenance.of(held.manifest), held.dim, self.folder)
        if self._kinds.get("query") is not encoder:
            self._kinds = {"query": encoder}
        return held, encoder

    def encode(self, kind: Kind, texts: Sequence[str]) -> tuple[Opened, Vectors]:
        """Vectors of texts, and the index that they belong to."""
        held, encoder = self.current()
        kinds = self._kinds
        if kind not in kinds:
            kinds[kind] = self._other_kind(kind, held, encoder)
        return held, kinds[kind].encode(texts)

    def _spec(self, held: Opened) -> EncoderSpec:
        spec = query_spec(held.manifest, held.dim, self._model_name, **self._knobs)
        return replace(spec, backend="auto")  # unlike a single search, a server has the time to convert the model

    def _other_kind(self, kind: Kind, held: Opened, encoder: Encoder) -> Encoder:
        if kind == "document" and self._own_weights(held):
            return replace(self._spec(held), document_prompt=Provenance.of(held.manifest).prompt).encoder("document")
        return encoder.with_prompt("" if kind == "none" else self._document_prompt(held, encoder))

    def _document_prompt(self, held: Opened, encoder: Encoder) -> str:
        return prompt_of(encoder.model, "document", Provenance.of(held.manifest).prompt)

    def _own_weights(self, held: Opened) -> bool:
        """Whether documents have other weights than queries."""
        return sides_have_own_weights(self._spec(held).model_name)


class Words:
    """BM25 over the rows of an index, read again when they change."""

    def __init__(self, engine: Engine, column: str) -> None:
        self.column = column
        self._known = self._read(engine.current()[0])

    def _read(self, held: Opened) -> tuple[SearchIndex, Bm25]:
        if not isinstance(held, SearchIndex):
            raise DataError(f"{held.folder}: BM25 reads no rows from Milvus; serve it with bm25: false")
        if held.bm25 is not None and words_column(held.manifest) == self.column:
            return held, held.bm25
        return held, Bm25([text or "" for text in held.rows.column(self.column).to_pylist()])

    def find(self, held: Opened, query: str, k: int) -> list[Hit]:
        """The k best rows that share a word with the query."""
        known = self._known  # one read: another thread may replace it
        if known[0] is not held:
            known = self._known = self._read(held)
        scores = known[1].scores(query)
        if scores is None:
            return []
        rows = known[0]
        scores[rows.deleted] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[np.isfinite(scores[best])]
        return list(zip(scores[best].tolist(), rows.rows.take(best).to_pylist(), strict=True))


def shown_column(engine: Engine, wanted: str | None, ids: str | None) -> str | None:
    """The column of the texts: the one that is wanted, the first usual one, or else the first that holds no ids.

    :raises DataError: the index does not keep the one that is wanted.
    """
    if wanted is not None:
        need_column(engine, wanted, "text_column")
        return wanted
    usual = [name for name in SHOWN_FIRST if name in engine.columns]
    return next(iter(usual or [name for name in engine.columns if name != ids]), None)


def need_column(engine: Engine, name: str, knob: str) -> None:
    """Make sure that an index keeps a column.

    :raises DataError: it does not; the message names those it keeps.
    """
    if name not in engine.columns:
        raise DataError(f"{knob}: {engine.folder} keeps no column {name}; it has {', '.join(engine.columns) or 'none'}")


# --- requests together --------------------------------------------------------------------------------------------


class BusyError(Exception):
    """Too many requests wait."""


@dataclass
class _Job:
    engine: Engine
    kind: Kind
    texts: Sequence[str]
    done: asyncio.Future[tuple[Opened, Vectors]]


class Batcher:
    """Encodes the requests that have come while the last batch was computed, together; one thread computes.

    :param on_batch: called with the number of texts of each batch.
    """

    def __init__(self, on_batch: Callable[[int], None] = lambda count: None) -> None:
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(MOST_WAITING)
        self._thread = ThreadPoolExecutor(1, "encode")
        self._on_batch = on_batch

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return self._queue.qsize()

    async def vectors(self, engine: Engine, kind: Kind, texts: Sequence[str]) -> tuple[Opened, Vectors]:
        """Vectors of one request's texts.

        :raises BusyError: too many requests wait.
        """
        job = _Job(engine, kind, texts, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise BusyError from error
        return await job.done

    async def run(self) -> None:
        """Compute batches until cancelled."""
        try:
            while True:
                jobs = [await self._queue.get()]
                while not self._queue.empty() and sum(len(job.texts) for job in jobs) < MOST_TEXTS:
                    jobs.append(self._queue.get_nowait())
                jobs.sort(key=_batch_of)  # stable: requests stay in their order
                for _, group in groupby((job for job in jobs if not job.done.done()), _batch_of):
                    await self._encode(list(group))
        finally:
            self._thread.shutdown(wait=False)

    async def _encode(self, jobs: list[_Job]) -> None:
        texts = [text for job in jobs for text in job.texts]
        self._on_batch(len(texts))
        loop = asyncio.get_running_loop()
        try:
            held, vectors = await loop.run_in_executor(self._thread, jobs[0].engine.encode, jobs[0].kind, texts)
        except UserError as error:
            if len(jobs) > 1:  # one request's text may be what is wrong
                for job in jobs:
                    await self._encode([job])
            else:
                _settle(jobs[0], error)
        except Exception as error:  # whatever it is, the request must end
            for job in jobs:
                _settle(job, error)
        else:
            ends = np.cumsum([len(job.texts) for job in jobs])
            for job, part in zip(jobs, np.split(vectors, ends[:-1]), strict=True):
                _settle(job, (held, part))


class Turns:
    """Runs searches that re-rank one after the other, in a thread of their own, so that others need not wait for them.

    One search has enough pairs to fill the reranker's batches: together, several would only end later.

    :param seconds: called with the seconds that each took, without waiting.
    """

    def __init__(self, seconds: Callable[[float], None] = lambda seconds: None) -> None:
        self._thread = ThreadPoolExecutor(1, "rerank")
        self._seconds = seconds
        self.waiting = 0

    async def run(self, work: Callable[[], Sequence[Hit]]) -> Sequence[Hit]:
        """Do it when those before are done.

        :raises BusyError: too many requests wait.
        """
        if self.waiting == MOST_RERANKS:
            raise BusyError
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, work)
        finally:
            self.waiting -= 1

    def _timed(self, work: Callable[[], Sequence[Hit]]) -> Sequence[Hit]:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._seconds(time.perf_counter() - start)

    def close(self) -> None:
        """End the thread, and drop the searches that wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _batch_of(job: _Job) -> tuple[int, str]:
    return id(job.engine), job.kind


def _settle(job: _Job, result: Exception | tuple[Opened, Vectors]) -> None:
    if job.done.done():  # the client has left
        return
    if isinstance(result, Exception):
        job.done.set_exception(result)
    else:
        job.done.set_result(result)


def shown(found: Sequence[Hit], text: str | None, ids: str | None) -> Iterator[dict[str, Any]]:
    """Rows as the page and `/search` give them."""
    for rank, (score, row) in enumerate(found, 1):
        columns = {name: value for name, value in row.items() if name != store.ROW}
        yield {
            "rank": rank,
            "score": float(score),
            "row": row[store.ROW],
            "id": columns.get(ids) if ids else None,
            "text": columns.get(text) if text else None,
            "columns": columns,
        }


def embedding_file(engine: Engine) -> str:
    """The embedding file that an index was built from."""
    return str(engine.current()[0].manifest.get("embedding_path") or Path(engine.folder))
