"""Position bias: the chance that a user looks at a position at all.

The position-based model (Richardson et al. 2007; Joachims et al. 2017): a click needs a look, whose chance depends on
the position alone, and an answer that is worth a click: clicks = impressions × propensity(position) × rate(pair).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ebr_lib.arrays import Floats, Ints
from ebr_lib.errors import DataError
from ebr_lib.pairs.columns import DAY, ITEM, KEY, POSITION
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.counts import Counted

FEW_CLICKS = 30  # of a position: below it, the position before is taken
ENOUGH_CLICKS = 300
ROUNDS, TOLERANCE = 1000, 1e-6
MOST_CELLS = 1_000_000  # that position bias is estimated from


@dataclass(frozen=True)
class Bias:
    """Propensity by position, the first position's 1; empty: nothing is corrected. `source` says where it is from."""

    propensities: Mapping[int, float]
    source: str


def position_bias(config: PairsConfig, counted: Counted, last: date | None) -> Bias:
    """The propensities that the knob gives, or asks to estimate from the days up to `last`.

    :raises DataError: the log cannot give them.
    """
    wanted = config.propensities
    if wanted == "none":
        return Bias({}, "none")
    if not counted.positions or (not counted.events[config.impression_event] and isinstance(wanted, str)):
        lacking = "positions" if not counted.positions else "impressions"
        if wanted == "auto":
            return Bias({}, f"none: the log has no {lacking}")
        raise DataError(f"propensities: the log has no {lacking}; name their column, or set propensities: none")
    if not isinstance(wanted, str):
        return Bias({place: value / wanted[0] for place, value in enumerate(wanted, counted.first_position)}, "given")
    bias = _estimated(config, counted, last)
    if not bias.propensities and wanted == "estimate":
        raise DataError(
            "propensities: too few clicks are on items that were shown at several positions to estimate them; "
            "give them as a list, or set propensities: none"
        )
    return bias


def _estimated(config: PairsConfig, counted: Counted, last: date | None) -> Bias:
    """Estimate the propensities from clicked pairs that were shown at several positions up to the day `last`; none if
    they are too few."""
    shown, clicked = f"n_{config.impression_event}", f"n_{config.click}"
    window = pl.lit(True) if last is None else pl.col(DAY) <= last
    found, cells = [], 0
    for part in counted.parts:
        frame = pl.read_parquet(part).filter(window, pl.col(POSITION).is_not_null() & (pl.col(shown) > 0))
        frame = frame.join(frame.filter(pl.col(clicked) > 0).select(KEY, ITEM).unique(), on=[KEY, ITEM], how="semi")
        frame = frame.group_by(KEY, ITEM, POSITION).agg(pl.col(shown, clicked).sum())
        several = frame.filter(pl.len().over(KEY, ITEM) > 1)
        found.append(several.select(pl.struct(KEY, ITEM).hash(seed=4).alias("pair"), POSITION, shown, clicked))
        cells += len(several)
        if cells > MOST_CELLS:  # parts are random samples of the queries
            break
    frame = pl.concat(found).sort("pair", POSITION)  # sums of fractions depend on the order
    propensities = estimate_propensities(*(frame[name].to_numpy() for name in frame.columns))
    if not propensities:
        return Bias({}, "none: too few clicks on items that were shown at several positions")
    return Bias(propensities, f"estimated from {frame[clicked].sum()} clicks of items shown at several positions")


def estimate_propensities(pairs: Ints, positions: Ints, impressions: Floats, clicks: Floats) -> dict[int, float]:
    """Estimate the propensities from pairs that were shown at several positions; all arrays have shape (cells,).

    Poisson pseudo maximum likelihood of clicks ~ impressions × propensity × rate, by alternating its two closed forms.
    The likelihood is concave in the logarithms, so this is the only maximum, and what a pair is worth does not bias it,
    whatever ranked the pairs. Positions that no chain of shared pairs leads to from the first, or with fewer than 30
    clicks, take the propensity of the position before.

    :returns: position to propensity, 1 for the first; empty without 300 clicks of such pairs.
    """
    if clicks.sum() < ENOUGH_CLICKS:
        return {}
    places, place = np.unique(positions, return_inverse=True)
    _, pair = np.unique(pairs, return_inverse=True)
    theta = np.ones(len(places))
    for _ in range(ROUNDS):
        seen = np.bincount(pair, impressions * theta[place])
        rate = np.bincount(pair, clicks) / np.maximum(seen, 1e-12)
        new = np.bincount(place, clicks) / np.maximum(np.bincount(place, impressions * rate[pair]), 1e-12)
        new /= new[0] or 1.0
        moved = np.abs(new - theta).max()
        theta = new
        if moved < TOLERANCE:
            break
    known = (np.bincount(place, clicks) >= FEW_CLICKS) & _linked(pair, place)
    if not known[0]:
        return {}
    found: dict[int, float] = {}
    before = 1.0
    for number, position in enumerate(places.tolist()):
        before = min(1.0, float(theta[number])) if known[number] else before
        found[position] = before
    return found


def _linked(pair: Ints, place: Ints) -> NDArray[np.bool_]:
    """Which positions shared pairs connect with the first."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    places = place.max() + 1
    nodes = places + pair.max() + 1
    edges = coo_matrix((np.ones(len(pair)), (place, places + pair)), shape=(nodes, nodes))
    _, group = connected_components(edges, directed=False)
    return np.asarray(group[:places] == group[0])
