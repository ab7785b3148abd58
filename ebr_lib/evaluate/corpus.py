"""The documents among which queries search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.catalogue import holds_vectors, titled
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.data.queries import (
    DOCUMENT_IDS,
    DOCUMENT_TEXTS,
    Record,
    read_records,
    text_column,
    text_in,
)
from ebr_lib.data.text import is_blank, normalised, text_keys
from ebr_lib.errors import DataError
from ebr_lib.evaluate.columns import Columns, check_ids, id_twice, no_ids, read_ids
from ebr_lib.logs import logger
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import Provenance

TITLE = "title"
SEEN = {"true": True, "1": True, "false": False, "0": False}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """Distinct documents: of equal texts, the first one's id is used for all.

    :ivar texts: None if an embedding file has no text column.
    :ivar number: document number by id.
    :ivar number_of_text: document number by `text_keys`, so that texts are in memory once.
    :ivar untitled: by `text_keys` of a query, the documents whose text without the title is that query.
    :ivar vectors: the embedding file, `column` its column that holds `texts`, `first_rows` the row of each document.
    :ivar titles: of each document, if there is a column `title` beside the text.
    :ivar blank: ids of rows that are not documents: without text, or without a vector in an embedding file.
    :ivar seen: which documents training has seen, if that is known.
    """

    ids: list[str]
    texts: list[str] | None
    number: dict[str, int] = field(repr=False)
    number_of_text: dict[int, int] = field(repr=False)
    untitled: Mapping[int, frozenset[int]] = field(default_factory=dict, repr=False)
    vectors: Path | None = None
    column: str | None = None
    first_rows: NDArray[np.int64] | None = None
    titles: Sequence[str] | None = field(default=None, repr=False)
    blank: frozenset[str] = frozenset()
    seen: list[bool] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def shown(self, document: int, most: int = 300) -> tuple[str, str]:
        """Title and text of a document for people; both empty if there are only ids."""
        title = self.titles[document] if self.titles else ""
        text = (self.texts[document] if self.texts else "").removeprefix(title).strip()
        return title, text if len(text) <= most else text[:most] + "…"

    def vector_batches(self) -> Iterator[NDArray[np.float32]]:
        """The documents' vectors from the embedding file, scaled to length 1, a batch at a time."""
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
    """The documents of a file, or without one the queries' answers.

    :param answers: texts that answer each query; None if judgements name documents by their ids.
    :param trained: normalised texts of documents that training has seen.
    """
    if path is None:
        texts = [text for text in dict.fromkeys(chain.from_iterable(answers or ())) if not is_blank(text)]
        return distinct_texts(None, [str(i) for i in range(len(texts))], texts, None, trained)
    if holds_vectors(path):
        return _embedded_corpus(path, columns, trained, ids_needed=answers is None)
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(f"corpus {error}; an evaluation needs documents") from error
    column = text_column(path, records, columns.corpus, DOCUMENT_TEXTS, "corpus_column")
    all_ids = read_ids(path, records, columns.id, DOCUMENT_IDS, needed=answers is None)
    flags = _seen_flags(path, records)
    texts = [titled(record, column) for record in records]
    rows = _with_text(path, column, texts)
    ids = [all_ids[row] for row in rows]
    chosen = [flags[row] for row in rows] if flags else None
    corpus = distinct_texts(path, ids, [texts[row] for row in rows], chosen, trained)
    asked = set(text_keys(queries).tolist())
    untitled: dict[int, set[int]] = {}
    for key, id_ in zip(text_keys(text_in(records[row].get(column)) for row in rows).tolist(), ids, strict=True):
        if key in asked:
            untitled.setdefault(key, set()).add(corpus.number[id_])
    title_of = {all_ids[row]: text_in(records[row].get(TITLE)) for row in rows} if TITLE in records[0] else {}
    return replace(
        corpus,
        titles=_titles(corpus, column, title_of),
        blank=frozenset(all_ids) - corpus.number.keys(),
        untitled={key: frozenset(documents) for key, documents in untitled.items()},
    )


def _titles(corpus: Corpus, column: str | None, title_of: Mapping[str, str]) -> Sequence[str] | None:
    """The titles by document, unless there are none or they are the texts themselves."""
    return [title_of[id_] for id_ in corpus.ids] if title_of and column != TITLE else None


def _seen_flags(path: Path, records: Sequence[Record]) -> list[bool] | None:
    """Which documents training has seen, if a column `seen` says it of all of them."""
    if not any("seen" in record for record in records):
        return None
    values = [text_in(record.get("seen")).strip().casefold() for record in records]
    if wrong := next((value for value in values if value not in SEEN), None):
        logger.warning("%s: 未使用 column seen is not used: %r is neither true, false, 1 nor 0", path, wrong)
    return [SEEN[value] for value in values] if all(value in SEEN for value in values) else None


def _with_text(path: Path, column: str, texts: Sequence[str]) -> list[int]:
    """The rows that have text; the others are not documents, just as they get no vector in the inference stage."""
    rows = [row for row, text in enumerate(texts) if not is_blank(text)]
    if not rows:
        raise DataError(
            f"corpus {path}: none of its {len(texts)} documents has text in column {column}; name another with "
            "corpus_column"
        )
    if blank := len(texts) - len(rows):
        logger.warning(
            "语料: 无文本的文档已略过 left out: %d of %d documents have no text in column %s (%s)",
            blank, len(texts), column, path,
        )  # fmt: skip
    return rows


def distinct_texts(
    path: Path | None, ids: list[str], texts: list[str], flags: list[bool] | None, trained: set[str]
) -> Corpus:
    """The corpus of the distinct texts among rows.

    :param flags: for each row, whether training has seen it; `trained` replaces them if it is not empty.
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
    if trained:
        seen = [normalised(texts[row]) in trained for row in first]
    elif flags:
        seen = [False] * len(first)
        for id_, flag in zip(ids, flags, strict=True):
            seen[number[id_]] |= flag
    return Corpus([ids[row] for row in first], [texts[row] for row in first], number, number_of_text, seen=seen)


# --- embedding files ----------------------------------------------------------------------------------------------


def _embedded_corpus(path: Path, columns: Columns, trained: set[str], *, ids_needed: bool) -> Corpus:
    """The documents of an embedding file: its rows that have a vector and, if it has a text column, text."""
    found = list(next(iter_embeddings(path)).columns)
    encoded = Provenance.of(read_manifest(path) or {}).description_column
    usual = (encoded,) if encoded else DOCUMENT_TEXTS
    column = columns.corpus or next((name for name in usual if name in found), None)
    id_column = columns.id or next((name for name in DOCUMENT_IDS if name in found), None)
    if ids_needed and id_column is None:
        raise no_ids(path, DOCUMENT_IDS, found)
    wanted = [name for name in dict.fromkeys((column, id_column)) if name is not None]
    if missing := next((name for name in wanted if name not in found), None):
        raise DataError(f"{path}: no column {missing}; its columns are {', '.join(found) or 'none'}")
    titled = TITLE in found and column != TITLE
    valid, kept = _columns_of(path, list(dict.fromkeys([*wanted, *([TITLE] if titled else [])])))
    rows = np.flatnonzero(valid)
    if not len(rows):
        raise DataError(f"corpus {path} holds no vectors; an evaluation needs documents")
    all_ids = kept[id_column] if id_column else [str(row) for row in range(len(valid))]
    if id_column:
        check_ids(path, id_column, all_ids)
    if column:
        # in the column that was encoded, only blank rows have no vector; for others a model gave NaN
        without = np.flatnonzero(~valid).tolist() if encoded in (None, column) else []
        if lost := [i for i in without if not is_blank(kept[column][i])]:
            shown = ", ".join(f"{kept[column][i][:60]!r} (row {i})" for i in lost[:3])
            raise DataError(
                f"{path}: {len(lost)} rows have text and no vector (NaN), such as {shown}; encode them again"
            )
        rows = rows[_with_text(path, column, [kept[column][row] for row in rows])]
    ids = [all_ids[row] for row in rows]
    # without text, each row is a document of its own
    texts = [kept[column][row] for row in rows] if column else ids
    if not column and len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise DataError(f"{path}: id {twice!r} is there more than once; name another column with id_column")
    corpus = distinct_texts(path, ids, texts, None, trained)
    place = dict(zip(reversed(ids), reversed(rows.tolist()), strict=True))  # the first row of an id
    title_of = {id_: kept[TITLE][place[id_]] for id_ in corpus.ids} if titled else {}
    logger.info("语料: %s (corpus: %d distinct documents of %d rows)", path, len(corpus), len(rows))
    return replace(
        corpus,
        texts=corpus.texts if column else None,
        titles=_titles(corpus, column, title_of),
        vectors=path,
        column=column,
        first_rows=np.array([place[id_] for id_ in corpus.ids], dtype=np.int64),
        blank=frozenset(all_ids) - corpus.number.keys(),
    )


def _columns_of(path: Path, columns: Sequence[str]) -> tuple[Mask, dict[str, list[str]]]:
    """Which rows of an embedding file have a vector, and the columns of all rows; null is the empty text."""
    valid: list[Mask] = []
    kept: dict[str, list[str]] = {name: [] for name in columns}
    for batch in iter_embeddings(path, columns, keep_empty=True):
        valid.append(batch.valid)
        for name, values in batch.columns.items():
            kept[name] += [value or "" for value in values]
    return np.concatenate(valid), kept
