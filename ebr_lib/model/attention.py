"""Run a model in another way for a while: with another attention implementation, or without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


Features = dict[str, Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout, and put the mode back, each module's own: a loaded model's parts differ in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention(model: SentenceTransformer, kind: str) -> Iterator[None]:
    """Run with another attention implementation (`eager`, `sdpa`), and put the old one back."""
    inner = model.transformers_model
    before = inner.config._attn_implementation
    inner.set_attn_implementation(kind)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
