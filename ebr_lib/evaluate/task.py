"""A retrieval task: queries, documents and judgements, in any of the usual layouts.

Equal texts are one document, whatever their ids: whichever copy a model returns, it has found the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebr_lib.data.queries import (
    COMPRESSED,
    JUDGEMENTS,
    PART,
    QUERY_IDS,
    TABLES,
    need_column,
    plain_suffix,
    query_texts,
    read_records,
    text_in,
    warn_of_blank_queries,
)
from ebr_lib.data.text import is_blank, normalised, text_keys
from ebr_lib.errors import DataError, MissingError
from ebr_lib.evaluate.corpus import Columns, Corpus, id_twice, read_corpus, read_ids
from ebr_lib.evaluate.judgements import Judged, judged_by_text, read_answers, read_qrels
from ebr_lib.logs import logger
from ebr_lib.names import CORPUS_FILE, HELDOUT_FILE, QUERIES_FILE, LeaveOutOwn

QRELS_FOLDERS = ("qrels", "data")  # of BEIR, and of data sets whose judgements are the default table


@dataclass(frozen=True)
class Sources:
    """The files of a task. Without `qrels` the queries have their answers as texts; without `corpus` these answers are
    the corpus."""

    queries: Path
    corpus: Path | None
    qrels: Path | None


@dataclass(frozen=True)
class RetrievalTask:
    """Queries that have at least one relevant document, and for each its documents' grades.

    :ivar own: for each query, the documents that are the query itself: neither relevant nor retrieved for it.
    :ivar unjudged: how many queries have no relevant document in the judgements.
    :ivar repeated: how many queries equal an earlier one, which has their answers.
    :ivar query_prompts: each query's own prompt, from the column `prompt`; None where it has none.
    :ivar left_out: what else was left out, by the name that the report shows; only counts above 0.
    """

    query_ids: list[str]
    queries: list[str]
    query_columns: dict[str, list[str]]
    corpus: Corpus
    relevant: list[dict[int, int]]
    unjudged: int
    repeated: int = 0
    own: Sequence[Collection[int]] = ()
    query_prompts: Sequence[str | None] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, int]:
        """Counts of the task, by the names that the report shows."""
        return {
            "queries": len(self.queries),
            "queries_without_judgement": self.unjudged,
            "queries_repeated": self.repeated,
            "documents": len(self.corpus),
            "documents_of_equal_text": len(self.corpus.number) - len(self.corpus),
            "judgements": sum(map(len, self.relevant)),
            **self.left_out,
        }


# --- finding the files --------------------------------------------------------------------------------------------


def find_sources(data_path: str | None, queries: str | None, corpus: str | None, qrels: str | None) -> Sources:
    """Find the files of a task; paths that are given replace what `data_path` holds.

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
    """The queries of a place, and its corpus and judgements if no others are given."""
    if place.is_file():
        return Sources(place, corpus, qrels)
    corpus = corpus or _table_named("corpus", place, TABLES)
    if (place / HELDOUT_FILE).is_file():
        return Sources(place / HELDOUT_FILE, corpus, qrels)
    if (queries := _table_named("queries", place, TABLES)) and corpus:
        alone = _table_named("qrels", place, JUDGEMENTS)  # may be a folder, of several splits
        folder = next((folder for name in QRELS_FOLDERS if (folder := place / name).is_dir()), place / "qrels")
        return Sources(queries, corpus, qrels or (alone if alone and alone.is_file() else _split_in(folder)))
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


def _split_in(folder: Path) -> Path:
    """The judgements of a folder: the test split, or the only one."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if not path.name.startswith(".") and plain_suffix(path) in JUDGEMENTS]
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


# --- reading them -------------------------------------------------------------------------------------------------


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
    :param leave_out_own: which documents are the query itself: those of its text, and if judgements name documents by
        their ids, the one of its id too.
    :raises DataError: a judged query without text, an empty corpus, an id with two texts or none, no judgements.
    """
    records = read_records(sources.queries)
    texts = query_texts(sources.queries, records, columns.query)
    for name in slice_columns:
        need_column(sources.queries, records, name)
    answers = None if sources.qrels else read_answers(sources.queries, records, columns.label)
    corpus = read_corpus(sources.corpus, columns, texts, answers, trained)
    plain = [normalised(text) for text in texts]
    if sources.qrels:
        own_column = columns.id if columns.id in records[0] else None
        ids = read_ids(sources.queries, records, own_column, QUERY_IDS, needed=True)
        first = _first_rows(sources.queries, ids, plain)
        judged = read_qrels(sources.qrels, len(ids), first, corpus)
    else:
        ids = [str(i) for i in range(len(records))]
        first = _first_rows(sources.queries, plain, plain)
        judged = judged_by_text(sources.queries, [first[text] for text in plain], answers or (), corpus)
    blank = {i for i, text in enumerate(texts) if is_blank(text)}
    if wrong := sorted(blank & judged.asked):
        rows = ", ".join(str(i + 1) for i in wrong[:5])
        raise DataError(
            f"{sources.queries}: {len(wrong)} judged queries without text (rows {rows}); remove or fill them"
        )
    if blank:
        warn_of_blank_queries(sources.queries, len(blank))
    own = _own_documents(corpus, texts, ids if sources.qrels else None, judged, leave_out_own)
    relevant = [
        {d: grade for d, grade in grades.items() if d not in out}
        for grades, out in zip(judged.grades, own, strict=True)
    ]
    kept = [i for i, grades in enumerate(relevant) if any(grade > 0 for grade in grades.values())]
    left_out = judged.left_out + Counter(  # a sum of counters has only counts above 0
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
        query_columns={name: [text_in(records[i].get(name)) for i in kept] for name in slice_columns},
        corpus=corpus,
        relevant=[relevant[i] for i in kept],
        unjudged=len(records) - len(judged.asked | blank) - repeated,
        repeated=repeated,
        own=[own[i] for i in kept],
        query_prompts=[p if isinstance(p := records[i].get("prompt"), str) and not is_blank(p) else None for i in kept],
        left_out=left_out,
    )


def _first_rows(path: Path, keys: Sequence[str], plain: Sequence[str]) -> dict[str, int]:
    """The first row of each key; rows with the same key must have equal texts.

    :param plain: the normalised texts.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        other = first.setdefault(key, row)
        if plain[row] != plain[other]:
            raise id_twice(path, key, other, row)
    return first


def _nothing_to_measure(path: Path, left_out: Mapping[str, int]) -> DataError:
    counts = "; ".join(f"{name.replace('_', ' ')}: {count}" for name, count in left_out.items())
    message = f"{path}: no query has a relevant document; nothing to measure{f' ({counts})' if counts else ''}"
    if left_out.get("own_judgements_left_out"):
        message += ". The answers are the queries themselves, by text or id: to keep these, set leave_out_own: none"
    return DataError(message)


# --- a query's own documents --------------------------------------------------------------------------------------


def _own_documents(
    corpus: Corpus, texts: Sequence[str], ids: Sequence[str] | None, judged: Judged, leave_out_own: LeaveOutOwn
) -> list[set[int]]:
    """For each query, the documents that are the query itself: of its text, and of its id if there are ids."""
    own: list[set[int]] = [set() for _ in texts]
    if leave_out_own != "none" and corpus.texts is None:
        logger.warning(
            "%s 没有文本列，无法按文本略过查询自身 has no text column, so documents equal to a query are not left out; "
            "keep the text column in the inference run",
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
            "查询自身不参与排序 own documents are neither answers nor retrieved: those of %d of %d queries",
            count,
            len(judged.asked),
        )
    if named := sum(len(judged.answers(i).intersection(own[i])) for i in judged.asked):
        logger.warning(
            "标注中的查询自身已略过 judgements that name the query itself are left out: %d; "
            "leave_out_own: none keeps them",
            named,
        )
    return own


def _are_numbered_apart(of_id: Mapping[int, int], judged: Judged) -> bool:
    """Do equal ids of a query and a document mean different things? Yes, if the documents with the queries' ids, of
    other texts, are the only answers of most of these queries."""
    answers = sum(judged.answers(i) == {document} for i, document in of_id.items())
    if apart := 2 * answers > len(of_id):
        judged.left_out["answers_of_the_query_id_kept"] = answers
        logger.warning(
            "查询与文档视为各自编号 queries and documents seem to be numbered apart: the document with a query's id, "
            "of another text, is its only answer for %d of %d queries",
            answers,
            len(of_id),
        )
    elif of_id:
        logger.warning(
            "仅 ID 与查询相同的文档也已略过 documents left out for their id alone, of another text: %d; "
            "if queries and documents are numbered apart, set leave_out_own: text",
            len(of_id),
        )
    return apart
