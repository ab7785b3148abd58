"""Check the log and the catalogue before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.files import check_replaceable
from ebr_lib.model.handover import Handover, check_paths, errors_of
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.outputs import HELDOUT_FILES, HELDOUT_FOLDER, PAIRS_FILE, is_own


def check(config: PairsConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong; add the pairs that will be written to what is handed over."""
    folder = Path(config.output_dir)
    if config.sql_table:
        return
    yield from check_paths(log_path=config.log_path, catalogue_path=config.catalogue_path)
    yield from errors_of(lambda: check_replaceable(folder, is_own))
    before.pairs = folder / PAIRS_FILE
    heldout = folder / HELDOUT_FOLDER
    written = (heldout, *(heldout / name for name in HELDOUT_FILES)) if config.holdout_days else ()
    before.files |= {path.expanduser().resolve() for path in (before.pairs, *written)}
