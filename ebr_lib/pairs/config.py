"""The knobs of the stage that makes training pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    Count,
    MoreThanZero,
    Name,
    NotNegative,
    Place,
    Places,
    Positive,
    Seed,
    Share,
    delimiter_byte,
)
from ebr_lib.names import LANGUAGES
from ebr_lib.pairs.columns import USUAL

Propensity = Annotated[float, Field(gt=0, le=1)]
_ELSE_COUNTS = (". A log without it has counts", "。没有该列的日志按汇总计数读取")
_MAY_LACK = (", and does without", "，没有也可以")


def _column(of: str, help: str, zh: str, more: str = "", more_zh: str = "") -> tuple[str, str]:
    """Help of a knob that names a column of the log, with the names that are looked for without it."""
    *names, last = USUAL[of]
    return (
        f"{help}; null looks for {', '.join(names)} or {last}{more}.",
        f"{zh}；null 依次查找 {'、'.join(USUAL[of])}{more_zh}。",
    )


@dataclass(frozen=True)
class PairsConfig(Config):
    """Extension, `make_training_pairs`: training pairs and a held-out set out of a click log and a catalogue."""

    # the log
    log_path: Places = knob(
        "./train_text/click_log/events.csv.gz",
        "Click log: a file, a folder (with subfolders; `dt=2026-11-01` gives a column), or a list of these. Hive text, "
        "CSV, JSON lines, Parquet or ORC, one event or one count per row.",
        "点击日志：文件、目录（含子目录；`dt=2026-11-01` 形成一列）或它们的列表。Hive 文本、CSV、JSON Lines、Parquet 或 ORC；每行一个事件，或一条汇总计数。",
    )
    file_patterns: tuple[Name, ...] = knob(
        ["*.csv", "*.tsv", "*.txt", "*.jsonl", "*.json", "*.gz", "*.bz2", "*.zst", "*.parquet", "*.orc",
         "part-[0-9]*", "0*_[0-9]*"],
        "Files to read in a folder; the log lists files that are not read.",
        "读取目录中的哪些文件；未读取的文件会在日志中列出。",
    )  # fmt: skip
    columns: tuple[Name, ...] = knob(
        [],
        "Column names of log files without a header row; empty uses the first row of each file.",
        "无表头日志文件的列名；留空表示每个文件的首行为表头。",
    )
    delimiter: Name = knob(
        "auto",
        "Field separator of text, one character; may be written `\\001` or `\\t`. auto: the one in the first line. Only "
        "fields between commas may be quoted.",
        "文本的字段分隔符（单字符），可写作 `\\001`、`\\t`；auto 按首行判断。只有逗号分隔的字段可带引号。",
    )
    query_column: Name | None = knob(None, *_column("query", "Column with the query", "查询列"))
    item_column: Name | None = knob(None, *_column("item", "Column with the item's id", "商品 ID 列"))
    query_is_item: bool = knob(
        False,
        "The query column holds an item's id (similar items): its text comes from the catalogue too.",
        "查询列是商品 ID（相似商品日志）：其文本同样来自商品库。",
    )
    event_column: Name | None = knob(
        None, *_column("event", "Column with the event's name", "事件名称列", *_ELSE_COUNTS)
    )
    time_column: Name | None = knob(None, *_column("time", "Column with the time or day", "时间或日期列"))
    position_column: Name | None = knob(
        None, *_column("position", "Column with the place in the list", "展示位置列", *_MAY_LACK)
    )
    session_column: Name | None = knob(
        None, *_column("session", "Column with the session or user", "会话或用户列", *_MAY_LACK)
    )
    count_columns: dict[str, Name] = knob(
        {"impression": "impressions", "click": "clicks", "order": "orders"},
        "Columns of a log of counts, by the event that they count.",
        "汇总日志中各事件的计数列。",
    )
    time_format: str | None = knob(
        None,
        "Format of times, as of strftime; null reads ISO 8601, `20261101`, and seconds, milliseconds or microseconds since "
        "1970.",
        "时间格式（strftime 写法）；null 可读 ISO 8601、`20261101` 以及 1970 年以来的秒、毫秒、微秒。",
    )
    time_zone: Name = knob(
        "UTC",
        "Time zone in which days begin; times without a zone are taken to be in it.",
        "按哪个时区划分日期，如 `Asia/Shanghai`；不带时区的时间视为该时区。",
    )
    # the catalogue
    catalogue_path: Places = knob(
        "./train_text/click_log/items.jsonl",
        "Catalogue with the items' texts: a file, a folder or a list, in the same formats.",
        "含商品文本的商品库：文件、目录或列表，格式同上。",
    )
    catalogue_columns: tuple[Name, ...] = knob(
        [],
        "Column names of catalogue files without a header row; empty uses the first row of each file.",
        "无表头商品库文件的列名；留空表示每个文件的首行为表头。",
    )
    id_column: Name | None = knob(
        None,
        "The catalogue's id column; null looks for item_id, id, _id, sku, sku_id, doc_id or product_id.",
        "商品库的 ID 列；null 依次查找 item_id、id、_id、sku、sku_id、doc_id、product_id。",
    )
    text_template: Name = knob(
        "{description}",
        "An item's text: columns in braces, such as `{title} {brand}`; a null is left out.",
        "商品文本的模板：花括号内为列名，如 `{title} {brand}`；空值略去。",
        split=False,
    )
    # which rows count
    event_weights: dict[str, NotNegative] = knob(
        {"click": 1.0, "order": 3.0},
        "Events and what one is worth; 0 knows an event and ignores it. The lightest above 0 is taken as the click.",
        "各事件的价值；0 表示认识但忽略。大于 0 的最轻事件视为点击。",
    )
    impression_event: Name = knob("impression", "Name of the event of showing an item.", "曝光事件的名称。")
    drop_duplicates: bool = knob(
        True,
        "Count equal rows once, if they have a time of day or a session.",
        "完全相同的行只计一次（需有时刻或会话列）。",
    )
    max_session_events: Count = knob(
        500,
        "Drop sessions with more rows than this on one day, as bots; 0 keeps all.",
        "一天内行数超过该值的会话视为爬虫并丢弃；0 表示全部保留。",
    )
    drop_id_queries: bool = knob(
        True,
        "Drop queries that are ids, numbers or URLs: an embedding cannot match them by meaning.",
        "丢弃内容为 ID、编号或网址的查询：无法按语义匹配。",
    )
    # which pairs count
    min_impressions: Count = knob(0, "Minimum impressions of a pair.", "一对（查询，商品）的最少曝光数。")
    min_clicks: Positive = knob(
        1,
        "Minimum events of a pair that have a weight, clicks and orders together.",
        "一对的最少有效事件数（点击与下单合计）。",
    )
    min_ctr_ratio: NotNegative = knob(
        0.5,
        "Minimum click rate of a pair, as a share of the whole log's rate; smoothed by `prior_strength` and corrected for "
        "position. 0 keeps all.",
        "一对的最低点击率，以全日志点击率的倍数计（经 `prior_strength` 平滑、位置校正）；0 表示不限。",
    )
    prior_strength: MoreThanZero = knob(
        20.0,
        "Impressions that the Beta prior of a pair's click rate is worth; its mean is the log's click rate.",
        "点击率 Beta 先验相当于多少次曝光；先验均值为全日志点击率。",
    )
    propensities: Literal["auto", "none", "estimate"] | tuple[Propensity, ...] = knob(
        "auto",
        "Position bias, by the position-based model: chances of a look at each position, the first 1; estimate finds "
        "them from items shown at several positions; auto does so if it can; none corrects nothing.",
        "位置偏差（基于位置的模型）：各位置被看到的概率，首位为 1；estimate 由出现在多个位置的商品估计；auto 能估计时才校正；none 不校正。",
    )
    max_correction: Annotated[float, Field(ge=1)] = knob(
        10.0,
        "Most that one click at a rarely seen position counts for.",
        "位置校正下单次点击的最大倍数。",
    )
    half_life_days: MoreThanZero | None = knob(
        None,
        "Days after which an event counts half; null counts all days alike.",
        "事件价值减半的天数；null 表示各天同等。",
    )
    damping: Literal["none", "sqrt", "log"] = knob(
        "sqrt",
        "How a query's total grows with its events, and then an item's, so that the head does not drown the tail.",
        "查询总权重（其次是商品总权重）随事件数增长的方式，避免头部淹没长尾。",
    )
    max_items_per_query: Count = knob(
        20, "Most pairs of one query, the heaviest; 0 keeps all.", "每个查询最多保留几对（按权重）；0 表示不限。"
    )
    max_queries_per_item: Count = knob(
        200, "Most pairs of one item, the heaviest; 0 keeps all.", "每个商品最多保留几对（按权重）；0 表示不限。"
    )
    queries_per_language: dict[str, Count] | None = knob(
        None,
        "Most queries of each language (Chinese, English, mixed, other), a random choice; those not named keep all.",
        "各语言（Chinese、English、mixed、other）的最多查询数，随机抽取；未列出的不限。",
    )
    # negatives
    exposed_negatives: Share = knob(
        0.0,
        "Share of pairs that get items as hard negatives that were shown for the query and never clicked. Off: many of "
        "these are good answers that lost to their neighbour.",
        "用“曝光未点击”的商品作难负例的样本占比。默认关闭：其中许多其实是好答案，只是输给了旁边的商品。",
    )
    negatives_per_pair: Positive = knob(1, "Such negatives per pair, at most.", "每对最多几个这样的负例。")
    negative_min_impressions: MoreThanZero = knob(
        10.0,
        "Minimum impressions, corrected for position, without a click.",
        "作负例所需的最少未点击曝光数（经位置校正）。",
    )
    # held-out queries
    holdout_days: Count = knob(
        7,
        "The last days of the log are held out for evaluation; 0 trains on all.",
        "日志的最后几天留作评估；0 表示全部用于训练。",
    )
    max_heldout_queries: Count = knob(
        5000, "Most held-out queries, a random choice; 0 keeps all.", "最多留出的查询数（随机抽取）；0 表示不限。"
    )
    # output
    max_rejected_share: Share = knob(
        0.5,
        "If more rows than this share are unusable, or more pairs have no catalogue row, stop with an error.",
        "无法使用的行、或商品库中没有的商品对超过该比例时报错。",
    )
    seed: Seed = knob(42, "Random seed of the choices.", "随机抽取的种子。")
    sql_table: Name | None = knob(
        None,
        "Read nothing; write only `aggregate.sql`, which counts this Hive or Spark table into a log for this stage.",
        "不读数据，只写出 `aggregate.sql`：在 Hive 或 Spark 上把该表汇总为本阶段可读的日志。",
    )
    output_dir: Place = knob(
        "./click_pairs",
        "Output folder, replaced as a whole: pairs.jsonl, heldout/, rejects.jsonl, report.html, manifest.json, presets.",
        "输出目录（整体替换）：pairs.jsonl、heldout/、rejects.jsonl、report.html、manifest.json 与预设。",
    )

    def conflicts(self) -> Iterator[str]:
        if self.impression_event in self.event_weights:
            yield f"event_weights: {self.impression_event} is impression_event, which has no weight"
        if not any(self.event_weights.values()):
            yield "event_weights: give at least one event a weight above 0"
        if "{" not in self.text_template:
            yield f"text_template: {self.text_template!r} names no column; write columns in braces, such as {{title}}"
        if self.delimiter != "auto" and len(delimiter_byte(self.delimiter)) != 1:
            yield f"delimiter: {self.delimiter!r} is not one ASCII character"
        if unknown := sorted(set(self.queries_per_language or ()) - set(LANGUAGES)):
            yield f"queries_per_language: {', '.join(unknown)} is unknown; languages are {', '.join(LANGUAGES)}"
        if not self.propensities:
            yield "propensities: the list is empty; give one number per position, or none"
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError):
            yield f"time_zone: {self.time_zone} is unknown; wanted a name such as Asia/Shanghai or UTC"

    @property
    def weights(self) -> dict[str, float]:
        """Events with a weight above 0."""
        return {name: weight for name, weight in self.event_weights.items() if weight}

    @property
    def click(self) -> str:
        """The lightest event."""
        return min(self.weights, key=self.weights.__getitem__)

    @property
    def events(self) -> tuple[str, ...]:
        """Events that are counted: impressions first, then those with a weight."""
        return (self.impression_event, *self.weights)

    @property
    def known_events(self) -> tuple[str, ...]:
        """Those, and events that are ignored."""
        return (*self.events, *(name for name, weight in self.event_weights.items() if not weight))

    @property
    def separator(self) -> str | None:
        """The delimiter as a character; None for auto."""
        return None if self.delimiter == "auto" else delimiter_byte(self.delimiter).decode("latin-1")
