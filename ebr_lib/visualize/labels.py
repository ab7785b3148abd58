"""Names of groups on a map, placed where they hide few points."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.tables import squeezed
from ebr_lib.visualize.groups import PALETTE, Groups, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PANEL, LEGEND, EDGE, GAP, LINE, DPI = 7.0, 3.0, 0.15, 0.35, 0.2, 150  # inches; LINE is the height of a caption line
TITLE_SIZE, NAME_SIZE, SMALL_SIZE = 15.0, 10.5, 9.0  # points
NAME_WIDTH = 1.9  # inches, of a name on the map at most
THINNED = 1000  # points per label that names are placed by
HIDDEN = 0.2  # largest share of any label's points that a name may hide
FAR = 0.03  # cost of a distance of one text height, where hiding all points of a label costs 1


def size_in_inches(size: float, weight: str = "normal") -> Callable[[str], float]:
    """A function that measures how wide a text is drawn, each character in the font that it gets."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, DPI), FontProperties(size=size, weight=weight)
    return lambda text: float(renderer.get_text_width_height_descent(text, font, False)[0]) / DPI


def marker(n: int) -> tuple[float, float]:
    """Area (square points) and opacity of a point, where n are drawn."""
    return float(np.clip(45_000 / n, 1.2, 36)), float(np.clip(4 / n**0.2, 0.45, 0.9))


def name_groups(axes: Axes, coords: Points, groups: Groups) -> None:
    """Write labels at their medoids, the largest first; one without a free place stays in the legend only."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    measure = size_in_inches(NAME_SIZE)
    room = _Room.on(axes, coords, groups)
    for code, (name, colour) in enumerate(zip(groups.names, PALETTE, strict=False)):
        points = axes.transData.transform(coords[groups.codes == code])
        shown = squeezed(name, NAME_WIDTH, measure)
        if not len(points) or not shown:
            continue
        text = axes.text(
            0, 0, shown, fontsize=NAME_SIZE, ha="center", va="center", zorder=5,
            color=[0.62 * c for c in to_rgb(colour)], path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        place = room.take(_medoid(points), _core(points), np.array([box.width, box.height]))
        if place is None:
            text.remove()
        else:
            x, y = axes.transData.inverted().transform(place)
            text.set_position((float(x), float(y)))


def _core(points: Points, cells: int = 10) -> Points:
    """The points where they are densest: the median of all may lie between two islands."""
    from scipy.ndimage import uniform_filter

    low, high = points.min(axis=0), points.max(axis=0)
    cell = np.minimum((points - low) / np.maximum(high - low, 1e-12) * cells, cells - 1).astype(int)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (cell[:, 0], cell[:, 1]), 1)
    densest = np.unravel_index(uniform_filter(counts, 3, mode="constant").argmax(), counts.shape)
    return points[(np.abs(cell - densest) <= 1).all(axis=1)]


def _medoid(points: Points) -> Points:
    """The point in the middle of the densest ones."""
    around = _core(points)
    return around[((around - np.median(around, axis=0)) ** 2).sum(axis=1).argmin()]


@dataclass
class _Room:
    """Free places for names on a map, in pixels.

    :param frame: low and high corner of the map.
    :param points: up to `THINNED` points of each shade; `weights` (points × shades): each point's share of its shade.
    :param radius: radius of a point.
    :param taken: boxes of the names placed so far, each 2 corners × 2.
    """

    frame: Points
    points: Points
    weights: NDArray[np.float32]
    radius: float
    taken: list[Points] = field(default_factory=list)

    @classmethod
    def on(cls, axes: Axes, coords: Points, groups: Groups) -> _Room:
        shades = groups.shades
        order = np.random.default_rng(0).permutation(len(shades))
        rows = np.concatenate([order[shades[order] == s][:THINNED] for s in np.unique(shades)])
        member = np.eye(len(groups.shade_colours), dtype=np.float32)[shades[rows]]
        radius = np.sqrt(marker(len(coords))[0]) / 2 * DPI / 72
        weights = member / np.maximum(member.sum(axis=0), 1)
        return cls(
            axes.get_window_extent().get_points(), axes.transData.transform(coords[rows]), weights, float(radius)
        )

    def take(self, home: Points, core: Points, size: Points) -> Points | None:
        """Find a place for the middle of a name of this size (width, height): near `home`, hiding few points.

        None if every place hides a fifth of a label's points, overlaps another name, or leaves the map.
        """
        middles = self._around(home, core, size)
        boxes = np.stack([middles - size / 2 - 1, middles + size / 2 + 1], axis=1)
        inside = (self.points > boxes[:, :1] - self.radius / 2) & (self.points < boxes[:, 1:] + self.radius / 2)
        hidden = inside.all(axis=2).astype(np.float32) @ self.weights
        free = (
            (hidden.max(axis=1) <= HIDDEN)
            & (boxes[:, 0] >= self.frame[0]).all(1)
            & (boxes[:, 1] <= self.frame[1]).all(1)
        )
        for other in self.taken:
            free &= ((boxes[:, 0] >= other[1]) | (boxes[:, 1] <= other[0])).any(axis=1)
        if not free.any():
            return None
        cost = hidden.sum(axis=1) + FAR * np.linalg.norm(middles - home, axis=1) / size[1]
        best = int(np.where(free, cost, np.inf).argmin())
        self.taken.append(boxes[best])
        return np.asarray(middles[best])

    def _around(self, home: Points, core: Points, size: Points) -> Points:
        """Candidates: on `home`, and in eight directions from it, next to it and next to the core."""
        below, above = home - core.min(axis=0), core.max(axis=0) - home
        places = [home]
        for share, heights in ((0.0, 0.1), (0.0, 0.8), (1.0, 0.1), (1.0, 1.0), (1.0, 2.0)):
            gap = self.radius + heights * size[1] + size / 2
            low, high = home - share * below - gap, home + share * above + gap
            xs, ys = (low[0], home[0], high[0]), (low[1], home[1], high[1])
            places += [np.array(place) for place in itertools.product(xs, ys)]  # `home` again, harmless
        return np.array(places)
