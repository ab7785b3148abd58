"""Recall and latency of an index, beside exact search."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.faiss_library import load_faiss, one_thread
from ebr_lib.index.faiss_tools import (
    REFINE_FACTOR,
    Plan,
    cells_of,
    flat_of,
    reconstructed,
    search_parameters,
    searched_part,
)
from ebr_lib.metrics import CHUNK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH_DEPTH = 100  # exact neighbours kept per query, so that ties with the k-th are known
RECALL_AT = 10
SAME_SCORE = 1e-6  # scores this close are a tie
TIMED_QUERIES = 200


@dataclass(frozen=True)
class Point:
    """One setting of the knob: recall@10 against exact search, latency of single queries in one thread (milliseconds),
    and queries per second of one batch on all threads."""

    setting: int
    recall: float
    p50: float
    p95: float
    p99: float
    qps: float


@dataclass(frozen=True)
class Truth:
    """Queries with their exact neighbours: ids and scores, queries × depth.

    :ivar own: ids of queries that are in the index, and are left out of what they find; -1 for others.
    """

    queries: Vectors
    own: Ints
    ids: Ints
    scores: Vectors


def exact_neighbours(index: Any, batches: Iterable[Vectors], queries: Vectors, own: Ints) -> Truth:
    """Search exactly, on GPUs if Faiss has any: in the index's own vectors if it holds them uncompressed, otherwise, or
    without an index of Faiss, in the batches."""
    from faiss.contrib.exhaustive_search import knn_ground_truth

    if index is not None and (flat := flat_of(index)) is not None:
        starts = range(0, flat.ntotal, CHUNK)
        batches = (flat.reconstruct_n(start, min(CHUNK, flat.ntotal - start)) for start in starts)
    scores, ids = knn_ground_truth(queries, batches, TRUTH_DEPTH + 1, load_faiss().METRIC_INNER_PRODUCT)
    return Truth(queries, own, ids, np.where((ids < 0) | (ids == own[:, None]), np.float32("-inf"), scores))


def recall_of(found: Ints, truth: Truth, index: Any, among: int = RECALL_AT) -> float:
    """Mean share of the ten nearest rows that an index found; any row that scores as the tenth does is as good.

    If the index holds fewer than ten other rows, all of them are wanted.

    :param among: how many of the rows found, best first, count.
    """
    shares = []
    for i, own in enumerate(truth.own):
        there = truth.scores[i] > -np.inf
        near, scores = truth.ids[i][there], truth.scores[i][there]
        wanted = min(RECALL_AT, len(near))
        kept = found[i][(found[i] != own) & (found[i] >= 0)][:among]
        hits = _hits(index, truth.queries[i], kept, near, scores) if wanted else 0
        shares.append(min(hits, wanted) / wanted if wanted else 1.0)
    return float(np.mean(shares))


def _hits(index: Any, query: Vectors, found: Ints, near: Ints, scores: Vectors) -> int:
    """How many of the ids score at least as the tenth nearest does."""
    tenth = np.argsort(-scores, kind="stable")[min(RECALL_AT, len(near)) - 1]
    good = scores >= scores[tenth] - SAME_SCORE
    hits = np.isin(found, near[good])
    if good.all() and index.ntotal > len(near) and not hits.all():
        # more may tie with the tenth than the list holds; equal vectors have equal scores in the index, too
        held = reconstructed(index, np.r_[near[tenth], found]) @ query
        hits |= np.abs(held[1:] - held[0]) <= SAME_SCORE
    return int(hits.sum())


def measure_point(index: Any, truth: Truth, knob: str | None, setting: int) -> Point:
    """Recall and speed of one setting."""
    parameters = search_parameters(index, knob, setting)
    start = time.perf_counter()
    _, found = index.search(truth.queries, RECALL_AT + 1, params=parameters)
    qps = len(truth.queries) / (time.perf_counter() - start)
    times = []
    with one_thread():
        for query in truth.queries[:TIMED_QUERIES]:
            start = time.perf_counter()
            index.search(query[None, :], RECALL_AT, params=parameters)
            times.append(1000 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return Point(setting, recall_of(found, truth, index), float(p50), float(p95), float(p99), qps)


def sweep(index: Any, truth: Truth, plan: Plan, target: float) -> tuple[list[Point], Point]:
    """Measure settings, cheapest first, until two reach the target; choose the first of them, or the last setting, the
    most thorough, if none does."""
    from tqdm.auto import tqdm

    points: list[Point] = []
    for setting in tqdm(plan.settings(cells_of(index)), desc=f"测量 {plan.knob or plan.factory}", delay=2, leave=False):
        points.append(measure_point(index, truth, plan.knob, setting))
        if sum(point.recall >= target for point in points) == 2:  # one point beyond the chosen one shows the curve
            break
    chosen = next((point for point in points if point.recall >= target), points[-1])
    return points, chosen


def remedies(index: Any, truth: Truth, plan: Plan, target: float) -> list[tuple[str, float]]:
    """Kinds that reach a recall which no setting of this one reaches, each with its measured recall.

    Re-ranking by uncompressed vectors finds what is among the candidates of the most thorough search; Flat finds all.
    """
    found = [("Flat", 1.0)]
    if flat_of(searched_part(index)) is None and "RFlat" not in plan.factory:
        parameters = search_parameters(index, plan.knob, plan.settings(cells_of(index))[-1])
        _, candidates = index.search(truth.queries, int(REFINE_FACTOR) * RECALL_AT, params=parameters)
        kind = f"{plan.factory.partition(',Refine')[0]},RFlat"
        found.insert(0, (kind, recall_of(candidates, truth, index, among=candidates.shape[1])))
    return [(kind, recall) for kind, recall in found if recall >= target]


def draw_curve(path: Path, plan: Plan, points: Sequence[Point], chosen: Point, target: float) -> None:
    """Draw recall against median latency: one dot per setting, the chosen one filled. One setting has no curve: its
    latencies are drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2 if len(points) > 1 else 2.2), layout="constrained")
    axes = figure.subplots()
    if len(points) == 1:
        _draw_latencies(axes, plan, chosen)
        figure.savefig(path, dpi=130)
        return
    axes.plot([p.p50 for p in points], [p.recall for p in points], "-", color="0.6", zorder=1)
    for point in points:
        face = "C0" if point is chosen else "white"
        axes.plot([point.p50], [point.recall], "o", color="C0", markerfacecolor=face, zorder=2)
        label = f"{plan.knob} {point.setting}" if plan.knob else "all compared"
        axes.annotate(label, (point.p50, point.recall), fontsize=8, va="top", ha="left", xytext=(3, -3),
                      textcoords="offset points")  # fmt: skip
    axes.axhline(target, color="C3", linewidth=1, linestyle="--", label=f"target {target:g}")
    axes.set(xlabel="median latency of one query, one thread (ms)", ylabel=f"recall@{RECALL_AT}", title=plan.factory)
    axes.margins(x=0.15)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)


def _draw_latencies(axes: Axes, plan: Plan, point: Point) -> None:
    """Draw the latencies of the only setting as bars; its recall is in the title."""
    bars = axes.barh(["p99", "p95", "median"], [point.p99, point.p95, point.p50], color="C0", height=0.6)
    axes.bar_label(bars, fmt="%.3g ms", padding=4, fontsize=9)
    title = f"{plan.factory}: recall@{RECALL_AT} {point.recall:.4f}" + ("" if plan.knob else ", all vectors compared")
    axes.set(xlabel="latency of one query, one thread (ms)", title=title)
    axes.margins(x=0.15)
