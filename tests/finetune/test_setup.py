"""From the config to the model and the rows that are trained on: precision, adapters, mining, batches of one."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.data.text import text_keys
from ebr_lib.errors import ConfigError, DataError, ModelError
from ebr_lib.finetune import setup
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.heldout import build_task
from ebr_lib.finetune.paths import Paths
from ebr_lib.finetune.rows import Rows
from ebr_lib.finetune.run import _read
from ebr_lib.model import precision as model_precision
from ebr_lib.model.contract import CONTRACT_FILE
from ebr_lib.model.loading import load_model
from ebr_lib.model.provenance import identify
from ebr_lib.model.reranker import load_reranker
from tests.finetune.test_mining import catalogue_of
from tests.finetune.test_positives import on_the_circle
from tests.models import build_tiny_reranker

FEW = [TrainingRow("a", "b"), TrainingRow("c", "d")]


def test_bfloat16_that_a_gpu_emulates_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert model_precision.choose_precision("auto", "cuda:0").dtype == "float32"
    assert model_precision.choose_precision("bfloat16", "cuda").dtype == "float16"


def config_of(settings: dict = {}, **knobs) -> FinetuneConfig:  # noqa: B006 (it is only read)
    return FinetuneConfig.resolve(settings | knobs)


def model_of(config: FinetuneConfig):
    return setup.make_model(*setup.settle_precision(config))


@pytest.mark.parametrize(("has", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_where_the_processor_has_it(settings, monkeypatch, has, chosen):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = model_of(config_of(settings, bf16=True))
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {chosen}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("has", "knobs", "dtype", "saved"),
    [
        (True, {}, "bfloat16", True),
        (False, {}, "float32", False),
        (True, {"bf16": False}, "float32", False),
        (True, {"fp16": True}, "bfloat16", False),  # the nearest to what was asked for
    ],
)
def test_without_a_wish_training_takes_bfloat16_where_it_is_fast(monkeypatch, has, knobs, dtype, saved):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, precision = setup.settle_precision(config_of(**knobs))
    assert precision.dtype == dtype
    assert config.bf16 is saved  # the saved config repeats this run on another machine


def test_fp16_without_the_hardware_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "ebr_lib"):
        setup.settle_precision(config_of(fp16=True))
    assert "is the nearest" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (None, {}),
        ("", {"query": "", "document": ""}),
        ("find: ", {"query": "find: ", "document": "find: "}),
        ({"anchor": "q: "}, {"query": "q: "}),
        ({"positive": "d: ", "negative": "n: "}, {"document": "d: "}),
    ],
)
def test_given_prompts_are_put_on_their_side(settings, prompt, wanted):
    own = load_model(settings["model_name"], device="cpu").prompts
    assert model_of(config_of(settings, prompt=prompt)).prompts == own | wanted


# --- saved adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(trained, tmp_path):
    """A function: a copy of a trained model's folder, its contract changed."""

    def copy(**changes) -> str:
        folder = tmp_path / "saved"
        shutil.copytree(trained.model_path, folder)
        contract = json.loads((folder / CONTRACT_FILE).read_text())
        (folder / CONTRACT_FILE).write_text(json.dumps(contract | changes))
        return str(folder)

    return copy


def test_an_adapter_keeps_its_shape_and_the_log_names_what_is_ignored(settings, trained, caplog):
    config = config_of(settings, model_name=trained.model_path, lora_r=8, lora_alpha=8)
    model = model_of(config)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        kept = setup.keep_adapter_settings(config, model)
    assert "lora_r 16 (8 is ignored)" in caplog.text
    assert (kept.lora_r, kept.lora_alpha) == (16, 32)
    assert all(16 in weight.shape for name, weight in model.named_parameters() if "lora_" in name)


def test_other_settings_than_before_are_logged(settings, saved, caplog):
    config = config_of(settings, model_name=saved(matryoshka_dims=[16]), max_seq_length=16)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        setup.keep_adapter_settings(config, model_of(config))
    assert "max_seq_length 16 (was 32), matryoshka_dims () (was (16,))" in caplog.text


def test_an_adapter_keeps_its_side(settings, saved):
    with pytest.raises(ConfigError, match=r"adapter_side: 'both' wanted.*was trained for 'query'"):
        model_of(config_of(settings, model_name=saved(adapter_side="query")))


def test_an_adapter_of_another_library_is_refused(settings, saved):
    folder = saved()
    (Path(folder) / CONTRACT_FILE).unlink()
    with pytest.raises(ModelError, match="an adapter that this stage did not save; merge it"):
        model_of(config_of(settings, model_name=folder))


def test_merging_would_change_the_documents_of_a_query_adapter():
    with pytest.raises(ConfigError, match="merge_adapter"):
        FinetuneConfig(merge_adapter=True, adapter_side="query")


# --- knobs against data and model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"matryoshka_dims": [16, 64]}, r"matryoshka_dims: 64 wanted, .* have 32 dimensions"),
        ({"lr_scheduler_type": "greedy"}, "no rows were held out"),
    ],
)
def test_knobs_that_data_or_model_contradict(knobs, error):
    model = SimpleNamespace(get_embedding_dimension=lambda: 32)
    with pytest.raises(ConfigError, match=error):
        setup.check_against_data(config_of(**knobs), Rows(FEW, [], None, ""), model)


def test_a_prompt_for_an_unknown_column():
    with pytest.raises(ConfigError, match=r"unknown column query"):
        FinetuneConfig.resolve({"prompt": {"query": "q: "}})


# --- batches of one -----------------------------------------------------------------------------------------------


def test_pairs_that_would_be_alone_are_compared_together(caplog):
    config = config_of(train_batch_size=1, gradient_accumulation_steps=8)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        config = setup.ensure_negatives(config, FEW)
    assert "a batch of 1 has no negatives: 8 pairs are compared together" in caplog.text
    assert (config.compared, config.embedded, config.gradient_accumulation_steps) == (8, 1, 1)


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [({"train_batch_size": 2}, FEW), ({"train_batch_size": 1}, [TrainingRow("a", "b", ("c",)), *FEW])],
)
def test_batches_with_negatives_stay(knobs, rows):
    config = config_of(**knobs)
    assert setup.ensure_negatives(config, rows) is config


def test_one_row_needs_a_negative():
    with pytest.raises(DataError, match="cannot train on one row without a negative"):
        setup.ensure_negatives(config_of(), FEW[:1])
    setup.ensure_negatives(config_of(), [TrainingRow("a", "b", ("c",))])


# --- mining -------------------------------------------------------------------------------------------------------


def mined(config: FinetuneConfig, model):
    rows = _read(config, Paths(config.output_dir, config.model_name))
    return rows.train, setup.with_mined_negatives(config, rows, model).train


@pytest.mark.parametrize("side", ["both", "query"])
def test_the_model_mines_with_its_prompts_and_queries_alone_with_the_adapter(settings, monkeypatch, side):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: False)  # which would change places of near ties
    config = config_of(
        settings, eval_ratio=0.0, prompt={"anchor": "find: ", "positive": "good: "}, adapter_side=side,
        mine_hard_negatives=2, mining_rank_min=2, mining_rank_max=9, mining_margin=None,
    )  # fmt: skip
    model = model_of(config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    given, found = mined(config, model)
    model.eval()
    base = load_model(settings["model_name"], device="cpu", max_seq_length=32)
    corpus = sorted({row.positive for row in given})
    vectors = (model if side == "both" else base).encode(corpus, prompt="good: ")
    for row in found:
        cosines = vectors @ model.encode([row.anchor], prompt="find: ")[0]
        ranked = [corpus[i] for i in np.argsort(-cosines) if corpus[i] != row.positive]
        assert list(row.negatives) == ranked[1:3]
    _, drawn = mined(dataclasses.replace(config, mining_choice="random"), model)
    assert [row.negatives for row in drawn] != [row.negatives for row in found]


def test_vectors_of_a_catalogue_must_be_the_models(settings, tiny_models, caplog):
    config = config_of(settings, mine_hard_negatives=2, mining_margin=None, mining_rank_max=3, eval_ratio=0.0)
    model = model_of(config)
    rows = _read(config, Paths(config.output_dir, config.model_name))
    texts = [row.positive.upper() for row in rows.train] + ["only the catalogue has this"]
    vectors = np.random.default_rng(0).standard_normal((len(texts), 32)).astype(np.float32)  # not what encoding gives

    def mine(manifest, dim=32):
        catalogue = Catalogue(Path("items.txt"), texts, text_keys(texts), vectors[:, :dim], manifest).distinct()
        return setup.with_mined_negatives(config, rows, model, catalogue).train

    made = {"model": {"sha256": identify(settings["model_name"]).sha256}, "settings": {"prompt": "", "dimension": 32}}
    assert mine(made) != setup.with_mined_negatives(config, rows, model).train
    other = {"model": {"name": "other", "sha256": identify(str(tiny_models("qwen2"))).sha256}}
    for manifest, dim, words in (
        (other, 32, "holds vectors of model other, not of .*tiny-bert; encode it again with"),
        (made | {"settings": {"prompt": "doc: "}}, 32, "was encoded with prompt 'doc: ', not ''"),
        ({}, 16, "was encoded with dimension 16, not 32"),
    ):
        with pytest.raises(ModelError, match=words):
            mine(manifest, dim)
    mine({})
    assert "no manifest says which model made its vectors" in caplog.text


def test_noisy_positives_are_dropped_counted_and_written(settings, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(setup, "encoders_of", lambda *_, **__: (on_the_circle, on_the_circle))
    good = [TrainingRow("tent", "big tent"), TrainingRow("kettle", "iron pot")]
    bad = [TrainingRow("Kettle", "kite")]  # small tent is nearer; so is kite to tent than small tent
    task = build_task([TrainingRow("lid", "kite")], bad, 9, 0)
    rows = Rows([*good, *bad, TrainingRow("tent", "small tent")], [], task, "")
    config, noisy = config_of(settings, positive_rank_max=1), tmp_path / "noisy.jsonl"
    with caplog.at_level(logging.INFO, "ebr_lib"):
        kept = setup.with_mined_negatives(config, rows, None, None, noisy)
    assert list(kept.train) == good
    assert "noisy positives dropped: 2 of 4 rows (rank over 1)" in caplog.text
    assert [json.loads(line) for line in noisy.read_text().splitlines()] == [
        {"anchor": "Kettle", "positive": "kite", "negative": [], "rank": 2},
        {"anchor": "tent", "positive": "small tent", "negative": [], "rank": 2},
    ]
    assert rows.task.seen == (True,) and kept.task.seen == (False,)  # kite is in a dropped row alone
    assert expand(read_pairs(noisy)) == [*bad, rows.train[3]]
    mining = dataclasses.replace(config, mine_hard_negatives=9, mining_rank_min=1, mining_margin=None)
    mined = setup.with_mined_negatives(mining, rows, None, catalogue_of(["kite"])).train
    assert [set(row.negatives) for row in mined] == [{"iron pot", "kite"}, {"big tent"}]  # kite was dropped for kettle
    setup.with_mined_negatives(config, dataclasses.replace(rows, train=good), None, None, noisy)
    assert not noisy.exists()  # of an earlier run
    with pytest.raises(DataError, match="positive_rank_max: 1 leaves none of the 1 training rows"):
        setup.with_mined_negatives(
            config, dataclasses.replace(rows, train=[TrainingRow("tent", "lid", ("kite",))]), None
        )


def test_a_reranker_checks_the_negatives_and_scores_them_as_a_teacher(settings, tmp_path):
    folder = str(build_tiny_reranker(tmp_path / "reranker"))
    mining = {"eval_ratio": 0.0, "mine_hard_negatives": 2, "mining_margin": None}
    config = config_of(settings, **mining, reranker_name=folder)
    model = model_of(config)
    given, found = mined(config, model)
    score = load_reranker(folder, device="cpu")
    for row in found:
        scores = score([(row.anchor, text) for text in (row.positive, *row.negatives)])
        assert row.scores == pytest.approx(scores, abs=1e-5)
        assert all(negative < row.scores[0] for negative in row.scores[1:])
    plain = mined(config_of(settings, **mining), model)[1]
    assert [row.negatives for row in plain] != [row.negatives for row in found]
    alone = mined(config_of(settings, eval_ratio=0.0, distill_weight=1.0, reranker_name=folder), model)[1]
    assert [(row.anchor, row.negatives) for row in alone] == [(row.anchor, row.negatives) for row in given]
    assert [row.scores for row in alone] == [pytest.approx(row.scores[:1], abs=1e-5) for row in found]
    with pytest.raises(ModelError, match="is a SentenceTransformer, not a cross-encoder"):
        mined(config_of(settings, **mining, reranker_name=settings["model_name"]), model)


def test_finding_no_negatives_is_logged(settings, caplog):
    config = config_of(settings, mine_hard_negatives=1, mining_rank_min=500, mining_rank_max=600)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        given, found = mined(config, model_of(config))
    assert "no hard negatives found" in caplog.text and list(found) == list(given)


def test_no_mining_leaves_the_rows():
    rows = Rows(FEW, [], None, "")
    assert setup.with_mined_negatives(config_of(), rows, None) is rows


def test_a_window_too_small_is_refused():
    with pytest.raises(ConfigError, match="mine_hard_negatives: 4 "):
        FinetuneConfig(mine_hard_negatives=4, mining_rank_min=8, mining_rank_max=10)
    FinetuneConfig(mine_hard_negatives=3, mining_rank_min=8, mining_rank_max=10)
    FinetuneConfig(mining_rank_min=80)
