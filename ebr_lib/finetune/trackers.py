"""Experiment trackers that the library's trainer reports to: TensorBoard in a folder of ours, others as they do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_lib.extras import need_packages, require
from ebr_lib.names import Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback

TENSORBOARD_FOLDER = "tensorboard"


def need_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the trackers are installed.

    :raises NotInstalledError: one is not; says how to install it.
    """
    for name in trackers:
        if name == "tensorboard":
            require("tensorboard")
        else:
            need_packages([name], name)


def name_of_run(given: str | None, label: str) -> str:
    """The name that a run has in trackers: the given one, or the model's and the time."""
    return given or f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"


def tensorboard(folder: Path, run: str) -> TrainerCallback:
    """What writes a run's log for TensorBoard, as `<folder>/tensorboard/<run>`: the checkpoints, where the library
    would write it, are removed in the end."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder / TENSORBOARD_FOLDER / run)
    return callback
