"""The learning rate against formulas, scheduler by scheduler."""

from __future__ import annotations

import logging
import math
from itertools import combinations
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from ebr_lib.errors import ConfigError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.schedulers import FOLLOW_THE_METRIC, Scheduler, scheduler_extras
from ebr_lib.finetune.setup import training_arguments
from tests.finetune.conftest import step


def scheduler_of(name: str, epochs: float, steps: int, warmup: int, *, rises: bool = True, rate: float = 1e-3):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=rate)
    return optimizer, get_scheduler(name, optimizer, warmup, steps, scheduler_extras(name, steps, epochs, rate, rises))


def rates_of(name: str, epochs: float, steps: int = 40, warmup: int = 10) -> list[float]:
    """A scheduler's rates, as shares of the peak, for a metric that falls after each step."""
    optimizer, scheduler = scheduler_of(name, epochs, steps, warmup)
    rates = []
    for number in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-3)
        optimizer.step()
        scheduler.step(*([-float(number)] if name in FOLLOW_THE_METRIC else []))
    return rates


BY_HAND = {  # of the share of the steps that is over, warm-up left out
    "linear": lambda t: 1 - t,
    "polynomial": lambda t: (1 - t) ** 2,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "cosine_with_restarts": lambda t: (1 + math.cos(math.pi * (2 * t % 1))) / 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_rate_is_that_of_the_formula(name):
    """A quarter of 12 steps up from 0, then as the formula says."""
    wanted = [i / 3 if i < 3 else BY_HAND[name]((i - 3) / 9) for i in range(12)]
    assert rates_of(name, epochs=2, steps=12, warmup=3) == pytest.approx(wanted)


def test_a_training_steps_its_scheduler(plain):
    """Two epochs of six batches: a quarter of the steps warms up."""
    seen = step(plain, lr_scheduler_type="polynomial", num_epochs=2, warmup_ratio=0.25)
    wanted = [2e-3 * (i / 3 if i < 3 else BY_HAND["polynomial"]((i - 3) / 9)) for i in range(12)]
    assert seen.values("learning_rate") == pytest.approx(wanted)


def test_no_two_schedulers_are_the_same():
    rates = {name: rates_of(name, epochs=2) for name in get_args(Scheduler)}
    alike = [(a, b) for a, b in combinations(rates, 2) if rates[a] == pytest.approx(rates[b], rel=1e-3)]
    assert len(rates) == 12 and not alike


@pytest.mark.parametrize(
    ("epochs", "restarts"), [(0.5, [25]), (1, [25]), (2, [25]), (3, [20, 30]), (5, [16, 22, 28, 34])]
)
def test_the_rate_rises_again_once_per_epoch(epochs, restarts):
    """30 steps after 10 of warm-up, in as many cycles as epochs, but at least two."""
    rates = rates_of("cosine_with_restarts", epochs)
    risen = [i for i in range(11, 40) if rates[i] > rates[i - 1]]
    assert risen == restarts
    assert [rates[i] for i in risen] == pytest.approx([1.0] * len(restarts))


def test_a_polynomial_takes_any_rate():
    optimizer, _ = scheduler_of("polynomial", 1, 10, 0, rate=1e-8)
    assert optimizer.param_groups[0]["lr"] == 1e-8


@pytest.mark.parametrize(
    ("name", "falls"), [("reduce_lr_on_plateau", [1, 1, 0.1, 0.1, 0.1, 0.1]), ("greedy", [1, 1, 0.95, 0.95, 0.95, 1])]
)
def test_a_scheduler_that_follows_the_metric_lowers_the_rate_when_it_stalls(plain, name, falls):
    scores = iter([0.1, 0.2, 0.3, *[0.25] * 3, *[0.3 + i / 100 for i in range(1, 99)]])

    def scripted(trainer):
        trainer.evaluator = lambda model, **kwargs: {"ndcg@10": next(scores)}

    knobs = {"eval_ratio": 0.25, "eval_steps": 1, "num_epochs": 3, "lr_scheduler_type": name}
    rates = step(plain, change=scripted, **knobs).values("learning_rate")
    # evaluations 1 to 3 rise, 4 to 6 do not: the third in a row changes the rate of the next step; 7 to 9 rise again
    assert rates[:4] == pytest.approx([2e-3] * 4)
    assert rates[4:10] == pytest.approx([2e-3 * share for share in falls])


@pytest.mark.parametrize("name", FOLLOW_THE_METRIC)
def test_a_loss_stalls_when_it_no_longer_falls(name):
    for losses, lower in (([1.0, 0.9, 0.8, 0.7, 0.6], False), ([1.0, 1.1, 1.2, 1.3, 1.4], True)):
        optimizer, scheduler = scheduler_of(name, 1, 5, 0, rises=False, rate=2e-4)
        for loss in losses:
            scheduler.step(loss)
        assert (optimizer.param_groups[0]["lr"] < 2e-4) is lower
        assert optimizer.param_groups[0]["lr"] <= 2e-4


@pytest.mark.parametrize("name", FOLLOW_THE_METRIC)
def test_a_scheduler_that_follows_the_metric_needs_held_out_rows(name):
    with pytest.raises(ConfigError, match=f"lr_scheduler_type: {name} "):
        FinetuneConfig.resolve({"lr_scheduler_type": name, "eval_ratio": 0.0})


@pytest.mark.parametrize("name", [*FOLLOW_THE_METRIC, "constant"])
def test_a_scheduler_without_warm_up_warns_of_the_knob(tmp_path, caplog, name):
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        config = FinetuneConfig(lr_scheduler_type=name, warmup_ratio=0.2)
        training_arguments(config, tmp_path, rows=10, evaluate=True)
    assert any("warmup_ratio" in line and name in line for line in caplog.messages)
