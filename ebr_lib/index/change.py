"""Add rows to an index, and delete rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.files import write_json
from ebr_lib.index import milvus_upload, store
from ebr_lib.index.after import words_column
from ebr_lib.index.build import appending, vector_batches, write_bm25
from ebr_lib.index.filters import as_texts
from ebr_lib.index.milvus import MilvusIndex
from ebr_lib.index.opened import Opened, SearchIndex, open_index
from ebr_lib.logs import logger
from ebr_lib.model.provenance import Provenance


def add_rows(index_dir: str | Path, embedding_path: str | Path) -> int:
    """Add the rows of an embedding file to an index; returns how many it then has, without hidden ones.

    The measured setting stays; build the index again when it has grown by much. In Milvus, new rows replace those with
    their ids, and are found as they arrive; if that is interrupted, the same call continues, as one of `delete_rows`.

    :raises ModelError: another model made the new vectors, or another prompt or length.
    :raises DataError: another dimension, or a kept column is missing.
    :raises MissingError: there is no index, or no embedding file, at its place.
    """
    folder = Path(index_dir)
    open_index(folder)  # or `locked` would make a folder
    with store.locked(folder):
        held = open_index(folder)
        next(iter_embeddings(embedding_path, held.columns))  # report a missing file or column first
        _check_same_maker(held, embedding_path)
        if isinstance(held, MilvusIndex):
            return milvus_upload.append(held, str(embedding_path))
        with store.changed_together(folder) as new:
            _write_with_rows_of(embedding_path, held, new)
            added = store.read_rows(new / store.ROWS_FILE).slice(len(held.rows))
            known = held.known_among(added)
    if known:
        logger.warning(
            "ID 已在索引中 ids in the index already: %d of the new rows (column %s); a search finds both, delete_rows "
            "hides both", known, held.manifest["id_column"],
        )  # fmt: skip
    return len(held) + len(added)


def _write_with_rows_of(embedding_path: str | Path, held: SearchIndex, folder: Path) -> None:
    """Write an opened index, with the rows of an embedding file after its own, to a folder."""
    for name in (store.CONFIG_FILE, store.CURVE_FILE):
        if (place := held.folder / name).is_file():
            shutil.copyfile(place, folder / name)
    store.write_deleted(folder, held.deleted)
    of_row, digests = store.read_distinct(store.place_of(held.folder, store.VECTORS_FILE))
    unknown = (i.to_bytes(store.DIGEST) for i in range(len(digests), held.index.ntotal))  # equal to no digest
    distinct = store.Distinct(of_row if len(of_row) else np.arange(len(held.rows)), [*digests, *unknown])
    columns = held.columns
    first = held.rows.column(store.ROW)[-1].as_py() + 1  # row numbers continue, so that each means one row
    with appending(held.index, distinct, folder / store.ROWS_FILE, columns, held.rows.to_batches()) as append:
        for batch in vector_batches(embedding_path, columns, held.dim, "the index"):
            append(batch, first)
    if (words := words_column(held.manifest)) and held.bm25 is not None:
        write_bm25(folder, held.bm25, words)
    size = store.save_vectors(folder, held.index)
    distinct.save(folder / store.VECTORS_FILE)
    numbers = {"rows": len(distinct.of_row), "vectors": int(held.index.ntotal), "index_bytes": size}
    write_json(folder / store.MANIFEST_FILE, held.manifest | numbers)


def _check_same_maker(held: Opened, embedding_path: str | Path) -> None:
    """New rows must have the model and settings of the index's; another precision is only warned about."""
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
        logger.warning("%s: 精度与索引不同 another precision than the index's (%s)", embedding_path, wrong[0])


def delete_rows(index_dir: str | Path, ids: object, column: str | None = None) -> int:
    """Hide rows from every search, until the index is built again; returns how many rows are left. Milvus deletes them.

    :param ids: one id or several.
    :param column: the kept column that holds the ids; None takes the index's `id_column`, else the row numbers.
    :raises DataError: no row has an id, or the column is not kept.
    """
    folder, found = Path(index_dir), as_texts(ids)
    wanted = [text for text in found if text is not None]
    if len(wanted) < len(found):
        raise ConfigError("ids: None is not an id; leave it out")
    open_index(folder)  # or `locked` would make a folder
    with store.locked(folder):
        held = open_index(folder)
        column = column or held.manifest["id_column"] or store.ROW
        if isinstance(held, MilvusIndex):
            return milvus_upload.delete(held, wanted, column)
        numbers = held.numbers_of(wanted, column)
        deleted = np.union1d(held.deleted, numbers)
        store.write_deleted(folder, deleted)
    return len(held.rows) - len(deleted)
