"""The temperature that fits a model: found as numpy finds it, kept by the loss, the saved config and a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ebr_lib.errors import ConfigError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.losses import ContrastiveLoss, HeldoutRows
from ebr_lib.finetune.paths import FOUND_FILE, Paths
from ebr_lib.finetune.signals import ExpectedCounts
from ebr_lib.finetune.temperature import PAIRS, TEMPERATURES, UNKNOWN, best_temperature, settle_temperature
from ebr_lib.model.loading import load_model
from tests.finetune.conftest import adapter, make_trainer, same, train
from tests.finetune.test_losses import Still, by_numpy, random_vectors


def test_the_loss_is_smallest_at_the_temperature_found():
    sample = [(random_vectors(rows, 3), torch.arange(rows)) for rows in (4, 6)]
    loss = ContrastiveLoss(Still(), temperature=0.3, heldout=HeldoutRows(2, 1.0)).eval()
    found, losses = best_temperature(loss, sample)
    wanted = {t: sum(by_numpy(reps, t) * len(rows) for reps, rows in sample) / 10 for t in TEMPERATURES}
    assert losses == pytest.approx(wanted, rel=1e-5) and found == min(wanted, key=wanted.get)
    assert loss.temperature == 0.3 and loss.heldout == HeldoutRows(2, 1.0)


@pytest.mark.parametrize("spread", [0.03, 0.08])
def test_a_wider_spread_of_cosines_asks_for_a_larger_temperature(spread):
    """Three batches of four have the right document nearer by `spread`: log(3) temperatures, by hand."""
    one, other = torch.tensor([0.0, 1.0]), torch.tensor([spread, (1 - spread**2) ** 0.5])
    anchor = torch.tensor([1.0, 0.0])
    batches = [([[torch.stack([anchor, -anchor])], [torch.stack(pair)]], torch.arange(2)) for pair in
               ((other, one), (other, one), (other, one), (one, other))]  # fmt: skip
    found, losses = best_temperature(ContrastiveLoss(Still()).eval(), batches)
    assert found == min(TEMPERATURES, key=lambda t: abs(np.log(t / (spread / np.log(3)))))
    assert losses[found] == pytest.approx(0.562, abs=0.01)  # the entropy of ¾ and ¼


def test_the_search_sees_the_loss_of_training():
    """The guide's mask, logQ and weights, which evaluation leaves out; smoothing, teacher and counts stay away."""
    (queries, documents), labels = random_vectors(4, 2), torch.arange(4)
    counts = ExpectedCounts(np.array([[1], [1], [2], [3]]), 4, masked=False, balanced=True)
    cosines = torch.eye(4)
    cosines[0, 2] = 1.5  # the guide finds document 2 nearer to anchor 0 than its own
    weights = torch.tensor([2.0, 0.5, 0.5, 1.0])
    loss = ContrastiveLoss(
        Still(), document_counts=counts, guide=lambda rows: cosines, row_weights=weights, label_smoothing=0.3, l1=9.0,
        teacher=torch.tensor([[1.0]]).repeat(4, 1), distill_weight=5.0,
    ).eval()  # fmt: skip
    found, losses = best_temperature(loss, [([queries, documents], labels)])
    unit = [torch.nn.functional.normalize(side[0], dim=1) for side in (queries, documents)]
    for temperature in TEMPERATURES:
        logits = unit[0] @ unit[1].T / temperature - torch.tensor([2.0, 2.0, 1.0, 1.0]).log()
        logits[0, 2] = -torch.inf
        wanted = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).mean()
        assert losses[temperature] == pytest.approx(wanted.item(), rel=1e-4)
    assert found == min(losses, key=losses.get)
    assert not loss.model.training and loss.take_masked_share() is None


def test_no_finite_loss_leaves_the_usual_temperature():
    nan = torch.full((2, 3), torch.nan)
    assert best_temperature(ContrastiveLoss(Still()).eval(), [([[nan], [nan]], torch.arange(2))])[0] == UNKNOWN


def test_the_sample_is_the_first_training_batches_without_dropout(settings, tiny_bert):
    seen = make_trainer(settings, train_batch_size=4, prompt={"anchor": "query: "}, lora_dropout=0.5)
    state = torch.get_rng_state()
    sample = seen.trainer.embedded_sample(8)
    assert torch.equal(torch.get_rng_state(), state) and seen.trainer.model.training
    batches = [labels.tolist() for _, labels in sample]
    assert batches == [rows.tolist() for rows in map(torch.tensor, first_batches(seen.trainer, 2))]
    rows = seen.rows.train
    model = load_model(str(tiny_bert), device="cpu", max_seq_length=32)
    for (anchors, positives), labels in sample:
        for vectors, texts in (
            (anchors, [f"query: {rows[i].anchor}" for i in labels]),
            (positives, [rows[i].positive for i in labels]),
        ):
            np.testing.assert_allclose(torch.cat(vectors).numpy(), model.encode(texts), atol=1e-5)
    assert len(seen.trainer.embedded_sample(PAIRS)) == -(-len(rows) // 4)


def first_batches(trainer, count: int) -> list[list[int]]:
    """As training takes them."""
    return list(trainer.get_train_dataloader().batch_sampler)[:count]


def test_a_query_adapter_is_sampled_with_the_documents_of_the_base(settings):
    trainer = make_trainer(settings, adapter_side="query", contrastive_batch_size=8, train_batch_size=3).trainer
    for weight in trainer.loss.weights:
        torch.nn.init.normal_(weight)
    (anchors, positives), _ = trainer.embedded_sample(8)[0]
    plain = make_trainer(settings, contrastive_batch_size=8, train_batch_size=3).trainer
    (base_anchors, base_positives), _ = plain.embedded_sample(8)[0]
    assert torch.allclose(torch.cat(positives), torch.cat(base_positives), atol=1e-6)
    assert not torch.allclose(torch.cat(anchors), torch.cat(base_anchors), atol=1e-2)


def test_auto_finds_logs_saves_and_trains_as_the_number_does(settings, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ebr_lib"):
        found = train(settings, temperature="auto")
    saved = FinetuneConfig.resolve({}, [Path(found.model_path) / "finetune_config.yaml"]).temperature
    assert saved in TEMPERATURES and saved != 0.05
    assert f"温度 temperature: {saved:g} (auto" in caplog.text
    fixed = train(settings, temperature=saved, output_dir=str(tmp_path / "fixed"))
    assert same(adapter(found), adapter(fixed))
    assert not same(adapter(found), adapter(train(settings, temperature=0.05, output_dir=str(tmp_path / "usual"))))


def test_a_resumed_run_keeps_the_temperature_that_it_found(settings):
    seen = make_trainer(settings, temperature="auto")
    config = FinetuneConfig.resolve(settings | {"temperature": "auto"})
    paths = Paths(config.output_dir, config.model_name)
    first = settle_temperature(seen.trainer, paths.checkpoints / FOUND_FILE, resumed=False)
    assert seen.trainer.loss.temperature == first != 0.05
    (note,) = paths.checkpoints.glob("found.json")
    note.write_text(json.dumps({"temperature": 0.033}))  # as another machine may have found it
    again = settle_temperature(seen.trainer, note, resumed=True)
    assert again == seen.trainer.loss.temperature == 0.033


def test_a_temperature_is_a_number_or_auto():
    for wrong in (0, -1, "automatic", True):
        with pytest.raises(ConfigError, match=r"temperature: .* is not allowed"):
            FinetuneConfig.resolve({"temperature": wrong})
