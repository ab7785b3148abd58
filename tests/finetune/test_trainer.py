"""Training, step by step, against formulas: what each knob does to a step, a gradient, a batch and the log."""

from __future__ import annotations

import gc
import logging
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed
from transformers.models.bert.modeling_bert import BertIntermediate

from ebr_lib.data.pairs import expand, read_pairs
from ebr_lib.errors import ModelError
from ebr_lib.finetune import memory, preflight, setup
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.noise import TextNoise
from ebr_lib.model import precision as model_precision
from ebr_lib.model.adapters import adapter_weights, add_lora
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model
from tests.finetune.conftest import close, make_trainer, same, step, write_rows


def test_with_everything_off_it_is_the_library_s_own_training(plain, tmp_path):
    ours = step(plain, balanced_batches=False, mask_known_positives=False)
    set_seed(42)
    model = load_model(plain["model_name"], device="cpu", max_seq_length=32)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    rows = expand(read_pairs(plain["data_path"]))
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "stock"),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=2e-3,
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=42,
        ),
        train_dataset=Dataset.from_dict({"anchor": [r.anchor for r in rows], "positive": [r.positive for r in rows]}),
        loss=MultipleNegativesRankingLoss(model, scale=20.0),
    ).train()
    assert close(ours.adapter, adapter_weights(model))


def test_neutral_values_change_no_bit(settings):
    neutral = {
        "l1_regularization": 0.0, "label_smoothing": 0.0, "noise_enabled": True, "noise_prob": 0.0, "use_dora": False,
        "warmup_ratio": 0.0, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "mine_hard_negatives": 0,
        "mining_margin": None, "prompt": "",
    }  # fmt: skip
    assert same(step(settings).adapter, step(settings, **neutral).adapter)


def test_the_trainer_is_made_as_the_knobs_say(settings):
    knobs = {
        "temperature": 0.2, "label_smoothing": 0.1, "l1_regularization": 0.3, "matryoshka_dims": [16, 8],
        "mask_known_positives": False, "train_batch_size": 4, "contrastive_batch_size": 12, "eval_batch_size": 3,
        "adapter_side": "query", "packed_rows": False, "balanced_batches": False, "lora_r": 2, "lora_alpha": 5,
        "lora_dropout": 0.4, "use_dora": True, "use_rslora": False, "weight_decay": 0.5, "max_grad_norm": 0.7,
        "seed": 9, "noise_enabled": True, "noise_type": "char_delete", "noise_prob": 0.3, "noise_strength": 0.2,
        "noise_apply_to_fields": ["negative"], "memory_limit_gb": 1.5, "dataloader_num_workers": 2,
    }  # fmt: skip
    trainer = make_trainer(settings, **knobs).trainer
    loss, args = trainer.loss, trainer.args
    assert (loss.temperature, loss.label_smoothing, loss.l1, loss.matryoshka_dims) == (0.2, 0.1, 0.3, (16, 8))
    assert (loss.known_positives, loss.mini_batch_size, loss.eval_mini_batch_size) == (None, 4, 3)
    assert (loss.query_only, loss.packed, args.train_batch_size) == (True, None, 12)
    lora = trainer.model.transformers_model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora, lora.use_rslora) == (2, 5, 0.4, True, False)
    assert (args.weight_decay, args.max_grad_norm, args.seed, args.dataloader_num_workers) == (0.5, 0.7, 9, 2)
    assert trainer.memory_limit_mb == 1536
    collate = trainer.get_train_dataloader().collate_fn
    assert (collate.noise, collate.columns) == (TextNoise("char_delete", 0.3, 0.2, 9), {"negative"})
    assert not trainer.get_train_dataloader().batch_sampler.batches.__class__.__name__.startswith("Balanced")

    plain = make_trainer(settings).trainer
    sampler = plain.get_train_dataloader().batch_sampler.batches
    assert (type(sampler).__name__, plain.loss.mini_batch_size) == ("BalancedBatchSampler", None)
    assert plain.loss.known_positives is not None and plain.loss.packed is not None


def test_the_seed_decides_the_new_adapter_and_the_order(settings):
    one, other = (make_trainer(settings, eval_ratio=0.0, seed=seed).trainer for seed in (1, 2))
    assert not same(adapter_weights(one.model), adapter_weights(other.model))
    orders = [list(trainer.get_train_dataloader().batch_sampler) for trainer in (one, other)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("wanted", "device", "pinned"), [(True, "cuda:0", True), (False, "cuda:0", False), (True, "cpu", False)]
)
def test_memory_is_pinned_for_a_gpu(wanted, device, pinned, monkeypatch):
    found: dict = {}
    monkeypatch.setattr(setup, "training_device", lambda: device)
    monkeypatch.setattr(setup, "SentenceTransformerTrainingArguments", lambda **given: found.update(given))
    config = FinetuneConfig(dataloader_pin_memory=wanted)
    setup.training_arguments(config, Path("unused"), rows=10, evaluate=False)
    assert found["dataloader_pin_memory"] is pinned


# --- the optimiser's step -----------------------------------------------------------------------------------------


def test_clipping_scales_the_gradient_to_the_norm(plain):
    whole = step(plain)
    raw = whole.gradients
    limit = float(min(gradient.norm() for gradient in raw)) / 2
    clipped = step(plain, max_grad_norm=limit)
    assert [float(g.norm()) for g in clipped.gradients] == pytest.approx([limit] * len(raw), rel=1e-4)
    torch.testing.assert_close(clipped.gradients[0], raw[0] * limit / raw[0].norm())
    assert clipped.log[0]["grad_norm"] == pytest.approx(float(raw[0].norm()), rel=1e-5)  # before it was clipped
    assert same(whole.adapter, step(plain, max_grad_norm=1e9).adapter)  # off is a limit that is never reached


def test_weight_decay_takes_its_share_of_every_weight_each_step(plain):
    """And without it, Adam's first step is as large as the learning rate."""
    one_step = plain | {"train_batch_size": 64, "learning_rate": 3e-3}
    without = step(one_step)
    before, after = without.weights
    decayed = step(one_step, weight_decay=0.5)
    torch.testing.assert_close(decayed.weights[1], after - 3e-3 * 0.5 * before, atol=1e-7, rtol=1e-4)
    moved = without.gradients[0].abs() > 1e-4  # far above AdamW's epsilon
    assert moved.any()
    torch.testing.assert_close((before - after)[moved], 3e-3 * without.gradients[0].sign()[moved], atol=1e-6, rtol=1e-3)


def test_accumulation_steps_with_the_mean_gradient_of_its_batches(plain):
    seen = step(plain, gradient_accumulation_steps=3)
    assert len(seen.batches) == 6 and seen.steps == 2
    model = load_model(plain["model_name"], device="cpu", max_seq_length=32)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    weights = [w for w in model.parameters() if w.requires_grad]
    torch.nn.utils.vector_to_parameters(seen.weights[0], weights)
    loss = ContrastiveLoss(model)  # each batch alone: negatives stay within it
    rows = expand(read_pairs(plain["data_path"]))
    loss.known_positives = KnownPositives(rows).mask
    for _, labels in seen.batches[:3]:
        columns = [[rows[i].anchor for i in labels], [rows[i].positive for i in labels]]
        (loss([model.preprocess(column) for column in columns], labels) / 3).backward()
    wanted = torch.cat([w.grad.flatten() for w in weights])
    torch.testing.assert_close(seen.gradients[0], wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_nothing(settings, packed):
    knobs = {"packed_rows": packed, "lora_dropout": 0.0, "eval_ratio": 0.0}
    assert close(step(settings, **knobs).adapter, step(settings, **knobs, gradient_checkpointing=True).adapter, 1e-5)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_l1_and_smoothing_are_logged_apart(plain):
    seen = step(plain, l1_regularization=1e-3, label_smoothing=0.3)
    first = seen.log[0]
    assert first["l1"] == pytest.approx(1e-3 * float(seen.weights[0].abs().sum()), rel=1e-4)
    assert first["loss"] == pytest.approx(first["contrastive"] + first["l1"] + first["smoothing"], rel=1e-4)
    off = step(plain).log[0]
    assert off["loss"] == pytest.approx(first["contrastive"], rel=1e-5)
    assert "l1" not in off


def test_a_cached_batch_is_the_whole_batch(plain, monkeypatch):
    whole = step(plain, train_batch_size=12)
    rows = [len(labels) for labels in whole.labels]
    assert set(rows) == {12}
    embedded: list[int] = []
    inner = type(whole.trainer.model)
    forward = inner.forward

    def spy(self, features, **kwargs):
        embedded.append(len(features["input_ids"]))
        return forward(self, features, **kwargs)

    monkeypatch.setattr(inner, "forward", spy)
    cached = step(plain, train_batch_size=3, contrastive_batch_size=12)
    assert max(embedded) == 3  # rows embedded at a time
    assert [len(labels) for labels in cached.labels] == rows  # rows compared at a time
    assert close(cached.adapter, whole.adapter)


@pytest.mark.parametrize("knobs", [{}, {"packed_rows": False}, {"contrastive_batch_size": 8, "train_batch_size": 2}])
def test_mixed_precision_reaches_every_forward_and_not_the_loss(settings, monkeypatch, knobs):
    """In the preflight, in steps, where GradCache embeds again; in bfloat16, for a CPU has no float16."""
    arguments = setup.training_arguments
    layers: list[torch.dtype] = []
    logits: set[torch.dtype] = set()
    forward, entropy = BertIntermediate.forward, ContrastiveLoss._cross_entropy

    def spy(self, states):
        out = forward(self, states)
        if self.training:
            layers.append(out.dtype)
        return out

    def spy_loss(self, queries, candidates, *more):
        logits.add((queries @ candidates.T).dtype)
        return entropy(self, queries, candidates, *more)

    monkeypatch.setattr(setup, "training_arguments", lambda *given, **more: arguments(*given, **more, bf16=True))
    monkeypatch.setattr(BertIntermediate, "forward", spy)
    monkeypatch.setattr(ContrastiveLoss, "_cross_entropy", spy_loss)
    in_preflight: list[int] = []
    find = preflight.preflight
    monkeypatch.setattr(preflight, "preflight", lambda trainer: (find(trainer), in_preflight.append(len(layers)))[0])
    step(settings, with_preflight=True, eval_ratio=0.0, **knobs)
    assert 0 < in_preflight[0] < len(layers) and set(layers) == {torch.bfloat16}
    assert logits == {torch.float32}


# --- what is fed --------------------------------------------------------------------------------------------------


def texts_of(model, ids: torch.Tensor) -> list[str]:
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_prompts_come_before_the_texts_of_their_column(plain, tmp_path):
    rows = [{"anchor": f"warm {i}", "positive": f"pan {i}", "negative": [f"kite {i}"] * (i % 2)} for i in range(16)]
    given = plain | {"data_path": write_rows(tmp_path / "triplets.jsonl", rows)}
    seen = step(given, prompt={"anchor": "query: ", "positive": "passage: ", "negative": "not: "})
    model = seen.trainer.model
    for columns, labels in seen.batches:
        anchors, positives, negatives = (texts_of(model, ids) for ids in columns)
        assert anchors == [f"query: warm {i}" for i in labels]
        assert positives == [f"passage: pan {i}" for i in labels]
        assert all(text.startswith(("not: kite ", "not: pan ")) for text in negatives)
    assert make_trainer(given, prompt={"anchor": "query: "}).trainer.args.prompts == {
        "anchor": "query: ", "positive": "", "negative_1": ""
    }  # fmt: skip


def test_texts_are_cut_at_the_length(plain):
    short, long = (step(plain, max_seq_length=length).batches for length in (9, 32))
    assert max(ids.shape[1] for columns, _ in short for ids in columns) == 9
    for (cut, _), (whole, _) in zip(short, long, strict=True):
        assert torch.equal(cut[1][:, :8], whole[1][:, :8])  # the beginning is kept; the ninth token ends the text


def test_noise_reaches_training_alone_and_differs_between_epochs(plain, monkeypatch):
    held_out: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *a: held_out.extend(texts) or encode(self, texts, *a))
    seen = step(
        plain, eval_ratio=0.25, num_epochs=2, noise_enabled=True, noise_type="char_delete", noise_prob=0.7,
        noise_strength=0.3, noise_apply_to_fields=["anchor"], seed=5, max_seq_length=64,
    )  # fmt: skip
    model, batches = seen.trainer.model, seen.batches
    given = expand(read_pairs(plain["data_path"]))
    clean = {text for row in given for text in (row.anchor, row.positive)}
    noise = TextNoise("char_delete", 0.7, 0.3, 5)
    by_anchor = {row.anchor for row in given}
    touched, steps = [], len(batches) // 2
    epochs: list[dict[int, str]] = [{}, {}]
    for number, (columns, labels) in enumerate(batches):
        anchors, positives = (texts_of(model, ids) for ids in columns)
        assert set(positives) <= clean
        epoch = number // steps
        for text, label in zip(anchors, labels.tolist(), strict=True):
            assert text.strip() in {noise(anchor, epoch, label, "anchor").strip() for anchor in by_anchor}
            touched.append(text not in by_anchor)
            epochs[epoch][label] = text
    assert 0.5 < sum(touched) / len(touched) < 0.9
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1]
    assert held_out and seen.evaluated
    assert set(held_out) <= clean
    assert {text for columns, _ in seen.evaluated for ids in columns for text in texts_of(model, ids)} <= clean


def test_noise_and_weights_are_the_same_with_and_without_workers(settings):
    noisy = {"noise_enabled": True, "noise_prob": 0.8, "noise_strength": 0.5, "num_epochs": 2, "eval_ratio": 0.0}
    assert same(step(settings, **noisy).adapter, step(settings, **noisy, dataloader_num_workers=1).adapter)


def test_held_out_rows_change_no_training(settings, tmp_path):
    """The same held-out pairs, with hard negatives and with answers that training would mask: loss and adapter stay."""
    rows = [{"anchor": row.anchor, "positive": row.positive} for row in expand(read_pairs(settings["data_path"]))]
    other = [row | {"positive": rows[(i + 9) % len(rows)]["positive"]} for i, row in enumerate(rows[:12])]
    heldout = {
        "plain": [{"anchor": f"held out {i}", "positive": row["positive"]} for i, row in enumerate(rows[:12])],
        "negatives": [row | {"negative": [rows[20]["positive"], "nothing"]} for row in other],
    }
    one, two = (
        step(settings, eval_data_path=write_rows(tmp_path / f"{name}.jsonl", lines), best_metric="loss")
        for name, lines in heldout.items()
    )
    assert one.values("loss") == two.values("loss") and one.values("masked_share") == two.values("masked_share")
    assert same(one.adapter, two.adapter)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluations_come_every_eval_steps(settings):
    log = step(settings, eval_steps=2, num_epochs=2).log
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 2, 4, 6, 8, 10]


def test_the_threshold_decides_what_counts_as_better(settings):
    knobs = {"num_epochs": 4, "early_stopping_patience": 1, "best_metric": "loss"}
    assert len(step(settings, **knobs).values("eval_loss")) == 1 + 4  # it falls every epoch
    assert len(step(settings, **knobs, early_stopping_threshold=100.0).values("eval_loss")) == 1 + 2


def test_evaluation_embeds_no_more_than_its_batch_size_and_compares_the_same(settings, monkeypatch):
    embedded = []
    parts = ContrastiveLoss._in_parts
    monkeypatch.setattr(ContrastiveLoss, "_in_parts", lambda *given: embedded.append(given[-1]) or parts(*given))
    few, at_once = (step(settings, eval_batch_size=n, learning_rate=1e-9).values("eval_loss")[0] for n in (3, None))
    assert set(embedded) == {3} and few == pytest.approx(at_once, rel=1e-4)


@pytest.mark.parametrize("metric", ["loss", "recall@1"])
def test_the_metric_decides_which_weights_are_restored(settings, caplog, metric):
    seen = step(settings, best_metric=metric)
    with caplog.at_level(logging.INFO, "ebr_lib"):
        seen.trainer.restore_best()
    assert any("best weights" in line and metric in line for line in caplog.messages)


def test_the_best_weights_come_back_bit_for_bit(settings, monkeypatch):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: True)  # a base in bfloat16 must not round the adapter
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])

    def scripted(trainer):
        trainer.evaluator = lambda model, **kwargs: {"ndcg@10": next(scores)}

    seen = step(settings, change=scripted, num_epochs=6, early_stopping_patience=3, bf16=True)
    assert seen.steps == 25  # evaluations at 5, 10, and three without a better one
    seen.trainer.restore_best()
    found = torch.cat([weight.detach().flatten() for weight in seen.trainer.loss.weights])
    assert torch.equal(found, seen.weights[10])


def test_a_notebook_has_one_bar_and_a_line_per_evaluation(settings, monkeypatch, caplog):
    """The library's table in a notebook would be a second bar, and its numbers would be in no terminal."""
    from transformers.utils import notebook

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    monkeypatch.setattr(notebook.NotebookTrainingTracker, "write_line", lambda *given: pytest.fail("a table"))
    with caplog.at_level("INFO", logger="ebr_lib"):
        seen = step(settings, num_epochs=2)
    lines = [message for message in caplog.messages if message.startswith("评估 evaluation: ")]
    losses = [entry["eval_loss"] for entry in seen.log if "eval_loss" in entry]
    assert [f"held-out loss {loss:.4f}" in line for loss, line in zip(losses, lines, strict=True)] == [True] * 3


def test_the_model_is_measured_before_its_first_step_which_does_not_notice(settings, monkeypatch):
    """The log begins with the loss of the untrained model; batches, dropout and best weights are as without it."""
    seen = step(settings, num_epochs=2)
    first = next(entry for entry in seen.log if "eval_loss" in entry)
    assert first["step"] == 0 and {"eval_loss", "eval_ndcg@10"} < first.keys()
    monkeypatch.setattr(training.EbrTrainer, "_log_first", lambda self: None)
    unmeasured = step(settings, num_epochs=2)
    assert same(seen.adapter, unmeasured.adapter)
    assert seen.values("loss") == unmeasured.values("loss")
    assert seen.values("eval_loss")[1:] == unmeasured.values("eval_loss")


# --- numbers that are not finite ----------------------------------------------------------------------------------


def test_good_weights_before_nan_are_restored(settings):
    """One weight becomes NaN after the third step; the weights of the second were the best."""

    class Spoil(training.TrainingBar):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                torch.nn.init.constant_(next(weight for weight in model.parameters() if weight.requires_grad), np.nan)

    knobs = {"best_metric": "loss", "eval_steps": 2}
    seen = step(settings, change=lambda trainer: trainer.add_callback(Spoil()), **knobs)
    assert [entry["step"] for entry in seen.log if "eval_loss" in entry] == [0, 2]
    assert seen.steps == 4  # the first that shows it is the last
    seen.trainer.restore_best()
    found = torch.cat([weight.detach().flatten() for weight in seen.trainer.loss.weights])
    assert torch.equal(found, seen.weights[2])


def test_one_nan_loss_is_one_entry_of_the_log(settings, monkeypatch):
    make = training.EbrTrainer.training_step

    def spoilt(self, model, inputs, num=None):
        loss = make(self, model, inputs, num)
        return loss * float("nan") if self.state.global_step == 1 else loss

    whole = step(settings, eval_ratio=0.0).values("loss")
    monkeypatch.setattr(training.EbrTrainer, "training_step", spoilt)
    found = step(settings, eval_ratio=0.0).values("loss")
    assert len(whole) == 6 and list(filter(math.isfinite, found)) == [whole[0], *whole[2:]]


# --- memory -------------------------------------------------------------------------------------------------------


def full_above(rows: int, monkeypatch, in_training: bool = True) -> None:
    """Memory holds `rows` rows; a step that does not fit leaves half a gradient, as a real one does."""
    forward = ContrastiveLoss.forward

    def tight(self, features, labels):
        if self.model.training == in_training and (self.mini_batch_size or len(labels)) > rows:
            for weight in self.weights:
                weight.grad = torch.ones_like(weight) if weight.grad is None else weight.grad + 1
            torch.rand(100)
            raise torch.OutOfMemoryError("injected")
        return forward(self, features, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", tight)


@pytest.mark.parametrize("where", ["preflight", "step"])
def test_out_of_memory_leaves_batches_negatives_and_weights_as_they_were(plain, monkeypatch, caplog, where):
    knobs = {"gradient_accumulation_steps": 2, "noise_enabled": True, "noise_prob": 0.5}
    whole = step(plain, **knobs)
    full_above(2, monkeypatch)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        halved = step(plain, **knobs, with_preflight=where == "preflight")
    assert [line.split("micro-batch ")[1][:5] for line in caplog.messages] == ["8 → 4", "4 → 2"]
    assert "gradient_accumulation_steps" in caplog.text and halved.steps == whole.steps
    tries = [labels for i, labels in enumerate(halved.labels) if labels not in halved.labels[:i]]
    assert tries == whole.labels
    torch.testing.assert_close(halved.gradients[0], whole.gradients[0], atol=1e-5, rtol=1e-3)
    assert close(halved.adapter, whole.adapter)


def test_a_step_made_twice_is_logged_once(plain, monkeypatch):
    """Memory runs out after backward, twice, in the second batch of a step."""
    knobs = {"gradient_accumulation_steps": 2, "l1_regularization": 1e-3, "balanced_batches": False}
    whole = step(plain, **knobs)
    make, made = SentenceTransformerTrainer.training_step, []

    def tight(self, model, inputs, num=None):
        loss = make(self, model, inputs, num)
        made.append(self.loss.mini_batch_size)
        if len(made) in (2, 3):
            raise torch.OutOfMemoryError("injected")
        return loss

    monkeypatch.setattr(SentenceTransformerTrainer, "training_step", tight)
    found = step(plain, **knobs)
    assert made[:4] == [None, None, 4, 2]
    for name in ("loss", "contrastive", "l1", "masked_share"):
        assert found.values(name) == pytest.approx(whole.values(name), rel=1e-3) and any(whole.values(name))


def test_the_evaluation_loss_is_halved_too(plain, monkeypatch):
    knobs = {"eval_ratio": 0.25, "train_batch_size": 12, "learning_rate": 1e-9}
    whole = step(plain, **knobs).values("eval_loss")
    full_above(8, monkeypatch, in_training=False)
    assert step(plain, **knobs).values("eval_loss") == pytest.approx(whole, rel=1e-4)


def test_a_row_that_does_not_fit_is_an_error(plain, monkeypatch):
    full_above(0, monkeypatch)
    with pytest.raises(ModelError, match="one row at a time"):
        step(plain)


def test_one_of_several_processes_out_of_memory_ends_the_run_with_advice(monkeypatch):
    trainer = SimpleNamespace(loss=ContrastiveLoss(torch.nn.Linear(1, 1)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ModelError, match=r"one of 4 processes .*contrastive_batch_size to 32 and train_batch_size to 16"
    ):
        training.EbrTrainer._halve(trainer, 32, torch.OutOfMemoryError("injected"))


def test_the_memory_limit_is_for_machines_without_a_gpu(monkeypatch):
    monkeypatch.setattr(training, "peak_memory_mb", lambda: 900.0)
    for device, over in (("cpu", True), ("cuda", False)):
        trainer = SimpleNamespace(memory_limit_mb=512.0, model=SimpleNamespace(device=torch.device(device)))
        with pytest.raises(MemoryError, match="900 MB") if over else nullcontext():
            training.EbrTrainer._check_memory(trainer)


def test_a_peak_is_seen_although_it_is_over(plain, monkeypatch, caplog):
    """Four pairs at a time take 400 MB more than two, and give them back inside the step."""
    forward, before = ContrastiveLoss.forward, list[float]()

    def resident() -> float:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024

    def greedy(self, features, labels):
        rows = self.mini_batch_size or len(labels)
        if self.model.training and rows > 2:
            before.append(resident())
            np.ones(400 * 2**20, dtype=np.uint8)  # written to, and gone at once
        return forward(self, features, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", greedy)
    gc.collect()
    memory.give_memory_back()  # what earlier tests left, which the step would find room in
    with caplog.at_level(logging.INFO, "ebr_lib"):
        step(plain, memory_limit_gb=resident() / 1024 + 0.3)
    assert [line for line in caplog.messages if "micro-batch 4 → 2" in line]
    assert not [line for line in caplog.messages if "micro-batch 2 → 1" in line]
    caplog.clear()
    trainer = make_trainer(plain).trainer
    assert preflight.preflight(trainer).peak_mb > before[-1] + 380


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system counts a process's peak for good")
def test_the_peak_is_counted_from_zero_again():
    held = np.ones(300 * 2**20, dtype=np.uint8)
    with_it = memory.peak_memory_mb()
    del held
    assert memory.peak_memory_mb() == pytest.approx(with_it, abs=5)
    memory.reset_peak()
    assert memory.peak_memory_mb() < with_it - 250
