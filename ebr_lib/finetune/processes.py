"""The processes of a training run: one, or several that torchrun or accelerate started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any


def training_device() -> str:
    """The device of this process: its own GPU ("cuda:0", "cuda:1" …), or "cpu"."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Number of processes of this run, as torchrun and accelerate set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process that writes, logs and decides."""
    return os.environ.get("RANK", "0") == "0"


def from_first_process(value: Any) -> Any:
    """Broadcast the first process's value to all."""
    if world_size() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # the first may take long; torchrun notices a process that ends
    PartialState(cpu=training_device() == "cpu", timeout=timedelta(days=1))
    return broadcast_object_list([value])[0]
