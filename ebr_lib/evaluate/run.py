"""Extension stage: measure rankers on the same queries, side by side, and what their differences are worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import combinations
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
from ebr_lib.evaluate.compare import Change, Difference, Verdict, bootstrap, changed_most, compare, verdict_on
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.corpus import Columns
from ebr_lib.evaluate.frontier import Frontier, draw_frontier, measure_sizes
from ebr_lib.evaluate.queries import IN_TRAINING, QUERIES_TABLE, UNSEEN, query_slices, query_table
from ebr_lib.evaluate.rankers import (
    BM25_NAME,
    PER_QUERY,
    How,
    check_texts,
    labels,
    rank_with_bm25,
    rank_with_model,
    stored_vectors,
)
from ebr_lib.evaluate.report import Document, Duel, Example, Report, Slice, counted
from ebr_lib.evaluate.sizes import halves
from ebr_lib.evaluate.steps import Step, StepResult, advice_on, fused, reranked
from ebr_lib.evaluate.task import RetrievalTask, find_sources, read_task
from ebr_lib.evaluate.trec import QRELS_FILE, run_files, warn_of_earlier_runs, write_qrels, write_run
from ebr_lib.extras import require
from ebr_lib.files import check_apart, make_folder, write_json, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.metrics import Ranking, Values, measure
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.contract import trained_dims
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import find_model, local_folder
from ebr_lib.model.provenance import identify
from ebr_lib.model.reranker import Scores, load_reranker
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, as_html, as_text, html_folded, html_page, html_verdict

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
    logger.info("评估 evaluation: %d 个查询, %d 篇文档 (%s)", len(task.queries), len(task.corpus), counted(facts))
    evaluation = _Evaluation(config, task)
    evaluation.measure()
    report = evaluation.report(facts)
    result = evaluation.write(folder, report)
    logger.info("%s", as_text(result.tables["measures"]), extra=RESULT)
    steps = [f"{step.name}: {step.sentence}" for step in report.steps]
    advice = [f"{name} 建议 recommended: {advice.sentence}" for name, advice in report.recommended.items()]
    sizes = [report.frontier.sentence] if report.frontier else []
    for line in [*verdict_lines(report.verdicts), *steps, *advice, *sizes]:
        logger.info("%s", line, extra=RESULT)
    logger.info("报告已保存 report: %s", result.report_html)
    return result


# --- before anything is ranked ------------------------------------------------------------------------------------


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


def _read_task(config: EvalConfig) -> tuple[RetrievalTask, dict[str, Any]]:
    """The task with its counts, and how many of its queries are in the training data, if that is given."""
    sources = find_sources(config.data_path, config.queries_path, config.corpus_path, config.qrels_path)
    columns = Columns(config.query_column, config.corpus_column, config.id_column, config.label_column)
    given = config.train_data_path
    pairs = [] if given is None else read_pairs(given, on_bad_row="skip", label_column=config.label_column)
    task = read_task(sources, columns, config.slice_columns, texts_of(expand(pairs)), config.leave_out_own)
    if given is None:
        return task, task.facts()
    trained = {normalised(text) for pair in pairs for text in (pair.anchor, *pair.positives)}
    leaked = sum(normalised(query) in trained for query in task.queries)
    if leaked:
        logger.warning(
            "泄漏 leak: %d of %d queries are in the training data; their values are too high", leaked, len(task.queries)
        )
    return task, task.facts() | {"queries_in_training": leaked}


class _Evaluation:
    """Rankers measured on a task, and what follows from it."""

    def __init__(self, config: EvalConfig, task: RetrievalTask) -> None:
        self.config, self.task = config, task
        names = labels(config.models, [BM25_NAME] if config.bm25 else [])
        self.models = dict(zip(names, config.models, strict=True))
        self.slices = query_slices(task)
        self.measured: dict[str, _Measured] = {}
        self.frontier: Frontier | None = None

    # --- ranking --------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Rank and measure: each model, then BM25, then what may come after a model, then sizes of the last model."""
        specs, reranker = self._check_rankers()
        vectors: list[Vectors] = []  # of the last model
        for name, (spec, is_stored) in specs.items():
            keep = vectors if self.config.frontier and name == list(specs)[-1] else None
            self._add(name, partial(rank_with_model, spec, self.task, is_stored, keep))
        if self.config.bm25:
            self._add(BM25_NAME, partial(rank_with_bm25, self.task))
        for step in list(self._steps(reranker)):
            values = measure(step.ranking, self.config.ks)
            how = {**step.adds.how, PER_QUERY: round(step.milliseconds, 2)}
            seconds = step.milliseconds * len(self.task.queries) / 1e3
            self.measured[step.name] = _Measured(step.ranking, values, seconds, how, step)
        if vectors:
            self.frontier = self._sizes(vectors[0], np.concatenate(vectors[1:]))

    def _add(self, name: str, rank: Callable[[], tuple[Ranking, How]]) -> None:
        start = time.perf_counter()
        ranking, how = rank()
        values = measure(ranking, self.config.ks)
        self.measured[name] = _Measured(ranking, values, time.perf_counter() - start, how)

    def _check_rankers(self) -> tuple[dict[str, tuple[EncoderSpec, bool]], Scores | None]:
        """Each model, and whether its document vectors are stored; and the reranker. Reports all rankers that cannot be
        measured at once, before any of them ranks."""
        config, corpus = self.config, self.task.corpus
        found: dict[str, tuple[EncoderSpec, bool]] = {}
        errors: list[UserError] = []
        compared = len(self.models) > 1  # with a model whose vectors are not rounded, perhaps
        for label, name in self.models.items():
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
                find_model(name)
                if compared:
                    spec.model("query")  # see that it loads
                found[label] = spec, stored_vectors(spec, corpus, exact=compared or config.frontier)
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
        return found, reranker

    def _steps(self, reranker: Scores | None) -> Iterator[Step]:
        config, bm25 = self.config, self.measured.get(BM25_NAME)
        for name in self.models:
            ranking = self.measured[name].ranking
            if bm25 and config.fusion:
                yield from fused(
                    name,
                    ranking,
                    bm25.ranking,
                    bm25_milliseconds=float(str(bm25.how[PER_QUERY])),
                    metric=config.primary_metric,
                    ks=config.ks,
                    seed=config.seed,
                )
            if reranker:
                where = str(config.reranker_name)  # absolute, if it is a folder: searches may run in another one
                where = str(Path(where).resolve()) if Path(where).is_dir() else where
                yield reranked(name, where, ranking, self.task, reranker, depth=config.rerank_depth)

    def _sizes(self, queries: Vectors, documents: Vectors) -> Frontier:
        """Sizes for serving the last model."""
        config, full = self.config, queries.shape[1]
        if large := [dim for dim in config.frontier_dims if dim > full]:
            logger.warning(
                "frontier_dims: 略过 left out: %s; the vectors have %d dimensions", ", ".join(map(str, large)), full
            )
        name, model = list(self.models.items())[-1]
        folder = local_folder(model)
        dims = config.frontier_dims or (folder and trained_dims(folder)) or halves(full)
        return measure_sizes(
            name,
            queries,
            documents,
            self.task.relevant,
            self.task.own,
            metric=config.primary_metric,
            dims=[dim for dim in dims if dim <= full],
            tolerance=config.frontier_tolerance,
            resamples=config.resamples,
            seed=config.seed,
        )

    # --- the report -----------------------------------------------------------------------------------------------

    def report(self, facts: Mapping[str, Any]) -> Report:
        """All that follows from the measured values."""
        config, measured, models = self.config, self.measured, list(self.models)
        # verdicts: each model against the first one, or a single model against BM25
        decided = [(models[0], other) for other in models[1:]] or [(BM25_NAME, name) for name in models if config.bm25]
        slices = self._slices(decided)
        unseen = next((s.changes for s in slices if (s.kind, s.value) == (IN_TRAINING, UNSEEN)), {})
        bm25 = measured[BM25_NAME].means() if config.bm25 and len(models) > 1 else None
        duels = [self._duel(*pair) for pair in decided]
        duels = [
            replace(duel, verdict=verdict_on(duel.differences[0], unseen.get(duel.contender), bm25)) for duel in duels
        ]
        alone = [BM25_NAME, *models] if config.bm25 else models  # all others are compared with BM25
        duels += [self._duel(*pair) for pair in combinations(alone, 2) if pair not in decided]
        steps = []
        for name, m in measured.items():
            if m.step:
                duels.append(self._duel(m.step.base, name))
                d = duels[-1].differences[0]
                steps.append(StepResult(name, m.step.base, m.step.adds, d, m.step.milliseconds))
        # `data_path` is not read if the queries have a path of their own
        places = (config.queries_path or config.data_path, config.corpus_path, config.qrels_path)
        return Report(
            title="Retrieval evaluation · 召回评估",
            primary=config.primary_metric,
            facts=facts,
            means={name: m.means() for name, m in measured.items()},
            duels=duels,
            steps=steps,
            slices=slices,
            measured={
                "data": ", ".join(filter(None, places)),
                "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            },
            how={name: m.how for name, m in measured.items()},
            recommended={
                base: advice_on([s for s in steps if s.base == base]) for base in dict.fromkeys(s.base for s in steps)
            },
            frontier=self.frontier,
        )

    def _slices(self, decided: Sequence[tuple[str, str]]) -> list[Slice]:
        values = {name: m.values[self.config.primary_metric] for name, m in self.measured.items()}
        return [
            Slice(
                kind,
                value,
                queries=int(mask.sum()),
                means={name: m.means(mask) for name, m in self.measured.items()},
                changes={b: self._change((values[b] - values[a])[mask]) for a, b in decided},
            )
            for kind, groups in self.slices.items()
            for value in groups.categories
            for mask in [groups == value]
        ]

    def _change(self, deltas: Values) -> Change:
        if len(deltas) < FEWEST:
            return Change(float(deltas.mean()), None, None)
        low, high = bootstrap(deltas[:, None], self.config.resamples, np.random.default_rng([self.config.seed, 0]))
        return Change(float(deltas.mean()), float(low[0]), float(high[0]))

    def _duel(self, baseline: str, other: str) -> Duel:
        config, before, after = self.config, self.measured[baseline], self.measured[other]
        metric = config.primary_metric
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
            [self._example(query, before, after) for query in queries]
            for queries in changed_most(before.values[metric], after.values[metric], config.examples)
        )
        return Duel(baseline, other, metric, differences, won, lost)

    def _example(self, query: int, before: _Measured, after: _Measured) -> Example:
        task, metric = self.task, self.config.primary_metric
        relevant = sorted(document for document, grade in task.relevant[query].items() if grade > 0)

        def shown(documents: Sequence[int]) -> list[Document]:
            best = [d for d in documents[:SHOWN_DOCUMENTS] if d >= 0]
            return [Document(task.corpus.ids[d], *task.corpus.shown(d), d in relevant) for d in best]

        return Example(
            id=task.query_ids[query],
            query=task.queries[query],
            before=float(before.values[metric][query]),
            after=float(after.values[metric][query]),
            wanted=shown(relevant),
            retrieved_before=shown(before.ranking.ids[query].tolist()),
            retrieved_after=shown(after.ranking.ids[query].tolist()),
        )

    def write(self, folder: Path, report: Report) -> EvalResult:
        """Write all files."""
        config, task, metric = self.config, self.task, self.config.primary_metric
        warn_of_earlier_runs(folder, self.measured)
        with written_whole(folder / HTML_FILE) as new:
            new.write_text(report.html(), encoding="utf-8")
        seconds = {name: round(m.seconds, 3) for name, m in self.measured.items()}
        found = {"config": config.to_dict(), "seconds": seconds} | asdict(report)
        found[ADVICE] = {
            name: advice.as_json(identify(self.models[name]).sha256) for name, advice in report.recommended.items()
        }
        (folder / PICTURE_FILE).unlink(missing_ok=True)  # of an earlier evaluation
        if report.frontier:
            found["frontier"]["sentence"] = report.frontier.sentence
            draw_frontier(folder / PICTURE_FILE, report.frontier)
        write_json(folder / REPORT_FILE, found)
        config.save(folder / CONFIG_FILE)
        write_qrels(folder / QRELS_FILE, task)
        runs = run_files(folder, self.measured)
        for name, path in runs.items():
            write_run(path, task, self.measured[name].ranking, name)
        values = {name: m.values[metric] for name, m in self.measured.items()}
        rankings = {name: m.ranking for name, m in self.measured.items()}
        queries = query_table(task, self.slices, metric, values, rankings)
        with written_whole(folder / QUERIES_TABLE) as new:
            # with a byte-order mark, without which Excel misreads Chinese
            queries.to_csv(new, index=False, encoding="utf-8-sig")
        differences = tuple(d for duel in report.duels for d in duel.differences)
        tables = {
            "measures": report.measures_table(),
            "differences": DataFrame(map(asdict, differences)),
            "steps": report.steps_table(),
            "queries": queries,
        }
        if report.frontier:
            tables["frontier"] = report.frontier.table()
        return EvalResult(
            report_html=folder / HTML_FILE,
            report_json=folder / REPORT_FILE,
            queries_csv=folder / QUERIES_TABLE,
            runs=runs,
            qrels=folder / QRELS_FILE,
            verdicts=report.verdicts,
            metrics={name: dict(means) for name, means in report.means.items()},
            differences=differences,
            recommended=dict(report.recommended),
            facts=dict(report.facts),
            tables=tables,
            frontier=report.frontier,
        )
