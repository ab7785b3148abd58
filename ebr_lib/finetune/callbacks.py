"""Callbacks of a training run: best weights, signals, NaN, checkpoints at the end of an epoch, the progress bar."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ebr_lib.files import written_whole
from ebr_lib.finetune.processes import from_first_process, is_first_process
from ebr_lib.finetune.saving import all_finite, is_finite
from ebr_lib.logs import logger
from ebr_lib.model.adapters import ADAPTER_FILE, adapter_weights, read_adapter, set_adapter_weights
from ebr_lib.names import LOWER_IS_BETTER

BEST_FOLDER = "best"


class KeepBest(TrainerCallback, ExportableState):
    """Keeps the best adapter on disk, exactly, and stops the run when it no longer gets better.

    An evaluation is better when the metric improved by more than `threshold`; NaN never is. After `patience`
    evaluations in a row that are not better the run stops; 0 never stops it.
    """

    def __init__(self, metric: str, patience: int, threshold: float, folder: str) -> None:
        self.metric, self.patience, self.threshold, self.folder = metric, patience, threshold, folder
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, in the library's format."""
        names, kept = ("metric", "patience", "threshold", "folder"), ("best", "best_step", "waited")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in kept},
        }

    def offer(self, value: float, step: int) -> bool:
        """Note an evaluation; return whether it is the best so far."""
        sign = -1 if self.metric == LOWER_IS_BETTER else 1
        is_better = self.best is None or sign * (value - self.best) > self.threshold
        if not (is_better and math.isfinite(value)):
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = value, step, 0
        return True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best so far; stop the run when patience runs out."""
        if self.offer(metrics[f"eval_{self.metric}"], state.global_step) and state.is_world_process_zero:
            model = kwargs["model"]
            with written_whole(Path(self.folder) / ADAPTER_FILE) as new:
                save_file(adapter_weights(getattr(model, "module", model)), new)
        self._stop_at_end_of_patience(control)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at once if the resumed run had stopped early; its folder may have moved since."""
        self.folder = str(Path(args.output_dir) / BEST_FOLDER)
        self._stop_at_end_of_patience(control)

    def _stop_at_end_of_patience(self, control: Any) -> None:
        if self.patience and self.waited >= self.patience:
            logger.info("早停 early stopping: %d evaluations without a better %s", self.waited, self.metric)
            control.should_training_stop = True

    def restore(self, model: SentenceTransformer) -> None:
        """Put the best weights back into the model, bit for bit; the first process wrote them and shares them."""
        if self.best is not None:
            weights = read_adapter(Path(self.folder)) if is_first_process() else None
            set_adapter_weights(model, from_first_process(weights))
            logger.info("最佳权重 best weights: step %d, %s %.4f", self.best_step, self.metric, self.best)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the step, save a checkpoint, and end; a second signal ends at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._process = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Catch the signals."""
        self._process = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a forked process that prepares batches: the step may still need it
        self.received = number
        signal.signal(number, self._before.pop(number))
        logger.warning("收到中断信号 stopping after this step; a checkpoint will be saved")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: save a checkpoint and stop."""
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal within an epoch: do not evaluate, which the library does as if the epoch had ended.

        The resumed run then evaluates where an uninterrupted one does, with the same best weights, learning rates and
        random state.
        """
        if self.received and not _epoch_is_over(state):
            control.should_evaluate = control.should_save = False

    def put_handlers_back(self) -> None:
        """Restore the signal handlers after training, however it ended: callbacks do not learn of errors."""
        while self._before:
            signal.signal(*self._before.popitem())


class StopOnNaN(TrainerCallback):
    """Ends a run whose weights are no longer finite: it cannot get better, and is not measured.

    :ivar seen: set by the trainer when a loss is not finite; half precision may have skipped that step.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.seen = False
        self._lost = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the weights after a loss that is not finite, and before an evaluation."""
        lost = self.seen and not all_finite(self.weights)
        self.seen = False
        self._look(state, control, lost, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the weights before an evaluation."""
        self._look(state, control, False, kwargs["model"])

    def _look(self, state: Any, control: Any, lost: bool, model: Any) -> None:
        if not self._lost and (lost or (control.should_evaluate and not is_finite(getattr(model, "module", model)))):
            self._lost = True
            logger.warning(
                "权重或向量不是有限数，训练停止 step %d: weights or vectors are not finite, stopping", state.global_step
            )
        if self._lost:
            control.should_training_stop, control.should_evaluate, control.should_save = True, False, False


class SaveAfterEvaluation(TrainerCallback):
    """Saves the checkpoint of an epoch's last step after the evaluation that ends the epoch.

    A run resumed from that step begins the next epoch: saved earlier, the evaluation would be skipped.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Postpone a checkpoint at the end of an epoch."""
        self.due = control.should_save and args.eval_strategy == "epoch" and _epoch_is_over(state)
        control.should_save = control.should_save and not self.due

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the postponed checkpoint."""
        control.should_save = control.should_save or self.due


def _epoch_is_over(state: Any) -> bool:
    return bool(state.epoch == int(state.epoch) or state.global_step >= state.max_steps)


class MeasureFirst(TrainerCallback):
    """Logs the measures of the model before its first step, where the curve begins."""

    def __init__(self, log_measures: Callable[[], None]) -> None:
        self.log_measures = log_measures

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, unless the run is resumed."""
        if state.global_step == 0:
            self.log_measures()


class EvaluationLines(TrainerCallback):
    """One line in the log per evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Log the held-out loss, and two of the metrics if they are measured."""
        if "eval_loss" not in logs or not state.is_world_process_zero:
            return
        found = {name: logs.get(f"eval_{name}") for name in ("loss", "ndcg@10", "recall@10")}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
        logger.info("评估 evaluation: step %d of %d: held-out %s", state.global_step, state.max_steps, shown)


class TrainingBar(TrainerCallback):
    """One progress bar for the whole run, with the last loss."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, from the step that is resumed."""
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="训练 training", unit="step", leave=False
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Take the bar away, as after an error, of which a callback hears nothing."""
        if self.bar is not None:
            self.bar.close()
