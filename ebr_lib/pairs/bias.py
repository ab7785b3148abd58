"""Position bias: the chance that a user looks at a position at all.

The position-based model (Richardson et al. 2007; Joachims et al. 2017): a click needs a look, whose chance depends on
the position alone, and an answer that is worth a click: clicks = impressions × propensity(position) × rate(pair).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Floats, Ints

FEW_CLICKS = 30  # of a position: below it, the position before is taken
ENOUGH_CLICKS = 300
ROUNDS, TOLERANCE = 1000, 1e-6


@dataclass(frozen=True)
class Bias:
    """Propensity by position, the first position's 1; empty: nothing is corrected. `source` says where it is from."""

    propensities: Mapping[int, float]
    source: str


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


def given_propensities(values: Sequence[float], first: int) -> dict[int, float]:
    """Propensities of a list, relative to its first, by position from `first` on."""
    return {first + number: value / values[0] for number, value in enumerate(values)}
