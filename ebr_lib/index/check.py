"""Check the embedding file and the queries of an index before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.data.advice import read_advice
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.queries import read_queries
from ebr_lib.index.after import text_column
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.milvus import check_milvus
from ebr_lib.index.milvus_upload import kind_in
from ebr_lib.index.store import check_folder
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.handover import Handover, check_columns, check_paths, errors_of
from ebr_lib.model.provenance import Provenance


def check(config: IndexConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong."""
    look_for_models(config.base_model_path, config.hub)
    errors: list[str] = []
    found = before.columns_of("embedding_path", config.embedding_path, errors)
    yield from errors
    yield from check_columns({"id_column": config.id_column}, found, config.embedding_path)
    if config.hybrid and found is not None:
        place = Path(config.embedding_path).expanduser()
        encoded = before.encoded.get(place.resolve())
        encoded = encoded or Provenance.of(read_manifest(place) or {}).description_column
        yield from errors_of(lambda: text_column(place, found, encoded, config.text_column))
    yield from errors_of(lambda: read_advice(config.evaluation_dir, None))
    missing = list(check_paths(queries_path=before.not_written(config.queries_path)))
    yield from missing
    for path in () if missing else before.not_written(config.queries_path):
        yield from errors_of(lambda path=path: read_queries(Path(path), config.query_column))  # type: ignore[misc] # at once
    is_milvus = kind_in(config.kind) is not None
    yield from errors_of(lambda: check_folder(Path(config.output_dir), config.kind, is_milvus=is_milvus))
    if is_milvus:
        yield from errors_of(lambda: check_milvus(config.uri, config.milvus_token_file))
    if config.model_name:
        yield from before.check_model("model_name", config.model_name)
