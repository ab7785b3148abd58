"""What makes training fast on a CPU, beside packing: fused LoRA layers, and cheap dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ebr_lib.model.memory import keep_freed_memory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor


STEPS = 2**16  # dropout rates are multiples of 1 / STEPS

_stock_dropout = functional.dropout


@contextmanager
def fast_training(model: SentenceTransformer) -> Iterator[None]:
    """Train with LoRA layers that are one step of autograd; on a CPU, with cheap dropout too.

    Hold it around the whole run, not each step: with gradient checkpointing, backward runs the forward again and has
    to find the same dropout.
    """
    from ebr_lib.finetune.fused_lora import fused_lora

    if model.device.type == "cpu":
        keep_freed_memory()
    with fused_lora(model), quick_dropout() if model.device.type == "cpu" else nullcontext():
        yield


@contextmanager
def quick_dropout() -> Iterator[None]:
    """Draw the dropout of tensors on the CPU from 16 random bits a number, not from a Bernoulli draw each.

    torch's own draws took 28 % of a step. The draws are others, their law is the same: what is kept is scaled by the
    inverse of the rate at which it is kept, itself the nearest multiple of 2⁻¹⁶.
    """
    functional.dropout = _dropout
    try:
        yield
    finally:
        functional.dropout = _stock_dropout


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    dropped = round(p * STEPS)
    if not training or not 0 < dropped < STEPS or inplace or input.device.type != "cpu":
        return _stock_dropout(input, p, training, inplace)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-input.numel() // 4),)).view(torch.int16)
    kept = draws[: input.numel()].view(input.shape) >= dropped - STEPS // 2
    return input * kept.to(input.dtype).mul_(STEPS / (STEPS - dropped))
