"""What a training run leaves to read: its log, its curve as a picture, and a warning when it goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from ebr_lib.finetune.doctor import FEW_ROWS
from ebr_lib.logs import logger
from ebr_lib.names import FULL_PRESET, SMALL_DATA_PRESET, STRONG_PRESET


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLinesLog(TrainerCallback):
    """Appends every log entry and evaluation as one JSON object; a resumed run drops what it is about to repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the entries of steps that are about to be repeated."""
        if not state.is_world_process_zero:
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step and state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Append one entry; a number that is not finite becomes null."""
        if not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, **{name: _finite(value) for name, value in logs.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a line that a kill cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def draw_curve(log: Path, picture: Path, metric: str) -> None:
    """Draw training loss, evaluation loss and the held-out metric over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = read_log(log)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    for name, label, style in (("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o--")):
        values = [(entry["step"], _compared(entry) if name == "loss" else entry.get(name)) for entry in entries]
        points = [(step, value) for step, value in values if isinstance(value, float)]
        if points:
            left.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    left.set(xlabel="step", ylabel="loss", title="Training")
    left.grid(alpha=0.3)
    right_points = [(e["step"], e[f"eval_{metric}"]) for e in entries if isinstance(e.get(f"eval_{metric}"), float)]
    if right_points and metric != "loss":
        right = left.twinx()
        right.plot(*zip(*right_points, strict=True), "s-", color="tab:green", label=f"held-out {metric}", markersize=4)
        right.set_ylabel(metric)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture)


def _compared(entry: Mapping[str, Any]) -> Any:
    """The training loss that a held-out loss compares with: without what L1 and label smoothing add."""
    return entry.get("contrastive", entry.get("loss"))


@dataclass(frozen=True)
class RunFacts:
    """Numbers of a run that explain why its loss may fall to nothing; anchors and documents are different ones."""

    rows: int
    anchors: int
    documents: int
    duplicate_share: float
    learning_rate: float
    trainable_parameters: int

    def causes(self) -> list[str]:
        """The causes that these numbers support, and the preset that answers them."""
        causes = []
        if self.rows < FEW_ROWS:
            causes.append(f"样本太少 / only {self.rows} training rows ({SMALL_DATA_PRESET})")
        if self.duplicate_share > 0.2:
            causes.append(f"重复样本 / {self.duplicate_share:.0%} of the rows are duplicates: remove them")
        if self.learning_rate > 3e-4:
            causes.append(f"学习率偏高 / learning rate {self.learning_rate:g} ({STRONG_PRESET})")
        per_row = self.trainable_parameters / max(self.rows, 1)
        if per_row > 1000:
            causes.append(f"参数过多 / {per_row:,.0f} trainable parameters a row: lower lora_r ({FULL_PRESET})")
        return causes or ["the data may be too easy: add hard negatives"]

    def masking(self) -> str:
        """Why most negatives of the batches may be masked, and what helps."""
        return (
            f"批内文档大多是同批 anchor 的已知正例 / most documents of a batch are known positives of its anchors: the "
            f"{self.rows:,} rows have {self.documents:,} different documents and {self.anchors:,} different anchors; "
            "give pairs of more different texts, hard negatives, or a larger batch"
        )


def causes_of_nan(learning_rate: float, temperature: float, fp16: bool) -> list[str]:
    """What makes numbers too large for their type, and what to do about it."""
    causes = [
        f"学习率 / learning_rate {learning_rate:g}: lower it",
        f"温度 / temperature {temperature:g}: raise it",
    ]
    return [*causes, "半精度 / fp16: train in bf16, or in neither"] if fp16 else causes


class Trouble(NamedTuple):
    """What is wrong with a loss: its name (Chinese), what is seen of it, and likely causes."""

    name: str
    seen: str
    causes: Sequence[str]


class LossWatch(TrainerCallback):
    """Says, once each, when the loss is not a number, has hardly a negative left, falls to nothing early, or rises on
    held-out rows alone."""

    collapsed_below = 1e-3
    mostly_masked = 0.5

    def __init__(self, facts: RunFacts, causes_of_nan: Sequence[str]) -> None:
        self.facts, self.causes_of_nan = facts, causes_of_nan
        self.said: set[str] = set()
        self.train: list[float] = []
        self.masked: list[float] = []
        self.heldout: list[tuple[float, float]] = []  # (held-out loss, training loss then)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Note the losses; warn when they show trouble that was not said yet."""
        if "loss" in logs:
            self.train.append(float(_compared(logs)))
        if "masked_share" in logs:
            self.masked.append(float(logs["masked_share"]))
        if "eval_loss" in logs and self.train:
            self.heldout.append((float(logs["eval_loss"]), self.train[-1]))
        trouble = self.trouble()
        if trouble and trouble.name not in self.said and state.is_world_process_zero:
            self.said.add(trouble.name)
            logger.warning("%s / %s. 可能原因 likely causes: %s", trouble.name, trouble.seen, "; ".join(trouble.causes))

    def trouble(self) -> Trouble | None:
        """What is wrong, or None."""
        if self.train and not math.isfinite(self.train[-1]):
            return Trouble("损失不是有限数", f"the training loss is {self.train[-1]}", self.causes_of_nan)
        masked = sum(self.masked[-2:]) / max(1, len(self.masked[-2:]))
        if masked >= self.mostly_masked:
            seen = f"{masked:.0%} of the negatives are masked, so a low loss ({self.train[-1]:.2g}) says nothing"
            return Trouble("负例大多被屏蔽", seen, [self.facts.masking()])
        if len(self.train) >= 2 and max(self.train[-2:]) < self.collapsed_below:
            seen = f"the training loss fell to {self.train[-1]:.2g}: the model learns nothing more from it"
            return Trouble("损失接近零", seen, self.facts.causes())
        if len(self.heldout) >= 3 and _overfits(self.heldout[-3:]):
            return Trouble("过拟合", "held-out loss rises while training loss falls", self.facts.causes())
        return None


def _overfits(points: Sequence[tuple[float, float]]) -> bool:
    heldout, train = zip(*points, strict=True)
    return heldout[0] < heldout[1] < heldout[2] and train[0] > train[2]
