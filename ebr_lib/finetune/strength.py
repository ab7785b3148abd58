"""How strongly a trained adapter is applied: from 0, the model that training began with, to 1, as it was trained.

Between the two, models often rank better than at either end and forget less of what they were not trained on (WiSE-FT,
Wortsman et al. 2022, arXiv 2109.01903). The strength is chosen on one half of the held-out queries; the other half says
how good the model is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebr_lib.finetune.heldout import GroupMeans, HeldoutTask
from ebr_lib.names import LOWER_IS_BETTER, METRICS
from ebr_lib.tables import make_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from ebr_lib.arrays import Floats

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST = 50
"""Queries per half that can choose among five strengths."""

Mask = NDArray[np.bool_]
Values = Mapping[str, "Floats"]
"""Metric to one value per held-out query."""


Both = tuple[GroupMeans, GroupMeans]
"""The means of the queries that choose and of those that report."""


class Halves(NamedTuple):
    """Held-out queries that choose (the best step, the strength), and those that report; each of shape (queries,).

    Too few queries are not split: all choose, between 0 and 1 only, and all report.
    """

    choosing: Mask
    reporting: Mask

    @property
    def split(self) -> bool:
        """Whether other queries report than choose."""
        return not bool((self.choosing & self.reporting).any())

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths to choose from."""
        return STRENGTHS if self.split else (0.0, 1.0)


def halves_of(task: HeldoutTask, seed: int) -> Halves:
    """Split the queries in halves, each with as many `seen` ones; the seed and the texts decide."""

    def order(number: int) -> tuple[bool, bytes]:
        text = task.queries[number].encode("utf-8", "surrogatepass")
        return task.seen[number], hashlib.blake2b(text, digest_size=8, salt=str(seed).encode()[:16]).digest()

    count = len(task.queries)
    if count < 2 * FEWEST:
        return whole(task)
    choosing = np.zeros(count, dtype=np.bool_)
    choosing[sorted(range(count), key=order)[::2]] = True
    return Halves(choosing, ~choosing)


def whole(task: HeldoutTask) -> Halves:
    """All queries choose and report."""
    return Halves(np.ones(len(task.queries), dtype=np.bool_), np.ones(len(task.queries), dtype=np.bool_))


def at_strength(start: Mapping[str, Tensor], end: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Adapter weights between those at the start of training and those at its end, exact at 0 and 1.

    A new adapter's B starts at 0. Scaling it scales the change of the model, as scaling alpha would, and alpha stays
    the whole number that it was. DoRA's magnitudes, and all weights of an adapter that was trained further, are
    interpolated.
    """
    import torch

    if strength in {0.0, 1.0}:
        return dict(end if strength else start)
    is_new = not any(weight.any() for name, weight in start.items() if ".lora_B" in name)
    return {
        name: weight if is_new and ".lora_A" in name else torch.lerp(start[name], weight, strength)
        for name, weight in end.items()
    }


def metric_to_choose_by(best_metric: str) -> str:
    """The held-out loss depends on the temperature, which a strength changes: nDCG@10 replaces it."""
    return "ndcg@10" if best_metric == LOWER_IS_BETTER else best_metric


def best_strength(means: Mapping[float, float]) -> float:
    """The strength with the highest mean; of equal ones the smallest, but 1 where it is as good as a lone 0."""
    if set(means) == {0.0, 1.0}:
        return float(means[1.0] >= means[0.0])
    return max(sorted(means), key=means.__getitem__)


def strengths_table(chosen: float, halves: Halves | None, found: Mapping[float, tuple[Both, GroupMeans]]) -> DataFrame:
    """Each metric at each strength, on the queries that choose, on those that report, and on the guard.

    :param found: strength to the means on both halves, and those of the guard.
    """
    names = () if halves is None else ("choosing", "reporting") if halves.split else ("all",)
    groups = [
        (name, strength, both[number]["all"])
        for number, name in enumerate(names)
        for strength, (both, _) in sorted(found.items())
    ]
    groups += [("guard", strength, guard["guard"]) for strength, (_, guard) in sorted(found.items()) if guard]
    rows = [
        (
            side,
            int(means["queries"]),
            strength,
            *(means[metric] for metric in METRICS),
            "← saved" * (strength == chosen),
        )
        for side, strength, means in groups
    ]
    title = "适配器强度 adapter strengths: 0 is the model before training, 1 the adapter as it was trained"
    return make_table(title, ("half", "queries", "strength", *METRICS, ""), rows)
