# ruff: noqa: S608 - the query is written for the user, who runs it
"""HiveQL and Spark SQL that counts a log into this stage's input, for logs that are too large to copy."""

from __future__ import annotations

from collections.abc import Mapping

from ebr_lib.pairs.rows import Columns, Meaning

_HEAD = """\
-- Counts per query, item, day and position: a log for the stage that makes training pairs. HiveQL and Spark SQL.
-- Export the result as Parquet, or as \\001 text with these column names, and set log_path to it.
-- Times must be dates, timestamps or ISO 8601 text in the time zone of the days; offsets are not converted.
"""
_HAS_CLOCK = "(LENGTH(stamp) > 10 OR (LENGTH(stamp) = 10 AND stamp NOT LIKE '%-%' AND stamp NOT LIKE '%/%'))"


def aggregation_sql(
    table: str,
    columns: Columns,
    meaning: Meaning,
    counts: Mapping[str, str],
    *,
    drop_duplicates: bool,
    max_session_events: int,
) -> str:
    """A query that makes a log of counts out of a table of events; the stage makes the same pairs of both.

    Equal rows and bot-like sessions are left out as the stage does. Queries keep their spelling, and ids stay in: the
    stage merges and drops these when it reads the counts.

    :param counts: the column of each event in the result.
    """
    keys = ["query", "item_id", *(["day"] if columns.time else []), *(["position"] if columns.position else [])]
    steps = {"rows_read": _rows_read(table, columns, meaning)}
    if columns.session and max_session_events:
        of = ["session", *(["day"] if columns.time else [])]
        steps["bots"] = (
            f"SELECT {', '.join(of)} FROM rows_read WHERE session <> ''\n"
            f"  GROUP BY {', '.join(of)} HAVING COUNT(*) > {max_session_events}"
        )
        same = " AND ".join(f"r.{name} = b.{name}" for name in of)
        steps["of_people"] = f"SELECT r.* FROM rows_read r LEFT JOIN bots b ON {same}\n  WHERE b.session IS NULL"
    if drop_duplicates and (columns.session or columns.time):
        steps["counted_once"] = _counted_once(list(steps)[-1], keys, columns)
    ctes = ",\n".join(f"{name} AS (\n  {query}\n)" for name, query in steps.items())
    sums = ",\n".join(
        f"  SUM(CASE WHEN event = '{event.lower()}' THEN 1 ELSE 0 END) AS {counts.get(event, event)}"
        for event in meaning.events
    )
    grouped = ", ".join(keys)
    return f"{_HEAD}WITH {ctes}\nSELECT {grouped},\n{sums}\nFROM {list(steps)[-1]}\nGROUP BY {grouped}\n"


def _rows_read(table: str, columns: Columns, meaning: Meaning) -> str:
    event = f"LOWER(TRIM({columns.event}))"
    stamp = f"CAST({columns.time} AS STRING)"
    chosen = {
        "query": columns.query,
        "item_id": columns.item,
        "event": event,
        **({"stamp": stamp, "day": f"SUBSTR({stamp}, 1, 10)"} if columns.time else {}),
        **({"position": columns.position} if columns.position else {}),
        **({"session": columns.session} if columns.session else {}),
    }
    names = ", ".join(old if old == new else f"{old} AS {new}" for new, old in chosen.items())
    known = ", ".join(f"'{name.lower()}'" for name in (*meaning.events, *meaning.ignored))
    wanted = " AND ".join(f"{name} IS NOT NULL" for name in (columns.query, columns.item, columns.time) if name)
    return f"SELECT {names}\n  FROM {table}\n  WHERE {event} IN ({known}) AND {wanted}"


def _counted_once(source: str, keys: list[str], columns: Columns) -> str:
    """Equal rows once, if they have a session or a time of day: otherwise they may be several events."""
    names = [*keys, "event", *(["stamp"] if columns.time else []), *(["session"] if columns.session else [])]
    distinguished = [*(["session <> ''"] if columns.session else []), *([_HAS_CLOCK] if columns.time else [])]
    once = f"COALESCE({' OR '.join(distinguished)}, FALSE)"
    chosen = f"{', '.join(names)} FROM {source} WHERE"
    return f"SELECT DISTINCT {chosen} {once}\n  UNION ALL\n  SELECT {chosen} NOT {once}"
