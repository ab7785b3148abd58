"""Which weights are the best, and that nothing but a finite number is better."""

from __future__ import annotations

from ebr_lib.finetune.callbacks import KeepBest


def test_keep_best_counts_as_documented():
    keeper = KeepBest("ndcg@10", patience=2, threshold=0.01, folder="unused")
    values = [0.5, 0.505, 0.52, 0.52, 0.51]
    assert [keeper.offer(v, i) for i, v in enumerate(values)] == [True, False, True, False, False]
    assert (keeper.best, keeper.best_step, keeper.waited) == (0.52, 2, 2)
    loss = KeepBest("loss", patience=1, threshold=0.0, folder="unused")
    assert [loss.offer(v, i) for i, v in enumerate([2.0, 1.0, 1.5])] == [True, True, False]


def test_a_value_that_is_not_finite_is_never_better():
    keeper = KeepBest("loss", patience=0, threshold=0.0, folder="unused")
    values = [0.5, float("nan"), 9.0, 0.4, -float("inf")]
    assert [keeper.offer(v, i) for i, v in enumerate(values)] == [True, False, False, True, False]
    assert (keeper.best, keeper.best_step, keeper.waited) == (0.4, 3, 1)
    first = KeepBest("ndcg@10", patience=0, threshold=0.0, folder="unused")
    assert [first.offer(v, i) for i, v in enumerate([float("nan"), 0.1, float("inf")])] == [False, True, False]
    assert (first.best, first.waited) == (0.1, 1)
