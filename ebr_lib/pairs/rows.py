"""Rows of the log: what each means, or why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl

from ebr_lib.errors import DataError
from ebr_lib.names import did_you_mean
from ebr_lib.pairs.columns import (
    CLOCK,
    DAY,
    FILE,
    FITS,
    ITEM,
    KEY,
    POSITION,
    QUERY,
    RAW,
    REASON,
    SESSION,
    STAMP,
    USUAL,
)  # fmt: skip
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.sources import Table

UNKNOWN_EVENT, BAD_TIME, FAR_TIME = "unknown event", "time not read", "time before 2000 or after tomorrow"

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


def find_columns(table: Table, config: PairsConfig) -> Columns:
    """Find the columns of a log.

    :raises DataError: a column is missing; names the nearest, or those that are there.
    """
    found = {name: table.column(getattr(config, f"{name}_column"), usual, f"{name}_column")
             for name, usual in USUAL.items()}  # fmt: skip
    query = found["query"] or table.need(None, USUAL["query"], "query_column")
    item = found["item"] or table.need(None, USUAL["item"], "item_column")
    if item == query:
        raise DataError(f"{table.place}: query_column and item_column are both {item}; name the other one")
    counts = {} if found["event"] else {of: name for of, name in config.count_columns.items() if name in table.columns}
    if not found["event"] and config.click not in counts:
        raise DataError(
            f"{table.place}: has neither an event per row (looked for {', '.join(USUAL['event'])}; event_column) nor "
            f"counts (looked for {', '.join(config.count_columns.values())}; count_columns); found "
            f"{', '.join(table.columns)}"
        )
    session = found["session"] if found["event"] else None
    return Columns(query, item, found["event"], found["time"], found["position"], session, counts)


# --- meaning ------------------------------------------------------------------------------------------------------


def marked_rows(table: Table, columns: Columns, config: PairsConfig) -> pl.LazyFrame:
    """Each row with its normalised query as `KEY`, its day, a hash that equal rows share, and `REASON` where it cannot
    be used; `n_<event>` columns hold its counts."""
    frame = table.scan(columns.read, columns.time)
    none = pl.lit(None, dtype=pl.String)
    query, item = pl.col(columns.query), pl.col(columns.item).str.strip_chars()
    session = pl.col(columns.session) if columns.session else none
    day, clock = _day(columns.time, frame.collect_schema(), config)
    place = pl.col(columns.position).str.strip_chars() if columns.position else none
    number = place.cast(pl.Float64, strict=False)
    # these differ between two events of one query and item; between two counts, the counts may too
    telling = [name for name in (columns.time, columns.session, columns.position, columns.event) if name]
    frame = frame.with_columns(
        (query.str.strip_chars() if config.query_is_item else query_key(query)).alias(KEY),
        item.alias(ITEM),
        query.alias(QUERY),
        day.alias(DAY),
        clock.alias(CLOCK),
        pl.when(number == number.floor()).then(number.cast(pl.Int32, strict=False)).alias(POSITION),  # 3 for 3.0 too
        pl.when(session != "").then(session.hash(seed=1)).alias(SESSION),
        pl.struct([*telling, *columns.counts.values()] or [columns.item]).hash(seed=2).alias(STAMP),
        *(_count_of(event, columns).alias(f"n_{event}") for event in config.events),
    )
    reasons = _reasons(columns, config)
    reason = pl.coalesce(pl.when(condition).then(pl.lit(text)) for text, condition in reasons.items())
    is_bad = pl.col(REASON).is_not_null()
    fields = [pl.when(is_bad).then(name).cast(pl.String).fill_null("") for name in columns.read]
    return frame.with_columns(reason.alias(REASON)).select(
        KEY, QUERY, ITEM, DAY, CLOCK, POSITION, SESSION, STAMP, *(f"n_{event}" for event in config.events), REASON,
        pl.when(is_bad).then(pl.concat_str(fields, separator="\x01")).alias(RAW),
        pl.when(is_bad).then(FILE).alias(FILE),
    )  # fmt: skip


def query_key(query: pl.Expr) -> pl.Expr:
    """The form in which equal queries are equal: as `data.text.normalised`, with lower case for casefolding."""
    text = query.str.normalize("NFKC").str.to_lowercase().str.replace_all(_ZERO_WIDTH, "")
    return text.str.replace_all(_ODD_SPACE, " ").str.strip_chars(" ")


def _event(columns: Columns) -> pl.Expr:
    return pl.col(str(columns.event)).str.strip_chars().str.to_lowercase()


def _count_of(event: str, columns: Columns) -> pl.Expr:
    if columns.event:
        return (_event(columns) == event.lower()).fill_null(False).cast(pl.Int64)
    if event not in columns.counts:
        return pl.lit(0, dtype=pl.Int64)
    return _count(columns.counts[event]).fill_null(0)


def _count(name: str) -> pl.Expr:
    return pl.col(name).str.strip_chars().cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)


def _reasons(columns: Columns, config: PairsConfig) -> dict[str, pl.Expr]:
    """Why a row cannot be used: the first that holds counts."""
    key, item, day = pl.col(KEY), pl.col(ITEM), pl.col(DAY)
    reasons = {
        "wrong number of fields": ~pl.col(FITS),
        "not UTF-8": pl.any_horizontal(pl.col(QUERY, ITEM).str.contains("\ufffd", literal=True)),
        "no query": key.is_null() | (key == ""),
        "no item": item.is_null() | (item == ""),
    }
    if columns.time:
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
        reasons |= {
            "no time": pl.col(columns.time).is_null(),
            BAD_TIME: day.is_null(),
            FAR_TIME: ~day.is_between(pl.date(2000, 1, 1), pl.lit(tomorrow)),
        }
    if columns.event:
        known = [name.lower() for name in config.known_events]
        reasons[UNKNOWN_EVENT] = ~_event(columns).is_in(known).fill_null(False)
    if columns.position:
        is_placed = (pl.col(columns.position).str.strip_chars() != "").fill_null(False)
        reasons["position is not a whole number"] = pl.col(POSITION).is_null() & is_placed
        reasons["negative position"] = pl.col(POSITION) < 0
    for name in columns.counts.values():
        column = pl.col(name)
        reasons[f"count is not a number: {name}"] = _count(name).is_null() & column.is_not_null() & (column != "")
        reasons[f"negative count: {name}"] = _count(name) < 0
    return reasons


def is_id(key: pl.Expr) -> pl.Expr:
    """Whether a query is an id, a number or a URL: nothing that an embedding could match by its meaning."""
    letters = key.str.len_chars()
    digits = key.str.count_matches(r"\d")
    code = key.str.contains(r"^[a-z0-9_-]{12,}$") & (2 * digits >= letters)
    hexadecimal = key.str.contains(_HEX) & (letters >= 16)
    return key.str.contains(_URL) | key.str.contains(_NUMBER) | key.str.contains(_UUID) | code | hexadecimal


def unknown_events(names: Sequence[str], config: PairsConfig) -> str:
    """What to do about events of unknown names: the nearest known one, or how to name them."""
    known = config.known_events
    shown = ", ".join(f"{name}{did_you_mean(name, known)}" for name in names)
    return f"{shown}. Known are {', '.join(known)}: give others a weight in event_weights, 0 to ignore them"


# --- times --------------------------------------------------------------------------------------------------------


def _clock(kind: str) -> pl.Expr:
    return pl.lit(CLOCKS.index(kind), dtype=pl.UInt8)


def _day(name: str | None, schema: pl.Schema, config: PairsConfig) -> tuple[pl.Expr, pl.Expr]:
    """The day in the time zone of the knob, and in which of `CLOCKS` the time is written."""
    if name is None:
        return pl.lit(None, dtype=pl.Date), pl.lit(None, dtype=pl.UInt8)
    time, kind, zone = pl.col(name), schema[name], config.time_zone
    if kind == pl.Date:
        return time, _clock(DATE)
    if isinstance(kind, pl.Datetime):
        is_zoned = kind.time_zone is not None
        time = time.dt.convert_time_zone(zone) if is_zoned else time
        return time.dt.date(), _clock(ZONED if is_zoned else NAIVE)
    if kind.is_integer():
        is_date = time.is_between(19_000_101, 21_000_101)
        date = time.cast(pl.String).str.to_date("%Y%m%d", strict=False)
        day = pl.when(is_date).then(date).otherwise(_day_of_number(time.cast(pl.Int64), zone))
        return day, pl.when(is_date).then(_clock(DATE)).otherwise(_clock(EPOCH))
    text = time.cast(pl.String).str.strip_chars()
    return _formatted_day(text, zone, config.time_format) if config.time_format else _day_of_text(text, zone)


def _formatted_day(text: pl.Expr, zone: str, form: str) -> tuple[pl.Expr, pl.Expr]:
    written = set(re.findall(_DIRECTIVE, form))
    if written & _WITH_ZONE or "s" in written:
        time = text.str.to_datetime(form, strict=False, time_zone="UTC").dt.convert_time_zone(zone)
        return time.dt.date(), _clock(ZONED if written & _WITH_ZONE else EPOCH)
    if written & _WITH_TIME:
        return text.str.to_datetime(form, strict=False).dt.date(), _clock(NAIVE)
    return text.str.to_date(form, strict=False), _clock(DATE)


def _day_of_text(text: pl.Expr, zone: str) -> tuple[pl.Expr, pl.Expr]:
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
    micro = pl.when(number < 10**11).then(number * 10**6).when(number < 10**14).then(number * 10**3).otherwise(number)
    return micro.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").dt.convert_time_zone(zone).dt.date()
