"""The maps of one embedding file: which rows are projected, by which methods, and where all others lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebr_lib.arrays import Floats, Ints, Vectors
from ebr_lib.logs import logger
from ebr_lib.visualize import explorer, projection
from ebr_lib.visualize.groups import Groups

NEAR = 10  # neighbours that purity, confusions and the explorer look at
WIDE = 40  # neighbours to choose from if the explorer cannot draw all rows
NAMES = {"tsne": "t-SNE", "umap": "UMAP"}

Settings = Mapping[str, Mapping[str, Any]]
"""Method to name to value."""


@dataclass(frozen=True)
class Maps:
    """The maps of one embedding file.

    :param rows: the projected rows; `near` are the nearest of each, as positions in `rows`.
    :param sampled_by: title of the labels by which they were sampled.
    :param coords: coordinates of all rows, by method.
    :param settings: what each map was made with; empty if PCA drew it.
    """

    rows: Ints
    sampled_by: str
    near: Ints
    coords: dict[str, projection.Coords]
    quality: dict[str, projection.MapQuality]
    settings: dict[str, dict[str, Any]]

    def name_of(self, method: str) -> str:
        """Display name of a map."""
        return NAMES[method] if self.settings[method] else "PCA (too few distinct vectors)"


def sampled(unit: Vectors, groups: Groups, most: int, seed: int, cache: projection.Cache) -> tuple[Ints, str]:
    """The rows to project, and the title of the labels by which they were sampled.

    Both are cached with the maps: recolouring shows the same rows, for other rows would need other maps.
    """
    if len(unit) <= most:
        return np.arange(len(unit)), groups.title
    name = projection.fingerprint(unit, "rows", most, seed)
    rows = cache.get(f"rows-{name}", lambda: projection.sample_rows(groups.codes, most, seed))
    return rows, str(cache.get(f"by-{name}", lambda: np.array(groups.title)))


def project(
    unit: Vectors,
    sample: tuple[Ints, str],
    asked: Settings,
    cache: projection.Cache,
    *,
    seed: int,
    before: Maps | None = None,
) -> Maps:
    """Draw the sampled rows, each distinct vector once, and place all other rows by them.

    :param asked: method (tsne, umap) to its settings, as `tsne_map` and `umap_map` name them.
    :param seed: for judging the maps, and for the order among equal vectors.
    :param before: maps to start from and to align to.
    """
    rows, sampled_by = sample
    first, place = projection.distinct_rows(unit[rows])
    points = rows[first]
    distinct = unit[points]
    settings = _fitted(asked, len(points))
    near = NEAR if len(rows) <= explorer.MOST else WIDE
    neighbours = _neighbours(distinct, settings, cache)
    coords, quality = {}, {}
    for method, chosen in settings.items():
        start = before.coords[method][points].astype(np.float64) if before else projection.pca_map(distinct)
        drawn = _drawn(method, distinct, neighbours, start, chosen=chosen, cache=cache)
        quality[method] = projection.map_quality(distinct, neighbours, drawn, seed)
        everywhere = _everywhere(unit, rows, drawn[place])
        coords[method] = projection.aligned(everywhere, before.coords[method]) if before else everywhere
    near_rows = projection.neighbours_of_rows(neighbours, place, near, seed)
    return Maps(rows, sampled_by, near_rows, coords, quality, settings)


def _fitted(asked: Settings, points: int) -> dict[str, dict[str, Any]]:
    """The settings of each map, fitted to the number of points."""
    found: dict[str, dict[str, Any]] = {}
    for method, settings in asked.items():
        if points < projection.FEWEST:
            logger.warning("点数太少 %s: %d distinct vectors are too few; PCA draws them", NAMES[method], points)
            found[method] = {}
        elif method == "tsne":
            found[method] = {**settings, "perplexity": projection.fitting_perplexity(settings["perplexity"], points)}
        else:
            found[method] = {**settings, "n_neighbors": projection.fitting_neighbors(settings["n_neighbors"], points)}
    return found


def _neighbours(distinct: Vectors, settings: Settings, cache: projection.Cache) -> projection.Neighbours:
    """One table in the original space for the maps, their judgement, purity and the explorer."""
    wanted = [NEAR if len(distinct) <= explorer.MOST else WIDE, projection.MAP_NEIGHBOURS]
    wanted += [int(3 * chosen["perplexity"]) for chosen in settings.values() if "perplexity" in chosen]
    wanted += [chosen["n_neighbors"] for chosen in settings.values() if "n_neighbors" in chosen]
    compute = functools.cache(lambda: projection.exact_neighbours(distinct, max(wanted)))
    name = projection.fingerprint(distinct, "neighbours", max(wanted))
    return projection.Neighbours(
        cache.get(f"indices-{name}", lambda: compute().indices),
        cache.get(f"distances-{name}", lambda: compute().distances),
    )


def _drawn(
    method: str,
    distinct: Vectors,
    neighbours: projection.Neighbours,
    start: Floats,
    *,
    chosen: Mapping[str, Any],
    cache: projection.Cache,
) -> projection.Coords:
    def make() -> projection.Coords:
        logger.info("绘制降维图 drawing the %s map of %d points", NAMES[method], len(distinct))
        if not chosen:
            return start.astype(np.float32)
        if method == "tsne":
            return projection.tsne_map(neighbours, start, **chosen)
        near = neighbours
        if distinct.shape[1] > projection.COMPONENTS:
            near = projection.component_neighbours(distinct, chosen["n_neighbors"] - 1)
        return projection.umap_map(near, start, **chosen)

    return cache.get(projection.fingerprint(distinct, method, dict(chosen), start.tobytes()), make)


def _everywhere(unit: Vectors, rows: Ints, drawn: projection.Coords) -> projection.Coords:
    """Coordinates of all rows: those drawn, and the rest placed by them."""
    coords = np.empty((len(unit), 2), dtype=np.float32)
    coords[rows] = drawn
    rest = np.setdiff1d(np.arange(len(unit)), rows, assume_unique=True)
    if len(rest):
        coords[rest] = projection.place_rest(unit, rest, unit[rows], drawn)
    return coords
