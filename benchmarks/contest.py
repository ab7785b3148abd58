"""Shared by the benchmarks: contenders that take turns, and a line that describes the machine."""

from __future__ import annotations

import os
import platform
import resource
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# libraries of contenders with a model; Unsloth must be imported before those that it patches
MODELS: tuple[str, ...] = () if find_spec("unsloth") else ("sentence_transformers", "peft")

_turn: Callable[[], Any]  # in a contender's process


def start_server(loaded: Sequence[str]) -> ForkServerContext:
    """The server that contenders are forked from; the first call starts it, and it loads the libraries.

    That takes ten seconds, once instead of for every contender, and the caller does not wait for it.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the other libraries use one GPU, ours would use all
    server = get_context("forkserver")
    server.set_forkserver_preload(list(loaded))
    forkserver.ensure_running()
    return server


def take_turns(
    contenders: Mapping[str, Callable[[], Callable[[], T]]], rounds: int, loaded: Sequence[str] = ()
) -> dict[str, list[T]]:
    """Results of each contender's turns: one warm-up round, then `rounds` more.

    Each contender has its own process, so that none benefits from memory that another freed. In each round they run one
    after another, so that a disturbance of the machine hits all of them. One that fails, for lack of memory say, is
    reported above the table, and the others continue.

    :param contenders: name to a function that is called once in the process, prepares, and returns the turn.
    :param loaded: libraries to load in the server, if it is not running yet.
    """
    server = start_server(loaded)
    pools = {name: ProcessPoolExecutor(1, server, _prepare, (prepare,)) for name, prepare in contenders.items()}
    turns: dict[str, list[T]] = {name: [] for name in pools}
    for _ in range(rounds + 1):
        for name, pool in list(pools.items()):
            try:
                turns[name].append(pool.submit(_take_turn).result())
            except Exception as error:  # other libraries may raise anything
                print(f"\n{name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
                traceback.print_exc()
                pools.pop(name).shutdown()
                del turns[name]
    for pool in pools.values():
        pool.shutdown()
    return turns


def alone(work: Callable[[], T], loaded: Sequence[str] = ()) -> T:
    """Run `work` in a process of its own."""
    with ProcessPoolExecutor(1, start_server(loaded)) as pool:
        return pool.submit(work).result()


def _prepare(prepare: Callable[[], Callable[[], Any]]) -> None:
    global _turn  # noqa: PLW0603 - a pool's initializer cannot return anything
    _turn = prepare()


def _take_turn() -> Any:
    return _turn()


def peak_mb() -> float:
    """Peak memory of this process alone: getrusage would count its parent's when it was forked."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024


def has_bf16() -> bool:
    """Whether the GPU, or else the processor, has instructions for bfloat16."""
    from ebr_lib.finetune.processes import training_device
    from ebr_lib.model.precision import choose_precision

    return choose_precision("auto", training_device()).dtype == "bfloat16"


def machine() -> str:
    """Processor, threads, load and versions, in one line."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or [platform.processor()])[0]
    instructions = torch.backends.cpu.get_cpu_capability() + (" with AMX" if "amx_bf16" in cpu else "")
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{device}, {torch.get_num_threads()} threads, {instructions}{load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}, "
        f"sentence-transformers {version('sentence-transformers')}"
    )
