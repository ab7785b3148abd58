"""Start a job, or continue one that was interrupted, or append to a finished output: what must be as it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ebr_lib.data.embeddings.base import PART_PREFIX, read_manifest
from ebr_lib.data.embeddings.files import reopen, size_of
from ebr_lib.errors import DataError
from ebr_lib.inference.job import REJECT_HEADER, Job, Tally
from ebr_lib.inference.store import STATE_FILE, Progress, Store
from ebr_lib.logs import logger

REJECTS = "rejects"
JOB_FILE = f"{PART_PREFIX}job.json"  # of a run in parts; named as what is moved with the parts
STATE_VERSION = 4  # of what a state holds and what its windows are; another version's run is not continued
SHOWN = 5

Inputs = list[dict[str, Any]]


def start_or_continue(job: Job, store: Store) -> tuple[Job, dict[str, Any], Progress]:
    """The job with the sources that are left, in the run's order; the state of the run; and how far it is.

    With `append`, new files come last; but not into a run that had written all of its rows: that one is finished as it
    was, and what is new is for the next.

    :raises DataError: a setting or an input differs from the interrupted run's, or from the output appended to.
    """
    back = False
    if store.state is None:
        state, progress = _first_state(job)
    else:
        if store.state.get("version") != STATE_VERSION:
            raise DataError(
                f"{job.folder} holds an unfinished run of another version of this program; end it with that version, "
                "or drop it with restart: true"
            )
        back, state, progress = _reread_changed(job, store.state, store.progress)
    refuse_changes(job, changes(job, state["settings"], state["inputs"], state["earlier"], new_are_fine=job.append))
    if back:
        store.go_back(progress)
    if not state["done"]:
        new = new_inputs(job, [*state["earlier"], *state["inputs"]])
        state = state | {"inputs": [*state["inputs"], *new]}
    sources = {source.name: source for source in job.sources}
    taken = tuple(sources[entry["path"]] for entry in state["inputs"])
    return replace(job, sources=taken, inputs=tuple(state["inputs"])), state, progress


def _first_state(job: Job) -> tuple[dict[str, Any], Progress]:
    for leftover in job.folder.iterdir():  # of a run that was killed before its first state
        if not leftover.name.startswith(STATE_FILE):
            leftover.unlink()
    before, sizes, held = _appended_to(job), None, Tally()
    if before:
        rejects = job.rejects.read_bytes() if job.rejects.exists() else REJECT_HEADER
        (job.folder / REJECTS).write_bytes(rejects)
        sizes = reopen(job.output, job.folder) | {REJECTS: len(rejects)}
        held = Tally(
            Counter({name: count for name, count in before.get("rows", {}).items() if count is not None}),
            Counter(before.get("rejects", {}).get("reasons", {})),
            Counter(before.get("line_breaks", {})),
            Counter(before.get("altered", {})),
            before.get("truncated", {}).get("examples", []),
        )
    earlier = before.get("inputs", [])
    state = {
        "version": STATE_VERSION,
        "settings": job.settings,
        "earlier": earlier,
        "inputs": new_inputs(job, earlier),
        "held": vars(held),
        "done": False,
    }
    return state, Progress(sizes=sizes, tally=held)


def _appended_to(job: Job) -> dict[str, Any]:
    """The manifest of the finished output that is appended to; empty where there is none."""
    if not (job.append and job.output.exists()):
        return {}
    before = read_manifest(job.output)
    if before is None or "inputs" not in before:
        raise DataError(
            f"{job.output} has no manifest, so which files it holds is unknown; append needs the output of an "
            "earlier run: leave append out to replace it"
        )
    if (size := size_of(job.output)) != before.get("bytes", size):
        raise DataError(
            f"{job.output} holds {size} bytes, its manifest says {before['bytes']}: the file was cut short or "
            "replaced; leave append out to replace it"
        )
    if found := changes(job, before["settings"], [], before["inputs"], new_are_fine=True):
        raise DataError(
            f"{job.output} cannot be appended to, for these have changed since it was written:\n{_listed(found)}\n"
            "Go back to what they were, or leave append out to replace it"
        )
    new = len(new_inputs(job, before["inputs"]))
    logger.info("追加: %d 个新文件 (append: %d of %d files are new)", new, new, len(job.inputs))
    return before


# --- what has changed ---------------------------------------------------------------------------------------------


def new_inputs(job: Job, held: Iterable[dict[str, Any]]) -> Inputs:
    """The inputs that are not held yet."""
    names = {entry["path"] for entry in held}
    return [entry for entry in job.inputs if entry["path"] not in names]


def changes(
    job: Job,
    settings: dict[str, Any],
    inputs: Inputs,
    earlier: Sequence[dict[str, Any]] = (),
    *,
    new_are_fine: bool = False,
    by_name: bool = False,
) -> list[str]:
    """A line for each difference between a job and what a run or an output was made from.

    :param earlier: inputs that need not be there any more.
    :param by_name: accept files that hold something else.
    """
    names = dict.fromkeys([*settings, *job.settings])
    then_now = {name: (settings.get(name), job.settings.get(name)) for name in names}
    lines = [f"{name}: {then!r} then, {now!r} now" for name, (then, now) in then_now.items() if then != now]
    known, sha256 = [*earlier, *inputs], {entry["path"]: entry["sha256"] for entry in job.inputs}
    if not by_name:
        changed = [e["path"] for e in known if sha256.get(e["path"], e["sha256"]) != e["sha256"]]
        lines += [f"input {path}: its contents changed" for path in changed]
    lines += [f"input {entry['path']}: no longer there" for entry in inputs if entry["path"] not in sha256]
    if not new_are_fine:
        way_out = "" if by_name else " (append: true takes it in)"
        lines += [f"input {entry['path']}: new{way_out}" for entry in new_inputs(job, known)]
    return lines


def _reread_changed(job: Job, state: dict[str, Any], progress: list[Progress]) -> tuple[bool, dict[str, Any], Progress]:
    """Accept inputs that have changed since, where none of their rows is written.

    One that was being read is read again: the progress goes back to where the file before it ended.

    :param progress: the last two within different sources, latest first.
    :return: whether any input has changed, so that texts that were kept ahead may not come; the state with the inputs
        as they are now; and where to continue.
    """
    now = {entry["path"]: entry for entry in job.inputs}
    changed = [i for i, e in enumerate(state["inputs"]) if now.get(e["path"], e)["sha256"] != e["sha256"]]
    if changed and not state["done"]:
        for earlier in progress:
            if changed[0] > earlier.file or not earlier.position:
                names = ", ".join(state["inputs"][i]["path"] for i in changed[:SHOWN])
                logger.info("输入有变，重新读取: %s (inputs that changed are read again)", names)
                inputs = [now.get(entry["path"], entry) for entry in state["inputs"]]
                return True, state | {"inputs": inputs}, earlier
    return False, state, progress[0]


def refuse_changes(job: Job, found: list[str]) -> None:
    """Check that nothing has changed since the interrupted run.

    :param found: what `changes` found.
    :raises DataError: something has.
    """
    if found:
        raise DataError(
            f"{job.folder} holds an unfinished run that cannot be continued, for these have changed:\n"
            f"{_listed(found)}\nGo back to what they were, or drop that run with restart: true"
        )


def _listed(found: list[str]) -> str:
    return "\n".join(f"  - {change}" for change in found)


# --- inputs that were moved ---------------------------------------------------------------------------------------


def with_known_names(job: Job) -> Job:
    """The job, with each input under the name that an interrupted run or a finished output knows it by.

    An input stands for a known one that is gone when it has the same contents and the same partition (`dt=2026-11-01`,
    whose value may be a column).
    """
    known = _known_inputs(job)
    here, then = {entry["path"] for entry in job.inputs}, {entry["path"] for entry in known}
    gone = defaultdict[tuple[str, ...], list[str]](list)
    for entry in known:
        if entry["path"] not in here:
            gone[_contents(entry)].append(entry["path"])
    names = {
        entry["path"]: gone[_contents(entry)].pop(0)
        for entry in job.inputs
        if entry["path"] not in then and gone[_contents(entry)]
    }
    if not names:
        return job
    shown = ", ".join(f"{old} → {new}" for new, old in list(names.items())[:SHOWN])
    logger.info("输入文件换了位置，内容相同: %s (%d inputs were moved; their contents are the same)", shown, len(names))
    order = {entry["path"]: number for number, entry in enumerate(known)}
    pairs = []
    for source, entry in zip(job.sources, job.inputs, strict=True):
        name = names.get(source.name, source.name)
        pairs.append((replace(source, name=name), entry | {"path": name}))
    pairs.sort(key=lambda pair: order.get(pair[0].name, len(order)))
    sources, inputs = zip(*pairs, strict=True)
    return replace(job, sources=sources, inputs=inputs)


def _known_inputs(job: Job) -> Inputs:
    """The inputs of an interrupted run, or of the finished output that is appended to."""
    if (job.folder / JOB_FILE).is_file():
        return list(json.loads((job.folder / JOB_FILE).read_text(encoding="utf-8"))["inputs"])
    if (job.folder / STATE_FILE).is_file():
        with contextlib.closing(Store(job.folder)) as store:
            state = store.state
        if state is not None:
            return [*state.get("earlier", []), *state.get("inputs", [])]
    if job.append and Path(job.output).is_file():
        return list((read_manifest(job.output) or {}).get("inputs", []))
    return []


def _contents(entry: dict[str, Any]) -> tuple[str, ...]:
    return entry["sha256"], *(part for part in PurePosixPath(entry["path"]).parts[:-1] if "=" in part)


# --- runs to drop -------------------------------------------------------------------------------------------------


def drop_failed(job: Job) -> None:
    """Drop a run whose outcome was refused, where this job is another one."""
    if not (job.folder / STATE_FILE).exists():
        return
    with contextlib.closing(Store(job.folder)) as store:
        state = store.state
        if not state or not state.get("failed"):
            return
        same = state.get("version") == STATE_VERSION
        if same and not changes(job, state["settings"], state["inputs"], state["earlier"]):
            return
        logger.info("放弃上次失败的运行: %s (the run that failed is dropped)", job.folder)
        shutil.rmtree(job.folder)
    job.folder.mkdir()


def refuse_other_engine(folder: Path, in_parts: bool) -> None:
    """Check that a work folder holds no unfinished run of the other engine.

    :param in_parts: the engine that is to run writes one part per input file.
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
    """Remove the work folder of an unfinished run.

    :raises DataError: the run is still at work.
    """
    with contextlib.ExitStack() as held:
        for state in [*folder.glob(STATE_FILE), *folder.glob(f"{PART_PREFIX}*/{STATE_FILE}")]:
            with contextlib.suppress(sqlite3.DatabaseError):  # a damaged one is nobody's
                held.enter_context(contextlib.closing(Store(state.parent)))
        shutil.rmtree(folder)
