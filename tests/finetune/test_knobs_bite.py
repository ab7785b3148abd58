"""Each of these knobs changes something that a user can see; the other knobs have such a test beside their subject."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebr_lib import build_faiss_index, evaluate_retrieval, train_sentence_transformer
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.evaluate import run as evaluate
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.finetune import heldout
from ebr_lib.finetune import run as finetune
from ebr_lib.finetune import trainer as training
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.model import precision as model_precision
from tests.finetune.test_finetune import pairs, settings  # noqa: F401 - fixtures
from tests.index.test_index import embedding_file

# --- fine-tuning --------------------------------------------------------------------------------------------------


@pytest.fixture
def log_of(settings, tmp_path):  # noqa: F811
    """A function: train with some knobs, return the entries of the training log."""
    runs = iter(range(99))

    def run(**knobs) -> list[dict]:
        result = train_sentence_transformer(settings | {"output_dir": str(tmp_path / f"run{next(runs)}")} | knobs)
        return [json.loads(line) for line in (Path(result.model_path) / "training_log.jsonl").read_text().splitlines()]

    return run


def values(log: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in log if name in entry]


def test_evaluations_come_every_so_many_steps(log_of):
    log = log_of(eval_steps=2, num_epochs=2)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 6, 8, 10]


def test_the_threshold_decides_what_counts_as_better(log_of):
    knobs = {"num_epochs": 4, "early_stopping_patience": 1, "best_metric": "loss"}
    assert len(values(log_of(**knobs), "eval_loss")) == 4  # it falls every epoch
    assert len(values(log_of(**knobs, early_stopping_threshold=100.0), "eval_loss")) == 2


def test_the_metric_decides_which_weights_stay(settings, caplog):  # noqa: F811
    for metric in ("loss", "recall@1"):
        with caplog.at_level(logging.INFO, "ebr_lib"):
            train_sentence_transformer(settings | {"best_metric": metric})
        assert any("best weights" in line and metric in line for line in caplog.messages)
        assert sum("精度 precision" in line for line in caplog.messages) == 1
        caplog.clear()


def test_evaluation_embeds_no_more_than_its_batch_size_and_compares_the_same(log_of, monkeypatch):
    embedded = []
    parts = ContrastiveLoss._in_parts
    monkeypatch.setattr(ContrastiveLoss, "_in_parts", lambda *given: embedded.append(given[-1]) or parts(*given))
    few, all_at_once = (values(log_of(eval_batch_size=size, learning_rate=1e-9), "eval_loss")[0] for size in (3, None))
    assert set(embedded) == {3} and few == pytest.approx(all_at_once, rel=1e-4)


def test_contrastive_batches_are_embedded_in_parts(log_of, monkeypatch):
    seen = []
    loss = finetune._loss
    monkeypatch.setattr(finetune, "_loss", lambda *given: seen.append(loss(*given)) or seen[-1])
    log = log_of(contrastive_batch_size=16, train_batch_size=4, eval_ratio=0.0)
    assert log[-1]["step"] == 3  # 48 pairs, 16 a step
    assert seen[0].mini_batch_size == 4
    assert values(log, "loss")[0] > values(log_of(train_batch_size=4, eval_ratio=0.0), "loss")[0]  # more negatives


def test_noise_of_every_kind_on_the_columns_told(log_of):
    noisy = {"noise_enabled": True, "noise_prob": 1.0, "noise_strength": 0.5, "lora_dropout": 0.0}
    kinds = ("none", "random_delete", "random_swap", "char_delete")
    losses = [tuple(values(log_of(**noisy, noise_type=kind), "loss")) for kind in kinds]
    losses += [
        tuple(values(log_of(**noisy, noise_apply_to_fields=[column]), "loss")) for column in ("anchor", "positive")
    ]
    assert len(set(losses)) == 6
    assert tuple(values(log_of(lora_dropout=0.0), "loss")) == losses[0]


def test_the_held_out_corpus_has_the_size_told(settings, monkeypatch):  # noqa: F811
    sizes = []
    measure = heldout.HeldoutTask.measure_model

    def noted(self, *given, **more):
        sizes.append(len(self.documents))
        return measure(self, *given, **more)

    monkeypatch.setattr(heldout.HeldoutTask, "measure_model", noted)
    train_sentence_transformer(settings | {"eval_corpus_size": 1})
    own = sizes[-1]  # those of the held-out pairs are always in
    train_sentence_transformer(settings | {"eval_corpus_size": own + 1})
    assert sizes[-1] == own + 1
    train_sentence_transformer(settings | {"eval_corpus_size": 2000})
    assert own + 1 < sizes[-1] == 16


def test_the_label_column_decides_which_rows_are_trained_on(settings, tmp_path):  # noqa: F811
    rows = [{"anchor": f"want {i}", "positive": f"thing {i}", "score": 0.5, "click": i % 2} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = settings | {"data_path": str(path), "eval_data_path": str(path), "on_bad_row": "skip"}
    for column, count in (("none", 6), ("click", 3)):
        data = finetune._read(FinetuneConfig.resolve(given | {"label_column": column}))
        assert (len(data.train), len(data.heldout)) == (count, count)
    with pytest.raises(DataError, match=r"`score` is 0\.5"):
        finetune._read(FinetuneConfig.resolve(given))
    heldout = [{"anchor": "ask", "positive": "thing 1"}]
    (tmp_path / "heldout.jsonl").write_text(json.dumps(heldout[0]))
    config = {"data_path": str(tmp_path), "train_data_path": str(path), "label_column": "none"}
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "thing 1"}) + "\n" + json.dumps({"text": "other"}))
    with pytest.raises(DataError, match=r"`score` is 0\.5"):
        evaluate._read(EvalConfig.resolve(config | {"label_column": None}))
    task, _ = evaluate._read(EvalConfig.resolve(config))
    assert task.queries


def test_an_anchor_is_neither_its_answer_nor_a_competitor(settings, tmp_path, caplog):  # noqa: F811
    """Item to item: of the held-out anchors the first has one more answer, the second none, the third another one."""
    caplog.set_level("INFO", "ebr_lib")
    rows = [("anchor", ["ANCHOR ", "answer"]), ("alone", ["alone"]), ("third", ["answer"])]
    rows = [{"anchor": anchor, "positive": positives} for anchor, positives in rows]
    (tmp_path / "heldout.json").write_text(json.dumps(rows))
    given = {"eval_data_path": str(tmp_path / "heldout.json")}
    tasks = [
        finetune._read(FinetuneConfig.resolve(settings | given | more)).task for more in ({}, {"leave_out_own": "none"})
    ]
    assert tasks[0].documents == tasks[1].documents and tasks[0].documents[:3] == ("ANCHOR ", "answer", "alone")
    assert (tasks[0].queries, tasks[1].queries) == (("anchor", "third"), ("anchor", "alone", "third"))
    assert (tasks[0].relevant, tasks[1].relevant) == (({1}, {1}), ({0, 1}, {2}, {1}))
    assert (tasks[0].own, tasks[0].without_answer, tasks[1].without_answer) == (({0}, set()), 1, 0)
    assert "held-out anchors that are their only answer are not measured: 1" in caplog.text

    vectors = dict(zip(tasks[0].documents, np.eye(len(tasks[0].documents), dtype=np.float32), strict=True))
    vectors |= {"anchor": vectors["ANCHOR "] + 0.5 * vectors["answer"], "third": vectors["answer"]}

    def encode(texts):
        return np.stack([vectors[text] for text in texts])

    assert [task.measure(encode, encode)["recall@1"].tolist() for task in tasks] == [[1, 1], [0.5, 1, 1]]
    (tmp_path / "heldout.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(DataError, match="every held-out anchor has no answer but itself"):
        finetune._read(FinetuneConfig.resolve(settings | given))


@pytest.mark.parametrize(("has", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_where_the_processor_has_it(settings, monkeypatch, has, chosen):  # noqa: F811
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = finetune._model_with_adapter(FinetuneConfig.resolve(settings | {"bf16": True}))
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {chosen}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("told", "device", "pinned"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)]
)
def test_memory_is_pinned_for_a_gpu(told, device, pinned, monkeypatch):
    monkeypatch.setattr(training, "training_arguments", lambda folder, **arguments: arguments)
    config = FinetuneConfig.resolve({"dataloader_pin_memory": told})
    model = SimpleNamespace(device=torch.device(device), prompts={})
    arguments = finetune._arguments(config, model, SimpleNamespace(train=[1, 2], task=None), 0, 1)
    assert arguments["dataloader_pin_memory"] is pinned


# --- evaluation and index -----------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path) -> dict:
    """Queries, documents and judgements of which every file and column has a name of its own."""
    (tmp_path / "q.csv").write_text("_id,wish,text\nq0,blanket warm,wrong\n")
    (tmp_path / "c.csv").write_text("_id,body,text\nd0,warm blanket,wrong\nd1,steel pan,wrong too\n")
    (tmp_path / "j.tsv").write_text("q0\td0\t1\n")
    return {
        "queries_path": str(tmp_path / "q.csv"), "corpus_path": str(tmp_path / "c.csv"), "models": [],
        "qrels_path": str(tmp_path / "j.tsv"), "output_dir": str(tmp_path / "out"), "resamples": 100,
    }  # fmt: skip


def test_the_columns_of_queries_and_documents(judged):
    told = evaluate_retrieval(judged | {"query_column": "wish", "corpus_column": "body"})
    assert told.metrics["BM25"]["mrr@10"] == 1
    assert evaluate_retrieval(judged | {"query_column": "wish"}).metrics["BM25"]["mrr@10"] == 0


def test_judgements_of_their_own_file(judged, tmp_path):
    columns = {"query_column": "wish", "corpus_column": "body"}
    (tmp_path / "other.tsv").write_text("q0\td1\t1\n")
    other = evaluate_retrieval(judged | columns | {"qrels_path": str(tmp_path / "other.tsv")})
    assert other.metrics["BM25"]["mrr@10"] == 0


def test_the_index_is_measured_with_the_column_told(tiny_bert, tmp_path):
    vectors = embedding_file(tmp_path / "embeds.txt", tiny_bert)
    (tmp_path / "q.csv").write_text("wish\nwarm blanket\n")
    config = {
        "embedding_path": str(vectors),
        "output_dir": str(tmp_path / "i"),
        "queries_path": str(tmp_path / "q.csv"),
    }
    assert build_faiss_index(config | {"query_column": "wish"}).measured_on == "real queries"
    with pytest.raises(ValueError, match="name it with query_column"):
        build_faiss_index(config)


# --- what cannot go together --------------------------------------------------------------------------------------


def test_a_prompt_for_a_column_that_is_not_there():
    with pytest.raises(ConfigError, match=r"unknown column query; columns are anchor, positive, negative"):
        FinetuneConfig.resolve({"prompt": {"query": "q: "}})
