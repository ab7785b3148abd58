"""The documents of a catalogue: texts of any table that is read here, or an embedding file with its vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.columnar import read_schema
from ebr_lib.data.containers import COLUMNAR, opened
from ebr_lib.data.embeddings.base import NPY, VECTOR, ending_of, read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.data.queries import DOCUMENT_TEXTS, Record, kind_in, read_records, tables_in, text_column
from ebr_lib.data.text import half_character, is_blank, text_keys
from ebr_lib.errors import DataError, MissingError
from ebr_lib.logs import logger
from ebr_lib.metrics import unit


@dataclass(frozen=True)
class Catalogue:
    """Distinct texts (`normalised`) in the order of their file.

    :ivar keys: `text_keys` of the texts, shape (texts,).
    :ivar vectors: of length 1, shape (texts, dim), where the file holds them.
    :ivar manifest: of the embedding file, which says what made the vectors.
    """

    path: Path
    texts: list[str] = field(repr=False)
    keys: Ints = field(repr=False)
    vectors: Vectors | None = field(default=None, repr=False)
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hash of the texts and vectors, wherever the file is."""
        digest = hashlib.sha256(self.keys.tobytes())
        digest.update(b"" if self.vectors is None else self.vectors.tobytes())
        return digest.hexdigest()

    def without(self, keys: Collection[int]) -> Catalogue:
        """The same without some texts."""
        return self._at(np.flatnonzero(~np.isin(self.keys, np.fromiter(keys, np.int64, len(keys)))))

    def distinct(self) -> Catalogue:
        """The same with the first of equal texts alone."""
        return self._at(np.sort(np.unique(self.keys, return_index=True)[1]))

    def _at(self, rows: Ints) -> Catalogue:
        if len(rows) == len(self):
            return self
        vectors = None if self.vectors is None else self.vectors[rows]
        return replace(self, texts=[self.texts[row] for row in rows], keys=self.keys[rows], vectors=vectors)


def read_catalogue(path: str | Path, column: str | None, knob: str) -> Catalogue:
    """Read a catalogue: a table with a header row (see `read_records`), or an embedding file, rows without vector left
    out. Blank texts are left out too.

    :param column: the column of the texts; None takes the one that was encoded, or the first of `DOCUMENT_TEXTS`.
    :param knob: the knob that names the column, for the error.
    :raises MissingError: there is no such file.
    :raises DataError: it cannot be read, or has no column of text, or no text.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"catalogue {path}: there is no such file or folder")
    vectors: Vectors | None = None
    manifest: Mapping[str, Any] = {}
    if holds_vectors(path):
        texts, vectors, manifest = _embedded(path, column, knob)
    else:
        records = read_records(path)
        name = text_column(path, records, column, DOCUMENT_TEXTS, knob)
        texts = [titled(record, name) for record in records]
    kept = [row for row, text in enumerate(texts) if not is_blank(text)]
    if not kept:
        raise DataError(f"{path}: none of its {len(texts)} rows has text; name another column with {knob}")
    if (broken := half_character(texts)) is not None:
        raise DataError(f"{path}: row {broken} holds half of a surrogate pair; write the file as UTF-8")
    read = [texts[row] for row in kept]
    whole = Catalogue(path, read, text_keys(read), None if vectors is None else vectors[kept], manifest).distinct()
    logger.info("语料 catalogue %s: %d distinct texts of %d rows", path, len(whole), len(texts))
    return whole


def _embedded(path: Path, column: str | None, knob: str) -> tuple[list[str], Vectors, Mapping[str, Any]]:
    manifest = read_manifest(path) or {}
    encoded = (manifest.get("settings") or {}).get("description_column")
    found = list(next(iter_embeddings(path)).columns)
    name = text_column(path, [dict.fromkeys(found)], column, (encoded,) if encoded else DOCUMENT_TEXTS, knob)
    batches = [batch for batch in iter_embeddings(path, [name]) if len(batch)]
    if not batches:
        raise DataError(f"{path} holds no vectors; encode it again")
    texts = [text or "" for batch in batches for text in batch.columns[name]]
    return texts, unit(np.concatenate([batch.vectors for batch in batches])), manifest


def titled(record: Record, column: str) -> str:
    """The text of a record; that of a BEIR document is its title, a space, its text."""
    text, title = record.get(column), record.get("title")
    return f"{title} {text or ''}".strip() if title and column == "text" else str(text or "")


def holds_vectors(path: Path) -> bool:
    """Whether a file or folder is an embedding file."""
    manifest = read_manifest(path)
    has_header = not manifest or (manifest.get("settings") or {}).get("output_header", True)
    if ending_of(path) == NPY or not has_header:
        return True
    if path.is_dir():
        vectors = manifest is not None or any(ending_of(file) == NPY for file in path.iterdir())
        return vectors or holds_vectors(tables_in(path).files[0])
    if (kind := kind_in(path)) in COLUMNAR:
        return VECTOR in read_schema(path, kind)[0].names
    with opened(path) as file:
        return VECTOR.encode() in file.readline().rstrip(b"\r\n").split(b"\x01")
