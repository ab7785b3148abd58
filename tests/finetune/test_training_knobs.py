"""Each knob of training against its formula: what a step, a gradient, a batch and a log entry have to be."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import get_scheduler, set_seed
from transformers.models.bert.modeling_bert import BertIntermediate

from ebr_lib import evaluate_retrieval
from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.finetune import memory
from ebr_lib.finetune import run as finetune
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.dataset import with_equal_negatives
from ebr_lib.finetune.heldout import HeldoutTask
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.noise import TextNoise
from ebr_lib.finetune.schedulers import FOLLOW_THE_METRIC, Scheduler, scheduler_extras
from ebr_lib.model import precision as model_precision
from ebr_lib.model.adapters import adapter_weights, add_lora, trainable_counts
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model
from tests.finetune.test_finetune import adapter, pairs, same, settings, train  # noqa: F401 - pairs: a fixture's fixture


@pytest.fixture
def plain(settings, tiny_models) -> dict:  # noqa: F811
    """Nothing random but the order, nothing on that could be off: a Qwen2 has no dropout of its own."""
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


@pytest.fixture
def watched(monkeypatch):
    """What training does: weights before the first step and after each, gradients that each step was made with."""
    seen = SimpleNamespace(weights=[], gradients=[])

    def flat(model, what):
        return torch.cat([what(w).detach().flatten().clone() for w in model.parameters() if w.requires_grad])

    class Watch(training.TrainingBar):
        def on_train_begin(self, args, state, control, model, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            seen.weights, seen.gradients = [flat(model, lambda w: w)], []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.gradients.append(flat(model, lambda w: w.grad))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            seen.weights.append(flat(model, lambda w: w))

    monkeypatch.setattr(training, "TrainingBar", Watch)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """The batches that training was given: (columns of token ids, labels), the preflight's left out."""
    seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    forward = ContrastiveLoss.forward

    def spy(self, features, labels):
        columns = list(features)
        if self.model.training and seen_on[0]:
            seen.append(([column["input_ids"] for column in columns], labels))
        return forward(self, columns, labels)

    seen_on = [False]
    begin = training.TrainingBar.on_train_begin

    def on_begin(self, *args, **kwargs):
        seen_on[0] = True
        seen.clear()
        begin(self, *args, **kwargs)

    monkeypatch.setattr(ContrastiveLoss, "forward", spy)
    monkeypatch.setattr(training.TrainingBar, "on_train_begin", on_begin)
    return seen


def log_of(result) -> list[dict]:
    text = (Path(result.model_path) / "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# --- all off is the library's training ----------------------------------------------------------------------------


def test_with_everything_off_it_is_the_library_s_own_training(plain, tmp_path):
    ours = train(plain, balanced_batches=False, mask_known_positives=False)
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
    stock, found = adapter_weights(model), adapter(ours)
    assert len(stock) == len(found)
    for name, weight in found.items():
        # AdamW divides by the gradient's own size: where that is tiny, rounding is seen
        torch.testing.assert_close(weight, stock[name.removeprefix("base_model.model.")], atol=2e-4, rtol=1e-3)


# --- the optimiser's step -----------------------------------------------------------------------------------------


def test_clipping_scales_the_gradient_to_the_norm(plain, watched, tmp_path):
    train(plain)
    raw = watched.gradients
    limit = float(min(gradient.norm() for gradient in raw)) / 2
    clipped = train(plain, max_grad_norm=limit, output_dir=str(tmp_path / "clipped"))
    assert [float(g.norm()) for g in watched.gradients] == pytest.approx([limit] * len(raw), rel=1e-4)
    torch.testing.assert_close(watched.gradients[0], raw[0] * limit / raw[0].norm())
    assert log_of(clipped)[0]["grad_norm"] == pytest.approx(float(raw[0].norm()), rel=1e-5)  # what it was before


def test_clipping_off_is_a_limit_never_reached(plain, tmp_path):
    off = adapter(train(plain))
    assert same(off, adapter(train(plain, max_grad_norm=1e9, output_dir=str(tmp_path / "far"))))


def test_weight_decay_takes_its_share_of_every_weight_each_step(plain, watched, tmp_path):
    one_step = plain | {"train_batch_size": 64}
    train(one_step)
    before, without = watched.weights
    train(one_step, weight_decay=0.5, output_dir=str(tmp_path / "decay"))
    torch.testing.assert_close(watched.weights[1], without - 2e-3 * 0.5 * before, atol=1e-7, rtol=1e-4)


def test_adam_s_first_step_is_the_learning_rate_s_size(plain, watched):
    train(plain | {"train_batch_size": 64, "learning_rate": 3e-3})
    before, after = watched.weights
    moved = watched.gradients[0].abs() > 1e-4  # far above AdamW's epsilon
    assert moved.any()
    torch.testing.assert_close((before - after)[moved], 3e-3 * watched.gradients[0].sign()[moved], atol=1e-6, rtol=1e-3)


def test_accumulation_steps_with_the_mean_gradient_of_its_batches(plain, watched, batches):
    result = train(plain, gradient_accumulation_steps=3)
    assert len(batches) == 6 and result.steps == 2
    model = load_model(plain["model_name"], device="cpu", max_seq_length=32)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    weights = [w for w in model.parameters() if w.requires_grad]
    torch.nn.utils.vector_to_parameters(watched.weights[0], weights)
    loss = ContrastiveLoss(model)  # each batch alone: negatives stay within it
    rows = expand(read_pairs(plain["data_path"]))
    loss.known_positives = KnownPositives(rows).mask
    for _, labels in batches[:3]:
        columns = [[rows[i].anchor for i in labels], [rows[i].positive for i in labels]]
        (loss([model.preprocess(column) for column in columns], labels) / 3).backward()
    wanted = torch.cat([w.grad.flatten() for w in weights])
    torch.testing.assert_close(watched.gradients[0], wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ],
)  # fmt: skip
def test_every_scheduler_moves_the_rate_as_it_is_defined(plain, monkeypatch, name):
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    total = train(plain, lr_scheduler_type=name, num_epochs=2, warmup_ratio=0.25).steps
    monkeypatch.undo()
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2e-3)
    extras = scheduler_extras(name, total, 2, 2e-3, rises=True)
    scheduler = get_scheduler(name, optimizer, math.ceil(0.25 * total), total, extras)
    wanted = []
    for _ in range(total):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(wanted)
    by_hand = {  # of the share of the steps that is over, warm-up left out
        "linear": lambda t: 1 - t,
        "polynomial": lambda t: (1 - t) ** 2,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "cosine_with_restarts": lambda t: (1 + math.cos(math.pi * (2 * t % 1))) / 2,
    }
    if name in by_hand:  # a quarter of 12 steps up from 0, then as it says
        shares = [i / 3 if i < 3 else by_hand[name]((i - 3) / 9) for i in range(12)]
        assert rates == pytest.approx([2e-3 * share for share in shares])


def rates_of(name: str, epochs: float, steps: int = 40) -> list[float]:
    """A scheduler's rates, as shares of the peak, for a metric that falls after each step."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, 10, steps, scheduler_extras(name, steps, epochs, 1e-3, rises=True))
    rates = []
    for number in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-3)
        optimizer.step()
        scheduler.step(*([-float(number)] if name in FOLLOW_THE_METRIC else []))
    return rates


def test_no_two_schedulers_are_the_same():
    rates = {name: rates_of(name, epochs=2) for name in get_args(Scheduler)}
    alike = [(a, b) for a, b in combinations(rates, 2) if rates[a] == pytest.approx(rates[b], rel=1e-3)]
    assert len(rates) == 12 and not alike


@pytest.mark.parametrize(
    ("epochs", "restarts"), [(0.5, [25]), (1, [25]), (2, [25]), (3, [20, 30]), (5, [16, 22, 28, 34])]
)
def test_the_rate_rises_again_once_an_epoch(epochs, restarts):
    """30 steps after 10 of warm-up, in as many cycles as epochs, but at least two."""
    rates = rates_of("cosine_with_restarts", epochs)
    risen = [i for i in range(11, 40) if rates[i] > rates[i - 1]]
    assert risen == restarts
    assert [rates[i] for i in risen] == pytest.approx([1.0] * len(restarts))


def test_a_polynomial_takes_any_rate(plain):
    assert log_of(train(plain, lr_scheduler_type="polynomial", learning_rate=1e-8))[0]["learning_rate"] == 1e-8


@pytest.mark.parametrize(
    ("name", "falls"), [("reduce_lr_on_plateau", [1, 1, 0.1, 0.1, 0.1, 0.1]), ("greedy", [1, 1, 0.95, 0.95, 0.95, 1])]
)
def test_a_scheduler_that_follows_the_metric_lowers_the_rate_when_it_stalls(plain, monkeypatch, name, falls):
    rises, stalls = [0.1, 0.2, 0.3], [0.25] * 3
    scores = iter([0.0, *rises, *stalls, *[0.3 + i / 100 for i in range(1, 99)]])  # the first is the base model's

    def measured(*args):
        return {"all": {"queries": 1, **dict.fromkeys(("recall@1", "recall@10", "mrr@10", "ndcg@10"), next(scores))}}

    monkeypatch.setattr(finetune, "_measure", measured)
    result = train(plain, eval_ratio=0.25, eval_steps=1, num_epochs=3, lr_scheduler_type=name)
    rates = [entry["learning_rate"] for entry in log_of(result) if "learning_rate" in entry]
    # evaluations 1 to 3 rise, 4 to 6 do not: the third in a row changes the rate of the next step; 7 to 9 rise again
    assert rates[:4] == pytest.approx([2e-3] * 4)
    assert rates[4:10] == pytest.approx([2e-3 * share for share in falls])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_loss_stalls_when_it_no_longer_falls(name):
    for losses, lower in (([1.0, 0.9, 0.8, 0.7, 0.6], False), ([1.0, 1.1, 1.2, 1.3, 1.4], True)):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2e-4)
        scheduler = get_scheduler(name, optimizer, 0, 5, scheduler_extras(name, 5, 1, 2e-4, rises=False))
        for loss in losses:
            scheduler.step(loss)
        assert (optimizer.param_groups[0]["lr"] < 2e-4) is lower
        assert optimizer.param_groups[0]["lr"] <= 2e-4


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_the_metric_needs_one(plain, tmp_path, name):
    with pytest.raises(ConfigError, match=f"lr_scheduler_type: {name} needs held-out data"):
        FinetuneConfig.resolve({"lr_scheduler_type": name, "eval_ratio": 0.0})
    path = tmp_path / "one_anchor.jsonl"
    path.write_text("".join(json.dumps({"anchor": "a", "positive": f"pan {i}"}) + "\n" for i in range(9)))
    with pytest.raises(ConfigError, match="no rows were held out"):
        train(plain, data_path=str(path), lr_scheduler_type=name, eval_ratio=0.5)


def test_dimensions_that_the_vectors_do_not_have_are_refused(plain):
    with pytest.raises(ConfigError, match=r"matryoshka_dims: 64 wanted, .* have 32 dimensions"):
        train(plain, matryoshka_dims=[16, 64])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy", "constant"])
def test_a_scheduler_without_a_warm_up_says_so(plain, caplog, name):
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        train(plain, lr_scheduler_type=name, warmup_ratio=0.2, eval_ratio=0.25)
    assert any("warmup_ratio" in line and name in line for line in caplog.messages)


def test_no_warm_up_starts_at_the_peak(plain):
    assert log_of(train(plain))[0]["learning_rate"] == 2e-3


# --- the loss -----------------------------------------------------------------------------------------------------


def test_l1_is_logged_apart(plain, watched, tmp_path):
    result = train(plain, l1_regularization=1e-3)
    first = log_of(result)[0]
    assert first["l1"] == pytest.approx(1e-3 * float(watched.weights[0].abs().sum()), rel=1e-4)
    assert first["loss"] == pytest.approx(first["contrastive"] + first["l1"], rel=1e-4)
    off = log_of(train(plain, output_dir=str(tmp_path / "off")))[0]
    assert off["loss"] == pytest.approx(first["contrastive"], rel=1e-5)
    assert "l1" not in off


def test_a_cached_batch_is_the_whole_batch(plain, batches, tmp_path):
    whole = adapter(train(plain, train_batch_size=12))
    rows = [len(labels) for _, labels in batches]
    assert set(rows) == {12}
    embedded: list[int] = []
    inner = load_model(plain["model_name"], device="cpu").__class__
    forward = inner.forward

    def spy(self, features, **kwargs):
        if self.training:
            embedded.append(len(features["input_ids"]))
        return forward(self, features, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "forward", spy)
        cached = train(plain, train_batch_size=3, contrastive_batch_size=12, output_dir=str(tmp_path / "cached"))
    assert max(embedded) == 3  # rows embedded at a time
    assert [len(labels) for _, labels in batches] == rows  # rows compared at a time
    for name, weight in adapter(cached).items():
        torch.testing.assert_close(weight, whole[name], atol=2e-4, rtol=1e-3)


# --- what is fed --------------------------------------------------------------------------------------------------


def texts_of(model, ids: torch.Tensor) -> list[str]:
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.fixture
def with_negatives(plain, tmp_path) -> dict:
    path = tmp_path / "triplets.jsonl"
    rows = [{"anchor": f"warm {i}", "positive": f"pan {i}", "negative": [f"kite {i}"] * (i % 2)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return plain | {"data_path": str(path)}


@pytest.mark.parametrize("knobs", [{}, {"packed_rows": False}, {"contrastive_batch_size": 8, "train_batch_size": 2}])
def test_mixed_precision_reaches_every_forward_and_not_the_loss(settings, monkeypatch, knobs):  # noqa: F811
    """In the preflight, in steps, where GradCache embeds again; in bfloat16, for a CPU has no float16."""
    arguments, before = training.training_arguments, training.preflight
    layers: dict[str, set[torch.dtype]] = {"preflight": set(), "steps": set()}
    logits: set[torch.dtype] = set()
    now = ["preflight"]
    forward, entropy = BertIntermediate.forward, ContrastiveLoss._cross_entropy

    def fly(trainer):
        flown = before(trainer)
        now[0] = "steps"
        return flown

    def spy(self, states):
        out = forward(self, states)
        if self.training:
            layers[now[0]].add(out.dtype)
        return out

    def spy_loss(self, queries, candidates, own, out):
        logits.add((queries @ candidates.T).dtype)
        return entropy(self, queries, candidates, own, out)

    monkeypatch.setattr(training, "training_arguments", lambda folder, **more: arguments(folder, **more, bf16=True))
    monkeypatch.setattr(training, "preflight", fly)
    monkeypatch.setattr(BertIntermediate, "forward", spy)
    monkeypatch.setattr(ContrastiveLoss, "_cross_entropy", spy_loss)
    train(settings, **knobs)
    assert layers == {"preflight": {torch.bfloat16}, "steps": {torch.bfloat16}}
    assert logits == {torch.float32}


def test_negatives_drawn_to_fill_a_row_never_answer_its_anchor(caplog):
    rows = [TrainingRow("wide", "pan 0", ("kite 1", "kite 2", "kite 3"))]
    rows += [TrainingRow(f"a {i % 4}", f"pan {i}") for i in range(8)]  # two documents an anchor
    rows += [
        TrainingRow("PAN  7", "pan 6"),
        TrainingRow("all", "pan 0"),
        *(TrainingRow("all", f"pan {i}") for i in range(8)),
    ]
    documents = [row.positive for row in rows]
    answers = {f"a {i}": {f"pan {i}", f"pan {i + 4}"} for i in range(4)} | {"PAN  7": {"pan 6", "pan 7"}}
    for seed in range(50):
        filled = with_equal_negatives(rows, documents, seed)
        assert filled[0] == rows[0] and {len(row.negatives) for row in filled} == {3}
        for row in filled[1:]:
            assert not set(row.negatives) & answers.get(row.anchor, set())
            assert set(row.negatives) <= set(documents)
    assert len({with_equal_negatives(rows, documents, seed)[1].negatives for seed in range(9)}) > 1
    assert filled == with_equal_negatives(rows, documents, seed)
    assert "54 of 57 negatives are drawn at random" in caplog.text and "which has 3" in caplog.text
    caplog.clear()
    assert with_equal_negatives(rows[1:], documents, 0) == rows[1:]
    assert not caplog.messages


def test_prompts_stand_before_the_texts_of_their_column(with_negatives, batches, tmp_path):
    train(with_negatives, prompt={"anchor": "query: ", "positive": "passage: ", "negative": "not: "})
    model = load_model(with_negatives["model_name"], device="cpu")
    for columns, labels in batches:
        anchors, positives, negatives = (texts_of(model, ids) for ids in columns)
        assert anchors == [f"query: warm {i}" for i in labels]
        assert positives == [f"passage: pan {i}" for i in labels]
        assert all(text.startswith(("not: kite ", "not: pan ")) for text in negatives)
    train(with_negatives, prompt={"anchor": "query: "}, output_dir=str(tmp_path / "one"))
    anchors, positives, _ = (texts_of(model, ids) for ids in batches[0][0])
    assert anchors[0].startswith("query: ") and positives[0].startswith("pan ")


def test_no_prompt_is_an_empty_prompt(plain, tmp_path):
    assert same(adapter(train(plain)), adapter(train(plain, prompt="", output_dir=str(tmp_path / "empty"))))


def test_texts_are_cut_at_the_length(plain, batches, tmp_path):
    train(plain, max_seq_length=9)
    short = [columns for columns, _ in batches]
    assert max(ids.shape[1] for columns in short for ids in columns) == 9
    train(plain, max_seq_length=32, output_dir=str(tmp_path / "long"))
    for cut, (whole, _) in zip(short, batches, strict=True):
        assert torch.equal(cut[1][:, :8], whole[1][:, :8])  # what was kept is the beginning; the ninth ends the text


def test_noise_reaches_training_alone_and_is_drawn_anew_each_epoch(plain, batches, monkeypatch):
    held_out: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *a: held_out.extend(texts) or encode(self, texts, *a))
    evaluated: list[list[str]] = []
    forward = ContrastiveLoss.forward
    model = load_model(plain["model_name"], device="cpu")

    def spy(self, features, labels):
        columns = list(features)
        if not self.model.training:
            evaluated.extend(texts_of(model, column["input_ids"]) for column in columns)
        return forward(self, columns, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", spy)
    train(
        plain, eval_ratio=0.25, num_epochs=2, noise_enabled=True, noise_type="char_delete", noise_prob=0.7,
        noise_strength=0.3, noise_apply_to_fields=["anchor"], seed=5, max_seq_length=64,
    )  # fmt: skip
    given = expand(read_pairs(plain["data_path"]))
    clean = {text for row in given for text in (row.anchor, row.positive)}
    noise = TextNoise("char_delete", 0.7, 0.3, 5)
    by_anchor = {row.anchor for row in given}
    touched = []
    steps = len(batches) // 2
    for number, (columns, labels) in enumerate(batches):
        anchors, positives = (texts_of(model, ids) for ids in columns)
        assert set(positives) <= clean
        for text, label in zip(anchors, labels.tolist(), strict=True):
            epoch = number // steps
            assert text.strip() in {noise(anchor, epoch, label, "anchor").strip() for anchor in by_anchor}
            touched.append(text not in by_anchor)
    assert 0.5 < sum(touched) / len(touched) < 0.9
    first, second = (dict(zip(torch.cat([labels for _, labels in part]).tolist(),
                              [t for columns, _ in part for t in texts_of(model, columns[0])], strict=True))
                     for part in (batches[:steps], batches[steps:]))  # fmt: skip
    assert first.keys() == second.keys() and first != second
    assert held_out and evaluated
    assert set(held_out) <= clean
    assert {text for texts in evaluated for text in texts} <= clean


# --- the adapter --------------------------------------------------------------------------------------------------

LINEAR_LAYERS = {"bert": 2 * 6, "xlm-r": 2 * 6, "modernbert": 2 * 4, "qwen2": 2 * 7}


def adapted_layers(model) -> dict[str, torch.nn.Module]:
    return {name: layer for name, layer in model.transformers_model.named_modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize("kind", LINEAR_LAYERS)
def test_every_linear_layer_gets_an_adapter_of_the_rank(tiny_models, kind):
    model = load_model(str(tiny_models(kind)), device="cpu")
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.transformers_model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.startswith("pooler")
    }
    assert len(linear) == LINEAR_LAYERS[kind]
    add_lora(model, r=3, alpha=6, dropout=0.25)
    layers = adapted_layers(model)
    assert set(layers) == set(linear)
    assert trainable_counts(model)[0] == sum(3 * (into + out) for into, out in linear.values())
    assert {layer.lora_dropout["default"].p for layer in layers.values()} == {0.25}


def one_layer(tiny_bert, **options):
    """An adapted layer with random weights, and what it is made of: W, bias, A, B."""
    torch.manual_seed(1)
    model = load_model(str(tiny_bert), device="cpu").eval()
    add_lora(model, r=4, alpha=8, **{"dropout": 0.0, **options})
    layer = next(iter(adapted_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    base = layer.get_base_layer()
    weights = (base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return layer, *(weight.detach() for weight in weights)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_adapter_is_scaled_by_alpha_over_rank_or_its_root(tiny_bert, rslora, scale):
    layer, w, bias, a, b = one_layer(tiny_bert, rslora=rslora)
    x = torch.randn(5, w.shape[1])
    torch.testing.assert_close(layer(x), x @ w.T + bias + scale * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)


def test_dora_keeps_the_length_of_every_row_of_the_weight(tiny_bert):
    layer, w, bias, a, b = one_layer(tiny_bert, dora=True)
    x = torch.randn(5, w.shape[1])
    moved = w + 2 * b @ a
    scaled = moved * (w.norm(dim=1) / moved.norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ scaled.T + bias, atol=1e-4, rtol=1e-4)


def test_dropout_is_on_the_adapter_s_input_in_training(tiny_bert):
    layer, w, bias, a, b = one_layer(tiny_bert, dropout=0.5)
    x = torch.randn(1, w.shape[1])
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, x @ w.T + bias + 2 * kept @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ w.T + bias + 2 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)


# --- memory -------------------------------------------------------------------------------------------------------


def full_above(rows: int, monkeypatch, in_training: bool = True) -> None:
    """Memory holds so many rows; a step that does not fit leaves half a gradient behind, as a real one does."""
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
def test_out_of_memory_leaves_batches_negatives_and_weights_as_they_were(plain, watched, batches, monkeypatch, where):
    knobs = {"gradient_accumulation_steps": 2, "noise_enabled": True, "noise_prob": 0.5}
    whole = adapter(train(plain, **knobs))
    labels, gradients = [labels.tolist() for _, labels in batches], watched.gradients
    if where == "step":
        monkeypatch.setattr(training, "preflight", lambda trainer: training.Preflight())
    full_above(2, monkeypatch)
    halved = adapter(train(plain, **knobs, output_dir=plain["output_dir"] + "-halved"))
    assert [labels.tolist() for _, labels in batches] == labels
    torch.testing.assert_close(watched.gradients[0], gradients[0], atol=1e-5, rtol=1e-3)
    for name, weight in halved.items():
        torch.testing.assert_close(weight, whole[name], atol=2e-4, rtol=1e-3)


def test_a_step_made_twice_is_logged_once(plain, monkeypatch):
    """Memory runs out after backward, twice, in the second batch of a step."""
    knobs = {"gradient_accumulation_steps": 2, "l1_regularization": 1e-3, "balanced_batches": False}
    whole = log_of(train(plain, **knobs))
    monkeypatch.setattr(training, "preflight", lambda trainer: training.Preflight())
    make, made = SentenceTransformerTrainer.training_step, []

    def tight(self, model, inputs, num=None):
        loss = make(self, model, inputs, num)
        made.append(self.loss.mini_batch_size)
        if len(made) in (2, 3):
            raise torch.OutOfMemoryError("injected")
        return loss

    monkeypatch.setattr(SentenceTransformerTrainer, "training_step", tight)
    found = log_of(train(plain, **knobs, output_dir=plain["output_dir"] + "-tight"))
    assert made[:4] == [None, None, 4, 2]
    for name in ("loss", "contrastive", "l1", "masked_share"):
        wanted = [entry[name] for entry in whole if "loss" in entry]
        assert [entry[name] for entry in found if "loss" in entry] == pytest.approx(wanted, rel=1e-3) and any(wanted)


def test_the_evaluation_loss_is_halved_too(plain, monkeypatch, tmp_path):
    knobs = {"eval_ratio": 0.25, "train_batch_size": 12}
    whole = log_of(train(plain, **knobs, learning_rate=1e-9))
    full_above(8, monkeypatch, in_training=False)
    halved = log_of(train(plain, **knobs, learning_rate=1e-9, output_dir=str(tmp_path / "halved")))
    losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in (whole, halved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_one_of_several_processes_out_of_memory_ends_the_run_with_advice(plain, monkeypatch):
    trainer = SimpleNamespace(loss=ContrastiveLoss(torch.nn.Linear(1, 1)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ModelError, match=r"one of 4 processes .*contrastive_batch_size to 32 and train_batch_size to 16"
    ):
        training.EbrTrainer._halve(trainer, 32, torch.OutOfMemoryError("injected"))


@pytest.mark.parametrize("eval_ratio, bars", [(0.25, ["table"]), (0.0, ["ours"])])
def test_a_notebook_has_one_bar(settings, monkeypatch, eval_ratio, bars):  # noqa: F811
    """The library's own where that has a table of evaluations, else ours."""
    from transformers.utils import notebook

    seen = []
    write = notebook.NotebookTrainingTracker.write_line
    begin = training.TrainingBar.on_train_begin
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    monkeypatch.setattr(
        notebook.NotebookTrainingTracker, "write_line", lambda *given: seen.append("table") or write(*given)
    )
    monkeypatch.setattr(
        training.TrainingBar, "on_train_begin", lambda *given, **more: seen.append("ours") or begin(*given, **more)
    )
    train(settings, eval_ratio=eval_ratio, num_epochs=1)
    assert seen == bars


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
        train(plain, memory_limit_gb=resident() / 1024 + 0.3)
    assert [line for line in caplog.messages if "micro-batch 4 → 2" in line]
    assert not [line for line in caplog.messages if "micro-batch 2 → 1" in line]
    caplog.clear()
    with caplog.at_level(logging.INFO, "ebr_lib"):
        train(plain)
    (said,) = [line for line in caplog.messages if "preflight" in line]
    assert float(said.split("peak memory ")[1].split()[0]) > before[-1] + 380


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system counts a process's peak for good")
def test_the_peak_is_counted_anew():
    held = np.ones(300 * 2**20, dtype=np.uint8)
    with_it = memory.peak_memory_mb()
    del held
    assert memory.peak_memory_mb() == pytest.approx(with_it, abs=5)
    memory.count_peak_anew()
    assert memory.peak_memory_mb() < with_it - 250


def test_the_preflight_leaves_no_trace(settings, monkeypatch, tmp_path):  # noqa: F811
    flown = adapter(train(settings, noise_enabled=True, noise_prob=0.5))  # dropout and all
    monkeypatch.setattr(training, "preflight", lambda trainer: training.Preflight())
    assert same(flown, adapter(train(settings, noise_enabled=True, noise_prob=0.5, output_dir=str(tmp_path / "n"))))


def test_the_preflight_flies_with_checkpointing_as_the_run_does(settings, monkeypatch):  # noqa: F811
    layers = []
    fly = training.preflight

    def flown(trainer):
        found = fly(trainer)
        inner = trainer.model.transformers_model
        layers.append([layer.gradient_checkpointing for layer in inner.encoder.layer])
        return found

    monkeypatch.setattr(training, "preflight", flown)
    train(settings, gradient_checkpointing=True)
    train(settings)
    assert layers == [[True, False], [False, False]]


def test_the_log_says_what_the_batches_took(settings, monkeypatch, caplog):  # noqa: F811
    for seconds, whole in ((30.0, "3.0 min"), (9.5, "57.0 s")):  # 48 rows, 8 a batch
        flown = training.Preflight(batch=seconds, longest=2 * seconds, peak_mb=1234.4)
        monkeypatch.setattr(training, "preflight", lambda trainer, flown=flown: flown)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ebr_lib"):
            train(settings, eval_ratio=0.0)
        (line,) = [line for line in caplog.messages if "preflight" in line]
        assert f"longest batch {2 * seconds:.2f} s, peak memory 1234 MB; average batch {seconds:.2f} s" in line
        assert line.endswith(f"about {whole}")


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"eval_steps": 1},
        {"eval_steps": 2, "num_epochs": 2, "save_steps": 3},
        {"eval_steps": 3, "num_epochs": 1.5, "gradient_accumulation_steps": 2},
        {"num_epochs": 2.5, "gradient_accumulation_steps": 3},
    ],
)
def test_the_estimate_counts_what_a_run_does(settings, monkeypatch, caplog, knobs):  # noqa: F811
    """A training batch takes 1 s, one of evaluation 0.1 s, measuring 2 s, a checkpoint 100 s."""
    now, measure, batches, saved = [0.0], finetune._measure, [], []
    make, save = training.EbrTrainer.training_step, training.EbrTrainer._save

    def measured(*given):
        now[0] += 2.0
        return measure(*given)

    monkeypatch.setattr(finetune, "_measure", measured)
    monkeypatch.setattr(finetune, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(training, "preflight", lambda trainer: training.Preflight(1.0, 0.1, 100.0))
    monkeypatch.setattr(training.EbrTrainer, "training_step", lambda *given: batches.append(1) or make(*given))
    monkeypatch.setattr(training.EbrTrainer, "_save", lambda *given: saved.append(1) or save(*given))
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        train(settings, **knobs)
        found = log_of(SimpleNamespace(model_path=str(next(Path(settings["output_dir"]).glob("*-peft-lora")))))
    evaluations = sum("eval_loss" in entry for entry in found)
    said = next(line for line in caplog.messages if "preflight" in line).split("takes about ")[1]
    seconds = len(batches) + evaluations * (2 + 0.2) + 100 * len(saved)  # 12 held-out rows, 8 a batch
    assert said == (f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min")


@pytest.mark.parametrize(("packed", "mini"), [(False, None), (True, None), (False, 2)])
@pytest.mark.parametrize("longer", [0.0, 0.01, 0.2], ids="{:.0%}".format)
def test_the_average_batch_is_not_the_longest(tiny_bert, longer, packed, mini):
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

    def seconds_of(trainer, rows) -> float:
        step = 1 if packed else mini or len(rows)
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        return 0.5 + sum(len(part) * (words[part].max() + 4) for part in parts) / 100

    longest = training.longest_rows(dataset, model.tokenizer, 8)
    costliest = training._work(training._tokens(trainer, dataset, longest), range(8), 1 if packed else mini or 8)
    found = training._average_seconds(trainer, seconds_of, dataset, (costliest, seconds_of(trainer, longest)))
    truth = np.mean([seconds_of(trainer, list(range(start, start + 8))) for start in range(0, 3000, 8)])
    assert truth / 1.3 < found < truth * 1.3


def test_without_held_out_rows_the_table_says_so(settings):  # noqa: F811
    result = train(settings, eval_ratio=0.0)
    assert "no rows were held out" in str(result)
    assert result.tables["before_after"].empty


def test_the_preflight_flies_the_rows_with_most_tokens(tiny_bert):
    tokenizer = load_model(str(tiny_bert), device="cpu").tokenizer
    words = [5, 3, 40, 7, 2, 9, 30, 1]
    chinese = "钢笔风扇鞋子围巾" * 6  # 48 letters: fewer than those of row 2, more tokens
    positives = [*("fox " * count for count in words), chinese, "b"]
    anchors = ["a"] * 9 + ["the lazy dog " * 20]
    dataset = Dataset.from_dict({"anchor": anchors, "positive": positives, "label": list(range(10))})
    tokens = [
        sum(len(ids) for ids in tokenizer(list(pair))["input_ids"]) for pair in zip(anchors, positives, strict=True)
    ]
    assert training.longest_rows(dataset, tokenizer, 3)[:2] == [9, max(range(9), key=tokens.__getitem__)]
    assert len(positives[2]) > len(chinese) and tokens[8] > tokens[2]
    assert sorted(training.longest_rows(dataset, tokenizer, 20)) == list(range(10))


def test_before_is_the_base_model_and_after_is_what_was_saved(settings, tiny_bert, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: False)  # which would change places of near ties
    result = train(settings, num_epochs=4, learning_rate=2e-2, prompt={"anchor": "query: "})
    folder = Path(result.model_path)
    read = [
        [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("heldout", "corpus")
    ]
    queries, documents = [row["anchor"] for row in read[0]], [row["text"] for row in read[1]]
    base = load_model(str(tiny_bert), device="cpu", max_seq_length=32)
    for model, found in ((base, result.before), (load_model(str(folder), device="cpu"), result.after)):
        cosines = model.encode(queries, prompt="query: ") @ model.encode(documents).T
        ranks = [
            1 + sum(other > line[documents.index(row["positive"][0])] for other in line)
            for line, row in zip(cosines, read[0], strict=True)
        ]
        assert all(len(row["positive"]) == 1 for row in read[0])
        wanted = {
            "queries": len(queries),
            "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
            "recall@10": sum(rank <= 10 for rank in ranks) / len(ranks),
            "mrr@10": sum(1 / rank for rank in ranks if rank <= 10) / len(ranks),
            "ndcg@10": sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / len(ranks),
        }
        assert dict(found["all"]) == pytest.approx(wanted)
    assert result.before != result.after


@pytest.mark.parametrize(
    "how",
    [(True, True, "torch"), (True, False, "torch"), (False, False, "torch"), (False, False, "openvino")],
)
def test_one_number_in_log_table_and_evaluation(settings, monkeypatch, tmp_path, how):  # noqa: F811
    """Measured once, and computed as the saved model computes: training in bfloat16 rounds the base and its layers."""
    has_bf16, bf16, backend = how
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: has_bf16)
    calls = []
    measure = HeldoutTask.measure_model

    def measured(task, model, **more):
        calls.append((task.documents, Encoder(model, backend=backend).encode(task.documents)))
        return measure(task, model, **more)

    monkeypatch.setattr(HeldoutTask, "measure_model", measured)
    result = train(settings, num_epochs=2, learning_rate=2e-2, bf16=bf16, backend=backend)
    assert len(calls) == 3  # before, and after each epoch
    log = [json.loads(line) for line in (Path(result.model_path) / "training_log.jsonl").read_text().splitlines()]
    best = max((entry for entry in log if "eval_ndcg@10" in entry), key=lambda entry: entry["eval_ndcg@10"])
    found = evaluate_retrieval({
        "models": [result.model_path, settings["model_name"]], "data_path": result.model_path, "bm25": False,
        "output_dir": str(tmp_path / "evaluation"), "resamples": 100, "max_seq_length": 32,
        "backend": backend,
    }).metrics  # fmt: skip
    for name, measurements in ((settings["model_name"], calls[:1]), (result.model_path, calls[1:])):
        served = Encoder(load_model(name, device="cpu", merged=True, max_seq_length=32), backend=backend)
        assert any(np.allclose(served.encode(documents), vectors, atol=1e-6) for documents, vectors in measurements)
    for name in ("recall@1", "recall@10", "mrr@10", "ndcg@10"):
        after, before = found.values()
        assert result.after["all"][name] == best[f"eval_{name}"] == after[name]
        assert result.before["all"][name] == before[name]


def test_merging_says_how_much_it_changed_and_the_card_what_it_was_trained_on(settings, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, "ebr_lib"):
        result = train(settings, merge_adapter=True)
    (said,) = [line for line in caplog.messages if "largest difference merged to adapter" in line]
    assert float(said.split()[-1]) < 1e-4
    card = (Path(result.model_path) / "README.md").read_text(encoding="utf-8")
    for piece in (settings["data_path"], f"{result.train_rows} rows; {result.heldout_rows} held out", "ndcg@10",
                  f"{result.trainable_parameters:,}", settings["model_name"]):  # fmt: skip
        assert piece in card
    usage: dict = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], usage)
    assert usage["queries"].shape == (1, 32)
