"""Tiny random models of every shape that the project supports, and adapters on them, made without a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    XLMRobertaConfig,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog while a shop sells warm blankets and steel pans",
    "how do i cancel my card payment and transfer the money to another account please",
    "南瓜的家常做法 清炒南瓜丝 热水器 书籍 平板电脑 洗发水 酒店 手机壳 苹果 衣服 水果",
    "买一个 iPhone 手机壳 送给妈妈 的 生日 礼物 0123456789 query passage Instruct",
]
SHAPES = (
    "dense", "layernorm", "last_token", "no_pad", "one_layer", "passage", "towers", "late_towers", "static", "tasks",
)  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens for every script, Chinese in one to three tokens per character."""
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
    if kind == "mpnet":
        return MPNetConfig(**common, max_position_embeddings=514)
    if kind == "qwen3":
        return Qwen3Config(**common, num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
    assert kind == "qwen2", kind
    return Qwen2Config(**common, num_key_value_heads=2, max_position_embeddings=512)


def build_tiny(kind: str, folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny sentence-transformers model of `kind` (bert, xlm-r, modernbert, qwen2) with mean pooling."""
    transformer = _transformer(kind, folder / "parts", hidden=hidden, layers=layers, seed=seed)
    _save(folder, [transformer, Pooling(hidden, "mean"), Normalize()])
    return folder


def _transformer(
    kind: str, folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0, **settings
) -> Transformer:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = _config(kind, len(tokenizer), hidden, layers)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=128)
    shutil.rmtree(folder)
    return transformer


def _save(folder: Path, modules: list, **kwargs) -> None:
    SentenceTransformer(modules=modules, device="cpu", **kwargs).save_pretrained(str(folder))


TASK_CODE = '''
from sentence_transformers.sentence_transformer.modules import Transformer


class TaskTransformer(Transformer):
    """Moves token states by task, as jina-embeddings-v3 does with an adapter for each task."""

    def forward(self, features, task=None, **kwargs):
        moved = {None: 0.0, "retrieval.query": 1.0, "retrieval.passage": -1.0}
        if task not in moved:
            raise ValueError(f"no task {task}")
        features = super().forward(features)
        features["token_embeddings"][..., 0] += moved[task]
        return features
'''


def build_shape(shape: str, folder: Path) -> Path:
    """Save a tiny model of a shape other than a transformer with mean pooling."""
    torch.manual_seed(0)
    bert = lambda seed=0: _transformer("bert", folder / "parts", seed=seed)  # noqa: E731
    pooling, unit = Pooling(32, "mean"), Normalize()
    if shape == "dense":
        _save(folder, [bert(), Pooling(32, "cls"), Dense(32, 24, activation_function=torch.nn.Tanh()), unit])
    elif shape == "layernorm":
        norm = LayerNorm(32)
        torch.nn.init.normal_(norm.norm.weight)  # ones would hide a norm that is not loaded
        _save(folder, [bert(), pooling, norm, unit])
    elif shape == "last_token":
        transformer = _transformer("qwen3", folder / "parts", padding_side="left")
        _save(folder, [transformer, Pooling(32, "lasttoken"), unit], prompts={"query": "Instruct: find\nQuery: "})
    elif shape == "no_pad":
        _save(folder, [_transformer("qwen2", folder / "parts", pad_token=None), pooling, unit])
    elif shape == "passage":
        prompts = {"query": "query: ", "passage": "passage: "}
        _save(folder, [bert(), pooling, unit], prompts=prompts, default_prompt_name="passage")
    elif shape == "one_layer":
        prompts = {"query": "query: ", "document": "passage: "}
        _save(folder, [_transformer("bert", folder / "parts", layers=1), pooling, unit], prompts=prompts)
    elif shape == "towers":
        routes = {"query_modules": [bert(1), pooling], "document_modules": [bert(2), pooling]}
        _save(folder, [Router.for_query_document(**routes), unit])
    elif shape == "late_towers":
        routes = {"query": [Dense(32, 24)], "passage": [Dense(32, 24)]}
        _save(folder, [bert(), pooling, Router(routes, default_route="query"), unit])
    elif shape == "tasks":
        _save(folder, [bert(), pooling, unit])
        modules = json.loads((folder / "modules.json").read_text())
        modules[0] |= {"type": "tasks.TaskTransformer", "kwargs": ["task"]}
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "tasks.py").write_text(TASK_CODE, encoding="utf-8")
    else:
        assert shape == "static", shape
        _save(folder, [StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=32)])
    return folder


KALM_CODE = '''
from transformers import Qwen2Config, Qwen2Model


class TinyKalmConfig(Qwen2Config):
    model_type = "tiny_kalm"


class TinyKalmModel(Qwen2Model):
    """Qwen2 whose attention sees both ways."""

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
    """Save a Qwen2-shaped model with bidirectional attention in code of its own, like KaLM-embedding."""
    build_tiny("qwen2", folder, hidden=hidden)
    (folder / "tiny_kalm.py").write_text(KALM_CODE, encoding="utf-8")
    edit_json(
        folder / "config.json",
        model_type="tiny_kalm",
        architectures=["TinyKalmModel"],
        auto_map={"AutoConfig": "tiny_kalm.TinyKalmConfig", "AutoModel": "tiny_kalm.TinyKalmModel"},
    )
    return folder


def build_tiny_reranker(folder: Path, *, kind: str = "bert", labels: int = 1, seed: int = 0) -> Path:
    """Save a tiny cross-encoder as transformers does, with logits that tell pairs apart."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = _config(kind, len(tokenizer), 32, 2)
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bring_own_code(folder: Path) -> Path:
    """Make a qwen2 model ask for code of its own, and keep its type, which the library loads as a causal model."""
    (folder / "modeling.py").write_text(KALM_CODE, encoding="utf-8")
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.TinyKalmModel"})
    return folder


def edit_json(file: Path, **values) -> None:
    """Set values of a JSON file's mapping."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def move_adapter(model: SentenceTransformer, seed: int = 1) -> None:
    """Change all trainable weights, as training would: new LoRA weights do nothing."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn_like(weight)


def save_adapted(model: SentenceTransformer, base: Path, folder: Path, *, choice=False, side: str = "both") -> Path:
    """Save a model with an adapter as fine-tuning does."""
    from ebr_lib.finetune.saving import make_contract, save_adapter
    from ebr_lib.model.loading import check_remote_code
    from ebr_lib.model.provenance import identify

    identity = identify(str(base), check_remote_code(str(base), choice))
    folder.mkdir(parents=True)
    save_adapter(model, folder, identity, make_contract(model, identity, adapter_side=side))
    return folder


def adapted(base: Path, folder: Path, choice=False) -> Path:
    """Save an adapter on a base that changes its vectors."""
    from ebr_lib.model.adapters import add_lora
    from ebr_lib.model.loading import load_model

    model = load_model(str(base), trust_remote_code=choice, device="cpu")
    add_lora(model, r=2, alpha=4, dropout=0.0)
    move_adapter(model)
    return save_adapted(model, base, folder, choice=choice)


def load_tiny(tiny_models, kind: str, **kwargs) -> SentenceTransformer:
    """Load a tiny model of a kind or shape, its own code included."""
    from ebr_lib.model.loading import load_model

    return load_model(str(tiny_models(kind)), device="cpu", trust_remote_code=kind == "kalm", **kwargs)
