"""The guide's cosines are those of its vectors; each knob of the loss bites, whole and in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.errors import ConfigError
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.guide import guide
from tests.finetune.conftest import close, make_trainer, same, step, write_rows


def test_cosines_by_hand():
    rows = [TrainingRow("a", "x", ("y",)), TrainingRow("b", "Y", ("z",)), TrainingRow("A", "z", ("x",))]
    vectors = {text: np.eye(4, dtype=np.float32)[i] for i, text in enumerate(("x", "y", "z"))}
    vectors |= {"a": np.float32([0.6, 0.8, 0, 0]), "b": np.float32([0, 0, 1, 0])}
    encoded = []

    def encode(texts):
        encoded.append([text.lower() for text in texts])
        return np.stack([vectors[text.lower()] for text in texts])

    columns = [[row.anchor for row in rows], [row.positive for row in rows], [row.negatives[0] for row in rows]]
    cosines = guide(columns, KnownPositives(rows), encode, encode)
    assert [sorted(texts) for texts in encoded] == [["a", "b"], ["x", "y", "z"]]  # equal texts once
    found = cosines(torch.tensor([2, 1]))
    #           z    Y | x    z
    wanted = [[0.0, 0.8, 0.6, 0.0], [1.0, 0.0, 0.0, 1.0]]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "knobs",
    [
        {"logq_correction": True},
        {"false_negative_margin": 0.0},
        {"bidirectional_loss": True},
        {"bidirectional_loss": True, "logq_correction": True, "false_negative_margin": 0.0},
        {"matryoshka_dims": [16, 8], "matryoshka_weights": [0.3, 0.1]},
    ],
    ids="+".join,
)
def test_each_knob_bites_and_a_cached_batch_is_the_whole_batch(plain, knobs, tmp_path):
    # one document has 9 of 24 rows: where all are as frequent as each other, logQ changes nothing
    rows = [{"anchor": f"warm {i}", "positive": f"pan {min(i, 15)}"} for i in range(24)]
    plain = plain | {"data_path": write_rows(tmp_path / "uneven.jsonl", rows)}
    off = {"matryoshka_dims": knobs.get("matryoshka_dims", [])}
    whole = step(plain, **knobs)
    assert not close(whole.adapter, step(plain, **off).adapter)
    assert close(step(plain, **knobs, train_batch_size=3, contrastive_batch_size=8).adapter, whole.adapter)
    shares = whole.values("false_negative_share")
    assert all(0 < share < 1 for share in shares) and bool(shares) is ("false_negative_margin" in knobs)


def test_neutral_values_of_these_change_no_bit(plain):
    """A margin that nothing reaches, and weights that are all alike."""
    dims = {"matryoshka_dims": [16, 8]}
    assert same(step(plain, false_negative_margin=1.0).adapter, step(plain).adapter)
    assert close(step(plain, **dims, matryoshka_weights=[1, 1]).adapter, step(plain, **dims).adapter, 1e-6)


def test_another_model_can_be_the_guide(plain, tiny_bert):
    own, other = (
        make_trainer(plain, false_negative_margin=0.1, guide_model=model).trainer.loss.guide(torch.arange(4))
        for model in (None, str(tiny_bert))
    )
    assert own.shape == other.shape == (4, 4) and not torch.allclose(own, other, atol=1e-2)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"guide_model": "x"}, "guide_model judges false_negative_margin"),
        ({"matryoshka_dims": [64, 32], "matryoshka_weights": [1]}, "1 weights for 2 matryoshka_dims"),
        ({"matryoshka_dims": [64], "matryoshka_weights": [0]}, "one has to be above 0"),
        ({"logq_correction": True, "one_file_batches": True}, "logq_correction needs every row once per epoch"),
        ({"matryoshka_dims": [64], "matryoshka_weights": [-1]}, "matryoshka_weights"),
    ],
)
def test_knobs_that_contradict_each_other(knobs, said):
    with pytest.raises(ConfigError, match=said):
        FinetuneConfig(**knobs)
