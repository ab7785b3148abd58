"""Rows as the trainer takes them; the held-out loss compares as many documents per anchor as training does."""

from __future__ import annotations

import math

import pytest
import torch

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.dataset import EpochBatches, evaluation_batch, fill_rows, with_equal_negatives
from ebr_lib.finetune.logbook import _compared
from ebr_lib.finetune.losses import ContrastiveLoss, HeldoutRows
from tests.finetune.conftest import step, write_rows
from tests.finetune.test_losses import Still, by_numpy, random_vectors


@pytest.fixture
def even(settings, tiny_models) -> dict:
    """Weights that stay, no dropout, and cosines that hardly count: the loss is the logarithm of what is compared."""
    knobs = {"model_name": str(tiny_models("qwen2")), "lora_dropout": 0.0, "learning_rate": 1e-12}
    return settings | knobs | {"temperature": 50.0, "mask_known_positives": False, "best_metric": "loss"}


@pytest.mark.parametrize(
    ("knobs", "documents"),
    [
        ({"train_batch_size": 7}, 7),  # 12 held-out rows: the last batch is filled up
        ({"train_batch_size": 16}, 16),  # more than are held out
        ({"train_batch_size": 64}, 36),  # more than there are to train on
        ({"train_batch_size": 8, "eval_batch_size": 3}, 8),
        ({"train_batch_size": 2, "contrastive_batch_size": 12, "packed_rows": False}, 12),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 4}, 4),
        ({"train_batch_size": 4, "mine_hard_negatives": 2, "mining_margin": None}, 12),
        ({"train_batch_size": 8, "label_smoothing": 0.3, "l1_regularization": 0.1}, 8),
        ({"train_batch_size": 8, "adapter_side": "query", "eval_batch_size": 2}, 8),
    ],
    ids=str,
)
def test_training_and_held_out_loss_have_one_scale(even, knobs, documents):
    seen = step(even, **knobs)
    training = [_compared(entry) for entry in seen.log if "loss" in entry]
    assert seen.values("eval_loss") == [pytest.approx(math.log(documents), abs=0.02)] * 2  # before and after
    assert training[0] == pytest.approx(math.log(documents), abs=0.02)


def test_held_out_negatives_that_training_lacks_are_left_out(even, tmp_path):
    rows = [{"anchor": f"want {i}", "positive": f"held out {i}", "negative": ["a", "b", "c"]} for i in range(4)]
    seen = step(even, eval_data_path=write_rows(tmp_path / "heldout.jsonl", rows))
    assert seen.values("eval_loss") == [pytest.approx(math.log(8), abs=0.02)] * 2


def test_rows_that_fill_a_batch_do_not_count_in_the_loss():
    """Two batches of four rows, of which 5 are held out: the mean of both is the mean over the five."""
    reps, heldout = [random_vectors(4, 3), random_vectors(4, 3)], HeldoutRows(first=100, per_batch=2.5)
    labels = [torch.tensor([100, 101, 102, 103]), torch.tensor([7, 104, 3, 20])]
    model = Still()
    loss = ContrastiveLoss(model, temperature=0.5, heldout=heldout, label_smoothing=0.2)
    assert loss.calculate_loss(reps[0], labels[0]).item() == pytest.approx(
        by_numpy(reps[0], 0.5, smoothing=0.2), rel=1e-5
    )  # training counts all
    model.eval()
    found = [loss.calculate_loss(batch, rows).item() for batch, rows in zip(reps, labels, strict=True)]
    (second,) = (
        -torch.log_softmax(logits, dim=1)[1, 1].item()
        for unit in [[torch.nn.functional.normalize(column[0].float(), dim=1) for column in reps[1]]]
        for logits in [unit[0] @ torch.cat(unit[1:]).T / 0.5]
    )
    assert sum(found) / 2 == pytest.approx((4 * by_numpy(reps[0], 0.5) + second) / 5, rel=1e-4)


def test_evaluation_batches_are_as_large_as_training_batches():
    rows = [TrainingRow(f"a{i}", f"p{i}") for i in range(10)]
    sizes = ((4, 1), (64, 1), (4, 2), (64, 3), (64, 99))
    assert [evaluation_batch(10, size, processes) for size, processes in sizes] == [4, 10, 4, 3, 1]
    assert fill_rows(rows, 8, 4, 0) == () and len(fill_rows(rows, 9, 4, 0)) == 3
    assert fill_rows(rows, 1, 64, 0) == tuple(range(10))
    assert fill_rows(rows, 9, 8, 0) == fill_rows(rows, 9, 8, 0) != fill_rows(rows, 9, 8, 1)


def test_a_width_cuts_and_fills():
    rows = [TrainingRow("a", "p", ("x", "y", "z")), TrainingRow("b", "q")]
    found = with_equal_negatives(rows, ["p", "q", "r"], 0, width=2)
    assert found[0].negatives == ("x", "y") and len(found[1].negatives) == 2 and "q" not in found[1].negatives
    assert with_equal_negatives(rows, ["p"], 0, width=0)[0].negatives == ()


@pytest.mark.parametrize("masks", [True, False])
def test_a_row_alone_gets_a_second_row_that_does_not_answer_it(masks):
    """The last of five rows has the document of the first, which is the anchor of the second."""
    rows = [TrainingRow(*pair) for pair in (("a", "p"), ("p", "q"), ("c", "r"), ("d", "s"), ("e", "p"))]
    mask = KnownPositives(rows).mask

    def answers(one: int, other: int) -> bool:
        found = mask(torch.tensor([one, other]))
        return bool(found[0, 1] or found[1, 0])

    class InOrder:
        batch_size = 2

        def __iter__(self):
            return iter([[0, 1], [2, 3], [4]])

    last = list(EpochBatches(InOrder(), None, answers=answers if masks else None))[-1]
    assert last == ([4, 2] if masks else [4, 0])


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
