"""Input files that were moved or renamed since a run began: their contents say that they are the same."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.inference.job import Job
from ebr_lib.inference.ray_cluster import JOB_FILE
from ebr_lib.inference.store import STATE_FILE, Store
from ebr_lib.logs import logger


def with_known_names(job: Job) -> Job:
    """The job, with each input that an interrupted run or a finished output knows under the name that it has there.

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
    shown = ", ".join(f"{old} → {new}" for new, old in list(names.items())[:5])
    logger.info("输入文件换了位置，内容相同: %s (%d inputs were moved; their contents are the same)", shown, len(names))
    order = {path: number for number, path in enumerate(entry["path"] for entry in known)}
    pairs = sorted(
        (
            (
                replace(source, name=names.get(source.name, source.name)),
                entry | {"path": names.get(entry["path"], entry["path"])},
            )
            for source, entry in zip(job.sources, job.inputs, strict=True)
        ),
        key=lambda pair: order.get(pair[0].name, len(order)),
    )
    sources, inputs = zip(*pairs, strict=True)
    return replace(job, sources=sources, inputs=inputs)


def _known_inputs(job: Job) -> list[dict[str, Any]]:
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
