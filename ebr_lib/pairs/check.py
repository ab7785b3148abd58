"""Check the log and the catalogue before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.files import check_replaceable
from ebr_lib.model.handover import Handover, check_paths, errors_of
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.outputs import HELDOUT_FOLDER, PAIRS_FILE, is_own


def check(config: PairsConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong; add the pairs that will be written to what is handed over."""
    folder = Path(config.output_dir)
    if config.sql_table:
        return
    yield from check_paths(log_path=config.log_path, catalogue_path=config.catalogue_path)
    yield from errors_of(lambda: check_replaceable(folder, is_own))
    before.files.add((folder / PAIRS_FILE).resolve())
    if config.holdout_days:
        before.files |= {folder.resolve() / HELDOUT_FOLDER, folder.resolve() / HELDOUT_FOLDER / PAIRS_FILE}
