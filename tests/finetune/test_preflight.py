"""The preflight: it tries the longest texts, leaves no trace, and estimates what a run takes."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from ebr_lib.finetune import preflight
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.preflight import Preflight, estimated_seconds, log_preflight, longest_rows
from ebr_lib.model.loading import load_model
from tests.finetune.conftest import make_trainer, same, step


def test_it_leaves_no_trace(settings):
    noisy = {"noise_enabled": True, "noise_prob": 0.5}  # dropout and all
    assert same(step(settings, **noisy, with_preflight=True).adapter, step(settings, **noisy).adapter)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_checkpoints_as_the_run_does(settings, checkpointing):
    trainer = make_trainer(settings, gradient_checkpointing=checkpointing).trainer
    preflight.preflight(trainer)
    layers = trainer.model.transformers_model.encoder.layer
    assert [layer.gradient_checkpointing for layer in layers] == [checkpointing, False]


def test_it_needs_no_step_more_when_memory_runs_out(settings, monkeypatch):
    seen: list[int] = []
    forward = ContrastiveLoss.forward

    def tight(self, features, labels):
        rows = self.mini_batch_size or len(labels)
        seen.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("injected")
        return forward(self, features, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", tight)
    steps = step(settings, with_preflight=True, eval_ratio=0.0).steps
    assert seen[:3] == [8, 4, 2] and set(seen[3:]) == {2}
    assert len(seen) == 3 + preflight.TIMED_BATCHES + steps  # the preflight found out, no step was made twice


def test_the_log_says_what_the_batches_took(settings, monkeypatch, caplog):
    trainer = make_trainer(settings, eval_ratio=0.0).trainer
    for seconds, whole in ((30.0, "3.0 min"), (9.5, "57.0 s")):  # 48 rows, 8 per batch
        found = Preflight(batch=seconds, longest=2 * seconds, peak_mb=1234.4)
        monkeypatch.setattr(preflight, "preflight", lambda trainer, found=found: found)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ebr_lib"):
            log_preflight(trainer, 0.0)
        (line,) = caplog.messages
        assert f"longest batch {2 * seconds:.2f} s, peak memory 1234 MB; average batch {seconds:.2f} s" in line
        assert line.endswith(f"about {whole}")


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"eval_steps": 2, "num_epochs": 2, "save_steps": 3},
        {"eval_steps": 3, "num_epochs": 1.5, "gradient_accumulation_steps": 2},
        {"num_epochs": 2.5, "gradient_accumulation_steps": 3},
    ],
)
def test_the_estimate_counts_what_a_run_does(settings, monkeypatch, knobs):
    """A training batch takes 1 s, one of evaluation 0.1 s, measuring 2 s, a checkpoint 100 s."""
    saved = []
    save = training.EbrTrainer._save
    monkeypatch.setattr(training.EbrTrainer, "_save", lambda *given: saved.append(1) or save(*given))
    seen = step(settings, save=True, **knobs)
    evaluations = len(seen.values("eval_loss")) - 1  # the first loss is that before training, already measured
    seconds = len(seen.batches) + 0.2 + evaluations * (2 + 0.2) + 100 * len(saved)  # 12 held-out rows, 8 per batch
    assert estimated_seconds(seen.trainer, Preflight(1.0, 0.1, 100.0), 2.0) == pytest.approx(seconds)


@pytest.mark.parametrize(("packed", "mini"), [(False, None), (True, None), (False, 2)])
@pytest.mark.parametrize("longer", [0.0, 0.01, 0.2], ids="{:.0%}".format)
def test_the_average_batch_is_not_the_longest(tiny_bert, monkeypatch, longer, packed, mini):
    """A share of the texts has 100 words, the others 5: what all batches of an epoch take, known to a factor of 1.3."""
    rng = np.random.default_rng(1)
    words = np.where(rng.random(3000) < longer, 100, 5)
    dataset = Dataset.from_dict(
        {"anchor": ["a b"] * 3000, "positive": ["fox " * n for n in words], "label": list(range(3000))}
    )
    loss = ContrastiveLoss(torch.nn.Linear(1, 1), mini_batch_size=mini, packed=(lambda columns: []) if packed else None)
    model = SimpleNamespace(tokenizer=load_model(str(tiny_bert), device="cpu").tokenizer)
    args = SimpleNamespace(train_batch_size=8, eval_batch_size=8)
    trainer = SimpleNamespace(model=model, loss=loss, train_dataset=dataset, args=args)

    def seconds_of(trainer, dataset, rows) -> float:
        step = 1 if packed else mini or len(rows)
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        return 0.5 + sum(len(part) * (words[part].max() + 4) for part in parts) / 100

    longest = longest_rows(dataset, model.tokenizer, 8)
    costliest = preflight._work(preflight._tokens(trainer, dataset, longest), range(8), 1 if packed else mini or 8)
    monkeypatch.setattr(preflight, "_batch_seconds", seconds_of)
    found = preflight._average_seconds(trainer, dataset, (costliest, seconds_of(trainer, dataset, longest)))
    truth = np.mean([seconds_of(trainer, dataset, list(range(start, start + 8))) for start in range(0, 3000, 8)])
    assert truth / 1.3 < found < truth * 1.3


def test_it_tries_the_rows_with_most_tokens(tiny_bert):
    tokenizer = load_model(str(tiny_bert), device="cpu").tokenizer
    words = [5, 3, 40, 7, 2, 9, 30, 1]
    chinese = "钢笔风扇鞋子围巾" * 6  # 48 letters: fewer than those of row 2, more tokens
    positives = [*("fox " * count for count in words), chinese, "b"]
    anchors = ["a"] * 9 + ["the lazy dog " * 20]
    dataset = Dataset.from_dict({"anchor": anchors, "positive": positives, "label": list(range(10))})
    tokens = [
        sum(len(ids) for ids in tokenizer(list(pair))["input_ids"]) for pair in zip(anchors, positives, strict=True)
    ]
    assert longest_rows(dataset, tokenizer, 3)[:2] == [9, max(range(9), key=tokens.__getitem__)]
    assert len(positives[2]) > len(chinese) and tokens[8] > tokens[2]
    assert sorted(longest_rows(dataset, tokenizer, 20)) == list(range(10))
