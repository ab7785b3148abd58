"""The trainer: sentence-transformers' own, with exact adapters, honest batches, and a way out of memory trouble."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ebr_lib.errors import ModelError
from ebr_lib.files import write_json
from ebr_lib.logs import logger
from ebr_lib.model.adapters import ADAPTER_FILE, adapter_weights, read_adapter, set_adapter_weights
from ebr_lib.model.losses import ContrastiveLoss

Rows = list[dict[str, Any]]
Noise = Callable[[str, int, int, str], str]
"""(text, epoch, row, column) to the text with noise."""

MEMORY_ADVICE = "train_batch_size → gradient_accumulation_steps → gradient_checkpointing → max_seq_length"


class NoisyCollator:
    """Puts noise into the training texts before they are tokenised; evaluation never sees it.

    The epoch lives in shared memory, so that worker processes see it change.
    """

    def __init__(self, collate: Callable[[Rows], dict[str, Any]], noise: Noise, columns: Sequence[str]) -> None:
        self.collate = collate
        self.noise = noise
        self.columns = frozenset(columns)
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.valid_label_columns = getattr(collate, "valid_label_columns", ["label"])

    def __call__(self, rows: Rows) -> dict[str, Any]:
        epoch = int(self.epoch)
        return self.collate([self._noisy(row, epoch) for row in rows])

    def _noisy(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        return {
            name: self.noise(value, epoch, row["label"], name) if self._takes(name) else value
            for name, value in row.items()
        }

    def _takes(self, name: str) -> bool:
        return name.split("_", maxsplit=1)[0] in self.columns  # negative_1, negative_2 … are all "negative"


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch; tells the noise which epoch it is."""

    def __init__(self, batches: Any, epoch_cell: Tensor | None) -> None:
        self.batches = batches
        self.batch_size: int = batches.batch_size
        self.drop_last: bool = batches.drop_last
        self._cell = epoch_cell

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
        if self._cell is not None:
            self._cell.fill_(epoch)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


BatchMaker = Callable[..., Any]
"""(rows, batch_size, drop_last, seed) to a batch sampler; `rows` are row numbers of the training data."""


class EbrTrainer(SentenceTransformerTrainer):
    """Adds to the library's trainer: balanced batches, noise, exact adapters, out-of-memory handling, a preflight."""

    loss: ContrastiveLoss
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        batches: BatchMaker,
        noise: Noise | None = None,
        noise_columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self._batches = batches
        self._noise, self._noise_columns = noise, noise_columns
        self._noisy: NoisyCollator | None = None
        super().__init__(*args, **kwargs)

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
        """Batches of full size that use every row once and hold as many different documents as they can."""
        batches = self._batches(dataset["label"], batch_size, drop_last, kwargs.get("seed") or 0)
        is_train = dataset is self.train_dataset
        return EpochBatches(batches, self._noisy.epoch if self._noisy and is_train else None)

    # --- memory ---

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; when memory runs out, again in micro-batches of half the size."""
        gradients = [weight.grad.clone() if weight.grad is not None else None for weight in self.loss.weights]
        random_state = torch.get_rng_state()
        while True:
            try:
                return super().training_step(model, dict(inputs), num_items_in_batch)
            except (torch.OutOfMemoryError, MemoryError) as error:
                rows = len(inputs["label"])
                self._halve(rows, error)
            for weight, gradient in zip(self.loss.weights, gradients, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            torch.set_rng_state(random_state)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, rows: int, error: BaseException) -> None:
        now = min(self.loss.mini_batch_size or rows, rows)
        if now <= 1:
            raise ModelError(
                f"out of memory with one row at a time ({error}); lower max_seq_length, or set gradient_checkpointing"
            ) from error
        self.loss.mini_batch_size = now // 2
        logger.warning(
            "out of memory / 内存不足: micro-batch %d → %d; effective batch, negatives and seeds stay the same. "
            "To settle it for good, in this order: %s (configs/finetune/low_memory.yaml)",
            now,
            now // 2,
            MEMORY_ADVICE,
        )

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), create_model_card=False)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        """The adapter as it was saved: float32, not rounded through the base's type as the library's way does."""
        set_adapter_weights(self.model, read_adapter(Path(checkpoint_path)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        share = self.loss.take_masked_share() if "loss" in logs else None
        super().log(logs | ({} if share is None else {"masked_share": round(share, 5)}), start_time)


@dataclass(frozen=True)
class Preflight:
    """What the longest batch cost: seconds a step, and peak memory in MB."""

    seconds: float
    peak_mb: float


def fly_longest_batch(trainer: EbrTrainer, rows: Sequence[int]) -> Preflight:
    """Run forward and backward on given rows, the longest ones, so that a run that cannot fit fails now.

    Weights, gradients and random state are as before afterwards.
    """
    with _same_random_state():
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        start = time.perf_counter()
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, batch)
        seconds = time.perf_counter() - start
        for weight in trainer.loss.weights:
            weight.grad = None
        trainer.loss.take_masked_share()
    trainer.accum_loss_components = {"train": {}, "eval": {}}
    return Preflight(seconds, peak_memory_mb())


@contextmanager
def _same_random_state() -> Any:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def peak_memory_mb() -> float:
    """Peak memory so far: the GPU's allocations where there is one, else this process's resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class KeepBest(TrainerCallback, ExportableState):
    """Keeps the best adapter on disk, exactly, and stops the run when it no longer gets better.

    An evaluation counts as better when the metric moved by more than `threshold` in the right direction.
    `patience` evaluations in a row without one stop the run; 0 never does.
    """

    def __init__(self, metric: str, greater_is_better: bool, patience: int, threshold: float, folder: str) -> None:
        self.metric, self.greater_is_better = metric, greater_is_better
        self.patience, self.threshold = patience, threshold
        self.folder = folder
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def state(self) -> dict[str, Any]:
        names = ("metric", "greater_is_better", "patience", "threshold", "folder")
        kept = ("best", "best_step", "waited")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in kept},
        }

    def offer(self, value: float, step: int) -> bool:
        """Take note of an evaluation; true when it is the best so far."""
        gain = 0.0 if self.best is None else (value - self.best) * (1 if self.greater_is_better else -1)
        if self.best is not None and gain <= self.threshold:
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = value, step, 0
        return True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        value = metrics[f"eval_{self.metric}"]
        if self.offer(value, state.global_step) and state.is_world_process_zero:
            self.keep(kwargs["model"])
        if self.patience and self.waited >= self.patience:
            logger.info("早停 / early stopping: %d evaluations without a better %s", self.waited, self.metric)
            control.should_training_stop = True

    def keep(self, model: SentenceTransformer) -> None:
        from safetensors.torch import save_file

        from ebr_lib.files import written_whole

        with written_whole(Path(self.folder) / ADAPTER_FILE) as new:
            save_file(adapter_weights(getattr(model, "module", model)), new)
        write_json(Path(self.folder) / "best.json", {"metric": self.metric, "value": self.best, "step": self.best_step})

    def restore(self, model: SentenceTransformer) -> None:
        """Put the best weights back into the model, bit for bit."""
        if self.best is not None:
            set_adapter_weights(model, read_adapter(Path(self.folder)))


class HeldoutEvaluator(BaseEvaluator):
    """Retrieval metrics of the held-out anchors, as the library's trainer wants an evaluator."""

    def __init__(self, measure: Callable[[SentenceTransformer], dict[str, float]], primary: str) -> None:
        super().__init__()
        self.measure = measure
        self.primary_metric = primary
        self.greater_is_better = True

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        return self.measure(model)
