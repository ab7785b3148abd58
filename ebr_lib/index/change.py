"""Add rows to an index, and delete rows."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.files import write_json
from ebr_lib.index.build import RowsWriter, vector_batches
from ebr_lib.index.faiss_tools import adding
from ebr_lib.index.run import CONFIG_FILE, CURVE_FILE
from ebr_lib.index.search import SearchIndex, as_texts, distinct_of, open_index
from ebr_lib.index.store import (
    MANIFEST_FILE,
    ROW,
    ROWS_FILE,
    VECTORS_FILE,
    changed_together,
    locked,
    read_rows,
    save_vectors,
    write_deleted,
)
from ebr_lib.logs import logger
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import Provenance


def add_rows(index_dir: str | Path, embedding_path: str | Path) -> int:
    """Add the rows of an embedding file to an index; returns how many it then has, hidden ones not counted.

    The setting that was measured stays; build anew when the index has grown by much.

    :raises ModelError: another model made the new vectors, or another prompt or length.
    :raises DataError: another dimension, or a kept column is missing.
    :raises MissingError: there is no index, or no embedding file, at its place.
    """
    folder = Path(index_dir)
    open_index(folder)  # a place that holds none is not made one
    with locked(folder):
        held = open_index(folder)
        columns = held.rows.column_names[1:]
        next(iter_embeddings(embedding_path, columns))  # report a missing file or column before the rest
        _check_same_maker(held, embedding_path)
        with changed_together(folder) as new:
            known = _add(held, embedding_path, new)
        left = len(held.rows) + known.added - len(held.deleted)
    if known.twice:
        logger.warning(
            "%d of the new rows have an id (column %s) that stood in the index already: both are found, delete_rows "
            "hides both", known.twice, held.manifest["id_column"],
        )  # fmt: skip
    return left


@dataclass(frozen=True)
class _Added:
    """Rows that were added, and how many have an id that the index had."""

    added: int
    twice: int


def _add(held: SearchIndex, embedding_path: str | Path, folder: Path) -> _Added:
    """Write an opened index with the rows of an embedding file behind its own to a folder."""
    for name in (CONFIG_FILE, CURVE_FILE):
        if (place := held.folder / name).is_file():
            shutil.copyfile(place, folder / name)
    columns, distinct, add = held.rows.column_names[1:], distinct_of(held), adding(held.index)
    write_deleted(folder, held.deleted)
    sidecar = RowsWriter(folder / ROWS_FILE, columns)
    for part in held.rows.to_batches():
        sidecar.add_batch(part)
    first = held.rows.column(ROW)[-1].as_py() + 1  # row numbers go on, so that each stands for one row
    for batch in vector_batches(embedding_path, columns, held.index.d, "the index"):
        if len(batch):
            vectors = unit(batch.vectors)
            if (new := distinct.place(vectors)).any():
                add(vectors[new])
            sidecar.add(batch.rows + first, batch.columns)
    sidecar.close()
    rows = read_rows(folder / ROWS_FILE)
    size = save_vectors(folder, held.index)
    distinct.save(folder / VECTORS_FILE)
    numbers = {"rows": len(rows), "vectors": int(held.index.ntotal), "index_bytes": size}
    write_json(folder / MANIFEST_FILE, held.manifest | numbers)
    return _Added(len(rows) - len(held.rows), held.known_among(rows.slice(len(held.rows))))


def _check_same_maker(held: SearchIndex, embedding_path: str | Path) -> None:
    """New rows must be made as the index's were; another precision is near enough."""
    maker, new = Provenance.of(held.manifest), Provenance.of(read_manifest(embedding_path) or {})
    if maker.sha256 != new.sha256 and not maker.weights & new.weights:
        raise ModelError(
            f"{embedding_path} holds vectors of {new.said}, the index {held.folder} of {maker.said}; "
            "encode the new rows with the index's model"
        )
    known = {name for name in ("prompt", "max_seq_length", "trust_remote_code") if getattr(maker, name) is not None}
    if wrong := maker.differences({name: getattr(new, name) for name in known}):
        raise ModelError(
            f"{embedding_path} was not made as the index {held.folder} was ({'; '.join(wrong)}); "
            "encode the new rows with the index's settings"
        )
    if maker.precision and (wrong := maker.differences({"precision": new.precision})):
        logger.warning("%s: another precision than the index's (%s)", embedding_path, wrong[0])


def delete_rows(index_dir: str | Path, ids: object, column: str | None = None) -> int:
    """Hide rows from every search, until the index is built again; returns how many rows are left.

    :param ids: one id or several.
    :param column: the kept column that holds the ids; None takes the index's `id_column`, else the row numbers.
    :raises DataError: an id is in no row, or the column is not kept.
    """
    folder, wanted = Path(index_dir), _ids(ids)
    open_index(folder)
    with locked(folder):
        held = open_index(folder)
        numbers = held.numbers_of(wanted, column or held.manifest["id_column"] or ROW)
        deleted = np.union1d(held.deleted, numbers)
        write_deleted(folder, deleted)
    return len(held.rows) - len(deleted)


def _ids(ids: object) -> list[str]:
    """One id or several, as texts."""
    found = as_texts(ids)
    if None in found:
        raise ConfigError("ids: None is not an id; leave it out")
    return [text for text in found if text is not None]
