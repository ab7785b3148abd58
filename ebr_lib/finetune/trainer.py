"""The trainer: sentence-transformers' own, with exact adapters, honest batches, and a way out of memory trouble."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback
from transformers import trainer as library_trainer

from ebr_lib.errors import ModelError
from ebr_lib.finetune.batches import BalancedBatchSampler
from ebr_lib.finetune.callbacks import SaveAfterEvaluation, StopOnNaN, StopOnSignal, TrainingBar, all_finite
from ebr_lib.finetune.dataset import EpochBatches, Noise, NoisyCollator
from ebr_lib.finetune.heldout import GroupMeans
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.memory import count_peak_anew, give_memory_back, peak_memory_mb
from ebr_lib.finetune.processes import training_device, world_size
from ebr_lib.finetune.schedulers import NO_WARM_UP, scheduler_extras
from ebr_lib.logs import logger
from ebr_lib.model.adapters import read_adapter, set_adapter_weights
from ebr_lib.model.attention import attention, evaluating
from ebr_lib.model.packing import plain_is_faster
from ebr_lib.names import LOW_MEMORY_PRESET

# the library still calls activation checkpointing by its old name
warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)

MEMORY_ADVICE = "train_batch_size → gradient_accumulation_steps → gradient_checkpointing → max_seq_length"
# of a model's layers one in so many is run again in backward: half of the activations, for a quarter more time
CHECKPOINTED = 2
# how well the preflight knows an average batch: rows whose tokens are counted, batches that are run
SAMPLED_ROWS, TIMED_BATCHES = 2048, 2


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
    :param measure: held-out metrics of a model, for evaluations; None evaluates nothing but the loss. `measured` keeps
        them by step.
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
        measure: Callable[[SentenceTransformer], GroupMeans] | None = None,
        noise: Noise | None = None,
        noise_columns: Sequence[str] = (),
        memory_limit_mb: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._anchors, self._documents, self._balanced = anchors, documents, balanced
        self._noise, self._noise_columns = noise, noise_columns
        self._noisy: NoisyCollator | None = None
        self.memory_limit_mb = memory_limit_mb
        self._measure, self.measured = measure, dict[int, GroupMeans]()
        evaluator = _HeldoutEvaluator(self._measured) if measure else None
        super().__init__(evaluator=evaluator, **kwargs)
        # accelerate patches the forward of the model that it prepares: packed rows and the preflight go past it
        self.loss.autocast = self.accelerator.autocast
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.add_callback(SaveAfterEvaluation())
        self.nan = StopOnNaN(self.loss.weights)
        self.add_callback(self.nan)
        self._one_bar()

    def _one_bar(self) -> None:
        """Ours instead of the library's, but for that of a notebook, which has a table of the evaluations."""
        bar = self.pop_callback(library_trainer.DEFAULT_PROGRESS_CALLBACK)
        has_table = self.evaluator is not None and not isinstance(bar, ProgressCallback)
        self.add_callback(bar if has_table else TrainingBar())

    def _measured(self, model: SentenceTransformer) -> Mapping[str, float]:
        assert self._measure is not None
        means = self.measured[self.state.global_step] = self._measure(model)
        return means["all"]

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
        return EpochBatches(batches, epoch_cell, world_size(), self._answer_each_other)

    def _answer_each_other(self, one: int, other: int) -> bool:
        if self.loss.known_positives is None:
            return False
        mask = self.loss.known_positives(torch.tensor([one, other]))
        return bool(mask[0, 1] or mask[1, 0])

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
                self._check_finite(loss, inputs)
                return loss
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(len(inputs["label"]), error)
            go_back()
            give_memory_back()  # not before: the error held on to what the step had made

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
            give_memory_back()

    def _check_memory(self) -> None:
        if not self.memory_limit_mb or self.model.device.type != "cpu":
            return
        if (now := peak_memory_mb()) > self.memory_limit_mb:
            raise MemoryError(f"the step took {now:,.0f} MB, memory_limit_gb allows {self.memory_limit_mb:,.0f} MB")

    def _check_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        if loss.isfinite() or not all_finite(self.loss.weights):  # weights that are lost: `StopOnNaN` ends the run
            self.nan.seen = self.nan.seen or not loss.isfinite()
            return
        self.nan.seen = True
        if texts := self._without_vector(inputs["label"].tolist()):
            raise ModelError(
                f"the training loss is {float(loss)}: the model makes vectors that are not finite numbers (NaN) of "
                f"{len(texts)} texts of the batch, such as {', '.join(map(repr, texts[:3]))}. Look for NaN in the "
                f"model's weights, or leave these texts out"
            )

    def _without_vector(self, rows: Sequence[int]) -> list[str]:
        """The texts of training rows whose vectors are not finite."""
        found: dict[str, None] = {}
        with evaluating(self.model):
            for column, prompt in self.args.prompts.items():
                texts = [self.train_dataset[row][column] for row in rows]
                vectors = self.model.encode(
                    texts, prompt=prompt or None, convert_to_tensor=True, show_progress_bar=False
                )
                found |= dict.fromkeys(
                    t for t, vector in zip(texts, vectors, strict=True) if not vector.isfinite().all()
                )
        return list(found)

    def _halve(self, rows: int, error: BaseException) -> None:
        now = self.loss.rows_at_once(rows)
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
    """Seconds that a training batch, an evaluation batch and a checkpoint take on average, that the longest training
    batch took, and the peak of memory in MB that it took."""

    batch: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    longest: float = 0.0
    peak_mb: float = 0.0


def preflight(trainer: EbrTrainer) -> Preflight:
    """Try what a run does: the longest texts, so that a run that cannot fit fails now, not in an hour; then batches of
    average size, in training and in evaluation, and a checkpoint.

    Weights, gradients and random state are as before afterwards.
    """
    if trainer.args.activation_checkpointing:  # the trainer does it when it begins to train, which is too late here
        trainer.model.gradient_checkpointing_enable(**trainer.args.activation_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = 1
    rows = longest_rows(trainer.train_dataset, trainer.model.tokenizer, trainer.args.train_batch_size)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        count_peak_anew()
        longest = _training_seconds(trainer, rows)
        peak = peak_memory_mb()
        costliest = _work(
            _tokens(trainer, trainer.train_dataset, rows), range(len(rows)), _rows_at_once(trainer, len(rows))
        )
        batch = _average_seconds(trainer, _training_seconds, trainer.train_dataset, (costliest, longest))
        evaluation = 0.0
        if trainer.eval_dataset is not None:
            with evaluating(trainer.model):
                evaluation = _average_seconds(trainer, _evaluation_seconds, trainer.eval_dataset)
    for weight in trainer.loss.weights:
        weight.grad = None
    trainer.nan.seen = False
    trainer.loss.take_masked_share()
    trainer.accum_loss_components = {"train": {}, "eval": {}}
    return Preflight(batch, evaluation, _checkpoint_seconds(trainer), longest, peak)


def _training_seconds(trainer: EbrTrainer, rows: Sequence[int]) -> float:
    start = _now()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    trainer.training_step(trainer.model, batch)
    return _now() - start


def _evaluation_seconds(trainer: EbrTrainer, rows: Sequence[int]) -> float:
    start = _now()
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in rows])
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    return _now() - start


def _checkpoint_seconds(trainer: EbrTrainer) -> float:
    if not trainer.is_world_process_zero():
        return 0.0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=trainer.args.output_dir) as folder:
        trainer._save(folder)
    return time.perf_counter() - start


def _average_seconds(
    trainer: EbrTrainer,
    seconds_of: Callable[[EbrTrainer, Sequence[int]], float],
    dataset: Dataset,
    costliest: tuple[float, float] | None = None,
) -> float:
    """Seconds of an average batch: those nearest to it are run, of batches drawn at random.

    Few texts that are much longer than the rest leave no batch near the average, which is then taken on the line from
    what was run to `costliest`, the (tokens, seconds) of the longest batch.
    """
    size = trainer.args.train_batch_size if dataset is trainer.train_dataset else trainer.args.eval_batch_size
    rows = np.random.default_rng(0).permutation(len(dataset))[: max(SAMPLED_ROWS, size)]
    tokens, step = _tokens(trainer, dataset, rows.tolist()), _rows_at_once(trainer, size)
    batches = [range(start, start + size) for start in range(0, len(rows) - size + 1, size)] or [range(len(rows))]
    work = np.array([_work(tokens, batch, step) for batch in batches])
    nearest = np.abs(work - work.mean()).argsort(kind="stable")[:TIMED_BATCHES].tolist()
    seconds = float(np.mean([seconds_of(trainer, rows[batches[i]].tolist()) for i in nearest]))
    mean, run = float(work.mean()), float(work[nearest].mean())
    if costliest and costliest[0] > run:
        seconds += (mean - run) / (costliest[0] - run) * max(costliest[1] - seconds, 0.0)
    return seconds


def _tokens(trainer: EbrTrainer, dataset: Dataset, rows: Sequence[int]) -> NDArray[np.int64]:
    """Tokens of the texts of rows, shape (columns, rows)."""
    chosen = dataset.select(rows)
    columns = [list(chosen[name]) for name in chosen.column_names if name != "label"]
    return np.array([_token_counts(trainer.model.tokenizer, column) for column in columns])


def _work(tokens: NDArray[np.int64], batch: Sequence[int], step: int) -> float:
    """Tokens that a batch takes, padding included, where `step` rows are padded to one length."""
    parts = [list(batch[start : start + step]) for start in range(0, len(batch), step)]
    return float(sum(len(part) * tokens[:, part].max(axis=1).sum() for part in parts))


def _rows_at_once(trainer: EbrTrainer, size: int) -> int:
    """Rows that are padded to one length: all that are embedded at a time, or one where rows are packed."""
    at_once = trainer.loss.rows_at_once(size)
    return 1 if trainer.loss.packed is not None and at_once == size else at_once


def estimated_seconds(trainer: EbrTrainer, flown: Preflight, measure: float) -> float:
    """Seconds that training takes with its evaluations and checkpoints.

    :param measure: seconds that it takes to measure the model on the held-out anchors.
    """
    args, rows = trainer.args, len(trainer.train_dataset)
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    steps = count_steps(rows, size, accumulation, args.num_train_epochs)
    epochs, rest = divmod(steps, count_steps(rows, size, accumulation, 1))
    ends = math.ceil(args.num_train_epochs)
    training = flown.batch * (epochs * count_steps(rows, size, 1, 1) + rest * accumulation)
    training += flown.checkpoint * (-(-steps // args.save_steps) if args.save_strategy == "steps" else ends)
    if trainer.eval_dataset is None:
        return training
    evaluations = -(-steps // args.eval_steps) if args.eval_steps else ends
    losses = flown.evaluation * count_steps(len(trainer.eval_dataset), args.eval_batch_size, 1, 1)
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
