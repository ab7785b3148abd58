"""What makes training fast, besides packed rows: fused LoRA layers, and cheap dropout on a CPU.

PEFT computes W x + (alpha / r) B A x as five operations, in float32 where the adapter is: over a bfloat16 base every
input is widened and every output narrowed. Here it is one step of autograd, and the adapter's products have the type
of the base, as they do under autocast; its weights, their gradients and the optimizer stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from ebr_lib.model.adapters import ADAPTER_NAME
from ebr_lib.model.memory import keep_freed_memory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STEPS = 2**16  # dropout rates are multiples of 1 / STEPS
FUSED_TYPES = (torch.float32, torch.bfloat16)  # float16 keeps PEFT's float32, whose gradients cannot overflow

_stock_dropout = functional.dropout


@contextmanager
def fast_training(model: SentenceTransformer) -> Iterator[None]:
    """Train with fused LoRA layers, and on a CPU with cheap dropout.

    Keep it around the whole run, not each step: under gradient checkpointing, backward runs the forward again and has
    to find the same dropout.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    with fused_lora(model), quick_dropout() if model.device.type == "cpu" else nullcontext():
        yield


# --- LoRA ---------------------------------------------------------------------------------------------------------


@contextmanager
def fused_lora(model: SentenceTransformer) -> Iterator[None]:
    """Train plain LoRA layers through `LoraFunction`, and others (DoRA, quantised bases) as they are."""
    plain = [module for module in model.transformers_model.modules() if type(module) is Linear]
    for module in plain:
        module.__class__ = FusedLinear
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = Linear


class FusedLinear(Linear):
    """PEFT's layer; in training, with one adapter on a frozen `nn.Linear`, one step of autograd.

    Evaluation computes as the saved model does: in bfloat16 the two round differently.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output (…, out features) of an input (…, in features)."""
        base = self.base_layer
        if args or kwargs or not self.training or not self._fuses(base, x):
            return super().forward(x, *args, **kwargs)
        dropped = self.lora_dropout[ADAPTER_NAME](x)
        a, b = self.lora_A[ADAPTER_NAME].weight, self.lora_B[ADAPTER_NAME].weight
        out: Tensor = LoraFunction.apply(x, dropped, base.weight, base.bias, a, b * self.scaling[ADAPTER_NAME])
        return out

    def _fuses(self, base: nn.Module, x: Tensor) -> bool:
        one_adapter = self.active_adapters == [ADAPTER_NAME] and ADAPTER_NAME not in self.lora_variant
        if not one_adapter or self.disable_adapters or self.merged or type(base) is not nn.Linear:
            return False
        # autocast chooses the types itself
        autocast = torch.is_autocast_enabled(x.device.type)
        return not autocast and not base.weight.requires_grad and x.dtype == base.weight.dtype in FUSED_TYPES


class LoraFunction(torch.autograd.Function):
    """W x + c + B A d, where d is x after dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        """Outputs (…, out).

        :param x, dropped: (…, in), of the type of `weight`; the same tensor if nothing is dropped.
        :param weight, bias: of the base, (out, in) and (out,), not trained.
        :param a, b: of the adapter, (r, in) and (out, r); b includes the scale.
        """
        low, high = a.to(x.dtype), b.to(x.dtype)
        rows = dropped.flatten(0, -2)
        inner = rows @ low.T
        out = functional.linear(x.flatten(0, -2), weight, bias).addmm_(inner, high.T)
        ctx.save_for_backward(rows, inner, weight, low, high)
        ctx.shape, ctx.one_input = x.shape, dropped is x
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, d, A and B; those of A and B in float32."""
        rows, inner, weight, low, high = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        through = gradient @ high
        of_a = (through.T @ rows).float()
        of_b = (gradient.T @ inner).float()
        of_x, of_dropped = None, None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            if ctx.one_input:
                of_x.addmm_(through, low)
            else:
                of_dropped = (through @ low).view(ctx.shape)
            of_x = of_x.view(ctx.shape)
        return of_x, of_dropped, None, None, of_a, of_b


# --- dropout ------------------------------------------------------------------------------------------------------


@contextmanager
def quick_dropout() -> Iterator[None]:
    """Draw dropout on the CPU from 16 random bits per number instead of one Bernoulli draw each.

    torch's own draws took 28 % of a step. The distribution is the same, the draws are not; the rate is rounded to a
    multiple of 2⁻¹⁶, and what is kept is scaled by the inverse of the share that is kept.
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
