"""The trainer: sentence-transformers' own, with exact adapters, batches that lose no row, and smaller batches when
memory runs out. All that reaches into private parts of transformers' trainer is here.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import trainer as library_trainer

from ebr_lib.errors import ModelError, NotFiniteError
from ebr_lib.finetune.batches import BalancedBatchSampler
from ebr_lib.finetune.callbacks import (
    EvaluationLines,
    KeepBest,
    MeasureFirst,
    SaveAfterEvaluation,
    StopOnNaN,
    StopOnSignal,
    TrainingBar,
)
from ebr_lib.finetune.dataset import Datasets, EpochBatches, Noise, RowCollator
from ebr_lib.finetune.heldout import GroupMeans
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.memory import give_memory_back, peak_memory_mb, reset_peak
from ebr_lib.finetune.processes import world_size
from ebr_lib.finetune.saving import all_finite
from ebr_lib.finetune.sources import Mix, MixedBatches
from ebr_lib.logs import logger
from ebr_lib.model.adapters import adapter_weights, read_adapter, set_adapter_weights
from ebr_lib.model.attention import attention, evaluating
from ebr_lib.model.packing import plain_is_faster
from ebr_lib.names import LOW_MEMORY_PRESET, METRICS

# the library still calls activation checkpointing by its old name
warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)

MEMORY_ADVICE = "train_batch_size → gradient_accumulation_steps → gradient_checkpointing → max_seq_length"


def count_steps(rows: int, batch_size: int, accumulation: int, epochs: float) -> int:
    """Steps of a run, as the library counts them: an epoch's last batch and last step may be smaller."""
    batches = -(-rows // (batch_size * world_size()))
    return math.ceil(-(-batches // accumulation) * epochs)


class EbrTrainer(SentenceTransformerTrainer):
    """The library's trainer with balanced batches, noise, exact adapters, and out-of-memory handling.

    :param balanced: batches keep equal anchors apart, and spread equal documents.
    :param mix: the training rows that each epoch takes; None takes each once.
    :param measure: held-out metrics of a model, for evaluations; None evaluates the loss alone.
    :param anchor_prompts: the prompt of each row's anchor, by the row's number; None leaves prompts to the arguments.
    :param memory_limit_mb: resident memory above which a CPU step counts as out of memory; 0 means unlimited.
    :ivar measured: the held-out metrics by step.
    :ivar first_means: those of the model before training, if they are known; otherwise they are measured.
    :ivar start: the adapter's weights before training.
    """

    loss: ContrastiveLoss
    data_collator: Any

    def __init__(
        self,
        *,
        data: Datasets,
        balanced: bool = True,
        mix: Mix | None = None,
        measure: Callable[[SentenceTransformer], GroupMeans] | None = None,
        noise: Noise | None = None,
        noise_columns: Sequence[str] = (),
        anchor_prompts: Sequence[str] | None = None,
        memory_limit_mb: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._known, self._balanced, self._mix = data.all_known, balanced, mix
        self.memory_limit_mb = memory_limit_mb
        self._measure, self.measured = measure, dict[int, GroupMeans]()
        self.first_means: GroupMeans | None = None
        super().__init__(train_dataset=data.train, eval_dataset=data.heldout, **kwargs)
        collate = self.data_collator
        self._noisy = RowCollator(collate, anchor_prompts, noise, noise_columns) if noise else None
        self.data_collator = RowCollator(collate, anchor_prompts)
        self.start = adapter_weights(kwargs["model"])
        self.evaluator = self._evaluate_heldout if measure else None
        # accelerate patches the forward of the model that it prepares: packed rows and the preflight bypass it
        self.loss.autocast = self.accelerator.autocast
        self.pop_callback(library_trainer.DEFAULT_PROGRESS_CALLBACK)
        self.stop, self.nan, self.bar = StopOnSignal(), StopOnNaN(self.loss.weights), TrainingBar()
        own = (self.stop, SaveAfterEvaluation(), self.nan, self.bar, EvaluationLines(), MeasureFirst(self._log_first))
        for callback in own:
            self.add_callback(callback)

    def _log_first(self) -> None:
        """Log the held-out loss and metrics of the model as it is; neither the best weights nor the run notice it."""
        if self.eval_dataset is None:
            return
        evaluator, self.evaluator = self.evaluator, None
        with self.trial():
            batches = self.get_eval_dataloader()
            found = self.evaluation_loop(batches, "before training", prediction_loss_only=True).metrics or {}
        self.evaluator = evaluator
        logs = {"eval_loss": found["eval_loss"]}
        if self._measure:
            means = self.first_means or self._measure(self.model)
            logs |= {f"eval_{name}": value for name, value in means["all"].items()}
        self.log(logs)

    def _evaluate_heldout(self, model: SentenceTransformer, **where: Any) -> dict[str, float]:
        assert self._measure is not None
        try:
            means = self._measure(model)
        except NotFiniteError as error:  # NaN is never the best: the weights that were kept before are saved
            logger.warning("验证指标无法计算 held-out metrics are NaN: %s", error)
            means = {"all": dict.fromkeys(METRICS, math.nan)}
        self.measured[self.state.global_step] = means
        return dict(means["all"])

    @property
    def _best(self) -> KeepBest | None:
        """What keeps the best weights; a resumed run has another one than it was given, from the checkpoint."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, KeepBest)), None)

    @property
    def best_step(self) -> int | None:
        """The step with the best weights; None where nothing was evaluated."""
        return self._best.best_step if self._best and self._best.best is not None else None

    @property
    def measured_best(self) -> GroupMeans | None:
        """The means of the best weights, as measured in training: the same number in log, curve and table.

        None where this process did not measure them, as after a resumed run that got no better.
        """
        return None if self.best_step is None else self.measured.get(self.best_step)

    def restore_best(self) -> None:
        """Put the best weights back into the model."""
        if self._best:
            self._best.restore(self.model)

    # --- data ---

    def get_train_dataloader(self) -> DataLoader:
        """Training batches, with noise where there is any."""
        clean = self.data_collator
        self.data_collator = self._noisy or clean
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = clean

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        """Batches that lose no row, whatever `drop_last`; balanced ones repeat as few documents as possible."""
        is_train, seed = dataset is self.train_dataset, kwargs.get("seed") or 0
        documents, anchors = self._known.documents, self._known.anchors
        if not self._balanced:
            batches = super().get_batch_sampler(dataset, batch_size, False, **kwargs)
        elif self._mix is not None and is_train:
            batches = MixedBatches(self._mix, documents, anchors, batch_size=batch_size, seed=seed)
        else:
            rows, processes = np.asarray(dataset["label"]), world_size()
            batches = BalancedBatchSampler(
                documents[rows], anchors[rows], batch_size=batch_size, seed=seed, processes=processes
            )
        epoch_cell = self._noisy.epoch if self._noisy and is_train else None
        return EpochBatches(batches, epoch_cell, world_size(), self._answer_each_other)

    def embedded_sample(self, pairs: int) -> list[tuple[list[list[Tensor]], Tensor]]:
        """Vectors and labels of the first training batches, of about `pairs` pairs, without noise, dropout, gradients.

        Every process embeds as many batches. The random state is as before afterwards.
        """
        size, data = self.args.train_batch_size, self.train_dataset
        first, step = int(os.environ.get("RANK", "0")), world_size()
        generator = torch.Generator().manual_seed(self.args.seed)
        with torch.random.fork_rng(devices=[]), evaluating(self.model):
            batches = self.get_batch_sampler(data, size, False, generator=generator, seed=self.args.seed)
            taken = islice(batches, first, max(1, pairs // (size * step)) * step, step)
            return [self._embedded([data[row] for row in rows]) for rows in taken]

    def _embedded(self, rows: Sequence[dict[str, Any]]) -> tuple[list[list[Tensor]], Tensor]:
        features, labels = self.collect_features(self._prepare_inputs(self.data_collator(rows)))
        return self.loss.vectors_of(features, len(labels)), labels

    def _answer_each_other(self, one: int, other: int) -> bool:
        if self.loss.known_positives is None:
            return False
        mask = self.loss.known_positives(torch.tensor([one, other]))
        return bool(mask[0, 1] or mask[1, 0])

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: we write a model's card ourselves, and the library's callback looks models up on the hub."""

    # --- memory ---

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; when memory runs out, repeat it in micro-batches of half the size."""
        undo = self._snapshot()
        while True:
            if self.memory_limit_mb:
                reset_peak()
            try:
                with self._attention(inputs):
                    loss = super().training_step(model, dict(inputs), num_items_in_batch)
                self._check_memory()
                self._check_finite(loss, inputs)
                return loss
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(len(inputs["label"]), error)
            undo()
            give_memory_back()  # not earlier: the error kept what the step had made

    def _snapshot(self) -> Callable[[], None]:
        """A function that restores all that a step changes: gradients, random states, what the log counts."""
        gradients = [None if weight.grad is None else weight.grad.clone() for weight in self.loss.weights]
        state = torch.get_rng_state()
        gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        components = deepcopy(self.accum_loss_components["train"])
        counts = self.loss.masked, self.loss.guided, self.loss.negatives

        def undo() -> None:
            for weight, gradient in zip(self.loss.weights, gradients, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            torch.set_rng_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state)
            self.accum_loss_components["train"] = deepcopy(components)
            self.loss.masked, self.loss.guided, self.loss.negatives = counts

        return undo

    def _attention(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Fix the attention of packed rows under checkpointing: backward runs layers again and must find the same."""
        longest = max(ids.shape[1] for name, ids in inputs.items() if name.endswith("input_ids"))
        again = self.args.activation_checkpointing and self.loss.packed is not None
        plain = again and plain_is_faster(self.model, longest)
        return attention(self.model, "eager") if plain else contextlib.nullcontext()

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The evaluation loss of a batch; repeated in micro-batches when memory runs out."""
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
        if loss.isfinite() or not all_finite(self.loss.weights):  # with lost weights `StopOnNaN` ends the run
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
        if world_size() > 1:  # the others wait for this one's vectors: none can repeat its step alone
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
            "To avoid this, change in this order: %s (%s)",
            now,
            now // 2,
            MEMORY_ADVICE,
            LOW_MEMORY_PRESET,
        )

    # --- checkpoints and log ---

    def _run_epoch(self, **kwargs: Any) -> None:
        """Skip epochs after the last step: the library would make one more step before it looks."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Run batches that leave nothing: the random state is restored, gradients, counts and losses are dropped."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            yield
        for weight in self.loss.weights:
            weight.grad = None
        self.nan.seen = False
        self.loss.take_guided_share()
        self.loss.take_masked_share()
        self.accum_loss_components: dict[str, Any] = {"train": {}, "eval": {}}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), create_model_card=False)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        """Load the adapter as it was saved, in float32: the library rounds it to the base's type."""
        set_adapter_weights(self.model, read_adapter(Path(checkpoint_path)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the library logs, and with a loss the shares of the negatives that were masked."""
        shares: dict[str, float | None] = {}
        if "loss" in logs:
            shares["false_negative_share"] = self.loss.take_guided_share()
            shares["masked_share"] = self.loss.take_masked_share()
            self._tr_loss.zero_()  # the library subtracts it from itself, and NaN minus NaN is not 0
        super().log(logs | {name: round(share, 5) for name, share in shares.items() if share is not None}, start_time)
