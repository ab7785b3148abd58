"""A click log of a shop whose truth is known, from a seed; for tests, the sample data and benchmarks.

    python benchmarks/simulate_clicks.py --pairs train_text/queries.jsonl --out DIR     # events.csv.gz, items.jsonl
    python benchmarks/simulate_clicks.py --pairs train_text/zh/queries.jsonl --catalogue train_text/zh/catalogue \
        --searches 4000 --out DIR                                                       # events.csv.gz of its ids
    python benchmarks/simulate_clicks.py --rows 10000000 --out DIR                      # a large log, for speed

Users look at a position with a chance that falls with it (position-based model), and click a looked-at item with its
rate for the query: high for answers, low for others. Queries have a head and a tail; some sessions are bots, some
queries are ids or URLs, some are written in capitals, and a part of the rows is there twice.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("query", "item_id", "event", "time", "position", "session")
Row = tuple[str, str, str, str, int, str]


@dataclass(frozen=True)
class Shop:
    """What the log is made from.

    :ivar answers: the items that answer each query.
    :ivar neighbours: the items that are shown beside them, by query.
    """

    items: Mapping[str, str]
    answers: Mapping[str, Sequence[str]]
    neighbours: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Habits:
    """How users and the ranking behave; `propensities` holds the chance of a look by position."""

    searches: int = 6000
    shown: int = 5
    days: int = 28
    first_day: date = date(2026, 10, 1)
    zipf: float = 0.7
    answer_rate: float = 0.55
    noise_rate: float = 0.04
    order_share: float = 0.25
    bot_searches: int = 120
    id_share: float = 0.01
    capitals: float = 0.1
    twice: float = 0.01
    propensities: Sequence[float] = (1.0, 0.7, 0.5, 0.38, 0.3, 0.25, 0.2, 0.17)


def read_lines(file: Path) -> list[dict[str, str]]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ids_in(catalogue: Path) -> dict[str, str]:
    """The id of each description of a catalogue in Hive text."""
    ids = {}
    for file in sorted(catalogue.iterdir()):
        head, *lines = (line.split("\x01") for line in file.read_text(encoding="utf-8").splitlines())
        id_, text = head.index("item_id"), head.index("description")
        ids |= {fields[text]: fields[id_] for fields in lines}
    return ids


def shop_of(pairs: Sequence[Mapping[str, str]], known: Mapping[str, str] | None = None) -> Shop:
    """The shop of training rows with anchor, positive and category: each text is an item.

    :param known: the id of each text; None numbers them.
    """
    texts = dict.fromkeys(row["positive"] for row in pairs)
    ids = {text: known[text] if known else f"S{number:03d}" for number, text in enumerate(texts, 1)}
    kind = {ids[row["positive"]]: row["category"] for row in pairs}
    answers: dict[str, list[str]] = {}
    for row in pairs:
        answers.setdefault(row["anchor"], []).append(ids[row["positive"]])
    of_kind: dict[str, list[str]] = {}
    for item, category in kind.items():
        of_kind.setdefault(category, []).append(item)
    neighbours = {
        query: [item for item in of_kind[kind[found[0]]] if item not in found] for query, found in answers.items()
    }
    return Shop({item: text for text, item in ids.items()}, answers, neighbours)


def events(shop: Shop, habits: Habits, seed: int) -> Iterator[Row]:
    """The rows of the log, in order of time."""
    random = np.random.default_rng(seed)
    queries = list(shop.answers)
    random.shuffle(queries)
    chances = 1 / np.arange(1, len(queries) + 1) ** habits.zipf
    asked = random.choice(len(queries), habits.searches, p=chances / chances.sum())
    start = datetime.combine(habits.first_day, datetime.min.time(), UTC)
    seconds = np.sort(random.integers(0, habits.days * 86_400, habits.searches))
    for number, (place, second) in enumerate(zip(asked, seconds, strict=True)):
        time = start + timedelta(seconds=int(second))
        if random.random() < habits.id_share:
            yield _event(
                "https://shop.example/sale" if number % 2 else f"{10**9 + number}",
                next(iter(shop.items)),
                "click",
                time,
                1,
                f"u{number}",
            )
            continue
        yield from _search(shop, habits, random, queries[place], time=time, session=f"u{number}")
    for number in range(habits.bot_searches):  # one session that clicks everything
        time = start + timedelta(days=habits.days // 2, seconds=number)
        query = queries[number % len(queries)]
        for position, item in enumerate(_results(shop, habits, random, query), 1):
            yield _event(query, item, "impression", time, position, "bot")
            yield _event(query, item, "click", time, position, "bot")


def _search(
    shop: Shop, habits: Habits, random: np.random.Generator, query: str, *, time: datetime, session: str
) -> Iterator[Row]:
    shown = _otherwise(query) if random.random() < habits.capitals else query
    for position, item in enumerate(_results(shop, habits, random, query), 1):
        rate = habits.answer_rate if item in shop.answers[query] else habits.noise_rate
        rows = [_event(shown, item, "impression", time, position, session)]
        if random.random() < habits.propensities[position - 1] * rate:
            rows.append(_event(shown, item, "click", time + timedelta(seconds=5 * position), position, session))
            if rate == habits.answer_rate and random.random() < habits.order_share:
                rows.append(_event(shown, item, "order", time + timedelta(minutes=3), position, session))
        yield from rows
        if random.random() < habits.twice:
            yield rows[-1]


def _otherwise(query: str) -> str:
    """The same query as others write it: in capitals, or with a blank before it."""
    return query.upper() if query.upper() != query else f" {query}"


def _results(shop: Shop, habits: Habits, random: np.random.Generator, query: str) -> list[str]:
    """What the shop shows: the answers among neighbours, in an order that is right more often than not."""
    others = shop.neighbours[query]
    chosen = [*shop.answers[query], *random.choice(others, min(len(others), habits.shown), replace=False)][
        : habits.shown
    ]
    scores = random.normal(size=len(chosen)) + [1.0 if item in shop.answers[query] else 0.0 for item in chosen]
    return [chosen[number] for number in np.argsort(-scores)]


def _event(query: str, item: str, event: str, time: datetime, *place: Any) -> Row:
    position, session = place
    return query, item, event, f"{time:%Y-%m-%d %H:%M:%S}", position, session


# --- files --------------------------------------------------------------------------------------------------------


def write_log(shop: Shop, habits: Habits, seed: int, folder: Path) -> None:
    """Write `events.csv.gz`."""
    import csv
    import io

    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows(sorted(events(shop, habits, seed), key=lambda row: row[3]))
    with gzip.GzipFile(folder / "events.csv.gz", "wb", mtime=0) as out:  # equal runs write equal bytes
        out.write(text.getvalue().encode())


def write_items(shop: Shop, folder: Path) -> None:
    """Write `items.jsonl`, the catalogue of a shop that has no other."""
    lines = (
        json.dumps({"item_id": item, "description": text}, ensure_ascii=False) for item, text in shop.items.items()
    )
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_large(rows: int, folder: Path, seed: int = 0, batch: int = 2_000_000) -> None:
    """Write a log of this many events as Parquet files, and its catalogue: 3 million queries, 500,000 items."""
    import polars as pl

    queries, items = max(1000, rows // 33), max(100, rows // 200)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    looks = np.array(Habits().propensities)
    for number, first in enumerate(range(0, rows, batch)):
        size = min(batch, rows - first)
        query = (queries * random.random(size) ** 3).astype(np.int64)  # a head: the first tenth has half of the rows
        offset = random.integers(0, 12, size)
        item = (query * 7919 + offset * offset) % items
        position = random.integers(1, 9, size)
        click = random.random(size) < looks[position - 1] * np.where(offset < 2, 0.4, 0.03)
        time = 1_790_000_000 + (first + np.arange(size)) * (28 * 86_400) // rows
        frame = pl.DataFrame({"q": query, "i": item, "c": click, "time": time, "position": position})
        frame = frame.select(
            pl.format("product {} for use {}", pl.col("q"), pl.col("q") % 97).alias("query"),
            pl.format("item-{}", "i").alias("item_id"),
            pl.when("c").then(pl.lit("click")).otherwise(pl.lit("impression")).alias("event"),
            "time",
            "position",
            pl.format("s{}", (pl.int_range(pl.len()) + first) // 12).alias("session"),
        )
        frame.write_parquet(folder / "log" / f"part-{number:04d}.parquet")
    texts = pl.select(pl.int_range(items).alias("i")).select(
        pl.format("item-{}", "i").alias("item_id"),
        pl.format("the item of number {} and its description", "i").alias("description"),
    )
    texts.write_parquet(folder / "items.parquet")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="training rows with anchor, positive, category")
    parser.add_argument("--catalogue", type=Path, help="with --pairs: take the ids of its descriptions")
    parser.add_argument("--searches", type=int, default=Habits.searches)
    parser.add_argument("--rows", type=int, help="write a large log instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.rows:
        write_large(args.rows, args.out, args.seed)
    elif args.pairs:
        shop = shop_of(read_lines(args.pairs), ids_in(args.catalogue) if args.catalogue else None)
        write_log(shop, Habits(searches=args.searches), args.seed, args.out)
        if not args.catalogue:
            write_items(shop, args.out)
    else:
        sys.exit("give --pairs or --rows")


if __name__ == "__main__":
    main()
