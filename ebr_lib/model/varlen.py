"""Attention over texts that lie one after another in one row, by torch's variable-length flash kernel.

On a GPU in half precision no place is padding then, and no mask is made. The kernel has no dropout.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VARLEN = "ebr_varlen"  # the name under which transformers knows it


def has_varlen(model: SentenceTransformer) -> bool:
    """Whether the model's device and type have the kernel."""
    return model.device.type == "cuda" and model[0].model.dtype in (torch.bfloat16, torch.float16)


def attention_dropout(model: SentenceTransformer) -> float:
    """The rate at which the model drops attention weights in training."""
    config = model[0].model.config
    return float(getattr(config, "attention_dropout", getattr(config, "attention_probs_dropout_prob", 0.0)) or 0.0)


@functools.cache
def register() -> None:
    """Make the kernel known to transformers. Under an unknown name no mask is made, which is what it wants."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: torch.nn.Module,
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
    """Attention within each text; the signature is what transformers' models call.

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
