"""The processes of a training run: one, or several as torchrun and accelerate start them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any


def training_device() -> str:
    """Where this process trains: its own GPU ("cuda:0", "cuda:1" …), or "cpu"."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Processes of this run, as torchrun and accelerate set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the one process that writes, says and decides."""
    return os.environ.get("RANK", "0") == "0"


def from_first_process(value: Any) -> Any:
    """What the first process holds, on all of them."""
    if world_size() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # the first may take its time; torchrun sees a process that ends
    PartialState(cpu=training_device() == "cpu", timeout=timedelta(days=1))
    return broadcast_object_list([value])[0]
