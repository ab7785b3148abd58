"""What an evaluation measures against: queries, documents and judgements, read from the shapes they come in.

Equal texts are one document, whatever their ids: whichever copy a model returns, it has found the text.
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.columnar import read_columns, read_schema
from ebr_lib.data.containers import COLUMNAR, kind_of, opened
from ebr_lib.data.doctor import language_of
from ebr_lib.data.finder import FoundFiles, find_files
from ebr_lib.data.hive import HEADER_AGAIN, Layout, open_source, read_rows, readable
from ebr_lib.data.noise import split_words
from ebr_lib.data.pairs import HALF_CHARACTER, half_character, is_blank, is_positive_pair, normalised, text_keys
from ebr_lib.data.records import BadRowError, is_quoted, json_rows
from ebr_lib.data.vectors import NPY, PARQUET, VECTOR, ending_of, iter_embeddings, read_manifest
from ebr_lib.errors import DataError, MissingError, UserError
from ebr_lib.logs import logger
from ebr_lib.names import LeaveOutOwn
from ebr_lib.retrieval.maker import Maker
from ebr_lib.retrieval.metrics import unit

QUERY_TEXTS = ("text", "query", "question", "anchor")
DOCUMENT_TEXTS = ("text", "description", "document", "passage", "positive", "content")
ANSWERS = ("positive", "pos", "positives")
QUERY_IDS = ("_id", "id", "query_id", "qid")
DOCUMENT_IDS = ("_id", "id", "doc_id", "docid")
HELDOUT_FILE, CORPUS_FILE, QUERIES_FILE = "heldout.jsonl", "corpus.jsonl", "queries.jsonl"
QRELS_FOLDERS = ("qrels", "data")  # of BEIR, and of data sets whose judgements are the default table
JSON = (".jsonl", ".json", ".ndjson")
TABLES = (*JSON, PARQUET, ".orc", ".csv", ".tsv", ".txt")  # of two files of one name the first of these is taken
JUDGEMENTS = (*TABLES, ".qrels", ".trec")
COMPRESSED = ("", ".gz", ".bz2", ".zst")
PART = re.compile(r"(.+-)(\d+)(-of-(\d+).*)")  # a part of a table, as Hugging Face names it
# names of a judgement's columns, without case, "-", "_" and spaces
JUDGED_QUERY = ("queryid", "qid", "query", "topic")
JUDGED_DOCUMENT = ("corpusid", "docid", "documentid", "did", "passageid", "pid", "itemid", "document", "doc")
GRADE = ("score", "grade", "relevance", "rel", "label", "judgement", "judgment")
USUAL = frozenset((*QUERY_TEXTS, *DOCUMENT_TEXTS, *ANSWERS, *QUERY_IDS, *DOCUMENT_IDS, *JUDGED_QUERY))
SHOWN_LEFT_OUT = 3
DAMAGED = (ValueError, OSError, EOFError, zlib.error)  # UnicodeDecodeError is a ValueError

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

    `id` is that of the documents, and of the queries where their file has it too. `label` says whether a query's answer
    is one; "none" is no column.
    """

    query: str | None = None
    corpus: str | None = None
    id: str | None = None
    label: str | None = None


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


@dataclass(frozen=True)
class RetrievalTask:
    """Queries that have at least one relevant document, and for each its documents' grades.

    :ivar own: for each query, the documents that are the query itself: neither relevant nor retrieved for it.
    :ivar unjudged: queries without a relevant document in the judgements.
    :ivar repeated: queries equal to one before, which has their answers.
    :ivar left_out: what else was left out, by the name that the report shows; only counts above 0.
    """

    query_ids: list[str]
    queries: list[str]
    query_columns: dict[str, list[str]]
    corpus: Corpus
    relevant: list[dict[int, int]]
    unjudged: int
    repeated: int = 0
    own: Sequence[frozenset[int]] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

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
            **self.left_out,
        }


def find_sources(data_path: str | None, queries: str | None, corpus: str | None, qrels: str | None) -> Sources:
    """Find the files of a task; paths that are given win over what `data_path` holds.

    :param data_path: a fine-tuned model's folder (`heldout.jsonl`, `corpus.jsonl`), a BEIR folder (`corpus`, `queries`
        and `qrels/test`, each `.jsonl`, another table, or a folder of such), or a file of queries with their answers.
    :raises MissingError: a file is not there, or not given, or a folder is neither.
    """
    judged = Path(qrels) if qrels else None
    given = Path(corpus) if corpus else None, _split_in(judged) if judged and judged.is_dir() else judged
    sources = _found(Path(data_path), *given) if data_path and not queries else Sources(Path(queries or ""), *given)
    for path in (sources.queries, sources.corpus, sources.qrels):
        if path is not None and not path.exists():
            raise MissingError(f"evaluation data {path}: there is no such file")
    if sources.qrels and not sources.corpus:
        raise MissingError(
            f"{sources.qrels} names documents by their ids; give the file that holds them as corpus_path"
        )
    return sources


def _found(place: Path, corpus: Path | None, qrels: Path | None) -> Sources:
    """The queries of a place, and its corpus and judgements where no others are given."""
    if place.is_file():
        return Sources(place, corpus, qrels)
    corpus = corpus or _table_named("corpus", place, TABLES)
    if (place / HELDOUT_FILE).is_file():
        return Sources(place / HELDOUT_FILE, corpus, qrels)
    if (queries := _table_named("queries", place, TABLES)) and corpus:
        return Sources(queries, corpus, qrels or _beir_qrels(place))
    raise MissingError(
        f"evaluation data {place}: wanted a fine-tuned model's folder with {HELDOUT_FILE} (fine-tune with eval_ratio "
        f"above 0), a BEIR folder with {CORPUS_FILE}, {QUERIES_FILE} and qrels/*.tsv, or a file of queries; "
        f"found {', '.join(sorted(p.name for p in place.glob('*'))[:8]) if place.is_dir() else 'nothing'}"
    )


def _table_named(stem: str, folder: Path, endings: Iterable[str]) -> Path | None:
    """A table of a folder: a file of its name, the first of its parts, or a folder of its name."""
    files = [folder / f"{stem}{ending}{packed}" for ending in endings for packed in COMPRESSED]
    found = [path for path in files if path.is_file()] + sorted(folder.glob(f"{stem}-*0-of-*"))
    return next(iter(found), folder / stem if (folder / stem).is_dir() else None)


def _beir_qrels(place: Path) -> Path:
    alone = _table_named("qrels", place, JUDGEMENTS)
    if alone and alone.is_file():
        return alone
    return _split_in(next((folder for name in QRELS_FOLDERS if (folder := place / name).is_dir()), place / "qrels"))


def _split_in(folder: Path) -> Path:
    """The judgements of a folder: those of the test split, or else the only ones."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if not path.name.startswith(".") and _plain_suffix(path) in JUDGEMENTS]
    splits = [path for path in files if not (part := PART.fullmatch(path.name)) or int(part[2]) == 0]
    found = _table_named("test", folder, JUDGEMENTS) or (splits[0] if len(splits) == 1 else None)
    if found is None:
        names = ", ".join(file.name for file in files or there) or "none"
        raise MissingError(
            f"{folder}: wanted a file of judgements test{'|'.join(JUDGEMENTS)}, or one alone, found {names}; name it "
            "with qrels_path"
        )
    if len(splits) > 1:
        others = ", ".join(path.name for path in splits if path != found)
        logger.info("标注文件 judgements: %s (not %s)", found, others)
    return found


def _plain_suffix(path: Path) -> str:
    """The ending that says what a file holds: `.csv` of `test.csv.gz`."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix


def read_task(
    sources: Sources,
    columns: Columns,
    slice_columns: Sequence[str],
    trained: set[str],
    leave_out_own: LeaveOutOwn = "text_and_id",
) -> RetrievalTask:
    """Read queries, documents and judgements.

    :param slice_columns: columns of the query file to keep.
    :param trained: normalised texts of documents that training has seen; may be empty.
    :param leave_out_own: which documents are the query itself: those of its text, and where judgements name documents
        by ids that of its id too.
    :raises DataError: a judged query without text, an empty corpus, an id of two texts or none, no judgements.
    """
    records = read_records(sources.queries)
    texts = _query_texts(sources.queries, records, columns.query)
    for name in slice_columns:
        _need_column(sources.queries, records, name)
    answers = None if sources.qrels else _answers(sources.queries, records, columns.label)
    corpus = _read_corpus(sources.corpus, columns, texts, answers, trained)
    if sources.qrels:
        own_column = columns.id if columns.id in records[0] else None
        ids = _ids(sources.queries, records, own_column, QUERY_IDS, needed=True)
        first = _first_rows(sources.queries, ids, texts)
        judged = _read_qrels(sources.qrels, len(ids), first, corpus)
    else:
        ids = [str(i) for i in range(len(records))]
        first = _first_rows(sources.queries, [normalised(text) for text in texts], texts)
        judged = _judged_by_text(sources.queries, texts, first, answers or (), corpus)
    blank = {i for i, text in enumerate(texts) if is_blank(text)}
    _check_blank_queries(sources.queries, blank, judged)
    own = _own_documents(corpus, texts, ids if sources.qrels else None, judged, leave_out_own)
    relevant = [
        {d: grade for d, grade in grades.items() if d not in out}
        for grades, out in zip(judged.grades, own, strict=True)
    ]
    kept = [i for i, grades in enumerate(relevant) if any(grade > 0 for grade in grades.values())]
    left_out = judged.left_out + Counter(
        queries_blank=len(blank),
        own_documents_left_out=sum(len(own[i]) for i in kept),
        own_judgements_left_out=sum(len(a) - len(b) for a, b in zip(judged.grades, relevant, strict=True)),
        queries_without_answer_left=len(judged.asked - set(kept)),
    )
    if not kept:
        raise _nothing_to_measure(sources.qrels or sources.queries, left_out)
    repeated = len(set(range(len(records))) - set(first.values()) - blank)
    return RetrievalTask(
        query_ids=[ids[i] for i in kept],
        queries=[texts[i] for i in kept],
        query_columns={name: [_text(records[i].get(name)) for i in kept] for name in slice_columns},
        corpus=corpus,
        relevant=[relevant[i] for i in kept],
        unjudged=len(records) - len(judged.asked | blank) - repeated,
        repeated=repeated,
        own=[own[i] for i in kept],
        left_out=left_out,
    )


def _first_rows(path: Path, keys: Sequence[str], texts: Sequence[str]) -> dict[str, int]:
    """The first row of each key; rows of one key must have equal texts."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        other = first.setdefault(key, row)
        if normalised(texts[row]) != normalised(texts[other]):
            raise _id_twice(path, key, other, row)
    return first


def _check_blank_queries(path: Path, blank: set[int], judged: _Judged) -> None:
    """A blank query without judgements is left out; one that is judged cannot be measured."""
    if asked := sorted(blank & judged.asked):
        rows = ", ".join(str(i + 1) for i in asked[:5])
        raise DataError(f"{path}: {len(asked)} judged queries without text (rows {rows}); remove or fill them")
    if blank:
        _warn_of_blank_queries(path, len(blank))


def _warn_of_blank_queries(path: Path, count: int) -> None:
    logger.warning("空查询已略过 blank queries left out: %d of %s", count, path)


def _own_documents(
    corpus: Corpus, texts: Sequence[str], ids: Sequence[str] | None, judged: _Judged, leave_out_own: LeaveOutOwn
) -> list[frozenset[int]]:
    """For each query, the documents that are the query itself: of its text, and of its id where there are ids."""
    own: list[set[int]] = [set() for _ in texts]
    if leave_out_own != "none" and corpus.texts is None:
        logger.warning(
            "%s 没有文本列，无法按文本略过查询自身 keeps no text: documents of a query's text are not left out; keep "
            "the text column in the inference run",
            corpus.vectors,
        )
    elif leave_out_own != "none":
        for documents, key in zip(own, text_keys(texts).tolist(), strict=True):
            documents.update({corpus.number_of_text[key]} if key in corpus.number_of_text else ())
            documents.update(corpus.untitled.get(key, ()))
    if leave_out_own == "text_and_id" and ids is not None:
        of_id = {i: corpus.number[ids[i]] for i in judged.asked if ids[i] in corpus.number}
        of_id = {i: document for i, document in of_id.items() if document not in own[i]}
        if not _are_numbered_apart(of_id, judged):
            for i, document in of_id.items():
                own[i].add(document)
    if count := sum(bool(own[i]) for i in judged.asked):
        logger.info(
            "查询自身不参与排序 own documents left out, as answers and as competitors: those of %d of %d queries",
            count,
            len(judged.asked),
        )
    if named := sum(len(judged.answers(i).intersection(own[i])) for i in judged.asked):
        logger.warning(
            "标注中的查询自身已略过 judgements that name the query itself are left out: %d; "
            "leave_out_own: none keeps them",
            named,
        )
    return [frozenset(documents) for documents in own]


def _are_numbered_apart(of_id: Mapping[int, int], judged: _Judged) -> bool:
    """Whether equal ids do not mean the same thing: the documents of the queries' ids, of other texts, are the only
    answers of most of these queries."""
    answers = sum(judged.answers(i) == {document} for i, document in of_id.items())
    if apart := 2 * answers > len(of_id):
        judged.left_out["answers_of_the_query_id_kept"] = answers
        logger.warning(
            "查询与文档视为各自编号 queries and documents are taken as numbered apart: the document of a query's id is "
            "its only answer, of another text, for %d of %d queries",
            answers,
            len(of_id),
        )
    elif of_id:
        logger.warning(
            "仅 ID 与查询相同的文档也已略过 documents left out for their id alone, of another text: %d; "
            "where queries and documents are numbered apart, set leave_out_own: text",
            len(of_id),
        )
    return apart


def _nothing_to_measure(path: Path, left_out: Mapping[str, int]) -> DataError:
    shown = "; ".join(f"{name.replace('_', ' ')}: {count}" for name, count in left_out.items())
    advice = (
        ". The answers are the queries themselves, by text or id: where these are meant, set leave_out_own: none"
        if left_out.get("own_judgements_left_out")
        else ""
    )
    return DataError(
        f"{path}: no query has a relevant document; nothing to measure{f' ({shown})' if shown else ''}{advice}"
    )


# --- records ------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    """Read a table of texts: JSON (an array, or one object a line), Parquet, ORC, or delimited text with a header row;
    a file, all files of a folder, or all parts of `NAME-00000-of-00002.parquet`.

    Delimited text is split by `\\001` where its header has one, and a quote is a letter there; by tabs in a `.tsv`,
    where fields are quoted if all of the file can be read so; else it is CSV with quotes.

    :raises MissingError: there is no such file.
    :raises DataError: it cannot be read as such, or holds no row.
    """
    records = [record for part in _parts(path) for record in _records_of_file(part)]
    if not records:
        raise DataError(f"{path} holds no rows")
    return records


def _parts(path: Path) -> list[Path]:
    """The files of a table: those of a folder, all parts where the file is one of several, else the file alone."""
    if path.is_dir():
        found = _tables_in(path)
        found.log()
        return found.files
    if (part := PART.fullmatch(path.name)) is None:
        parts = [path]
    else:
        numbers = (str(number).zfill(len(part[2])) for number in range(int(part[4])))
        parts = [path.with_name(f"{part[1]}{number}{part[3]}") for number in numbers]
    if missing := [file for file in parts if not file.is_file()]:
        raise MissingError(f"{missing[0]}: there is no such file")
    return parts


def _tables_in(folder: Path) -> FoundFiles:
    patterns = [f"*{ending}{packed}" for ending in JUDGEMENTS for packed in COMPRESSED]
    found = find_files(folder, patterns, "evaluation data")
    if not found.files:
        raise MissingError(f"{folder}: wanted a table ({', '.join(TABLES)}) in the folder, found none")
    return found


def _records_of_file(path: Path) -> list[Record]:
    try:
        return list(_records(path))
    except UserError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as {path.suffix or 'text'}: {error}") from error


def _records(path: Path) -> Iterator[Record]:
    if (kind := _kind_of(path)) in COLUMNAR:
        yield from read_columns(path, kind)
    elif _plain_suffix(path) in JSON:
        yield from _json_records(path)
    else:
        yield from _delimited_records(path)


def _kind_of(path: Path) -> str:
    with readable(path):
        return kind_of(path)


def _letters(path: Path, newline: str | None = None) -> IO[str]:
    return io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline=newline)


def _json_records(path: Path) -> Iterator[Record]:
    for line, row, _ in json_rows(path, _is_usual):
        if isinstance(row, BadRowError):
            raise DataError(f"{path}, line {line}: {row}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: wanted an object, found {type(row).__name__}")
        for column, value in row.items():
            if half_character(_strings(value)) is not None:
                raise DataError(f"{path}, line {line}: `{column}` holds {HALF_CHARACTER}")
        yield row


def _is_usual(name: str) -> bool:
    return name in USUAL or _plain_name(name) in USUAL


def _strings(value: Any) -> Iterator[str]:
    """The texts of a value: itself, or those of its list."""
    yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def _delimited_records(path: Path) -> Iterator[Record]:
    with opened(path) as raw:
        is_hive = b"\x01" in raw.readline()
    if is_hive:
        yield from _hive_records(path)
        return
    rows = _split_rows(path, "\t" if _plain_suffix(path) == ".tsv" else ",")
    _, names = next(rows, (1, []))
    for line, row in rows:
        if row and len(row) != len(names):
            raise DataError(f"{path}: line {line}: {len(row)} fields, the header has {len(names)}")
        if row:
            yield dict(zip(names, row, strict=True))


def _split_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of delimited text, each with the line it begins at; see `is_quoted`."""
    unquoted: Any = {} if is_quoted(path, delimiter) else {"quoting": csv.QUOTE_NONE}
    csv.field_size_limit(MOST_LETTERS)  # 131,072 by default: a long page is not a broken quote
    line = 1
    with _letters(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True, **unquoted)
        try:
            for row in rows:
                yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: line {line}: a quote that is not closed, or a letter after one ({error})"
            ) from error


def _hive_records(path: Path) -> Iterator[Record]:
    source = open_source(path, Layout())
    for row in read_rows(source, source.columns, Layout()):
        if not row.raw.strip() or row.reason == HEADER_AGAIN:  # an empty last line; files that were joined
            continue
        if row.reason:
            raise DataError(f"{path}: line {row.position.line}: {row.reason}")
        values = [None if value is None else value.decode() for value in row.values]
        yield dict(zip(source.columns, values, strict=True))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _id(value: Any) -> str:
    """An id as text; whole numbers that came as floats (pandas, of a column with nulls) are whole numbers."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else _text(value)


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
    """The queries' texts; the empty text where a row has none."""
    column = _text_column(path, records, told, QUERY_TEXTS, "query_column")
    texts = [text if isinstance(text := record.get(column), str) else "" for record in records]
    if all(map(is_blank, texts)):
        raise DataError(
            f"{path}: none of its {len(texts)} queries has text in column {column}; name another with query_column"
        )
    return texts


def read_queries(path: Path, column: str | None) -> list[str]:
    """The texts of a file of queries, equal ones once; blank ones are left out, and the log counts them."""
    texts = _query_texts(path, read_records(path), column)
    kept = [text for text in texts if not is_blank(text)]
    if len(kept) < len(texts):
        _warn_of_blank_queries(path, len(texts) - len(kept))
    return list(dict.fromkeys(kept))


def _ids(path: Path, records: Sequence[Record], told: str | None, usual: Sequence[str], *, needed: bool) -> list[str]:
    """The ids of a file's rows; their numbers where it has none and no judgement names them."""
    column = told or next((name for name in usual if name in records[0]), None)
    if column is None:
        if needed:
            raise _no_ids(path, usual, list(records[0]))
        return [str(i) for i in range(len(records))]
    _need_column(path, records, column)
    ids = [_id(record.get(column)) for record in records]
    _check_ids(path, column, ids)
    return ids


def _check_ids(path: Path, column: str, ids: Sequence[str]) -> None:
    if blank := [str(row) for row, id_ in enumerate(ids, 1) if not id_]:
        raise DataError(f"{path}: no id in column {column} of rows {', '.join(blank[:5])}; every row needs one")


def _id_twice(path: Path, id_: str, row: int, other: int) -> DataError:
    return DataError(
        f"{path}: id {id_!r} is there more than once, with different texts (rows {row + 1} and {other + 1}); ids must "
        "be unique: name another column with id_column"
    )


def _no_ids(path: Path, usual: Sequence[str], found: Sequence[str]) -> DataError:
    return DataError(
        f"{path}: judgements name its rows by their ids, and no column has any; looked for {', '.join(usual)}, found "
        f"{', '.join(found) or 'none'}; name it with id_column"
    )


# --- the corpus ---------------------------------------------------------------------------------------------------


def _read_corpus(
    path: Path | None,
    columns: Columns,
    queries: Sequence[str],
    answers: Sequence[Sequence[str]] | None,
    trained: set[str],
) -> Corpus:
    """The documents of a file; of the answers where there is none. Without answers, judgements name documents by id."""
    if path is None:
        texts = [text for text in dict.fromkeys(chain.from_iterable(answers or ())) if not is_blank(text)]
        return _distinct(None, [str(i) for i in range(len(texts))], texts, None, trained)
    if _holds_vectors(path):
        return _embedded_corpus(path, columns, trained, ids_needed=answers is None)
    try:
        records = read_records(path)
    except DataError as error:
        raise DataError(f"corpus {error}; an evaluation needs documents") from error
    column = _text_column(path, records, columns.corpus, DOCUMENT_TEXTS, "corpus_column")
    texts = [_titled(record, column) for record in records]
    flags = _seen_flags(path, records)
    ids = _ids(path, records, columns.id, DOCUMENT_IDS, needed=answers is None)
    rows = _with_text(path, column, texts)
    chosen = [flags[row] for row in rows] if flags else None
    corpus = _distinct(path, [ids[row] for row in rows], [texts[row] for row in rows], chosen, trained)
    plain = [_text(records[row].get(column)) for row in rows]
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


def _distinct(
    path: Path | None, ids: list[str], texts: list[str], flags: list[bool] | None, trained: set[str]
) -> Corpus:
    number_of_text: dict[int, int] = {}
    number: dict[str, int] = {}
    first: list[int] = []
    for row, (id_, key) in enumerate(zip(ids, text_keys(texts).tolist(), strict=True)):
        if key not in number_of_text:
            number_of_text[key] = len(first)
            first.append(row)
        if number.setdefault(id_, number_of_text[key]) != number_of_text[key]:
            raise _id_twice(path or Path(), id_, ids.index(id_), row)
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
        return vectors or _holds_vectors(_tables_in(path).files[0])
    if (kind := _kind_of(path)) in COLUMNAR:
        return VECTOR in read_schema(path, kind)[0].names
    with opened(path) as file:
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
    if column:
        _check_texts_have_vectors(path, column, kept[column], valid)
        rows = rows[_with_text(path, column, [kept[column][row] or "" for row in rows])]
    ids = [all_ids[row] for row in rows]
    # where there is no text, each row is a document of its own
    texts = [kept[column][row] or "" for row in rows] if column else ids
    if not column and len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise DataError(f"{path}: id {twice!r} is there more than once; name another column with id_column")
    corpus = _distinct(path, ids, texts, None, trained)
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
    encoded = Maker.of(read_manifest(path) or {}).description_column
    lost = [i for i in np.flatnonzero(~valid).tolist() if not is_blank(texts[i] or "")]
    if lost and encoded in (None, column):
        shown = ", ".join(f"{(texts[i] or '')[:60]!r} (row {i})" for i in lost[:3])
        raise DataError(f"{path}: {len(lost)} rows have text and no vector (NaN), such as {shown}; encode them again")


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


def _answers(path: Path, records: Sequence[Record], label_column: str | None) -> list[list[str]]:
    """The texts that answer each query; none in rows whose label says that they do not."""
    column = next((name for name in ANSWERS if name in records[0]), None)
    if column is None:
        raise DataError(
            f"{path}: no judgements: wanted a column {', '.join(ANSWERS)} with the texts that answer a query, or a "
            f"file given as qrels_path; found {', '.join(records[0])}"
        )
    answers, refused = [], 0
    for row, record in enumerate(records, 1):
        texts = _texts_of(path, row, record.get(column))
        try:
            answer = not texts or is_positive_pair(record, len(texts), label_column)
        except DataError as reason:
            raise DataError(f"{path}: row {row}: {reason}") from None
        refused += not answer
        answers.append(texts if answer else [])
    if refused:
        logger.warning("标签为否的行不算答案 rows whose label says no are no answers: %d of %s", refused, path)
    return answers


def _texts_of(path: Path, row: int, value: Any) -> list[str]:
    if value is None or value == "":
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise DataError(f"{path}: row {row}: wanted an answer's text or a list of texts, found {value!r}")
    return values


@dataclass
class _Judged:
    """Judgements of known documents, and counts of those left out.

    :ivar grades: for each row of the queries, document number to grade.
    :ivar asked: rows with a relevant document in the judgements, be it known or not.
    """

    grades: list[dict[int, int]]
    asked: set[int] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, row: int, document: int, grade: int) -> None:
        """Take a judgement; of several of one document the highest counts."""
        self.grades[row][document] = max(grade, self.grades[row].get(document, grade))

    def answers(self, row: int) -> set[int]:
        """The known relevant documents of a query."""
        return {document for document, grade in self.grades[row].items() if grade > 0}

    def leave_out(self, kind: str, example: str) -> None:
        """Count a judgement that cannot be used."""
        self.left_out[kind] += 1
        if len(self.examples) < SHOWN_LEFT_OUT:
            self.examples.append(example)

    def check(self, path: Path, advice: str) -> None:
        """Warn of what was left out; where that is everything, the files do not belong together."""
        if not self.left_out:
            return
        kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in self.left_out.items())
        said = f"{kinds} ({'; '.join(self.examples)}); {advice}"
        if not any(self.grades):
            raise DataError(f"{path}: no judgement is of a known query and document: {said}")
        logger.warning("%s: 部分标注已略过 left out: %s", path, said)


def _judged_by_text(
    path: Path, texts: Sequence[str], first: Mapping[str, int], answers: Sequence[Sequence[str]], corpus: Corpus
) -> _Judged:
    """Equal queries share their answers, and only the first of them stays."""
    judged = _Judged([{} for _ in texts])
    for row, (text, group) in enumerate(zip(texts, answers, strict=True)):
        leader = first[normalised(text)]
        for answer, key in zip(group, text_keys(group).tolist(), strict=True):
            judged.asked.add(leader)
            if key in corpus.number_of_text:
                judged.add(leader, corpus.number_of_text[key], 1)
            else:
                judged.leave_out("judgements_of_unknown_documents", f"row {row + 1}: {answer[:60]!r}")
    judged.check(path, "an answer must be a document of the corpus")
    return judged


def _read_qrels(path: Path, rows: int, queries: Mapping[str, int], corpus: Corpus) -> _Judged:
    """Read judgements: tables that name their columns, or BEIR's three (query, document, grade) or TREC's four.

    Judgements of unknown queries and documents, and of documents without text or vector, are counted and left out.
    """
    judged = _Judged([{} for _ in range(rows)])
    for place, query, document, grade in _judgements(path, queries):
        row = queries.get(query)
        if row is None:
            judged.leave_out("judgements_of_unknown_queries", f"{place}: query {query!r}")
            continue
        if grade > 0:
            judged.asked.add(row)
        if document in corpus.number:
            judged.add(row, corpus.number[document], grade)
        else:
            kind = "blank" if document in corpus.blank else "unknown"
            judged.leave_out(f"judgements_of_{kind}_documents", f"{place}: document {document!r}")
    judged.check(path, "check that the three files belong together, and the id columns (id_column)")
    return judged


def _judgements(path: Path, queries: Collection[str]) -> Iterator[tuple[str, str, str, int]]:
    """Place, query, document and grade of each judgement."""
    for part in _parts(path):
        is_table = _plain_suffix(part) in JSON or _kind_of(part) in COLUMNAR
        yield from _judgement_records(part) if is_table else _judgement_rows(part, queries)


def _judgement_records(path: Path) -> Iterator[tuple[str, str, str, int]]:
    records = _records_of_file(path)
    if records and all(isinstance(value, (dict, list)) for value in records[0].values()):
        yield from _nested_judgements(path, records)
        return
    names = _judgement_columns(path, list(records[0])) if records else []
    for number, record in enumerate(records, 1):
        query, document, grade = (record.get(name) for name in names)
        yield f"row {number}", _id(query), _id(document), _grade(path, f"row {number}", grade, record)


def _nested_judgements(path: Path, records: Sequence[Record]) -> Iterator[tuple[str, str, str, int]]:
    """Judgements as pytrec_eval takes them, `{query: {document: grade}}`; in a list of documents each is relevant."""
    for query, documents in chain.from_iterable(record.items() for record in records):
        place = f"query {query!r}"
        grades = dict.fromkeys(map(_id, documents), 1) if isinstance(documents, list) else documents
        if not isinstance(grades, dict) or any(isinstance(document, (dict, list)) for document in documents):
            raise _wrong_judgement(path, place, documents)
        for document, grade in grades.items():
            yield place, query, document, _grade(path, place, grade, {document: grade})


def _judgement_rows(path: Path, queries: Collection[str]) -> Iterator[tuple[str, str, str, int]]:
    chosen: Sequence[int] | None = None
    for number, (line, fields) in enumerate(_judgement_lines(path)):
        if number == 0 and _is_header(fields, queries):
            chosen = _named_fields(path, fields)
            continue
        if len(fields) <= max(chosen) if chosen else len(fields) not in (3, 4):
            raise _wrong_judgement(path, f"line {line}", " ".join(fields))
        query, document, grade = (fields[i].strip() for i in chosen or (0, -2, -1))
        yield f"line {line}", query, document, _grade(path, f"line {line}", grade, " ".join(fields))


def _judgement_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is not blank, split at tabs, \\001, commas or blanks, as the first line is."""
    try:
        with _letters(path) as file:
            head = file.readline()
        found = [mark for mark in "\t\x01" if mark in head]
        if "," in head and (
            _plain_suffix(path) == ".csv" or len(head.split()) not in (3, 4)
        ):  # else it is within an id
            found.append(",")
        if found:
            rows = _split_rows(path, found[0])
            yield from ((line, fields) for line, fields in rows if any(map(str.strip, fields)))
            return
        with _letters(path) as file:
            yield from ((line, text.split()) for line, text in enumerate(file, 1) if text.strip())
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        said = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(f"{path} {said}: {error}") from error


def _is_header(fields: Sequence[str], queries: Collection[str]) -> bool:
    """Whether a first line holds names: it names no query, and has no number."""
    return fields[0].strip() not in queries and all(_number(field) is None for field in fields)


def _named_fields(path: Path, names: Sequence[str]) -> list[int] | None:
    """The places of query, document and grade, where a header has names that say so; None takes them by their order."""
    plain = {_plain_name(name) for name in names}
    if plain.isdisjoint(JUDGED_QUERY) or plain.isdisjoint(JUDGED_DOCUMENT):
        return None
    return [names.index(name) for name in _judgement_columns(path, names)]


def _judgement_columns(path: Path, found: Sequence[str]) -> list[str]:
    """Which of the columns are query, document and grade."""
    named = {_plain_name(name): name for name in reversed(found)}
    chosen = [
        next((named[name] for name in usual if name in named), None) for usual in (JUDGED_QUERY, JUDGED_DOCUMENT, GRADE)
    ]
    missing = [name for name, column in zip(("query-id", "corpus-id", "score"), chosen, strict=True) if column is None]
    if missing:
        raise DataError(
            f"{path}: wanted columns query-id, corpus-id and score, found {', '.join(found) or 'none'}; "
            f"{' and '.join(missing)} must be added, or another column renamed"
        )
    return cast(list[str], chosen)


def _plain_name(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.casefold())


def _grade(path: Path, place: str, value: Any, shown: Any) -> int:
    """A grade as a whole number, also where it is written 1.0 or true."""
    number = _number(value)
    if number is None or not number.is_integer():
        raise _wrong_judgement(path, place, shown)
    return int(number)


def _wrong_judgement(path: Path, place: str, shown: Any) -> DataError:
    return DataError(
        f"{path}: {place}: wanted `query document grade` (or TREC's four columns), the grade a whole number; found "
        f"{shown!r}"
    )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
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
