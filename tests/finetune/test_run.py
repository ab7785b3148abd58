"""Whole runs: what goes in, what is saved, what happens when something goes wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ebr_lib import evaluate_retrieval, train_sentence_transformer
from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.rows import Rows
from ebr_lib.finetune.run import _what_decides
from ebr_lib.finetune.trainer import EbrTrainer
from ebr_lib.model import precision as model_precision
from ebr_lib.model.adapters import ADAPTER_FILE
from ebr_lib.model.contract import CONTRACT_FILE, PROBES
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.provenance import identify
from tests.children import ended, started, train_and_be_killed, train_in_a_terminal
from tests.finetune.conftest import adapter, log_of, same, step, train, write_rows

TEXTS = ["red kite", "书籍 this lamp", "longer than the 32 tokens of training " * 8]


# --- what is saved ------------------------------------------------------------------------------------------------


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
    assert {"loss", "learning_rate", "masked_share"} <= set().union(*log_of(trained))
    assert trained.steps == 3 * -(-trained.train_rows // 8)


def test_names_that_change_the_comparison_and_models_that_judge_identify_a_run(settings, tmp_path):
    def identity(file: str = "x.jsonl", **knobs):
        rows = Rows([TrainingRow("a", "b", ("c",), file=file)], [], None, "1")
        return _what_decides(FinetuneConfig.resolve(settings | knobs), rows, identify(settings["model_name"]), None)

    assert identity() == identity("y.jsonl") != identity("y_no_in_batch_neg.jsonl")
    place = tmp_path / "judge"
    shutil.copytree(settings["model_name"], place)
    for knobs in (
        {"guide_model": str(place), "false_negative_margin": 0.1},
        {"reranker_name": str(place), "distill_weight": 1},
    ):
        was = identity(**knobs)
        weights = load_file(place / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, place / "model.safetensors", {"format": "pt"})
        assert identity(**knobs) != was


def test_equal_runs_write_equal_adapter_configs(trained):
    """The adapted modules are a set: unsorted, their order would depend on the process."""
    names = json.loads((Path(trained.model_path) / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 3 and names == sorted(names)


def test_training_lowers_the_loss(trained):
    losses = [entry["loss"] for entry in log_of(trained) if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    before = trained.before
    assert before["all"]["queries"] == sum(before[g]["queries"] for g in ("seen", "unseen") if g in before)


def test_the_saved_config_repeats_the_run(trained, tmp_path):
    config = FinetuneConfig.resolve({"output_dir": str(tmp_path)}, [Path(trained.model_path) / "finetune_config.yaml"])
    assert same(adapter(train_sentence_transformer(config)), adapter(trained))


def test_prompts_and_length_travel_with_the_model(trained):
    model = load_model(trained.model_path, device="cpu")
    assert prompt_of(model, "query") == "query: "
    assert prompt_of(model, "document") == "passage: "
    assert prompt_of(model, "query", "other: ") == "other: "
    assert model.max_seq_length == 32


def test_every_way_to_load_gives_the_same_vectors(trained):
    """sentence-transformers itself, the merged model, and the adapter merged at loading."""
    from sentence_transformers import SentenceTransformer

    ours = load_model(trained.model_path, device="cpu").encode(TEXTS)
    folded = load_model(trained.model_path, device="cpu", merged=True)
    assert not any("lora" in name for name, _ in folded.named_parameters())
    assert not (Path(trained.merged_path) / ADAPTER_FILE).exists()
    for model, atol in (
        (SentenceTransformer(trained.model_path, device="cpu"), 1e-6),
        (load_model(trained.merged_path, device="cpu"), 1e-5),
        (folded, 1e-6),
    ):
        np.testing.assert_allclose(model.encode(TEXTS), ours, atol=atol)


def test_the_card_says_what_the_model_was_trained_on_and_its_code_runs(trained, tiny_bert, pairs):
    card = (Path(trained.model_path) / "README.md").read_text(encoding="utf-8")
    for piece in (str(pairs), f"{trained.train_rows} rows; {trained.heldout_rows} held out", "ndcg@10",
                  f"{trained.trainable_parameters:,}", str(tiny_bert)):  # fmt: skip
        assert piece in card
    usage: dict = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], usage)
    assert usage["queries"].shape == (1, 32)


@pytest.mark.parametrize("kind", ["modernbert", "kalm"])
def test_every_shape_trains(settings, tiny_models, kind):
    result = train(settings, model_name=str(tiny_models(kind)), trust_remote_code=kind == "kalm")
    assert all(weight.abs().sum() > 0 for name, weight in adapter(result).items() if "lora_B" in name)
    model = load_model(result.model_path, trust_remote_code=kind == "kalm", device="cpu")
    assert model.encode(["a"]).shape == (1, 32)


def test_a_query_adapter_leaves_documents_to_the_base_model(settings, tiny_bert, tmp_path):
    """As saved, by the code of its card, and trained further."""
    first = train(settings, adapter_side="query", num_epochs=2)
    base = load_model(str(tiny_bert), device="cpu")
    code = (Path(first.model_path) / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    usage: dict = {}
    exec(code, usage)
    assert np.array_equal(usage["documents"], base.encode([PROBES[-2]]))
    more = {"model_name": first.model_path, "output_dir": str(tmp_path / "on"), "adapter_side": "query"}
    for result in (first, train(settings, **more)):
        documents = load_model(result.model_path, device="cpu", side="document").encode(TEXTS)
        queries = load_model(result.model_path, device="cpu").encode(TEXTS)
        assert np.array_equal(documents, base.encode(TEXTS))
        assert np.abs(queries - documents).max() > 1e-4


def test_an_adapter_and_a_merged_model_are_trained_further(settings, trained, tmp_path):
    start = load_model(trained.merged_path, device="cpu").encode(TEXTS)
    for name, base in ((trained.merged_path, trained.merged_path), (trained.model_path, settings["model_name"])):
        again = train(settings, model_name=name, learning_rate=1e-9, output_dir=str(tmp_path / Path(name).name))
        assert Path(again.model_path).name == f"{Path(name).name.removesuffix('-peft-lora')}-peft-lora"
        assert json.loads((Path(again.model_path) / CONTRACT_FILE).read_text())["base_model"] == base
        cosines = (load_model(again.model_path, device="cpu").encode(TEXTS) * start).sum(axis=1)
        assert cosines.min() > 0.9999
    saved = FinetuneConfig.resolve({}, [Path(again.model_path) / "finetune_config.yaml"])
    assert saved.lora_r == 16 and not same(adapter(again), adapter(trained))


def test_the_saved_mined_rows_train_to_the_same_weights(settings, tmp_path, caplog):
    """With the held-out pairs in a file of their own."""
    held_out = [{"anchor": "warm thing", "positive": "a document that only the held-out file has"}]
    apart = settings | {"eval_data_path": write_rows(tmp_path / "held_out.jsonl", held_out)}
    with caplog.at_level(logging.INFO, "ebr_lib"):
        mined = train(apart, mine_hard_negatives=3, mining_margin=0.025)
    assert "难负例 mined hard negatives" in caplog.text
    file = Path(mined.model_path) / "mined_negatives.jsonl"
    rows, given = expand(read_pairs(file)), expand(read_pairs(apart["data_path"]))
    assert [(row.anchor, row.positive) for row in rows] == [(row.anchor, row.positive) for row in given]
    assert 0 < sum(len(row.negatives) == 3 for row in rows) < len(rows)  # some rows got fewer
    assert not any("held-out" in text for row in rows for text in row.negatives)
    again = step(apart, data_path=str(file))
    again.trainer.restore_best()
    assert same(adapter(mined), again.adapter)
    assert not same(again.adapter, step(apart).adapter)


def test_a_run_mines_in_a_catalogue_and_leaves_held_out_texts_alone(settings, tmp_path, caplog):
    with_catalogue = settings | {
        "mining_corpus_path": str(tmp_path / "items.txt"),
        "output_dir": str(tmp_path / "more"),
    }
    pairs = read_pairs(settings["data_path"])
    texts = [*(pair.positives[0] for pair in pairs), *(f"another {pair.anchor}" for pair in pairs)]
    lines = ["id\x01description", *(f"{number}\x01{text}" for number, text in enumerate(texts))]
    (tmp_path / "items.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with caplog.at_level(logging.INFO, "ebr_lib"):
        result = train(with_catalogue, mine_hard_negatives=2, mining_margin=None, positive_rank_max=30)
    folder = Path(result.model_path)
    mined, heldout = expand(read_pairs(folder / "mined_negatives.jsonl")), read_pairs(folder / "heldout.jsonl")
    found = {text for row in mined for text in row.negatives}
    assert any(text.startswith("another") for text in found)
    assert not found & {text for pair in heldout for text in pair.positives}
    dropped = expand(read_pairs(tmp_path / "more/noisy_positives.jsonl"))
    assert 0 < len(dropped) == len(pairs) - len(heldout) - len(mined)
    assert "held-out texts are not mined" in caplog.text
    assert result.after["unseen"]["queries"] == result.after["all"]["queries"]


# --- what is measured ---------------------------------------------------------------------------------------------


def test_before_is_the_base_model_and_after_is_what_was_saved(settings, tiny_bert, monkeypatch):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: False)  # which would change places of near ties
    result = train(settings, num_epochs=4, learning_rate=2e-2, prompt={"anchor": "query: "})
    folder = Path(result.model_path)
    heldout, corpus = (
        [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("heldout", "corpus")
    )
    queries, documents = [row["anchor"] for row in heldout], [row["text"] for row in corpus]
    base = load_model(str(tiny_bert), device="cpu", max_seq_length=32)
    for model, found in ((base, result.before), (load_model(str(folder), device="cpu"), result.after)):
        cosines = model.encode(queries, prompt="query: ") @ model.encode(documents).T
        ranks = [
            1 + sum(other > line[documents.index(row["positive"][0])] for other in line)
            for line, row in zip(cosines, heldout, strict=True)
        ]
        assert all(len(row["positive"]) == 1 for row in heldout)
        wanted = {
            "queries": len(queries),
            "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
            "recall@10": sum(rank <= 10 for rank in ranks) / len(ranks),
            "mrr@10": sum(1 / rank for rank in ranks if rank <= 10) / len(ranks),
            "ndcg@10": sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / len(ranks),
        }
        assert dict(found["all"]) == pytest.approx(wanted)
    assert result.before != result.after


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("how", [(True, True, "torch"), (True, False, "torch"), (False, False, "openvino")])
def test_one_number_in_log_table_and_evaluation(settings, monkeypatch, caplog, tmp_path, how):
    """Measured once, and computed as the saved model computes: training in bfloat16 rounds the base and its layers."""
    has_bf16, bf16, backend = how
    epochs = 1 if backend == "openvino" else 2  # each measurement converts the model
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: has_bf16)
    calls = []
    encode = Encoder.encode

    def spy(self, texts, *more):
        found = encode(self, texts, *more)
        calls.append(dict(zip(texts, found, strict=True)))
        return found

    monkeypatch.setattr(Encoder, "encode", spy)
    with caplog.at_level(logging.INFO, "ebr_lib"):
        result = train(settings, num_epochs=epochs, learning_rate=2e-2, bf16=bf16, backend=backend)
    assert sum("精度 precision" in line for line in caplog.messages) == 1
    assert len(calls) == 2 * (1 + epochs)  # queries and documents, before and after each epoch
    best = max((e for e in log_of(result) if "eval_ndcg@10" in e), key=lambda entry: entry["eval_ndcg@10"])
    found = evaluate_retrieval({
        "models": [result.model_path, settings["model_name"]], "data_path": result.model_path, "bm25": False,
        "output_dir": str(tmp_path / "evaluation"), "resamples": 100, "max_seq_length": 32,
        "backend": backend,
    }).metrics  # fmt: skip
    trained, evaluated = calls[: 2 * (1 + epochs)], calls[2 * (1 + epochs) :]
    assert len(evaluated) == 4
    for found_later in evaluated:
        same_texts = [found_first for found_first in trained if found_first.keys() == found_later.keys()]
        gaps = [max(np.abs(first[text] - vector).max() for text, vector in found_later.items()) for first in same_texts]
        assert min(gaps) < 1e-6
    for name in ("recall@1", "recall@10", "mrr@10", "ndcg@10"):
        after, before = found.values()
        assert result.after["all"][name] == best[f"eval_{name}"] == after[name]
        assert result.before["all"][name] == before[name]


# --- numbers that are not finite ----------------------------------------------------------------------------------


def test_a_run_that_ends_in_nan_saves_nothing_and_loses_nothing(settings, monkeypatch, caplog):
    before = adapter(train(settings))

    class Spoil(training.TrainingBar):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 2:
                torch.nn.init.constant_(next(weight for weight in model.parameters() if weight.requires_grad), np.nan)

    monkeypatch.setattr(training, "TrainingBar", Spoil)
    with (
        caplog.at_level(logging.WARNING, "ebr_lib"),
        pytest.raises(ModelError, match=r"not finite .*learning_rate 0.002.*temperature 0.05"),
    ):
        train(settings, eval_ratio=0.0)
    assert any("the training loss is nan" in line for line in caplog.messages)
    (folder,) = Path(settings["output_dir"]).glob("*-peft-lora")
    assert same({n.removeprefix("base_model.model."): w for n, w in load_file(folder / ADAPTER_FILE).items()}, before)


def test_training_that_fails_leaves_no_bar(settings, monkeypatch):
    class Fail(training.TrainingBar):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("in the middle")

    monkeypatch.setattr(training, "TrainingBar", Fail)
    shown = set(getattr(tqdm, "_instances", ()))
    with pytest.raises(RuntimeError, match="in the middle") as failed:
        train(settings)
    assert set(tqdm._instances) <= shown, failed  # the traceback keeps an open bar alive


@pytest.mark.parametrize("knobs", [{"temperature": 1e-45}, {"learning_rate": 1e30, "train_batch_size": 64}])
def test_numbers_too_large_for_their_type_end_the_run(settings, knobs):
    """The second makes finite weights in its only step, with which no vector is finite."""
    with pytest.raises(ModelError, match="not finite"):
        train(settings, **knobs)
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))


def spoilt(tiny_bert: Path, folder: Path, change) -> str:
    """A copy of the model with changed weights."""
    shutil.copytree(tiny_bert, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_model_of_nan_is_refused_before_training(settings, tiny_bert, tmp_path):
    broken = spoilt(tiny_bert, tmp_path / "broken", lambda weights: [w.fill_(float("nan")) for w in weights.values()])
    with pytest.raises(ModelError, match=r"not finite numbers .* before any training"):
        train(settings, model_name=broken)


@pytest.mark.parametrize("in_preflight", [True, False], ids=["preflight", "step"])
def test_texts_that_have_no_vector_are_named(settings, tiny_bert, tmp_path, in_preflight):
    """One token's embedding is NaN; one row of the data has it."""
    (token,) = AutoTokenizer.from_pretrained(tiny_bert)("~", add_special_tokens=False)["input_ids"][:1]

    def change(weights):
        (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
        weights[name][token] = float("nan")

    broken = spoilt(tiny_bert, tmp_path / "broken", change)
    rows = [{"anchor": f"want {i}", "positive": f"thing {i}"} for i in range(23)]
    rows[11]["positive"] = "~" * (40 if in_preflight else 1)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ModelError, match=f"loss is nan: .* of 1 texts of the batch, such as '{rows[11]['positive']}'"):
        train(settings, model_name=broken, data_path=path, eval_ratio=0.0)
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))


# --- interrupted --------------------------------------------------------------------------------------------------


def test_after_a_kill_the_run_goes_on_to_the_same_adapter(settings, tmp_path):
    long = settings | {"num_epochs": 3, "save_steps": 2, "noise_enabled": True, "noise_prob": 0.5}
    long["mine_hard_negatives"] = 1
    whole = adapter(train(long, output_dir=str(tmp_path / "whole")))
    assert ended(started(train_and_be_killed, long, 9)) == [-signal.SIGKILL]
    resumed = train(long, resume_from_checkpoint="auto")
    assert same(adapter(resumed), whole)
    steps = [entry["step"] for entry in log_of(resumed) if "loss" in entry]
    assert steps == sorted(set(steps))  # no step is logged twice


def test_a_signal_saves_and_says_how_to_go_on(settings, monkeypatch, caplog):
    make = EbrTrainer.training_step

    def signalled(self, model, inputs, num=None):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, model, inputs, num)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "ebr_lib"):
        patch.setattr(EbrTrainer, "training_step", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(settings, num_epochs=3)
    assert "resume_from_checkpoint: auto" in caplog.text
    assert list(Path(settings["output_dir"]).glob("*-checkpoints/checkpoint-4"))
    assert not list(Path(settings["output_dir"]).glob("*-peft-lora"))
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


def test_a_run_does_not_go_on_from_another_base(settings, tiny_bert, tmp_path, monkeypatch):
    base = spoilt(tiny_bert, tmp_path / "base", lambda weights: None)
    make = EbrTrainer.training_step

    def dying(self, *given):
        if self.state.global_step == 3:
            raise RuntimeError("died")
        return make(self, *given)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(EbrTrainer, "training_step", dying)
    with pytest.raises(RuntimeError, match="died"):
        train(settings, model_name=base, save_steps=2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before  # restored
    shutil.rmtree(base)
    spoilt(tiny_bert, Path(base), lambda weights: [weight.mul_(1.5) for weight in weights.values()])
    with pytest.raises(ConfigError, match=r"base_sha256: was '\w+', is '\w+'"):
        train(settings, model_name=base, save_steps=2, resume_from_checkpoint="auto")


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_wrong_input_loses_nothing(settings, trained, tmp_path):
    folder = Path(settings["output_dir"]) / "tiny-bert-peft-lora"
    shutil.copytree(trained.model_path, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
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
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
