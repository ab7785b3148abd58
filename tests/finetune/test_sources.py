"""Files in an epoch: shares counted by hand, batches of one file, and files without in-batch negatives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ebr_lib.errors import ConfigError, DataError
from ebr_lib.finetune.signals import ExpectedCounts
from ebr_lib.finetune.sources import (
    Mix,
    MixedBatches,
    own_documents_only,
    rows_per_file,
    without_in_batch_negatives,
)
from tests.finetune.conftest import make_trainer, step, write_rows

FILES = ["data/a.jsonl"] * 60 + ["data/b.jsonl"] * 30 + ["more/c.jsonl"] * 10


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ({}, (60, 30, 10)),
        ({"c.jsonl": 0.4}, (40, 20, 40)),  # the others keep their proportion
        ({"more": 0.1, "data": 0.9}, (60, 30, 10)),
        ({"data": 0.25, "more/c.jsonl": 0.25}, (33, 17, 50)),  # scaled to 1; 33.3 and 16.7 of data's 50
        ({"a.jsonl": 0.01}, (1, 74, 25)),  # 74.25 and 24.75
    ],
)
def test_shares_by_hand(shares, counts):
    assert tuple(rows_per_file(FILES, shares).values()) == counts


def test_shares_that_name_nothing_or_one_file_twice_are_refused():
    with pytest.raises(ConfigError, match=r"shares: d\.jsonl is none of the training files that were read: data/a"):
        rows_per_file(FILES, {"d.jsonl": 0.5})
    with pytest.raises(ConfigError, match=r"data and a\.jsonl both name data/a"):
        rows_per_file(FILES, {"a.jsonl": 0.5, "data": 0.2})
    with pytest.raises(ConfigError, match="leave nothing for the other training files"):
        rows_per_file(FILES, {"a.jsonl": 1.0})


@pytest.mark.parametrize("one_file", [False, True])
def test_an_epoch_has_the_rows_of_its_shares(one_file):
    mix = Mix(FILES, rows_per_file(FILES, {"c.jsonl": 0.45, "a.jsonl": 0.25}), one_file)
    batches = MixedBatches(mix, np.arange(100), np.arange(100), batch_size=8, seed=3)
    epochs = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    for found in epochs:
        assert len(found) == len(batches) == (4 + 4 + 6 if one_file else 13)
        rows = [row for batch in found for row in batch]
        added = len(rows) - 100  # a row that would be alone in its batch gets another of its file
        assert added == (1 if one_file else 0)
        assert Counter(FILES[row] for row in rows) == Counter(
            {"data/a.jsonl": 25 + added, FILES[60]: 30, FILES[90]: 45}
        )
        times = Counter(row for row in rows if row >= 90)
        assert sorted(times.values()) == [4] * 5 + [5] * 5  # 45 = 4 · 10 + 5
        if one_file:
            assert all(len({FILES[row] for row in batch}) == 1 < len(batch) for batch in found)
    assert epochs[0] != epochs[1]
    assert len({row for found in epochs for batch in found for row in batch if row < 60}) > 25  # drawn again
    batches.set_epoch(0)
    assert list(batches) == epochs[0]


@pytest.mark.parametrize("one_file", [False, True])
def test_every_batch_replays_its_share(one_file):
    """Of 8 rows per batch 2 are replayed, so 6 are not: 100 rows in 17 batches, or 10 + 5 + 2 by file."""
    mix = Mix(FILES, rows_per_file(FILES, {}), one_file, replayed=50, share=0.25)
    batches = MixedBatches(mix, np.arange(150) % 70, np.arange(150), batch_size=8, seed=3)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    for found in epochs:
        assert len(found) == len(batches) == 17
        assert all(sum(row >= 100 for row in batch) == 2 and len(batch) <= 8 for batch in found)
        assert sorted(row for batch in found for row in batch if row < 100) == list(range(100))
        assert len({row for batch in found for row in batch if row >= 100}) == 34  # no row twice before all were once
        if one_file:
            assert all(len({FILES[row] for row in batch if row < 100}) == 1 for batch in found)
    assert len({row for found in epochs for batch in found for row in batch}) > 134 and epochs[0] != epochs[1]
    batches.set_epoch(0)
    assert list(batches) == epochs[0]


@pytest.mark.parametrize(
    ("share", "size", "replayed"), [(0.2, 6, 1), (0.01, 6, 1), (0.99, 6, 5), (0.5, 2, 1), (0, 6, 0)]
)
def test_both_kinds_have_room_in_a_batch(share, size, replayed):
    assert Mix(FILES, rows_per_file(FILES, {}), False, replayed=9, share=share).replayed_in(size) == replayed


def test_few_rows_are_replayed_again_and_again():
    mix = Mix(FILES, rows_per_file(FILES, {}), False, replayed=3, share=0.5)
    found = list(MixedBatches(mix, np.arange(103), np.arange(103), batch_size=8, seed=0))
    times = Counter(row for batch in found for row in batch if row >= 100)
    assert sorted(times.values()) == [33, 33, 34]  # four in each of 25 batches


def test_logq_with_replay_by_hand():
    """In batches of 4 with one replayed row: half of 6 rows, and one of 2. Document 1 has 2 · 1/2 + 1/2 places."""
    mix = Mix(["a"] * 6, {"a": 6}, False, replayed=2, share=0.25)
    assert mix.rates(4).tolist() == [0.5] * 8
    assert Mix(["a"] * 6, {"a": 6}, False, replayed=4, share=0.25).rates(64).tolist() == [1.0] * 6 + [4.0] * 4
    documents = np.array([[1], [1], [2], [3], [4], [5], [1], [6]])
    counts, masked = (
        ExpectedCounts(documents, 4, masked=masked, balanced=True, rates=mix.rates(4)) for masked in (False, True)
    )
    assert counts.log_counts.exp().flatten().tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 0.5, 0.5, 1.5, 0.5])
    assert masked.log_own.exp().tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5])
    # over the epoch's two batches, the mean number of each document is its count
    found = list(MixedBatches(mix, documents[:, 0], np.arange(8), batch_size=4, seed=1))
    times = Counter(int(documents[row, 0]) for batch in found for row in batch)
    assert {n: count / len(found) for n, count in times.items()} == {1: 1.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}


def test_names_of_files_without_in_batch_negatives():
    files = ["x/pairs_no_in_batch_neg.jsonl.gz", "x/pairs.jsonl", "x/old_no_in_batch_neg/pairs.jsonl"]
    assert without_in_batch_negatives(files).tolist() == [True, False, True]
    assert without_in_batch_negatives(files[1:2]) is None
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)  # two rows, positives then negatives
    alone = own_documents_only(mask, torch.tensor([True, False]))
    assert alone.int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]


@pytest.fixture
def folder(tmp_path):
    """Two files of 12 and 4 pairs."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("a", 12), ("b", 4)):
        texts = [(f"{name} {i}", f"thing {name} {i}", f"no {name} {i}") for i in range(count)]
        rows = [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in texts]
        write_rows(data / f"{name}.jsonl", rows)
    return data


def test_training_takes_rows_by_share_from_one_file_at_a_time(plain, folder):
    knobs = plain | {"data_path": str(folder), "train_batch_size": 4, "learning_rate": 1e-4}
    seen = step(knobs, one_file_batches=True, shares={"b.jsonl": 0.5}, num_epochs=2)
    assert seen.steps == len(seen.labels) == 8
    assert all(len({label < 12 for label in batch}) == 1 for batch in seen.labels)
    for epoch in (seen.labels[:4], seen.labels[4:]):
        assert sum(label >= 12 for batch in epoch for label in batch) == 8
    assert seen.labels != step(knobs, num_epochs=2).labels


def test_rows_of_such_a_file_are_compared_with_their_own_documents(plain, folder):
    (folder / "b.jsonl").rename(folder / "b_no_in_batch_neg.jsonl")
    knobs = plain | {"data_path": str(folder)}
    for masks in (True, False):
        loss = make_trainer(knobs, mask_known_positives=masks).trainer.loss
        mask = loss.known_positives(torch.tensor([0, 12, 13]))
        assert (~mask).sum(dim=1).tolist() == [5 + (not masks), 1 + (not masks), 1 + (not masks)]
        mask.fill_diagonal_(False)
        assert (~mask)[1].nonzero().flatten().tolist() == [1, 4]  # its positive and its negative
    with pytest.raises(ConfigError, match="bidirectional_loss compares each positive"):
        make_trainer(knobs, bidirectional_loss=True)
    for file in folder.iterdir():
        write_rows(file, [{"anchor": f"{file.stem} {i}", "positive": f"thing {file.stem} {i}"} for i in range(4)])
    with pytest.raises(DataError, match="end in no_in_batch_neg have no negative"):
        make_trainer(knobs)
