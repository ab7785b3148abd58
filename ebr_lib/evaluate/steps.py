"""What comes after a model in a deployed search: fusion with BM25, and a reranker over its best documents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ebr_lib.arrays import Floats, Ints
from ebr_lib.data.advice import Advice, Reranking
from ebr_lib.data.fusion import Candidates, Fusion, reranked_scores
from ebr_lib.evaluate.compare import Difference
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.metrics import Ranking, measure
from ebr_lib.model.reranker import Scores

WEIGHTS = tuple(np.linspace(0, 1, 11).round(1).tolist())  # BM25's part in a weighted sum


@dataclass(frozen=True)
class Step:
    """A model's ranking, changed. `milliseconds`: what the change costs per query, on this machine."""

    name: str
    base: str
    adds: Fusion | Reranking
    ranking: Ranking
    milliseconds: float


@dataclass(frozen=True)
class StepResult:
    """What a step brings on the measure that decides, and what it costs per query."""

    name: str
    base: str
    adds: Fusion | Reranking
    difference: Difference
    milliseconds: float

    @property
    def sentence(self) -> str:
        """The step in one line."""
        return f"{self.difference.sentence}; 每次查询 costs {self.milliseconds:.1f} ms per query"


def fused(
    base: str, first: Ranking, bm25: Ranking, *, bm25_milliseconds: float, metric: str, ks: Sequence[int], seed: int
) -> Iterator[Step]:
    """A model's ranking fused with BM25's: by reciprocal ranks, and by a weighted sum of scores.

    The weight of a query's sum is chosen on the other half of the queries, so that no query reports a weight that it
    chose; the weight in `adds` is chosen on all of them, to be used later.
    """
    start = time.perf_counter()
    candidates = Candidates.of((first.ids, first.scores), (bm25.ids, bm25.scores))
    rrf = Ranking.of_lists(first.relevant, candidates.ids, Fusion("rrf").scores(candidates), first.depth)
    cost = bm25_milliseconds + (time.perf_counter() - start) / max(len(rrf.ids), 1) * 1e3
    yield Step(f"{base} + BM25 (RRF)", base, Fusion("rrf"), rrf, cost)
    sums = (Ranking.of_lists(first.relevant, candidates.ids, candidates.convex(w), first.depth) for w in WEIGHTS)
    values = np.stack([measure(ranking, ks)[metric] for ranking in sums])
    chosen, weight = cross_fitted(values, seed)
    scores = candidates.convex(WEIGHTS[weight])
    for other in set(chosen.tolist()) - {weight}:
        scores[chosen == other] = candidates.convex(WEIGHTS[other])[chosen == other]
    ranking = Ranking.of_lists(first.relevant, candidates.ids, scores, first.depth)
    yield Step(f"{base} + BM25 (weighted)", base, Fusion("weighted", WEIGHTS[weight]), ranking, cost)


def cross_fitted(values: Floats, seed: int) -> tuple[Ints, int]:
    """For each query the choice that is best on the other half of the queries, and the choice that is best on all.

    :param values: a measure's value (choices, queries).
    :return: numbers of choices (queries,), and one number. Of equal choices, the first.
    """
    halves = np.random.default_rng([seed, 2]).permutation(values.shape[1]) % 2
    chosen = np.full(values.shape[1], int(values.mean(axis=1).argmax()))
    for half in (0, 1):
        if (others := halves != half).any():
            chosen[halves == half] = values[:, others].mean(axis=1).argmax()
    return chosen, int(values.mean(axis=1).argmax())


def reranked(base: str, name: str, first: Ranking, task: RetrievalTask, scores: Scores, *, depth: int) -> Step:
    """A model's `depth` best documents in the order of a reranker's scores; the others follow as they were."""
    from tqdm.auto import tqdm

    texts = task.corpus.texts
    assert texts is not None
    new, start = first.scores.astype(np.float64), time.perf_counter()
    for query, ids in enumerate(tqdm(first.ids, desc=f"重排 rerank {base}", unit="query", delay=2, leave=False)):
        best = ids[:depth][ids[:depth] >= 0]
        if not len(best):
            continue
        found = scores([(task.queries[query], texts[document]) for document in best])
        new[query] = reranked_scores(new[query], found)
    milliseconds = (time.perf_counter() - start) / max(len(new), 1) * 1e3
    ranking = Ranking.of_lists(first.relevant, first.ids, new, first.depth)
    return Step(f"{base}, re-ranked", base, Reranking(name, depth), ranking, milliseconds)


def advice_on(steps: Sequence[StepResult]) -> Advice:
    """What to put after a model: of the steps that are clearly better than the model alone, the best of each kind.

    :param steps: all that were measured after this model.
    """
    better = sorted((s for s in steps if s.difference.outcome == "better"), key=lambda s: -s.difference.after)
    fusion = next((step.adds for step in better if isinstance(step.adds, Fusion)), None)
    if fusion is None and any(isinstance(step.adds, Fusion) for step in steps):
        fusion = Fusion()
    reranking = next((step.adds for step in better if isinstance(step.adds, Reranking)), None)
    shown = [s for s in better if s.adds in (fusion, reranking)] or steps
    return Advice(fusion, reranking, "; ".join(f"{step.name}: {step.sentence}" for step in shown))
