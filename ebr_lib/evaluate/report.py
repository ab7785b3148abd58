"""What an evaluation found, and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ebr_lib.data.advice import Advice
from ebr_lib.evaluate.compare import Difference
from ebr_lib.evaluate.frontier import Frontier
from ebr_lib.evaluate.steps import StepResult
from ebr_lib.evaluate.verdict import Change, Verdict, shown_metric

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
    how: Mapping[str, Mapping[str, object]]
    recommended: Mapping[str, Advice]
    frontier: Frontier | None = None

    def html(self) -> str:
        """One HTML page without outside parts."""
        from jinja2 import Environment, PackageLoader

        pages = Environment(
            loader=PackageLoader("ebr_lib", "evaluate"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return pages.get_template("report.html.j2").render(report=self, shown_metric=shown_metric)
