"""What the tests of training share: pairs, settings, a whole run, and training alone without what surrounds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ebr_lib import train_sentence_transformer
from ebr_lib.finetune import logbook, preflight, setup
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.logbook import LossWatch
from ebr_lib.finetune.paths import Paths
from ebr_lib.finetune.prompts import use_own_prompts
from ebr_lib.finetune.rows import Rows
from ebr_lib.finetune.run import _read
from ebr_lib.finetune.speed import fast_training
from ebr_lib.finetune.trainer import EbrTrainer
from ebr_lib.model.adapters import ADAPTER_FILE, adapter_weights

THINGS = ["blanket", "pan", "kettle", "lamp", "tent", "kite", "scarf", "mug"]
THINGS += ["热水器", "书籍", "手机壳", "洗发水", "rope", "chair", "bowl", "clock"]
WANTS = ["warm", "cheap", "small", "red", "strong", "nice"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """48 pairs: three queries for each of 16 things."""
    rows = [
        {"anchor": f"{want} {thing}", "positive": f"this {thing} is what shops sell as {thing} number {i}"}
        for i, thing in enumerate(THINGS)
        for want in (WANTS[i % 6], WANTS[(i + 1) % 6], WANTS[(i + 2) % 6])
    ]
    return Path(write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows))


@pytest.fixture
def settings(tiny_bert, pairs, tmp_path, monkeypatch) -> dict:
    """A short training, whose curve is not drawn: that took a third of its time, and `trained` has one."""
    monkeypatch.setattr(logbook, "draw_curve", lambda log, picture, metric, **_: None)
    return {
        "model_name": str(tiny_bert),
        "data_path": str(pairs),
        "output_dir": str(tmp_path / "out"),
        "train_batch_size": 8,
        "max_seq_length": 32,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 2e-3,
        "eval_ratio": 0.25,
        "temperature": 0.05,
        "adapter_strength": 1,
        "bf16": False,
        "backend": "torch",  # converting a model takes as long as such a training
    }


@pytest.fixture
def plain(settings, tiny_models) -> dict:
    """Nothing random but the order, and everything off that can be: a Qwen2 has no dropout of its own."""
    return settings | {
        "model_name": str(tiny_models("qwen2")),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "packed_rows": False,
        "eval_ratio": 0.0,
    }


@pytest.fixture(scope="session")
def trained(tiny_bert, pairs, tmp_path_factory):
    """One whole run that several tests look at."""
    return train_sentence_transformer(
        {
            "model_name": str(tiny_bert),
            "data_path": str(pairs),
            "output_dir": str(tmp_path_factory.mktemp("trained")),
            "train_batch_size": 8,
            "max_seq_length": 32,
            "learning_rate": 2e-3,
            "num_epochs": 3,
            "eval_ratio": 0.25,
            "prompt": {"anchor": "query: ", "positive": "passage: "},
            "merge_adapter": True,
            "backend": "torch",
        }
    )


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def train(settings: dict, **more):
    """A whole run."""
    return train_sentence_transformer(settings | more)


def adapter(result) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    weights = load_file(Path(result.model_path) / ADAPTER_FILE)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def log_of(result) -> list[dict]:
    text = (Path(result.model_path) / "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict, other: dict, atol: float = 2e-4) -> bool:
    """AdamW divides by the gradient's own size: where that is tiny, rounding is seen."""
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=atol, rtol=1e-3) for n in one)


# --- training alone -----------------------------------------------------------------------------------------------


@dataclass
class Stepped:
    """A training and what it did: weights before the first step and after each, the gradients of each step, and the
    batches (columns of token ids, labels), in training and in evaluation."""

    trainer: EbrTrainer
    rows: Rows
    weights: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    batches: list[tuple[list[torch.Tensor], torch.Tensor]] = field(default_factory=list)
    evaluated: list[tuple[list[torch.Tensor], torch.Tensor]] = field(default_factory=list)

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return adapter_weights(self.trainer.model)

    @property
    def log(self) -> list[dict]:
        return self.trainer.state.log_history

    @property
    def steps(self) -> int:
        return self.trainer.state.global_step

    @property
    def labels(self) -> list[list[int]]:
        return [labels.tolist() for _, labels in self.batches]

    def values(self, name: str) -> list[float]:
        return [entry[name] for entry in self.log if name in entry]

    def hear(self, module, given) -> None:
        columns, labels = given
        heard = self.batches if self.trainer.model.training else self.evaluated
        heard.append(([column["input_ids"] for column in columns], labels))


class Watch(TrainerCallback):
    def __init__(self, seen: Stepped) -> None:
        self.seen = seen

    def flat(self, what: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([what(weight).detach().flatten().clone() for weight in self.seen.trainer.loss.weights])

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.weights.append(self.flat(lambda weight: weight))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.gradients.append(self.flat(lambda weight: weight.grad))

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.weights.append(self.flat(lambda weight: weight))


def make_trainer(settings: dict, **knobs: Any) -> Stepped:
    """The trainer of a run, before its first step."""
    config, precision = setup.settle_precision(FinetuneConfig.resolve(settings | knobs))
    paths = Paths(config.output_dir, config.model_name)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    rows = _read(config, paths)
    model = setup.make_model(config, precision)
    config = setup.keep_adapter_settings(config, model)
    use_own_prompts(model, rows.train, [*rows.replay, *rows.heldout], config.prompt)
    rows = setup.with_mined_negatives(config, rows, model)
    config = setup.ensure_negatives(config, rows.train)
    report = SimpleNamespace(rows=1000, anchors=1000, documents=1000, duplicate_share=0.0)
    watch = LossWatch(report, 1e-4, 1)
    return Stepped(setup.make_trainer(config, rows, model, paths=paths, watch=watch, fp16=False), rows)


def step(
    settings: dict,
    *,
    with_preflight: bool = False,
    save: bool = False,
    checkpoint: bool = False,
    change: Callable[[EbrTrainer], None] | None = None,
    **knobs: Any,
) -> Stepped:
    """Train, without what surrounds it in a run: no examination, no measuring before and after, nothing saved.

    :param with_preflight: with the preflight.
    :param save: write checkpoints; `checkpoint` resumes from the last of them.
    :param change: what to do to the trainer first.
    """
    seen = make_trainer(settings, **knobs)
    trainer = seen.trainer
    if not (save or checkpoint):
        trainer.args.save_strategy = "no"
    if change:
        change(trainer)
    trainer.add_callback(Watch(seen))
    with fast_training(trainer.model):
        if with_preflight:
            preflight.log_preflight(trainer, 0.0)
        trainer.loss.register_forward_pre_hook(seen.hear)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            trainer.stop.put_handlers_back()
    return seen
