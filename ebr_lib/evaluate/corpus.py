"""The documents that queries are searched in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.columnar import read_schema
from ebr_lib.data.containers import COLUMNAR, opened
from ebr_lib.data.embeddings.base import NPY, VECTOR, ending_of, read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.data.queries import (
    DOCUMENT_IDS,
    DOCUMENT_TEXTS,
    Record,
    kind_in,
    read_records,
    tables_in,
    text_column,
    text_in,
)
from ebr_lib.data.text import is_blank, normalised, text_keys
from ebr_lib.errors import DataError
from ebr_lib.evaluate.columns import Columns, check_ids, id_twice, no_ids, read_ids
from ebr_lib.logs import logger
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import Provenance

SEEN = {"true": True, "1": True, "false": False, "0": False}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """Distinct documents: the id of the first with a text stands for all of them.

    `texts` is None where an embedding file keeps no text. `vectors` is that embedding file, `column` the one of its
    columns that holds `texts`, and `first_rows` its rows that the documents stand for, in order. `blank` are the ids of
    rows that are not documents: without text, or without a vector in an embedding file. `seen` says which documents
    training has seen, where that is known. `untitled` holds those documents whose text without the title is a query.
    """

    ids: list[str]
    texts: list[str] | None
    number: dict[str, int] = field(repr=False)
    number_of_text: dict[int, int] = field(repr=False)  # by `text_keys`: the texts are held once
    untitled: Mapping[int, frozenset[int]] = field(default_factory=dict, repr=False)  # documents by texts without title
    vectors: Path | None = None
    column: str | None = None
    first_rows: NDArray[np.int64] | None = None
    blank: frozenset[str] = frozenset()
    seen: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def shown(self, document: int, most: int = 300) -> str:
        """A document for people: its text, or its id where there is none."""
        text = self.texts[document] if self.texts else self.ids[document]
        return text if len(text) <= most else text[:most] + "…"

    def vector_batches(self) -> Iterator[NDArray[np.float32]]:
        """The documents' vectors out of the embedding file, of length 1, a batch at a time."""
        assert self.vectors is not None and self.first_rows is not None
        for batch in (batch for batch in iter_embeddings(self.vectors, ()) if len(batch)):
            # both are sorted: documents are numbered in the order of their rows
            low, high = np.searchsorted(self.first_rows, (batch.rows[0], batch.rows[-1] + 1))
            if high > low:
                yield unit(batch.vectors[np.searchsorted(batch.rows, self.first_rows[low:high])])


def read_corpus(
    path: Path | None,
    columns: Columns,
    queries: Sequence[str],
    answers: Sequence[Sequence[str]] | None,
    trained: set[str],
) -> Corpus:
    """The documents of a file; of the answers where there is none. Without answers, judgements name documents by id."""
    if path is None:
        texts = [text for text in dict.fromkeys(chain.from_iterable(answers or ())) if not is_blank(text)]
        return distinct_texts(None, [str(i) for i in range(len(texts))], texts, None, trained)
    if _holds_vectors(path):
        return _embedded_corpus(path, columns, trained, ids_needed=answers is None)
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(f"corpus {error}; an evaluation needs documents") from error
    column = text_column(path, records, columns.corpus, DOCUMENT_TEXTS, "corpus_column")
    texts = [_titled(record, column) for record in records]
    flags = _seen_flags(path, records)
    ids = read_ids(path, records, columns.id, DOCUMENT_IDS, needed=answers is None)
    rows = _with_text(path, column, texts)
    chosen = [flags[row] for row in rows] if flags else None
    corpus = distinct_texts(path, [ids[row] for row in rows], [texts[row] for row in rows], chosen, trained)
    plain = [text_in(records[row].get(column)) for row in rows]
    untitled = _untitled(plain, [corpus.number[ids[row]] for row in rows], queries)
    return replace(corpus, blank=frozenset(ids) - corpus.number.keys(), untitled=untitled)


def _untitled(texts: Sequence[str], numbers: Sequence[int], queries: Sequence[str]) -> dict[int, frozenset[int]]:
    """Documents by those of their texts that are a query."""
    asked = set(text_keys(queries).tolist())
    found: dict[int, set[int]] = {}
    for key, number in zip(text_keys(texts).tolist(), numbers, strict=True):
        if key in asked:
            found.setdefault(key, set()).add(number)
    return {key: frozenset(documents) for key, documents in found.items()}


def _with_text(path: Path, column: str, texts: Sequence[str]) -> list[int]:
    """The rows that have text; the others are not documents, as they get no vector in the inference stage."""
    rows = [row for row, text in enumerate(texts) if not is_blank(text)]
    if not rows:
        raise DataError(
            f"corpus {path}: none of its {len(texts)} documents has text in column {column}; name another with "
            "corpus_column"
        )
    if blank := len(texts) - len(rows):
        logger.warning(
            "语料: 无文本的文档已略过 left out: %d of %d documents have no text in column %s (%s)",
            blank,
            len(texts),
            column,
            path,
        )
    return rows


def _seen_flags(path: Path, records: Sequence[Record]) -> list[bool] | None:
    """Which documents training has seen, where a column `seen` says it of all of them."""
    told = [text_in(record.get("seen")).strip().casefold() for record in records]
    if not any("seen" in record for record in records):
        return None
    if wrong := next((value for value in told if value not in SEEN), None):
        logger.warning("%s: column seen is not used: %r is neither true, false, 1 nor 0", path, wrong)
    return [SEEN[value] for value in told] if all(value in SEEN for value in told) else None


def _titled(record: Record, column: str) -> str:
    """A BEIR document is its title, a space, its text."""
    text = record.get(column)
    title = record.get("title")
    return f"{title} {text or ''}".strip() if title and column == "text" else str(text or "")


def distinct_texts(
    path: Path | None, ids: list[str], texts: list[str], flags: list[bool] | None, trained: set[str]
) -> Corpus:
    """The corpus of the distinct texts among rows.

    :raises DataError: an id has two texts.
    """
    number_of_text: dict[int, int] = {}
    number: dict[str, int] = {}
    first: list[int] = []
    for row, (id_, key) in enumerate(zip(ids, text_keys(texts).tolist(), strict=True)):
        if key not in number_of_text:
            number_of_text[key] = len(first)
            first.append(row)
        if number.setdefault(id_, number_of_text[key]) != number_of_text[key]:
            raise id_twice(path or Path(), id_, ids.index(id_), row)
    seen = None
    if flags:
        seen = [False] * len(first)
        for id_, flag in zip(ids, flags, strict=True):
            seen[number[id_]] |= flag
    if trained:
        seen = [normalised(texts[row]) in trained for row in first]
    return Corpus([ids[row] for row in first], [texts[row] for row in first], number, number_of_text, seen=seen)


def _holds_vectors(path: Path) -> bool:
    manifest = read_manifest(path)
    if ending_of(path) == NPY or (
        manifest is not None and not (manifest.get("settings") or {}).get("output_header", True)
    ):
        return True
    if path.is_dir():
        vectors = manifest is not None or any(ending_of(file) == NPY for file in path.iterdir())
        return vectors or _holds_vectors(tables_in(path).files[0])
    if (kind := kind_in(path)) in COLUMNAR:
        return VECTOR in read_schema(path, kind)[0].names
    with opened(path) as file:
        return VECTOR.encode() in file.readline().rstrip(b"\r\n").split(b"\x01")


def _embedded_corpus(path: Path, columns: Columns, trained: set[str], *, ids_needed: bool) -> Corpus:
    """The documents of an embedding file; rows without a vector are none."""
    found = list(next(iter_embeddings(path)).columns)
    column = _encoded_column(path, columns.corpus, found)
    id_column = columns.id or next((name for name in DOCUMENT_IDS if name in found), None)
    if ids_needed and id_column is None:
        raise no_ids(path, DOCUMENT_IDS, found)
    wanted = [name for name in dict.fromkeys((column, id_column)) if name is not None]
    for name in wanted:
        if name not in found:
            raise DataError(f"{path}: no column {name}; its columns are {', '.join(found) or 'none'}")
    valid, kept = _without_vectors(path, wanted)
    rows = np.flatnonzero(valid)
    if not len(rows):
        raise DataError(f"corpus {path} holds no vectors; an evaluation needs documents")
    all_ids = [v or "" for v in kept[id_column]] if id_column else [str(row) for row in range(len(valid))]
    if id_column:
        check_ids(path, id_column, all_ids)
    if column:
        _check_texts_have_vectors(path, column, kept[column], valid)
        rows = rows[_with_text(path, column, [kept[column][row] or "" for row in rows])]
    ids = [all_ids[row] for row in rows]
    # where there is no text, each row is a document of its own
    texts = [kept[column][row] or "" for row in rows] if column else ids
    if not column and len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise DataError(f"{path}: id {twice!r} is there more than once; name another column with id_column")
    corpus = distinct_texts(path, ids, texts, None, trained)
    place = dict(zip(reversed(ids), reversed(rows.tolist()), strict=True))  # the first row of an id
    logger.info("语料: %s (corpus: %d distinct documents of %d rows)", path, len(corpus), len(rows))
    return replace(
        corpus,
        texts=corpus.texts if column else None,
        vectors=path,
        column=column,
        first_rows=np.array([place[id_] for id_ in corpus.ids], dtype=np.int64),
        blank=frozenset(all_ids) - corpus.number.keys(),
    )


def _check_texts_have_vectors(path: Path, column: str, texts: Sequence[str | None], valid: Mask) -> None:
    """Of the column that was encoded, rows without a vector have no text; else a model gave NaN for them."""
    encoded = Provenance.of(read_manifest(path) or {}).description_column
    lost = [i for i in np.flatnonzero(~valid).tolist() if not is_blank(texts[i] or "")]
    if lost and encoded in (None, column):
        shown = ", ".join(f"{(texts[i] or '')[:60]!r} (row {i})" for i in lost[:3])
        raise DataError(f"{path}: {len(lost)} rows have text and no vector (NaN), such as {shown}; encode them again")


def _encoded_column(path: Path, told: str | None, found: Sequence[str]) -> str | None:
    """The column of the documents' texts: what is told, else the one that was encoded, where it was kept."""
    encoded = Provenance.of(read_manifest(path) or {}).description_column
    usual = (encoded,) if encoded else DOCUMENT_TEXTS
    return told or next((name for name in usual if name in found), None)


def _without_vectors(path: Path, columns: Sequence[str]) -> tuple[Mask, dict[str, list[str | None]]]:
    """Which rows of an embedding file hold a vector, and the columns of all rows."""
    valid: list[Mask] = []
    kept: dict[str, list[str | None]] = {name: [] for name in columns}
    for batch in iter_embeddings(path, columns, keep_empty=True):
        valid.append(batch.valid)
        for name, values in batch.columns.items():
            kept[name] += values
    return np.concatenate(valid), kept
