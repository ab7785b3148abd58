"""Batches: every row once, full, as many documents as can be; and the mask of known positives."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import normalised
from ebr_lib.finetune.batches import BalancedBatchSampler, KnownPositives, _numbered, _Swaps, deal, keep_anchors_apart
from ebr_lib.finetune.dataset import EpochBatches


def repeated(batches, keys) -> int:
    """Rows whose key another row of their batch has."""
    return sum(len(batch) - len({keys[row] for row in batch}) for batch in batches)


def fewest_repeats(documents, batch_size) -> int:
    """Rows of a document beyond the number of batches, and documents that a short last batch has no room for."""
    batches = -(-len(documents) // batch_size)
    counts = np.unique(documents, return_counts=True)[1]
    room = len(documents) - (batches - 1) * batch_size
    return sum(max(0, c - batches) for c in counts) + max(0, sum(counts >= batches) - room)


def test_rows_are_dealt_like_cards():
    # three batches of 2: document 0 in each, so that 1, 2 and 3 have one each
    batches = list(BalancedBatchSampler([0, 0, 0, 1, 2, 3], range(6), batch_size=2))
    assert sorted(len(set(batch) & {0, 1, 2}) for batch in batches) == [1, 1, 1]
    assert sorted(map(len, batches)) == [2, 2, 2]
    # 5 rows of one document in 2 batches cannot but repeat
    assert repeated(BalancedBatchSampler([7] * 5, range(5), batch_size=3), [7] * 5) == 3


def best_by_brute_force(documents, batch_size) -> int:
    orders = itertools.permutations(range(len(documents)))
    cuts = range(0, len(documents), batch_size)
    return min(repeated([order[i : i + batch_size] for i in cuts], documents) for order in orders)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 2))
def test_no_dealing_repeats_fewer_documents(documents, batch_size, seed):
    sampler = BalancedBatchSampler(documents, range(len(documents)), batch_size=batch_size, seed=seed)
    wanted = best_by_brute_force(documents, batch_size)
    assert repeated(sampler, documents) == wanted == fewest_repeats(documents, batch_size)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=120),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_every_row_once_in_full_batches_with_fewest_repeats(rows, batch_size, epoch, processes):
    documents, anchors = [d for d, _ in rows], [a for _, a in rows]
    sampler = BalancedBatchSampler(documents, anchors, batch_size=batch_size, processes=processes)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert sorted(itertools.chain(*batches)) == list(range(len(rows)))
    gathered = [list(itertools.chain(*batches[i : i + processes])) for i in range(0, len(batches), processes)]
    assert repeated(gathered, documents) == fewest_repeats(documents, batch_size * processes)


@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_no_row_is_alone_in_its_batch(batch_size):
    rows = 6 + 1
    batches = EpochBatches(BalancedBatchSampler(range(rows), range(rows), batch_size=batch_size), None)
    for epoch in range(5):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches) == 6 // batch_size + 1
        assert all(2 <= len(set(batch)) <= batch_size for batch in found)
        assert {row for batch in found for row in batch} == set(range(rows))
        assert sum(map(len, found)) == rows + 1


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (5, 1), (8, 4), (6, 4)])
def test_other_batches_stay_as_they_are(rows, batch_size):
    sampler = BalancedBatchSampler(range(rows), range(rows), batch_size=batch_size)
    assert list(EpochBatches(sampler, None)) == list(sampler)


def repeats(seats, keys) -> int:
    """Rows whose key another row of their seat has."""
    return len(seats) - len(set(zip(seats.tolist(), keys.tolist(), strict=True)))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=120),
    st.integers(2, 20),
    st.integers(0, 5),
)
def test_keeping_anchors_apart_costs_nothing(rows, batch_size, seed):
    documents, anchors = (np.unique(side, return_inverse=True)[1] for side in zip(*rows, strict=True))
    batch_of = deal(documents, batch_size, np.random.default_rng(seed))
    before = batch_of.copy()
    keep_anchors_apart(batch_of, documents, anchors, np.random.default_rng(seed))

    assert np.bincount(batch_of).tolist() == np.bincount(before).tolist()
    assert repeats(batch_of, documents) == repeats(before, documents)
    assert repeats(batch_of, anchors) <= repeats(before, anchors)


@pytest.mark.parametrize("seed", range(3))
def test_anchors_with_a_row_for_each_batch_are_kept_apart(seed):
    rng = np.random.default_rng(seed)
    documents, anchors = np.arange(24), rng.permutation(24) // 4
    batch_of = deal(documents, 6, rng)
    assert repeats(batch_of, anchors) > 0
    keep_anchors_apart(batch_of, documents, anchors, rng)
    assert repeats(batch_of, anchors) == 0


@pytest.mark.parametrize("seed", range(3))
def test_anchors_are_kept_apart_where_every_batch_has_every_document(seed):
    """Only rows of the same document may change places then: one in fifty, too few to be met by chance."""
    rng = np.random.default_rng(seed)
    documents, anchors = np.arange(1000) // 20, rng.permutation(1000) // 8
    batch_of = deal(documents, 50, rng)
    before = repeats(batch_of, anchors)
    keep_anchors_apart(batch_of, documents, anchors, rng)
    assert repeats(batch_of, documents) == 0
    assert repeats(batch_of, anchors) < 0.1 * before


def test_the_counts_of_a_batch_follow_its_swaps():
    rng = np.random.default_rng(0)
    documents, anchors = rng.integers(20, size=60), rng.integers(10, size=60)
    batch_of = deal(_numbered(documents), 10, rng)
    before, swaps = batch_of.copy(), _Swaps(batch_of, documents, anchors)
    for row in range(60):
        swaps.move_away(row, rng.random(24))
    assert (batch_of != before).any()
    for counted, keys in ((swaps.document_at, documents), (swaps.anchor_at, anchors)):
        assert +counted == Counter(zip(batch_of.tolist(), keys.tolist(), strict=True))


def test_no_rows_give_no_batches():
    sampler = BalancedBatchSampler([], [], batch_size=4)
    assert (len(sampler), list(sampler)) == (0, [])
    assert KnownPositives([]).columns.shape == (0, 1)


def test_siblings_stand_in_different_batches():
    anchors = np.arange(3000) // 3
    documents = np.random.default_rng(0).permutation(3000) // 2
    batches = list(BalancedBatchSampler(documents, anchors, batch_size=64))
    assert (repeated(batches, documents), repeated(batches, anchors)) == (0, 0)


def test_a_click_log_keeps_its_rows():
    """Zipf(1.3) documents: the most popular answers a quarter of the queries."""
    documents = np.minimum(np.random.default_rng(0).zipf(1.3, 20_000), 10**6)
    sampler = BalancedBatchSampler(documents, np.arange(20_000), batch_size=128, seed=1)
    batches = list(sampler)
    assert len(set(itertools.chain(*batches))) == 20_000
    random = np.random.default_rng(0).permutation(20_000)[: 156 * 128].reshape(156, 128).tolist()
    assert repeated(batches, documents) == fewest_repeats(documents, 128) < repeated(random, documents)
    share = [sum(documents[batch] == 1) for batch in batches[:-1]]
    assert max(share) - min(share) <= 1


def test_epochs_differ_and_repeat():
    documents, anchors = np.arange(200) % 20, np.arange(200)

    def batches(seed, epoch):
        sampler = BalancedBatchSampler(documents, anchors, batch_size=16, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 1) == batches(0, 1)
    assert batches(0, 1) != batches(0, 2) != batches(1, 2)
    # who meets whom changes, not only the order of batches
    assert set(map(frozenset, batches(0, 1))).isdisjoint(map(frozenset, batches(0, 2)))


def test_every_row_visits_the_last_batch():
    """The short last batch is drawn again each epoch: over epochs it holds any row, and drop_last drops any."""
    sampler = BalancedBatchSampler(np.arange(50) % 25, np.arange(50), batch_size=16, drop_last=True)
    left_out = set()
    for epoch in range(200):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [16, 16, 16] and len(sampler) == 3
        left_out |= set(range(50)) - set(itertools.chain(*batches))
    assert left_out == set(range(50))


def test_a_data_loader_takes_the_sampler():
    sampler = BalancedBatchSampler([3, 3, 9, 9, -1], [0, 1, 2, 3, 4], batch_size=2)
    loader = torch.utils.data.DataLoader(list("abcde"), batch_sampler=sampler, collate_fn="".join)
    assert sorted("".join(loader)) == list("abcde")
    assert [len(batch) for batch in loader] == [2, 2, 1]


# --- known positives ----------------------------------------------------------------------------------------------


def test_mask_by_hand():
    rows = [
        TrainingRow("q0", "d0", ("D1 ", "x")),
        TrainingRow("q1", "d1"),
        TrainingRow("Q0", "d1", ("q1",)),
        TrainingRow("d0", "z"),
    ]
    known = KnownPositives(rows)
    assert known.anchors[0] == known.anchors[2] != known.anchors[1]
    assert known.documents[1] == known.documents[2]
    wanted = [
        #    d0 d1 d1 z | D1 . q1 . | x . . .
        "1110" "1000" "0000",  # q0: d0 and d1, also where d1 was given as its negative
        "0110" "1010" "0000",  # q1: d1, and itself
        "1110" "1000" "0000",  # q0 again
        "1001" "0000" "0000",  # d0: z, and itself
    ]  # fmt: skip
    assert ["".join(map(str, line)) for line in known.mask(torch.arange(4)).int().tolist()] == wanted
    # both ways: where q0 stands as a document, d0 does not call it a negative
    assert known.answers(torch.tensor([known.anchors[3]]), torch.tensor([known.anchors[0]])).item()


texts = st.text("aB 好", min_size=1, max_size=2).filter(lambda t: t.strip())


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.builds(TrainingRow, texts, texts, st.lists(texts, max_size=3).map(tuple)), min_size=1, max_size=12),
    st.data(),
)
def test_mask_is_that_of_a_set(rows, data):
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    known = {(normalised(r.anchor), normalised(r.positive)) for r in rows}
    columns = 1 + max(len(r.negatives) for r in rows)
    texts = [[(rows[i].positive, *rows[i].negatives)[c : c + 1] for i in picked] for c in range(columns)]

    def answers(anchor, document):
        one, other = normalised(anchor), normalised(document)
        return one == other or (one, other) in known or (other, one) in known

    wanted = [[bool(cell) and answers(rows[i].anchor, cell[0]) for column in texts for cell in column] for i in picked]
    assert KnownPositives(rows).mask(torch.tensor(picked)).tolist() == wanted


@pytest.mark.parametrize("negatives", [(), ("n",)])
def test_mask_of_one_row(negatives):
    assert KnownPositives([TrainingRow("a", "b", negatives)]).mask(torch.tensor([0])).tolist() == [
        [True, *[False] * len(negatives)]
    ]
