"""What the benchmarks share: contenders that take turns, and the line that says on what machine."""

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

# the libraries of contenders that have a model; Unsloth wants to be there before those that it changes
MODELS: tuple[str, ...] = () if find_spec("unsloth") else ("sentence_transformers", "peft")

_turn: Callable[[], Any]  # of a contender's process


def start_server(loaded: Sequence[str]) -> ForkServerContext:
    """The process that contenders are forked from: the first call starts it, with the libraries that it loads.

    It takes ten seconds to load them, in which the caller goes on; without it every contender would take as long.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the libraries' ways take one GPU, ours would take all
    server = get_context("forkserver")
    server.set_forkserver_preload(list(loaded))
    forkserver.ensure_running()
    return server


def take_turns(
    contenders: Mapping[str, Callable[[], Callable[[], T]]], rounds: int, loaded: Sequence[str] = ()
) -> dict[str, list[T]]:
    """What the turns of each contender returned: first that of a round that warms up, then those of the rounds.

    A contender lives in a process of its own, for memory that one gave back is not the next one's. Within a round
    they follow each other, so that what disturbs the machine disturbs all of them. One that fails, for want of memory
    say, is told as such above the table, and the others go on.

    :param contenders: name to what is called once in the process; it prepares, and returns what does a turn.
    :param loaded: libraries that the processes are forked with, where no others were started before.
    """
    server = start_server(loaded)
    pools = {name: ProcessPoolExecutor(1, server, _prepare, (prepare,)) for name, prepare in contenders.items()}
    turns: dict[str, list[T]] = {name: [] for name in pools}
    for _ in range(rounds + 1):
        for name, pool in list(pools.items()):
            try:
                turns[name].append(pool.submit(_take_turn).result())
            except Exception as error:  # whatever it is that another library raises
                print(f"\n{name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
                traceback.print_exc()
                pools.pop(name).shutdown()
                del turns[name]
    for pool in pools.values():
        pool.shutdown()
    return turns


def alone(work: Callable[[], T], loaded: Sequence[str] = ()) -> T:
    """What `work` returns, in a process of its own."""
    with ProcessPoolExecutor(1, start_server(loaded)) as pool:
        return pool.submit(work).result()


def _prepare(prepare: Callable[[], Callable[[], Any]]) -> None:
    global _turn  # noqa: PLW0603 - a pool's initializer has no other way to hand over
    _turn = prepare()


def _take_turn() -> Any:
    return _turn()


def peak_mb() -> float:
    """The most memory that this process alone has held: getrusage would count what its parent held when it forked."""
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
