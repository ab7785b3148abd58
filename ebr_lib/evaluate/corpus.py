"""The documents among which queries search."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    id_in,
    need_column,
    read_records,
    text_column,
    text_in,
)
from ebr_lib.data.text import is_blank, normalised, text_keys
from ebr_lib.errors import DataError
from ebr_lib.logs import logger
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import Provenance

TITLE = "title"
SEEN = {"true": True, "1": True, "false": False, "0": False}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None takes the first of the usual names that the file has.

    `id` is the documents' column, and the queries' if their file has it too. `label` says whether an answer counts;
    "none": no column says it.
    """

    query: str | None = None
    corpus: str | None = None
    id: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Distinct documents: of equal texts, the first one's id is used for all.

    :ivar texts: None if an embedding file has no text column.
    :ivar number: document number by id.
    :ivar number_of_text: document number by `text_keys`, so that texts are in memory once.
    :ivar untitled: by `text_keys` of a query, the documents whose text without the title is that query.
    :ivar vectors: the embedding file, `column` its column that holds `texts`.
    :ivar first_rows: the row of each document, increasing.
    :ivar titles: of each document, if there is a column `title` beside the text.
    :ivar blank: ids of rows that are not documents: without text, or without a vector in an embedding file.
    :ivar seen: which documents training has seen, if that is known.
    """

    ids: list[str]
    texts: list[str] | None
    number: dict[str, int] = field(repr=False)
    number_of_text: dict[int, int] = field(repr=False)
    untitled: Mapping[int, Collection[int]] = field(default_factory=dict, repr=False)
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
        rows = range(len(texts))
        return _distinct(Path(), rows, list(map(str, rows)), texts, trained=trained)
    if holds_vectors(path):
        return _embedded_corpus(path, columns, trained, ids_needed=answers is None)
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(f"corpus {error}; an evaluation needs documents") from error
    column = text_column(path, records, columns.corpus, DOCUMENT_TEXTS, "corpus_column")
    ids = read_ids(path, records, columns.id, DOCUMENT_IDS, needed=answers is None)
    flags = _seen_flags(path, records)
    texts = [titled(record, column) for record in records]
    kept = _with_text(path, column, texts, range(len(texts)))
    has_titles = TITLE in records[0] and column != TITLE
    titles = [text_in(record.get(TITLE)) for record in records] if has_titles else None
    corpus = _distinct(path, kept, ids, texts, trained=trained, flags=flags, titles=titles)
    asked, untitled = set(text_keys(queries).tolist()), defaultdict(set)
    keys = text_keys(text_in(records[row].get(column)) for row in kept)
    for row, key in zip(kept, keys.tolist(), strict=True):
        if key in asked:
            untitled[key].add(corpus.number[ids[row]])
    return replace(corpus, untitled=untitled)


def _seen_flags(path: Path, records: Sequence[Record]) -> list[bool] | None:
    """Which documents training has seen, if a column `seen` says it of all of them."""
    if not any("seen" in record for record in records):
        return None
    values = [text_in(record.get("seen")).strip().casefold() for record in records]
    if wrong := [value for value in values if value not in SEEN]:
        logger.warning("%s: 未使用 column seen is not used: %r is neither true, false, 1 nor 0", path, wrong[0])
        return None
    return [SEEN[value] for value in values]


def _with_text(path: Path, column: str, texts: Sequence[str], rows: Sequence[int]) -> list[int]:
    """The rows that have text; the others are not documents, just as they get no vector in the inference stage."""
    kept = [row for row in rows if not is_blank(texts[row])]
    if not kept:
        raise DataError(
            f"corpus {path}: none of its {len(rows)} documents has text in column {column}; name another with "
            "corpus_column"
        )
    if blank := len(rows) - len(kept):
        logger.warning(
            "语料: 无文本的文档已略过 left out: %d of %d documents have no text in column %s (%s)",
            blank, len(rows), column, path,
        )  # fmt: skip
    return kept


def _distinct(
    path: Path,
    rows: Sequence[int],
    ids: Sequence[str],
    texts: Sequence[str],
    *,
    trained: set[str],
    flags: Sequence[bool] | None = None,
    titles: Sequence[str] | None = None,
) -> Corpus:
    """The corpus of the distinct texts among some rows of a file.

    :param rows: the rows that are documents; what follows is given for all rows.
    :param flags: whether training has seen a row; `trained` replaces them if it is not empty.
    :raises DataError: an id has two texts.
    """
    number_of_text: dict[int, int] = {}
    number: dict[str, int] = {}
    first: list[int] = []
    for row, key in zip(rows, text_keys(texts[row] for row in rows).tolist(), strict=True):
        document = number_of_text.setdefault(key, len(first))
        if document == len(first):
            first.append(row)
        if number.setdefault(ids[row], document) != document:
            raise id_twice(path, ids[row], next(other for other in rows if ids[other] == ids[row]), row)
    seen = None
    if trained:
        seen = [normalised(texts[row]) in trained for row in first]
    elif flags:
        seen = [False] * len(first)
        for row in rows:
            seen[number[ids[row]]] |= flags[row]
    return Corpus(
        [ids[row] for row in first],
        [texts[row] for row in first],
        number,
        number_of_text,
        first_rows=np.array(first, dtype=np.int64),
        titles=[titles[row] for row in first] if titles else None,
        blank=frozenset(ids) - number.keys(),
        seen=seen,
    )


def _embedded_corpus(path: Path, columns: Columns, trained: set[str], *, ids_needed: bool) -> Corpus:
    """The documents of an embedding file: its rows that have a vector and, if it has a text column, text."""
    found = list(next(iter_embeddings(path)).columns)
    encoded = Provenance.of(read_manifest(path) or {}).description_column
    usual = (encoded,) if encoded else DOCUMENT_TEXTS
    column = columns.corpus or next((name for name in usual if name in found), None)
    id_column = columns.id or next((name for name in DOCUMENT_IDS if name in found), None)
    if ids_needed and id_column is None:
        raise no_ids(path, DOCUMENT_IDS, found)
    title = TITLE if TITLE in found and column != TITLE else None
    kept: dict[str, list[str]] = {name: [] for name in (column, id_column, title) if name is not None}
    if missing := next((name for name in kept if name not in found), None):
        raise DataError(f"{path}: no column {missing}; its columns are {', '.join(found) or 'none'}")
    valid: list[Mask] = []
    for batch in iter_embeddings(path, list(kept), keep_empty=True):
        valid.append(batch.valid)
        for name, values in batch.columns.items():
            kept[name] += [value or "" for value in values]
    has_vector = np.concatenate(valid)
    rows = np.flatnonzero(has_vector).tolist()
    if not rows:
        raise DataError(f"corpus {path} holds no vectors; an evaluation needs documents")
    numbers = list(map(str, range(len(has_vector))))
    ids = kept[id_column] if id_column else numbers
    if id_column:
        check_ids(path, id_column, ids)
    if column:
        # in the column that was encoded, only blank rows have no vector; for others a model gave NaN
        without = np.flatnonzero(~has_vector).tolist() if encoded in (None, column) else []
        if lost := [i for i in without if not is_blank(kept[column][i])]:
            shown = ", ".join(f"{kept[column][i][:60]!r} (row {i})" for i in lost[:3])
            raise DataError(
                f"{path}: {len(lost)} rows have text and no vector (NaN), such as {shown}; encode them again"
            )
        rows = _with_text(path, column, kept[column], rows)
    else:
        (id_, count), *_ = Counter(ids[row] for row in rows).most_common(1)
        if count > 1:
            raise DataError(f"{path}: id {id_!r} is there more than once; name another column with id_column")
    # without text, each row is a document of its own, and nobody knows which of them training has seen
    corpus = _distinct(
        path, rows, ids, kept[column] if column else numbers, trained=trained if column else set(),
        titles=kept[title] if title else None,
    )  # fmt: skip
    logger.info("语料: %s (corpus: %d distinct documents of %d rows)", path, len(corpus), len(rows))
    texts, by_text = (corpus.texts, corpus.number_of_text) if column else (None, {})
    return replace(corpus, texts=texts, number_of_text=by_text, vectors=path, column=column)


# --- ids ----------------------------------------------------------------------------------------------------------


def read_ids(
    path: Path, records: Sequence[Record], name: str | None, usual: Sequence[str], *, needed: bool
) -> list[str]:
    """The ids of a file's rows; row numbers if it has no column of ids and judgements do not need them."""
    column = name or next((name for name in usual if name in records[0]), None)
    if column is None:
        if needed:
            raise no_ids(path, usual, list(records[0]))
        return [str(i) for i in range(len(records))]
    need_column(path, records, column)
    ids = [id_in(record.get(column)) for record in records]
    check_ids(path, column, ids)
    return ids


def check_ids(path: Path, column: str, ids: Sequence[str]) -> None:
    """Make sure that every row has an id.

    :raises DataError: names the first rows without one.
    """
    if blank := [str(row) for row, id_ in enumerate(ids, 1) if not id_]:
        raise DataError(f"{path}: no id in column {column} of rows {', '.join(blank[:5])}; every row needs one")


def id_twice(path: Path, id_: str, row: int, other: int) -> DataError:
    """The error for an id that two different texts have."""
    return DataError(
        f"{path}: id {id_!r} is there more than once, with different texts (rows {row + 1} and {other + 1}); ids must "
        "be unique: name another column with id_column"
    )


def no_ids(path: Path, usual: Sequence[str], found: Sequence[str]) -> DataError:
    """The error for a file without a column of ids."""
    return DataError(
        f"{path}: judgements name its rows by their ids, and no column has any; looked for {', '.join(usual)}, found "
        f"{', '.join(found) or 'none'}; name it with id_column"
    )
