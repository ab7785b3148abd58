"""Rows of the log: what each means, or why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebr_lib.errors import DataError
from ebr_lib.names import did_you_mean
from ebr_lib.pairs.sources import FILE, FITS, Table

if TYPE_CHECKING:
    import polars as pl

ITEM_IDS = ("item_id", "item", "sku", "sku_id", "doc_id", "product_id")
USUAL = {
    "query": ("query", "anchor", "keyword", "search_query", "q"),
    "item": ITEM_IDS,
    "event": ("event", "event_type", "action", "type"),
    "time": ("time", "timestamp", "event_time", "ts", "day", "dt", "date"),
    "position": ("position", "pos", "rank"),
    "session": ("session", "session_id", "user", "user_id", "uid"),
}
"""What a column means, to its usual names."""

# why a row cannot be used, in the order in which a row is asked
MISFIT = "wrong number of fields"
NOT_UTF8 = "not UTF-8"
NO_QUERY = "no query"
NO_ITEM = "no item"
NO_TIME = "no time"
BAD_TIME = "time not read"
FAR_TIME = "time before 2000 or after tomorrow"
UNKNOWN_EVENT = "unknown event"
BAD_COUNT = "count is not a number"
NEGATIVE_COUNT = "negative count"
BAD_POSITION = "position is not a whole number"
NEGATIVE_POSITION = "negative position"
# why a row is left out by a decision
ID_QUERY = "query is an id, a number or a URL"
BOT = "bot-like session"

# columns that rows get, named as no log names its own
KEY, QUERY, ITEM, DAY, POSITION, SESSION = "@key", "@query", "@item", "@day", "@position", "@session"
STAMP, REASON, RAW, CLOCK, UNPLACED = "@stamp", "@reason", "@raw", "@clock", "@unplaced"
DATE, NAIVE, ZONED, EPOCH = "a date", "a time without a zone", "a time with a zone", "a number since 1970"
CLOCKS = (DATE, NAIVE, ZONED, EPOCH)
"""Ways in which times are written."""
_DIRECTIVE = r"%[-_0]?(:{0,3}z|#z|.)"  # of a time format
_WITH_ZONE, _WITH_TIME = {"z", ":z", "::z", ":::z", "#z", "+"}, set("HIklTRrXc")

_ZERO_WIDTH = "[\u00ad\u200b-\u200f\u2060\ufeff]"
_ODD_SPACE = r"\s{2,}|[^\S ]"  # single spaces stay: replacing each costs most of the time
_DATE = r"^\s*(\d{4}[-/]\d{1,2}[-/]\d{1,2})"
_WHOLE_DATE = _DATE + r"\s*$"
_WHOLE_TIME = _DATE + r"[ T]+\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?\s*$"
_WHOLE_ZONED = _DATE + r"[ T]+\d{1,2}:\d{2}:\d{2}([.,]\d+)?\s*(Z|UTC|[+-]\d{2}:?\d{2})\s*$"
_URL = r"^(https?://|www\.)|^[\w.-]+\.(com|cn|net|org|io|html?)(/\S*)?$"
_NUMBER = r"^[\d\s._-]{6,}$"
_UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
_HEX = r"^[0-9a-f]*[0-9][0-9a-f]*$"


@dataclass(frozen=True)
class Columns:
    """Columns of the log. `event` is None in a log of counts; `counts` is empty in a log of events."""

    query: str
    item: str
    event: str | None
    time: str | None
    position: str | None
    session: str | None
    counts: Mapping[str, str]

    @property
    def read(self) -> list[str]:
        """Their names in the files, each once."""
        names = (self.query, self.item, self.event, self.time, self.position, self.session, *self.counts.values())
        return list(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class Meaning:
    """How rows are read; the fields are knobs of the stage."""

    events: tuple[str, ...]  # impressions first, then those with a weight
    ignored: tuple[str, ...]
    query_is_item: bool
    time_format: str | None
    time_zone: str


def find_columns(table: Table, given: Mapping[str, str | None], counts: Mapping[str, str], clicks: str) -> Columns:
    """Find the columns of a log.

    :param given: names that knobs give, by meaning.
    :param counts: the column of each event in a log of counts.
    :param clicks: an event that must be counted.
    :raises DataError: a column is missing; names the nearest, or those that are there.
    """
    found = {name: table.column(given[name], USUAL[name], f"{name}_column") for name in USUAL}
    query = found["query"] or table.some(None, USUAL["query"], "query_column")
    item = found["item"] or table.some(None, USUAL["item"], "item_column")
    if item == query:
        raise DataError(f"{table.place}: query_column and item_column are both {item}; name the other one")
    there = {} if found["event"] else {event: name for event, name in counts.items() if name in table.columns}
    if not found["event"] and clicks not in there:
        raise DataError(
            f"{table.place}: has neither an event per row (looked for {', '.join(USUAL['event'])}; event_column) nor "
            f"counts (looked for {', '.join(counts.values())}; count_columns); found {', '.join(table.columns)}"
        )
    session = found["session"] if found["event"] else None
    return Columns(query, item, found["event"], found["time"], found["position"], session, there)


# --- meaning ------------------------------------------------------------------------------------------------------


def marked_rows(frame: pl.LazyFrame, columns: Columns, meaning: Meaning) -> pl.LazyFrame:
    """Each row with its normalised query as `KEY`, its day, a hash that equal rows share, and `REASON` where it cannot
    be used; `n_<event>` columns hold its counts."""
    import polars as pl

    schema = frame.collect_schema()
    query, item = pl.col(columns.query), pl.col(columns.item).str.strip_chars()
    key = item_key(query) if meaning.query_is_item else query_key(query)
    day, clock = _day(columns.time, schema, meaning)
    position, is_placed = _position(columns.position)
    frame = frame.with_columns(
        key.alias(KEY),
        item.alias(ITEM),
        query.alias(QUERY),
        day.alias(DAY),
        clock.alias(CLOCK),
        position.alias(POSITION),
        (position.is_null() & is_placed).alias(UNPLACED),
        _session(columns).alias(SESSION),
        _stamp(columns).alias(STAMP),
        *_counts(columns, meaning),
    )
    reasons = _reasons(columns, meaning)
    reason = pl.coalesce(pl.when(condition).then(pl.lit(text)) for text, condition in reasons.items())
    is_bad = pl.col(REASON).is_not_null()
    fields = [pl.when(is_bad).then(name).cast(pl.String).fill_null("") for name in columns.read]
    return frame.with_columns(reason.alias(REASON)).select(
        KEY, QUERY, ITEM, DAY, CLOCK, POSITION, SESSION, STAMP, *(f"n_{name}" for name in meaning.events), REASON,
        pl.when(is_bad).then(pl.concat_str(fields, separator="\x01")).alias(RAW),
        pl.when(is_bad).then(FILE).alias(FILE),
    )  # fmt: skip


def query_key(query: pl.Expr) -> pl.Expr:
    """The form in which equal queries are equal: as `data.text.normalised`, with lower case for casefolding."""
    text = query.str.normalize("NFKC").str.to_lowercase().str.replace_all(_ZERO_WIDTH, "")
    return text.str.replace_all(_ODD_SPACE, " ").str.strip_chars(" ")


def item_key(item: pl.Expr) -> pl.Expr:
    """An item's id as it is, without blanks around it."""
    return item.str.strip_chars()


def _session(columns: Columns) -> pl.Expr:
    import polars as pl

    if not columns.session:
        return pl.lit(None, dtype=pl.UInt64)
    name = pl.col(columns.session)
    return pl.when(name != "").then(name.hash(seed=1))


def _stamp(columns: Columns) -> pl.Expr:
    """What tells two events of one query and item apart: time, session and place; for counts, the counts too."""
    import polars as pl

    names = [name for name in (columns.time, columns.session, columns.position, columns.event) if name]
    return pl.struct([pl.col(name) for name in (*names, *columns.counts.values()) or [columns.item]]).hash(seed=2)


def _counts(columns: Columns, meaning: Meaning) -> list[pl.Expr]:
    import polars as pl

    if columns.event:
        event = pl.col(columns.event).str.strip_chars().str.to_lowercase()
        return [(event == name.lower()).fill_null(False).cast(pl.Int64).alias(f"n_{name}") for name in meaning.events]
    none = pl.lit(0, dtype=pl.Int64)
    return [
        (_count(columns.counts[name]).fill_null(0) if name in columns.counts else none).alias(f"n_{name}")
        for name in meaning.events
    ]


def _count(name: str) -> pl.Expr:
    import polars as pl

    return pl.col(name).str.strip_chars().cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)


def _position(name: str | None) -> tuple[pl.Expr, pl.Expr]:
    """The position, 3 for `3.0` too, null where it is not a whole number; and whether one is given."""
    import polars as pl

    if name is None:
        return pl.lit(None, dtype=pl.Int32), pl.lit(False)
    text = pl.col(name).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    whole = pl.when(number == number.floor()).then(number.cast(pl.Int32, strict=False))
    return whole, (text != "").fill_null(False)


def _reasons(columns: Columns, meaning: Meaning) -> dict[str, pl.Expr]:
    """Why a row cannot be used: the first that holds counts."""
    import polars as pl

    reasons = {
        MISFIT: ~pl.col(FITS),
        NOT_UTF8: (
            pl.col(QUERY).str.contains("\ufffd", literal=True) | pl.col(ITEM).str.contains("\ufffd", literal=True)
        ),
        NO_QUERY: pl.col(KEY).is_null() | (pl.col(KEY) == ""),
        NO_ITEM: pl.col(ITEM).is_null() | (pl.col(ITEM) == ""),
    }
    if columns.time:
        time = pl.col(columns.time)
        first, last = pl.date(2000, 1, 1), pl.lit(_tomorrow())
        reasons |= {
            NO_TIME: time.is_null(),
            BAD_TIME: pl.col(DAY).is_null(),
            FAR_TIME: ~pl.col(DAY).is_between(first, last),
        }
    if columns.event:
        event = pl.col(columns.event).str.strip_chars().str.to_lowercase()
        known = [name.lower() for name in (*meaning.events, *meaning.ignored)]
        reasons[UNKNOWN_EVENT] = ~event.is_in(known).fill_null(False)
    if columns.position:
        reasons[BAD_POSITION] = pl.col(UNPLACED)
        reasons[NEGATIVE_POSITION] = pl.col(POSITION) < 0
    for name in columns.counts.values():
        column = pl.col(name)
        reasons[f"{BAD_COUNT}: {name}"] = _count(name).is_null() & column.is_not_null() & (column != "")
        reasons[f"{NEGATIVE_COUNT}: {name}"] = _count(name) < 0
    return reasons


def is_id(key: pl.Expr) -> pl.Expr:
    """Whether a query is an id, a number or a URL: nothing that an embedding could match by its meaning."""
    letters = key.str.len_chars()
    digits = key.str.count_matches(r"\d")
    code = key.str.contains(r"^[a-z0-9_-]{12,}$") & (2 * digits >= letters)
    hexadecimal = key.str.contains(_HEX) & (letters >= 16)
    return key.str.contains(_URL) | key.str.contains(_NUMBER) | key.str.contains(_UUID) | code | hexadecimal


# --- times --------------------------------------------------------------------------------------------------------


def _tomorrow() -> object:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(days=1)).date()


def _clock(kind: str) -> pl.Expr:
    import polars as pl

    return pl.lit(CLOCKS.index(kind), dtype=pl.UInt8)


def _day(name: str | None, schema: pl.Schema, meaning: Meaning) -> tuple[pl.Expr, pl.Expr]:
    """The day in the time zone of the knob, and in which of `CLOCKS` the time is written."""
    import polars as pl

    if name is None:
        return pl.lit(None, dtype=pl.Date), pl.lit(None, dtype=pl.UInt8)
    time, kind, zone = pl.col(name), schema[name], meaning.time_zone
    if kind == pl.Date:
        return time, _clock(DATE)
    if isinstance(kind, pl.Datetime):
        is_zoned = kind.time_zone is not None
        time = time.dt.convert_time_zone(zone) if is_zoned else time
        return time.dt.date(), _clock(ZONED if is_zoned else NAIVE)
    if kind.is_integer():
        is_date = time.is_between(19_000_101, 21_000_101)
        date = time.cast(pl.String).str.to_date("%Y%m%d", strict=False)
        return pl.when(is_date).then(date).otherwise(_day_of_number(time.cast(pl.Int64), zone)), (
            pl.when(is_date).then(_clock(DATE)).otherwise(_clock(EPOCH))
        )
    text = time.cast(pl.String).str.strip_chars()
    return _formatted_day(text, zone, meaning.time_format) if meaning.time_format else _day_of_text(text, zone)


def _formatted_day(text: pl.Expr, zone: str, form: str) -> tuple[pl.Expr, pl.Expr]:

    written = set(re.findall(_DIRECTIVE, form))
    if written & _WITH_ZONE:
        time = text.str.to_datetime(form, strict=False, time_zone="UTC").dt.convert_time_zone(zone)
        return time.dt.date(), _clock(ZONED)
    if "s" in written:
        time = text.str.to_datetime(form, strict=False).dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
        return time.dt.date(), _clock(EPOCH)
    if written & _WITH_TIME:
        return text.str.to_datetime(form, strict=False).dt.date(), _clock(NAIVE)
    return text.str.to_date(form, strict=False), _clock(DATE)


def _day_of_text(text: pl.Expr, zone: str) -> tuple[pl.Expr, pl.Expr]:
    import polars as pl

    date = text.str.extract(_DATE, 1).str.replace_all("/", "-").str.to_date("%Y-%m-%d", strict=False)
    compact = text.str.to_date("%Y%m%d", strict=False)
    number = text.str.extract(r"^(\d{10,16})(?:\.\d+)?$", 1).cast(pl.Int64, strict=False)
    epoch = _day_of_number(number, zone)
    zoned = (
        text.str.replace_all("/", "-").str.replace(" +", "T").str.replace(r"\s*(Z|UTC)$", "+00:00")
        .str.replace(r"\s*([+-]\d{2}):?(\d{2})$", "$1:$2")
        .str.replace(",", ".").str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_zone="UTC")
        .dt.convert_time_zone(zone).dt.date()
    )  # fmt: skip
    is_zoned, is_time = text.str.contains(_WHOLE_ZONED), text.str.contains(_WHOLE_TIME)
    is_date, is_compact = text.str.contains(_WHOLE_DATE), text.str.contains(r"^\d{8}$")
    is_epoch = text.str.contains(r"^\d{10,16}(\.\d+)?$")
    day = (
        pl.when(is_time | is_date).then(date).when(is_zoned).then(zoned).when(is_epoch).then(epoch)
        .when(is_compact).then(compact)
    )  # fmt: skip
    kind = (
        pl.when(is_time).then(_clock(NAIVE)).when(is_zoned).then(_clock(ZONED)).when(is_epoch).then(_clock(EPOCH))
        .otherwise(_clock(DATE))
    )  # fmt: skip
    return day, kind


def _day_of_number(number: pl.Expr, zone: str) -> pl.Expr:
    """The day of seconds, milliseconds or microseconds since 1970: 10, 13 or 16 digits in this century."""
    import polars as pl

    micro = pl.when(number < 10**11).then(number * 10**6).when(number < 10**14).then(number * 10**3).otherwise(number)
    return micro.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").dt.convert_time_zone(zone).dt.date()


def unknown_events(names: Sequence[str], meaning: Meaning) -> str:
    """What to do about events of unknown names: the nearest known one, or how to name them."""
    known = (*meaning.events, *meaning.ignored)
    shown = ", ".join(f"{name}{did_you_mean(name, known)}" for name in names)
    return f"{shown}. Known are {', '.join(known)}: give others a weight in event_weights, 0 to ignore them"
