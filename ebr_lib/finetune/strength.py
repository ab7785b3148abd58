"""How strongly a trained adapter is applied: from 0, the model that training began with, to 1, as it was trained.

Between the two, models often rank better than at either end and forget less of what they were not trained on (WiSE-FT,
Wortsman et al. 2022, arXiv 2109.01903). The strength is chosen on one half of the held-out queries; the other half says
how good the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebr_lib.finetune.heldout import GroupMeans, HeldoutTask
from ebr_lib.finetune.processes import from_first_process
from ebr_lib.finetune.split import seeded
from ebr_lib.logs import logger
from ebr_lib.model.adapters import adapter_weights, set_adapter_weights
from ebr_lib.names import LOWER_IS_BETTER, METRICS
from ebr_lib.tables import make_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from ebr_lib.arrays import Floats
    from ebr_lib.finetune.trainer import EbrTrainer

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST = 50
"""Queries per half that can choose among five strengths."""

Mask = NDArray[np.bool_]
Values = Mapping[str, "Floats"]
"""Metric to one value per held-out query."""

Both = tuple[GroupMeans, GroupMeans]
"""The means of the queries that choose, and of those that report with the guard's; empty where nothing is measured."""


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


def halves_of(task: HeldoutTask, seed: int, split: bool = True) -> Halves:
    """Split the queries in halves, each with as many `seen` ones, by the seed and the texts; or all choose and report.

    :param split: split them if they are enough.
    """
    count = len(task.queries)
    if not split or count < 2 * FEWEST:
        return Halves(np.ones(count, dtype=np.bool_), np.ones(count, dtype=np.bool_))
    choosing = np.zeros(count, dtype=np.bool_)
    order = sorted(range(count), key=lambda query: (task.seen[query], seeded(seed, task.queries[query])))
    choosing[order[::2]] = True
    logger.info(
        "验证查询分两半 held-out queries: %d choose the best step and the adapter's strength, %d report",
        choosing.sum(),
        (~choosing).sum(),
    )
    return Halves(choosing, ~choosing)


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


def settle_strength(
    trainer: EbrTrainer,
    first: Both,
    measured: Callable[..., Both],
    halves: Halves | None,
    *,
    strength: float | Literal["auto"],
    best_metric: str,
    guard_tolerance: float,
) -> tuple[float, GroupMeans, dict[str, DataFrame]]:
    """Apply the trained adapter as strongly as `strength` says, or as the held-out queries and the guard choose.

    :param first: what the model measured before training.
    :param measured: what it measures now; `known` are the means of the queries, if training has measured them.
    :return: the strength, the means that are reported, and a table, where several strengths were measured.
    """
    end = adapter_weights(trainer.model)

    def apply(share: float) -> None:
        set_adapter_weights(trainer.model, at_strength(trainer.start, end, share))

    if strength != "auto" or not first[1]:
        share = 1.0 if strength == "auto" else float(strength)
        apply(share)
        return share, measured(known=trainer.measured_best if share == 1 else None)[1], {}
    found = {0.0: first}
    for share in (halves.strengths if halves else STRENGTHS)[1:]:
        apply(share)
        found[share] = measured()
    metric = metric_to_choose_by(best_metric)
    chosen = from_first_process(_choose(found, metric, guard_tolerance))
    apply(chosen)
    by = f"best {metric} of {halves.choosing.sum()} held-out queries" if halves else "the largest that the guard allows"
    logger.info("适配器强度 adapter strength: %g (%s)", chosen, by)
    return chosen, found[chosen][1], {"strengths": _strengths_table(chosen, halves, found)}


def _choose(found: Mapping[float, Both], metric: str, tolerance: float) -> float:
    """The best strength of those that the guard allows; without held-out queries the largest."""
    guards = {strength: means["guard"]["ndcg@10"] for strength, (_, means) in found.items() if "guard" in means}
    allowed = [strength for strength in found if not guards or guards[strength] >= guards[0.0] - tolerance]
    if refused := sorted(found.keys() - set(allowed)):
        shown = ", ".join(f"{strength:g} ({guards[strength]:.4f})" for strength in refused)
        advice = "回放或 drift_weight 可减少遗忘 replay_data_path or drift_weight forgets less"
        logger.warning("防遗忘集不允许的强度 the guard refuses: %s, from %.4f before; %s", shown, guards[0.0], advice)
    means = {strength: found[strength][0]["all"][metric] for strength in allowed if found[strength][0]}
    return best_strength(means) if means else max(allowed)


def _strengths_table(chosen: float, halves: Halves | None, found: Mapping[float, Both]) -> DataFrame:
    """Each metric at each strength, on the queries that choose, on those that report, and on the guard."""
    names = () if halves is None else ("choosing", "reporting") if halves.split else ("all",)
    groups = [
        (name, strength, both[number]["all"])
        for number, name in enumerate(names)
        for strength, both in sorted(found.items())
    ]
    groups += [("guard", strength, both[1]["guard"]) for strength, both in sorted(found.items()) if "guard" in both[1]]
    rows = [
        (side, int(means["queries"]), strength, *(means[name] for name in METRICS), "← saved" * (strength == chosen))
        for side, strength, means in groups
    ]
    title = "适配器强度 adapter strengths: 0 is the model before training, 1 the adapter as it was trained"
    return make_table(title, ("half", "queries", "strength", *METRICS, ""), rows)
