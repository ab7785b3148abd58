"""The verdict: did a model get better on the measure that decides, and what speaks against believing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ebr_lib.evaluate.compare import Difference

FEW_QUERIES = 50  # fewer give intervals too wide to decide by
WORDS = {"better": "更好 better", "worse": "更差 worse", "unclear": "没有明确差别 no clear difference"}
SHOWN = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}


@dataclass(frozen=True)
class Change:
    """Mean of a contender minus its baseline's over some queries, with its 95 % interval, None for few queries."""

    difference: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.difference:+.3f}{ends}"


@dataclass(frozen=True)
class Verdict:
    """`sentence` is the result in one line, each of `notes` a reason to doubt it or to do something."""

    outcome: Literal["better", "worse", "unclear"]
    sentence: str
    notes: Sequence[str]


def shown_metric(name: str) -> str:
    """A measure as people write it: nDCG@10."""
    kind, at, k = name.partition("@")
    return f"{SHOWN.get(kind, kind)}{at}{k}"


def verdict_on(d: Difference, unseen: Change | None, bm25: Mapping[str, float] | None) -> Verdict:
    """The verdict on one pair.

    :param d: its difference on the measure that decides.
    :param unseen: the change over queries whose documents training has not seen, if that is known.
    :param bm25: BM25's means, if it was measured.
    """
    outcome: Literal["better", "worse", "unclear"] = "unclear"
    if d.significant:
        outcome = "better" if d.difference > 0 else "worse"
    sentence = (
        f"{WORDS[outcome]}: {shown_metric(d.metric)} {d.before:.3f} → {d.after:.3f}, "
        f"{Change(d.difference, d.low, d.high)}; {d.won} 胜 won, {d.lost} 负 lost, {d.equal} 平 equal"
    )
    if unseen:
        sentence += f"; 训练未见的文档 on unseen documents {unseen}"
    return Verdict(outcome, sentence, list(_notes(d, unseen, bm25)))


def _notes(d: Difference, unseen: Change | None, bm25: Mapping[str, float] | None) -> Iterator[str]:
    queries = d.won + d.lost + d.equal
    if bm25 and d.after < bm25[d.metric]:
        yield (
            f"低于 BM25：模型可能不适合这些文本 below BM25 ({d.after:.3f} against {bm25[d.metric]:.3f}): keyword "
            "search beats this model here; check that it reads the language of your texts, or train on more pairs"
        )
    if unseen and unseen.difference < 0:
        chance = ", which may be chance" if unseen.high is None or unseen.high > 0 else ""
        yield (
            f"训练未见的文档变差 on documents that training has not seen it fell by {-unseen.difference:.3f}{chance}: "
            "it may have learned these documents, not the task; train on more different documents, or for fewer epochs"
        )
    if queries < FEW_QUERIES:
        yield (
            f"查询太少 only {queries} queries: with fewer than {FEW_QUERIES} the interval is too wide to decide by; "
            "judge or hold out more"
        )
