"""What points are coloured by, and the palette."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints

Points = NDArray[np.floating[Any]]

# Each as far in OKLab as can be from those before it, from grey, and from the paper: its contrast with the paper is 3:1
# or more, also at `OPACITY`. The page is light or dark, the picture light.
PALETTE = (
    "#3f63e0", "#9e0000", "#006200", "#5a0880", "#bb34ac", "#f05200", "#005278", "#449600", "#876216", "#804b70",
    "#161eac", "#5a3400", "#088078", "#9e62f8", "#d21652", "#7834bb", "#700f44", "#b46962", "#0f8ec3", "#9669ac",
)  # fmt: skip
DARK_PALETTE = (
    "#7d9bff", "#ffe83c", "#ff804b", "#00f8ff", "#62bb44", "#ffc3f8", "#d25aac", "#c3c396", "#00bbc3", "#ac8000",
    "#78f087", "#e18eff", "#d2524b", "#c396ac", "#2d9662", "#96caff", "#8e69d2", "#0087d2", "#daf0ca", "#ffb400",
)  # fmt: skip
GREY = "#8b909a"  # rows without a label
OPACITY = 0.85
SHOWN = len(PALETTE)  # colours; further labels repeat them


@dataclass(frozen=True)
class Panel:
    """One map: its title, coordinates (n × 2), a note on how far to trust it, and the space that it is a map of."""

    title: str
    coords: Points
    note: str = ""
    space: int = 0


@dataclass(frozen=True)
class Groups:
    """What the points are coloured by.

    :param codes: for each row the place of its label in `names`; -1 if it has none.
    :param names: labels, largest first.
    :param counts: rows of each label.
    :param title: what the labels are: the column's name, or "k-means cluster".
    :param spread: the colour of each label, as `spread_out` chose it.
    """

    codes: Ints
    names: Sequence[str]
    counts: Sequence[int]
    title: str
    spread: Ints | None = field(default=None, compare=False)

    @property
    def shades(self) -> Ints:
        """What each row is drawn as, a place in `shade_colours`: the colour of its label, or that of no label."""
        return np.where(self.codes < 0, len(self.shade_colours) - 1, self.colours[self.codes])

    @property
    def colours(self) -> Ints:
        """The colour of each label, a place in `PALETTE`."""
        return np.arange(len(self.names)) % SHOWN if self.spread is None else self.spread

    @property
    def shade_colours(self) -> list[str]:
        """The colours of the labels, then that of no label."""
        return [*PALETTE[: len(self.names)], GREY]

    def spread_out(self, cores: Points) -> Groups:
        """With colours for the labels beyond the palette's: each takes one whose labels are far from its own core.

        :param cores: the place of each label on a map, NaN where it has none.
        """
        colours = np.arange(len(self.names)) % SHOWN
        for label in range(SHOWN, len(colours)):
            gaps = np.nan_to_num(np.linalg.norm(cores[:label] - cores[label], axis=1), nan=np.inf)
            nearest = np.full(SHOWN, np.inf)
            np.minimum.at(nearest, colours[:label], gaps)
            colours[label] = nearest.argmax() if np.isfinite(nearest).all() else colours[label]
        return dataclasses.replace(self, spread=colours)

    @property
    def without(self) -> int:
        """Number of rows without a label."""
        return int((self.codes < 0).sum())


def groups_of(labels: Sequence[str | None], title: str) -> Groups:
    """Rows by label, the largest group first; a row without a label is in none."""
    sizes = Counter(label for label in labels if label is not None)
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    place = {name: code for code, name in enumerate(names)}
    codes = np.array([-1 if label is None else place[label] for label in labels], dtype=np.int64)
    empty = "(empty)"
    while empty in sizes:  # a label of that very name
        empty = f"({empty})"
    return Groups(codes, [name or empty for name in names], [sizes[name] for name in names], title)
