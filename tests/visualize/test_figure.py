"""The picture's parts: distinct colours, fonts that hold the characters, names that do not overlap, density."""

from __future__ import annotations

import logging
import sys
from importlib import metadata

import numpy as np
import pytest

from ebr_lib.tables import columns_of, wrapped
from ebr_lib.visualize import figure as visualize_figure
from ebr_lib.visualize import fonts, labels
from ebr_lib.visualize import groups as visualize_groups
from ebr_lib.visualize.groups import PALETTE, Groups, Panel

CHINESE = "书籍热水器龘𠮷囧"


def groups_of(codes, names) -> Groups:
    codes = np.asarray(codes)
    return Groups(codes, names, [int((codes == i).sum()) for i in range(len(names))], "category")


def points(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)


def drawn(path, panels, groups, **changes) -> np.ndarray:
    """The pixels of a picture, height × width × 3."""
    from matplotlib.image import imread

    given = {"title": "embeds.txt", "caption": "all of it", "fonts": ()} | changes
    visualize_figure.draw(path, panels, groups, **given)
    return imread(path)[..., :3]


def holds_colour(pixels: np.ndarray, colour: str) -> int:
    """How many pixels are nearly of a colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(pixels - to_rgb(colour)).max(axis=2) < 0.06).sum())


# --- colours ------------------------------------------------------------------------------------------------------


def test_twenty_colours_stay_apart():
    from matplotlib.colors import to_rgb

    rgb = np.array([to_rgb(c) for c in PALETTE])
    gaps = np.linalg.norm(rgb[:, None] - rgb[None], axis=2)
    np.fill_diagonal(gaps, 9)
    assert gaps.min() > 0.15
    assert np.linalg.norm(rgb - 1, axis=1).min() > 0.4  # and from the paper


@pytest.mark.parametrize(("palette", "paper"), [(PALETTE, "#ffffff"), (visualize_groups.DARK_PALETTE, "#14171d")])
def test_points_stand_out_from_the_paper(palette, paper):
    """WCAG 2.2, 1.4.11: 3:1, with the opacity that points have on the page."""
    from matplotlib.colors import to_rgb

    def luminance(rgb):
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    below = np.array(to_rgb(paper))
    for colour in palette:
        seen = visualize_groups.OPACITY * np.array(to_rgb(colour)) + (1 - visualize_groups.OPACITY) * below
        low, high = sorted([luminance(seen), luminance(below)])
        assert (high + 0.05) / (low + 0.05) >= 2.95, colour


def test_labels_beyond_the_palette_take_colours_that_are_far_away():
    groups = groups_of(np.arange(25), [str(i) for i in range(25)])
    cores = np.stack([np.arange(25) % 20 * 10.0, np.zeros(25)], 1)
    cores[24] = np.nan
    colours = groups.spread_out(cores).colours
    assert colours[:20].tolist() == list(range(20))
    assert colours[20] == 19  # its core is at 0, and that of label 19 at 190
    for label in range(20, 24):
        assert min(abs(cores[i, 0] - cores[label, 0]) for i in range(label) if colours[i] == colours[label]) >= 100


# --- fonts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(monkeypatch):
    """A machine whose only fonts are matplotlib's own."""
    monkeypatch.setattr(fonts, "_system_families", list)
    monkeypatch.setattr(fonts, "_new_families", list)
    monkeypatch.setattr(fonts, "_known_families", lambda: {fonts.LATIN})


def test_latin_needs_no_other_font():
    assert fonts.fonts_for("Shoes, café – Ω × 10") == [fonts.LATIN]


def test_chinese_is_found_on_a_bare_machine(bare_machine, caplog):
    pytest.importorskip("noto_cjk_sans_otc")
    with caplog.at_level(logging.WARNING):
        assert fonts.fonts_for("shoes " + CHINESE) == [fonts.LATIN, "Noto Sans CJK SC"]
    assert not caplog.records


def test_the_packaged_font_is_found_without_importing_its_package(bare_machine):
    metadata.files(fonts.CJK_PACKAGE)
    sys.modules.pop("noto_cjk_sans_otc", None)
    fonts.fonts_for(CHINESE)
    assert "noto_cjk_sans_otc" not in sys.modules


def test_wanted_fonts_come_first(monkeypatch):
    monkeypatch.setattr(fonts, "_known_families", lambda: {fonts.LATIN, "A", "B", "C"})
    held = {fonts.LATIN: set("ab"), "A": set("书籍"), "B": set("书籍热水器"), "C": set("龘")}
    monkeypatch.setattr(fonts, "_held", lambda family, signs: signs & held[family])
    assert fonts.fonts_for("ab书籍", ["not here", "A"]) == [fonts.LATIN, "A"]
    assert fonts.fonts_for("书籍热水器", ["A"]) == [fonts.LATIN, "A", "B"]  # what A lacks comes from the system
    assert fonts.fonts_for("书籍热水器龘") == [fonts.LATIN, "B", "C"]  # the font that holds most before the others


def test_a_font_file_can_be_wanted(bare_machine, monkeypatch):
    monkeypatch.setattr(fonts, "_packaged_families", list)
    assert fonts.fonts_for("书籍", [packaged_font()])[1].startswith("Noto Sans CJK")


def test_characters_that_no_font_holds_are_named_once_with_the_install_command(
    bare_machine, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(fonts, "_packaged_families", list)
    groups = groups_of([0, 1] * 20, ["书籍", "热水器"])
    with caplog.at_level(logging.WARNING):
        drawn(tmp_path / "a.png", [Panel("t-SNE", points(40))], groups)
    (record,) = caplog.records
    assert "5 of the characters" in record.getMessage() and f"pip install {fonts.CJK_PIN}" in record.getMessage()


# characters that Noto Sans CJK lacks, and Debian's package whose fonts hold them (looked up in the packages themselves)
LACKED = {"𬺰": "fonts-hanazono", "🦄": "fonts-symbola", "①": "", "🇨": "fonts-symbola", "ไ": "fonts-noto-core"}


@pytest.mark.parametrize("sign, package", LACKED.items())
def test_the_command_brings_what_is_missing(bare_machine, monkeypatch, caplog, sign, package):
    pytest.importorskip("noto_cjk_sans_otc")
    with caplog.at_level(logging.WARNING):
        fonts.fonts_for(sign)
    assert "pip install" not in caplog.text  # that package is here
    assert (f"`apt-get install {package}` brings one for {sign}" in caplog.text) == bool(package)
    assert bool(caplog.records) == bool(package)
    caplog.clear()
    installed = {fonts.LATIN, "HanaMinB", "Symbola", "Noto Sans Thai"}
    monkeypatch.setattr(fonts, "_known_families", lambda: installed)  # and still no font has it
    with caplog.at_level(logging.WARNING):
        fonts.fonts_for(sign)
    assert "apt-get" not in caplog.text
    assert ("name a font that holds them in chinese_fonts" in caplog.text) == bool(package)


def test_each_command_is_named_beside_its_characters(bare_machine, monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_packaged_families", list)
    with caplog.at_level(logging.WARNING):
        fonts.fonts_for("书籍 🦄")
    (record,) = caplog.records
    assert f"`pip install {fonts.CJK_PIN}` brings one for 书 (U+4E66), 籍 (U+7C4D); `apt-get" in record.getMessage()


def packaged_font() -> str:
    (file,) = [f for f in metadata.files(fonts.CJK_PACKAGE) if f.suffix == ".ttc"]
    return str(file.locate())


def test_a_newly_installed_font_is_found(monkeypatch, caplog):
    """Matplotlib keeps a list of the system's fonts and does not look for new ones."""
    from matplotlib import font_manager

    pytest.importorskip("noto_cjk_sans_otc")
    known = [font for font in font_manager.fontManager.ttflist if "CJK" not in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    monkeypatch.setattr(fonts, "_system_families", list)
    monkeypatch.setattr(fonts, "_packaged_families", list)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [packaged_font()])
    assert fonts.fonts_for("书籍")[1] == "Noto Sans CJK SC"
    assert not caplog.records


def test_an_unusable_font_file_is_skipped_with_a_warning(tmp_path, bare_machine, caplog):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with caplog.at_level(logging.WARNING):
        found = fonts.fonts_for("书籍", [str(broken)])
    (record,) = caplog.records
    assert "broken.ttf cannot be used" in record.getMessage() and found[1].startswith("Noto Sans CJK")


@pytest.mark.parametrize("error", [NotImplementedError("Non-scalable fonts are not supported"), RuntimeError("FT2")])
def test_a_font_of_bitmaps_is_skipped_with_a_warning(tmp_path, monkeypatch, bare_machine, caplog, error):
    from matplotlib.font_manager import fontManager

    add = fontManager.addfont

    def refuse(path):
        if path.name == "emoji.ttf":
            raise error
        add(path)

    monkeypatch.setattr(fontManager, "addfont", refuse)
    (tmp_path / "emoji.ttf").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        fonts.fonts_for("a🦄", [str(tmp_path / "emoji.ttf")])
    assert sum("emoji.ttf cannot be used" in record.getMessage() for record in caplog.records) == 1


def test_absent_fonts(tmp_path):
    assert fonts.absent_fonts(["No Such Font", fonts.LATIN, "nowhere.ttf", packaged_font()]) == [
        "No Such Font", "nowhere.ttf",
    ]  # fmt: skip


def test_no_flood_of_findfont_lines(tmp_path, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        drawn(tmp_path / "a.png", [Panel("t-SNE", points(40))], groups_of([0, 1] * 20, ["书籍", "热水器"]),
              fonts=["No Such Font", "SimHei"])  # fmt: skip
    assert not caplog.records and "findfont" not in capfd.readouterr().err


def test_chinese_labels_are_drawn_with_their_own_shapes(tmp_path, bare_machine):
    """Two different characters look different: boxes would look the same."""
    pytest.importorskip("noto_cjk_sans_otc")
    one = [Panel("map", points(30))]
    pictures = [drawn(tmp_path / "a.png", one, groups_of([0] * 30, [name])) for name in ("书籍", "书器")]
    assert (pictures[0] != pictures[1]).any()


# --- drawing ------------------------------------------------------------------------------------------------------


def test_a_small_label_is_not_buried(tmp_path):
    codes = np.array([0] * 5000 + [1] * 30)
    coords = points(5030) * 0.3
    pixels = drawn(tmp_path / "a.png", [Panel("map", coords)], groups_of(codes, ["large", "small"]))
    alone = drawn(tmp_path / "b.png", [Panel("map", coords)], groups_of(np.where(codes, 1, -1), ["large", "small"]))
    small = PALETTE[1]
    assert holds_colour(pixels, small) > 0.2 * holds_colour(alone, small) > 0


def test_many_points_are_drawn_smaller_and_fainter():
    sizes, opacity = [], []
    for n in (20, 2000, 50_000):
        (axes,) = visualize_figure._composed(
            [Panel("map", points(n))], groups_of([0] * n, [" "]), "title", "caption"
        ).axes
        (drawn_points,) = axes.collections
        sizes.append(drawn_points.get_sizes().max())
        opacity.append(drawn_points.get_alpha())
    assert sizes[0] > sizes[1] > sizes[2] and opacity[0] > opacity[1] > opacity[2]


def test_equal_vectors_of_two_labels_both_show(tmp_path):
    spot = np.zeros((40, 2), np.float32)
    pixels = drawn(tmp_path / "a.png", [Panel("map", spot)], groups_of([0, 1] * 20, [" ", " "]))
    legend = 90  # pixels of a dot in the legend, at most
    for colour in PALETTE[:2]:
        assert holds_colour(pixels[:, :1000], colour) > legend


def test_density_is_drawn_above_a_number_of_points(tmp_path, monkeypatch):
    from matplotlib.colors import to_rgb

    monkeypatch.setattr(visualize_figure, "SHADED", 500)
    monkeypatch.setattr(visualize_figure, "_scatter", None)
    monkeypatch.setattr(visualize_figure, "name_groups", lambda *_: None)  # names are darker than any point
    codes = np.where(np.arange(20_000) < 19_000, 0, 1)
    coords = points(20_000)
    coords[codes == 1] = coords[codes == 1] * 0.05 + [0, 0]  # the small label amid the large one
    pixels = drawn(tmp_path / "a.png", [Panel("map", coords)], groups_of(codes, ["large", "small"]))
    ink = 1 - pixels[150:1000, 50:1000].min(axis=2)
    y, x = np.unravel_index(np.argsort(ink.ravel())[-200:], ink.shape)
    densest = pixels[150:1000, 50:1000][int(np.median(y)), int(np.median(x))]
    large, small = (np.abs(densest - to_rgb(c)).sum() for c in PALETTE[:2])
    assert small < large  # the small label shows where it is
    assert np.quantile(ink[ink > 0.05], 0.95) > 2 * np.quantile(ink[ink > 0.05], 0.2)  # more points, more ink


def test_points_without_a_label_are_grey_and_counted(tmp_path):
    groups = groups_of([0] * 20 + [-1] * 20, ["shoes"])
    assert ("no label", 20) in [(name, count) for _, name, count in visualize_figure._legend(groups)]
    pixels = drawn(tmp_path / "a.png", [Panel("map", points(40))], groups)
    assert holds_colour(pixels, visualize_groups.GREY) > 50


def test_the_legend_ends_with_the_rest():
    names = [f"label {i}" for i in range(30)]
    groups = groups_of(np.repeat(np.arange(30), 2), names)
    legend = list(visualize_figure._legend(groups))
    assert len(legend) == 21 and legend[-1][1:] == ("10 more (colours repeat)", 20)


@pytest.fixture
def cjk():
    """Chinese is drawn in the packaged font."""
    import matplotlib as mpl

    with mpl.rc_context({"font.family": fonts.fonts_for("书籍")}):
        yield


def names_of(axes) -> list:
    """The boxes of the names on a map, in pixels."""
    renderer = axes.get_figure().canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in axes.texts]


def test_names_on_the_map_do_not_overlap():
    codes = np.arange(400) % 20
    groups = groups_of(codes, [f"a label {i}" for i in range(20)])
    (axes,) = visualize_figure._composed([Panel("map", points(400))], groups, "title", "caption").axes
    boxes = names_of(axes)
    assert 5 <= len(boxes) <= 20
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("n", [1, 3, 50])
def test_a_name_does_not_hide_a_tight_cluster(tmp_path, n):
    """The name is larger than the whole cluster; its colour still shows, and the name stands beside it."""
    islands = np.concatenate([points(n, i) * 0.02 + middle for i, middle in enumerate([(0, 0), (5, 3), (5.1, 0)])])
    islands = np.concatenate([islands, [[-4, -4], [9, 7]]])  # so that none of them lies at the edge
    codes = np.concatenate([np.repeat([0, 1, 2], n), [-1, -1]])
    panels = [Panel("map", islands.astype(np.float32))]
    named = drawn(tmp_path / "a.png", panels, groups_of(codes, ["热水器 water heaters"] * 3))
    nameless = drawn(tmp_path / "b.png", panels, groups_of(codes, [" "] * 3))
    for colour in PALETTE[:3]:
        assert holds_colour(named, colour) > 0.9 * holds_colour(nameless, colour) > 100


def test_no_name_hides_a_fifth_of_any_label():
    codes = np.arange(300) % 6
    coords = (points(300) * 0.4 + np.random.default_rng(1).normal(size=(6, 2))[codes]).astype(np.float32)
    groups = groups_of(codes, [f"a rather long label {i}" for i in range(6)])
    (axes,) = visualize_figure._composed([Panel("map", coords)], groups, "title", "caption").axes
    boxes = names_of(axes)
    assert len(boxes) >= 3
    for x0, y0, x1, y1 in (box.extents for box in boxes):
        x, y = axes.transData.transform(coords).T
        under = (x > x0) & (x < x1) & (y > y0) & (y < y1)
        assert np.bincount(codes[under], minlength=6).max() <= 0.2 * 50


def test_the_name_of_a_large_cluster_is_in_its_middle():
    coords = points(5000)
    (axes,) = visualize_figure._composed(
        [Panel("map", coords)], groups_of([0] * 5000, ["shoes"]), "title", "caption"
    ).axes
    (text,) = axes.texts
    assert np.abs(text.get_position()).max() < 1


def test_a_name_is_on_an_island_and_not_between_two():
    """The point nearest to the median of both is a stray one."""
    islands = np.concatenate([points(300) * 0.3 + [-5, 0], points(260, 1) * 0.3 + [5, 0], [[0, 0]]])
    ((x, y),) = labels.cores_of(islands.astype(np.float32), groups_of([0] * 561, ["shoes"]))
    assert abs(x + 5) < 0.3 and abs(y) < 0.3
    assert (labels.cores_of(np.ones((3, 2), np.float32), groups_of([0] * 3, ["shoes"])) == 1).all()


def test_a_label_without_a_core_has_no_name_on_the_map():
    """Its few points are strewn over another label's cluster."""
    coords = np.concatenate([points(500), points(20, 1) * 1.5])
    groups = groups_of([0] * 500 + [1] * 20, ["shoes", "strewn"])
    assert np.isnan(labels.cores_of(coords, groups)).all(axis=1).tolist() == [False, True]
    (axes,) = visualize_figure._composed([Panel("map", coords)], groups, "title", "caption").axes
    assert [text.get_text() for text in axes.texts] == ["shoes"]


def test_a_line_leads_from_a_name_that_stands_off_to_its_core():
    middles = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 0.2
    codes = np.repeat(np.arange(36), 30)
    coords = (points(1080) * 0.05 + middles[codes]).astype(np.float32)
    coords = np.concatenate([coords, [[-4, -4], [5, 5]]]).astype(np.float32)
    groups = groups_of([*codes, -1, -1], [f"a rather long label {i}" for i in range(36)])
    (axes,) = visualize_figure._composed([Panel("map", coords)], groups, "title", "caption").axes
    starts = [line.get_xydata()[0] for line in axes.lines]
    assert len(axes.texts) >= 30 and len(starts) >= 5
    assert all(np.linalg.norm(middles - start, axis=1).min() < 0.1 for start in starts)


def test_two_maps_before_and_after_make_four_panels(tmp_path):
    panels = [Panel(f"map {i}", points(30, i)) for i in range(4)]
    pixels = drawn(tmp_path / "a.png", panels, groups_of([0] * 30, ["x"]))
    single = drawn(tmp_path / "b.png", panels[:1], groups_of([0] * 30, ["x"]))
    assert pixels.shape[0] > 1.6 * single.shape[0] and pixels.shape[1] > 1.4 * single.shape[1]


@pytest.mark.parametrize("coords", [np.zeros((1, 2)), np.zeros((9, 2)), np.array([[0, 0], [1e6, 1e-6]])])
def test_odd_coordinates_are_drawn(tmp_path, coords):
    drawn(tmp_path / "a.png", [Panel("map", coords.astype(np.float32))], groups_of([0] * len(coords), ["x"]))


def test_dollars_and_markup_in_labels_are_letters(tmp_path):
    names = ["$x^2$ 5$", "a_b {c}", "\\frac <b>", "_hidden"]
    drawn(
        tmp_path / "a.png", [Panel("map", points(40))], groups_of(np.arange(40) % 4, names), title="$1 & $2_files.txt"
    )


def boxes_of(made) -> tuple[list, list]:
    """The boxes on a figure, in pixels: its maps, and the texts outside them."""
    renderer = made.canvas.get_renderer()
    return [axes.get_window_extent() for axes in made.axes], [text.get_window_extent(renderer) for text in made.texts]


LONG_CAPTION = "All of the many vectors were projected. " * 12 + "\n" + "第二行也很长的说明文字" * 9 + "\nthe last line"


@pytest.mark.parametrize("maps", [1, 2, 4])
def test_no_text_covers_a_map_or_leaves_the_picture(maps, cjk):
    """However long the caption, the title, the labels and the notes are."""
    panels = [Panel(f"map {i}", points(30, i), "trustworthiness 0.123, neighbours kept 45.6%") for i in range(maps)]
    groups = groups_of(np.arange(30) % 3, ["W" * 60, "热水器" * 30, "MMMM WWWW " * 9])
    groups = Groups(groups.codes, groups.names, groups.counts, "a_column_with_a_very_long_name_WWWWWWWW")
    made = visualize_figure._composed(panels, groups, "the_long_name_of_the_file" * 9 + ".txt", LONG_CAPTION)
    maps_drawn, texts = boxes_of(made)
    assert len(maps_drawn) == maps
    width, height = made.canvas.get_width_height()
    for text in texts:
        assert not any(text.overlaps(each) for each in maps_drawn)
        assert text.x0 >= 0 and text.y0 >= 0 and text.x1 <= width and text.y1 <= height
    for axes, frame in zip(made.axes, maps_drawn, strict=True):
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in names_of(axes))
    for i, text in enumerate(texts):
        assert not any(text.overlaps(other) for other in texts[:i])


def test_the_caption_is_whole(cjk):
    made = visualize_figure._composed([Panel("map", points(30))], groups_of([0] * 30, ["x"]), "title", LONG_CAPTION)
    (caption,) = [text.get_text() for text in made.texts if "the last line" in text.get_text()]
    assert "".join(caption.split()) == "".join(LONG_CAPTION.split())


# --- text ---------------------------------------------------------------------------------------------------------


def test_lines_break_at_spaces_and_inside_chinese():
    lines = wrapped("some words and " + "长" * 30 + " more", 20).split("\n")
    assert all(columns_of(line) <= 20 for line in lines)
    assert "".join(lines).replace(" ", "") == "somewordsand" + "长" * 30 + "more"


def test_existing_line_breaks_stay():
    assert wrapped("one two\nthree four", 9) == "one two\nthree\nfour"
    assert wrapped("\u3000书籍\n" + "长" * 6, 8).split("\n")[1:] == ["长" * 4, "长" * 2]
