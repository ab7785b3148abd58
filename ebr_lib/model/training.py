"""The trainer: sentence-transformers' own, with exact adapters, honest batches, and a way out of memory trouble."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import random
import re
import resource
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ebr_lib.data.batches import BalancedBatchSampler
from ebr_lib.data.pairs import TrainingRow, text_keys
from ebr_lib.errors import ModelError
from ebr_lib.files import write_json, written_whole
from ebr_lib.logs import logger
from ebr_lib.model.adapters import ADAPTER_FILE, adapter_weights, read_adapter, set_adapter_weights
from ebr_lib.model.cpu_speed import attention
from ebr_lib.model.losses import ContrastiveLoss
from ebr_lib.model.packing import plain_is_faster
from ebr_lib.model.schedulers import NO_WARM_UP, scheduler_extras
from ebr_lib.names import LOW_MEMORY_PRESET, LOWER_IS_BETTER

# the library still calls activation checkpointing by its old name
warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)

Noise = Callable[[str, int, int, str], str]
"""(text, epoch, row, column) to the text with noise."""

MEMORY_ADVICE = "train_batch_size → gradient_accumulation_steps → gradient_checkpointing → max_seq_length"
# tries at random before all documents are looked through for one that does not answer an anchor
DRAWS = 32
# of a model's layers one in so many is run again in backward: half of the activations, for a quarter more time
CHECKPOINTED = 2


def training_device() -> str:
    """Where this process trains: its own GPU ("cuda:0", "cuda:1" …), or "cpu"."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def world_size() -> int:
    """Processes of this run, as torchrun and accelerate set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the one process that writes, says and decides."""
    return os.environ.get("RANK", "0") == "0"


def from_first_process(value: Any) -> Any:
    """What the first process holds, on all of them."""
    if world_size() == 1:
        return value
    # the first may take its time; torchrun sees a process that ends
    PartialState(cpu=training_device() == "cpu", timeout=timedelta(days=1))
    return broadcast_object_list([value])[0]


# --- data ---------------------------------------------------------------------------------------------------------


def with_equal_negatives(
    rows: Sequence[TrainingRow], documents: Sequence[str], seed: int, known: Sequence[TrainingRow] = ()
) -> list[TrainingRow]:
    """Rows that all have as many hard negatives as the one that has most.

    What a row lacks is drawn from those of `documents` that are not known to answer its anchor: the tensor wants equal
    numbers, and a repeated negative would count twice. The draw depends on the seed and the row's number alone.

    :param known: other rows whose answers are known, too.
    """
    most = max((len(row.negatives) for row in rows), default=0)
    lacking = sum(most - len(row.negatives) for row in rows)
    if not lacking:
        return list(rows)
    if lacking > len(rows) * most / 2:
        logger.warning(
            "负例数量悬殊 %d of %d negatives are drawn at random, for every batch is as wide as the widest row, "
            "which has %d: give the rows about as many each",
            lacking,
            len(rows) * most,
            most,
        )
    keys = text_keys(documents).tolist()
    filled = []
    for number, (row, answers) in enumerate(zip(rows, _known_answers(rows, known), strict=True)):
        draw = random.Random(f"{seed} {number}")
        more = tuple(documents[_other(keys, answers, draw)] for _ in range(most - len(row.negatives)))
        filled.append(dataclasses.replace(row, negatives=row.negatives + more))
    return filled


def _known_answers(rows: Sequence[TrainingRow], more: Sequence[TrainingRow]) -> list[set[int]]:
    """Of each row the keys of all texts known to answer its anchor, as `KnownPositives` counts them."""
    anchors = text_keys(row.anchor for row in (*rows, *more)).tolist()
    positives = text_keys(row.positive for row in (*rows, *more)).tolist()
    known = defaultdict[int, set[int]](set)
    for anchor, positive in zip(anchors, positives, strict=True):
        known[anchor] |= {anchor, positive}
        known[positive] |= {anchor, positive}
    return [known[anchor] for anchor in anchors[: len(rows)]]


def _other(keys: Sequence[int], answers: set[int], draw: random.Random) -> int:
    """The number of a key that is not among the answers; any number where all are."""
    for _ in range(DRAWS):
        number = draw.randrange(len(keys))
        if keys[number] not in answers:
            return number
    return draw.choice([number for number, key in enumerate(keys) if key not in answers] or range(len(keys)))


def to_dataset(rows: Sequence[TrainingRow], first: int) -> Dataset:
    """Rows as the columns that the trainer reads; the label is the row's number, counted from `first`."""
    columns: dict[str, list[Any]] = {
        "anchor": [row.anchor for row in rows],
        "positive": [row.positive for row in rows],
    }
    for i in range(len(rows[0].negatives) if rows else 0):
        columns[f"negative_{i + 1}"] = [row.negatives[i] for row in rows]
    return Dataset.from_dict(columns | {"label": list(range(first, first + len(rows)))})


class NoisyCollator:
    """Puts noise into the training texts before they are tokenised; evaluation never sees it.

    The epoch lives in shared memory, so that worker processes see it change.
    """

    def __init__(self, collate: Callable[[Any], dict[str, Any]], noise: Noise, columns: Sequence[str]) -> None:
        self.collate = collate
        self.noise = noise
        self.columns = frozenset(columns)
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.valid_label_columns = getattr(collate, "valid_label_columns", ["label"])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows, their texts with the noise of this epoch."""
        epoch = int(self.epoch)
        return self.collate([self._noisy(row, epoch) for row in rows])

    def _noisy(self, row: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        return {
            name: self.noise(value, epoch, row["label"], name) if self._takes(name) else value
            for name, value in row.items()
        }

    def _takes(self, name: str) -> bool:
        return name.split("_", maxsplit=1)[0] in self.columns  # negative_1, negative_2 … are all "negative"


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch; tells the noise which epoch it is.

    A row that is alone in the last batch has no negatives there and would teach nothing: the epoch's first row keeps it
    company. Several processes take turns, and gather what they embed: batches of one size, as many for each. The last
    round is therefore filled up with the epoch's first rows once more; the mask knows their positives.

    :param batches: full ones, but for the last.
    """

    drop_last = False

    def __init__(self, batches: Any, epoch_cell: Tensor | None, processes: int = 1) -> None:
        self.batches = batches
        self.batch_size: int = batches.batch_size
        self.processes = processes
        self._cell = epoch_cell

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch anew, and tell the epoch to those who prepare them."""
        self.batches.set_epoch(epoch)
        if self._cell is not None:
            self._cell.fill_(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return self._in_company() if self.processes == 1 else self._filled_up()

    def _in_company(self) -> Iterator[list[int]]:
        first = None
        for batch in self.batches:
            first = batch[0] if first is None else first
            is_alone = len(batch) == 1 < self.batch_size and batch[0] != first
            yield [*batch, first] if is_alone else batch

    def _filled_up(self) -> Iterator[list[int]]:
        rows = [row for batch in self.batches for row in batch]
        missing = len(self) * self.batch_size - len(rows)
        rows += islice(cycle(rows[:]), missing)
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes


# --- arguments ----------------------------------------------------------------------------------------------------


def count_steps(rows: int, batch_size: int, accumulation: int, epochs: float) -> int:
    """Steps of a run, as the library counts them: an epoch's last batch may be smaller, and its last step."""
    batches = -(-rows // (batch_size * world_size()))
    return math.ceil(-(-batches // accumulation) * epochs)


def training_arguments(
    folder: Path,
    *,
    rows: int,
    batch_size: int,
    num_epochs: float,
    gradient_accumulation_steps: int,
    lr_scheduler_type: str,
    learning_rate: float,
    warmup_ratio: float,
    greater_is_better: bool,
    eval_steps: int,
    save_steps: int,
    evaluate: bool,
    **others: Any,
) -> SentenceTransformerTrainingArguments:
    """The library's arguments; what depends on the number of steps is worked out here."""
    if warmup_ratio and lr_scheduler_type in NO_WARM_UP:
        logger.warning("没有预热 warmup_ratio %g does nothing: %s has no warm-up", warmup_ratio, lr_scheduler_type)
    steps = count_steps(rows, batch_size, gradient_accumulation_steps, num_epochs)
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=num_epochs,
        gradient_accumulation_steps=gradient_accumulation_steps,
        lr_scheduler_type=lr_scheduler_type,
        lr_scheduler_kwargs=scheduler_extras(lr_scheduler_type, steps, num_epochs, learning_rate, greater_is_better),
        learning_rate=learning_rate,
        warmup_steps=warmup_ratio,
        greater_is_better=greater_is_better,
        eval_strategy=("steps" if eval_steps else "epoch") if evaluate else "no",
        eval_steps=eval_steps or None,
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, min(50, steps // 40)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # which would log 0 for NaN
        dataloader_drop_last=world_size() > 1,  # as the library insists; `EpochBatches` drops nothing
        ddp_find_unused_parameters=False,
        use_cpu=training_device() == "cpu",
        activation_checkpointing_kwargs={"every_n_layers": CHECKPOINTED},
        report_to=[],
        **others,
    )


# --- callbacks ----------------------------------------------------------------------------------------------------


class KeepBest(TrainerCallback, ExportableState):
    """Keeps the best adapter on disk, exactly, and stops the run when it no longer gets better.

    An evaluation counts as better when the metric moved by more than `threshold` in the right direction, which
    NaN never does.
    `patience` evaluations in a row without one stop the run; 0 never does.
    """

    def __init__(self, metric: str, patience: int, threshold: float, folder: str) -> None:
        self.metric, self.patience, self.threshold, self.folder = metric, patience, threshold, folder
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as the library's callbacks export it."""
        names, kept = ("metric", "patience", "threshold", "folder"), ("best", "best_step", "waited")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in kept},
        }

    def offer(self, value: float, step: int) -> bool:
        """Take note of an evaluation; true when it is the best so far."""
        if not self._is_better(value):
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = value, step, 0
        return True

    def _is_better(self, value: float) -> bool:
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        gain = self.best - value if self.metric == LOWER_IS_BETTER else value - self.best
        return gain > self.threshold

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best so far; stop the run when patience is at its end."""
        if self.offer(metrics[f"eval_{self.metric}"], state.global_step) and state.is_world_process_zero:
            self._keep(kwargs["model"])
        self._stop_at_end_of_patience(control)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at once where the run that goes on had stopped early."""
        self._stop_at_end_of_patience(control)

    def _stop_at_end_of_patience(self, control: Any) -> None:
        if self.patience and self.waited >= self.patience:
            logger.info("早停 early stopping: %d evaluations without a better %s", self.waited, self.metric)
            control.should_training_stop = True

    def _keep(self, model: Any) -> None:
        from safetensors.torch import save_file

        folder = Path(self.folder)
        with written_whole(folder / ADAPTER_FILE) as new:
            save_file(adapter_weights(getattr(model, "module", model)), new)
        write_json(folder / "best.json", {"metric": self.metric, "value": self.best, "step": self.best_step})

    def restore(self, model: SentenceTransformer) -> None:
        """Put the best weights back into the model, bit for bit; the first process, which wrote them, shares them."""
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
            return  # one that prepares batches and was forked with this handler: the step may still need it
        self.received = number
        signal.signal(number, self._before.pop(number))
        logger.warning("收到中断信号 stopping after this step; a checkpoint will be saved")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: save a checkpoint and stop."""
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: the library takes an epoch that was left for one that ended, and would evaluate here.

        The run that goes on evaluates where a whole one does, and so has the same best weights, rates and random state.
        """
        if self.received and not _epoch_is_over(state):
            control.should_evaluate = control.should_save = False

    def put_handlers_back(self) -> None:
        """For when training is over, however it ended: no callback hears of an error."""
        while self._before:
            signal.signal(*self._before.popitem())


class SaveAfterEvaluation(TrainerCallback):
    """Takes the checkpoint of an epoch's last step after the evaluation that ends the epoch, not before.

    A run that goes on from that step begins the next epoch: the evaluation would never be made.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put off what is to be saved now."""
        self.due = control.should_save and args.eval_strategy == "epoch" and _epoch_is_over(state)
        control.should_save = control.should_save and not self.due

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what was put off."""
        control.should_save = control.should_save or self.due


def _epoch_is_over(state: Any) -> bool:
    return bool(state.epoch == int(state.epoch) or state.global_step >= state.max_steps)


class TrainingBar(TrainerCallback):
    """One bar for the whole run, with the last loss."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, from the step at which the run goes on."""
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="训练 training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class _HeldoutEvaluator(BaseEvaluator):
    def __init__(self, measure: Callable[[SentenceTransformer], Mapping[str, float]]) -> None:
        super().__init__()
        self.measure = measure

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        return dict(self.measure(model))


# --- the trainer --------------------------------------------------------------------------------------------------


class EbrTrainer(SentenceTransformerTrainer):
    """Adds to the library's trainer: balanced batches, noise, exact adapters, out-of-memory handling.

    :param anchors: for each row number (label), the number of its anchor; balanced batches keep equal ones apart.
    :param documents: likewise of its document, which balanced batches deal out.
    :param measure: held-out metrics of a model, for evaluations; None evaluates nothing but the loss.
    :param memory_limit_mb: resident memory above which a CPU step counts as out of memory; 0 is none.
    """

    loss: ContrastiveLoss
    data_collator: Any

    def __init__(
        self,
        *,
        anchors: NDArray[np.int64],
        documents: NDArray[np.int64],
        balanced: bool = True,
        measure: Callable[[SentenceTransformer], Mapping[str, float]] | None = None,
        noise: Noise | None = None,
        noise_columns: Sequence[str] = (),
        memory_limit_mb: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._anchors, self._documents, self._balanced = anchors, documents, balanced
        self._noise, self._noise_columns = noise, noise_columns
        self._noisy: NoisyCollator | None = None
        self.memory_limit_mb = memory_limit_mb
        evaluator = _HeldoutEvaluator(measure) if measure else None
        super().__init__(evaluator=evaluator, **kwargs)
        # accelerate patches the forward of the model that it prepares: packed rows and the preflight go past it
        self.loss.autocast = self.accelerator.autocast
        self.stop = StopOnSignal()
        self.remove_callback(ProgressCallback)
        self.add_callback(self.stop)
        self.add_callback(SaveAfterEvaluation())
        self.add_callback(TrainingBar())

    # --- data ---

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader:
        if dataset_kind != "train" or self._noise is None:
            return super()._build_dataloader(dataset, batch_size, dataset_kind)
        clean = self.data_collator
        self.data_collator = self._noisy = NoisyCollator(clean, self._noise, self._noise_columns)
        try:
            return super()._build_dataloader(dataset, batch_size, dataset_kind)
        finally:
            self.data_collator = clean

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        """Batches that lose no row, whatever the library says; balanced, with as many different documents as can be."""
        if not self._balanced:
            batches = super().get_batch_sampler(dataset, batch_size, False, **kwargs)
        else:
            rows = np.asarray(dataset["label"])
            batches = BalancedBatchSampler(
                self._documents[rows],
                self._anchors[rows],
                batch_size=batch_size,
                seed=kwargs.get("seed") or 0,
                processes=world_size(),
            )
        is_train = dataset is self.train_dataset
        epoch_cell = self._noisy.epoch if self._noisy and is_train else None
        return EpochBatches(batches, epoch_cell, world_size())

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: a saved model's card is our own, and the library's looks up models on the hub."""

    # --- memory ---

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; when memory runs out, again in micro-batches of half the size."""
        go_back = self._way_back()
        while True:
            if self.memory_limit_mb:
                count_peak_anew()
            try:
                with self._attention(inputs):
                    loss = super().training_step(model, dict(inputs), num_items_in_batch)
                self._check_memory()
                return loss
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(len(inputs["label"]), error)
            go_back()
            _give_memory_back()  # not before: the error held on to what the step had made

    def _way_back(self) -> Callable[[], None]:
        """What puts all that a step changes back to what it is now: gradients, random states, what the log counts."""
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in self.loss.weights]
        states = _random_states()
        components = deepcopy(self.accum_loss_components["train"])
        counts = self.loss.masked, self.loss.negatives

        def go_back() -> None:
            for weight, gradient in zip(self.loss.weights, gradients, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            _set_random_states(states)
            self.accum_loss_components["train"] = deepcopy(components)
            self.loss.masked, self.loss.negatives = counts

        return go_back

    def _attention(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """The attention of packed rows under checkpointing: backward runs layers again, and has to find the same."""
        longest = max(ids.shape[1] for name, ids in inputs.items() if name.endswith("input_ids"))
        again = self.args.activation_checkpointing and self.loss.packed is not None
        plain = again and plain_is_faster(self.model, longest)
        return attention(self.model, "eager") if plain else contextlib.nullcontext()

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The evaluation loss of a batch, likewise."""
        while True:
            try:
                return super().prediction_step(model, dict(inputs), *args, **kwargs)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(len(inputs["label"]), error)
            _give_memory_back()

    def _check_memory(self) -> None:
        if not self.memory_limit_mb or self.model.device.type != "cpu":
            return
        if (now := peak_memory_mb()) > self.memory_limit_mb:
            raise MemoryError(f"the step took {now:,.0f} MB, memory_limit_gb allows {self.memory_limit_mb:,.0f} MB")

    def _halve(self, rows: int, error: BaseException) -> None:
        now = min(self.loss.mini_batch_size or rows, rows)
        if world_size() > 1:  # the others wait for this one's vectors: none can do its step anew alone
            raise ModelError(
                f"out of memory in one of {world_size()} processes ({error}), which cannot go on without the others. "
                f"Set contrastive_batch_size to {rows} and train_batch_size to {max(now // 2, 1)}, which keeps the "
                f"negatives (and lower eval_batch_size), or, in this order: {MEMORY_ADVICE}"
            ) from error
        if now <= 1:
            raise ModelError(
                f"out of memory with one row at a time ({error}); lower max_seq_length, or set gradient_checkpointing"
            ) from error
        self.loss.mini_batch_size = now // 2
        logger.warning(
            "内存不足 out of memory: micro-batch %d → %d; effective batch, negatives and seeds stay the same. "
            "To settle it for good, in this order: %s (%s)",
            now,
            now // 2,
            MEMORY_ADVICE,
            LOW_MEMORY_PRESET,
        )

    # --- checkpoints and log ---

    def _run_epoch(self, **kwargs: Any) -> None:
        """Not one that begins where the run had ended already: the library would make a step before it looks."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), create_model_card=False)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        """The adapter as it was saved: float32, not rounded through the base's type as the library's way does."""
        set_adapter_weights(self.model, read_adapter(Path(checkpoint_path)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the library does, and beside a loss the share of the negatives that were masked."""
        share = self.loss.take_masked_share() if "loss" in logs else None
        if "loss" in logs:
            self._tr_loss.zero_()  # what the library takes from itself to begin anew, and NaN less NaN is not 0
        super().log(logs | ({} if share is None else {"masked_share": round(share, 5)}), start_time)


def _random_states() -> tuple[Tensor, Tensor | None]:
    """Of the CPU, and of this process's own GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])


# --- preflight ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preflight:
    """What the longest batch cost: seconds a step, and the peak of memory in MB."""

    seconds: float
    peak_mb: float


def fly_longest_batch(trainer: EbrTrainer) -> Preflight:
    """Run forward and backward on the longest texts, so that a run that cannot fit fails now, not in an hour.

    Weights, gradients and random state are as before afterwards.
    """
    if trainer.args.activation_checkpointing:  # the trainer does it when it begins to train, which is too late here
        trainer.model.gradient_checkpointing_enable(**trainer.args.activation_checkpointing_kwargs)
    longest = longest_rows(trainer.train_dataset, trainer.model.tokenizer, trainer.args.train_batch_size)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        batch = trainer.data_collator([trainer.train_dataset[row] for row in longest])
        trainer.current_gradient_accumulation_steps = 1
        count_peak_anew()
        start = _now()
        trainer.training_step(trainer.model, batch)
        seconds = _now() - start
    for weight in trainer.loss.weights:
        weight.grad = None
    trainer.loss.take_masked_share()
    trainer.accum_loss_components = {"train": {}, "eval": {}}
    return Preflight(seconds, peak_memory_mb())


def longest_seconds(trainer: EbrTrainer, batch: float, measure: float) -> float:
    """Seconds of a run of which every batch takes as long as the longest, and every evaluation measures as long as
    before training; the loss of the held-out rows is counted as if they were trained on."""
    args, rows = trainer.args, len(trainer.train_dataset)
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    steps = count_steps(rows, size, accumulation, args.num_train_epochs)
    epochs, rest = divmod(steps, count_steps(rows, size, accumulation, 1))
    training = batch * (epochs * count_steps(rows, size, 1, 1) + rest * accumulation)
    if trainer.eval_dataset is None:
        return training
    evaluations = -(-steps // args.eval_steps) if args.eval_steps else math.ceil(args.num_train_epochs)
    losses = batch * count_steps(len(trainer.eval_dataset), min(size, args.eval_batch_size), 1, 1)
    return training + evaluations * (measure + losses)


def longest_rows(dataset: Dataset, tokenizer: Any, count: int) -> list[int]:
    """Numbers of the `count` rows that take most as a batch: those with the longest text of a column, which decides
    its padding, and then those with most tokens.

    Tokens are counted for the rows with most bytes alone. Bytes tell tokens better than letters do: a Chinese letter,
    about a token, is three bytes, an English word about five.
    """
    columns = [list(dataset[name]) for name in dataset.column_names if name != "label"]
    size = np.array([[len(text.encode("utf-8", "replace")) for text in column] for column in columns])
    likely = np.unique(np.concatenate([size.sum(axis=0).argsort()[-8 * count :], *size.argsort(axis=1)[:, -count:]]))
    tokens = np.array([_token_counts(tokenizer, [column[row] for row in likely.tolist()]) for column in columns])
    order = [*tokens.argmax(axis=1), *tokens.sum(axis=0).argsort(kind="stable")[::-1]]
    return likely[list(dict.fromkeys(order))[:count]].tolist()


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]


def _now() -> float:
    """The clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_mb() -> float:
    """The most memory in MB since `count_peak_anew`: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:
        return int(peak[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process's life
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def count_peak_anew() -> None:
    """Let `peak_memory_mb` forget what was, where the system can (Linux: proc_pid_clear_refs(5))."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _give_memory_back() -> None:
    """To the GPU, or to the system, what a failed step has left; `cpu_speed` keeps freed memory for the next one."""
    torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)
