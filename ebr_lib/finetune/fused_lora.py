"""LoRA in one step of autograd: base and adapter together, in the base's type, without copies between types.

PEFT computes W x + (alpha / r) B A x as five operations, and in float32 where the adapter is: over a bfloat16 base
every input is widened, every output narrowed. Here the adapter's products take the type of the base, as they do
under autocast; its weights, their gradients and the optimizer stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from ebr_lib.model.adapters import ADAPTER_NAME

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FUSED_TYPES = (torch.float32, torch.bfloat16)  # float16 keeps PEFT's float32, whose gradients cannot overflow


@contextmanager
def fused_lora(model: SentenceTransformer) -> Iterator[None]:
    """Train plain LoRA layers through `LoraFunction`; those of another kind (DoRA, quantised bases) as they are."""
    plain = [module for module in model.transformers_model.modules() if type(module) is Linear]
    for module in plain:
        module.__class__ = FusedLinear
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = Linear


class FusedLinear(Linear):
    """PEFT's layer; in training, with one adapter on a frozen `nn.Linear`, it computes as this file says.

    What is measured is computed as the saved model does: in bfloat16 the two round differently.
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
        # under autocast the types are autocast's to choose
        autocast = torch.is_autocast_enabled(x.device.type)
        return not autocast and not base.weight.requires_grad and x.dtype == base.weight.dtype in FUSED_TYPES


class LoraFunction(torch.autograd.Function):
    """W x + c + B A d, where d is x after dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd hands them over by position)
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        """Outputs (…, out).

        :param x, dropped: (…, in), of the type of `weight`; one and the same tensor where nothing is dropped.
        :param weight, bias: of the base, (out, in) and (out,); they are not trained.
        :param a, b: of the adapter, (r, in) and (out, r), its scale multiplied into b.
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
