"""Names of groups on a map, placed where they hide few points."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.arrays import Ints
from ebr_lib.tables import squeezed
from ebr_lib.visualize.groups import PALETTE, Groups, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


DPI = 180
NAME_SIZES = (9.5, 7.5)  # points, of a name among up to `MANY` labels, and among more
MANY, NAMED = 25, 150  # labels; `NAMED` are named on a map at most
NAME_WIDTH = 1.6  # inches, of a name on the map at most
THINNED = 20_000  # points that names are placed by
HIDDEN = 0.2  # largest share of any label's points that a name may hide
FAR = 0.03  # cost of a distance of one text height, where hiding all points of a label costs 1
LED = 1.6  # text heights between a name and its core, from which on a line leads from one to the other
LOOKED_AT = 100_000  # points of a map by which cores are found


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
    """Write labels at their cores, the largest first, with a line to the core where the name stands off.

    One without a core or a free place stays in the legend only.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    size = NAME_SIZES[len(groups.names) > MANY]
    measure = size_in_inches(size)
    room = _Room.on(axes, coords, groups)
    cores = cores_of(coords, groups)
    for code, name in enumerate(groups.names[:NAMED]):
        shown = squeezed(name, NAME_WIDTH, measure)
        if np.isnan(cores[code, 0]) or not shown:
            continue
        colour = [0.62 * c for c in to_rgb(PALETTE[groups.colours[code]])]
        text = axes.text(
            0, 0, shown, fontsize=size, ha="center", va="center", zorder=5,
            color=colour, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        points = axes.transData.transform(coords[groups.codes == code])
        home = axes.transData.transform(cores[code])
        place = room.take(home, _core(points), np.array([box.width, box.height]))
        if place is None:
            text.remove()
            continue
        inverse = axes.transData.inverted().transform
        x, y = inverse(place)
        text.set_position((float(x), float(y)))
        edge = np.clip(
            home, place - np.array([box.width, box.height]) / 2, place + np.array([box.width, box.height]) / 2
        )
        if np.linalg.norm(edge - home) > LED * box.height:
            axes.plot(*np.array([cores[code], inverse(edge)]).T, color=colour, linewidth=0.7, zorder=4)


def cores_of(coords: Points, groups: Groups) -> Points:
    """The place of each label on a map, labels × 2: NaN for a label that has no core.

    Its core is where its points are densest, and where no other label has more points than it.
    """
    codes = groups.codes
    order = np.random.default_rng(0).permutation(len(codes))[:LOOKED_AT]
    coords, codes = coords[order], codes[order]
    places = np.full((len(groups.names), 2), np.nan)
    labelled = codes >= 0
    for code in np.unique(codes[labelled]):
        points = coords[codes == code]
        core = _core(points)
        near = labelled & ((coords >= core.min(axis=0)) & (coords <= core.max(axis=0))).all(axis=1)
        counts = np.bincount(codes[near])
        if counts[code] == counts.max():
            places[code] = core[((core - np.median(core, axis=0)) ** 2).sum(axis=1).argmin()]  # its middle
    return places


def _core(points: Points, cells: int = 10) -> Points:
    """The points where they are densest: the median of all may lie between two islands."""
    from scipy.ndimage import uniform_filter

    low, high = points.min(axis=0), points.max(axis=0)
    cell = np.minimum((points - low) / np.maximum(high - low, 1e-12) * cells, cells - 1).astype(int)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (cell[:, 0], cell[:, 1]), 1)
    densest = np.unravel_index(uniform_filter(counts, 3, mode="constant").argmax(), counts.shape)
    return points[(np.abs(cell - densest) <= 1).all(axis=1)]


@dataclass
class _Room:
    """Free places for names on a map, in pixels.

    :param frame: low and high corner of the map.
    :param points: up to `THINNED` points; `codes` are their labels, `weights` each one's share of its label.
    :param radius: radius of a point.
    :param taken: boxes of the names placed so far, each 2 corners × 2.
    """

    frame: Points
    points: Points
    codes: Ints
    weights: Points
    radius: float
    taken: list[Points] = field(default_factory=list)

    @classmethod
    def on(cls, axes: Axes, coords: Points, groups: Groups) -> _Room:
        rows = np.random.default_rng(0).permutation(len(coords))[:THINNED]
        codes = groups.codes[rows] + 1  # rows without a label are one label more
        radius = np.sqrt(marker(len(coords))[0]) / 2 * DPI / 72
        weights = 1 / np.maximum(np.bincount(codes), 5)[codes]  # a label of one row may be hidden
        frame = axes.get_window_extent().get_points()
        return cls(frame, axes.transData.transform(coords[rows]), codes, weights, float(radius))

    def take(self, home: Points, core: Points, size: Points) -> Points | None:
        """Find a place for the middle of a name of this size (width, height): near `home`, hiding few points.

        None if every place hides a fifth of a label's points, overlaps another name, or leaves the map.
        """
        middles = self._around(home, core, size)
        boxes = np.stack([middles - size / 2 - 1, middles + size / 2 + 1], axis=1)
        above, below = self.points > boxes[:, :1] - self.radius / 2, self.points < boxes[:, 1:] + self.radius / 2
        inside = np.all(above & below, axis=2)
        hidden = [np.bincount(self.codes[under], self.weights[under]) for under in inside]
        worst, total = np.array([[shares.max(initial=0), shares.sum()] for shares in hidden]).T
        free = (worst <= HIDDEN) & (boxes[:, 0] >= self.frame[0]).all(1) & (boxes[:, 1] <= self.frame[1]).all(1)
        for other in self.taken:
            free &= ((boxes[:, 0] >= other[1]) | (boxes[:, 1] <= other[0])).any(axis=1)
        if not free.any():
            return None
        cost = total + FAR * np.linalg.norm(middles - home, axis=1) / size[1]
        best = int(np.where(free, cost, np.inf).argmin())
        self.taken.append(boxes[best])
        return np.asarray(middles[best])

    def _around(self, home: Points, core: Points, size: Points) -> Points:
        """Candidates: on `home`; in eight directions from it, next to it and next to the core; on rings around it."""
        below, above = home - core.min(axis=0), core.max(axis=0) - home
        places = [home]
        for share, heights in ((0.0, 0.1), (0.0, 0.8), (1.0, 0.1), (1.0, 1.0), (1.0, 2.0)):
            gap = self.radius + heights * size[1] + size / 2
            low, high = home - share * below - gap, home + share * above + gap
            xs, ys = (low[0], home[0], high[0]), (low[1], home[1], high[1])
            places += [np.array(place) for place in itertools.product(xs, ys)]  # `home` again, harmless
        for heights, turns in ((2, 12), (3.5, 16), (5, 20), (7, 24), (9.5, 28)):
            angles = 2 * np.pi * np.arange(turns) / turns
            places += list(home + (size / 2 + heights * size[1]) * np.stack([np.cos(angles), np.sin(angles)], 1))
        return np.array(places)
