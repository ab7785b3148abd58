"""What points are coloured by, and the palette."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints

Points = NDArray[np.floating[Any]]

SHOWN = 20  # labels that have a colour, a name on the map and a line in the legend
GREY, PALE = "#9a9a9a", "#d4d4d4"  # labels beyond those, and rows without a label


@dataclass(frozen=True)
class Panel:
    """One map: its title, coordinates (n × 2), a line on how far it can be trusted, and which space it is a map of."""

    title: str
    coords: Points
    note: str = ""
    space: int = 0


@dataclass(frozen=True)
class Groups:
    """What the points are coloured by.

    :param codes: for each row the place of its label in `names`; -1 where it has none.
    :param names: labels, largest first.
    :param counts: rows of each label.
    :param title: what the labels are: the column's name, or "k-means cluster".
    """

    codes: Ints
    names: Sequence[str]
    counts: Sequence[int]
    title: str

    @property
    def colours(self) -> list[str]:
        """A colour a label: the largest have their own, the rest share one."""
        own = palette(min(SHOWN, len(self.names)))
        return own + [GREY] * (len(self.names) - len(own))

    @property
    def shades(self) -> Ints:
        """What each row is drawn as, a place in `shade_colours`: its label, then all other labels, then no label."""
        own = min(SHOWN, len(self.names))
        return np.where(self.codes < 0, own + 1, np.minimum(self.codes, own))

    @property
    def shade_colours(self) -> list[str]:
        """A colour for each of the `SHOWN` largest labels, then for all others, then for no label."""
        return [*palette(min(SHOWN, len(self.names))), GREY, PALE]

    @property
    def without(self) -> int:
        """Rows that have no label."""
        return int((self.codes < 0).sum())


@functools.cache
def _candidates() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colours that read well on white, as OKLab and as sRGB (Ottosson 2020)."""
    lightness, chroma, hue = np.meshgrid(
        np.linspace(0.45, 0.8, 8), np.linspace(0.09, 0.24, 6), np.linspace(0, 2 * np.pi, 72, endpoint=False)
    )
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1).reshape(-1, 3)
    lms = lab @ np.array(
        [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    rgb = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    real = ((rgb >= 0) & (rgb <= 1)).all(axis=1)
    rgb = rgb[real]
    return lab[real], np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * np.maximum(rgb, 0) ** (1 / 2.4) - 0.055)


@functools.cache
def _palette(count: int) -> tuple[str, ...]:
    lab, rgb = _candidates()
    chosen = [int(np.abs(lab - [0.6, 0.0, -0.18]).sum(axis=1).argmin())]  # a blue to begin with
    gap = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    gap = np.minimum(gap, np.linalg.norm(lab - [0.68, 0, 0], axis=1))  # and away from the grey of the rest
    while len(chosen) < count:
        chosen.append(int(gap.argmax()))
        gap = np.minimum(gap, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple("#" + "".join(f"{round(255 * c):02x}" for c in rgb[i]) for i in chosen[:count])


def palette(count: int) -> list[str]:
    """Up to `count` colours, each as far from those before it as can be."""
    return list(_palette(count))


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
