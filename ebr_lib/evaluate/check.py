"""Check the models, queries and documents of an evaluation before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.data.queries import need_column, query_texts, read_records
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.task import find_sources
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.handover import Handover, check_paths, errors_of

SMALL = 16 << 20  # bytes of a file of queries that is read to check its columns


def check(config: EvalConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong."""
    look_for_models(config.base_model_path, config.hub)
    for name in config.models:
        yield from before.check_model("models", name)
    paths = {name: before.not_written(getattr(config, name)) for name in ("queries_path", "corpus_path", "qrels_path")}
    if config.corpus_path and Path(config.corpus_path).expanduser().resolve() in before.columns:
        paths["corpus_path"] = []
    missing = list(check_paths(**paths, train_data_path=before.not_written(config.train_data_path)))
    planned = any(getattr(config, name) and not there for name, there in paths.items())
    planned = planned or not (config.queries_path or before.not_written(config.data_path))
    trained = before.models.get(Path(config.data_path or ".").expanduser().resolve())
    if not config.queries_path and trained is not None:
        if not trained:
            yield f"data_path: {config.data_path} will hold no held-out queries; fine-tune with eval_ratio above 0"
    elif not missing and not planned:
        yield from errors_of(lambda: _read(config))
    yield from missing


def _read(config: EvalConfig) -> None:
    """Find the files, and read the queries if they are few.

    :raises UserError: a file or a column is not there.
    """
    sources = find_sources(config.data_path, config.queries_path, config.corpus_path, config.qrels_path)
    if sources.queries.is_file() and sources.queries.stat().st_size <= SMALL:
        records = read_records(sources.queries)
        query_texts(sources.queries, records, config.query_column)
        for name in config.slice_columns:
            need_column(sources.queries, records, name)
