"""Where a model with a table of positions begins to count, and how many tokens it has places for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def first_position(model: SentenceTransformer) -> int:
    """The position of a text's first token: RoBERTa and its kin count from the padding id on."""
    module = _embeddings(model)
    padding = getattr(module, "padding_idx", None)
    return padding + 1 if isinstance(padding, int) else 0


def position_limit(model: SentenceTransformer) -> int | None:
    """Tokens that the table of positions has places for; None where positions are computed (Qwen2, ModernBERT)."""
    module = _embeddings(model)
    return None if module is None else module.position_embeddings.num_embeddings - first_position(model)


def _embeddings(model: SentenceTransformer) -> Any:
    """The module that holds the table of positions, or None."""
    from torch.nn import Embedding

    modules = model[0].model.modules() if hasattr(model[0], "model") else ()
    return next((m for m in modules if isinstance(getattr(m, "position_embeddings", None), Embedding)), None)
