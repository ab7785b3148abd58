"""The picture: maps side by side, coloured by label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.arrays import Ints
from ebr_lib.files import written_whole
from ebr_lib.tables import columns_of, squeezed
from ebr_lib.visualize.fonts import LATIN, fonts_for, quiet_fonts
from ebr_lib.visualize.groups import GREY, PALE, PALETTE, SHOWN, Groups, Panel, Points
from ebr_lib.visualize.labels import (
    DPI,
    EDGE,
    GAP,
    LEGEND,
    LINE,
    PANEL,
    SMALL_SIZE,
    TITLE_SIZE,
    marker,
    name_groups,
    size_in_inches,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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

    texts = "".join([title, caption, groups.title, *groups.names[:SHOWN], *(p.title + p.note for p in panels)])
    kind = path.suffix.lower()
    settings = {"font.family": fonts_for(texts, fonts), "text.parse_math": False, "svg.hashsalt": "ebr"}
    with quiet_fonts(), mpl.rc_context(settings):
        figure = _composed(panels, groups, title, caption)
        with written_whole(path) as new:
            figure.savefig(new, format=kind[1:], metadata=KINDS[kind])


def _composed(panels: Sequence[Panel], groups: Groups, title: str, caption: str) -> Figure:
    """The figure, with room for title and caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, down = min(2, len(panels)), (len(panels) + 1) // 2
    width = across * PANEL + LEGEND
    title = wrapped(title, width - 2 * EDGE, size_in_inches(TITLE_SIZE, "bold"))
    caption = wrapped(caption, width - 2 * EDGE, size_in_inches(SMALL_SIZE))
    top, bottom = 0.6 + 0.27 * title.count("\n"), 0.4 + LINE * caption.count("\n")
    figure = Figure(figsize=(width, top + down * (PANEL + GAP) + bottom), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    for i, panel in enumerate(panels):
        row, column = divmod(i, across)
        left, upper = EDGE + column * PANEL, top + row * (PANEL + GAP) + 0.3
        box = (left / width, 1 - (upper + PANEL - 0.15) / height, (PANEL - 0.2) / width, (PANEL - 0.15) / height)
        _draw_panel(figure.add_axes(box), panel, groups)
    figure.text(EDGE / width, 1 - 0.2 / height, title, fontsize=TITLE_SIZE, fontweight="bold", va="top")
    figure.text(
        EDGE / width, 0.14 / height, caption, fontsize=SMALL_SIZE, color="#555555", va="bottom", linespacing=1.45
    )
    _draw_legend(figure, groups, top)
    return figure


def _draw_panel(axes: Axes, panel: Panel, groups: Groups) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=5)
    axes.set_title(panel.note, loc="right", fontsize=SMALL_SIZE, color="#555555", pad=5)
    low, high = panel.coords.min(axis=0), panel.coords.max(axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2 * 1.05, 1e-3)  # a square with a margin
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)
    if len(panel.coords) > SHADED:
        _shade(axes, panel.coords, groups)
    else:
        _scatter(axes, panel.coords, groups)
    name_groups(axes, panel.coords, groups)


def _scatter(axes: Axes, coords: Points, groups: Groups) -> None:
    """Draw points, small labels last, so that large ones do not bury them."""
    from matplotlib.colors import to_rgba_array

    n = len(coords)
    turn = _turns(groups)
    order = np.lexsort((np.random.default_rng(0).permutation(n), turn))
    size, alpha = marker(n)
    sizes = size * (1 + 0.7 * _labels_above(coords, turn)) ** 2
    axes.scatter(
        coords[order, 0], coords[order, 1], s=sizes[order], alpha=alpha, linewidths=0,
        c=to_rgba_array(groups.shade_colours)[groups.shades[order]], rasterized=True,
    )  # fmt: skip


def _turns(groups: Groups) -> Ints:
    """Drawing order: rows without a label first, then labels by size; all labels without a colour count as one."""
    sizes = np.bincount(groups.shades, minlength=len(groups.shade_colours))
    sizes[-1] = len(groups.codes) + 1
    turn = np.empty_like(sizes)
    turn[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return turn[groups.shades]


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

    side = int(PANEL * DPI * 0.7)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    columns = np.clip(((coords[:, 0] - x0) / (x1 - x0) * side).astype(int), 0, side - 1)
    rows = np.clip(((coords[:, 1] - y0) / (y1 - y0) * side).astype(int), 0, side - 1)
    pixel = rows * side + columns
    colours, shades = to_rgba_array(groups.shade_colours)[:, :3], groups.shades
    weight = (1 / np.sqrt(np.maximum(np.bincount(shades, minlength=len(colours)), 1)))[shades]
    mass = np.bincount(pixel, weight, side * side)
    mixed = np.stack([np.bincount(pixel, weight * c[shades], side * side) for c in colours.T], 1)
    counts = np.bincount(pixel, minlength=side * side)
    dark = np.log1p(counts) / np.log1p(np.quantile(counts[counts > 0], 0.99))
    image = np.ones((side * side, 4))
    image[:, :3] = mixed / np.maximum(mass, 1e-12)[:, None]
    image[:, 3] = np.where(counts > 0, np.clip(0.25 + 0.75 * dark, 0, 1), 0)
    axes.imshow(image.reshape(side, side, 4), origin="lower", extent=(x0, x1, y0, y1), interpolation="antialiased")


def _draw_legend(figure: Figure, groups: Groups, above: float) -> None:
    width, height = figure.get_size_inches()
    left, top, room = (width - LEGEND + 0.05) / width, 1 - (above + 0.3) / height, LEGEND - 0.05 - EDGE
    title = squeezed(groups.title, room, size_in_inches(11, "bold"))
    figure.text(left, top + 0.08 / height, title, fontsize=11, fontweight="bold", va="bottom")
    measure = size_in_inches(9.5)
    for i, (colour, name, count) in enumerate(_legend(groups)):
        y, number = top - (0.17 + 0.29 * i) / height, f"{count:,}"
        figure.text(left, y, "●", color=colour, fontsize=11, va="center", family=LATIN)
        fitting = squeezed(name, room - 0.35 - measure(number), measure)
        figure.text(left + 0.2 / width, y, fitting, fontsize=9.5, va="center")
        figure.text((width - EDGE) / width, y, number, fontsize=9, color="#555555", va="center", ha="right")


def _legend(groups: Groups) -> Iterable[tuple[str, str, int]]:
    yield from zip(PALETTE, groups.names, groups.counts, strict=False)
    if len(groups.names) > SHOWN:
        yield GREY, f"{len(groups.names) - SHOWN} other labels", sum(groups.counts[SHOWN:])
    if groups.without:
        yield PALE, "no label", groups.without


def wrapped(text: str, most: float, width_of: Callable[[str], float] = columns_of) -> str:
    """Break a text into lines of a width: at spaces, and inside words longer than half of it."""
    return "\n".join(_wrapped_line(line, most, width_of) for line in text.split("\n"))


def _wrapped_line(text: str, most: float, width_of: Callable[[str], float]) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        pieces = list(word) if width_of(word) > most / 2 else [word]
        for i, piece in enumerate(pieces):
            joined = f"{line} {piece}" if line and i == 0 else line + piece
            if line and width_of(joined) > most:
                lines.append(line)
                joined = piece
            line = joined
    return "\n".join([*lines, line])
