"""A model of a realistic size with random weights: speed depends on the shape, not on the weights."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

VOCABULARY = 151_936  # as Qwen2-0.5B; the tokenizer made here uses fewer
TOKENS = 30_000


def reviews(data: Path) -> list[str]:
    """Chinese shop reviews, each text once."""
    rows = (data / "online_shopping" / "reviews.csv").read_text(encoding="utf-8").split("\n")[1:]
    texts = [" ".join(row.split("\x01")[3].split()) for row in rows if row]
    return list(dict.fromkeys(filter(None, texts)))


def varied(texts: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`count` different texts with the lengths of real ones, made by reordering their clauses."""
    draw = random.Random(seed)
    found = dict.fromkeys(texts)
    for number in range(10 * count):
        if len(found) >= count:
            break
        clauses = re.split(r"(?<=[，。！？,.!?])", texts[number % len(texts)])
        draw.shuffle(clauses)
        found["".join(clauses)] = None
        if number >= 5 * count:  # texts of one clause have one order
            found[f"{''.join(clauses)}{number}"] = None
    return list(found)[:count]


def build_qwen2(folder: Path, texts: Sequence[str], layers: int) -> Path:
    """Save a Qwen2 with the widths of the 0.5B model, mean pooling, in bfloat16, with a tokenizer trained on texts."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModel, PreTrainedTokenizerFast, Qwen2Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    parts = folder / "parts"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[0], model_max_length=512
    ).save_pretrained(parts)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(parts)
    modules = [Transformer(str(parts), max_seq_length=512), Pooling(896, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder
