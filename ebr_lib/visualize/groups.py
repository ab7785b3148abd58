"""What points are coloured by, and the palette."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints

Points = NDArray[np.floating[Any]]

# colours that read well on white, each as far in OKLab from those before it, and from grey, as can be
PALETTE = (
    "#5874ea", "#9c0451", "#55e02d", "#3e6102", "#fd67f4", "#f44657", "#6f00c2", "#faab3f", "#2a5885", "#a35e16",
    "#4cd7c8", "#b05baa", "#189a30", "#fd9cba", "#1139d7", "#acbaf8", "#a5a50e", "#1b8278", "#26a9f1", "#b180fc",
)  # fmt: skip
GREY, PALE = "#9a9a9a", "#d4d4d4"  # smaller labels, and rows without a label
SHOWN = len(PALETTE)  # labels that have a colour, a name on the map and a line in the legend


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
    """

    codes: Ints
    names: Sequence[str]
    counts: Sequence[int]
    title: str

    @property
    def shades(self) -> Ints:
        """What each row is drawn as, a place in `shade_colours`: its label, then all other labels, then no label."""
        own = min(SHOWN, len(self.names))
        return np.where(self.codes < 0, own + 1, np.minimum(self.codes, own))

    @property
    def shade_colours(self) -> list[str]:
        """A colour for each of the `SHOWN` largest labels, then for all others, then for no label."""
        return [*PALETTE[: len(self.names)], GREY, PALE]

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
