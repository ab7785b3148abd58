"""Checkpoints of interrupted runs: which one to resume from, and that it belongs to the same run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ebr_lib.errors import ConfigError
from ebr_lib.files import write_json
from ebr_lib.finetune.paths import CHECKPOINTS_SUFFIX
from ebr_lib.logs import logger

RUN_FILE = "run.json"


def find_checkpoint(folder: Path, run: Mapping[str, Any], *, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a new run, which moves old checkpoints aside.

    :param run: all that decides a run's result, as JSON values; saved beside the checkpoints and compared.
    :raises ConfigError: the checkpoints are those of another run.
    """
    note = folder / RUN_FILE
    if resume:
        _rename_moved_run(folder, run)
        if note.is_file() and (last := _last_complete_checkpoint(folder)):
            _check_same_run(_read(note), run, note)
            logger.info("从检查点继续 going on from %s", last)
            return last
        logger.info("没有可继续的检查点，从头训练 no checkpoint to go on from in %s: starting at the beginning", folder)
    if note.is_file() and _last_complete_checkpoint(folder):
        places = (folder.with_name(f"{folder.name}.previous{f'-{n}' if n > 1 else ''}") for n in count(1))
        aside = next(place for place in places if not place.exists())
        folder.rename(aside)
        logger.warning("上次中断的检查点已移到 checkpoints of an unfinished run were moved to %s", aside)
    elif note.is_file():
        shutil.rmtree(folder)  # that run ended before its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, run)
    return None


def _read(note: Path) -> dict[str, Any]:
    return json.loads(note.read_text(encoding="utf-8"))


def _rename_moved_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Rename the checkpoints of the same run to `folder`, where its model had another name."""
    if (folder / RUN_FILE).exists():
        return
    for note in sorted(folder.parent.glob(f"*{CHECKPOINTS_SUFFIX}/{RUN_FILE}")):
        if _read(note) == run:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()  # the trainer has made it
            note.parent.rename(folder)
            logger.info("检查点已改名 checkpoints of the same run: %s is now %s", note.parent, folder)
            return


def _last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; later ones, which a kill cut short, are removed."""
    while last := get_last_checkpoint(str(folder)):
        with contextlib.suppress(OSError, ValueError):
            _read(Path(last) / TRAINER_STATE_NAME)  # the trainer writes it last
            return last
        logger.warning("检查点不完整，已删除 removed an incomplete checkpoint: %s", last)
        shutil.rmtree(last)
    return None


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], note: Path) -> None:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        shown = "; ".join(f"{name}: was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise ConfigError(
            f"resume_from_checkpoint: the interrupted run was another one ({note}): {shown}. "
            "Set these back, or start again with resume_from_checkpoint: no"
        )
