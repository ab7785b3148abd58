# ruff: noqa: S608 - the query is written for the user, who runs it
"""HiveQL and Spark SQL that counts a log into this stage's input, for logs that are too large to copy."""

from __future__ import annotations

from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.rows import Columns

_HEAD = """\
-- Counts per query, item, day and position: a log for the stage that makes training pairs. HiveQL and Spark SQL.
-- Export the result as Parquet, or as \\001 text with these column names, and set log_path to it.
-- Times must be dates, timestamps or ISO 8601 text in the time zone of the days; offsets are not converted.
"""
_HAS_CLOCK = "(LENGTH(stamp) > 10 OR (LENGTH(stamp) = 10 AND stamp NOT LIKE '%-%' AND stamp NOT LIKE '%/%'))"


def aggregation_sql(table: str, columns: Columns, config: PairsConfig) -> str:
    """A query that makes a log of counts out of a table of events; the stage makes the same pairs of both.

    Equal rows and bot-like sessions are left out as the stage does. Queries keep their spelling, and ids stay in: the
    stage merges and drops these when it reads the counts.
    """
    event = f"LOWER(TRIM({columns.event}))"
    stamp = f"CAST({columns.time} AS STRING)" if columns.time else None
    read = {
        "query": columns.query,
        "item_id": columns.item,
        "event": event,
        "stamp": stamp,
        "day": stamp and f"SUBSTR({stamp}, 1, 10)",
        "position": columns.position,
        "session": columns.session,
    }
    there = [name for name, of in read.items() if of]
    chosen = ", ".join(of if of == name else f"{of} AS {name}" for name, of in read.items() if of)
    known = ", ".join(f"'{name.lower()}'" for name in config.known_events)
    wanted = " AND ".join(f"{name} IS NOT NULL" for name in (columns.query, columns.item, columns.time) if name)
    steps = {"rows_read": f"SELECT {chosen}\n  FROM {table}\n  WHERE {event} IN ({known}) AND {wanted}"}
    if columns.session and config.max_session_events:
        of_bot = [name for name in ("session", "day") if name in there]
        steps["bots"] = (
            f"SELECT {', '.join(of_bot)} FROM rows_read WHERE session <> ''\n"
            f"  GROUP BY {', '.join(of_bot)} HAVING COUNT(*) > {config.max_session_events}"
        )
        same = " AND ".join(f"r.{name} = b.{name}" for name in of_bot)
        steps["of_people"] = f"SELECT r.* FROM rows_read r LEFT JOIN bots b ON {same}\n  WHERE b.session IS NULL"
    keys = [name for name in ("query", "item_id", "day", "position") if name in there]
    if config.drop_duplicates and (columns.session or columns.time):
        # equal rows once, if they have a session or a time of day: otherwise they may be several events
        names = [*keys, *(name for name in ("event", "stamp", "session") if name in there)]
        telling = [*(["session <> ''"] if columns.session else []), *([_HAS_CLOCK] if columns.time else [])]
        once = f"COALESCE({' OR '.join(telling)}, FALSE)"
        rows = f"{', '.join(names)} FROM {list(steps)[-1]} WHERE"
        steps["counted_once"] = f"SELECT DISTINCT {rows} {once}\n  UNION ALL\n  SELECT {rows} NOT {once}"
    ctes = ",\n".join(f"{name} AS (\n  {query}\n)" for name, query in steps.items())
    sums = ",\n".join(
        f"  SUM(CASE WHEN event = '{name.lower()}' THEN 1 ELSE 0 END) AS {config.count_columns.get(name, name)}"
        for name in config.events
    )
    grouped = ", ".join(keys)
    return f"{_HEAD}WITH {ctes}\nSELECT {grouped},\n{sums}\nFROM {list(steps)[-1]}\nGROUP BY {grouped}\n"
