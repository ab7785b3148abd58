"""The picture's parts: colours that differ, fonts that hold the signs, names that do not overlap, density."""

from __future__ import annotations

import logging
import sys
from importlib import metadata

import numpy as np
import pytest

from ebr_lib.tables import columns_of, shortened
from ebr_lib.view import figure
from ebr_lib.view.figure import Groups, Panel

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
    figure.draw(path, panels, groups, **given)
    return imread(path)[..., :3]


def holds_colour(pixels: np.ndarray, colour: str) -> int:
    """How many pixels are nearly of a colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(pixels - to_rgb(colour)).max(axis=2) < 0.06).sum())


# --- colours ------------------------------------------------------------------------------------------------------


def test_twenty_colours_stay_apart():
    from matplotlib.colors import to_rgb

    rgb = np.array([to_rgb(c) for c in figure.palette(20)])
    gaps = np.linalg.norm(rgb[:, None] - rgb[None], axis=2)
    np.fill_diagonal(gaps, 9)
    assert gaps.min() > 0.15
    assert np.linalg.norm(rgb - 1, axis=1).min() > 0.4  # and from the paper


def test_the_first_colours_do_not_depend_on_how_many_there_are():
    assert figure.palette(5) == figure.palette(20)[:5]


def test_labels_beyond_twenty_share_one_colour():
    colours = groups_of(np.arange(25), [str(i) for i in range(25)]).colours
    assert len(set(colours[:20])) == 20 and set(colours[20:]) == {figure.GREY}


# --- fonts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(monkeypatch):
    """A machine whose only fonts are matplotlib's own."""
    monkeypatch.setattr(figure, "_system_families", list)


def test_latin_needs_no_other_font():
    assert figure.fonts_for("Shoes, café – Ω × 10") == [figure.LATIN]


def test_chinese_is_found_on_a_bare_machine(bare_machine, caplog):
    pytest.importorskip("noto_cjk_sans_otc")
    with caplog.at_level(logging.WARNING):
        assert figure.fonts_for("shoes " + CHINESE) == [figure.LATIN, "Noto Sans CJK SC"]
    assert not caplog.records


def test_the_packaged_font_is_found_without_importing_its_package(bare_machine):
    metadata.files(figure.CJK_PACKAGE)
    sys.modules.pop("noto_cjk_sans_otc", None)
    figure.fonts_for(CHINESE)
    assert "noto_cjk_sans_otc" not in sys.modules


def test_wanted_fonts_come_first(monkeypatch):
    monkeypatch.setattr(figure, "_known_families", lambda: {figure.LATIN, "A", "B", "C"})
    held = {figure.LATIN: set("ab"), "A": set("书籍"), "B": set("书籍热水器"), "C": set("龘")}
    monkeypatch.setattr(figure, "_held", lambda family, signs: signs & held[family])
    assert figure.fonts_for("ab书籍", ["not here", "A"]) == [figure.LATIN, "A"]
    assert figure.fonts_for("书籍热水器", ["A"]) == [figure.LATIN, "A", "B"]  # what A lacks comes from the system
    assert figure.fonts_for("书籍热水器龘") == [figure.LATIN, "B", "C"]  # the font that holds most before the others


def test_a_font_file_can_be_wanted(bare_machine, monkeypatch):
    monkeypatch.setattr(figure, "_packaged_families", list)
    (file,) = [f for f in metadata.files(figure.CJK_PACKAGE) if f.suffix == ".ttc"]
    assert figure.fonts_for("书籍", [str(file.locate())])[1].startswith("Noto Sans CJK")


def test_signs_that_no_font_holds_are_named_once_with_the_way_out(bare_machine, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(figure, "_packaged_families", list)
    groups = groups_of([0, 1] * 20, ["书籍", "热水器"])
    with caplog.at_level(logging.WARNING):
        drawn(tmp_path / "a.png", [Panel("t-SNE", points(40))], groups)
    (said,) = caplog.records
    assert "5 of the characters" in said.getMessage() and f"pip install {figure.CJK_PIN}" in said.getMessage()


def test_emoji_ask_for_another_font_than_chinese(bare_machine, caplog):
    with caplog.at_level(logging.WARNING):
        figure.fonts_for("🦄")
    assert "U+1F984" in caplog.text and "pip install" not in caplog.text


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
    small = figure.palette(2)[1]
    assert holds_colour(pixels, small) > 0.2 * holds_colour(alone, small) > 0


def test_density_is_drawn_above_a_number_of_points(tmp_path, monkeypatch):
    from matplotlib.colors import to_rgb

    monkeypatch.setattr(figure, "SHADED", 500)
    monkeypatch.setattr(figure, "_scatter", None)
    monkeypatch.setattr(figure, "_name_groups", lambda *_: None)  # names are darker than any point
    codes = np.where(np.arange(20_000) < 19_000, 0, 1)
    coords = points(20_000)
    coords[codes == 1] = coords[codes == 1] * 0.05 + [0, 0]  # the small label amid the large one
    pixels = drawn(tmp_path / "a.png", [Panel("map", coords)], groups_of(codes, ["large", "small"]))
    ink = 1 - pixels[150:1000, 50:1000].min(axis=2)
    y, x = np.unravel_index(np.argsort(ink.ravel())[-200:], ink.shape)
    densest = pixels[150:1000, 50:1000][int(np.median(y)), int(np.median(x))]
    large, small = (np.abs(densest - to_rgb(c)).sum() for c in figure.palette(2))
    assert small < large  # the small label shows where it is
    assert np.quantile(ink[ink > 0.05], 0.95) > 2 * np.quantile(ink[ink > 0.05], 0.2)  # more points, more ink


def test_points_without_a_label_are_pale_and_counted(tmp_path):
    groups = groups_of([0] * 20 + [-1] * 20, ["shoes"])
    assert ("no label", 20) in [(name, count) for _, name, count in figure._legend(groups)]
    pixels = drawn(tmp_path / "a.png", [Panel("map", points(40))], groups)
    assert holds_colour(pixels, figure.PALE) > 50


def test_the_legend_ends_with_the_rest():
    names = [f"label {i}" for i in range(30)]
    groups = groups_of(np.repeat(np.arange(30), 2), names)
    legend = list(figure._legend(groups))
    assert len(legend) == 21 and legend[-1][1:] == ("10 other labels", 20)


def test_names_on_the_map_do_not_overlap(monkeypatch, tmp_path):
    boxes = []
    find = figure._find_room

    def watched(text, axes, renderer, frame, taken):
        found = find(text, axes, renderer, frame, taken)
        boxes[:] = taken
        return found

    monkeypatch.setattr(figure, "_find_room", watched)
    codes = np.arange(400) % 20
    drawn(tmp_path / "a.png", [Panel("map", points(400))], groups_of(codes, [f"a label {i}" for i in range(20)]))
    assert 5 <= len(boxes) <= 20
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_name_lies_on_an_island_and_not_between_two():
    """The point nearest to the median of both is a stray one."""
    islands = np.concatenate([points(300) * 0.3 + [-5, 0], points(260, 1) * 0.3 + [5, 0], [[0, 0]]])
    x, y = figure._medoid(islands.astype(np.float32))
    assert abs(x + 5) < 0.3 and abs(y) < 0.3
    assert (figure._medoid(np.ones((3, 2), np.float32)) == 1).all()


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


# --- text ---------------------------------------------------------------------------------------------------------


def test_texts_are_cut_by_what_they_take():
    assert shortened("short", 10) == "short"
    assert shortened("热水器洗发水", 9) == "热水器洗…"
    assert shortened("two\nlines\t here", 40) == "two lines here"
    assert columns_of(shortened("长" * 100, 30)) <= 30


def test_labels_that_begin_alike_stay_apart():
    names = ["balance_not_updated_after_bank_transfer", "balance_not_updated_after_cheque_or_cash", "余额" * 30 + "末"]
    cut = [figure.squeezed(name, 24) for name in names]
    assert cut == ["balance_not_upd…transfer", "balance_not_upd…_or_cash", cut[2]]
    assert all(columns_of(name) <= 24 for name in cut) and cut[2].endswith("末")
    assert figure.squeezed("short", 24) == "short"


def test_lines_break_at_spaces_and_inside_chinese():
    lines = figure.wrapped("some words and " + "长" * 30 + " more", 20).split("\n")
    assert all(columns_of(line) <= 20 for line in lines)
    assert "".join(lines).replace(" ", "") == "somewordsand" + "长" * 30 + "more"
