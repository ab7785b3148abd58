"""From rows to counts per query, item, day and position, in bounded memory.

Rows are dealt into parts by a hash of their query, so that every count of a query is in one part, and each part fits
in memory whatever the size of the log. Equal rows are in one part too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import polars as pl

from ebr_lib.pairs.columns import CLOCK, DAY, FILE, ITEM, KEY, POSITION, QUERY, RAW, REASON, SESSION, STAMP
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.rows import CLOCKS, DATE, UNKNOWN_EVENT, Columns, is_id, marked_rows
from ebr_lib.pairs.sources import Table

BYTES_PER_PART = 100 << 20  # of text; in memory a part takes a few times as much
MOST_PARTS = 512
ROW_GROUP = 20_000  # held of each part
REJECTED = -1  # the part of rows that cannot be used
CELL = (KEY, ITEM, DAY, POSITION)
SHOWN = 3  # examples of each reason
# why a row is left out by a decision
ID_QUERY, BOT = "query is an id, a number or a URL", "bot-like session"


@dataclass
class Counted:
    """The log as counts.

    :ivar parts: files of counts (`CELL`, then `n_<event>`), each with all of its queries.
    :ivar names: files with the most frequent spelling of each query.
    :ivar reasons: rows left out, by reason; `examples` has a few of each.
    :ivar events: totals of the rows used.
    :ivar clocks: rows by the way in which their times are written, as numbered in `rows.CLOCKS`.
    :ivar spellings: distinct queries before equal ones were merged.
    """

    parts: list[Path] = field(default_factory=list)
    names: list[Path] = field(default_factory=list)
    rejected: list[Path] = field(default_factory=list)
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    used: int = 0
    events: Counter[str] = field(default_factory=Counter)
    clocks: Counter[int] = field(default_factory=Counter)
    days: set[date] = field(default_factory=set)
    spellings: int = 0
    queries: int = 0
    positions: int = 0
    first_position: int = 1
    unknown_events: list[str] = field(default_factory=list)


def count_rows(log: Table, columns: Columns, config: PairsConfig, spill: Path) -> Counted:
    """Count the rows of a log; `spill` is the folder for the parts."""
    rows = _with_bots(marked_rows(log, columns, config), config.max_session_events if columns.session else 0)
    parts = min(MOST_PARTS, 1 + log.size // BYTES_PER_PART)
    part = pl.when(pl.col(REASON).is_null()).then(pl.col(KEY).hash(seed=3) % parts).cast(pl.Int32).fill_null(REJECTED)
    folder = spill / "rows"
    rows.with_columns(part.alias("part")).sink_parquet(
        pl.PartitionBy(folder, key="part", include_key=False), compression="lz4", mkdir=True, maintain_order=True,
        row_group_size=ROW_GROUP,
    )  # fmt: skip
    counted = Counted()
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = sorted(place.iterdir())
        if place.name.endswith(f"={REJECTED}"):
            _count_rejected(counted, files)
            continue
        _count_part(counted, files, config, spill)
        for file in files:
            file.unlink()
    return counted


def _with_bots(rows: pl.LazyFrame, most: int) -> pl.LazyFrame:
    """Rows with a reason also for those of sessions with more than `most` rows on one day; 0 leaves all."""
    if not most:
        return rows
    busy = rows.filter(pl.col(SESSION).is_not_null()).group_by(SESSION, DAY).len().filter(pl.col("len") > most)
    bots = busy.select(SESSION, DAY, pl.lit(BOT).alias("bot")).collect(engine="streaming")
    if not len(bots):
        return rows
    # nulls are equal in a log without times
    rows = rows.join(bots.lazy(), on=[SESSION, DAY], how="left", nulls_equal=True, maintain_order="left")
    return rows.with_columns(pl.coalesce(REASON, "bot").alias(REASON)).drop("bot")


def _count_rejected(counted: Counted, files: list[Path]) -> None:
    counted.rejected = files
    found = pl.scan_parquet(files).group_by(REASON).agg(pl.len(), pl.col(RAW).drop_nulls().unique().sort().head(SHOWN))
    for reason, count, raw in found.collect(engine="streaming").iter_rows():
        counted.reasons[reason] = count
        counted.examples[reason] = [" ".join(text.split("\x01")) for text in raw]
        counted.rows += count
    # fields are in the order of `Columns.read`: query, item, event
    events = (
        pl.scan_parquet(files).filter(pl.col(REASON) == UNKNOWN_EVENT).select(pl.col(RAW).str.split("\x01").list.get(2))
    )
    names = events.group_by(RAW).len().sort("len", RAW, descending=[True, False]).head(SHOWN)
    counted.unknown_events = names.collect(engine="streaming")[RAW].to_list()


def _count_part(counted: Counted, files: list[Path], config: PairsConfig, spill: Path) -> None:
    numbers = [f"n_{event}" for event in config.events]
    frame = pl.read_parquet(files, columns=[*CELL, QUERY, CLOCK, SESSION, STAMP, *numbers])
    counted.rows += len(frame)
    counted.clocks.update(dict(frame.group_by(CLOCK).len().drop_nulls().iter_rows()))
    if config.drop_duplicates:
        frame = _once(counted, frame)
    if config.drop_id_queries and not config.query_is_item:
        frame = _without_ids(counted, frame)
    counted.used += len(frame)
    first = frame[POSITION].min()
    if isinstance(first, int):
        counted.first_position = min(first, counted.first_position) if counted.positions else first
        counted.positions += frame[POSITION].count()
    counted.days |= set(frame[DAY].drop_nulls().unique())
    counted.events.update({event: int(frame[f"n_{event}"].sum()) for event in config.events})
    spelled = frame.group_by(KEY, QUERY).agg(pl.sum_horizontal(numbers).sum().alias("events"))
    most = spelled.sort("events", QUERY, descending=[True, False]).unique(KEY, keep="first", maintain_order=True)
    counted.spellings += len(spelled)
    counted.queries += len(most)
    place = len(counted.parts)
    counted.parts.append(spill / f"cells-{place}.parquet")
    counted.names.append(spill / f"names-{place}.parquet")
    frame.group_by(CELL).agg(pl.col(numbers).sum()).write_parquet(counted.parts[-1], compression="lz4")
    most.select(KEY, QUERY).write_parquet(counted.names[-1], compression="lz4")


def _once(counted: Counted, frame: pl.DataFrame) -> pl.DataFrame:
    """Equal rows once; rows with a date alone and no session may be equal by chance, and stay."""
    can_tell = pl.col(CLOCK).ne(CLOCKS.index(DATE)).fill_null(False) | pl.col(SESSION).is_not_null()
    kept = pl.concat([frame.filter(can_tell).unique([QUERY, ITEM, STAMP]), frame.filter(~can_tell)])
    counted.duplicates += len(frame) - len(kept)
    return kept


def _without_ids(counted: Counted, frame: pl.DataFrame) -> pl.DataFrame:
    """Leave out queries that look like ids, or are the id of an item that was shown for them."""
    keys = frame.select(KEY).unique().filter(is_id(pl.col(KEY)))
    own = frame.filter(pl.col(KEY) == pl.col(ITEM).str.to_lowercase()).select(KEY).unique()
    ids = pl.concat([keys, own]).unique()
    kept = frame.join(ids, on=KEY, how="anti")
    if len(ids):
        counted.reasons[ID_QUERY] += len(frame) - len(kept)
        shown = counted.examples.setdefault(ID_QUERY, [])
        shown += ids[KEY].sort().head(SHOWN - len(shown)).to_list()
    return kept


def rejected_rows(counted: Counted) -> Iterator[pl.LazyFrame]:
    """Rows that cannot be used, with file and reason; not those that a decision left out."""
    row = pl.col(RAW).str.replace_all("\x01", "\t", literal=True)
    for file in counted.rejected:
        kept = pl.scan_parquet(file).filter(pl.col(REASON) != BOT)
        yield kept.select(pl.col(FILE).alias("file"), pl.col(REASON).alias("reason"), row.alias("row"))
