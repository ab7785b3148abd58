"""Extension stage: measure retrieval, contenders side by side, and say what the difference is worth."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from pandas import DataFrame

from ebr_lib.data.embeddings.files import files_of
from ebr_lib.data.pairs import expand, read_pairs, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.errors import DataError, MissingError, ModelError, UserError
from ebr_lib.evaluate.columns import Columns
from ebr_lib.evaluate.compare import Difference, changed_most, compare
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.rankers import (
    BM25_B,
    BM25_K1,
    BM25_NAME,
    How,
    check_bm25,
    check_model,
    labels,
    rank_with_bm25,
    rank_with_model,
)
from ebr_lib.evaluate.report import Duel, Example, Report, Slice
from ebr_lib.evaluate.slices import query_slices
from ebr_lib.evaluate.task import RetrievalTask, find_sources, read_task
from ebr_lib.files import check_apart, make_folder, write_json, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.metrics import Ranking, Values, measure
from ebr_lib.model.bases import look_for_bases_in
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, as_text, html_link, make_table

MAIN_METRIC = "ndcg@10"  # by which queries are won and lost
SHOWN_DOCUMENTS = 5  # an example shows so many of a query's relevant and retrieved documents
CONFIG_FILE, HTML_FILE, JSON_FILE, QRELS_FILE = "eval_config.yaml", "report.html", "report.json", "qrels.trec"
RUN_ENDING = ".run.trec"


@dataclass(frozen=True, repr=False)
class EvalResult(TableRepr):
    """What an evaluation wrote and found.

    `metrics` maps contender to measure to mean; `differences` holds every pair of contenders on every measure.
    """

    report_html: Path
    report_json: Path
    runs: dict[str, Path]
    qrels: Path
    metrics: dict[str, dict[str, float]]
    differences: tuple[Difference, ...]
    facts: dict[str, Any]
    tables: dict[str, DataFrame] = field(compare=False)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + html_link(self.report_html)


@dataclass(frozen=True)
class _Contender:
    ranking: Ranking
    values: dict[str, Values]
    seconds: float
    how: How

    def means(self, chosen: Any = slice(None)) -> dict[str, float]:
        return {name: float(values[chosen].mean()) for name, values in self.values.items()}


def evaluate_retrieval(config: EvalConfig | Mapping[str, Any] | None = None) -> EvalResult:
    """Measure models and BM25 on the same queries; write `report.html`, `report.json`, runs and qrels.

    :param config: an EvalConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed), or `output_dir` cannot be made.
    :raises DataError: the data is broken: an empty corpus, judged queries without text, no judgement of known ids.
    :raises ModelError: a model cannot be loaded.
    :raises MissingError: data or a model is not there.
    """
    config = EvalConfig.resolve(config)
    look_for_bases_in(config.base_model_path)
    _check_own_code(config)
    folder = make_folder(Path(config.output_dir))
    _check_apart(config, folder)
    task, leaked = _read(config)
    logger.info("评估: %d 个查询, %d 篇文档 (%s)", len(task.queries), len(task.corpus), _said(task.facts()))
    contenders = dict(_contenders(config, task))
    _tell_of_other_runs(folder, contenders)
    report = _report(config, task, contenders, task.facts() | leaked)
    runs = _write(config, folder, task, contenders, report)
    tables = _tables(report)
    logger.info("%s", as_text(tables["measures"]), extra=RESULT)
    logger.info("报告已保存: %s", folder / HTML_FILE)
    return EvalResult(
        report_html=folder / HTML_FILE,
        report_json=folder / JSON_FILE,
        runs=runs,
        qrels=folder / QRELS_FILE,
        metrics={name: dict(means) for name, means in report.means.items()},
        differences=tuple(d for duel in report.duels for d in duel.differences),
        facts=dict(report.facts),
        tables=tables,
    )


def _check_own_code(config: EvalConfig) -> None:
    """Refuse models that bring code nobody decided about, all at once, before the data is read."""
    errors = []
    for name in config.models:
        try:
            check_remote_code(name, config.trust_remote_code)
        except MissingError:
            pass  # said with what else is wrong, once the data is known
        except ModelError as error:
            errors.append(str(error))
    if errors:
        raise ModelError("\n".join(errors))


def _said(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def _read(config: EvalConfig) -> tuple[RetrievalTask, dict[str, int]]:
    """The task, and what of it training has had, where the training data is given."""
    sources = find_sources(config.data_path, config.queries_path, config.corpus_path, config.qrels_path)
    columns = Columns(config.query_column, config.corpus_column, config.id_column, config.label_column)
    if config.train_data_path is None:
        return read_task(sources, columns, config.slice_columns, set(), config.leave_out_own), {}
    pairs = read_pairs(config.train_data_path, on_bad_row="skip", label_column=config.label_column)
    trained = texts_of(expand(pairs))
    task = read_task(sources, columns, config.slice_columns, trained, config.leave_out_own)
    rows = {normalised(text) for pair in pairs for text in (pair.anchor, *pair.positives)}
    leaked = sum(normalised(query) in rows for query in task.queries)
    if leaked:
        logger.warning("泄漏: %d queries of %d stand in the training data; they flatter", leaked, len(task.queries))
    return task, {"queries_in_training": leaked}


def _contenders(config: EvalConfig, task: RetrievalTask) -> Iterator[tuple[str, _Contender]]:
    stored = _checked(config, task.corpus)
    names = labels(config.models, [BM25_NAME] if config.bm25 else [])
    for label, (recipe, is_stored) in zip(names, stored.items(), strict=True):
        start = time.perf_counter()
        yield label, _measured(*rank_with_model(recipe, task, is_stored), config, start)
    if config.bm25:
        start = time.perf_counter()
        yield BM25_NAME, _measured(rank_with_bm25(task), {"k1": BM25_K1, "b": BM25_B}, config, start)


def _checked(config: EvalConfig, corpus: Corpus) -> dict[EncoderSpec, bool]:
    """Each model's recipe, and whether its document vectors are stored; what cannot be measured is told of all
    contenders at once, before any of them is ranked."""
    stored: dict[EncoderSpec, bool] = {}
    errors: list[UserError] = []
    for name in config.models:
        recipe = _recipe(config, name)
        try:
            stored[recipe] = check_model(recipe, corpus, load=len(config.models) > 1)
        except UserError as error:
            errors.append(error)
    try:
        if config.bm25:
            check_bm25(corpus)
    except DataError as error:
        errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else type(errors[0])("\n".join(map(str, errors)))
    return stored


def _recipe(config: EvalConfig, model_name: str) -> EncoderSpec:
    return EncoderSpec(
        model_name=model_name,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        max_seq_length=config.max_seq_length,
        truncate_dim=config.truncate_dim,
        precision=config.precision,
        backend=config.backend,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
    )


def _measured(ranking: Ranking, how: How, config: EvalConfig, start: float) -> _Contender:
    return _Contender(ranking, measure(ranking, config.ks), time.perf_counter() - start, how)


# --- the report ---------------------------------------------------------------------------------------------------


def _report(
    config: EvalConfig, task: RetrievalTask, contenders: Mapping[str, _Contender], facts: Mapping[str, Any]
) -> Report:
    names = list(contenders)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    parts = [
        Slice(kind, value, int(mask.sum()), {name: c.means(mask) for name, c in contenders.items()})
        for kind, groups in query_slices(task).items()
        for value, mask in groups.items()
    ]
    return Report(
        title="Retrieval evaluation · 召回评估",
        facts=facts,
        means={name: c.means() for name, c in contenders.items()},
        duels=[_duel(config, task, a, b, contenders) for a, b in pairs],
        slices=parts,
        slice_metrics=(f"recall@{max(config.ks)}", MAIN_METRIC),
        measured={"data": _data_said(config), "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")},
        how={name: c.how for name, c in contenders.items()},
    )


def _data_said(config: EvalConfig) -> str:
    """The paths that were given; `data_path` is not read where the queries have their own."""
    places = [config.queries_path or config.data_path, config.corpus_path, config.qrels_path]
    return ", ".join(place for place in places if place)


def _duel(
    config: EvalConfig, task: RetrievalTask, baseline: str, other: str, contenders: Mapping[str, _Contender]
) -> Duel:
    before, after = contenders[baseline], contenders[other]
    differences = compare(baseline, other, before.values, after.values, resamples=config.resamples, seed=config.seed)
    won, lost = changed_most(before.values[MAIN_METRIC], after.values[MAIN_METRIC], config.examples)
    return Duel(
        baseline,
        other,
        MAIN_METRIC,
        differences,
        [_example(task, query, before, after) for query in won],
        [_example(task, query, before, after) for query in lost],
    )


def _example(task: RetrievalTask, query: int, before: _Contender, after: _Contender) -> Example:
    relevant = {document for document, grade in task.relevant[query].items() if grade > 0}

    def retrieved(ranking: Ranking) -> list[tuple[str, bool]]:
        documents = [int(d) for d in ranking.ids[query, :SHOWN_DOCUMENTS] if d >= 0]
        return [(task.corpus.shown(d), d in relevant) for d in documents]

    return Example(
        query=task.queries[query],
        before=float(before.values[MAIN_METRIC][query]),
        after=float(after.values[MAIN_METRIC][query]),
        wanted=[task.corpus.shown(d) for d in sorted(relevant)[:SHOWN_DOCUMENTS]],
        retrieved_before=retrieved(before.ranking),
        retrieved_after=retrieved(after.ranking),
    )


def _tables(report: Report) -> dict[str, DataFrame]:
    """`measures`: means of all contenders, and differences from the first; `differences`: of every pair."""
    differences = DataFrame([asdict(d) for duel in report.duels for d in duel.differences])
    return {"measures": _measures(report), "differences": differences}


def _measures(report: Report) -> DataFrame:
    """Means of all contenders; after each but the first, the interval of its difference."""
    names = list(report.means)
    first = {(d.contender, d.metric): d for duel in report.duels if duel.baseline == names[0] for d in duel.differences}
    columns = ["指标 metric", names[0], *(cell for name in names[1:] for cell in (name, f"{name}: difference [95 %]"))]
    rows = [
        [metric, report.means[names[0]][metric]]
        + [cell for name in names[1:] for cell in (report.means[name][metric], _interval(first[name, metric]))]
        for metric in report.means[names[0]]
    ]
    return make_table(f"{report.title}: {_said(report.facts)}", columns, rows)


def _interval(d: Difference) -> str:
    return f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{' *' if d.sure else ''}"


def _check_apart(config: EvalConfig, folder: Path) -> None:
    """Make sure that no file of the report is one that is read."""
    written = [folder / name for name in (CONFIG_FILE, HTML_FILE, JSON_FILE, QRELS_FILE)]
    runs = _run_files(folder, labels(config.models, [BM25_NAME]))
    read = [config.data_path, config.queries_path, config.qrels_path, config.train_data_path, config.presets]
    corpus = files_of(config.corpus_path) if config.corpus_path else []
    check_apart([*written, *runs.values()], [*read, *corpus])


# --- writing ------------------------------------------------------------------------------------------------------


def _write(
    config: EvalConfig, folder: Path, task: RetrievalTask, contenders: Mapping[str, _Contender], report: Report
) -> dict[str, Path]:
    with written_whole(folder / HTML_FILE) as new:
        new.write_text(report.html(), encoding="utf-8")
    seconds = {name: round(c.seconds, 3) for name, c in contenders.items()}
    write_json(folder / JSON_FILE, {"config": config.to_dict(), "seconds": seconds} | asdict(report))
    config.save(folder / CONFIG_FILE)
    _write_lines(folder / QRELS_FILE, _qrel_lines(task))
    runs = _run_files(folder, contenders)
    for name, path in runs.items():
        _write_lines(path, _run_lines(task, contenders[name].ranking, _trec_ids([name])[0]))
    return runs


def _run_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / f"{name.replace('%', '%25').replace('/', '%2F')}{RUN_ENDING}" for name in names}


def _tell_of_other_runs(folder: Path, names: Iterable[str]) -> None:
    if others := sorted(set(folder.glob(f"*{RUN_ENDING}")) - set(_run_files(folder, names).values())):
        shown = ", ".join(path.name for path in others)
        logger.warning("%s: runs of an earlier evaluation stand there, too: %s", folder, shown)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with written_whole(path) as new, open(new, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def _trec_ids(ids: Sequence[str]) -> list[str]:
    """Ids as TREC's format can hold them: blanks become %20 and the like, all else stays as it is."""
    return [re.sub(r"[\s%]", lambda found: quote(found[0]), id_) for id_ in ids]


def _qrel_lines(task: RetrievalTask) -> Iterable[str]:
    queries, documents = _trec_ids(task.query_ids), _trec_ids(task.corpus.ids)
    for query, grades in zip(queries, task.relevant, strict=True):
        yield from (f"{query} 0 {documents[document]} {grade}" for document, grade in grades.items())


def _run_lines(task: RetrievalTask, ranking: Ranking, tag: str) -> Iterable[str]:
    queries, documents = _trec_ids(task.query_ids), _trec_ids(task.corpus.ids)
    for i, query in enumerate(queries):
        found = np.flatnonzero(ranking.ids[i] >= 0)
        for rank in found:
            yield f"{query} Q0 {documents[ranking.ids[i, rank]]} {rank + 1} {ranking.scores[i, rank]:.9g} {tag}"
