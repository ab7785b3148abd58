"""What rows say besides their texts: weights and a teacher's scores, by hand, and in a step of training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.finetune.dataset import with_equal_negatives
from ebr_lib.finetune.doctor import examine
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.outputs import save_rows
from ebr_lib.finetune.signals import check_scores, row_weights, teacher_divergence, teacher_scores
from tests.finetune.conftest import close, same, step, write_rows
from tests.finetune.test_losses import Still, by_numpy, random_vectors

EYE = torch.eye(2)


def per_anchor(reps, temperature) -> list[float]:
    q, *d = [torch.nn.functional.normalize(column[0], dim=1) for column in reps]
    logits = q @ torch.cat(d).T / temperature
    return (-logits.log_softmax(dim=1).diagonal()).tolist()


# --- weights ------------------------------------------------------------------------------------------------------


def weights_of(*weights: float) -> torch.Tensor:
    return row_weights([TrainingRow("a", "p", weight=weight) for weight in weights])


def test_weights_by_hand():
    # the losses of two anchors are ln(1 + e^(0 - 1)) and ln(1 + e^(1 - 0)): .3133 and 1.3133; with weights 3 and 1
    # the mean is (3 · .3133 + 1.3133) / 4
    reps = [[torch.tensor([[1.0, 0.0], [1.0, 0.0]])], [EYE]]
    loss = ContrastiveLoss(Still(), temperature=1.0, row_weights=weights_of(3.0, 1.0))
    wanted = (3 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 4
    assert loss.calculate_loss(reps, torch.arange(2)).item() == pytest.approx(wanted, abs=1e-6)


def test_weights_belong_to_rows_and_count_in_training_alone():
    reps, model, labels = random_vectors(4, 3), Still(), torch.tensor([5, 0, 2, 3])
    weights = np.array([0.5, 9.0, 2.0, 0.0, 9.0, 4.0])
    loss = ContrastiveLoss(model, temperature=0.5, row_weights=weights_of(*weights))
    wanted = np.mean(per_anchor(reps, 0.5) * weights[labels]) / weights.mean()
    assert loss.calculate_loss(reps, labels).item() == pytest.approx(wanted, rel=1e-5)
    model.eval()
    assert loss.calculate_loss(reps, labels).item() == pytest.approx(by_numpy(reps, 0.5), rel=1e-5)


def test_the_rows_of_an_epoch_weigh_alike_however_they_are_batched():
    """Also where a batch is one row, or holds rows of one weight: divided by its own mean, it would not be weighted."""
    reps = [[torch.cat([EYE, EYE])], [torch.cat([EYE, EYE.flip(0)])], [torch.cat([EYE.flip(0), EYE])]]
    loss = ContrastiveLoss(Still(), temperature=1.0, row_weights=weights_of(5.0, 1.0, 1.0, 1.0))
    of_rows = [
        loss.calculate_loss([[column[row : row + 1]] for (column,) in reps], torch.tensor([row])).item()
        for row in range(4)
    ]
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert of_rows == pytest.approx([2.5 * right, 0.5 * right, 0.5 * wrong, 0.5 * wrong], abs=1e-6)


def test_a_batch_that_weighs_nothing_has_no_loss():
    loss = ContrastiveLoss(Still(), row_weights=weights_of(0.0, 0.0, 1.0))
    assert loss.calculate_loss(random_vectors(2, 2), torch.arange(2)).item() == 0


def test_equal_weights_change_no_bit_and_others_do(plain, pairs, tmp_path):
    rows = [{"anchor": row.anchor, "positive": row.positive} for row in expand(read_pairs(pairs))]
    equal = write_rows(tmp_path / "equal.jsonl", [row | {"weight": 3} for row in rows])
    heavy = write_rows(tmp_path / "heavy.jsonl", [row | {"weight": 1 + 9 * (i % 3 == 0)} for i, row in enumerate(rows)])
    without = step(plain)
    assert same(step(plain, data_path=equal).adapter, without.adapter)
    weighted = step(plain, data_path=heavy)
    assert not close(weighted.adapter, without.adapter)
    cached = step(plain, data_path=heavy, train_batch_size=3, contrastive_batch_size=8)
    assert close(cached.adapter, weighted.adapter)


def test_rows_that_all_weigh_nothing_are_refused(plain, tmp_path):
    rows = [{"anchor": f"a {i}", "positive": f"p {i}", "weight": 0} for i in range(8)]
    with pytest.raises(DataError, match="every training row has the weight 0"):
        step(plain, data_path=write_rows(tmp_path / "a.jsonl", rows))


# --- a teacher ----------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    # teacher (.8, .2) of scores ln 4 and 0, student (.5, .5): .8 ln(.8 / .5) + .2 ln(.2 / .5) = .19274
    scores = torch.tensor([[math.log(4), 0.0], [1.0, 1.0], [5.0, torch.nan]])
    found = teacher_divergence(torch.zeros(3, 2), scores, 1.0)
    assert found.tolist() == pytest.approx([0.192745, 0.0, 0.0], abs=1e-6)
    # twice the temperature: teacher (2/3, 1/3)
    softer = teacher_divergence(torch.zeros(3, 2), scores, 2.0)
    assert softer[0].item() == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-6)


def test_divergence_is_torch_s_and_its_gradient_is_flagembedding_s():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, generator=generator) * 3
    logits = torch.randn(4, 3, generator=generator, requires_grad=True)
    found = teacher_divergence(logits, scores, 1.0)
    wanted = torch.nn.functional.kl_div(logits.log_softmax(1), scores.softmax(1), reduction="none").sum(dim=1)
    torch.testing.assert_close(found, wanted)
    (ours,) = torch.autograd.grad(found.mean(), logits, retain_graph=True)
    entropy = -(scores.softmax(1) * logits.log_softmax(1)).sum(dim=1).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(entropy, logits)[0])


def test_rows_without_scores_have_no_divergence_and_finite_gradients():
    logits = torch.zeros(3, 3, requires_grad=True)
    scores = torch.tensor([[torch.nan] * 3, [2.0, torch.nan, torch.nan], [1.0, torch.nan, 3.0]])
    found = teacher_divergence(logits, scores, 1.0)
    found.sum().backward()
    assert found[:2].tolist() == [0, 0] and found[2] > 0
    assert (logits.grad[:2] == 0).all() and logits.grad[2, 1] == 0 and logits.grad[2, 0] > 0 > logits.grad[2, 2]


def test_scores_stay_with_their_documents():
    """Drawn negatives have no score, and those that are cut off lose theirs."""
    rows = [TrainingRow("a", "p", ("x", "y"), scores=(3.0, 2.0, 1.0)), TrainingRow("b", "q", scores=(5.0,))]
    table = teacher_scores(with_equal_negatives(rows, ["p", "q", "r"], 0), 2)
    np.testing.assert_equal(table.numpy(), [[3, 2, 1], [5, np.nan, np.nan]])
    assert with_equal_negatives(rows, ["p", "q", "r"], 0, width=1)[0].scores == (3.0, 2.0)
    assert teacher_scores(rows[1:], 2) is None and row_weights(rows) is None


def test_the_teacher_is_added_to_the_loss_and_logged_apart():
    reps, labels = random_vectors(4, 3), torch.arange(4)
    scores = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    q, *d = [torch.nn.functional.normalize(column[0].float(), dim=1) for column in reps]
    logits = torch.stack([(q * column).sum(dim=1) for column in d], dim=1) / 0.5
    divergence = teacher_divergence(logits, scores, 2.0).mean().item()
    loss = ContrastiveLoss(Still(), temperature=0.5, teacher=scores, distill_weight=0.3, distill_temperature=2.0)
    found = loss._components(loss.calculate_loss(reps, labels))
    assert found["distill"].item() == pytest.approx(0.3 * divergence, rel=1e-4)
    assert found["contrastive"].item() == pytest.approx(by_numpy(reps, 0.5), rel=1e-4)
    weighted = ContrastiveLoss(
        Still(), temperature=0.5, teacher=scores, distill_weight=0.3, row_weights=weights_of(1.0, 0.0, 0.0, 0.0)
    )
    wanted = per_anchor(reps, 0.5)[0] + 0.3 * teacher_divergence(logits, scores, 1.0)[0].item()
    assert weighted.calculate_loss(reps, labels).item() == pytest.approx(wanted, rel=1e-4)
    plain = ContrastiveLoss(Still(), temperature=0.5, teacher=scores)
    assert torch.equal(
        plain.calculate_loss(reps, labels), ContrastiveLoss(Still(), temperature=0.5).calculate_loss(reps, labels)
    )


@pytest.fixture
def scored(plain, pairs, tmp_path) -> dict:
    """Two negatives a row, which the teacher ranks above the positive."""
    rows = expand(read_pairs(pairs))[:24]
    lines = [
        {"query": row.anchor, "pos": [row.positive], "neg": [rows[(i + 9) % 24].positive, rows[(i + 16) % 24].positive],
         "pos_scores": [-2.0], "neg_scores": [5.0, 1.0]}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return plain | {"data_path": write_rows(tmp_path / "scored.jsonl", lines)}


@pytest.mark.parametrize("packed", [False, True])
def test_learning_from_a_teacher_bites_and_is_off_by_default(scored, packed):
    common = scored | {"packed_rows": packed}
    taught = step(common, distill_weight=1.0)
    assert taught.log[0]["distill"] > 0
    assert taught.log[0]["loss"] == pytest.approx(taught.log[0]["contrastive"] + taught.log[0]["distill"], rel=1e-4)
    without = step(common)
    assert not close(taught.adapter, without.adapter) and "distill" not in without.log[0]
    softer = step(common, distill_weight=1.0, distill_temperature=4.0)
    assert softer.log[0]["distill"] != taught.log[0]["distill"]
    cached = step(common, distill_weight=1.0, train_batch_size=3, contrastive_batch_size=8)
    assert close(cached.adapter, taught.adapter)


def test_a_teacher_without_scores_is_refused_and_unused_scores_are_logged(caplog):
    caplog.set_level("INFO", "ebr_lib")
    with pytest.raises(ConfigError, match=r"distill_weight: 0\.5 wanted, and no training row has two scores"):
        check_scores([TrainingRow("a", "b", ("c",), scores=(1.0, math.nan))], 0.5)
    check_scores([TrainingRow("a", "b", ("c",), scores=(1.0, 2.0))], 0.0)
    assert "distill_weight uses them" in caplog.text


# --- reported and saved -------------------------------------------------------------------------------------------


def test_the_doctor_reports_weights_and_scores():
    rows = [TrainingRow("a", "p", ("n",), weight=4.0, scores=(1.0, 2.0)), TrainingRow("b", "q", weight=0.5)]
    table = examine(rows, lambda texts: list(map(len, texts)), max_seq_length=9, batch_size=2).table.to_string()
    assert "0.5 … 2.25 … 4" in table and "with a teacher's scores" in table


def test_saved_rows_come_back_with_all_they_say(tmp_path):
    rows = [TrainingRow("a", "p", ("x", "y"), "Find: ", 2.5, (3.0, math.nan)), TrainingRow("b", "q")]
    save_rows(rows, tmp_path / "rows.jsonl")
    found = expand(read_pairs(tmp_path / "rows.jsonl"))
    assert found[1] == rows[1] and found[0].prompt == "Find: " and found[0].weight == 2.5
    np.testing.assert_equal(found[0].scores, (3.0, math.nan, math.nan))
