"""Which pairs of the counts are trained on or measured, and how much each weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.data.text import language_of
from ebr_lib.pairs.bias import Bias, estimate_propensities
from ebr_lib.pairs.counts import Counted
from ebr_lib.pairs.rows import DAY, ITEM, KEY, POSITION

if TYPE_CHECKING:
    from datetime import date

    import polars as pl

MOST_CELLS = 1_000_000  # that position bias is estimated from
IMPRESSIONS, EXAMINED, CLICKS, SCORE, GRADE = "impressions", "examined", "clicks", "score", "grade"
RATE, WEIGHT, LANGUAGE, TEXT, LOOK = "rate", "weight", "language", "text", "look"
SALT = 11  # of hashes that choose at random

Step = tuple[str, int, int]
"""A step of the funnel: its name, how many pairs were left out, how many are left."""


@dataclass(frozen=True)
class Rules:
    """How pairs are chosen; the fields are knobs of the stage.

    :ivar events: event to its weight, those above 0 alone; the lightest is the click.
    """

    events: Mapping[str, float]
    impression: str
    min_impressions: int
    min_clicks: int
    min_ctr_ratio: float
    prior_strength: float
    max_correction: float
    half_life_days: float | None

    @property
    def click(self) -> str:
        """The lightest event."""
        return min(self.events, key=lambda name: self.events[name])


@dataclass(frozen=True)
class Chosen:
    """Pairs of a window of days: `KEY`, `ITEM`, counts, `SCORE`, `RATE`; and how they became so few.

    :ivar mean_rate: the log's click rate, corrected for position; None without impressions or clicks.
    """

    pairs: pl.DataFrame
    steps: tuple[Step, ...]
    mean_rate: float | None


def estimated_bias(counted: Counted, rules: Rules, last: date | None) -> Bias:
    """Estimate the propensities from clicked pairs that were shown at several positions up to the day `last`; none if
    they are too few."""
    import polars as pl

    shown, clicked = f"n_{rules.impression}", f"n_{rules.click}"
    window = pl.lit(True) if last is None else pl.col(DAY) <= last
    found, cells = [], 0
    for part in counted.parts:
        frame = counted.cells(part).filter(window, pl.col(POSITION).is_not_null() & (pl.col(shown) > 0))
        frame = frame.join(frame.filter(pl.col(clicked) > 0).select(KEY, ITEM).unique(), on=[KEY, ITEM], how="semi")
        frame = frame.group_by(KEY, ITEM, POSITION).agg(pl.col(shown, clicked).sum())
        several = pl.len().over(KEY, ITEM) > 1
        found.append(
            frame.filter(several).select(pl.struct(KEY, ITEM).hash(seed=4).alias("pair"), POSITION, shown, clicked)
        )
        cells += len(found[-1])
        if cells > MOST_CELLS:  # parts are random samples of the queries
            break
    frame = pl.concat(found).sort("pair", POSITION)  # sums of fractions depend on the order
    pair = frame["pair"].rank("dense").cast(pl.Int64).to_numpy()
    propensities = estimate_propensities(
        pair,
        frame[POSITION].cast(pl.Int64).to_numpy(),
        frame[shown].cast(pl.Float64).to_numpy(),
        frame[clicked].cast(pl.Float64).to_numpy(),
    )
    if not propensities:
        return Bias({}, "none: too few clicks on items that were shown at several positions")
    return Bias(propensities, f"estimated from {frame[clicked].sum()} clicks of items shown at several positions")


def choose_pairs(counted: Counted, rules: Rules, bias: Bias, first: date | None, last: date | None) -> Chosen:
    """Choose the pairs of the days from `first` to `last`, both included; None: from the start, to the end."""
    import polars as pl

    window = pl.lit(True)
    if first is not None:
        window = window & (pl.col(DAY) >= first)
    if last is not None:
        window = window & (pl.col(DAY) <= last)
    frames, shown, examined, clicks = [], 0, 0.0, 0
    for part in counted.parts:
        pairs = _scored(counted.cells(part).filter(window), rules, bias, last)
        shown += len(pairs)
        examined += fsum(pairs[EXAMINED])
        clicks += int(pairs[f"n_{rules.click}"].sum())
        frames.append(pairs.filter(pl.col(CLICKS) > 0))
    pairs = pl.concat(frames).sort(KEY, ITEM)
    steps = [("pairs shown or clicked", 0, shown), ("never clicked", shown - len(pairs), len(pairs))]
    mean = clicks / examined if clicks and examined > 0 and counted.events[rules.impression] else None
    pairs = _with_rate(pairs, rules, mean)
    conditions = {
        "fewer than min_impressions": pl.col(IMPRESSIONS) >= rules.min_impressions,
        "fewer than min_clicks": pl.col(CLICKS) >= rules.min_clicks,
        "click rate below min_ctr_ratio": pl.lit(mean is None) | (pl.col(RATE) >= rules.min_ctr_ratio),
    }
    for name, condition in conditions.items():
        before, pairs = len(pairs), pairs.filter(condition)
        steps.append((name, before - len(pairs), len(pairs)))
    return Chosen(pairs, tuple(steps), mean)


def _scored(cells: pl.DataFrame, rules: Rules, bias: Bias, last: date | None) -> pl.DataFrame:
    """Counts per pair, corrected for position: looks instead of impressions, and the worth of its events as `SCORE`."""
    import polars as pl

    impression, events = f"n_{rules.impression}", list(rules.events)
    cells = cells.sort(DAY, POSITION)  # one order within each pair: sums of fractions depend on it
    cells, look = cells.with_columns(_looks(cells[POSITION], bias)), pl.col(LOOK)
    worth = pl.sum_horizontal(pl.col(f"n_{name}") * weight for name, weight in rules.events.items())
    worth = worth / pl.max_horizontal(look, pl.lit(1 / rules.max_correction))
    if rules.half_life_days is not None and last is not None:
        age = (pl.lit(last) - pl.col(DAY)).dt.total_days()
        worth = worth * pl.lit(0.5).pow(age / rules.half_life_days)
    counts = [f"n_{name}" for name in events]
    pairs = cells.group_by(KEY, ITEM, maintain_order=True).agg(
        pl.col(impression).sum().alias(IMPRESSIONS),
        (pl.col(impression) * look).sum().alias(EXAMINED),
        pl.col(counts).sum(),
        worth.sum().alias(SCORE),
    )
    heaviest = sorted(set(rules.events.values()))
    grade = pl.max_horizontal(
        pl.when(pl.col(f"n_{name}") > 0).then(heaviest.index(weight) + 1).otherwise(0)
        for name, weight in rules.events.items()
    )
    return pairs.with_columns(pl.sum_horizontal(counts).alias(CLICKS), grade.cast(pl.Int32).alias(GRADE))


def _looks(positions: pl.Series, bias: Bias) -> pl.Series:
    """The chance of a look at each position; one that the table lacks has that of the nearest smaller one, null 1."""
    import polars as pl

    if not bias.propensities:
        return pl.Series(LOOK, np.ones(len(positions)))
    places, looks = map(np.array, zip(*sorted(bias.propensities.items()), strict=True))
    place = np.searchsorted(places, positions.fill_null(0).to_numpy(), side="right") - 1
    return pl.Series(LOOK, np.where(positions.is_null().to_numpy(), 1.0, looks[np.maximum(place, 0)]))


def _with_rate(pairs: pl.DataFrame, rules: Rules, mean: float | None) -> pl.DataFrame:
    """The pair's click rate with a Beta prior around the log's, as a multiple of the log's: (clicks + m·mean) /
    (looks + m) / mean."""
    import polars as pl

    if not mean:
        return pairs.with_columns(pl.lit(None, dtype=pl.Float64).alias(RATE))
    clicks = pl.max_horizontal(f"n_{name}" for name in rules.events)  # an order without a click had one
    smoothed = (clicks + rules.prior_strength * mean) / (pl.col(EXAMINED) + rules.prior_strength)
    return pairs.with_columns((smoothed / mean).alias(RATE))


# --- texts --------------------------------------------------------------------------------------------------------


def merge_equal_texts(pairs: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Items of equal text are one for a query, with the id of the heaviest."""
    import polars as pl

    counts = [f"n_{name}" for name in rules.events]
    return (
        pairs.sort(KEY, SCORE, ITEM, descending=[False, True, False])
        .group_by(KEY, TEXT, maintain_order=True)
        .agg(
            pl.col(ITEM).first(),
            pl.col(IMPRESSIONS, EXAMINED, CLICKS, SCORE, *counts).sum(),
            pl.col(GRADE, RATE).max(),
        )
    )


def keep_languages(pairs: pl.DataFrame, names: pl.DataFrame, most: Mapping[str, int] | None, seed: int) -> pl.DataFrame:
    """Add the language of each query, and keep at most the given number of queries of each, a random choice.

    :param names: the text of each key, in the column `anchor`.
    """
    import polars as pl

    languages = [language_of(text) for text in names["anchor"]]
    known = names.select(KEY).with_columns(pl.Series(LANGUAGE, languages, dtype=pl.String))
    if most:
        place = pl.col(KEY).hash(seed=seed + SALT).rank("ordinal").over(LANGUAGE)
        limit = pl.col(LANGUAGE).replace_strict(dict(most), default=len(known) + 1, return_dtype=pl.Int64)
        known = known.filter(place <= limit)
    return pairs.join(known, on=KEY, how="inner", maintain_order="left")


def keep_heaviest(pairs: pl.DataFrame, group: str, most: int) -> pl.DataFrame:
    """At most this many pairs of each query or item, the heaviest."""
    import polars as pl

    if not most:
        return pairs
    order = pl.struct(-pl.col(SCORE), KEY, ITEM).rank("ordinal").over(group)
    return pairs.filter(order <= most)


def weigh(pairs: pl.DataFrame, damping: str) -> pl.DataFrame:
    """Add `WEIGHT`, with mean 1.

    A query's scores add up to a total, which damping turns into its square root or log(1 + total); its pairs share
    that in proportion. The same is then done with the totals of items, where damping makes them smaller.
    """
    import polars as pl

    def damped(total: pl.Expr) -> pl.Expr:
        return {"none": total, "sqrt": total.sqrt(), "log": total.log1p()}[damping]

    total = pl.col(SCORE).sum().over(KEY)
    pairs = pairs.with_columns((pl.col(SCORE) / total * damped(total)).alias(WEIGHT))
    total = pl.col(WEIGHT).sum().over(TEXT)
    pairs = pairs.with_columns(pl.col(WEIGHT) * pl.min_horizontal(damped(total) / total, pl.lit(1.0)))
    return pairs.with_columns(pl.col(WEIGHT) / pl.col(WEIGHT).mean())


# --- negatives ----------------------------------------------------------------------------------------------------


def unclicked_items(
    counted: Counted, pairs: pl.DataFrame, rules: Rules, bias: Bias, last: date | None, *, least: float, most: int
) -> pl.DataFrame:
    """Items that were shown for a query of the pairs and never clicked, those looked at most: `KEY`, `ITEM`.

    :param least: looks that are needed.
    :param most: items per query.
    """
    import polars as pl

    window = pl.lit(True) if last is None else pl.col(DAY) <= last
    found = []
    for part in counted.parts:
        cells = counted.cells(part).filter(window).join(pairs.select(KEY).unique(), on=KEY, how="semi")
        shown = _scored(cells, rules, bias, last).filter((pl.col(CLICKS) == 0) & (pl.col(EXAMINED) >= least))
        order = pl.struct(-pl.col(EXAMINED), ITEM).rank("ordinal").over(KEY)
        found.append(shown.filter(order <= most).select(KEY, ITEM, EXAMINED))
    return pl.concat(found).sort(KEY, EXAMINED, ITEM, descending=[False, True, False]).select(KEY, ITEM)


def with_negatives(pairs: pl.DataFrame, unclicked: pl.DataFrame, share: float, each: int, seed: int) -> pl.DataFrame:
    """Add `negative`, a list of texts, to a random share of the pairs; null elsewhere.

    :param unclicked: `KEY`, `ITEM`, `TEXT` of candidates, the best first. Texts that answer the query are left out.
    """
    import polars as pl

    candidates = unclicked.join(pairs.select(KEY, TEXT), on=[KEY, TEXT], how="anti", maintain_order="left")
    lists = candidates.group_by(KEY, maintain_order=True).agg(
        pl.col(TEXT).unique(maintain_order=True).head(each).alias("negative")
    )
    drawn = pl.struct(KEY, ITEM).hash(seed=seed + SALT) < int(share * (2**64 - 1))
    joined = pairs.join(lists, on=KEY, how="left", maintain_order="left")
    return joined.with_columns(pl.when(drawn).then(pl.col("negative")).alias("negative"))
