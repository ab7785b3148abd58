"""Encode on this machine: in this process, or in one process per GPU."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ebr_lib.arrays import Vectors
from ebr_lib.errors import ModelError
from ebr_lib.inference.encode import clean_up, run_job
from ebr_lib.inference.job import EXAMPLES, Check, EncodeReport, Job, OnProgress, Outcome, TextEncoder
from ebr_lib.model.loading import prompt_of
from ebr_lib.model.main_guard import refuse_script_without_guard
from ebr_lib.model.spec import EncoderSpec


@dataclass(frozen=True)
class EncoderFacts:
    """What the encoder of a spec turned out to be.

    :param max_seq_length: in tokens; 0 for no limit, as of static embeddings.
    """

    dim: int
    precision: str
    prompt: str
    trained_prompt: str
    max_seq_length: int
    backend: str = "torch"


class LocalEncoder:
    """The model in this process."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._encoder = spec.encoder("document")
        model = self._encoder.model
        limit = model.max_seq_length
        self.facts = EncoderFacts(
            dim=self._encoder.dim,
            precision=self._encoder.precision,
            backend=self._encoder.backend,
            prompt=self._encoder.prompt,
            trained_prompt=prompt_of(model, "document"),
            max_seq_length=int(limit) if limit and math.isfinite(limit) else 0,
        )

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.facts.dim

    def prepare(self, texts: list[str]) -> Any:
        """Tokenise texts; see `TextEncoder`."""
        return self._encoder.tokenize(texts)

    def encode(self, prepared: Any, on_progress: Callable[[int], None]) -> tuple[Vectors, EncodeReport]:
        """Vectors (texts, dim) of what `prepare` returned, and what was counted; see `TextEncoder`."""
        before = Counter(asdict(self._encoder.stats))
        vectors = self._encoder.embed(prepared, on_progress=on_progress)
        counts = Counter(asdict(self._encoder.stats))
        counts.subtract(before)
        del counts["truncated"]  # of texts; the job counts rows
        if isinstance(prepared, list):
            return vectors, EncodeReport(counts)
        cut = np.flatnonzero(prepared.lost)[:EXAMPLES]
        kept = prepared.lengths[cut]
        tokens = kept + prepared.lost[cut]
        shown = list(zip(cut.tolist(), tokens.tolist(), kept.tolist(), strict=True))
        return vectors, EncodeReport(counts, shown, prepared.lost)

    def close(self) -> None:
        """Nothing to close."""


# --- several processes --------------------------------------------------------------------------------------------


def devices_for(device: str | None, processes: int) -> list[str | None]:
    """The device of each process: as many as asked for, else one per GPU; the GPUs are taken in turn."""
    import torch

    gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
    if not gpus:
        return [device] * max(1, processes)
    return [f"cuda:{i % gpus}" for i in range(processes or gpus)]


def open_encoder(spec: EncoderSpec, processes: int = 0) -> LocalEncoder | ProcessEncoder:
    """An encoder in this process, or in several where there are several GPUs or `processes` asks for them."""
    devices = devices_for(spec.device, processes)
    if len(devices) == 1:
        return LocalEncoder(replace(spec, device=devices[0]))
    return ProcessEncoder(spec, devices)


class LocalEngine:
    """Runs jobs on this machine."""

    def __init__(self, spec: EncoderSpec, processes: int = 0) -> None:
        self._encoder = open_encoder(spec, processes)
        self.facts = self._encoder.facts

    def run(self, job: Job, on_progress: OnProgress, check: Check | None = None) -> Outcome:
        """Encode all that is left of a job; see `run_job`."""
        return run_job(job, self._encoder, on_progress, check)

    def finish(self, job: Job) -> None:
        """Remove the work folder."""
        clean_up(job)

    def close(self) -> None:
        """End the processes that hold the model, if any."""
        self._encoder.close()


class ProcessEncoder:
    """One process per device. A window's texts are shared out by length, so that all end at about the same time.

    :raises ConfigError: the caller's script has no main guard: each process would run it from the top.
    """

    def __init__(self, spec: EncoderSpec, devices: Sequence[str | None]) -> None:
        refuse_script_without_guard(f"encoding in {len(devices)} processes", "num_processes: 1")
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        threads = max(1, (os.cpu_count() or 1) // len(devices))
        specs = [replace(spec, device=device) for device in devices]
        self._pools = [ProcessPoolExecutor(1, context) for _ in specs]
        try:
            futures = [pool.submit(_start, own, threads) for pool, own in zip(self._pools, specs, strict=True)]
            self.facts, *_ = [future.result() for future in futures]
        except BrokenProcessPool as error:
            self.close()
            raise self._broken() from error
        except BaseException:
            self.close()
            raise

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.facts.dim

    def prepare(self, texts: list[str]) -> Any:
        """The texts as they are: each process tokenises its own share."""
        return texts

    def encode(self, prepared: Any, on_progress: Callable[[int], None]) -> tuple[Vectors, EncodeReport]:
        """Vectors (texts, dim) in the order of the texts; see `TextEncoder`.

        :raises ModelError: a process has died.
        """
        order = sorted(range(len(prepared)), key=lambda i: (len(prepared[i]), i))
        shares = [order[i :: len(self._pools)] for i in range(len(self._pools))]
        futures = [
            pool.submit(_encode, [prepared[i] for i in share])
            for pool, share in zip(self._pools, shares, strict=True)
            if share
        ]
        vectors = np.empty((len(prepared), self.dim), dtype=np.float32)
        lost = np.zeros(len(prepared))
        counts: Counter[str] = Counter()
        cut, done = [], 0
        for future, share in zip(futures, shares, strict=False):
            try:
                vectors[share], report = future.result()
            except BrokenProcessPool as error:
                raise self._broken() from error
            done += len(share)
            on_progress(done)
            counts += report.counts
            lost[share] = np.nan if report.lost is None else report.lost
            cut += [(share[i], tokens, kept) for i, tokens, kept in report.cut]
        return vectors, EncodeReport(counts, sorted(cut)[:EXAMPLES], lost)

    def _broken(self) -> ModelError:
        return ModelError(
            "an encoder process died, probably out of memory; what was written stays. Lower batch_tokens or "
            "num_processes and run the same call again: it continues. (In a script of your own, the call must stand "
            'below `if __name__ == "__main__":`)'
        )

    def close(self) -> None:
        """End the processes when they have finished their work."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: TextEncoder | None = None  # of a process that encodes; nowhere else


def _start(spec: EncoderSpec, threads: int) -> EncoderFacts:
    """Load the model. (Not as the pool's initializer, whose exceptions do not come back.)"""
    global _worker  # noqa: PLW0603 - what a process of a pool keeps between its tasks
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a job in the background does
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches this process too: it ends, and the parent reports
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    encoder = LocalEncoder(spec)
    _worker = encoder
    return encoder.facts


def _end_with_parent() -> None:
    """End this process when its parent is gone (killed, say): it would wait for texts for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[Vectors, EncodeReport]:
    assert _worker is not None
    return _worker.encode(_worker.prepare(texts), lambda done: None)
