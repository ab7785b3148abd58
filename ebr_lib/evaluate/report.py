"""What an evaluation found, and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebr_lib.evaluate.compare import Difference

Means = Mapping[str, Mapping[str, float]]
"""Ranker to measure to mean."""


@dataclass(frozen=True)
class Example:
    """A query whose value changed, and what each ranker retrieved for it: texts, and whether they are relevant."""

    query: str
    before: float
    after: float
    wanted: Sequence[str]
    retrieved_before: Sequence[tuple[str, bool]]
    retrieved_after: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Duel:
    """One ranker against another: a difference per measure, and the queries won and lost by most in `metric`."""

    baseline: str
    contender: str
    metric: str
    differences: Sequence[Difference]
    won: Sequence[Example]
    lost: Sequence[Example]

    @property
    def reach(self) -> float:
        """The end of an interval that is farthest from 0: the scale of the drawings."""
        return max([abs(end) for d in self.differences for end in (d.low, d.high)] + [1e-9])


@dataclass(frozen=True)
class Slice:
    """Queries with one value in common: how many there are, and each ranker's means."""

    kind: str
    value: str
    queries: int
    means: Means


@dataclass(frozen=True)
class Report:
    """All that an evaluation found. `measured`: on which data and when; `how`: the settings of each ranker."""

    title: str
    facts: Mapping[str, Any]
    means: Means
    duels: Sequence[Duel]
    slices: Sequence[Slice]
    slice_metrics: Sequence[str]
    measured: Mapping[str, str]
    how: Mapping[str, Mapping[str, object]]

    def html(self) -> str:
        """One HTML page without outside parts."""
        from jinja2 import Environment, PackageLoader

        pages = Environment(
            loader=PackageLoader("ebr_lib", "evaluate"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return pages.get_template("report.html.j2").render(report=self)
