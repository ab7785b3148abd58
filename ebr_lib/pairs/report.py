"""What was made of the log: tables, and the page that shows them."""

from __future__ import annotations

import numpy as np
import polars as pl
from pandas import DataFrame

from ebr_lib.arrays import Floats
from ebr_lib.names import LANGUAGES
from ebr_lib.pairs.bias import Bias
from ebr_lib.pairs.choose import heaviest_first
from ebr_lib.pairs.columns import ANCHOR, CLICKS, ITEM, ITEMS_SEEN, KEY, LANGUAGE, QUERY_SEEN, TEXT, WEIGHT
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.counts import Counted
from ebr_lib.pairs.funnel import Funnel
from ebr_lib.tables import make_table, shortened

EXAMPLES = 5  # of head, torso and tail each
POINTS = 60  # of a curve
BATCH = 64  # in which false negatives are expected
WIDTH, HEIGHT = 360.0, 160.0


def report_tables(
    trained: pl.DataFrame, queries: pl.DataFrame | None, funnel: Funnel, bias: Bias, seed: int
) -> dict[str, DataFrame]:
    """Tables of a run; `queries` are held out."""
    at = [(position, value, 1 / value) for position, value in bias.propensities.items()]
    return {
        "funnel": funnel.table,
        "clicks_per_query": _clicks_per_query(_sums(trained, KEY, CLICKS)),
        "positions": make_table(
            f"位置偏差 position bias: {bias.source}",
            ("位置 position", "被看到 looked at", "点击倍数 a click counts"),
            at,
        ),
        "languages": _languages(trained),
        "popular": _popular(trained),
        "overlap": _overlap(queries),
        "examples": _examples(trained, seed),
    }


def report_page(
    config: PairsConfig,
    trained: pl.DataFrame,
    queries: pl.DataFrame | None,
    tables: dict[str, DataFrame],
    *,
    bias: Bias,
    counted: Counted,
) -> str:
    """One HTML page without outside parts."""
    from jinja2 import Environment, PackageLoader

    of = {"queries": KEY, "items": TEXT}
    facts = {
        "days": f"{min(counted.days)} – {max(counted.days)}" if counted.days else "unknown",
        "rows": counted.rows,
        "events": ", ".join(f"{count} {name}" for name, count in counted.events.items()),
        "spellings merged": f"{counted.spellings} → {counted.queries}",
        "pairs": len(trained),
        **{name: trained[column].n_unique() for name, column in of.items()},
        "held-out queries": 0 if queries is None else len(queries),
        "position bias": bias.source,
    }
    curves = [
        _curve(f"{name}: {unit}", _sums(trained, column, values))
        for unit, values in (("clicks", CLICKS), ("weight", WEIGHT))
        for name, column in of.items()
    ]
    pages = Environment(loader=PackageLoader("ebr_lib", "pairs"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template("report.html.j2").render(
        title="Click log to pairs · 点击日志到样本",
        facts=facts,
        tables=tables,
        curves=curves,
        advice=_advice(config, trained, queries),
    )


def _sums(pairs: pl.DataFrame, column: str, values: str) -> Floats:
    """Totals of the queries or items, the largest first."""
    sums = pairs.group_by(column).agg(pl.col(values).sum().cast(pl.Float64))[values]
    return np.sort(sums.to_numpy())[::-1]


def _curve(name: str, values: Floats) -> dict[str, str]:
    """Share of the total by share of the queries or items, the largest first: points of an SVG, and in words."""
    reached = np.concatenate([[0.0], np.cumsum(values)]) / max(values.sum(), 1e-12)
    at = np.unique(np.geomspace(1, len(values), POINTS).astype(int))
    chosen = [0, *at.tolist()]
    points = " ".join(f"{WIDTH * i / len(values):.1f},{HEIGHT * (1 - reached[i]):.1f}" for i in chosen)
    shares = [f"{reached[max(1, round(share * len(values)))]:.0%} in the top {share:.0%}" for share in (0.01, 0.1, 0.5)]
    return {"name": name, "points": points, "facts": ", ".join(shares)}


def _clicks_per_query(clicks: Floats) -> DataFrame:
    limits = [1, 2, 5, 10, 100, 1000, np.inf]
    names = ["1", "2 – 4", "5 – 9", "10 – 99", "100 – 999", "1000 +"]
    counts, _ = np.histogram(clicks, limits)
    totals, _ = np.histogram(clicks, limits, weights=clicks)
    rows = [(name, int(n), int(total)) for name, n, total in zip(names, counts, totals, strict=True) if n]
    return make_table(
        "每个查询的有效事件 weighted events per query", ("事件 events", "查询 queries", "合计 total"), rows
    )


def _languages(pairs: pl.DataFrame) -> DataFrame:
    weight = pl.col(WEIGHT).sum()
    found = pairs.group_by(LANGUAGE, maintain_order=True).agg(pl.col(KEY).n_unique(), pl.len(), weight)
    rows = found.sort(pl.col(LANGUAGE).cast(pl.Enum(LANGUAGES))).with_columns(pl.col(WEIGHT) / pl.col(WEIGHT).sum())
    columns = ("语言 language", "查询 queries", "样本 pairs", "权重占比 share of weight")
    return make_table("语言 languages", columns, rows.iter_rows())


def _popular(pairs: pl.DataFrame) -> DataFrame:
    found = pairs.group_by(TEXT, maintain_order=True).agg(
        pl.col(ITEM).first(), pl.len(), pl.col(CLICKS).sum(), pl.col(WEIGHT).sum()
    )
    top = found.sort("len", ITEM, descending=[True, False]).head(EXAMPLES)
    columns = ("商品 item", "样本 pairs", "事件 events", "权重 weight", "文本 text")
    return make_table("热门商品 popular items", columns, top.select(ITEM, "len", CLICKS, WEIGHT, TEXT).iter_rows(), 60)


def _overlap(queries: pl.DataFrame | None) -> DataFrame:
    title = "留出查询与训练的重叠 held-out queries and training"
    columns = ("查询 query", "其商品 its items", "查询数 queries", "占比 share")
    if queries is None:
        return make_table(title, columns, [])
    counts = queries.group_by(QUERY_SEEN, ITEMS_SEEN).len().sort(QUERY_SEEN, ITEMS_SEEN)
    return make_table(title, columns, [(*row, row[-1] / len(queries)) for row in counts.iter_rows()])


def _examples(pairs: pl.DataFrame, seed: int) -> DataFrame:
    """Queries from the head (most clicked), the torso (around the middle) and the tail, with their heaviest item."""
    best = heaviest_first(pairs).group_by(KEY, maintain_order=True).agg(
        pl.col(ANCHOR, TEXT, WEIGHT).first(), pl.len(), pl.col(CLICKS).sum()
    ).sort(CLICKS, KEY, descending=[True, False])  # fmt: skip
    middle = max(0, len(best) // 2 - EXAMPLES // 2)
    tail = best.tail(max(1, len(best) // 4))
    parts = {
        "头部 head": best.head(EXAMPLES),
        "腰部 torso": best.slice(middle, EXAMPLES),
        "长尾 tail": tail.sample(min(EXAMPLES, len(tail)), seed=seed),
    }
    rows = [
        (part, shortened(anchor), *others)
        for part, frame in parts.items()
        for anchor, *others in frame.select(ANCHOR, CLICKS, "len", WEIGHT, TEXT).iter_rows()
    ]
    columns = ("部分 part", "查询 query", "事件 events", "样本 pairs", "权重 weight", "最重的商品 heaviest item")
    return make_table("样例 examples", columns, rows, 60)


def _advice(config: PairsConfig, pairs: pl.DataFrame, queries: pl.DataFrame | None) -> list[str]:
    """What fine-tuning's data doctor would look at, as far as it can be seen without a tokenizer."""
    rows = pairs.group_by(TEXT).len().sort("len", descending=True)
    top = int(rows["len"][0])
    # rows of a random batch whose document is known to answer this row's query: n_q · Σ rows of its documents, summed
    of_query = pairs.join(rows, on=TEXT).group_by(KEY).agg(pl.col("len").sum(), pl.len().alias("rows"))
    known = int((of_query["len"] * of_query["rows"]).sum()) - len(pairs)
    false = known / max(1, len(pairs) * (len(pairs) - 1)) * (BATCH - 1)
    advice = [
        f"一批 {BATCH} 条中，每条平均遇到 {false:.2f} 个其实是答案的负例 known answers among a row's "
        f"in-batch negatives, in batches of {BATCH}: {false:.2f} (fine-tuning masks them)."
    ]
    if top > 0.05 * len(pairs):
        advice.append(
            f"最热门的商品占 {top / len(pairs):.0%} 的样本 one item has {top / len(pairs):.0%} of the pairs: "
            "lower max_queries_per_item."
        )
    if len(pairs) < 1000:
        advice.append(f"只有 {len(pairs)} 条样本 only {len(pairs)} pairs: use more days, or a small learning rate.")
    seen = 0 if queries is None else queries[QUERY_SEEN].to_list().count("seen")
    if queries is not None and seen > 0.5 * len(queries):
        advice.append(
            f"{len(queries)} 个留出查询中有 {seen} 个训练时见过，其提升部分来自记忆 {seen} of {len(queries)} held-out "
            "queries are in training, so their gain is partly memory: look at the unseen ones, or measure on judged "
            "queries."
        )
    if queries is not None and len(queries) < 100:
        advice.append(f"留出查询只有 {len(queries)} 个 only {len(queries)} held-out queries: intervals will be wide.")
    single = int((pairs[CLICKS] == 1).sum())
    if single > 0.5 * len(pairs) and config.min_clicks == 1:
        advice.append(
            f"{single / len(pairs):.0%} 的样本只有一个事件 {single / len(pairs):.0%} of pairs have one event: with "
            "more days, min_clicks: 2 removes chance clicks."
        )
    return advice
