"""How small and how fast vectors can be served before the measure that decides falls: a table, a picture, a choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.faiss_library import load_faiss
from ebr_lib.evaluate.compare import Change, bootstrap, shown_metric
from ebr_lib.evaluate.sizes import PRECISIONS, Search, Size, kinds_for, milliseconds, sizes
from ebr_lib.metrics import BLOCK, KS, Grades, Ranking, Values, measure
from ebr_lib.tables import make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SAME_SCORE = 1e-6  # scores this close are a tie
SAME_MEAN = 5e-4  # a mean that is higher by less is not better


@dataclass(frozen=True)
class Row:
    """A size, measured. `recall`: share of the k best documents of exact float32 search that it finds. `mean` is of the
    measure that decides, `change` the difference from exact float32, with its 95 % interval. `milliseconds`: median of
    one query in one thread, without encoding it."""

    size: Size
    recall: float
    mean: float
    change: Change
    milliseconds: float


@dataclass(frozen=True)
class Frontier:
    """Sizes measured on the same queries, exact float32 first. `recommended` is the smallest whose loss of `metric` is,
    with its interval, below the tolerance."""

    model: str
    metric: str
    documents: int
    queries: int
    tolerance: float
    rows: Sequence[Row]
    recommended: Row

    @property
    def sentence(self) -> str:
        """What to serve, in one sentence."""
        row, first = self.recommended, self.rows[0]
        size = f"{row.size.bytes:,.0f} bytes per vector, {row.milliseconds:.2f} ms per query"
        if row is first:
            return (
                f"保持 keep {row.size.name}: {size}; 更小的方案都不能确保损失小于 {self.tolerance:g} no smaller size "
                f"is sure to lose less than {self.tolerance:g} of {shown_metric(self.metric)} on {self.queries} queries"
            )
        return (
            f"建议 use {row.size.name}: {size} (float32: {first.size.bytes:,.0f} bytes, {first.milliseconds:.2f} ms); "
            f"{shown_metric(self.metric)} {first.mean:.3f} → {row.mean:.3f}, {row.change}, {row.recall:.3f} "
            f"of the exact results; 损失小于 {self.tolerance:g} loses less than {self.tolerance:g}"
        )

    @property
    def best(self) -> list[Row]:
        """The rows that no other one beats in bytes and in the measure, smallest first."""
        found: list[Row] = []
        for row in sorted(self.rows, key=lambda row: (row.size.bytes, -row.mean)):
            if not found or row.mean > found[-1].mean + SAME_MEAN:
                found.append(row)
        return found

    def table(self) -> DataFrame:
        """A line per size, smallest first."""
        k = self.metric.rpartition("@")[2]
        names = ["", "dimensions", "precision", "index", "effort", "bytes", "ms per query", f"recall@{k} of exact"]
        rows = [
            (
                "→" if row is self.recommended else "",
                row.size.dimensions,
                row.size.precision,
                row.size.kind,
                row.size.effort or "all",
                round(row.size.bytes),
                round(row.milliseconds, 3),
                round(row.recall, 3),
                round(row.mean, 3),
                str(row.change),
            )
            for row in sorted(self.rows, key=lambda row: row.size.bytes)
        ]
        title = f"体积与速度 sizes for serving: {self.model}, {self.documents:,} documents, {self.queries:,} queries"
        return make_table(title, [*names, shown_metric(self.metric), "difference [95 %]"], rows)


def measure_sizes(
    model: str,
    queries: Vectors,
    documents: Vectors,
    relevant: Grades,
    own: Sequence[Collection[int]],
    *,
    metric: str,
    dims: Sequence[int],
    tolerance: float,
    resamples: int,
    seed: int,
) -> Frontier:
    """Measure every size on a task's queries.

    :param queries: float32 unit vectors, queries × dimensions; `documents` likewise.
    :param own: for each query, documents that it must not find; empty if there are none.
    :param metric: the measure that decides; its k is how many documents are searched for.
    :param dims: dimensions to cut to, beside all.
    """
    from tqdm.auto import tqdm

    k, full = int(metric.rpartition("@")[2]), documents.shape[1]
    exact = load_faiss().IndexFlatIP(full)
    exact.add(documents)
    near, _ = _found(exact.search, queries, k, own)
    found: list[tuple[Size, float, float]] = []
    values: list[Values] = []
    chosen = sorted({full, *dims}, reverse=True)
    for size, search in tqdm(
        sizes(documents, chosen, kinds_for(len(documents)), seed), desc="体积 sizes", unit="size", delay=2, leave=False
    ):
        scores, ids = _found(search, queries, k, own)
        ranking = Ranking.of_lists(relevant, ids, scores, max(KS))
        values.append(measure(ranking, [k])[metric])
        found.append((size, _recall(ids, near, queries, documents), milliseconds(search, queries, k)))
    deltas = np.stack(values, axis=1) - values[0][:, None]
    low, high = bootstrap(deltas, resamples, np.random.default_rng([seed, 3]))
    rows = [
        Row(
            size, recall, float(values[i].mean()), Change(float(deltas[:, i].mean()), float(low[i]), float(high[i])), ms
        )
        for i, (size, recall, ms) in enumerate(found)
    ]
    kept = [row for row, worst in zip(rows, low, strict=True) if worst > -tolerance]
    recommended = min(kept, key=lambda row: (round(row.size.bytes), row.milliseconds))
    return Frontier(model, metric, len(documents), len(queries), tolerance, rows, recommended)


def _found(search: Search, queries: Vectors, k: int, own: Sequence[Collection[int]]) -> tuple[Vectors, Ints]:
    """The k best documents that are not the query's own: scores (queries, k), -inf for none, and their numbers."""
    scores, ids = search(queries, k + max(map(len, own), default=0))
    out = ids < 0
    for row, documents in enumerate(own):
        out[row] |= np.isin(ids[row], list(documents))
    scores = np.where(out, np.float32("-inf"), scores)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    return scores, np.where(scores > -np.inf, np.take_along_axis(ids, order, axis=1), -1)


def _recall(ids: Ints, near: Vectors, queries: Vectors, documents: Vectors) -> float:
    """Mean share of the best documents found; any document that scores as the last of them does is as good.

    :param near: scores of the best documents by exact search, -inf where a query has no more.
    """
    wanted = (near > -np.inf).sum(axis=1)
    last = np.where(near > -np.inf, near, np.float32("inf")).min(axis=1)
    hits = np.empty(len(ids), np.int64)
    for start in range(0, len(ids), BLOCK):
        part = slice(start, start + BLOCK)
        scores = np.einsum("qkd,qd->qk", documents[ids[part]], queries[part])
        hits[part] = ((scores >= last[part, None] - SAME_SCORE) & (ids[part] >= 0)).sum(axis=1)
    return float((np.minimum(hits, wanted) / np.maximum(wanted, 1)).mean())


# --- the picture --------------------------------------------------------------------------------------------------

MARKERS = ("o", "^", "s")  # of the kinds of index, in their order
COLOURS = dict(zip(PRECISIONS, ("0.25", "C0", "C2", "C1", "C3"), strict=True))


def draw_frontier(path: Path, frontier: Frontier) -> None:
    """Draw the measure that decides against bytes per vector and against milliseconds per query."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    kinds = list(dict.fromkeys(row.size.kind for row in frontier.rows))
    for axes, label in ((left, "bytes per vector"), (right, "milliseconds per query, one thread")):
        _draw_rows(axes, frontier, kinds, of_bytes=axes is left)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.2)
    left.set_ylabel(shown_metric(frontier.metric))
    best = frontier.best
    left.step([row.size.bytes for row in best], [row.mean for row in best], where="post", color="0.7", zorder=1)
    for row in best:
        left.annotate(str(row.size.dimensions), (row.size.bytes, row.mean), fontsize=8, ha="right", va="bottom",
                      xytext=(-4, 3), textcoords="offset points")  # fmt: skip
    handles = [Line2D([], [], color=colour, marker="o", ls="", label=name) for name, colour in COLOURS.items()]
    marks = zip(kinds, MARKERS, strict=False)
    handles += [Line2D([], [], color="0.5", marker=mark, ls="", label=kind) for kind, mark in marks if len(kinds) > 1]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    of = f"{frontier.model}: {frontier.documents:,} documents, {frontier.queries:,} queries"
    figure.suptitle(f"{of}; ringed: {frontier.recommended.size.name}", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_rows(axes: Axes, frontier: Frontier, kinds: Sequence[str], *, of_bytes: bool) -> None:
    """A mark per size, smaller for fewer dimensions; the band is the tolerance below exact float32."""
    first = frontier.rows[0]
    axes.axhspan(first.mean - frontier.tolerance, first.mean, color="C2", alpha=0.12, lw=0)
    for row in frontier.rows:
        at = row.size.bytes if of_bytes else row.milliseconds
        area = 20 + 60 * row.size.dimensions / first.size.dimensions
        mark = MARKERS[kinds.index(row.size.kind)]
        axes.scatter([at], [row.mean], s=area, marker=mark, color=COLOURS[row.size.precision], alpha=0.8, zorder=2)
        if row is frontier.recommended:
            axes.scatter([at], [row.mean], s=260, facecolors="none", edgecolors="black", linewidths=1.5, zorder=3)
