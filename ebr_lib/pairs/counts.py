"""From rows to counts per query, item, day and position, in bounded memory.

Rows are dealt into parts by a hash of their query, so that every count of a query is in one part, and each part fits
in memory whatever the size of the log. Equal rows are in one part too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_lib.pairs.rows import (
    BOT,
    CLOCK,
    CLOCKS,
    DATE,
    DAY,
    ID_QUERY,
    ITEM,
    KEY,
    POSITION,
    QUERY,
    RAW,
    REASON,
    SESSION,
    STAMP,
    UNKNOWN_EVENT,
    is_id,
)
from ebr_lib.pairs.sources import FILE

if TYPE_CHECKING:
    import polars as pl

BYTES_PER_PART = 100 << 20  # of text; in memory a part takes a few times as much
MOST_PARTS = 512
ROW_GROUP = 20_000  # held of each part
REJECTED = -1  # the part of rows that cannot be used
CELL = (KEY, ITEM, DAY, POSITION)
SHOWN = 3  # examples of each reason


@dataclass
class Counted:
    """The log as counts.

    :ivar parts: files of counts (`CELL`, then `n_<event>`), each with all of its queries.
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

    def cells(self, part: Path) -> pl.DataFrame:
        """The counts of one part."""
        import polars as pl

        return pl.read_parquet(part)

    def names_of(self, keys: pl.DataFrame) -> pl.DataFrame:
        """The most frequent spelling of each query of `keys`."""
        import polars as pl

        return pl.concat([pl.scan_parquet(path) for path in self.names]).join(keys.lazy(), on=KEY, how="semi").collect()


def bot_sessions(rows: pl.LazyFrame, most: int) -> pl.DataFrame:
    """Sessions with more rows on one day than `most`, as hashes."""
    import polars as pl

    busy = rows.filter(pl.col(SESSION).is_not_null()).group_by(SESSION, DAY).len().filter(pl.col("len") > most)
    return busy.select(SESSION, DAY).collect(engine="streaming")


def count_rows(
    rows: pl.LazyFrame,
    events: Sequence[str],
    spill: Path,
    size: int,
    bots: pl.DataFrame | None,
    *,
    drop_duplicates: bool,
    drop_ids: bool,
) -> Counted:
    """Count the rows of a log.

    :param rows: as `marked_rows` gives them.
    :param events: names of the counts.
    :param spill: folder for the parts.
    :param size: bytes of the log's text, which sets the number of parts.
    :param bots: sessions and days that are left out.
    :param drop_duplicates: count equal rows once, if they have a time of day or a session.
    :param drop_ids: leave out queries that are ids, numbers or URLs.
    """
    import polars as pl

    if bots is not None and len(bots):
        marked = bots.lazy().with_columns(pl.lit(True).alias("is_bot"))
        # nulls are equal in a log without times
        rows = rows.join(marked, on=[SESSION, DAY], how="left", nulls_equal=True, maintain_order="left")
        is_bot = pl.col("is_bot").fill_null(False) & pl.col(REASON).is_null()
        rows = rows.with_columns(pl.when(is_bot).then(pl.lit(BOT)).otherwise(pl.col(REASON)).alias(REASON)).drop(
            "is_bot"
        )
    parts = min(MOST_PARTS, 1 + size // BYTES_PER_PART)
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
        _count_part(counted, files, events, spill, drop_duplicates=drop_duplicates, drop_ids=drop_ids)
        for file in files:
            file.unlink()
    return counted


def _count_rejected(counted: Counted, files: list[Path]) -> None:
    import polars as pl

    counted.rejected = list(files)
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


def _count_part(
    counted: Counted,
    files: list[Path],
    events: Sequence[str],
    spill: Path,
    *,
    drop_duplicates: bool,
    drop_ids: bool,
) -> None:
    import polars as pl

    numbers = [f"n_{event}" for event in events]
    frame = pl.read_parquet(files, columns=[KEY, QUERY, ITEM, DAY, CLOCK, POSITION, SESSION, STAMP, *numbers])
    counted.rows += len(frame)
    counted.clocks.update(dict(frame.group_by(CLOCK).len().drop_nulls().iter_rows()))
    if drop_duplicates:
        frame = _once(counted, frame)
    if drop_ids:
        frame = _without_ids(counted, frame)
    counted.used += len(frame)
    first = frame[POSITION].min()
    if isinstance(first, int):
        counted.first_position = min(first, counted.first_position) if counted.positions else first
        counted.positions += int(frame[POSITION].is_not_null().sum())
    counted.days |= set(frame[DAY].drop_nulls().unique())
    for event, number in zip(events, numbers, strict=True):
        counted.events[event] += int(frame[number].sum())
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
    import polars as pl

    can_tell = pl.col(CLOCK).ne(CLOCKS.index(DATE)).fill_null(False) | pl.col(SESSION).is_not_null()
    kept = pl.concat([frame.filter(can_tell).unique([QUERY, ITEM, STAMP]), frame.filter(~can_tell)])
    counted.duplicates += len(frame) - len(kept)
    return kept


def _without_ids(counted: Counted, frame: pl.DataFrame) -> pl.DataFrame:
    """Leave out queries that look like ids, or are the id of an item that was shown for them."""
    import polars as pl

    keys = frame.select(KEY).unique().filter(is_id(pl.col(KEY)))
    own = frame.filter(pl.col(KEY) == pl.col(ITEM).str.to_lowercase()).select(KEY).unique()
    ids = pl.concat([keys, own]).unique()
    kept = frame.join(ids, on=KEY, how="anti")
    if len(ids):
        counted.reasons[ID_QUERY] += len(frame) - len(kept)
        shown = counted.examples.setdefault(ID_QUERY, [])
        shown += ids[KEY].sort().head(SHOWN - len(shown)).to_list()
    return kept


def rejected_rows(counted: Counted, decisions: Sequence[str]) -> Iterator[pl.LazyFrame]:
    """Rows that cannot be used, with file and reason; not those that a decision left out."""
    import polars as pl

    row = pl.col(RAW).str.replace_all("\x01", "\t", literal=True)
    for file in counted.rejected:
        kept = pl.scan_parquet(file).filter(~pl.col(REASON).is_in(list(decisions)))
        yield kept.select(pl.col(FILE).alias("file"), pl.col(REASON).alias("reason"), row.alias("row"))
