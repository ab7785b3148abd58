"""The evaluation as a page: one HTML file without outside parts, readable on a phone; every text in it escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ebr_lib.evaluate.compare import Difference

Means = Mapping[str, Mapping[str, float]]
"""Contender to measure to mean."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #18794e; --bad: #c02b3c; --ink2: #667; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff8b92; --ink2: #9aa; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .85rem; margin: .5rem 0 0; color: var(--ink2); font-weight: 600; }
p { color: var(--ink2); margin: .3rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th { font-weight: 600; vertical-align: bottom; }
.best { font-weight: 700; }
.up { color: var(--good); } .down { color: var(--bad); }
.change { white-space: nowrap; }
small { color: var(--ink2); }
svg { display: block; width: clamp(3rem, 12vw, 7rem); height: 1.4rem; }
@media (max-width: 30rem) { th, td { padding-right: .4rem; } }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .45rem .7rem; margin: .5rem 0; }
summary { cursor: pointer; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .2rem 1.2rem; }
ol { margin: .2rem 0; padding-left: 1.5rem; font-size: .9rem; }
li.hit { color: var(--good); font-weight: 600; }
"""


@dataclass(frozen=True)
class Example:
    """A query that changed: its value before and after, and what either contender retrieved: (text, is it relevant)."""

    query: str
    before: float
    after: float
    wanted: Sequence[str]
    retrieved_before: Sequence[tuple[str, bool]]
    retrieved_after: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Duel:
    """One contender against another: differences by measure, and the queries won and lost most by `metric`."""

    baseline: str
    contender: str
    metric: str
    differences: Sequence[Difference]
    won: Sequence[Example]
    lost: Sequence[Example]


@dataclass(frozen=True)
class Slice:
    """Queries of one kind: what they have in common, how many there are, the means of each contender."""

    kind: str
    value: str
    queries: int
    means: Means


@dataclass(frozen=True)
class Report:
    """All that an evaluation found. `measured` says on what and when, `how` in which way each contender was used."""

    title: str
    facts: Mapping[str, Any]
    means: Means
    duels: Sequence[Duel]
    slices: Sequence[Slice]
    slice_metrics: Sequence[str]
    measured: Mapping[str, str]
    how: Mapping[str, Mapping[str, object]]

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(
            [
                f"<h1>{escape(self.title)}</h1>",
                _facts(self.measured),
                _facts(self.facts),
                *(_facts(how, name) for name, how in self.how.items()),
                "<h2>Measures · 指标</h2>",
                _means_table(self.means),
                *(_duel(duel) for duel in self.duels),
                *self._slices(),
                "<h2>How to read this · 说明</h2>",
                _NOTES,
            ]
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )

    def _slices(self) -> Iterator[str]:
        if self.slices:
            yield "<h2>Slices · 分组</h2>"
        for kind in dict.fromkeys(part.kind for part in self.slices):
            yield f"<details><summary>by {escape(kind)}</summary>"
            parts = [part for part in self.slices if part.kind == kind]
            yield from (_slice_table(parts, metric) for metric in self.slice_metrics)
            yield "</details>"


_NOTES = """<p>Recall@k: share of a query's relevant documents among the first k. Hit@k: share of queries with at least
one there. nDCG takes the grades as gains. Equal texts are one document. A query's own document (of its text, or its id)
is neither an answer nor a competitor for it; the knob leave_out_own says which are left out. Equal scores count by
expectation over their orders, so that a model which tells nothing apart gets what chance gives. Intervals: 95 %
bootstrap over queries. p: paired permutation test, two-sided, Holm-corrected over the measures of a pair.</p>
<p>Recall@k：前 k 个结果覆盖的相关文档比例；Hit@k：前 k 个结果至少命中一个的查询比例。文本相同视为同一文档；
查询自身对应的文档（文本或 ID 相同）不算答案，也不参与排序（见 leave_out_own）；
分数相同时按随机次序取期望。区间为按查询自助重采样的 95% 区间；p 为配对置换检验（双侧），经 Holm 校正。</p>"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: Mapping[str, Any], of: str = "") -> str:
    shown = (f"{escape(name.replace('_', ' '))}: {escape(str(value)) or 'none'}" for name, value in facts.items())
    return f"<p>{f'<b>{escape(of)}</b> · ' if of else ''}{' · '.join(shown)}</p>"


def _marked_best(values: Sequence[float]) -> list[str]:
    best = max(values)
    return [f'<span class="best">{v:.4f}</span>' if v == best and len(values) > 1 else f"{v:.4f}" for v in values]


def _means_table(means: Means) -> str:
    names = list(means)
    metrics = list(means[names[0]])
    rows = [[metric, *_marked_best([means[name][metric] for name in names])] for metric in metrics]
    return _table(["", *map(escape, names)], rows)


def _slice_table(parts: Sequence[Slice], metric: str) -> str:
    names = list(parts[0].means)
    rows = [
        [escape(part.value), str(part.queries), *_marked_best([part.means[name][metric] for name in names])]
        for part in parts
    ]
    return _table([escape(metric), "queries", *map(escape, names)], rows)


def _duel(duel: Duel) -> str:
    reach = max([abs(x) for d in duel.differences for x in (d.low, d.high)] + [1e-9])
    rows = [_difference_row(d, reach) for d in duel.differences]
    head = ["", "difference 差<br><small>95 % interval 区间</small>", "", "p (Holm)"]
    return "\n".join(
        [
            f"<h2>{escape(duel.contender)} against {escape(duel.baseline)}</h2>",
            _table(head, rows),
            _examples("won 提升", duel.won, duel),
            _examples("lost 下降", duel.lost, duel),
        ]
    )


def _difference_row(d: Difference, reach: float) -> list[str]:
    sure = "" if not d.sure else "up" if d.difference > 0 else "down"
    return [
        escape(d.metric),
        f'<span class="{sure}">{d.difference:+.4f}</span><br><small>{d.low:+.4f} … {d.high:+.4f}</small>',
        _whisker(d, reach, sure),
        f"{d.p_holm:.4f}",
    ]


def _whisker(d: Difference, reach: float, sure: str) -> str:
    """The interval as a line around its mean, on a scale common to the table; the upright stroke is no difference."""
    low, mean, high = (100 + 92 * x / reach for x in (d.low, d.difference, d.high))
    return (
        f'<svg viewBox="0 0 200 20" preserveAspectRatio="none" class="{sure}" aria-hidden="true">'
        '<line x1="100" x2="100" y1="0" y2="20" stroke="currentColor" opacity=".35"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="10" y2="10" stroke="currentColor" stroke-width="2"/>'
        f'<rect x="{mean - 3:.1f}" y="6" width="6" height="8" fill="currentColor"/></svg>'
    )


def _examples(title: str, examples: Sequence[Example], duel: Duel) -> str:
    if not examples:
        return ""
    parts = [f"<h3>{escape(title)} ({escape(duel.metric)})</h3>"]
    for e in examples:
        sign = "up" if e.after > e.before else "down"
        change = f'<span class="change {sign}">{e.before:.3f} → {e.after:.3f}</span>'
        parts.append(
            f"<details><summary>{escape(e.query)} {change}</summary>"
            f"<h4>relevant 相关</h4><ol>{''.join(f'<li>{escape(text)}</li>' for text in e.wanted)}</ol>"
            f'<div class="two"><div><h4>{escape(duel.baseline)}</h4>{_retrieved(e.retrieved_before)}</div>'
            f"<div><h4>{escape(duel.contender)}</h4>{_retrieved(e.retrieved_after)}</div></div></details>"
        )
    return "\n".join(parts)


def _retrieved(texts: Sequence[tuple[str, bool]]) -> str:
    if not texts:
        return "<p>nothing · 无</p>"
    items = (f'<li class="hit">✓ {escape(text)}</li>' if hit else f"<li>{escape(text)}</li>" for text, hit in texts)
    return f"<ol>{''.join(items)}</ol>"
