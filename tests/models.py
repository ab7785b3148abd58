"""Tiny random models of every shape the project supports, built in a second, so that tests need no download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModel,
    BertConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    XLMRobertaConfig,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog while a shop sells warm blankets and steel pans",
    "how do i cancel my card payment and transfer the money to another account please",
    "南瓜的家常做法 清炒南瓜丝 热水器 书籍 平板电脑 洗发水 酒店 手机壳 苹果 衣服 水果",
    "买一个 iPhone 手机壳 送给妈妈 的 生日 礼物 0123456789 query passage Instruct",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens: reads every script, Chinese in one to three tokens a character."""
    tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )


def _config(kind: str, vocabulary: int, hidden: int, layers: int) -> PretrainedConfig:
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "bert":
        return BertConfig(**common, max_position_embeddings=512)
    if kind == "xlm-r":
        return XLMRobertaConfig(**common, max_position_embeddings=514)
    if kind == "modernbert":
        return ModernBertConfig(**common, max_position_embeddings=512, cls_token_id=1, sep_token_id=2)
    assert kind == "qwen2", kind
    return Qwen2Config(**common, num_key_value_heads=2, max_position_embeddings=512)


def build_tiny(kind: str, folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny sentence-transformers model of `kind` (bert, xlm-r, modernbert, qwen2) with mean pooling."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    parts = folder / "parts"
    AutoModel.from_config(_config(kind, len(tokenizer), hidden, layers)).save_pretrained(parts)
    tokenizer.save_pretrained(parts)
    modules = [Transformer(str(parts), max_seq_length=128), Pooling(hidden, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    shutil.rmtree(parts)
    return folder


KALM_CODE = '''
from transformers import Qwen2Config, Qwen2Model


class TinyKalmConfig(Qwen2Config):
    model_type = "tiny_kalm"


class TinyKalmModel(Qwen2Model):
    """Qwen2 whose attention sees both ways, as an embedding model wants it."""

    config_class = TinyKalmConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        import torch

        seen = attention_mask
        if seen is not None and seen.dim() == 2:
            lowest = torch.finfo(self.dtype).min
            seen = (1 - seen[:, None, None, :].to(self.dtype)) * lowest
            seen = seen.expand(-1, 1, attention_mask.shape[1], -1)
        masks = {"full_attention": seen, "sliding_attention": seen}
        kwargs.pop("use_cache", None)
        return super().forward(input_ids=input_ids, attention_mask=masks, use_cache=False, **kwargs)
'''


def build_tiny_kalm(folder: Path, *, hidden: int = 32) -> Path:
    """A Qwen2-shaped model with bidirectional attention in its own modelling code, as KaLM-embedding has."""
    build_tiny("qwen2", folder, hidden=hidden)
    (folder / "tiny_kalm.py").write_text(KALM_CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "tiny_kalm",
        "architectures": ["TinyKalmModel"],
        "auto_map": {"AutoConfig": "tiny_kalm.TinyKalmConfig", "AutoModel": "tiny_kalm.TinyKalmModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bring_own_code(folder: Path) -> Path:
    """Make a qwen2 model ask for modelling code of its own and keep its type, which the library loads, causal."""
    (folder / "modeling.py").write_text(KALM_CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.TinyKalmModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
