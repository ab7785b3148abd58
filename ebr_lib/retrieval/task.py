"""What an evaluation measures against: queries, documents and judgements, read from the shapes they come in.

Equal texts are one document, whatever their ids: whichever copy a model returns, it has found the text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.doctor import language_of
from ebr_lib.data.hive import Layout, open_source, read_rows, readable
from ebr_lib.data.noise import split_words
from ebr_lib.data.pairs import is_blank, normalised, text_keys
from ebr_lib.data.vectors import NPY, PARQUET, VECTOR, ending_of, iter_embeddings, read_manifest
from ebr_lib.errors import DataError, MissingError
from ebr_lib.logs import logger
from ebr_lib.retrieval.maker import Maker
from ebr_lib.retrieval.metrics import unit

QUERY_TEXTS = ("text", "query", "question", "anchor")
DOCUMENT_TEXTS = ("text", "description", "document", "passage", "positive", "content")
ANSWERS = ("positive", "pos", "positives")
QUERY_IDS = ("_id", "id", "query_id", "qid")
DOCUMENT_IDS = ("_id", "id", "doc_id", "docid")
HELDOUT_FILE, CORPUS_FILE, QUERIES_FILE, QRELS_FOLDER = "heldout.jsonl", "corpus.jsonl", "queries.jsonl", "qrels"

SEEN = {"true": True, "1": True, "false": False, "0": False}
IN_TRAINING = "document in training"
MOST_LETTERS = 2**31 - 1  # of a field of CSV

Mask = NDArray[np.bool_]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Sources:
    """The files of a task; `qrels` None means that the queries carry their answers as texts, `corpus` None that these
    answers are the corpus."""

    queries: Path
    corpus: Path | None
    qrels: Path | None


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None takes the first of the usual names that is there.

    `id` is that of the documents, and of the queries where their file has it too.
    """

    query: str | None = None
    corpus: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Distinct documents: the id of the first with a text stands for all of them.

    `texts` is None where an embedding file keeps no text. `vectors` is that embedding file, `column` the one of its
    columns that holds `texts`, `first_rows` its rows that the documents stand for, in order, and `without_vector` the
    ids of its rows that are no documents. `seen` says which documents training has seen, where that is known.
    """

    ids: list[str]
    texts: list[str] | None
    number: dict[str, int] = field(repr=False)
    number_of_text: dict[int, int] = field(repr=False)  # by `text_keys`: the texts are held once
    vectors: Path | None = None
    column: str | None = None
    first_rows: NDArray[np.int64] | None = None
    without_vector: frozenset[str] = frozenset()
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


@dataclass(frozen=True)
class RetrievalTask:
    """Queries that have at least one relevant document, and for each its documents' grades.

    `unjudged` queries have none and are left out; `repeated` ones are equal to one before, which has their answers.
    """

    query_ids: list[str]
    queries: list[str]
    query_columns: dict[str, list[str]]
    corpus: Corpus
    relevant: list[dict[int, int]]
    unjudged: int
    repeated: int = 0

    def facts(self) -> dict[str, int]:
        """Counts of the task, by the names that the report shows."""
        merged = len(self.corpus.number) - len(self.corpus)
        return {
            "queries": len(self.queries),
            "queries_without_judgement": self.unjudged,
            "queries_repeated": self.repeated,
            "documents": len(self.corpus),
            "documents_of_equal_text": merged,
            "judgements": sum(map(len, self.relevant)),
        }


def find_sources(data_path: str | None, queries: str | None, corpus: str | None, qrels: str | None) -> Sources:
    """Find the files of a task; paths that are given win over what `data_path` holds.

    :param data_path: a fine-tuned model's folder (`heldout.jsonl`, `corpus.jsonl`), a BEIR folder (`corpus.jsonl`,
        `queries.jsonl`, `qrels/test.tsv`), or a file of queries with their answers.
    :raises MissingError: a file is not there, or not given, or a folder is neither.
    """
    given = Path(corpus) if corpus else None, Path(qrels) if qrels else None
    sources = _found(Path(data_path), *given) if data_path and not queries else Sources(Path(queries or ""), *given)
    for path in (sources.queries, sources.corpus, sources.qrels):
        if path is not None and not (path.is_file() or (path == sources.corpus and path.is_dir())):
            raise MissingError(f"evaluation data {path}: there is no such file")
    if sources.qrels and not sources.corpus:
        raise MissingError(
            f"{sources.qrels} names documents by their ids; give the file that holds them as corpus_path"
        )
    return sources


def _found(place: Path, corpus: Path | None, qrels: Path | None) -> Sources:
    """The queries of a place, and its corpus and judgements where no others are given."""
    own = place / CORPUS_FILE if (place / CORPUS_FILE).is_file() else None
    if place.is_file():
        return Sources(place, corpus, qrels)
    if (place / HELDOUT_FILE).is_file():
        return Sources(place / HELDOUT_FILE, corpus or own, qrels)
    if (place / QUERIES_FILE).is_file() and (corpus or own):
        return Sources(place / QUERIES_FILE, corpus or own, qrels or _beir_qrels(place / QRELS_FOLDER))
    raise MissingError(
        f"evaluation data {place}: wanted a fine-tuned model's folder with {HELDOUT_FILE} (fine-tune with eval_ratio "
        f"above 0), a BEIR folder with {CORPUS_FILE}, {QUERIES_FILE} and {QRELS_FOLDER}/*.tsv, or a file of queries; "
        f"found {', '.join(sorted(p.name for p in place.glob('*'))[:8]) if place.is_dir() else 'nothing'}"
    )


def _beir_qrels(folder: Path) -> Path:
    files = sorted(folder.glob("*.tsv"))
    if (test := folder / "test.tsv") in files or len(files) == 1:
        return test if test in files else files[0]
    names = ", ".join(file.name for file in files) or "none"
    raise MissingError(f"{folder}: wanted test.tsv or one file of judgements, found {names}; name it with qrels_path")


def read_task(sources: Sources, columns: Columns, slice_columns: Sequence[str], trained: set[str]) -> RetrievalTask:
    """Read queries, documents and judgements.

    :param slice_columns: columns of the query file to keep.
    :param trained: normalised texts of documents that training has seen; may be empty.
    :raises DataError: a query without text, an empty corpus, ids that are there twice or not at all, no judgements.
    """
    records = read_records(sources.queries)
    texts = _query_texts(sources.queries, records, columns.query)
    for name in slice_columns:
        _need_column(sources.queries, records, name)
    answers = None if sources.qrels else _answers(sources.queries, records)
    corpus = _read_corpus(sources.corpus, columns, answers, trained)
    repeated = 0
    if answers is None:
        assert sources.qrels is not None
        own = columns.id if columns.id in records[0] else None
        ids = _ids(sources.queries, records, own, QUERY_IDS, needed=True)
        judged = _read_qrels(sources.qrels, {query: i for i, query in enumerate(ids)}, corpus)
    else:
        ids = [str(i) for i in range(len(records))]
        judged = _judged_by_text(sources.queries, texts, answers, corpus)
        repeated = len(texts) - len({normalised(text) for text in texts})
    kept = [i for i, grades in enumerate(judged) if any(grade > 0 for grade in grades.values())]
    if not kept:
        raise DataError(f"{sources.qrels or sources.queries}: no query has a relevant document; nothing to measure")
    return RetrievalTask(
        query_ids=[ids[i] for i in kept],
        queries=[texts[i] for i in kept],
        query_columns={name: [_text(records[i].get(name)) for i in kept] for name in slice_columns},
        corpus=corpus,
        relevant=[judged[i] for i in kept],
        unjudged=len(records) - len(kept) - repeated,
        repeated=repeated,
    )


# --- records ------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    """Read a table of texts: JSON (an array, or one object a line), Parquet, or delimited text with a header row.

    Delimited text is split by `\\001` where its header has one, by tabs in a `.tsv`, in both of which a quote is a
    letter like any other; else it is CSV with quotes.

    :raises MissingError: there is no such file.
    :raises DataError: it cannot be read as such, or holds no row.
    """
    if not path.is_file():
        raise MissingError(f"{path}: there is no such file")
    try:
        records = list(_records(path))
    except DataError:
        raise
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{path} cannot be read as {path.suffix or 'text'}: {error}") from error
    if not records:
        raise DataError(f"{path} holds no rows")
    return records


def _records(path: Path) -> Iterator[Record]:
    if ending_of(path) == PARQUET:
        import pyarrow.parquet as pq

        with readable(path):
            yield from pq.read_table(path).to_pylist()
    elif path.suffix in (".json", ".jsonl"):
        yield from _json_records(path)
    else:
        yield from _delimited_records(path)


def _json_records(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig") as file:
        first = next((letter for letter in iter(partial(file.read, 1), "") if not letter.isspace()), "")
        file.seek(0)
        if first == "[":
            rows = list(enumerate(json.load(file), 1))
        else:
            rows = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: wanted an object, found {type(row).__name__}")
        yield row


def _delimited_records(path: Path) -> Iterator[Record]:
    with open(path, "rb") as raw:
        is_hive = b"\x01" in raw.readline()
    if is_hive:
        yield from _hive_records(path)
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = _split_rows(path, file)
        _, names = next(rows, (1, []))
        for line, row in rows:
            if row and len(row) != len(names):
                raise DataError(f"{path}: line {line}: {len(row)} fields, the header has {len(names)}")
            if row:
                yield dict(zip(names, row, strict=True))


def _split_rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a `.tsv` or CSV file, each with the line it begins at."""
    csv.field_size_limit(MOST_LETTERS)  # 131,072 unless told: a long page is no broken quote
    rows = (
        csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if path.suffix == ".tsv"
        else csv.reader(file, strict=True)
    )
    line = 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {line}: a quote that is not closed, or a letter behind one ({error})") from error


def _hive_records(path: Path) -> Iterator[Record]:
    source = open_source(path, Layout())
    for row in read_rows(source, source.columns, Layout()):
        if not row.raw.strip():  # an empty last line
            continue
        if row.reason:
            raise DataError(f"{path}: line {row.position.line}: {row.reason}")
        values = [None if value is None else value.decode() for value in row.values]
        yield dict(zip(source.columns, values, strict=True))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _need_column(path: Path, records: Sequence[Record], name: str) -> None:
    if not any(name in record for record in records):
        raise DataError(f"{path}: no column {name}; its columns are {', '.join(records[0])}")


def _text_column(path: Path, records: Sequence[Record], told: str | None, usual: Sequence[str], knob: str) -> str:
    if told is not None:
        _need_column(path, records, told)
        return told
    found = next((name for name in usual if name in records[0]), None)
    if found is None:
        raise DataError(
            f"{path}: no column of text; looked for {', '.join(usual)}, found {', '.join(records[0])}; "
            f"name it with {knob}"
        )
    return found


def _query_texts(path: Path, records: Sequence[Record], told: str | None) -> list[str]:
    column = _text_column(path, records, told, QUERY_TEXTS, "query_column")
    texts = [record.get(column) for record in records]
    blank = [i for i, text in enumerate(texts) if not isinstance(text, str) or is_blank(text)]
    if blank:
        rows = ", ".join(str(i + 1) for i in blank[:5])
        raise DataError(
            f"{path}: {len(blank)} queries without text in column {column} (rows {rows}); remove or fill them"
        )
    return [str(text) for text in texts]


def read_queries(path: Path, column: str | None) -> list[str]:
    """The texts of a file of queries, equal ones once."""
    return list(dict.fromkeys(_query_texts(path, read_records(path), column)))


def _ids(path: Path, records: Sequence[Record], told: str | None, usual: Sequence[str], *, needed: bool) -> list[str]:
    """The ids of a file's rows; their numbers where it has none and no judgement names them."""
    column = told or next((name for name in usual if name in records[0]), None)
    if column is None:
        if needed:
            raise _no_ids(path, usual, list(records[0]))
        return [str(i) for i in range(len(records))]
    _need_column(path, records, column)
    ids = [_text(record.get(column)) for record in records]
    _check_ids(path, column, ids)
    return ids


def _check_ids(path: Path, column: str, ids: Sequence[str]) -> None:
    if blank := [str(row) for row, id_ in enumerate(ids, 1) if not id_]:
        raise DataError(f"{path}: no id in column {column} of rows {', '.join(blank[:5])}; every row needs one")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(
            f"{path}: id {twice!r} in column {column} is there more than once; ids must be unique: name another column "
            "with id_column"
        )


def _no_ids(path: Path, usual: Sequence[str], found: Sequence[str]) -> DataError:
    return DataError(
        f"{path}: judgements name its rows by their ids, and no column has any; looked for {', '.join(usual)}, found "
        f"{', '.join(found) or 'none'}; name it with id_column"
    )


# --- the corpus ---------------------------------------------------------------------------------------------------


def _read_corpus(
    path: Path | None, columns: Columns, answers: Sequence[Sequence[str]] | None, trained: set[str]
) -> Corpus:
    """The documents of a file; of the answers where there is none. Without answers, judgements name documents by id."""
    if path is None:
        texts = list(dict.fromkeys(text for group in answers or () for text in group))
        return _distinct([str(i) for i in range(len(texts))], texts, None, trained)
    if _holds_vectors(path):
        return _embedded_corpus(path, columns, trained, ids_needed=answers is None)
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(f"corpus {error}; an evaluation needs documents") from error
    column = _text_column(path, records, columns.corpus, DOCUMENT_TEXTS, "corpus_column")
    texts = [_titled(record, column) for record in records]
    _check_not_blank(path, column, texts)
    flags = _seen_flags(path, records)
    ids = _ids(path, records, columns.id, DOCUMENT_IDS, needed=answers is None)
    return _distinct(ids, texts, flags, trained)


def _check_not_blank(path: Path, column: str, texts: Sequence[str]) -> None:
    blank = sum(map(is_blank, texts))
    if blank == len(texts):
        raise DataError(
            f"corpus {path}: none of its {blank} documents has text in column {column}; name another with corpus_column"
        )
    if blank:
        logger.warning("语料: %s: %d of %d documents have no text in column %s", path, blank, len(texts), column)


def _seen_flags(path: Path, records: Sequence[Record]) -> list[bool] | None:
    """Which documents training has seen, where a column `seen` says it of all of them."""
    told = [_text(record.get("seen")).strip().casefold() for record in records]
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


def _distinct(ids: list[str], texts: list[str], flags: list[bool] | None, trained: set[str]) -> Corpus:
    number_of_text: dict[int, int] = {}
    number: dict[str, int] = {}
    first: list[int] = []
    for row, (id_, key) in enumerate(zip(ids, text_keys(texts).tolist(), strict=True)):
        if key not in number_of_text:
            number_of_text[key] = len(first)
            first.append(row)
        number[id_] = number_of_text[key]
    seen = None
    if flags:
        seen = [False] * len(first)
        for id_, flag in zip(ids, flags, strict=True):
            seen[number[id_]] |= flag
    if trained:
        seen = [normalised(texts[row]) in trained for row in first]
    return Corpus([ids[row] for row in first], [texts[row] for row in first], number, number_of_text, seen=seen)


def _holds_vectors(path: Path) -> bool:
    if ending_of(path) == NPY or path.is_dir():
        return True
    if ending_of(path) == PARQUET:
        import pyarrow.parquet as pq

        with readable(path):
            return VECTOR in pq.read_schema(path).names
    with open(path, "rb") as file:
        return VECTOR.encode() in file.readline().rstrip(b"\r\n").split(b"\x01")


def _embedded_corpus(path: Path, columns: Columns, trained: set[str], *, ids_needed: bool) -> Corpus:
    """The documents of an embedding file; rows without a vector are none."""
    found = list(next(iter_embeddings(path)).columns)
    column = _encoded_column(path, columns.corpus, found)
    id_column = columns.id or next((name for name in DOCUMENT_IDS if name in found), None)
    if ids_needed and id_column is None:
        raise _no_ids(path, DOCUMENT_IDS, found)
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
        _check_ids(path, id_column, all_ids)
    ids = [all_ids[row] for row in rows]
    # where there is no text, each row is a document of its own
    texts = [kept[column][row] or "" for row in rows] if column else ids
    if column:
        _check_not_blank(path, column, texts)
    corpus = _distinct(ids, texts, None, trained)
    place = dict(zip(reversed(ids), reversed(rows.tolist()), strict=True))  # the first row of an id
    logger.info("语料: %s (corpus: %d distinct documents of %d rows)", path, len(corpus), len(rows))
    return replace(
        corpus,
        texts=corpus.texts if column else None,
        vectors=path,
        column=column,
        first_rows=np.array([place[id_] for id_ in corpus.ids], dtype=np.int64),
        without_vector=frozenset(all_ids[row] for row in np.flatnonzero(~valid)),
    )


def _encoded_column(path: Path, told: str | None, found: Sequence[str]) -> str | None:
    """The column of the documents' texts: what is told, else the one that was encoded, where it was kept."""
    encoded = Maker.of(read_manifest(path) or {}).description_column
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


# --- judgements ---------------------------------------------------------------------------------------------------


def _answers(path: Path, records: Sequence[Record]) -> list[list[str]]:
    column = next((name for name in ANSWERS if name in records[0]), None)
    if column is None:
        raise DataError(
            f"{path}: no judgements: wanted a column {', '.join(ANSWERS)} with the texts that answer a query, or a "
            f"file given as qrels_path; found {', '.join(records[0])}"
        )
    return [_texts_of(path, row, record.get(column)) for row, record in enumerate(records, 1)]


def _texts_of(path: Path, row: int, value: Any) -> list[str]:
    if value is None or value == "":
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise DataError(f"{path}: row {row}: wanted an answer's text or a list of texts, found {value!r}")
    return values


def _judged_by_text(
    path: Path, texts: Sequence[str], answers: Sequence[Sequence[str]], corpus: Corpus
) -> list[dict[int, int]]:
    """Equal queries share their answers, and only the first of them stays."""
    keys = [text_keys(group).tolist() for group in answers]
    unknown = [
        (i, text)
        for i, group in enumerate(answers)
        for text, key in zip(group, keys[i], strict=True)
        if key not in corpus.number_of_text
    ]
    if unknown:
        shown = "; ".join(f"row {i + 1}: {text[:60]!r}" for i, text in unknown[:3])
        raise DataError(f"{path}: {len(unknown)} answers are no document of the corpus ({shown}); add them to it")
    judged: list[dict[int, int]] = [{} for _ in texts]
    leader: dict[str, int] = {}
    for i, (text, group) in enumerate(zip(texts, keys, strict=True)):
        first = leader.setdefault(normalised(text), i)
        judged[first] |= {corpus.number_of_text[key]: 1 for key in group}
    return judged


def _read_qrels(path: Path, queries: Mapping[str, int], corpus: Corpus) -> list[dict[int, int]]:
    """Read judgements: BEIR's three columns (query, document, grade) or TREC's four, with or without a header."""
    judged: list[dict[int, int]] = [{} for _ in queries]
    unknown: list[str] = []
    documents = corpus.number
    for line, query, document, grade in _qrel_lines(path, queries):
        if document in corpus.without_vector:
            raise DataError(
                f"{path}: line {line}: document {document!r} has no vector in {corpus.vectors}, so that no model can "
                "find it; encode its text, or leave its judgements out"
            )
        missing = [f"{kind} {id_!r}" for kind, id_, known in
                   (("query", query, queries), ("document", document, documents)) if id_ not in known]  # fmt: skip
        unknown += [f"line {line}: {name}" for name in missing]
        if not missing:
            grades = judged[queries[query]]
            grades[documents[document]] = max(grade, grades.get(documents[document], grade))
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} ids are in no query or corpus file ({'; '.join(unknown[:5])}); "
            "check that the three files belong together, and the id columns (id_column)"
        )
    return judged


def _qrel_lines(path: Path, queries: Collection[str]) -> Iterator[tuple[int, str, str, int]]:
    """Line, query, document and grade; a first line that names no query and has no grade is a header."""
    for number, line in enumerate(_lines(path), 1):
        fields = line.rstrip("\n").split("\t") if "\t" in line else line.split()
        is_header = number == 1 and fields and fields[0] not in queries and _number(fields[-1]) is None
        if not fields or is_header:
            continue
        grade = _number(fields[-1])
        if len(fields) not in (3, 4) or grade is None or not grade.is_integer():
            raise DataError(
                f"{path}: line {number}: wanted `query document grade` (or TREC's four columns), the grade a whole "
                f"number; found {line.strip()!r}"
            )
        yield number, fields[0].strip(), fields[-2].strip(), int(grade)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- slices -------------------------------------------------------------------------------------------------------


def query_slices(task: RetrievalTask) -> dict[str, dict[str, Mask]]:
    """Groups of queries to look at apart: length, language, whether training saw an answer, and the kept columns.

    A grouping that puts all into one group says nothing and is left out, but for that by what training saw.
    """
    slices = {"length": _by_length(task.queries), "language": _by_value([language_of(text) for text in task.queries])}
    if task.corpus.seen is not None:
        seen = task.corpus.seen
        known = ["seen" if any(seen[d] for d, g in grades.items() if g > 0) else "unseen" for grades in task.relevant]
        slices[IN_TRAINING] = _by_value(known)
    slices |= {name: _by_value(values) for name, values in task.query_columns.items()}
    return {name: groups for name, groups in slices.items() if len(groups) > 1 or name == IN_TRAINING}


def _by_value(values: Sequence[str]) -> dict[str, Mask]:
    array = np.array(values, dtype=object)
    return {str(value): array == value for value in sorted(set(values))}


def _by_length(texts: Sequence[str]) -> dict[str, Mask]:
    """Three groups of about equal size, by words."""
    words = np.array([len(split_words(text)) for text in texts])
    low, high = np.quantile(words, (1 / 3, 2 / 3), method="lower")
    groups = {
        f"up to {low} words": words <= low,
        f"{low + 1} to {high} words": (words > low) & (words <= high),
        f"over {high} words": words > max(low, high),
    }
    return {name: mask for name, mask in groups.items() if mask.any()}
