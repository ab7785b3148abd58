"""Fine-tuning from the outside: what goes in, what is saved, what happens when something goes wrong."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ebr_lib import train_sentence_transformer
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.finetune import logbook
from ebr_lib.finetune import run as finetune
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.callbacks import KeepBest
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.trainer import EbrTrainer, Preflight
from ebr_lib.model import precision as model_precision
from ebr_lib.model.adapters import ADAPTER_FILE
from ebr_lib.model.contract import CONTRACT_FILE
from ebr_lib.model.loading import load_model, prompt_of
from tests.children import ended, started, train_and_be_killed, train_in_a_terminal

THINGS = ["blanket", "pan", "kettle", "lamp", "tent", "kite", "scarf", "mug"]
THINGS += ["热水器", "书籍", "手机壳", "洗发水", "rope", "chair", "bowl", "clock"]
WANTS = ["warm", "cheap", "small", "red", "strong", "nice"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """48 pairs: three queries for each of 16 things."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"anchor": f"{want} {thing}", "positive": f"this {thing} is what shops sell as {thing} number {i}"}
        for i, thing in enumerate(THINGS)
        for want in (WANTS[i % 6], WANTS[(i + 1) % 6], WANTS[(i + 2) % 6])
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tiny_bert, pairs, tmp_path, monkeypatch) -> dict:
    """A short training, whose curve is not drawn: that took a third of its time, and `trained` has one."""
    monkeypatch.setattr(logbook, "draw_curve", lambda log, picture, metric: None)
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
        "backend": "torch",  # converting a model takes as long as such a training
    }


def train(settings: dict, **more):
    return train_sentence_transformer(settings | more)


def adapter(result) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model_path) / ADAPTER_FILE)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def trained(tiny_bert, pairs, tmp_path_factory):
    """One plain run that several tests look at."""
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
        }
    )


def test_the_folder_is_complete(trained):
    folder = Path(trained.model_path)
    assert folder.name == "tiny-bert-peft-lora"
    wanted = {
        ADAPTER_FILE, CONTRACT_FILE, "adapter_config.json", "modules.json", "tokenizer.json", "README.md",
        "finetune_config.yaml", "training_log.jsonl", "loss_curve.png", "heldout.jsonl", "corpus.jsonl",
    }  # fmt: skip
    assert wanted <= {path.name for path in folder.iterdir()}
    assert not list(folder.parent.glob("*checkpoints*"))
    assert not list(folder.rglob("*.bin"))  # no pickles
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert {"loss", "learning_rate", "masked_share"} <= set().union(*log)
    assert trained.steps == 3 * -(-trained.train_rows // 8)


def test_training_lowers_the_loss(trained):
    log = [json.loads(line) for line in (Path(trained.model_path) / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert trained.before["all"]["queries"] == sum(
        trained.before[g]["queries"] for g in ("seen", "unseen") if g in trained.before
    )


def test_the_saved_config_repeats_the_run(trained, tmp_path):
    config = FinetuneConfig.resolve({"output_dir": str(tmp_path)}, [Path(trained.model_path) / "finetune_config.yaml"])
    again = train_sentence_transformer(config)
    assert same(adapter(again), adapter(trained))


def test_prompts_and_length_travel_with_the_model(trained):
    model = load_model(trained.model_path, device="cpu")
    assert prompt_of(model, "query") == "query: "
    assert prompt_of(model, "document") == "passage: "
    assert prompt_of(model, "query", "other: ") == "other: "
    assert model.max_seq_length == 32


def test_sentence_transformers_loads_the_folder_too(trained):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(trained.model_path, device="cpu").encode(["red kite 书籍"])
    ours = load_model(trained.model_path, device="cpu").encode(["red kite 书籍"])
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_the_merged_model_is_the_adapted_one(trained):
    assert trained.merged_path is not None
    adapted = load_model(trained.model_path, device="cpu").encode(["red kite 书籍"])
    merged = load_model(trained.merged_path, device="cpu").encode(["red kite 书籍"])
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
    assert not (Path(trained.merged_path) / ADAPTER_FILE).exists()


def test_an_adapter_can_be_folded_in_at_loading(trained):
    apart = load_model(trained.model_path, device="cpu")
    folded = load_model(trained.model_path, device="cpu", merged=True)
    assert not any("lora" in name for name, _ in folded.named_parameters())
    texts = ["red kite 书籍", "mug"]
    np.testing.assert_allclose(folded.encode(texts), apart.encode(texts), atol=1e-6)


def test_loading_fails_when_the_vectors_are_not_those_saved(trained, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(trained.model_path, broken)
    weights = load_file(broken / ADAPTER_FILE)
    from safetensors.torch import save_file

    save_file({name: weight + torch.randn_like(weight) for name, weight in weights.items()}, broken / ADAPTER_FILE)
    with pytest.raises(ModelError, match="not the vectors that were saved"):
        load_model(str(broken), device="cpu")


def test_an_adapter_refuses_another_base(trained, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(trained.model_path, other)
    contract = json.loads((other / CONTRACT_FILE).read_text())
    (other / CONTRACT_FILE).write_text(json.dumps(contract | {"base_sha256": "0" * 64}))
    with pytest.raises(ModelError, match="put the original base model there"):
        load_model(str(other), device="cpu")


def test_training_goes_on_from_an_adapter(trained, settings):
    result = train(settings, model_name=trained.model_path, learning_rate=1e-9)
    assert Path(result.model_path).name == "tiny-bert-peft-lora"
    before, after = adapter(trained), adapter(result)
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)


# --- knobs that must bite -----------------------------------------------------------------------------------------


def test_off_is_bit_equal_to_never_heard_of(settings, tmp_path):
    plain = adapter(train(settings))
    off = {
        "l1_regularization": 0.0, "label_smoothing": 0.0, "noise_enabled": True, "noise_prob": 0.0, "use_dora": False,
        "warmup_ratio": 0.0, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    assert same(plain, adapter(train(settings, **off, output_dir=str(tmp_path / "off"))))


@pytest.mark.parametrize(
    "knob",
    [
        {"l1_regularization": 1e-2},
        {"label_smoothing": 0.1},
        {"noise_enabled": True, "noise_prob": 1.0, "noise_strength": 0.5},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"lora_dropout": 0.4},
        {"warmup_ratio": 0.5},
        {"temperature": 0.2},
        {"lr_scheduler_type": "cosine"},
        {"seed": 1},
        {"max_seq_length": 8},
        {"prompt": "query: "},
        {"use_rslora": False},
        {"use_dora": True},
        {"matryoshka_dims": [32, 8]},
        {"gradient_accumulation_steps": 2},
        {"balanced_batches": False},
        {"adapter_side": "query"},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_every_knob_changes_the_weights(settings, plain_adapter, knob):
    other = adapter(train(settings, **knob))
    assert not same(plain_adapter, other)


@pytest.fixture(scope="module")
def plain_adapter(tiny_bert, pairs, tmp_path_factory):
    settings = {
        "model_name": str(tiny_bert), "data_path": str(pairs), "output_dir": str(tmp_path_factory.mktemp("plain")),
        "train_batch_size": 8, "max_seq_length": 32, "lora_r": 4, "lora_alpha": 8, "learning_rate": 2e-3,
        "eval_ratio": 0.25,
    }  # fmt: skip
    return adapter(train_sentence_transformer(settings))


def test_the_mask_bites_where_documents_repeat_in_a_batch(settings, tmp_path):
    masked = adapter(train(settings, balanced_batches=False))
    plain = adapter(train(settings, balanced_batches=False, mask_known_positives=False, output_dir=str(tmp_path / "p")))
    assert not same(masked, plain)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_nothing(settings, tmp_path, packed):
    knobs = {"packed_rows": packed, "lora_dropout": 0.0}
    plain = adapter(train(settings, **knobs))
    found = adapter(train(settings, **knobs, gradient_checkpointing=True, output_dir=str(tmp_path / "c")))
    assert all((plain[name] - found[name]).abs().max() < 1e-5 for name in plain)


def test_workers_change_nothing(settings, tmp_path):
    knobs = {"packed_rows": False, "lora_dropout": 0.0}
    plain = adapter(train(settings, **knobs))
    workers = train(settings, **knobs, dataloader_num_workers=1, output_dir=str(tmp_path / "w"))
    assert same(adapter(workers), plain)


def test_noise_is_the_same_with_and_without_workers(settings, tmp_path):
    noisy = {"noise_enabled": True, "noise_prob": 0.8, "noise_strength": 0.5, "num_epochs": 2}
    one = adapter(train(settings, **noisy))
    other = adapter(train(settings, **noisy, dataloader_num_workers=1, output_dir=str(tmp_path / "w")))
    assert same(one, other)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])  # test_training_knobs has those with a formula
def test_schedulers_that_follow_the_loss_run(settings, name):
    result = train(settings, lr_scheduler_type=name, num_epochs=2, warmup_ratio=0.2)
    log = [json.loads(line) for line in (Path(result.model_path) / "training_log.jsonl").read_text().splitlines()]
    assert max(entry["learning_rate"] for entry in log if "learning_rate" in entry) <= 2e-3 + 1e-9


def test_fp16_without_the_hardware_says_what_it_took(settings, caplog):
    if torch.cuda.is_available():
        pytest.skip("this machine has float16")
    with caplog.at_level(logging.INFO, "ebr_lib"):
        train(settings, fp16=True)
    assert "is the nearest" in caplog.text


def test_the_adapter_is_float32_on_a_bfloat16_base(tiny_bert):
    from ebr_lib.model.adapters import add_lora

    model = load_model(str(tiny_bert), device="cpu", dtype=torch.bfloat16)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
    assert {w.dtype for w in model.parameters() if not w.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["xlm-r", "modernbert", "qwen2", "kalm"])
def test_every_shape_trains(settings, tiny_models, kind):
    result = train(settings, model_name=str(tiny_models(kind)), trust_remote_code=kind == "kalm")
    weights = adapter(result)
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    model = load_model(result.model_path, trust_remote_code=kind == "kalm", device="cpu")
    assert model.encode(["a"]).shape == (1, 32)


# --- query-only ---------------------------------------------------------------------------------------------------


def test_query_only_documents_are_the_base_model_exactly(settings, tiny_bert):
    result = train(settings, adapter_side="query", num_epochs=2)
    texts = ["red kite", "书籍", "longer than the 32 tokens of training " * 8]
    base = load_model(str(tiny_bert), device="cpu").encode(texts)
    documents = load_model(result.model_path, device="cpu", side="document").encode(texts)
    queries = load_model(result.model_path, device="cpu", side="query").encode(texts)
    assert np.array_equal(documents, base)
    assert np.abs(queries - base).max() > 1e-4


# --- best weights, early stopping ---------------------------------------------------------------------------------


def test_keep_best_counts_as_documented():
    keeper = KeepBest("ndcg@10", patience=2, threshold=0.01, folder="unused")
    assert [keeper.offer(v, i) for i, v in enumerate([0.5, 0.505, 0.52, 0.52, 0.51])] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert (keeper.best, keeper.best_step, keeper.waited) == (0.52, 2, 2)
    loss = KeepBest("loss", patience=1, threshold=0.0, folder="unused")
    assert [loss.offer(v, i) for i, v in enumerate([2.0, 1.0, 1.5])] == [True, True, False]


def test_what_is_no_number_is_never_better():
    keeper = KeepBest("loss", patience=0, threshold=0.0, folder="unused")
    values = [0.5, float("nan"), 9.0, 0.4, -float("inf")]
    assert [keeper.offer(v, i) for i, v in enumerate(values)] == [True, False, False, True, False]
    assert (keeper.best, keeper.best_step, keeper.waited) == (0.4, 3, 1)
    first = KeepBest("ndcg@10", patience=0, threshold=0.0, folder="unused")
    assert [first.offer(v, i) for i, v in enumerate([float("nan"), 0.1, float("inf")])] == [False, True, False]
    assert (first.best, first.waited) == (0.1, 1)


def spoil_weights_after(step: int, monkeypatch) -> None:
    """One weight becomes NaN after that step."""

    class Spoil(training.TrainingBar):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == step:
                weight = next(weight for weight in model.parameters() if weight.requires_grad)
                torch.nn.init.constant_(weight, float("nan"))

    monkeypatch.setattr(training, "TrainingBar", Spoil)


def test_a_run_that_ends_in_nan_saves_nothing_and_loses_nothing(settings, monkeypatch, caplog):
    before = adapter(train(settings))
    spoil_weights_after(2, monkeypatch)
    with (
        caplog.at_level(logging.WARNING, "ebr_lib"),
        pytest.raises(ModelError, match=r"not finite .*learning_rate 0.002.*temperature 0.05"),
    ):
        train(settings, eval_ratio=0.0)
    assert any("the training loss is nan" in line for line in caplog.messages)
    (folder,) = Path(settings["output_dir"]).glob("*-peft-lora")
    assert same(load_file(folder / ADAPTER_FILE), before)


@pytest.mark.parametrize("knobs", [{"temperature": 1e-45}, {"learning_rate": 1e30, "train_batch_size": 64}])
def test_numbers_too_large_for_their_type_end_the_run(settings, knobs):
    """The second makes finite weights in its only step, with which no vector is finite."""
    with pytest.raises(ModelError, match="not finite"):
        train(settings, **knobs)
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))


def test_good_weights_before_nan_are_those_that_are_saved(settings, monkeypatch, tmp_path):
    knobs = {"best_metric": "loss", "eval_steps": 2}
    stopped = adapter(train(settings, **knobs, lr_scheduler_type="constant", num_epochs=0.4))  # two steps of five
    spoil_weights_after(3, monkeypatch)
    spoilt = train(settings, **knobs, lr_scheduler_type="constant", output_dir=str(tmp_path / "spoilt"))
    assert same(adapter(spoilt), stopped)
    assert [(step, loss is None) for step, loss in evaluations_of(spoilt)] == [(2, False)]
    assert spoilt.steps == 4  # the first that shows it is the last


def test_a_model_of_nan_is_refused_before_training(settings, tiny_bert, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bert, broken)
    weights = load_file(broken / "model.safetensors")
    weights = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite numbers .* before any training"):
        train(settings, model_name=str(broken))


@pytest.mark.parametrize("flown", [True, False], ids=["preflight", "step"])
def test_texts_that_have_no_vector_are_named(settings, tiny_bert, tmp_path, monkeypatch, flown):
    """One token's embedding is NaN; one row of the data has it."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bert, broken)
    weights = load_file(broken / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    (token,) = AutoTokenizer.from_pretrained(broken)("~", add_special_tokens=False)["input_ids"][:1]
    weights[name][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = [{"anchor": f"want {i}", "positive": f"thing {i}"} for i in range(23)]
    rows[11]["positive"] = "~" * (40 if flown else 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=f"loss is nan: .* of 1 texts of the batch, such as '{rows[11]['positive']}'"):
        train(settings, model_name=str(broken), data_path=str(path), eval_ratio=0.0)
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))


def test_one_loss_that_is_no_number_is_one_entry_of_the_log(settings, monkeypatch, tmp_path):
    step = EbrTrainer.training_step

    def spoilt(self, model, inputs, num=None):
        loss = step(self, model, inputs, num)
        return loss * float("nan") if self.state.global_step == 1 else loss

    whole = losses_of(train(settings))
    monkeypatch.setattr(EbrTrainer, "training_step", spoilt)
    found = losses_of(train(settings, output_dir=str(tmp_path / "spoilt")))
    assert found == [whole[0], None, *whole[2:]] and len(whole) == 5


def losses_of(result) -> list[float | None]:
    text = (Path(result.model_path) / "training_log.jsonl").read_text()
    return [entry["loss"] for entry in map(json.loads, text.splitlines()) if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_best_weights_come_back_bit_for_bit(settings, monkeypatch, bf16):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: True)  # a base in bfloat16 must not round the adapter
    kept: dict[int, dict] = {}
    keep = KeepBest._keep

    def spy(self, model):
        keep(self, model)
        from ebr_lib.model.adapters import adapter_weights

        kept[self.best_step] = adapter_weights(model)

    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    offer = KeepBest.offer
    monkeypatch.setattr(KeepBest, "_keep", spy)
    monkeypatch.setattr(KeepBest, "offer", lambda self, value, step: offer(self, next(scores), step))
    result = train(settings, num_epochs=6, early_stopping_patience=3, bf16=bf16)
    assert list(kept) == [5, 10]
    assert result.steps == 25  # evaluations at 5, 10, and three without a better one
    best = kept[10]
    found = {name.removeprefix("base_model.model."): weight for name, weight in adapter(result).items()}
    assert same(found, best)


# --- memory -------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(settings, monkeypatch, caplog):
    seen: list[int] = []
    forward = ContrastiveLoss.forward

    def tight(self, features, labels):
        rows = self.mini_batch_size or len(labels)
        if self.model.training:
            seen.append(rows)
            if rows > 2:
                raise torch.OutOfMemoryError("injected")
        return forward(self, features, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", tight)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        result = train(settings, lora_dropout=0.0)
    steps = -(-result.train_rows // 8)
    assert result.steps == steps  # as many steps, as large batches
    assert seen[:3] == [8, 4, 2]
    assert set(seen[3:]) == {2}
    assert len(seen) == 3 + training.TIMED_BATCHES + steps  # the preflight found out, no step was made twice
    assert "micro-batch 8 → 4" in caplog.text
    assert "gradient_accumulation_steps" in caplog.text


def test_a_batch_of_one_still_learns(settings, caplog):
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        result = train(settings, train_batch_size=1, gradient_accumulation_steps=8)
    assert "a batch of 1 has no negatives: 8 pairs are compared together" in caplog.text
    assert all(weight.abs().sum() > 0 for name, weight in adapter(result).items() if "lora_B" in name)
    assert result.steps == -(-result.train_rows // 8)


def test_a_row_that_fits_nowhere_is_an_error(settings, monkeypatch):
    def never(self, features, labels):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(ContrastiveLoss, "forward", never)
    with pytest.raises(ModelError, match="one row at a time"):
        train(settings, eval_ratio=0.0)


def test_a_memory_limit_counts_as_out_of_memory(settings, monkeypatch, caplog):
    readings = iter([900.0, 100.0])
    monkeypatch.setattr(training, "peak_memory_mb", lambda: next(readings, 100.0))
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        train(settings, memory_limit_gb=0.5)
    assert "micro-batch 8 → 4" in caplog.text


# --- interrupted --------------------------------------------------------------------------------------------------


def test_after_a_kill_the_run_goes_on_to_the_same_adapter(settings, tmp_path):
    long = settings | {
        "num_epochs": 3,
        "save_steps": 2,
        "noise_enabled": True,
        "noise_prob": 0.5,
        "mine_hard_negatives": 1,
    }
    whole = adapter(train(long, output_dir=str(tmp_path / "whole")))
    assert ended(started(train_and_be_killed, long, 9)) == [-signal.SIGKILL]
    resumed = train(long, resume_from_checkpoint="auto")
    assert same(adapter(resumed), whole)
    log = [json.loads(line) for line in (Path(resumed.model_path) / "training_log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == sorted(set(steps))  # no step is logged twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(settings, monkeypatch, caplog, number):
    step = EbrTrainer.training_step

    def signalled(self, model, inputs, num=None):
        if self.state.global_step == 3:
            os.kill(os.getpid(), number)
        return step(self, model, inputs, num)

    monkeypatch.setattr(EbrTrainer, "training_step", signalled)
    with caplog.at_level(logging.WARNING, "ebr_lib"), pytest.raises(KeyboardInterrupt):
        train(settings, num_epochs=3)
    assert "resume_from_checkpoint: auto" in caplog.text
    assert list(Path(settings["output_dir"]).glob("*-checkpoints/checkpoint-4"))
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"learning_rate: was 0.002, is 0.001"):
        train(settings, num_epochs=3, resume_from_checkpoint="auto", learning_rate=1e-3)
    assert train(settings, num_epochs=3, resume_from_checkpoint="auto").steps == 15


def test_a_signal_to_the_processes_that_prepare_batches_too_is_said_once(settings, tmp_path):
    """Ctrl-C in a terminal goes to all of them."""
    config, shown = settings | {"dataloader_num_workers": 2, "num_epochs": 2}, tmp_path / "shown"
    ended(started(train_in_a_terminal, config, shown))
    assert "resume_from_checkpoint: auto" in shown.read_text()
    assert shown.read_text().count("收到中断信号") == 1
    assert train(config, resume_from_checkpoint="auto").steps == 10


@pytest.mark.parametrize(
    ("step", "knobs"),
    [
        (3, {}),  # within an epoch of five steps
        (5, {}),  # at its end
        (5, {"save_steps": 100}),
        (3, {"eval_steps": 2}),
        (3, {"lr_scheduler_type": "reduce_lr_on_plateau", "early_stopping_patience": 1}),
        (8, {"num_epochs": 1.6, "lr_scheduler_type": "constant"}),  # at the end of the run, within an epoch
    ],
)
def test_after_a_signal_the_run_goes_on_as_if_there_had_been_none(settings, monkeypatch, tmp_path, step, knobs):
    knobs = {"num_epochs": 2, "lora_dropout": 0.3, **knobs}
    whole = train(settings, **knobs, output_dir=str(tmp_path / "whole"))
    make = EbrTrainer.training_step

    def signalled(self, model, inputs, num=None):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, model, inputs, num)

    monkeypatch.setattr(EbrTrainer, "training_step", signalled)
    monkeypatch.setattr("ebr_lib.finetune.trainer.preflight", lambda trainer: Preflight())
    with pytest.raises(KeyboardInterrupt):
        train(settings, **knobs)
    monkeypatch.setattr(EbrTrainer, "training_step", make)
    resumed = train(settings, **knobs, resume_from_checkpoint="auto")
    assert same(adapter(resumed), adapter(whole))
    assert evaluations_of(resumed) == evaluations_of(whole)


@pytest.mark.parametrize("knobs", [{"save_steps": 5}, {"save_steps": 5, "num_epochs": 1.6}])
def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(settings, monkeypatch, tmp_path, knobs):
    """Five steps an epoch, and the run dies in the next one."""
    knobs = {"num_epochs": 2, "lora_dropout": 0.3, **knobs}
    whole = train(settings, **knobs, output_dir=str(tmp_path / "whole"))
    make = EbrTrainer.training_step

    def dies(self, *given):
        if self.state.global_step == 6:
            raise RuntimeError("injected")
        return make(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
        patch.setattr(EbrTrainer, "training_step", dies)
        train(settings, **knobs)
    resumed = train(settings, **knobs, resume_from_checkpoint="auto")
    assert same(adapter(resumed), adapter(whole))
    assert evaluations_of(resumed) == evaluations_of(whole)


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        # the first evaluation is the best, for no other is better by so much; the second ends the run
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0}, 10),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "eval_steps": 2}, 4),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "eval_steps": 2, "save_steps": 3}, 4),
        ({"num_epochs": 1.6, "lr_scheduler_type": "constant", "best_metric": "loss"}, 8),
    ],
)
def test_a_run_that_died_while_it_saved_is_not_trained_on(settings, monkeypatch, tmp_path, knobs, steps):
    knobs = {"num_epochs": 4, **knobs}
    whole = train(settings, **knobs, output_dir=str(tmp_path / "whole"))
    assert whole.steps == steps

    def dies(*given):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save", dies)
        with pytest.raises(OSError, match="no space left"):
            train(settings, **knobs)
    resumed = train(settings, **knobs, resume_from_checkpoint="auto")
    assert resumed.steps == whole.steps
    assert same(adapter(resumed), adapter(whole))
    assert evaluations_of(resumed) == evaluations_of(whole)


def evaluations_of(result) -> list[tuple[int, float]]:
    text = (Path(result.model_path) / "training_log.jsonl").read_text()
    return [(entry["step"], entry["eval_loss"]) for entry in map(json.loads, text.splitlines()) if "eval_loss" in entry]


@pytest.mark.parametrize("cut", ["no state", "half a state"])
def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(settings, monkeypatch, caplog, tmp_path, cut):
    knobs = {"num_epochs": 3, "save_steps": 2}
    whole = adapter(train(settings, **knobs, output_dir=str(tmp_path / "whole")))
    checkpoints = Path(settings["output_dir"]) / "tiny-bert-checkpoints"
    save = EbrTrainer._save_checkpoint

    def killed(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 8:
            state = checkpoints / "checkpoint-8" / "trainer_state.json"
            state.write_text(state.read_text()[:99]) if cut == "half a state" else state.unlink()
            raise RuntimeError("killed")

    monkeypatch.setattr(EbrTrainer, "_save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(settings, **knobs)
    monkeypatch.undo()
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    with caplog.at_level(logging.INFO, "ebr_lib"):
        resumed = train(settings, **knobs, resume_from_checkpoint="auto")
    assert any("going on from" in line and line.endswith("checkpoint-6") for line in caplog.messages)
    assert same(adapter(resumed), whole)


def test_signal_handlers_are_put_back_when_training_fails(settings, monkeypatch):
    def fails(self, model, inputs, num=None):
        raise RuntimeError("injected")

    monkeypatch.setattr("ebr_lib.finetune.trainer.preflight", lambda trainer: Preflight())
    monkeypatch.setattr(EbrTrainer, "training_step", fails)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError, match="injected"):
        train(settings)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_wrong_input_loses_nothing(settings, trained, tmp_path):
    result = train(settings)
    before = {path: path.stat().st_mtime_ns for path in Path(result.model_path).rglob("*")}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positiv": "b"}\n')
    with pytest.raises(DataError, match=r"line 2.*positiv"):
        train(settings, data_path=str(bad))
    with pytest.raises(MissingError, match="there is no such file or folder"):
        train(settings, data_path=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no \*.json"):
        train(settings, data_path=str(tmp_path / "empty"))
    with pytest.raises(ConfigError):
        train(settings, lora_r=0)
    with pytest.raises(MissingError, match="no such folder"):
        train(settings, model_name="./no/model/here")
    assert {path: path.stat().st_mtime_ns for path in Path(result.model_path).rglob("*")} == before
