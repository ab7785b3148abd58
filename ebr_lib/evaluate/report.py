"""What an evaluation found, as tables and as the page that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ebr_lib.data.advice import Advice
from ebr_lib.evaluate.compare import Change, Difference, Verdict, shown_metric
from ebr_lib.evaluate.frontier import Frontier
from ebr_lib.evaluate.rankers import PER_QUERY, How
from ebr_lib.evaluate.steps import StepResult
from ebr_lib.tables import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

Means = Mapping[str, Mapping[str, float]]
"""Ranker to measure to mean."""


class Document(NamedTuple):
    """A document for people. `title` is empty if it has none; `is_hit`: it is an answer."""

    id: str
    title: str
    text: str
    is_hit: bool


@dataclass(frozen=True)
class Example:
    """A query whose value changed, and what each ranker retrieved for it."""

    id: str
    query: str
    before: float
    after: float
    wanted: Sequence[Document]
    retrieved_before: Sequence[Document]
    retrieved_after: Sequence[Document]


@dataclass(frozen=True)
class Duel:
    """One ranker against another: a difference per measure, and the queries won and lost by most in `metric`.

    Without a `verdict` it is a side note: two contenders, or one against BM25.
    """

    baseline: str
    contender: str
    metric: str
    differences: Sequence[Difference]
    won: Sequence[Example]
    lost: Sequence[Example]
    verdict: Verdict | None = None

    @property
    def distinct(self) -> list[Difference]:
        """The differences, without measures that repeat another one."""
        return [d for d in self.differences if d.same_as is None]

    @property
    def repeated(self) -> list[str]:
        """The measures that repeat another one, such as `hit@1 = recall@1`."""
        return [f"{d.metric} = {d.same_as}" for d in self.differences if d.same_as]

    @property
    def reach(self) -> float:
        """The end of an interval that is farthest from 0: the scale of the drawings."""
        return max([abs(end) for d in self.differences for end in (d.low, d.high)] + [1e-9])


@dataclass(frozen=True)
class Slice:
    """Queries with one value in common: how many there are, each ranker's means, and by contender of a verdict the
    change of the measure that decides."""

    kind: str
    value: str
    queries: int
    means: Means
    changes: Mapping[str, Change]


def counted(facts: Mapping[str, Any]) -> str:
    """The counts that are not 0."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value)


@dataclass(frozen=True)
class Report:
    """All that an evaluation found. `primary`: the measure that decides; `measured`: on which data and when; `how`: the
    settings of each ranker; `recommended`: what to put after each model; `frontier`: sizes for serving, if they were
    measured."""

    title: str
    primary: str
    facts: Mapping[str, Any]
    means: Means
    duels: Sequence[Duel]
    steps: Sequence[StepResult]
    slices: Sequence[Slice]
    measured: Mapping[str, str]
    how: Mapping[str, How]
    recommended: Mapping[str, Advice]
    frontier: Frontier | None = None

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By the names of a pair, contender first."""
        return {f"{d.contender} 对 against {d.baseline}": d.verdict for d in self.duels if d.verdict}

    def measures_table(self) -> DataFrame:
        """Means of all rankers, the measure that decides first; beside a contender's, its difference from the baseline.

        Steps after a model have a table of their own, and measures that repeat another one in every duel are left out.
        """
        distinct = {d.metric for duel in self.duels for d in duel.distinct}
        names = dict.fromkeys([self.primary, *next(iter(self.means.values()))])
        shown = [name for name in names if name in distinct or not self.duels]
        columns: dict[str, Iterable[Any]] = {"指标 metric": shown}
        decided = {duel.contender: duel for duel in self.duels if duel.verdict}
        steps = {step.name for step in self.steps}
        for ranker, means in self.means.items():
            if ranker not in steps:
                columns[ranker] = [means[name] for name in shown]
            if ranker in decided:
                columns[f"{ranker}: difference [95 %]"] = [
                    f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{' *' if d.significant else ''}"
                    for d in decided[ranker].differences
                    if d.metric in shown
                ]
        return make_table(f"{self.title}: {counted(self.facts)}", list(columns), zip(*columns.values(), strict=True))

    def steps_table(self) -> DataFrame:
        """What each step after a model brings on the measure that decides, and what it costs."""
        names = ["步骤 step", "模型 of", "before", "after", "difference [95 %]", PER_QUERY]
        rows = [
            (step.name, step.base, d.before, d.after, f"{d.change}{' *' if d.significant else ''}",
             round(step.milliseconds, 2))
            for step in self.steps
            for d in [step.difference]
        ]  # fmt: skip
        return make_table(f"融合与重排 fusion and reranking: {shown_metric(self.primary)}", names, rows)

    def html(self) -> str:
        """One HTML page without outside parts."""
        from jinja2 import Environment, PackageLoader

        pages = Environment(
            loader=PackageLoader("ebr_lib", "evaluate"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return pages.get_template("report.html.j2").render(report=self, shown_metric=shown_metric)
