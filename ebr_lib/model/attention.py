"""Run a model for a while in another way: without dropout, with another attention, or with all texts in one row.

On a GPU in half precision torch's variable-length flash kernel takes texts one after another in one row: nothing is
padding, and no mask is made. The kernel has no dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Features = dict[str, Any]
VARLEN = "ebr_varlen"  # name of the variable-length kernel in transformers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout, then restore the mode of each module: a loaded model's modules differ in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention(model: SentenceTransformer, kind: str) -> Iterator[None]:
    """Run with another attention implementation (`eager`, `sdpa`, VARLEN), then restore the old one."""
    inner = model.transformers_model
    before = inner.config._attn_implementation
    inner.set_attn_implementation(kind)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@contextmanager
def one_row_attention(model: SentenceTransformer) -> Iterator[None]:
    """Run with the variable-length kernel, and pass it where texts start: the model's signature does not name that."""
    _register()
    transformer: Any = model[0]
    before = transformer.model_forward_params
    if before is not None:
        transformer.model_forward_params = before | {"cu_seq_lens_q", "max_length_q"}
    try:
        with attention(model, VARLEN):
            yield
    finally:
        transformer.model_forward_params = before


def has_varlen(model: SentenceTransformer) -> bool:
    """Whether the model's device and number type have the variable-length kernel."""
    return model.device.type == "cuda" and model[0].model.dtype in (torch.bfloat16, torch.float16)


@functools.cache
def _register() -> None:
    """Make the kernel known to transformers, which makes no mask for an attention of an unknown name."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text; transformers' models call it with these arguments.

    :param query: (1, heads, tokens, width); key and value may have fewer heads, each for as many of the query's.
    :param cu_seq_lens_q: where texts start, and the number of tokens, shape (texts + 1,), int32.
    :param max_length_q: tokens of the longest text.
    :return: (1, tokens, heads, width), and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    group = query.shape[1] // key.shape[1]
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if group > 1:
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    causal = module.is_causal if is_causal is None else is_causal
    window = (-1, 0) if causal else (-1, -1)
    ends, longest = cu_seq_lens_q, max_length_q
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=window)
    assert isinstance(out, Tensor)
    return out[None], None
