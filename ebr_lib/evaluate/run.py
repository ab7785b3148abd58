"""Extension stage: measure rankers on the same queries, side by side, and what their differences are worth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from ebr_lib.arrays import Vectors
from ebr_lib.data.advice import ADVICE, REPORT_FILE, Advice
from ebr_lib.data.embeddings.files import files_of
from ebr_lib.data.pairs import expand, read_pairs, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.errors import MissingError, ModelError, UserError
from ebr_lib.evaluate.columns import Columns
from ebr_lib.evaluate.compare import Difference, bootstrap, changed_most, compare
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.frontier import Frontier, draw_frontier, measure_sizes
from ebr_lib.evaluate.per_query import QUERIES_TABLE, query_table, write_query_table
from ebr_lib.evaluate.rankers import (
    BM25_NAME,
    PER_QUERY,
    How,
    check_model,
    check_texts,
    labels,
    rank_with_bm25,
    rank_with_model,
)
from ebr_lib.evaluate.report import Document, Duel, Example, Report, Slice
from ebr_lib.evaluate.sizes import halves
from ebr_lib.evaluate.slices import IN_TRAINING, UNSEEN, Slices, query_slices
from ebr_lib.evaluate.steps import Step, StepResult, advice_on, fused, reranked
from ebr_lib.evaluate.task import RetrievalTask, find_sources, read_task
from ebr_lib.evaluate.trec import QRELS_FILE, run_files, warn_of_earlier_runs, write_qrels, write_run
from ebr_lib.evaluate.verdict import Change, Verdict, shown_metric, verdict_on
from ebr_lib.extras import require
from ebr_lib.files import check_apart, make_folder, write_json, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.metrics import Ranking, Values, measure
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.contract import trained_dims
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import local_folder
from ebr_lib.model.provenance import identify
from ebr_lib.model.reranker import Scores, load_reranker
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, as_html, as_text, html_folded, html_page, html_verdict, make_table

FEWEST = 10  # queries of a slice for which an interval is given
SHOWN_DOCUMENTS = 5  # of a query's relevant and retrieved documents in an example
CONFIG_FILE, HTML_FILE, PICTURE_FILE = "eval_config.yaml", "report.html", "frontier.png"


@dataclass(frozen=True, repr=False)
class EvalResult(TableRepr):
    """What an evaluation wrote and found.

    `verdicts` say which models are better; `metrics` maps ranker to measure to mean; `differences` has all compared
    pairs of rankers on every measure; `recommended` says what to put after each model. `tables` has `measures`, the
    means with the differences from the first ranker, `differences`, `steps`, what fusion and reranking bring and cost,
    `queries`: one row per query, as in `queries_csv`, and with `frontier`, sizes for serving, all that were measured.
    """

    report_html: Path
    report_json: Path
    queries_csv: Path
    runs: dict[str, Path]
    qrels: Path
    verdicts: dict[str, Verdict]
    metrics: dict[str, dict[str, float]]
    differences: tuple[Difference, ...]
    recommended: dict[str, Advice]
    facts: dict[str, Any]
    tables: dict[str, DataFrame] = field(compare=False)
    frontier: Frontier | None = None

    def __repr__(self) -> str:
        sizes = [self.frontier.sentence] if self.frontier else []
        return "\n".join([*verdict_lines(self.verdicts), *sizes, super().__repr__()])

    def _repr_html_(self) -> str:
        verdicts = [html_verdict(verdict.sentence, verdict.notes, of) for of, verdict in self.verdicts.items()]
        measures = self.tables["measures"]
        rest = f"<details><summary>全部指标 all measures</summary>{as_html(measures)}</details>"
        if len(self.tables["steps"]):
            rest += (
                f"<details><summary>融合与重排 fusion and reranking</summary>{as_html(self.tables['steps'])}</details>"
            )
        if self.frontier:
            rest += html_verdict(self.frontier.sentence, of=f"体积与速度 sizes for serving: {self.frontier.model}")
            rest += html_folded([self.tables["frontier"]], "各种体积 all sizes")
        first = measures.head(1)
        first.attrs["title"] = ""
        return "".join([*verdicts, as_html(first), rest, html_page(self.report_html, "报告 report")])


def verdict_lines(verdicts: Mapping[str, Verdict]) -> list[str]:
    """The verdicts for a terminal: a sentence per pair, and the notes below it."""
    return [
        line
        for pair, verdict in verdicts.items()
        for line in (f"{pair}: {verdict.sentence}", *(f"  ! {note}" for note in verdict.notes))
    ]


@dataclass(frozen=True)
class _Measured:
    """How one ranker did: every measure has one value per query."""

    ranking: Ranking
    values: dict[str, Values]
    seconds: float
    how: How
    step: Step | None = None  # None: a ranker by itself

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
    look_for_models(config.base_model_path, config.hub)
    _check_remote_code(config)
    folder = make_folder(Path(config.output_dir))
    _check_apart(config, folder)
    task, facts = _read_task(config)
    logger.info("评估 evaluation: %d 个查询, %d 篇文档 (%s)", len(task.queries), len(task.corpus), _listed(facts))
    kept: list[Vectors] | None = [] if config.frontier else None
    measured = _rank(config, task, kept)
    frontier = _frontier(config, task, kept) if kept else None
    warn_of_earlier_runs(folder, measured)
    slices = query_slices(task)
    report = replace(_report(config, task, measured, facts, slices), frontier=frontier)
    values = {name: m.values[config.primary_metric] for name, m in measured.items()}
    rankings = {name: m.ranking for name, m in measured.items()}
    queries = query_table(task, slices, config.primary_metric, values, rankings)
    runs = _write(config, folder, task, measured, report)
    write_query_table(folder / QUERIES_TABLE, queries)
    differences = tuple(d for duel in report.duels for d in duel.differences)
    verdicts = {f"{d.contender} 对 against {d.baseline}": d.verdict for d in report.duels if d.verdict}
    tables = {
        "measures": _measures_table(report),
        "differences": DataFrame(map(asdict, differences)),
        "steps": _steps_table(report),
        "queries": queries,
    }
    if frontier:
        tables["frontier"] = frontier.table()
    logger.info("%s", as_text(tables["measures"]), extra=RESULT)
    steps = [f"{step.name}: {step.sentence}" for step in report.steps]
    advice = [f"{name} 建议 recommended: {advice.sentence}" for name, advice in report.recommended.items()]
    for line in [*verdict_lines(verdicts), *steps, *advice, *([frontier.sentence] if frontier else [])]:
        logger.info("%s", line, extra=RESULT)
    logger.info("报告已保存 report: %s", folder / HTML_FILE)
    return EvalResult(
        report_html=folder / HTML_FILE,
        report_json=folder / REPORT_FILE,
        queries_csv=folder / QUERIES_TABLE,
        runs=runs,
        qrels=folder / QRELS_FILE,
        verdicts=verdicts,
        metrics={name: dict(means) for name, means in report.means.items()},
        differences=differences,
        recommended=dict(report.recommended),
        facts=facts,
        tables=tables,
        frontier=frontier,
    )


def _check_remote_code(config: EvalConfig) -> None:
    """Refuse, before the data is read, models with code of their own that nobody has decided about."""
    errors: list[UserError] = []
    for name in config.models:
        try:
            check_remote_code(name, config.trust_remote_code)
        except ModelError as error:
            errors.append(error)
        except MissingError:
            pass  # reported with what else is wrong, once the data is known
    _raise_all(errors)


def _raise_all(errors: list[UserError]) -> None:
    """Raise several errors as one."""
    if errors:
        raise errors[0] if len(errors) == 1 else type(errors[0])("\n".join(map(str, errors)))


def _check_apart(config: EvalConfig, folder: Path) -> None:
    """Make sure that no file of the report is one that is read."""
    written = [folder / name for name in (CONFIG_FILE, HTML_FILE, REPORT_FILE, PICTURE_FILE, QUERIES_TABLE, QRELS_FILE)]
    runs = run_files(folder, labels(config.models, [BM25_NAME]))
    read = [config.data_path, config.queries_path, config.qrels_path, config.train_data_path, config.presets]
    corpus = files_of(config.corpus_path) if config.corpus_path else []
    check_apart([*written, *runs.values()], [*read, *corpus])


def _listed(facts: Mapping[str, Any]) -> str:
    """Counts that are not 0."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value)


# --- reading and ranking ------------------------------------------------------------------------------------------


def _read_task(config: EvalConfig) -> tuple[RetrievalTask, dict[str, Any]]:
    """The task with its counts, and how many of its queries are in the training data, if that is given."""
    sources = find_sources(config.data_path, config.queries_path, config.corpus_path, config.qrels_path)
    columns = Columns(config.query_column, config.corpus_column, config.id_column, config.label_column)
    if config.train_data_path is None:
        task = read_task(sources, columns, config.slice_columns, set(), config.leave_out_own)
        return task, task.facts()
    pairs = read_pairs(config.train_data_path, on_bad_row="skip", label_column=config.label_column)
    task = read_task(sources, columns, config.slice_columns, texts_of(expand(pairs)), config.leave_out_own)
    trained = {normalised(text) for pair in pairs for text in (pair.anchor, *pair.positives)}
    leaked = sum(normalised(query) in trained for query in task.queries)
    if leaked:
        logger.warning(
            "泄漏 leak: %d of %d queries are in the training data; their values are too high", leaked, len(task.queries)
        )
    return task, task.facts() | {"queries_in_training": leaked}


def _rank(config: EvalConfig, task: RetrievalTask, keep: list[Vectors] | None) -> dict[str, _Measured]:
    """Rank and measure: each model, then BM25, then what may come after a model.

    :param keep: takes the vectors of the last model.
    """
    stored, reranker = _check_rankers(config, task.corpus)
    names = _labels(config)
    rankers = {
        name: partial(rank_with_model, spec, task, is_stored)
        for name, (spec, is_stored) in zip(names, stored.items(), strict=True)
    }
    if keep is not None:
        rankers[names[-1]] = partial(rankers[names[-1]], keep=keep)
    if config.bm25:
        rankers[BM25_NAME] = partial(rank_with_bm25, task)
    measured = {}
    for name, rank in rankers.items():
        start = time.perf_counter()
        ranking, how = rank()
        values = measure(ranking, config.ks)
        measured[name] = _Measured(ranking, values, time.perf_counter() - start, how)
    for step in list(_steps(config, task, measured, reranker)):
        how = {**step.adds.how, PER_QUERY: round(step.milliseconds, 2)}
        seconds = step.milliseconds * len(task.queries) / 1e3
        measured[step.name] = _Measured(step.ranking, measure(step.ranking, config.ks), seconds, how, step)
    return measured


def _labels(config: EvalConfig) -> list[str]:
    return labels(config.models, [BM25_NAME] if config.bm25 else [])


def _frontier(config: EvalConfig, task: RetrievalTask, kept: Sequence[Vectors]) -> Frontier:
    """Sizes for serving the last model, whose vectors were kept: the queries', then the documents' in batches."""
    queries, documents = kept[0], np.concatenate(kept[1:])
    full = queries.shape[1]
    if large := [dim for dim in config.frontier_dims if dim > full]:
        logger.warning(
            "frontier_dims: 略过 left out: %s; the vectors have %d dimensions", ", ".join(map(str, large)), full
        )
    dims = config.frontier_dims or _trained_dims(config.models[-1]) or halves(full)
    return measure_sizes(
        _labels(config)[-1],
        queries,
        documents,
        task.relevant,
        task.own,
        metric=config.primary_metric,
        dims=[dim for dim in dims if dim <= full],
        tolerance=config.frontier_tolerance,
        resamples=config.resamples,
        seed=config.seed,
    )


def _trained_dims(model: str) -> Sequence[int]:
    folder = local_folder(model)
    return trained_dims(folder) if folder else ()


def _steps(
    config: EvalConfig, task: RetrievalTask, measured: Mapping[str, _Measured], reranker: Scores | None
) -> Iterator[Step]:
    bm25 = measured.get(BM25_NAME)
    for name in [name for name in measured if name != BM25_NAME]:
        if bm25 and config.fusion:
            yield from fused(
                name,
                measured[name].ranking,
                bm25.ranking,
                bm25_milliseconds=float(str(bm25.how[PER_QUERY])),
                metric=config.primary_metric,
                ks=config.ks,
                seed=config.seed,
            )
        if reranker:
            yield reranked(
                name, config.reranker_name or "", measured[name].ranking, task, reranker, depth=config.rerank_depth
            )


def _check_rankers(config: EvalConfig, corpus: Corpus) -> tuple[dict[EncoderSpec, bool], Scores | None]:
    """For each model, whether its document vectors are stored; and the reranker. Reports all rankers that cannot be
    measured at once, before any of them ranks."""
    stored: dict[EncoderSpec, bool] = {}
    errors: list[UserError] = []
    for name in config.models:
        spec = EncoderSpec(
            model_name=name,
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
        try:
            compared = len(config.models) > 1  # with a model whose vectors are not rounded, perhaps
            exact = compared or config.frontier
            stored[spec] = check_model(spec, corpus, load=compared, exact=exact)
        except UserError as error:
            errors.append(error)
    reranker = None
    try:
        if config.frontier:
            require("index")
        if config.bm25:
            check_texts(corpus, "BM25", "set bm25 to false")
        if config.reranker_name:
            check_texts(corpus, "a reranker", "leave reranker_name out")
            reranker = load_reranker(
                config.reranker_name, trust_remote_code=config.trust_remote_code, device=config.device
            )
    except UserError as error:
        errors.append(error)
    _raise_all(errors)
    return stored, reranker


# --- the report ---------------------------------------------------------------------------------------------------


def _report(
    config: EvalConfig,
    task: RetrievalTask,
    measured: Mapping[str, _Measured],
    facts: Mapping[str, Any],
    slices: Slices,
) -> Report:
    # `data_path` is not read if the queries have a path of their own
    places = (config.queries_path or config.data_path, config.corpus_path, config.qrels_path)
    alone = [name for name, m in measured.items() if m.step is None]
    decided = _decided(alone)
    compared = _slices(config, decided, measured, slices)
    unseen = next((s for s in compared if (s.kind, s.value) == (IN_TRAINING, UNSEEN)), None)
    bm25 = measured[BM25_NAME].means() if BM25_NAME in alone and len(alone) > 2 else None
    after_models = [(m.step.base, name) for name, m in measured.items() if m.step]
    pairs = [*decided, *_side_notes(alone, decided), *after_models]
    duels = [_duel(config, task, a, b, measured) for a, b in pairs]
    for i, duel in enumerate(duels[: len(decided)]):
        verdict = verdict_on(duel.differences[0], unseen.changes[duel.contender] if unseen else None, bm25)
        duels[i] = replace(duel, verdict=verdict)
    steps = [
        StepResult(duel.contender, duel.baseline, step.adds, duel.differences[0], step.milliseconds)
        for duel in duels
        if (step := measured[duel.contender].step)
    ]
    return Report(
        title="Retrieval evaluation · 召回评估",
        primary=config.primary_metric,
        facts=facts,
        means={name: m.means() for name, m in measured.items()},
        duels=duels,
        steps=steps,
        slices=compared,
        measured={
            "data": ", ".join(filter(None, places)),
            "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        },
        how={name: m.how for name, m in measured.items()},
        recommended={
            base: advice_on(s for s in steps if s.base == base) for base in dict.fromkeys(s.base for s in steps)
        },
    )


def _decided(measured: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs that get a verdict: each model against the first one, or a single model against BM25."""
    first, *others = names = [name for name in measured if name != BM25_NAME] or [BM25_NAME]
    pairs = [(first, other) for other in others]
    return pairs or [(BM25_NAME, name) for name in names if BM25_NAME in measured and name != BM25_NAME]


def _side_notes(measured: Iterable[str], decided: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The other pairs; BM25 is the one that is compared with."""
    names = sorted(measured, key=lambda name: name != BM25_NAME)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [pair for pair in pairs if pair not in decided]


def _slices(
    config: EvalConfig, decided: Sequence[tuple[str, str]], measured: Mapping[str, _Measured], slices: Slices
) -> list[Slice]:
    values = {name: m.values[config.primary_metric] for name, m in measured.items()}
    return [
        Slice(
            kind,
            value,
            queries=int(mask.sum()),
            means={name: m.means(mask) for name, m in measured.items()},
            changes={b: _change((values[b] - values[a])[mask], config) for a, b in decided},
        )
        for kind, groups in slices.items()
        for value, mask in groups.items()
    ]


def _change(deltas: Values, config: EvalConfig) -> Change:
    if len(deltas) < FEWEST:
        return Change(float(deltas.mean()), None, None)
    low, high = bootstrap(deltas[:, None], config.resamples, np.random.default_rng([config.seed, 0]))
    return Change(float(deltas.mean()), float(low[0]), float(high[0]))


def _duel(
    config: EvalConfig, task: RetrievalTask, baseline: str, other: str, measured: Mapping[str, _Measured]
) -> Duel:
    before, after, metric = measured[baseline], measured[other], config.primary_metric
    differences = compare(
        baseline,
        other,
        before.values,
        after.values,
        primary=metric,
        resamples=config.resamples,
        seed=config.seed,
    )
    won, lost = (
        [_example(task, query, before, after, metric) for query in queries]
        for queries in changed_most(before.values[metric], after.values[metric], config.examples)
    )
    return Duel(baseline, other, metric, differences, won, lost)


def _example(task: RetrievalTask, query: int, before: _Measured, after: _Measured, metric: str) -> Example:
    relevant = {document for document, grade in task.relevant[query].items() if grade > 0}

    def shown(documents: Iterable[int]) -> list[Document]:
        return [Document(task.corpus.ids[d], *task.corpus.shown(d), d in relevant) for d in documents]

    def retrieved(ranking: Ranking) -> list[Document]:
        return shown(int(d) for d in ranking.ids[query, :SHOWN_DOCUMENTS] if d >= 0)

    return Example(
        id=task.query_ids[query],
        query=task.queries[query],
        before=float(before.values[metric][query]),
        after=float(after.values[metric][query]),
        wanted=shown(sorted(relevant)[:SHOWN_DOCUMENTS]),
        retrieved_before=retrieved(before.ranking),
        retrieved_after=retrieved(after.ranking),
    )


def _measures_table(report: Report) -> DataFrame:
    """Means of all rankers, the measure that decides first; beside a contender's, its difference from the baseline."""
    of = {duel.contender: duel for duel in report.duels if duel.verdict}
    same = [{d.metric for d in duel.differences if d.same_as} for duel in report.duels]
    repeated = set.intersection(*same) if same else set()
    names = [report.primary, *next(iter(report.means.values()))]
    names = [name for name in dict.fromkeys(names) if name not in repeated]
    columns: dict[str, Iterable[Any]] = {"指标 metric": names}
    steps = {step.name for step in report.steps}
    for ranker, means in report.means.items():
        if ranker in steps:
            continue
        columns[ranker] = [means[name] for name in names]
        if ranker in of:
            found = {d.metric: d for d in of[ranker].differences}
            columns[f"{ranker}: difference [95 %]"] = [
                f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{' *' if d.significant else ''}"
                for d in map(found.__getitem__, names)
            ]
    rows = zip(*columns.values(), strict=True)
    return make_table(f"{report.title}: {_listed(report.facts)}", list(columns), rows)


def _steps_table(report: Report) -> DataFrame:
    """What each step after a model brings on the measure that decides, and what it costs."""
    names = ["步骤 step", "模型 of", "before", "after", "difference [95 %]", PER_QUERY]
    rows = [
        (
            step.name,
            step.base,
            step.difference.before,
            step.difference.after,
            f"{step.change}{' *' if step.difference.significant else ''}",
            round(step.milliseconds, 2),
        )
        for step in report.steps
    ]
    return make_table(f"融合与重排 fusion and reranking: {shown_metric(report.primary)}", names, rows)


def _write(
    config: EvalConfig, folder: Path, task: RetrievalTask, measured: Mapping[str, _Measured], report: Report
) -> dict[str, Path]:
    with written_whole(folder / HTML_FILE) as new:
        new.write_text(report.html(), encoding="utf-8")
    seconds = {name: round(m.seconds, 3) for name, m in measured.items()}
    names = _labels(config)
    models = dict(zip(names, config.models, strict=True))
    advice = {name: found.as_json(identify(models[name]).sha256) for name, found in report.recommended.items()}
    found = {"config": config.to_dict(), "seconds": seconds} | asdict(report) | {ADVICE: advice}
    if report.frontier:
        found["frontier"]["sentence"] = report.frontier.sentence
    write_json(folder / REPORT_FILE, found)
    config.save(folder / CONFIG_FILE)
    (folder / PICTURE_FILE).unlink(missing_ok=True)  # of an earlier evaluation
    if report.frontier:
        draw_frontier(folder / PICTURE_FILE, report.frontier)
    write_qrels(folder / QRELS_FILE, task)
    runs = run_files(folder, measured)
    for name, path in runs.items():
        write_run(path, task, measured[name].ranking, name)
    return runs
