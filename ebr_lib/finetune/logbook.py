"""The training log, the loss curve, and warnings when the loss goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ebr_lib.finetune.doctor import FEW_ROWS, DoctorReport
from ebr_lib.logs import logger
from ebr_lib.names import FULL_PRESET, LOWER_IS_BETTER, SMALL_DATA_PRESET, STRONG_PRESET

if TYPE_CHECKING:
    from ebr_lib.finetune.outputs import FinetuneResult


class JsonLinesLog(TrainerCallback):
    """Appends log entries and evaluations as JSON lines; a resumed run drops those that it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the entries of steps that will be repeated."""
        if not state.is_world_process_zero:
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step and state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Append one entry; a number that is not finite becomes null."""
        if not state.is_world_process_zero:
            return
        bad = {name: None for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
        entry = {"step": state.global_step, **logs, **bad}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def log_result(path: Path, result: FinetuneResult) -> None:
    """Append what was saved, and what it measures."""
    names = ("temperature", "adapter_strength", "before", "after")
    with path.open("a", encoding="utf-8") as file:
        file.write(_line({"step": result.steps} | {name: getattr(result, name) for name in names}))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, without a line that a kill cut short."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def draw_curve(log: Path, picture: Path, metric: str, *, best_step: int | None = None) -> None:
    """Draw training loss, held-out loss and held-out metric over the steps, and mark the step whose weights are kept.

    :param best_step: that step, if there is one.
    """
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
    evaluated = [(e["step"], e[f"eval_{metric}"]) for e in entries if isinstance(e.get(f"eval_{metric}"), float)]
    if evaluated and metric != LOWER_IS_BETTER:
        right = left.twinx()
        right.plot(*zip(*evaluated, strict=True), "s-", color="tab:green", label=f"held-out {metric}", markersize=4)
        right.set_ylabel(metric)
    if best_step is not None:
        left.axvline(best_step, color="0.4", linestyle=":", label=f"best step {best_step}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture)


def _compared(entry: Mapping[str, Any]) -> Any:
    """The training loss on the scale of the held-out loss: without what L1 and label smoothing add."""
    return entry.get("contrastive", entry.get("loss"))


def causes_of_nan(learning_rate: float, temperature: float | str, fp16: bool) -> list[str]:
    """Causes of numbers too large for their type, and what to do."""
    causes = [
        f"学习率 / learning_rate {learning_rate:g}: lower it",
        f"温度 / temperature {temperature}: raise it",
    ]
    return [*causes, "半精度 / fp16: train in bf16, or in neither"] if fp16 else causes


class LossWatch(TrainerCallback):
    """Warns once each when the loss is not finite, has hardly any negatives, falls to 0 early, or rises on held-out
    rows alone.

    :ivar causes_of_nan: added when the temperature is settled.
    """

    collapsed_below = 1e-3
    mostly_masked = 0.5

    def __init__(self, report: DoctorReport, learning_rate: float, trainable_parameters: int) -> None:
        self.report, self.learning_rate, self.trainable_parameters = report, learning_rate, trainable_parameters
        self.causes_of_nan: Sequence[str] = ()
        self.warned: set[str] = set()
        self.train: list[float] = []
        self.masked: list[float] = []
        self.heldout: list[tuple[float, float]] = []  # (held-out loss, training loss then)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Note the losses; warn of trouble that was not logged yet."""
        if "loss" in logs:
            self.train.append(float(_compared(logs)))
        if "masked_share" in logs:
            self.masked.append(float(logs["masked_share"]))
        if "eval_loss" in logs and self.train:
            self.heldout.append((float(logs["eval_loss"]), self.train[-1]))
        trouble = self._trouble()
        if trouble and trouble[0] not in self.warned and state.is_world_process_zero:
            name, seen, causes = trouble
            self.warned.add(name)
            logger.warning("%s / %s. 可能原因 likely causes: %s", name, seen, "; ".join(causes))

    def _trouble(self) -> tuple[str, str, Sequence[str]] | None:
        """What is wrong, in Chinese; what was observed; and likely causes."""
        if self.train and not math.isfinite(self.train[-1]):
            return "损失不是有限数", f"the training loss is {self.train[-1]}", self.causes_of_nan
        masked = sum(self.masked[-2:]) / max(1, len(self.masked[-2:]))
        if masked >= self.mostly_masked:
            seen = f"{masked:.0%} of the negatives are masked, so a low loss ({self.train[-1]:.2g}) means nothing"
            return "负例大多被屏蔽", seen, [self._cause_of_masking()]
        if len(self.train) >= 2 and max(self.train[-2:]) < self.collapsed_below:
            seen = f"the training loss fell to {self.train[-1]:.2g}: the model learns nothing more"
            return "损失接近零", seen, self.causes()
        (first, train), (second, _), (third, train_now) = ([(0.0, 0.0)] * 3 + self.heldout)[-3:]
        if len(self.heldout) >= 3 and first < second < third and train > train_now:
            return "过拟合", "held-out loss rises while training loss falls", self.causes()
        return None

    def causes(self) -> list[str]:
        """Causes of a loss near 0 that the run's numbers support, each with the preset that helps."""
        rows, duplicates, causes = self.report.rows, self.report.duplicate_share, []
        if rows < FEW_ROWS:
            causes.append(f"样本太少 / only {rows} training rows ({SMALL_DATA_PRESET})")
        if duplicates > 0.2:
            causes.append(f"重复样本 / {duplicates:.0%} of the rows are duplicates: remove them")
        if self.learning_rate > 3e-4:
            causes.append(f"学习率偏高 / learning rate {self.learning_rate:g} ({STRONG_PRESET})")
        if (per_row := self.trainable_parameters / rows) > 1000:
            causes.append(f"参数过多 / {per_row:,.0f} trainable parameters per row: lower lora_r ({FULL_PRESET})")
        return causes or ["the data may be too easy: add hard negatives"]

    def _cause_of_masking(self) -> str:
        return (
            f"批内文档大多是同批 anchor 的已知正例 / most documents of a batch are known positives of its anchors: the "
            f"{self.report.rows:,} rows have {self.report.documents:,} different documents and "
            f"{self.report.anchors:,} different anchors; give pairs of more different texts, hard negatives, or a "
            "larger batch"
        )
