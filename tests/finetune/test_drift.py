"""Drift is what a hand computes, holds vectors where they were, and is the same in parts, packed, or of queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebr_lib.finetune import drift as drift_module
from ebr_lib.finetune.drift import Drift, make_drift, random_words
from ebr_lib.finetune.losses import ContrastiveLoss
from tests.finetune.conftest import close, make_trainer, same, step
from tests.finetune.test_losses import Still

A_WAY_OFF = [1.0, 1.0]  # cosine 0.7071 to either axis
OFF = 1 - 0.5**0.5


def of_rows(pulled: list[int], words: list[list[float]]) -> Drift:
    place = torch.full((4,), -1)
    place[pulled] = torch.arange(len(pulled))
    texts = torch.tensor([[[1.0, 0.0]] * len(pulled), [[0.0, 1.0]] * len(pulled)]).half()
    return Drift(2, 10.0, place, texts, ["x"] * len(words), torch.tensor(words).half())


def test_drift_by_hand():
    """The anchor of each row was (1, 0), its positive (0, 1); lengths do not count."""
    drift = of_rows([0, 1, 2, 3], [[0.0, 3.0], [3.0, 0.0], [0.0, -1.0]])
    anchors, positives = torch.tensor([[5.0, 0.0], A_WAY_OFF]), torch.tensor([[0.0, 1.0], [0.0, -2.0]])
    found = drift.of([anchors, positives], None, torch.tensor([3, 1]))
    assert found.tolist() == pytest.approx([0.0, 10 * (OFF + 2) / 2], abs=1e-5)
    words = torch.tensor([[0.0, 1.0], A_WAY_OFF])  # those of row 3 are the first again
    more = drift.of([anchors, positives], words, torch.tensor([3, 1])) - found
    assert more.tolist() == pytest.approx([0.0, 10 * OFF], abs=1e-5)


def test_the_mean_is_over_the_rows_that_are_pulled():
    anchors = torch.tensor([A_WAY_OFF, A_WAY_OFF, [1.0, 0.0]])
    found = of_rows([2], [[1.0, 0.0]]).of([anchors], None, torch.tensor([0, 2, 1]))
    assert found.mean().item() == pytest.approx(10 * OFF, abs=1e-5) and found[0] == found[2] == 0
    assert not of_rows([2], [[1.0, 0.0]]).of([anchors], None, torch.tensor([0, 1, 3])).any()


def test_a_sample_is_encoded_and_each_text_once(monkeypatch):
    monkeypatch.setattr(drift_module, "PULLED_ROWS", 3)
    asked: list[str] = []

    def encode(texts):
        asked.extend(texts)
        return np.float32([[len(text), 1.0] for text in texts])

    columns = [["a", "bb", "a", "dddd", "a"], ["x"] * 5]
    drift = make_drift(columns, [encode, encode], ["w", "ww"], encode, compared=2, weight=1.0, seed=0)
    chosen = [row for row in range(5) if drift.place[row] >= 0]
    assert len(chosen) == 3 and asked.count("x") == 1 and len(asked) == len(set(asked))
    assert [drift.texts[0, drift.place[row], 0].item() for row in chosen] == [len(columns[0][row]) for row in chosen]
    assert drift.words_of(3) == ["w", "ww", "w"]


def test_random_words_are_letters_of_the_vocabulary_after_the_prompts(tiny_bert):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = random_words(tokenizer, ["query: ", ""], 4, seed=1)
    assert texts == random_words(tokenizer, ["query: ", ""], 4, seed=1) != random_words(tokenizer, [""], 4, seed=2)
    assert [text.startswith("query: ") for text in texts] == [True, False, True, False]
    words = " ".join(text.removeprefix("query: ") for text in texts).split()
    assert all(word.isalpha() for word in words) and len(set(words)) > 8
    assert not {"[UNK]", "##s"} & set(words)


def test_it_is_added_to_the_loss_and_leaves_the_contrastive_part_alone():
    loss = ContrastiveLoss(Still(), temperature=0.5, drift=of_rows([0, 1], [[0.0, 1.0]]))
    vectors = [[torch.tensor([A_WAY_OFF, [1.0, 0.0]])], [torch.tensor([[0.0, 1.0]] * 2)]]
    labels = torch.tensor([0, 1])
    found = loss._components(loss.calculate_loss(vectors, labels))
    assert found["drift"].item() == pytest.approx(10 * OFF / 4, abs=1e-5)
    plain = ContrastiveLoss(Still(), temperature=0.5).calculate_loss(vectors, labels).item()
    assert loss.contrastive_loss(vectors, labels).item() == pytest.approx(plain, abs=1e-5)
    loss.model.eval()
    assert loss.calculate_loss(vectors, labels).item() == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("knobs", [{}, {"adapter_side": "query"}, {"packed_rows": True}], ids=str)
def test_training_stays_nearer_and_parts_are_the_whole(plain, knobs):
    free, held = step(plain, **knobs), step(plain, **knobs, drift_weight=20.0)
    assert held.values("drift")[0] == pytest.approx(0.0, abs=2e-3)  # nothing has moved at the first step
    assert held.log[1]["loss"] == pytest.approx(held.log[1]["contrastive"] + held.log[1]["drift"], rel=1e-3)
    texts = held.trainer.model.tokenizer.batch_decode(held.batches[0][0][0], skip_special_tokens=True)
    start = make_trainer(plain, **knobs).trainer.model.encode(texts)
    moved = [1 - (run.trainer.model.encode(texts) * start).sum(axis=1).mean() for run in (free, held)]
    assert moved[1] < moved[0] / 2
    parts = step(plain, **knobs, drift_weight=20.0, train_batch_size=3, contrastive_batch_size=8)
    assert close(parts.adapter, held.adapter)


def test_off_is_off(plain):
    assert same(step(plain, drift_weight=0.0).adapter, step(plain).adapter)
