"""Check the embedding files of a picture before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator

from ebr_lib.model.handover import Handover, check_columns
from ebr_lib.visualize.config import VisConfig


def check(config: VisConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong."""
    errors: list[str] = []
    found = before.columns_of("embedding_path", config.embedding_path, errors)
    wanted = {name: getattr(config, name) for name in ("label_column", "text_column", "id_column")}
    errors += check_columns(wanted, found, config.embedding_path)
    if config.compare_path:
        found = before.columns_of("compare_path", config.compare_path, errors)
        errors += check_columns({"id_column": config.id_column}, found, config.compare_path)
    yield from errors
