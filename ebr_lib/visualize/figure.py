"""The picture: maps side by side, coloured by label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.arrays import Ints
from ebr_lib.files import written_whole
from ebr_lib.tables import squeezed, wrapped
from ebr_lib.visualize.fonts import LATIN, fonts_for, quiet_fonts
from ebr_lib.visualize.groups import GREY, PALETTE, SHOWN, Groups, Panel, Points
from ebr_lib.visualize.labels import DPI, NAMED, marker, name_groups, size_in_inches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PANEL, SINGLE = 5.5, 7.5  # inches: width of a map beside another one, and alone
EDGE, GAP, LINE, ENTRY = 0.15, 0.15, 0.18, 0.23  # inches; LINE and ENTRY are lines of caption and legend
FLATTEST = 0.6  # height of a map, of its width
TITLE_SIZE, LEGEND_SIZE, SMALL_SIZE = 14.0, 9.5, 9.0  # points
SHADED = 100_000  # above this many points, density is drawn instead
# kinds of picture, and the metadata that would make each file different
KINDS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def draw(
    path: Path, panels: Sequence[Panel], groups: Groups, *, title: str, caption: str, fonts: Sequence[str]
) -> None:
    """Write the picture of one or several maps of the same points.

    :param path: ends in one of `KINDS`; an existing file stays until the new one is complete.
    :param panels: maps, at most two beside each other.
    :param fonts: families or font files for the labels, tried before the system's.
    """
    import matplotlib as mpl

    texts = "".join([title, caption, groups.title, *groups.names[:NAMED], *(p.title + p.note for p in panels)])
    kind = path.suffix.lower()
    settings = {"font.family": fonts_for(texts, fonts), "text.parse_math": False, "svg.hashsalt": "ebr"}
    with quiet_fonts(), mpl.rc_context(settings):
        figure = _composed(panels, groups, title, caption)
        with written_whole(path) as new:
            figure.savefig(new, format=kind[1:], metadata=KINDS[kind])


def _composed(panels: Sequence[Panel], groups: Groups, title: str, caption: str) -> Figure:
    """The figure: title, maps, legend in columns, caption, each as high as it needs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, down = min(2, len(panels)), (len(panels) + 1) // 2
    side = PANEL if across > 1 else SINGLE
    width = across * side + EDGE
    across_up = [np.ptp(panel.coords, axis=0) for panel in panels]
    # as flat as the points are, at most square
    upright = max(float(np.clip(up / w if w > 0 else 1, FLATTEST, 1)) for w, up in across_up) * (side - 0.2)
    title = wrapped(title, width - 2 * EDGE, size_in_inches(TITLE_SIZE, "bold"))
    caption = wrapped(caption, width - 2 * EDGE, size_in_inches(SMALL_SIZE))
    legend = _Legend.of(groups, width - 2 * EDGE)
    top, bottom = 0.55 + 0.25 * title.count("\n"), 0.3 + LINE * (1 + caption.count("\n"))
    height = top + down * (upright + GAP + 0.3) + legend.height + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        row, column = divmod(i, across)
        left, upper = EDGE + column * side, top + row * (upright + GAP + 0.3) + 0.3
        box = (left / width, 1 - (upper + upright) / height, (side - 0.2) / width, upright / height)
        _draw_panel(figure.add_axes(box), panel, groups)
    figure.text(EDGE / width, 1 - 0.18 / height, title, fontsize=TITLE_SIZE, fontweight="bold", va="top")
    figure.text(
        EDGE / width, 0.12 / height, caption, fontsize=SMALL_SIZE, color="#444444", va="bottom", linespacing=1.4
    )
    legend.draw(figure, bottom + legend.height)
    return figure


def _draw_panel(axes: Axes, panel: Panel, groups: Groups) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")
    room, measure = axes.get_window_extent().width / DPI, size_in_inches(SMALL_SIZE)
    title = squeezed(panel.title, room - measure(panel.note) - 0.1, size_in_inches(11, "bold"))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=5)
    axes.set_title(panel.note, loc="right", fontsize=SMALL_SIZE, color="#444444", pad=5)
    low, high = panel.coords.min(axis=0), panel.coords.max(axis=0)
    shape = axes.get_window_extent().height / axes.get_window_extent().width
    middle, across = (low + high) / 2, max(float(high[0] - low[0]), float(high[1] - low[1]) / shape)
    half = np.array([1, shape]) * max(across / 2 * 1.06, 1e-3)  # a margin, and one scale for both axes
    axes.set_xlim(middle[0] - half[0], middle[0] + half[0])
    axes.set_ylim(middle[1] - half[1], middle[1] + half[1])
    if len(panel.coords) > SHADED:
        _shade(axes, panel.coords, groups)
    else:
        _scatter(axes, panel.coords, groups)
    name_groups(axes, panel.coords, groups)


def _scatter(axes: Axes, coords: Points, groups: Groups) -> None:
    """Draw points, small labels last, so that large ones do not bury them."""
    from matplotlib.colors import to_rgba_array

    n = len(coords)
    turn = groups.codes + 1  # labels are in order of their sizes
    order = np.lexsort((np.random.default_rng(0).permutation(n), turn))
    size, alpha = marker(n)
    sizes = size * (1 + 0.7 * _labels_above(coords, turn)) ** 2
    axes.scatter(
        coords[order, 0], coords[order, 1], s=sizes[order], alpha=alpha, linewidths=0,
        c=to_rgba_array(groups.shade_colours)[groups.shades[order]], rasterized=True,
    )  # fmt: skip


def _labels_above(coords: Points, turn: Ints, most: int = 3) -> Ints:
    """How many other labels are drawn over each row at the same spot: equal vectors show as rings."""
    spot = np.unique(coords, axis=0, return_inverse=True)[1].ravel()
    stacks, row = np.unique(spot * (turn.max() + 1) + turn, return_inverse=True)
    spots = stacks // (turn.max() + 1)
    above = np.searchsorted(spots, spots, side="right") - 1 - np.arange(len(spots))
    return np.minimum(above, most)[row.ravel()]


def _shade(axes: Axes, coords: Points, groups: Groups) -> None:
    """Draw density: a pixel mixes its labels' colours, small labels weigh more; more points make it darker."""
    from matplotlib.colors import to_rgba_array

    frame = axes.get_window_extent()
    across, up = int(frame.width * 0.7), int(frame.height * 0.7)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    columns = np.clip(((coords[:, 0] - x0) / (x1 - x0) * across).astype(int), 0, across - 1)
    rows = np.clip(((coords[:, 1] - y0) / (y1 - y0) * up).astype(int), 0, up - 1)
    pixel = rows * across + columns
    colours, shades = to_rgba_array(groups.shade_colours)[:, :3], groups.shades
    weight = (1 / np.sqrt(np.maximum(np.bincount(shades, minlength=len(colours)), 1)))[shades]
    mass = np.bincount(pixel, weight, across * up)
    mixed = np.stack([np.bincount(pixel, weight * c[shades], across * up) for c in colours.T], 1)
    counts = np.bincount(pixel, minlength=across * up)
    dark = np.log1p(counts) / np.log1p(np.quantile(counts[counts > 0], 0.99))
    image = np.ones((across * up, 4))
    image[:, :3] = mixed / np.maximum(mass, 1e-12)[:, None]
    image[:, 3] = np.where(counts > 0, np.clip(0.25 + 0.75 * dark, 0, 1), 0)
    axes.imshow(image.reshape(up, across, 4), origin="lower", extent=(x0, x1, y0, y1), interpolation="antialiased")


@dataclass(frozen=True)
class _Legend:
    """Colours, labels and their counts, in as many columns as fit below the maps.

    :param rows: lines of a column; `across`: width of a column in inches.
    """

    title: str
    entries: Sequence[tuple[str, str, int]]
    rows: int
    across: float

    @classmethod
    def of(cls, groups: Groups, room: float) -> _Legend:
        entries = list(_legend(groups))
        measure = size_in_inches(LEGEND_SIZE)
        widest = max(measure(name) + measure(f"{count:,}") for _, name, count in entries) if entries else 0
        across = min(widest + 0.6, room / 4 if room > SINGLE else room / 3)
        columns = max(1, min(int(room / across), len(entries)))
        title = squeezed(groups.title, room, size_in_inches(11, "bold"))
        return cls(title, entries, -(-len(entries) // columns), across)

    @property
    def height(self) -> float:
        """Inches."""
        return 0.35 + ENTRY * self.rows

    def draw(self, figure: Figure, above: float) -> None:
        """Draw it; its top is `above` the lower edge of the figure, in inches."""
        width, height = figure.get_size_inches()
        figure.text(EDGE / width, (above - 0.1) / height, self.title, fontsize=11, fontweight="bold", va="top")
        measure = size_in_inches(LEGEND_SIZE)
        for i, (colour, name, count) in enumerate(self.entries):
            column, row = divmod(i, self.rows)
            left, y, number = EDGE + column * self.across, (above - 0.45 - ENTRY * row) / height, f"{count:,}"
            shown = squeezed(name, self.across - 0.5 - measure(number), measure)
            figure.text(left / width, y, "●", color=colour, fontsize=10, va="center", family=LATIN)
            figure.text((left + 0.17) / width, y, shown, fontsize=LEGEND_SIZE, va="center")
            place = (left + 0.25 + measure(shown)) / width
            figure.text(place, y, number, fontsize=LEGEND_SIZE - 1, color="#555555", va="center")


def _legend(groups: Groups) -> Iterable[tuple[str, str, int]]:
    yield from zip(PALETTE, groups.names, groups.counts, strict=False)
    if len(groups.names) > SHOWN:
        yield "#ffffff", f"{len(groups.names) - SHOWN} more (colours repeat)", sum(groups.counts[SHOWN:])
    if groups.without:
        yield GREY, "no label", groups.without
