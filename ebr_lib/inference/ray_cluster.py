"""Encode on a Ray cluster: input files are shards, an actor holds a model and takes one shard after another.

Plain actors and not Ray Data: a shard is a job like any other, with its own part file and work folder, so a lost
worker is started again by Ray and continues from the shard's last window: no row is missing or doubled.
All machines must see the input, the model and the output under the same paths.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebr_lib.data.embeddings.base import PART_PREFIX, ending_of
from ebr_lib.errors import ConfigError, DataError, ModelError, UserError
from ebr_lib.files import check_replaceable, make_folder, replace_folder, write_json, written_whole
from ebr_lib.inference.encode import run_job
from ebr_lib.inference.job import REJECT_HEADER, Check, Job, OnProgress, Outcome, Tally
from ebr_lib.inference.local import EncoderFacts, LocalEncoder
from ebr_lib.inference.resume import JOB_FILE, changes, drop_run, refuse_changes
from ebr_lib.logs import logger
from ebr_lib.model.spec import EncoderSpec

RETRIES = 3  # times that a shard is given to a new worker after its worker was lost


class ShardWorker:
    """Runs in an actor: loads the encoder once, and encodes shards."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._recipe = spec
        self._loaded: LocalEncoder | None = None

    def _encoder(self) -> LocalEncoder:
        """Loaded by the first task, not with the actor: to Ray, an actor that cannot be made is a lost one."""
        self._loaded = self._loaded or LocalEncoder(self._recipe)
        return self._loaded

    def facts(self) -> EncoderFacts:
        """Load the model; returns what it turned out to be."""
        return self._encoder().facts

    def run(self, shard: Job) -> Outcome:
        """Encode what is left of a shard; see `run_job`."""
        return run_job(shard, self._encoder(), lambda rows, texts, share: None)


class RayEngine:
    """A pool of actors on the cluster at `address`, or on one that is started on this machine."""

    def __init__(self, spec: EncoderSpec, actors: int = 0, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("engine ray: Ray is not installed; pip install -r requirements-ray.txt") from error
        self._ray = ray
        self._began = not ray.is_initialized()
        if self._began:
            package = {"py_modules": [str(Path(__file__).parents[1])]}  # the workers need not have it installed
            ray.init(address or "local", runtime_env=package, include_dashboard=False, log_to_driver=False)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        options: dict[str, Any] = {"num_gpus": min(gpus, 1), "max_restarts": -1, "max_task_retries": RETRIES}
        worker = ray.remote(num_cpus=1, **options)(ShardWorker)
        self.actors: list[Any] = [worker.remote(spec) for _ in range(self._fitting(actors or gpus or 1, gpus))]
        try:
            self.facts: EncoderFacts = self._answer(self.actors[0].facts.remote())
        except BaseException:
            self.close()
            raise

    def _fitting(self, actors: int, gpus: int) -> int:
        """The number of actors, at most as many as there is room for: Ray would silently wait for room for ever."""
        room = gpus or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        if actors > room:
            kind = "GPUs" if gpus else "CPUs"
            logger.warning("集群资源不足 num_actors %d: the cluster has %d %s; %d actors run", actors, room, kind, room)
        return min(actors, room)

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from error
        except self._ray.exceptions.RayActorError as error:
            raise ModelError(
                f"a Ray worker was lost {RETRIES + 1} times, probably out of memory ({error}); what was "
                "written stays. Lower batch_tokens or num_actors and run the same call again: it continues"
            ) from error

    def run(self, job: Job, on_progress: OnProgress, check: Check | None = None) -> Outcome:
        """Encode every input file into a part file; parts that an interrupted run has finished are kept.

        :param check: looks at the outcome of all files, and at their reject files.
        :raises DataError: as `run_job`.
        :raises ModelError: a worker was lost more than RETRIES times.
        """
        _begin(job)
        on_progress(0, 0, 0.0)
        shards = list(_shards(job))
        outcomes: dict[int, Outcome] = {}
        waiting = list(enumerate(shards))[::-1]
        idle, busy = list(self.actors), dict[Any, tuple[int, Any]]()
        while waiting or busy:
            while waiting and idle:
                number, shard = waiting.pop()
                actor = idle.pop()
                busy[actor.run.remote(shard)] = number, actor
            (ready, *_), _ = self._ray.wait(list(busy), num_returns=1)
            number, actor = busy.pop(ready)
            outcomes[number] = self._answer(ready)
            idle.append(actor)
            counts = _added(list(outcomes.values())).tally.counts
            on_progress(counts["read"], counts["encoded"], len(outcomes) / len(shards))
        outcome = _added([outcomes[number] for number in range(len(shards))])
        if check is not None:
            try:
                check(outcome, [shard.rejects for shard in shards if shard.rejects.exists()])
            except DataError:
                _note(job, failed=True)
                raise
        return outcome

    def finish(self, job: Job) -> None:
        """Collect the rejects into one file, put the folder of parts in its place, and clean up there.

        In this order: until the folder is moved, an interrupted run finds all that it had noted.
        """
        shards = list(_shards(job))
        _collect_rejects(job, shards)
        replace_folder(job.folder, job.output)
        for shard in shards:
            shutil.rmtree(job.output / shard.folder.name)
            (job.output / shard.rejects.name).unlink(missing_ok=True)
        (job.output / JOB_FILE).unlink()

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for actor in self.actors:
            self._ray.kill(actor)
        if self._began:
            self._ray.shutdown()


def check_output_folder(folder: Path) -> None:
    """Check, before the work, that a folder of part files can be written, replacing only such a folder.

    :raises ConfigError: a file stands there, or a folder of other files, or the place cannot be written to.
    """
    make_folder(folder.parent)
    check_replaceable(folder, lambda name: name.startswith(PART_PREFIX))


def _begin(job: Job) -> None:
    """Note what the job is, or check that it is the interrupted one. File contents are checked per shard.

    :raises DataError: it is another one.
    """
    note = job.folder / JOB_FILE
    if note.exists():
        begun = json.loads(note.read_text(encoding="utf-8"))
        if not begun.get("failed"):
            refuse_changes(job, changes(job, begun["settings"], begun["inputs"], by_name=True))
            return
        if (begun["settings"], begun["inputs"]) == (job.settings, list(job.inputs)):
            return
        logger.info("放弃上次失败的运行: %s (the run that failed is dropped)", job.folder)
        drop_run(job.folder)
    if any(job.folder.glob(f"{PART_PREFIX}*")):
        raise DataError(f"{job.folder} holds parts of a run that may be another one; drop it with restart: true")
    _note(job, failed=False)


def _note(job: Job, failed: bool) -> None:
    write_json(job.folder / JOB_FILE, {"settings": job.settings, "inputs": job.inputs, "failed": failed})


def _shards(job: Job) -> Iterator[Job]:
    """One job per file, whose part lies in the work folder until all are done."""
    for number, (source, entry) in enumerate(zip(job.sources, job.inputs, strict=True)):
        output = (job.folder / f"{PART_PREFIX}{number:05}{ending_of(job.output)}").resolve()
        source = replace(source, path=source.path.resolve())  # noqa: PLW2901 - workers have another current folder
        yield replace(job, sources=(source,), inputs=(entry,), output=output)


def _added(outcomes: list[Outcome]) -> Outcome:
    tally = sum((outcome.tally for outcome in outcomes), Tally())
    inputs = [entry for outcome in outcomes for entry in outcome.inputs]
    return Outcome(tally, tally.counts, tally.reasons, inputs, sum(outcome.size for outcome in outcomes))


def _collect_rejects(job: Job, shards: list[Job]) -> None:
    parts = [shard.rejects for shard in shards if shard.rejects.exists()]
    if not parts:
        job.rejects.unlink(missing_ok=True)
        return
    with written_whole(job.rejects) as new, open(new, "wb") as out:
        out.write(REJECT_HEADER)
        for part in parts:
            with open(part, "rb") as rows:
                rows.readline()
                shutil.copyfileobj(rows, out)
