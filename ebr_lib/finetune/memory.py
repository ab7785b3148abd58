"""The memory that a training step takes: its peak, and returning it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch


def peak_memory_mb() -> float:
    """The most memory in MB since `reset_peak`: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:
        return int(peak[1]) / 2**10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # since the process started
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak() -> None:
    """Let `peak_memory_mb` count from now on, where the system can (Linux: proc_pid_clear_refs(5))."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_memory_back() -> None:
    """Return what a failed step has left to the GPU or the system; `keep_freed_memory` keeps it for the next step."""
    torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)
