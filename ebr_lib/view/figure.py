"""The picture: maps side by side, coloured by label, with fonts that hold the labels' own characters."""

from __future__ import annotations

import contextlib
import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.files import written_whole
from ebr_lib.logs import logger
from ebr_lib.tables import columns_of, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

SHOWN = 20  # labels that have a colour, a name on the map and a line in the legend
GREY, PALE = "#9a9a9a", "#d4d4d4"  # labels beyond those, and rows without a label
SHADED = 100_000  # from this many points on, density is drawn instead of points
PANEL, LEGEND, DPI = 7.0, 3.0, 150
LATIN = "DejaVu Sans"  # comes with matplotlib
CJK_PACKAGE, CJK_PIN = "noto-cjk-sans-otc", "noto-cjk-sans-otc==0.0.1"  # Noto Sans CJK Regular, OFL 1.1


@dataclass(frozen=True)
class Panel:
    """One map: its title, coordinates (n × 2), and a line on how far it can be trusted."""

    title: str
    coords: Floats
    note: str = ""


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
    def without(self) -> int:
        """Rows that have no label."""
        return int((self.codes < 0).sum())


# --- colours ------------------------------------------------------------------------------------------------------


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


# --- fonts --------------------------------------------------------------------------------------------------------


def fonts_for(text: str, wanted: Sequence[str] = ()) -> list[str]:
    """Font families that together hold the characters of a text; Latin keeps matplotlib's own font.

    Tried in this order: `wanted` (names of families, or font files), the system's fonts, the font of a PyPI package.
    Characters that no font holds are named in one warning, with what to install.
    """
    signs = {c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Mn")}
    families, missing = [LATIN], signs - _held(LATIN, signs)
    for tier in (lambda: _wanted_families(wanted), _system_families, _packaged_families):
        held = {family: _held(family, missing) for family in tier()} if missing else {}
        # `wanted` is somebody's order; among the system's fonts, the one that holds most comes first
        for family in sorted(held, key=lambda f: -len(held[f])) if tier is _system_families else held:
            if held[family] & missing:
                families.append(family)
                missing -= held[family]
    if missing:
        _warn_missing(missing)
    return families


def _warn_missing(missing: set[str]) -> None:
    shown = ", ".join(f"{c} (U+{ord(c):04X})" for c in sorted(missing)[:8])
    chinese = any("CJK" in unicodedata.name(c, "") for c in missing)
    way = f"pip install {CJK_PIN}" if chinese else "apt-get install fonts-symbola"
    logger.warning(
        "no font here holds %d of the characters to draw (%s): they are drawn as boxes; `%s` brings one, or name one "
        "in chinese_fonts",
        len(missing),
        shown,
        way,
    )


def _held(family: str, signs: set[str]) -> set[str]:
    """Which of the signs a family's regular face holds."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))
    return {c for c in signs if font.get_char_index(ord(c))}


def _known_families() -> set[str]:
    from matplotlib.font_manager import fontManager

    # "Last Resort" has a box for every sign there is
    return {font.name for font in fontManager.ttflist if not font.name.startswith("Last Resort")}


@contextlib.contextmanager
def _quiet_fonts() -> Iterator[None]:
    """Without matplotlib's warning a text, a weight and a missing sign: `fonts_for` says once what matters."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            yield
    finally:
        log.setLevel(level)


def _wanted_families(wanted: Sequence[str]) -> list[str]:
    files = [Path(name) for name in wanted if Path(name).suffix.lower() in (".ttf", ".ttc", ".otf")]
    named = [name for name in wanted if name in _known_families()]
    return [family for file in files if file.is_file() for family in _added(file)] + named


def _system_families() -> list[str]:
    """Families of the system, those made for simplified Chinese first: the others draw some signs the Japanese way."""
    simplified = ("SC", "CN", "GB", "YaHei", "Hei", "WenQuanYi", "Song", "Fallback")
    return sorted(
        _known_families() - {LATIN}, key=lambda f: ("Mono" in f, not any(hint in f for hint in simplified), f)
    )


def _packaged_families() -> list[str]:
    """The font that a PyPI package ships, found without importing the package."""
    from importlib import metadata

    try:
        files = metadata.files(CJK_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Path(str(file.locate())) for file in files if file.suffix in (".ttc", ".otf", ".ttf")]
    added = [family for path in found if path.is_file() for family in _added(path)]
    return sorted(added, key=lambda f: ("Mono" in f, "SC" not in f))


def _added(path: Path) -> list[str]:
    """Families of a font file, made known to matplotlib."""
    from matplotlib.font_manager import fontManager

    if not any(Path(font.fname) == path for font in fontManager.ttflist):
        fontManager.addfont(path)
    return list(dict.fromkeys(font.name for font in fontManager.ttflist if Path(font.fname) == path))


# --- drawing ------------------------------------------------------------------------------------------------------


def draw(
    path: Path, panels: Sequence[Panel], groups: Groups, *, title: str, caption: str, fonts: Sequence[str]
) -> None:
    """Write the picture of one or several maps of the same points.

    :param path: where the PNG goes; what stood there stays until the new one is whole.
    :param panels: maps, at most two beside each other.
    :param fonts: fonts for the labels' characters, tried before the system's.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = "".join([title, caption, groups.title, *groups.names[:SHOWN], *(p.title + p.note for p in panels)])
    with _quiet_fonts(), mpl.rc_context({"font.family": fonts_for(texts, fonts), "text.parse_math": False}):
        across, down = min(2, len(panels)), (len(panels) + 1) // 2
        figure = Figure(figsize=(across * PANEL + LEGEND, down * (PANEL + 0.35) + 1.25), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        places = _places(figure, across, down)
        for panel, axes in zip(panels, places, strict=False):
            _draw_panel(axes, panel, groups)
        _draw_words(figure, groups, title, caption)
        with written_whole(path) as new:
            figure.savefig(new, format="png", metadata={"Software": None})


def _places(figure: Figure, across: int, down: int) -> list[Axes]:
    width, height = figure.get_size_inches()
    places = []
    for i in range(across * down):
        row, column = divmod(i, across)
        left, top = 0.15 + column * PANEL, 0.6 + row * (PANEL + 0.35) + 0.3
        box = (left / width, 1 - (top + PANEL - 0.15) / height, (PANEL - 0.2) / width, (PANEL - 0.15) / height)
        places.append(figure.add_axes(box))
    return places


def _draw_panel(axes: Axes, panel: Panel, groups: Groups) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=5)
    axes.set_title(panel.note, loc="right", fontsize=9, color="#555555", pad=5)
    _frame(axes, panel.coords)
    if len(panel.coords) > SHADED:
        _shade(axes, panel.coords, groups)
    else:
        _scatter(axes, panel.coords, groups)
    _name_groups(axes, panel.coords, groups)


def _frame(axes: Axes, coords: Floats) -> None:
    """Square limits around all points, with a margin."""
    low, high = coords.min(axis=0), coords.max(axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2 * 1.05, 1e-3)
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)


def _row_colours(groups: Groups) -> list[str]:
    return [*groups.colours, PALE]  # -1, no label, is the last


def _scatter(axes: Axes, coords: Floats, groups: Groups) -> None:
    """Points, those of small labels last, so that a large one does not bury them."""
    from matplotlib.colors import to_rgba_array

    n = len(coords)
    turn = np.where((groups.codes < 0) | (groups.codes >= SHOWN), -1, groups.codes)
    order = np.lexsort((np.random.default_rng(0).permutation(n), turn))
    colours = to_rgba_array(_row_colours(groups))[groups.codes]
    size, alpha = float(np.clip(45_000 / n, 1.2, 36)), float(np.clip(4 / n**0.2, 0.45, 0.9))
    axes.scatter(coords[order, 0], coords[order, 1], s=size, c=colours[order], alpha=alpha, linewidths=0)


def _shade(axes: Axes, coords: Floats, groups: Groups) -> None:
    """Density: each pixel mixes its labels' colours, small labels weighing more; more points make it darker."""
    from matplotlib.colors import to_rgba_array

    side = int(PANEL * DPI * 0.7)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    columns = np.clip(((coords[:, 0] - x0) / (x1 - x0) * side).astype(int), 0, side - 1)
    rows = np.clip(((coords[:, 1] - y0) / (y1 - y0) * side).astype(int), 0, side - 1)
    pixel = rows * side + columns
    colours = to_rgba_array(_row_colours(groups))[:, :3]
    sizes = np.bincount(np.where(groups.codes < 0, len(groups.names), groups.codes), minlength=len(colours))
    weight = (1 / np.sqrt(np.maximum(sizes, 1)))[groups.codes]
    mass = np.bincount(pixel, weight, side * side)
    mixed = np.stack([np.bincount(pixel, weight * c[groups.codes], side * side) for c in colours.T], 1)
    counts = np.bincount(pixel, minlength=side * side)
    dark = np.log1p(counts) / np.log1p(np.quantile(counts[counts > 0], 0.99))
    image = np.ones((side * side, 4))
    image[:, :3] = mixed / np.maximum(mass, 1e-12)[:, None]
    image[:, 3] = np.where(counts > 0, np.clip(0.25 + 0.75 * dark, 0, 1), 0)
    axes.imshow(image.reshape(side, side, 4), origin="lower", extent=(x0, x1, y0, y1), interpolation="antialiased")


# --- names on the map ---------------------------------------------------------------------------------------------


def _name_groups(axes: Axes, coords: Floats, groups: Groups) -> None:
    """Write labels at their medoids, the largest first; one that finds no free place stays in the legend alone."""
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = []
    for code, colour in enumerate(groups.colours[: min(SHOWN, len(groups.names))]):
        points = coords[groups.codes == code]
        if not len(points):
            continue
        x, y = _medoid(points)
        text = axes.text(
            x, y, squeezed(groups.names[code], 24), fontsize=10.5, ha="center", va="center",
            color=_darker(colour), path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5,
        )  # fmt: skip
        if not _find_room(text, axes, renderer, frame, taken):
            text.remove()


def _medoid(points: Floats, cells: int = 10) -> Floats:
    """The point in the middle of where the points lie densest: a median of all may lie between two islands."""
    from scipy.ndimage import uniform_filter

    low, high = points.min(axis=0), points.max(axis=0)
    cell = np.minimum((points - low) / np.maximum(high - low, 1e-12) * cells, cells - 1).astype(int)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (cell[:, 0], cell[:, 1]), 1)
    densest = np.unravel_index(uniform_filter(counts, 3, mode="constant").argmax(), counts.shape)
    around = points[(np.abs(cell - densest) <= 1).all(axis=1)]
    return around[((around - np.median(around, axis=0)) ** 2).sum(axis=1).argmin()]


def _find_room(text: Any, axes: Axes, renderer: Any, frame: Any, taken: list[Any]) -> bool:
    """Move a text by up to two of its heights until it overlaps no other and lies within the frame."""
    home = axes.transData.transform(text.get_position())
    box = text.get_window_extent(renderer)
    steps = [(0.0, 0.0)] + [(dx, dy) for dy in (1, -1, 2, -2) for dx in (0, 0.5, -0.5)]
    for dx, dy in steps:
        moved = box.translated(dx * box.width, dy * box.height * 1.05).padded(1)
        inside = frame.x0 <= moved.x0 and moved.x1 <= frame.x1 and frame.y0 <= moved.y0 and moved.y1 <= frame.y1
        if inside and not any(moved.overlaps(other) for other in taken):
            taken.append(moved)
            text.set_position(
                axes.transData.inverted().transform(home + np.array([dx * box.width, dy * box.height * 1.05]))
            )
            return True
    return False


def _darker(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.62 * c for c in to_rgb(colour))


def squeezed(text: str, columns: int) -> str:
    """A label cut in its middle: labels that begin alike often end apart."""
    text = " ".join(text.split())
    if columns_of(text) <= columns:
        return text
    tail = text[-columns // 3 :]
    while columns_of(tail) > columns // 3:
        tail = tail[1:]
    return shortened(text, columns - columns_of(tail)) + tail


# --- legend and caption -------------------------------------------------------------------------------------------


def _draw_words(figure: Figure, groups: Groups, title: str, caption: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.2 / height, shortened(title, 120), fontsize=15, fontweight="bold", va="top")
    figure.text(
        0.15 / width, 0.14 / height, wrapped(caption, int(width * 13.5)), fontsize=9, color="#555555", va="bottom",
        linespacing=1.45,
    )  # fmt: skip
    left, top = (width - LEGEND + 0.05) / width, 1 - 0.9 / height
    figure.text(left, top + 0.08 / height, shortened(groups.title, 30), fontsize=11, fontweight="bold", va="bottom")
    for i, (colour, name, count) in enumerate(_legend(groups)):
        y = top - (0.17 + 0.29 * i) / height
        figure.text(left, y, "●", color=colour, fontsize=11, va="center", family=LATIN)
        figure.text(left + 0.2 / width, y, squeezed(name, 25), fontsize=9.5, va="center")
        figure.text((width - 0.15) / width, y, f"{count:,}", fontsize=9, color="#555555", va="center", ha="right")


def _legend(groups: Groups) -> Iterable[tuple[str, str, int]]:
    yield from zip(groups.colours[:SHOWN], groups.names[:SHOWN], groups.counts[:SHOWN], strict=False)
    if len(groups.names) > SHOWN:
        yield GREY, f"{len(groups.names) - SHOWN} other labels", sum(groups.counts[SHOWN:])
    if groups.without:
        yield PALE, "no label", groups.without


def wrapped(text: str, columns: int) -> str:
    """Break a text into lines of so many half-width columns: at spaces, and inside words that are longer."""
    lines, line = [], ""
    for word in text.split(" "):
        pieces = list(word) if columns_of(word) > columns // 2 else [word]
        for i, piece in enumerate(pieces):
            joined = f"{line} {piece}" if line and i == 0 else line + piece
            if columns_of(joined) > columns:
                lines.append(line)
                joined = piece
            line = joined
    return "\n".join([*lines, line])
