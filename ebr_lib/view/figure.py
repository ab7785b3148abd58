"""The picture: maps side by side, coloured by label, with fonts that hold the labels' own characters."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints
from ebr_lib.files import written_whole
from ebr_lib.logs import logger
from ebr_lib.tables import columns_of, squeezed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = NDArray[np.floating[Any]]

SHOWN = 20  # labels that have a colour, a name on the map and a line in the legend
GREY, PALE = "#9a9a9a", "#d4d4d4"  # labels beyond those, and rows without a label
SHADED = 100_000  # from this many points on, density is drawn instead of points
PANEL, LEGEND, EDGE, GAP, LINE, DPI = 7.0, 3.0, 0.15, 0.35, 0.2, 150  # inches; LINE is one of the caption
TITLE_SIZE, NAME_SIZE, SMALL_SIZE = 15.0, 10.5, 9.0  # points
NAME_WIDTH = 1.9  # inches that a name on the map may take
THINNED = 1000  # points of a label that decide where names may stand
HIDDEN = 0.2  # share of any label's points that a name may hide
FAR = 0.03  # what a name's distance of one text height costs, against the share of the points that it hides
# kinds of picture, and what of their metadata would make the same picture another file each time
KINDS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
LATIN = "DejaVu Sans"  # comes with matplotlib
CJK_PACKAGE, CJK_PIN = "noto-cjk-sans-otc", "noto-cjk-sans-otc==0.0.1"  # Noto Sans CJK Regular, OFL 1.1
# Debian's packages for what that font lacks, and a family that each brings
RARE_CJK_PACKAGE = "fonts-hanazono", "HanaMinB"  # CJK extensions B to F
SYMBOL_PACKAGE = "fonts-symbola", "Symbola"  # symbols, and emoji in black and white
SCRIPT_PACKAGE = "fonts-noto-core", "Noto Sans Thai"  # scripts of the world, without CJK
UNUSABLE = (RuntimeError, NotImplementedError, OSError)  # what matplotlib raises on a font that it cannot draw with


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
    for tier in (lambda: _wanted_families(wanted), _system_families, _new_families, _packaged_families):
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
    signs = sorted(missing)
    ways = dict.fromkeys(filter(None, map(_remedy, signs)))
    brings = [f"`{way}` brings one for {_named([c for c in signs if _remedy(c) == way], 3)}" for way in ways]
    logger.warning(
        "no font here holds %d of the characters to draw (%s): they are drawn as boxes; %s",
        len(missing),
        _named(signs, 8),
        "; ".join([*brings, "or name a font that holds them in chinese_fonts"]),
    )


def _named(signs: Sequence[str], most: int) -> str:
    return ", ".join(f"{c} (U+{ord(c):04X})" for c in signs[:most]) + (", …" if len(signs) > most else "")


def _remedy(sign: str) -> str | None:
    """The command that installs a font for a sign; None where that font is here already, and does not hold it."""
    name, code = unicodedata.name(sign, ""), ord(sign)
    if 0x20000 <= code < 0x40000 or any(word in name for word in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")):
        if not _packaged_families():
            return f"pip install {CJK_PIN}"
        package, family = RARE_CJK_PACKAGE
    elif unicodedata.category(sign).startswith("S") or 0x1F000 <= code < 0x20000:
        package, family = SYMBOL_PACKAGE
    else:
        package, family = SCRIPT_PACKAGE
    return None if family in _known_families() else f"apt-get install {package}"


def _held(family: str, signs: set[str]) -> set[str]:
    """Which of the signs a family's regular face holds."""
    from matplotlib import font_manager

    with _quiet_fonts():  # some families have no regular face: the nearest will do
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


def absent_fonts(wanted: Sequence[str]) -> list[str]:
    """Which of these names of families and font files are not here."""
    return [name for name in wanted if not (Path(name).is_file() if _is_file_name(name) else name in _known_families())]


def _is_file_name(name: str) -> bool:
    return Path(name).suffix.lower() in (".ttf", ".ttc", ".otf")


def _wanted_families(wanted: Sequence[str]) -> list[str]:
    here = [name for name in wanted if name not in absent_fonts(wanted)]
    return [family for name in here for family in (_told(Path(name)) if _is_file_name(name) else [name])]


def _told(path: Path) -> list[str]:
    """Families of a font file that somebody named; one that matplotlib cannot draw with is told, and left out."""
    try:
        return _added(path)
    except UNUSABLE as error:
        logger.warning("font file %s cannot be used (%s); name another one in chinese_fonts", path, error)
        return []


def _system_families() -> list[str]:
    return _for_chinese(_known_families() - {LATIN})


def _for_chinese(families: Iterable[str]) -> list[str]:
    """Families made for simplified Chinese first: the others draw some signs the Japanese way."""
    simplified = ("SC", "CN", "GB", "YaHei", "Hei", "WenQuanYi", "Song", "Fallback")
    return sorted(families, key=lambda f: ("Mono" in f, not any(hint in f for hint in simplified), f))


def _new_families() -> list[str]:
    """Families of fonts that were installed after matplotlib made its list of the system's."""
    from matplotlib import font_manager

    known = {font.fname for font in font_manager.fontManager.ttflist}
    found = []
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(*UNUSABLE):  # coloured bitmaps, say: nobody asked for this one
            found += _added(Path(path))
    return _for_chinese(dict.fromkeys(found))


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

    :param path: where the picture goes, its ending (of `KINDS`) says what it is; what stood there stays until the new
        one is whole.
    :param panels: maps, at most two beside each other.
    :param fonts: fonts for the labels' characters, tried before the system's.
    """
    import matplotlib as mpl

    texts = "".join([title, caption, groups.title, *groups.names[:SHOWN], *(p.title + p.note for p in panels)])
    kind = path.suffix.lower()
    settings = {"font.family": fonts_for(texts, fonts), "text.parse_math": False, "svg.hashsalt": "ebr"}
    with _quiet_fonts(), mpl.rc_context(settings):
        figure = _composed(panels, groups, title, caption)
        with written_whole(path) as new:
            figure.savefig(new, format=kind[1:], metadata=KINDS[kind])


def _composed(panels: Sequence[Panel], groups: Groups, title: str, caption: str) -> Figure:
    """The figure, as high as its title and its caption need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, down = min(2, len(panels)), (len(panels) + 1) // 2
    width = across * PANEL + LEGEND
    title = wrapped(title, width - 2 * EDGE, _inches(TITLE_SIZE, "bold"))
    caption = wrapped(caption, width - 2 * EDGE, _inches(SMALL_SIZE))
    top, bottom = 0.6 + 0.27 * title.count("\n"), 0.4 + LINE * caption.count("\n")
    figure = Figure(figsize=(width, top + down * (PANEL + GAP) + bottom), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, _places(figure, across, down, top), strict=False):
        _draw_panel(axes, panel, groups)
    _draw_words(figure, title, caption)
    _draw_legend(figure, groups, top)
    return figure


def _inches(size: float, weight: str = "normal") -> Callable[[str], float]:
    """What measures how wide a text is drawn: Chinese, Latin and emoji in the fonts that they get."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, DPI), FontProperties(size=size, weight=weight)
    return lambda text: float(renderer.get_text_width_height_descent(text, font, False)[0]) / DPI


def _places(figure: Figure, across: int, down: int, top: float) -> list[Axes]:
    width, height = figure.get_size_inches()
    places = []
    for i in range(across * down):
        row, column = divmod(i, across)
        left, upper = EDGE + column * PANEL, top + row * (PANEL + GAP) + 0.3
        box = (left / width, 1 - (upper + PANEL - 0.15) / height, (PANEL - 0.2) / width, (PANEL - 0.15) / height)
        places.append(figure.add_axes(box))
    return places


def _draw_panel(axes: Axes, panel: Panel, groups: Groups) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=5)
    axes.set_title(panel.note, loc="right", fontsize=SMALL_SIZE, color="#555555", pad=5)
    _frame(axes, panel.coords)
    if len(panel.coords) > SHADED:
        _shade(axes, panel.coords, groups)
    else:
        _scatter(axes, panel.coords, groups)
    _name_groups(axes, panel.coords, groups)


def _frame(axes: Axes, coords: Points) -> None:
    """Square limits around all points, with a margin."""
    low, high = coords.min(axis=0), coords.max(axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2 * 1.05, 1e-3)
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)


def _scatter(axes: Axes, coords: Points, groups: Groups) -> None:
    """Points, those of small labels last, so that a large one does not bury them."""
    from matplotlib.colors import to_rgba_array

    n = len(coords)
    turn = _turns(groups)
    order = np.lexsort((np.random.default_rng(0).permutation(n), turn))
    size, alpha = _marker(n)
    sizes = size * (1 + 0.7 * _labels_above(coords, turn)) ** 2
    axes.scatter(
        coords[order, 0], coords[order, 1], s=sizes[order], alpha=alpha, linewidths=0,
        c=to_rgba_array(groups.shade_colours)[groups.shades[order]], rasterized=True,
    )  # fmt: skip


def _marker(n: int) -> tuple[float, float]:
    """Area in square points, and opacity, of one of so many points."""
    return float(np.clip(45_000 / n, 1.2, 36)), float(np.clip(4 / n**0.2, 0.45, 0.9))


def _turns(groups: Groups) -> Ints:
    """When each row is drawn: rows without a label first, then the largest label; the other labels count as one."""
    sizes = np.bincount(groups.shades, minlength=len(groups.shade_colours))
    sizes[-1] = len(groups.codes) + 1
    turn = np.empty_like(sizes)
    turn[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return turn[groups.shades]


def _labels_above(coords: Points, turn: Ints, most: int = 3) -> Ints:
    """How many other labels are drawn over each row on the very same spot: equal vectors show as rings."""
    spot = np.unique(coords, axis=0, return_inverse=True)[1].ravel()
    stacks, row = np.unique(spot * (turn.max() + 1) + turn, return_inverse=True)
    spots = stacks // (turn.max() + 1)
    above = np.searchsorted(spots, spots, side="right") - 1 - np.arange(len(spots))
    return np.minimum(above, most)[row.ravel()]


def _shade(axes: Axes, coords: Points, groups: Groups) -> None:
    """Density: each pixel mixes its labels' colours, small labels weighing more; more points make it darker."""
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


# --- names on the map ---------------------------------------------------------------------------------------------


def _name_groups(axes: Axes, coords: Points, groups: Groups) -> None:
    """Write labels at their medoids, the largest first; one that finds no free place stays in the legend alone."""
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    measure = _inches(NAME_SIZE)
    room = _Room.on(axes, coords, groups)
    for code, colour in enumerate(groups.colours[:SHOWN]):
        points = axes.transData.transform(coords[groups.codes == code])
        name = squeezed(groups.names[code], NAME_WIDTH, measure)
        if not len(points) or not name:
            continue
        text = axes.text(
            0, 0, name, fontsize=NAME_SIZE, ha="center", va="center", zorder=5,
            color=_darker(colour), path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        place = room.take(_medoid(points), _core(points), np.array([box.width, box.height]))
        if place is None:
            text.remove()
        else:
            x, y = axes.transData.inverted().transform(place)
            text.set_position((float(x), float(y)))


def _core(points: Points, cells: int = 10) -> Points:
    """The points where they lie densest: the median of all may lie between two islands."""
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
    """Where names may stand on a map, in pixels.

    :param frame: low and high corner of the map.
    :param points: up to `THINNED` points of each shade; `weights` (points × shades) are the share that each is of its
        shade.
    :param radius: of a point.
    :param taken: boxes of the names that stand, n × 2 corners × 2.
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
        radius = np.sqrt(_marker(len(coords))[0]) / 2 * DPI / 72
        weights = member / np.maximum(member.sum(axis=0), 1)
        return cls(
            axes.get_window_extent().get_points(), axes.transData.transform(coords[rows]), weights, float(radius)
        )

    def take(self, home: Points, core: Points, size: Points) -> Points | None:
        """Find the middle of a name of this size (width, height): near `home`, where it hides the fewest points.

        No place may hide a fifth of any label's points, lie over another name, or leave the map.
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
        """Middles to choose from: on `home`, and in eight directions from it, beside it and beside the core."""
        below, above = home - core.min(axis=0), core.max(axis=0) - home
        places = [home]
        for share, heights in ((0.0, 0.1), (0.0, 0.8), (1.0, 0.1), (1.0, 1.0), (1.0, 2.0)):
            gap = self.radius + heights * size[1] + size / 2
            low, high = home - share * below - gap, home + share * above + gap
            xs, ys = (low[0], home[0], high[0]), (low[1], home[1], high[1])
            places += [np.array(place) for place in itertools.product(xs, ys)]  # `home` again, which does no harm
        return np.array(places)


def _darker(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.62 * c for c in to_rgb(colour))


# --- legend and caption -------------------------------------------------------------------------------------------


def _draw_words(figure: Figure, title: str, caption: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(EDGE / width, 1 - 0.2 / height, title, fontsize=TITLE_SIZE, fontweight="bold", va="top")
    figure.text(
        EDGE / width, 0.14 / height, caption, fontsize=SMALL_SIZE, color="#555555", va="bottom", linespacing=1.45
    )


def _draw_legend(figure: Figure, groups: Groups, above: float) -> None:
    width, height = figure.get_size_inches()
    left, top, room = (width - LEGEND + 0.05) / width, 1 - (above + 0.3) / height, LEGEND - 0.05 - EDGE
    title = squeezed(groups.title, room, _inches(11, "bold"))
    figure.text(left, top + 0.08 / height, title, fontsize=11, fontweight="bold", va="bottom")
    measure = _inches(9.5)
    for i, (colour, name, count) in enumerate(_legend(groups)):
        y, number = top - (0.17 + 0.29 * i) / height, f"{count:,}"
        figure.text(left, y, "●", color=colour, fontsize=11, va="center", family=LATIN)
        fitting = squeezed(name, room - 0.35 - measure(number), measure)
        figure.text(left + 0.2 / width, y, fitting, fontsize=9.5, va="center")
        figure.text((width - EDGE) / width, y, number, fontsize=9, color="#555555", va="center", ha="right")


def _legend(groups: Groups) -> Iterable[tuple[str, str, int]]:
    yield from zip(groups.colours[:SHOWN], groups.names[:SHOWN], groups.counts[:SHOWN], strict=False)
    if len(groups.names) > SHOWN:
        yield GREY, f"{len(groups.names) - SHOWN} other labels", sum(groups.counts[SHOWN:])
    if groups.without:
        yield PALE, "no label", groups.without


def wrapped(text: str, most: float, width_of: Callable[[str], float] = columns_of) -> str:
    """Break each line of a text into lines of a width: at spaces, and inside words that are longer than half of it."""
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
