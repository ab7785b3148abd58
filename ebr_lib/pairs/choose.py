"""Which pairs of the counts are trained on or measured, and how much each weighs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from math import fsum

import numpy as np
import polars as pl

from ebr_lib.data.text import language_of
from ebr_lib.pairs.bias import Bias
from ebr_lib.pairs.columns import (
    ANCHOR,
    CLICKS,
    DAY,
    EXAMINED,
    GRADE,
    IMPRESSIONS,
    ITEM,
    KEY,
    LANGUAGE,
    POSITION,
    RATE,
    SCORE,
    TEXT,
    WEIGHT,
)  # fmt: skip
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.counts import Counted
from ebr_lib.pairs.funnel import Funnel

SALT = 11  # of hashes that choose at random


def heaviest_first(pairs: pl.DataFrame) -> pl.DataFrame:
    """Sort by query; its heaviest pair first."""
    return pairs.sort(KEY, SCORE, ITEM, descending=[False, True, False])


def choose_pairs(
    config: PairsConfig, counted: Counted, bias: Bias, funnel: Funnel, of: str, *, first: date | None, last: date | None
) -> pl.DataFrame:
    """Choose the pairs of the days from `first` to `last`, both included; None: from the start, to the end.

    :returns: `KEY`, `ITEM`, counts, `SCORE`, `GRADE`, and `RATE`: null if the log has no impressions or clicks.
    """
    frames, shown, examined, clicks = [], 0, 0.0, 0
    for part in counted.parts:
        pairs = _scored(pl.read_parquet(part).filter(_days(first, last)), config, bias, last)
        shown += len(pairs)
        examined += fsum(pairs[EXAMINED])
        clicks += int(pairs[f"n_{config.click}"].sum())
        frames.append(pairs.filter(pl.col(CLICKS) > 0))
    pairs = pl.concat(frames).sort(KEY, ITEM)
    funnel.add(of, "pairs shown or clicked", 0, shown)
    funnel.add(of, "never clicked", shown - len(pairs), len(pairs))
    mean = clicks / examined if clicks and examined > 0 and counted.events[config.impression_event] else None
    pairs = pairs.with_columns(_rate(config, mean).alias(RATE))
    conditions = {
        "fewer than min_impressions": pl.col(IMPRESSIONS) >= config.min_impressions,
        "fewer than min_clicks": pl.col(CLICKS) >= config.min_clicks,
        "click rate below min_ctr_ratio": pl.col(RATE).is_null() | (pl.col(RATE) >= config.min_ctr_ratio),
    }
    for name, condition in conditions.items():
        before, pairs = len(pairs), pairs.filter(condition)
        funnel.add(of, name, before - len(pairs), len(pairs))
    return pairs


def _days(first: date | None, last: date | None) -> pl.Expr:
    window = pl.lit(True) if first is None else pl.col(DAY) >= first
    return window if last is None else window & (pl.col(DAY) <= last)


def _scored(cells: pl.DataFrame, config: PairsConfig, bias: Bias, last: date | None) -> pl.DataFrame:
    """Counts per pair, corrected for position: looks instead of impressions, and the worth of its events as `SCORE`."""
    cells = cells.sort(DAY, POSITION)  # one order within each pair: sums of fractions depend on it
    impression, weights, look = f"n_{config.impression_event}", config.weights, _looks(cells[POSITION], bias)
    worth = pl.sum_horizontal(pl.col(f"n_{name}") * weight for name, weight in weights.items())
    worth = worth / pl.max_horizontal(look, pl.lit(1 / config.max_correction))
    if config.half_life_days is not None and last is not None:
        age = (pl.lit(last) - pl.col(DAY)).dt.total_days()
        worth = worth * pl.lit(0.5).pow(age / config.half_life_days)
    counts = [f"n_{name}" for name in weights]
    cells = cells.with_columns(worth.alias(SCORE), (pl.col(impression) * look).alias(EXAMINED))
    pairs = cells.group_by(KEY, ITEM, maintain_order=True).agg(
        pl.col(impression).sum().alias(IMPRESSIONS), pl.col(EXAMINED, SCORE, *counts).sum()
    )
    grades = {weight: grade for grade, weight in enumerate(sorted(set(weights.values())), 1)}
    grade = pl.max_horizontal(
        pl.when(pl.col(f"n_{name}") > 0).then(grades[weight]).otherwise(0) for name, weight in weights.items()
    )
    return pairs.with_columns(pl.sum_horizontal(counts).alias(CLICKS), grade.cast(pl.Int32).alias(GRADE))


def _looks(positions: pl.Series, bias: Bias) -> pl.Series:
    """The chance of a look at each position; one that the table lacks has that of the nearest smaller one, null 1."""
    if not bias.propensities:
        return pl.Series(np.ones(len(positions)))
    places, looks = map(np.array, zip(*sorted(bias.propensities.items()), strict=True))
    place = np.searchsorted(places, positions.fill_null(0).to_numpy(), side="right") - 1
    return pl.Series(np.where(positions.is_null().to_numpy(), 1.0, looks[np.maximum(place, 0)]))


def _rate(config: PairsConfig, mean: float | None) -> pl.Expr:
    """The pair's click rate with a Beta prior around the log's, as a multiple of the log's: (clicks + m·mean) /
    (looks + m) / mean."""
    if not mean:
        return pl.lit(None, dtype=pl.Float64)
    clicks = pl.max_horizontal(f"n_{name}" for name in config.weights)  # an order without a click had one
    return (clicks + config.prior_strength * mean) / (pl.col(EXAMINED) + config.prior_strength) / mean


# --- texts --------------------------------------------------------------------------------------------------------


def merge_equal_texts(pairs: pl.DataFrame) -> pl.DataFrame:
    """Items of equal text are one for a query, with the id of the heaviest."""
    grouped = heaviest_first(pairs).group_by(KEY, TEXT, maintain_order=True)
    return grouped.agg(pl.col(ITEM, ANCHOR).first(), pl.col(IMPRESSIONS, CLICKS, SCORE).sum(), pl.col(GRADE).max())


def keep_languages(pairs: pl.DataFrame, most: Mapping[str, int] | None, seed: int) -> pl.DataFrame:
    """Add the language of each query, and keep at most the given number of queries of each, a random choice."""
    queries = pairs.select(KEY, ANCHOR).unique(KEY, maintain_order=True)
    languages = [language_of(text) for text in queries[ANCHOR]]
    known = queries.select(KEY, pl.Series(LANGUAGE, languages, dtype=pl.String))
    if most:
        place = pl.col(KEY).hash(seed=seed + SALT).rank("ordinal").over(LANGUAGE)
        limit = pl.col(LANGUAGE).replace_strict(dict(most), default=len(known) + 1, return_dtype=pl.Int64)
        known = known.filter(place <= limit)
    return pairs.join(known, on=KEY, how="inner", maintain_order="left")


def keep_heaviest(pairs: pl.DataFrame, group: str, most: int) -> pl.DataFrame:
    """At most this many pairs of each query or item, the heaviest; 0 keeps all."""
    order = pl.struct(-pl.col(SCORE), KEY, ITEM).rank("ordinal").over(group)
    return pairs.filter(order <= most) if most else pairs


def weigh(pairs: pl.DataFrame, damping: str) -> pl.DataFrame:
    """Add `WEIGHT`, with mean 1.

    A query's scores add up to a total, which damping turns into its square root or log(1 + total); its pairs share
    that in proportion. The same is then done with the totals of items, where damping makes them smaller.
    """

    def damped(total: pl.Expr) -> pl.Expr:
        return {"none": total, "sqrt": total.sqrt(), "log": total.log1p()}[damping]

    total = pl.col(SCORE).sum().over(KEY)
    pairs = pairs.with_columns((pl.col(SCORE) / total * damped(total)).alias(WEIGHT))
    total = pl.col(WEIGHT).sum().over(TEXT)
    pairs = pairs.with_columns(pl.col(WEIGHT) * pl.min_horizontal(damped(total) / total, pl.lit(1.0)))
    return pairs.with_columns(pl.col(WEIGHT) / pl.col(WEIGHT).mean())


# --- negatives ----------------------------------------------------------------------------------------------------


def unclicked_items(
    config: PairsConfig, counted: Counted, pairs: pl.DataFrame, bias: Bias, last: date | None
) -> pl.DataFrame:
    """Items that were shown often for a query of the pairs and never clicked, those looked at most: `KEY`, `ITEM`.

    Some more than `negatives_per_pair`, of which a few may turn out to answer the query.
    """
    found = []
    for part in counted.parts:
        cells = pl.read_parquet(part).filter(_days(None, last)).join(pairs.select(KEY).unique(), on=KEY, how="semi")
        shown = _scored(cells, config, bias, last).filter(
            pl.col(CLICKS) == 0, pl.col(EXAMINED) >= config.negative_min_impressions
        )
        order = pl.struct(-pl.col(EXAMINED), ITEM).rank("ordinal").over(KEY)
        found.append(shown.filter(order <= 4 * config.negatives_per_pair).select(KEY, ITEM, EXAMINED))
    return pl.concat(found).sort(KEY, EXAMINED, ITEM, descending=[False, True, False]).select(KEY, ITEM)


def with_negatives(config: PairsConfig, pairs: pl.DataFrame, unclicked: pl.DataFrame) -> pl.DataFrame:
    """Add `negative`, a list of texts, to a random share of the pairs; null elsewhere.

    :param unclicked: `KEY`, `ITEM`, `TEXT` of candidates, the best first. Texts that answer the query are left out.
    """
    candidates = unclicked.join(pairs.select(KEY, TEXT), on=[KEY, TEXT], how="anti", maintain_order="left")
    lists = candidates.group_by(KEY, maintain_order=True).agg(
        pl.col(TEXT).unique(maintain_order=True).head(config.negatives_per_pair).alias("negative")
    )
    drawn = pl.struct(KEY, ITEM).hash(seed=config.seed + SALT) < int(config.exposed_negatives * (2**64 - 1))
    joined = pairs.join(lists, on=KEY, how="left", maintain_order="left")
    return joined.with_columns(pl.when(drawn).then(pl.col("negative")).alias("negative"))
