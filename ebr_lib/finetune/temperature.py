"""The temperature that fits a model: where its own contrastive loss is smallest before it is trained.

A model's cosines are spread as its own training left them. With a larger temperature than that training had, the loss
asks for a wider spread of vectors that are right already; with a smaller one it is ruled by a few pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebr_lib.files import write_json
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.processes import from_first_process, is_first_process
from ebr_lib.logs import logger

if TYPE_CHECKING:
    from ebr_lib.finetune.trainer import EbrTrainer

# Public recipes lie within. Steps of a fifth: the loss is flat around its minimum.
TEMPERATURES = (0.01, 0.012, 0.014, 0.017, 0.02, 0.024, 0.028, 0.033, 0.04, 0.05, 0.06, 0.07, 0.085, 0.1)
UNKNOWN = 0.05
PAIRS = 512

Sample = Sequence[tuple[list[list[Tensor]], Tensor]]
"""Batches: vectors of the columns as `ContrastiveLoss.calculate_loss` takes them, and labels (rows,)."""


def settle_temperature(trainer: EbrTrainer, note: Path, *, resumed: bool) -> float:
    """Give the loss the temperature that fits the model, and return it; a resumed run keeps the one in its note."""
    if resumed and note.is_file():
        temperature = float(json.loads(note.read_text(encoding="utf-8"))["temperature"])
        logger.info("温度 temperature: %g (auto, as the interrupted run found it)", temperature)
    else:
        temperature = from_first_process(_search(trainer))
        if is_first_process():
            write_json(note, {"temperature": temperature})
    trainer.loss.temperature = temperature
    return temperature


def _search(trainer: EbrTrainer) -> float:
    sample = trainer.embedded_sample(PAIRS)
    temperature, losses = best_temperature(trainer.loss, sample)
    logger.info(
        "温度 temperature: %g (auto: 训练前损失最小 smallest loss before training, %.4f on %d pairs; at %g it is %.4f)",
        temperature,
        losses[temperature],
        sum(len(labels) for _, labels in sample),
        UNKNOWN,
        losses[UNKNOWN],
    )
    return temperature


def best_temperature(loss: ContrastiveLoss, sample: Sample) -> tuple[float, dict[float, float]]:
    """The temperature of `TEMPERATURES` with the smallest contrastive loss, and that loss at each, as training has it:
    with logQ, the guide's and the known positives' masks, row weights and both directions, without smoothing, teacher
    and L1.

    `UNKNOWN` where no loss is a finite number. For one batch the loss is convex in 1 / temperature, so there is one
    minimum.
    """
    losses = {temperature: _loss_at(loss, sample, temperature) for temperature in TEMPERATURES}
    finite = {temperature: value for temperature, value in losses.items() if math.isfinite(value)}
    return min(finite, key=finite.__getitem__, default=UNKNOWN), losses


def _loss_at(loss: ContrastiveLoss, sample: Sample, temperature: float) -> float:
    """Mean over the pairs of the sample; leaves the loss as it was."""
    inner = getattr(loss.model, "module", loss.model)
    kept, mode = (loss.temperature, loss.masked, loss.guided, loss.negatives), inner.training
    loss.temperature, inner.training = temperature, True  # the vectors are there: the mode only chooses the loss
    try:
        with torch.no_grad():
            parts = [float(loss.contrastive_loss(vectors, labels)) * len(labels) for vectors, labels in sample]
    finally:
        loss.temperature, loss.masked, loss.guided, loss.negatives = kept
        inner.training = mode
    return sum(parts) / sum(len(labels) for _, labels in sample)
