"""Models that do not know the language of their texts: the tokenizer makes most of them one unknown token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ebr_lib.model.packaged import CHINESE_NAME, PACKAGES

MOST_UNKNOWN = 0.1
"""Share of unknown tokens above which different texts begin to look alike to a model."""


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Share of the texts' tokens, 0 to 1, that a tokenizer of transformers does not know; 0 if it knows every byte."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
    unknown = sum(token == tokenizer.unk_token_id for text in ids for token in text)
    return unknown / max(sum(map(len, ids)), 1)


def unfit_advice(share: float) -> str | None:
    """What a share of unknown tokens means and which model to take; None for a share that does no harm."""
    if share <= MOST_UNKNOWN:
        return None
    install = f"pip install -r {PACKAGES[CHINESE_NAME].requirements}"
    return (
        f"模型不认识这些文本：{share:.0%} 的 token 是未知词，不同的文本会得到几乎相同的向量。"
        f"中文数据请换用 {CHINESE_NAME}（{install}）或 configs/finetune/ 中 Qwen3、BGE 的预设。 "
        f"The model does not know these texts: {share:.0%} of their tokens are unknown, and different texts get nearly "
        f"equal vectors. For Chinese take {CHINESE_NAME} ({install}), or a preset of Qwen3 or BGE in configs/finetune/."
    )
