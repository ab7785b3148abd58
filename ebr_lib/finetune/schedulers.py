"""The learning-rate schedulers: transformers' names, which follow the metric, and the settings they need."""

from __future__ import annotations

from typing import Any, Literal

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
FOLLOW_THE_METRIC = ("reduce_lr_on_plateau", "greedy")
NO_WARM_UP = (*FOLLOW_THE_METRIC, "constant")
LOWEST_RATE = 0.1  # share of the peak learning rate, where a scheduler has a floor
# evaluations in a row without a gain that are tolerated; a run has too few for the library's ten
STALLS = 2


def scheduler_extras(name: str, steps: int, epochs: float, learning_rate: float, rises: bool) -> dict[str, Any]:
    """Settings that transformers' scheduler of that name requires, or that tell it apart from a similar one.

    :param rises: whether a higher metric is better, for schedulers that follow it.
    """
    if name == "cosine_with_restarts":
        return {"num_cycles": max(2, round(epochs))}  # the library's one is plain cosine
    if name == "polynomial":
        return {"power": 2.0, "lr_end": 0.0}  # the library's 1 is linear, and its end above a rate of 1e-7
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        return {"min_lr_rate": LOWEST_RATE}
    if name in FOLLOW_THE_METRIC:
        follow = {"mode": "max" if rises else "min", "patience": STALLS}
        limits = {"min_lr": LOWEST_RATE * learning_rate, "max_lr": learning_rate}  # the knob is the peak
        return follow | (limits if name == "greedy" else {})
    if name == "warmup_stable_decay":
        return {"num_decay_steps": max(1, steps // 10)}
    return {}
