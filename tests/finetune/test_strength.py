"""The strength of a trained adapter: scaled as alpha would be, chosen on one half, reported on the other, saved."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ebr_lib import evaluate_retrieval
from ebr_lib.errors import ConfigError
from ebr_lib.finetune import setup, strength
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.heldout import HeldoutTask
from ebr_lib.finetune.outputs import verdict
from ebr_lib.finetune.strength import STRENGTHS, at_strength, best_strength, halves_of
from ebr_lib.model.adapters import adapter_weights, add_lora, set_adapter_weights
from ebr_lib.model.contract import read_contract
from ebr_lib.model.loading import load_model
from tests.finetune.conftest import adapter, log_of, same, train

TEXTS = ["red kite", "书籍 this lamp"]


# --- weights ------------------------------------------------------------------------------------------------------


def adapted(tiny_bert, alpha: int = 16, **how):
    torch.manual_seed(0)
    model = load_model(str(tiny_bert), device="cpu", trainable=True)
    add_lora(model, r=4, alpha=alpha, dropout=0.0, **how)
    return model.eval()


def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}


@pytest.mark.parametrize("rslora", [True, False])
def test_a_quarter_is_a_quarter_of_alpha(tiny_bert, rslora):
    model, quarter = adapted(tiny_bert, rslora=rslora), adapted(tiny_bert, alpha=4, rslora=rslora)
    start = adapter_weights(model)
    end = moved(start)
    set_adapter_weights(quarter, end)
    set_adapter_weights(model, at_strength(start, end, 0.25))
    np.testing.assert_allclose(model.encode(TEXTS), quarter.encode(TEXTS), atol=1e-6)
    assert np.abs(model.encode(TEXTS) - adapted(tiny_bert).encode(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_of_a_new_adapter_is_the_base_and_all_of_it_is_as_trained(tiny_bert, dora):
    base = load_model(str(tiny_bert), device="cpu").encode(TEXTS)
    model = adapted(tiny_bert, dora=dora)
    start = adapter_weights(model)
    end = moved(start)
    assert same(at_strength(start, end, 1.0), end)
    set_adapter_weights(model, at_strength(start, end, 0.0))
    np.testing.assert_allclose(model.encode(TEXTS), base, atol=1e-6)
    changes = []
    for share in STRENGTHS:
        set_adapter_weights(model, at_strength(start, end, share))
        changes.append(np.abs(model.encode(TEXTS) - base).max())
    assert changes == sorted(changes)


def test_an_adapter_that_was_trained_further_goes_back_to_where_it_began():
    start = {"x.lora_A.weight": torch.tensor([1.0, 3.0]), "x.lora_B.weight": torch.tensor([2.0, 0.0])}
    end = {"x.lora_A.weight": torch.tensor([2.0, 3.0]), "x.lora_B.weight": torch.tensor([4.0, 1.0])}
    half = {"x.lora_A.weight": torch.tensor([1.5, 3.0]), "x.lora_B.weight": torch.tensor([3.0, 0.5])}
    for share, wanted in ((0.0, start), (0.5, half), (1.0, end)):
        assert same(at_strength(start, end, share), wanted)


# --- choosing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "chosen"),
    [
        ((0.1, 0.2, 0.3, 0.2, 0.1), 0.5),
        ((0.3, 0.2, 0.3, 0.3, 0.1), 0.0),  # ties to the smaller
        ((0.1, 0.2, 0.3, 0.3, 0.4), 1.0),
        ((0.3, 0.2), 0.0),
        ((0.2, 0.2), 1.0),  # too few queries to choose: not worse
        ((0.2, 0.3), 1.0),
    ],
)
def test_the_best_strength(means, chosen):
    assert best_strength(dict(zip(STRENGTHS if len(means) == 5 else (0.0, 1.0), means, strict=True))) == chosen


def task_of(queries: list[str], seen: list[bool]) -> HeldoutTask:
    return HeldoutTask(tuple(queries), ("a",), tuple(frozenset({0}) for _ in queries), tuple(seen))


def test_halves_depend_on_seed_and_texts_and_share_the_seen_queries():
    texts = [f"query {i}" for i in range(140)]
    seen = [i % 7 < 2 for i in range(140)]
    halves = halves_of(task_of(texts, seen), seed=1)
    assert halves.split and halves.strengths == STRENGTHS
    assert (halves.choosing ^ halves.reporting).all() and halves.choosing.sum() == 70
    assert halves.choosing[seen].sum() == 20
    order = random.Random(0).sample(range(140), 140)
    shuffled = halves_of(task_of([texts[i] for i in order], [seen[i] for i in order]), seed=1)
    assert (shuffled.choosing == halves.choosing[order]).all()
    assert (halves_of(task_of(texts, seen), seed=2).choosing != halves.choosing).any()


def test_too_few_queries_are_not_split():
    halves = halves_of(task_of(["a"] * 99, [True] * 99), seed=1)
    assert halves.choosing.all() and halves.reporting.all() and halves.strengths == (0.0, 1.0)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def auto(settings, monkeypatch) -> dict:
    """A run whose 12 held-out queries are enough."""
    monkeypatch.setattr(strength, "FEWEST", 6)
    return settings | {"adapter_strength": "auto", "num_epochs": 2}


def test_what_was_chosen_is_what_is_saved_reported_and_evaluated(auto, tiny_bert, tmp_path, caplog, monkeypatch):
    given = {}

    def half(means):
        given.update(means)
        return 0.5

    monkeypatch.setattr(strength, "best_strength", half)
    with caplog.at_level(logging.INFO, "ebr_lib"):
        result = train(auto, learning_rate=2e-2)
    assert result.adapter_strength == 0.5 and "adapter strength: 0.5" in caplog.text
    table = result.tables["strengths"]
    choosing, reporting = (table[table["half"] == side] for side in ("choosing", "reporting"))
    assert list(choosing["strength"]) == list(reporting["strength"]) == list(STRENGTHS)
    assert list(choosing["ndcg@10"]) == list(given.values())
    # the best step was kept by the half that chooses: the adapter as it was trained measures there what the log says
    best = max(
        (e for e in log_of(result) if e["step"] and "eval_ndcg@10" in e), key=lambda entry: entry["eval_ndcg@10"]
    )
    assert choosing["ndcg@10"].iloc[-1] == pytest.approx(best["eval_ndcg@10"])
    for share, found in ((0.0, result.before), (0.5, result.after)):
        (row,) = reporting[reporting["strength"] == share].to_dict("records")
        assert all(found["all"][name] == row[name] for name in ("recall@1", "mrr@10", "ndcg@10"))
    last = log_of(result)[-1]
    assert (last["adapter_strength"], last["temperature"]) == (0.5, 0.05) and last["after"] == result.after
    folder = Path(result.model_path)
    assert "strength of the adapter: 0.5" in (folder / "README.md").read_text(encoding="utf-8")
    heldout = [json.loads(line)["anchor"] for line in (folder / "heldout.jsonl").read_text("utf-8").splitlines()]
    assert len(heldout) == result.before["all"]["queries"] == 6
    metrics = evaluate_retrieval({
        "models": [result.model_path, str(tiny_bert)], "data_path": result.model_path, "bm25": False,
        "output_dir": str(tmp_path / "evaluation"), "resamples": 100, "max_seq_length": 32, "backend": "torch",
    }).metrics  # fmt: skip
    after, before = metrics.values()
    assert after["ndcg@10"] == result.after["all"]["ndcg@10"] and before["ndcg@10"] == result.before["all"]["ndcg@10"]


def test_the_held_out_loss_that_chooses_is_of_the_half_that_chooses(auto, monkeypatch):
    datasets, compared = setup.Datasets, set()

    def note(train, heldout, *more):
        compared.update(row.anchor for row in heldout)
        return datasets(train, heldout, *more)

    monkeypatch.setattr(setup, "Datasets", note)
    result = train(auto, best_metric="loss", num_epochs=1)
    lines = (Path(result.model_path) / "heldout.jsonl").read_text("utf-8").splitlines()
    reporting = {json.loads(line)["anchor"] for line in lines}
    assert len(compared) == len(reporting) == 6 and not compared & reporting


def test_a_given_share_halves_the_change_for_every_loader(settings, tmp_path):
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    whole, half = (
        train(settings, adapter_strength=share, output_dir=str(tmp_path / str(share)), merge_adapter=share < 1)
        for share in (1, 0.5)
    )
    for name, weight in adapter(half).items():
        factor = 0.5 if ".lora_B" in name else 1.0
        assert torch.equal(weight, factor * adapter(whole)[name])
    assert half.tables.keys() == whole.tables.keys() == {"before_after", "data"}
    ours = load_model(half.model_path, device="cpu").encode(TEXTS)  # which compares the probes with the contract's
    plain = SentenceTransformer(settings["model_name"], device="cpu")
    plain[0].model = PeftModel.from_pretrained(plain[0].model, half.model_path).merge_and_unload()
    plain.max_seq_length = 32
    for model in (SentenceTransformer(half.model_path, device="cpu"), plain, load_model(half.merged_path)):
        np.testing.assert_allclose(model.encode(TEXTS), ours, atol=1e-5)
    assert np.abs(ours - load_model(whole.model_path, device="cpu").encode(TEXTS)).max() > 1e-4
    configs = [(Path(run.model_path) / "adapter_config.json").read_text() for run in (whole, half)]
    assert json.loads(configs[0])["lora_alpha"] == json.loads(configs[1])["lora_alpha"]


def test_a_run_that_makes_it_worse_saves_the_model_from_before_and_says_why(settings, tiny_bert, caplog, monkeypatch):
    monkeypatch.setattr(strength, "best_strength", lambda means: 0.0 if set(means) == {0.0, 1.0} else 1.0)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        result = train(settings, adapter_strength="auto")
    assert result.adapter_strength == 0 and result.before == result.after
    assert "fine-tuning did not help" in result.verdict and result.verdict in caplog.messages
    assert "training rows are few" in result.verdict and result.verdict in repr(result)
    base = load_model(str(tiny_bert), device="cpu", max_seq_length=32).encode(TEXTS)
    np.testing.assert_allclose(load_model(result.model_path, device="cpu").encode(TEXTS), base, atol=1e-6)
    contract = read_contract(result.model_path)
    assert contract is not None and contract.probes


def test_an_adapter_trained_further_can_be_left_as_it_was(settings, trained, monkeypatch, tmp_path):
    more = {"model_name": trained.model_path, "output_dir": str(tmp_path / "on"), "adapter_strength": 0}
    assert same(adapter(train(settings, **more)), adapter(trained))


def test_without_held_out_queries_the_adapter_stays_as_it_was_trained(settings, tmp_path):
    free = {"eval_ratio": 0.0, "output_dir": str(tmp_path / "auto"), "adapter_strength": "auto"}
    result = train(settings, **free)
    assert (result.adapter_strength, result.verdict, result.before) == (1, "", {})
    assert same(adapter(result), adapter(train(settings, eval_ratio=0.0)))


@pytest.mark.parametrize(
    ("was", "now", "share", "rows", "said"),
    [
        (0.95, 0.95, 0.0, 5000, "did not help.*0.9500 before training, which leaves little to learn"),
        (0.5, 0.5, 0.0, 99, "did not help.*99 training rows are few"),
        (0.5, 0.4, 1.0, 100, "no better than before: mrr@10 0.5000 before, 0.4000 after: the pairs may be noisy"),
        (0.5, 0.6, 1.0, 99, "^$"),
    ],
)
def test_the_verdict_gives_the_likely_cause(was, now, share, rows, said):
    import re

    assert re.search(said, verdict({"all": {"mrr@10": was}}, {"all": {"mrr@10": now}}, share, "mrr@10", rows))


def test_the_strength_is_a_share_or_auto():
    for wrong in (-0.1, 1.5, "half"):
        with pytest.raises(ConfigError, match=r"adapter_strength: .* is not allowed"):
            FinetuneConfig.resolve({"adapter_strength": wrong})
