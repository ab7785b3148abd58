"""A model's table of positions: where it starts to count, and how many tokens it has places for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # BERT and RoBERTa, CLIP, BART, GPT-2


def position_padding(model: SentenceTransformer) -> int | None:
    """The padding id of a model that counts positions from it (RoBERTa): the token gets no position of its own."""
    padding = getattr(_table(model), "padding_idx", None)
    return padding if isinstance(padding, int) else None


def position_limit(model: SentenceTransformer) -> int | None:
    """Tokens that the model has positions for: the places of its table, or its config's where they are computed (Qwen2,
    ModernBERT); None where neither is known, or a scaled rotation reaches further (YaRN)."""
    if (table := _table(model)) is not None:
        padding = position_padding(model)
        first = 0 if padding is None else padding + 1
        return int(table.num_embeddings) - first - int(getattr(table, "offset", 0))  # BART adds 2 itself
    if model.transformers_model is None:
        return None
    config = model.transformers_model.config.get_text_config()
    rotation = getattr(config, "rope_parameters", None) or {}
    declared = getattr(config, "max_position_embeddings", None) or 0
    return declared if declared > 0 and rotation.get("rope_type") == "default" else None


def _table(model: SentenceTransformer) -> Any:
    """The table of positions, or None."""
    from torch.nn import Embedding

    named = model[0].model.named_modules() if hasattr(model[0], "model") else ()
    return next((m for name, m in named if isinstance(m, Embedding) and name.rpartition(".")[2] in TABLES), None)
