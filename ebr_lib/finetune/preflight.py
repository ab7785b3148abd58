"""Before training: try the longest batch, so that a run that cannot fit fails now, and estimate the run's time."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from ebr_lib.finetune.memory import peak_memory_mb, reset_peak
from ebr_lib.finetune.trainer import EbrTrainer, count_steps
from ebr_lib.logs import logger
from ebr_lib.model.attention import evaluating

# how well an average batch is known: rows whose tokens are counted, batches that are run
SAMPLED_ROWS, TIMED_BATCHES = 2048, 2


@dataclass(frozen=True)
class Preflight:
    """Seconds on average, and of the longest training batch with its peak memory."""

    batch: float = 0.0
    evaluation: float = 0.0  # per batch
    checkpoint: float = 0.0
    longest: float = 0.0
    peak_mb: float = 0.0


def log_preflight(trainer: EbrTrainer, measuring: float) -> None:
    """Run the preflight, and log what it found.

    :param measuring: seconds that it takes to measure the model on the held-out anchors.
    """
    found = preflight(trainer)
    seconds = estimated_seconds(trainer, found, measuring)
    logger.info(
        "预检 preflight: longest batch %.2f s, peak memory %.0f MB; average batch %.2f s; "
        "预计训练用时（含评估与检查点）training with evaluations and checkpoints takes about %s",
        found.longest,
        found.peak_mb,
        found.batch,
        f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min",
    )


def preflight(trainer: EbrTrainer) -> Preflight:
    """Try what a run does: the longest texts, batches of average size, an evaluation batch, a checkpoint.

    Weights, gradients and random state are as before afterwards.
    """
    if trainer.args.activation_checkpointing:  # the trainer enables it when training begins, too late for this
        trainer.model.gradient_checkpointing_enable(**trainer.args.activation_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = 1
    rows = longest_rows(trainer.train_dataset, trainer.model.tokenizer, trainer.args.train_batch_size)
    with trainer.trial():
        reset_peak()
        longest = _batch_seconds(trainer, trainer.train_dataset, rows)
        peak = peak_memory_mb()
        costliest = _work(
            _tokens(trainer, trainer.train_dataset, rows), range(len(rows)), _rows_at_once(trainer, len(rows))
        )
        batch = _average_seconds(trainer, trainer.train_dataset, (costliest, longest))
        evaluation = 0.0
        if trainer.eval_dataset is not None:
            with evaluating(trainer.model):
                evaluation = _average_seconds(trainer, trainer.eval_dataset)
    return Preflight(batch, evaluation, _checkpoint_seconds(trainer), longest, peak)


def _batch_seconds(trainer: EbrTrainer, dataset: Dataset, rows: Sequence[int]) -> float:
    start = _now()
    batch = trainer.data_collator([dataset[row] for row in rows])
    if dataset is trainer.train_dataset:
        trainer.training_step(trainer.model, batch)
    else:
        trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    return _now() - start


def _checkpoint_seconds(trainer: EbrTrainer) -> float:
    if not trainer.is_world_process_zero():
        return 0.0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=trainer.args.output_dir) as folder:
        trainer.save_model(folder)
    return time.perf_counter() - start


def _average_seconds(trainer: EbrTrainer, dataset: Dataset, costliest: tuple[float, float] | None = None) -> float:
    """Seconds of an average batch: of batches drawn at random, those with nearly the mean number of tokens are run.

    With a few very long texts no batch is near the mean; it is then interpolated between the batches that were run and
    `costliest`, the (tokens, seconds) of the longest batch.
    """
    size = trainer.args.train_batch_size if dataset is trainer.train_dataset else trainer.args.eval_batch_size
    rows = np.random.default_rng(0).permutation(len(dataset))[: max(SAMPLED_ROWS, size)]
    tokens, step = _tokens(trainer, dataset, rows.tolist()), _rows_at_once(trainer, size)
    batches = [range(start, start + size) for start in range(0, len(rows) - size + 1, size)] or [range(len(rows))]
    work = np.array([_work(tokens, batch, step) for batch in batches])
    nearest = np.abs(work - work.mean()).argsort(kind="stable")[:TIMED_BATCHES].tolist()
    seconds = float(np.mean([_batch_seconds(trainer, dataset, rows[batches[i]].tolist()) for i in nearest]))
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
    """Tokens of a batch, padding included, where `step` rows are padded to one length."""
    parts = [list(batch[start : start + step]) for start in range(0, len(batch), step)]
    return float(sum(len(part) * tokens[:, part].max(axis=1).sum() for part in parts))


def _rows_at_once(trainer: EbrTrainer, size: int) -> int:
    """Rows padded to one length: all that are embedded at a time, or one where rows are packed."""
    at_once = trainer.loss.rows_at_once(size)
    return 1 if trainer.loss.packed is not None and at_once == size else at_once


def estimated_seconds(trainer: EbrTrainer, found: Preflight, measuring: float) -> float:
    """Seconds that training takes with its evaluations and checkpoints."""
    args, rows = trainer.args, len(trainer.train_dataset)
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    steps = count_steps(rows, size, accumulation, args.num_train_epochs)
    epochs, rest = divmod(steps, count_steps(rows, size, accumulation, 1))
    ends = math.ceil(args.num_train_epochs)
    training = found.batch * (epochs * count_steps(rows, size, 1, 1) + rest * accumulation)
    training += found.checkpoint * (-(-steps // args.save_steps) if args.save_strategy == "steps" else ends)
    if trainer.eval_dataset is None:
        return training
    evaluations = -(-steps // args.eval_steps) if args.eval_steps else ends
    losses = found.evaluation * count_steps(len(trainer.eval_dataset), args.eval_batch_size, 1, 1)
    return training + losses + evaluations * (measuring + losses)  # the first loss is that before any step


def longest_rows(dataset: Dataset, tokenizer: Any, count: int) -> list[int]:
    """Numbers of the `count` rows that make the costliest batch: those with the longest text of a column, which decides
    its padding, then those with most tokens.

    Tokens are counted only for the rows with most bytes. Bytes predict tokens better than letters do: a Chinese letter,
    about one token, has three bytes, an English word about five.
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
    """The clock, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
