"""The explorer page, in a real browser where there is one: no network, clicks do what they say, text stays text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from ebr_lib.visualize import explorer
from ebr_lib.visualize.columns import Column, column_of, labels_column
from ebr_lib.visualize.groups import Groups, Panel

HOSTILE = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'> </script><!-- 热水器"
TEXTS = [HOSTILE, "蓝色 热水器", "red shoes", "Red hat", "青苹果", "书籍 book", None, "𠮷野家 🍜"]
NEAR = np.array([[(i + step) % 8 for step in (1, 2, 3)] for i in range(8)])
NAMES, SIZES = ["家电<b>", "clothes", "其他"], [3, 2, 2]


def space(near, first=0.5) -> explorer.Neighbourhood:
    return explorer.Neighbourhood(near, np.full(near.shape, first, np.float32) - np.arange(3, dtype=np.float32) / 10)


ANGLE = np.linspace(0, 2 * np.pi, 8, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLE), np.sin(ANGLE)], axis=1).astype(np.float32)
CODES = (0, 0, 1, 1, 2, 2, -1, 0)


def write_page(path, texts=TEXTS, near=NEAR, *, names=NAMES, sizes=SIZES, codes=CODES, more=(), panels=None, kept=()):
    groups = Groups(np.array(codes), names, sizes, "category")
    explorer.write_explorer(
        path,
        panels or [Panel("t-SNE", CIRCLE, "trust 0.9"), Panel("UMAP", CIRCLE[::-1], "trust 0.8", space=len(more))],
        [labels_column(groups), Column("description", texts), *kept],
        colour="category",
        text="description",
        title="title" if "title" in [column.name for column in kept] else None,
        spaces=[space(near), *more],
        name="embeds <2>.txt",
        all_rows=80,
    )
    return path


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_data_come_back_as_they_were(tmp_path):
    page = write_page(tmp_path / "page.html").read_text(encoding="utf-8")
    data = embedded(page)
    label, text = data["columns"]
    assert text["texts"] == [" ".join((text or "").split()) for text in TEXTS]
    assert label["labels"] == NAMES and label["colours"] == [0, 1, 2]


def test_the_page_names_no_address_and_allows_no_request(tmp_path):
    page = write_page(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL))


def test_no_text_can_leave_its_element(tmp_path):
    page = write_page(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "<!--" not in page.lower().removeprefix("<!doctype")


def test_long_texts_are_whole_while_there_is_room(tmp_path, monkeypatch):
    texts = ["长" * 5000, *["short"] * 6, None]
    data = embedded(write_page(tmp_path / "page.html", texts).read_text(encoding="utf-8"))
    assert data["columns"][1]["texts"] == [text or "" for text in texts] and data["longest"] is None
    monkeypatch.setattr(explorer, "TEXT_ROOM", 6 * 5 + 1000)
    data = embedded(write_page(tmp_path / "page.html", texts).read_text(encoding="utf-8"))
    assert data["columns"][1]["texts"] == ["长" * 1000 + "…", *["short"] * 6, ""] and data["longest"] == 1000


@pytest.mark.parametrize("lengths", [[], [0], [5, 5, 5], [1, 2, 30, 400], [100] * 7, [0, 0, 9]])
@pytest.mark.parametrize("room", [0, 1, 10, 100, 433, 10_000])
def test_texts_fill_the_room_and_no_more(lengths, room):
    longest = explorer._longest(lengths, room)
    taken, more = (sum(min(length, most) for length in lengths) for most in (longest, longest + 1))
    assert taken <= room and (more > room or more == taken)


@pytest.fixture
def page(browser, tmp_path) -> Iterator:
    path = write_page(tmp_path / "page.html")
    opened = browser.new_page(viewport={"width": 1200, "height": 800}, locale="en-US")
    opened.seen = {"requests": [], "errors": []}
    opened.on("request", lambda request: opened.seen["requests"].append(request.url))
    opened.on("pageerror", lambda error: opened.seen["errors"].append(str(error)))
    opened.on("console", lambda said: opened.seen["errors"].append(said.text) if said.type == "error" else None)
    opened.goto(path.as_uri())
    yield opened
    assert opened.seen == {"requests": [path.as_uri()], "errors": []}
    opened.close()


def place_of(page, point: int) -> tuple[float, float]:
    return tuple(page.evaluate("i => explorer.screen(i)", point))


def lit(page) -> list[int]:
    return page.evaluate("[...Array(explorer.points).keys()].filter(i => explorer.lit(i))")


def test_it_loads_and_says_what_is_in_it(page):
    assert page.inner_text("h1") == page.title() == "embeds <2>.txt"
    assert "8 of 80 points" in page.inner_text("header p")
    assert page.locator("#legend .key").all_inner_texts() == ["家电<b>\n3", "clothes\n2", "其他\n2", "no label\n1"]
    assert page.evaluate("typeof window.broken") == "undefined"


def test_hover_shows_label_and_text(page):
    page.mouse.move(*place_of(page, 1))
    assert page.inner_text("#tip") == "家电<b>\n蓝色 热水器"


def test_markup_in_a_text_stays_text(page):
    page.mouse.move(*place_of(page, 0))
    assert "<script>window.broken = 1</script>" in page.inner_text("#tip")
    page.mouse.click(*place_of(page, 0))
    assert "<img src=x" in page.inner_text("#near .chosen")
    assert page.locator("#near img, #tip img, #near script, #legend b").count() == 0
    assert page.evaluate("typeof window.broken") == "undefined"


def test_search_lights_up_what_matches(page):
    page.fill("#search", "热水器")
    assert lit(page) == [0, 1]
    assert "2 points" in page.inner_text("#hits")
    page.fill("#search", "RED")
    assert lit(page) == [2, 3]
    page.fill("#search", "clothes")  # labels are searched too
    assert lit(page) == [2, 3]
    page.fill("#search", "")
    assert len(lit(page)) == 8 and page.inner_text("#hits") == ""


def test_legend_filters(page):
    page.locator("#legend .key").nth(1).click()
    assert lit(page) == [2, 3]
    page.locator("#legend .key").nth(3).click()
    assert lit(page) == [2, 3, 6]
    page.mouse.move(*place_of(page, 1))
    assert not page.locator("#tip").is_visible()  # a point that is filtered away cannot be touched
    page.click("#reset")
    assert len(lit(page)) == 8


def test_a_click_lists_the_neighbours_of_the_original_space(page):
    page.mouse.click(*place_of(page, 2))
    listed = page.locator("#near .item").all_inner_texts()
    assert [text.split("\n")[0] for text in listed] == ["Red hat", "青苹果", "书籍 book"]
    assert [text.split("\n")[-1] for text in listed] == ["0.500", "0.400", "0.300"]
    assert "among the points shown" in page.inner_text("#near h2")  # 8 of 80: the nearest of all may not be here
    page.locator("#near .item").first.click()  # neighbours of a neighbour
    assert page.inner_text("#near .chosen span") == "Red hat"
    page.keyboard.press("Escape")
    assert page.locator("#near .item").count() == 0


def test_a_neighbour_that_is_not_drawn_is_left_out(browser, tmp_path):
    page = browser.new_page()
    page.goto(write_page(tmp_path / "page.html", near=np.where(NEAR == 3, -1, NEAR)).as_uri())
    page.mouse.click(*place_of(page, 2))
    assert page.locator("#near .item").count() == 2


def test_the_switch_changes_the_map(page):
    before = place_of(page, 0)
    page.get_by_text("UMAP").click()
    assert place_of(page, 0) != before
    assert "trust 0.8" in page.inner_text("#note")


def test_each_map_lights_up_the_neighbours_of_its_own_space(browser, tmp_path):
    """Before and after are two spaces: the same point has other neighbours, at other cosines."""
    page = browser.new_page()
    page.goto(write_page(tmp_path / "page.html", more=[space(NEAR[:, ::-1], 0.9)]).as_uri())
    page.mouse.click(*place_of(page, 2))
    listed = "[...document.querySelectorAll('#near .item')].map(e => e.innerText.split('\\n').join('|'))"
    before = page.evaluate(listed)
    assert [text.split("|")[0] for text in before] == ["Red hat", "青苹果", "书籍 book"]
    page.get_by_text("UMAP").click()
    after = page.evaluate(listed)  # the point stays chosen
    assert [text.split("|")[0] for text in after] == ["书籍 book", "青苹果", "Red hat"]
    assert [text.split("|")[-1] for text in after] == ["0.900", "0.800", "0.700"]
    assert page.evaluate("explorer.neighbours(2)") == [5, 4, 3]
    page.get_by_text("t-SNE").click()
    assert page.evaluate(listed) == before


def test_every_label_is_in_the_legend_and_a_search_finds_it_there(browser, tmp_path):
    names = [f"label {i}" for i in range(130)]
    page = browser.new_page(locale="en-US")
    codes = (0, 1, 19, 20, 25, 129, -1, 0)
    path = write_page(tmp_path / "page.html", names=names, sizes=[2] + [1] * 129, codes=codes)
    page.goto(path.as_uri())
    keys = page.locator("#legend .key")
    assert keys.all_inner_texts() == ["label 0\n2", "label 1\n1", "label 19\n1", "label 20\n1", "label 25\n1"]
    page.get_by_text("Show 30 more").click()
    assert keys.all_inner_texts()[5:] == ["label 129\n1", "no label\n1"]
    page.fill("#legend input", "L 25")
    assert keys.all_inner_texts() == ["label 25\n1"]
    keys.first.click()
    assert lit(page) == [4]
    page.mouse.move(*place_of(page, 4))
    assert page.inner_text("#tip b") == "label 25"
    page.click("#reset")
    page.fill("#search", "label 129")
    assert lit(page) == [5]
    page.fill("#search", "label")
    assert 6 not in lit(page)  # a row without a label is not found by the words for that


def opened(browser, path, width, height):
    page = browser.new_page(viewport={"width": width, "height": height}, locale="en-US")
    page.goto(path.as_uri())
    return page


def test_the_end_of_a_long_text_is_found_and_read(browser, tmp_path):
    texts = [f"{i} " + "word " * 1000 + ("Ende" if i == 3 else "stop") for i in range(8)]
    page = opened(browser, write_page(tmp_path / "page.html", texts), 1200, 800)
    page.fill("#search", "ende")
    assert lit(page) == [3]
    page.mouse.move(*place_of(page, 3))
    assert page.locator("#tip").bounding_box()["height"] < 250  # cut where it is shown
    page.mouse.click(*place_of(page, 3))
    assert page.inner_text("#near .chosen span").endswith("Ende")
    assert all(item.bounding_box()["height"] < 250 for item in page.locator("#near .item").all())
    assert "cut" not in page.inner_text("header p")


def test_the_page_says_where_texts_are_cut(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "TEXT_ROOM", 8 * 1000)
    page = opened(browser, write_page(tmp_path / "page.html", ["word " * 1000] * 8), 1200, 800)
    assert "texts are cut to 1,000 characters here" in page.inner_text("header p")


def test_names_of_the_legend_that_end_apart_are_read_apart(browser, tmp_path):
    """Whole lines of text, none hidden; of very long names the middle is left out."""
    names = ["服饰>女装>连衣裙>" + "某" * 30 + "1", "服饰>女装>连衣裙>" + "某" * 30 + "2", "long " * 60 + "3"]
    page = opened(browser, write_page(tmp_path / "page.html", names=names), 1200, 800)
    spans = page.locator("#legend .key span")
    shown = spans.all_inner_texts()[:3]
    assert shown[:2] == names[:2] and len(shown[2]) == 80 and shown[2].endswith("3") and "…" in shown[2]
    for span in spans.all():
        hidden = span.evaluate("e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1")
        assert not hidden


def apart(page, *names) -> bool:
    a, b = (page.locator(name).bounding_box() for name in names)
    return (
        a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
        or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
    )  # fmt: skip


def test_the_neighbours_have_room_on_a_phone(browser, tmp_path):
    names = [f"label {i}" for i in range(20)]
    path = write_page(tmp_path / "page.html", ["word " * 500] * 8, names=names, sizes=[1] * 20, codes=[*range(8)])
    page = opened(browser, path, 375, 700)
    legend = page.locator("#legend").bounding_box()
    assert legend["height"] >= 100
    page.mouse.click(*place_of(page, 2))
    near = page.locator("#near").bounding_box()
    assert near["height"] >= 150 and near["y"] + near["height"] <= 700
    first = page.locator("#near .item").first.bounding_box()
    assert first["y"] < 650  # however long the text of the chosen point is
    page.keyboard.press("Escape")
    assert page.locator("#legend").bounding_box() == legend


@pytest.mark.parametrize("width", [320, 375, 761, 1200])
def test_the_switch_of_four_maps_leaves_room_for_the_reset(browser, tmp_path, width):
    titles = [f"{method}: {side}" for method in ("t-SNE", "UMAP") for side in ("before", "after")]
    path = write_page(tmp_path / "page.html", panels=[Panel(title, CIRCLE) for title in titles])
    page = opened(browser, path, width, 700)
    assert page.locator("#maps button").count() == 4 and apart(page, "#maps", "#reset")
    page.locator("#maps button").nth(3).click()
    page.locator("#reset").click()
    assert page.locator("#maps button").nth(3).get_attribute("aria-pressed") == "true"


def test_wheel_zooms_around_the_pointer(page):
    x, y = place_of(page, 1)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -500)
    page.wait_for_function("explorer.state.zoom > 1.5")
    assert place_of(page, 1) == pytest.approx((x, y), abs=0.5)


def test_points_are_painted(page):
    page.wait_for_function("document.querySelector('canvas').width > 0")
    red, green, blue, opaque = page.evaluate(
        "async i => { await new Promise(requestAnimationFrame); const [x, y] = explorer.screen(i);"
        "return Array.from(document.querySelector('canvas').getContext('2d').getImageData(x, y, 1, 1).data) }",
        1,
    )
    assert opaque > 100 and (red, green, blue) != (255, 255, 255)


# --- selecting rows, colours, keys --------------------------------------------------------------------------------


KEPT = [
    Column("title", [f"title {i}" for i in range(8)]),
    Column("price", [None, "1", "2.5", "3", "4", "5", "6", "7e0"], is_number=True),
    column_of("brand", ["a", "b", "a", "b", None, "", "c", "c"]),
]


@pytest.fixture
def rich(browser, tmp_path) -> Iterator:
    """The page of rows with more columns."""
    yield opened(browser, write_page(tmp_path / "page.html", kept=KEPT), 1200, 800)


def test_hovering_shows_title_text_and_the_kept_columns(rich):
    rich.mouse.move(*place_of(rich, 1))
    assert rich.inner_text("#tip").split("\n") == ["家电<b>", "title 1", "蓝色 热水器", "price", "1", "brand", "b"]
    rich.mouse.move(*place_of(rich, 4))
    assert "brand" not in rich.inner_text("#tip")  # empty


def test_a_search_lists_its_rows_and_zooms_to_them(rich):
    rich.fill("#search", "title 3")  # any column
    assert [text.split("\n")[0] for text in rich.locator("#near .item").all_inner_texts()] == ["title 3"]
    rich.fill("#search", "RED")
    rich.keyboard.press("Enter")
    rich.wait_for_function("explorer.state.zoom > 1.2")
    for row in (2, 3):
        x, y = place_of(rich, row)
        assert 0 < x < 860 and 0 < y < 800
    rich.locator("#near .item").first.click()
    assert "red shoes" in rich.inner_text(".chosen")
    rich.get_by_text("Back to the rows").click()
    assert rich.locator("#near .item").count() == 2


def test_the_lasso_selects_rows_that_leave_as_csv(rich):
    corners = [place_of(rich, i) for i in (1, 2, 3)]
    left, right = min(x for x, _ in corners) - 20, max(x for x, _ in corners) + 20
    top, bottom = min(y for _, y in corners) - 20, max(y for _, y in corners) + 20
    rich.click("#lasso")
    rich.mouse.move(left, bottom)
    rich.mouse.down()
    for x, y in ((left, top), (right, top), (right, bottom)):
        rich.mouse.move(x, y, steps=3)
    rich.mouse.up()
    assert lit(rich) == [1, 2, 3] and rich.get_attribute("#lasso", "aria-pressed") == "false"
    assert "3 rows selected" in rich.inner_text("#near h2")
    with rich.expect_download() as saved:
        rich.get_by_text("CSV").click()
    text = saved.value.path().read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["title"] for row in rows] == ["title 1", "title 2", "title 3"]
    assert [row["description"] for row in rows] == TEXTS[1:4] and rows[0]["category"] == "家电<b>"
    rich.keyboard.press("Escape")
    assert len(lit(rich)) == 8


def test_copied_cells_come_back_whole(browser, tmp_path):
    texts = ['a "quoted" one', "two\tcells", *["x"] * 6]
    page = opened(browser, write_page(tmp_path / "page.html", texts), 1200, 800)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#search", "quoted")
    page.locator("#near").get_by_text("Copy").click()
    page.get_by_text("Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert list(csv.reader(io.StringIO(text), delimiter="\t"))[1] == ["家电<b>", texts[0]]


def test_numbers_colour_as_a_scale_and_labels_by_themselves(rich):
    assert rich.locator("#by option").all_inner_texts() == ["category", "price", "brand"]
    rich.select_option("#by select", label="price")
    colours = [rich.evaluate("i => explorer.colourOf(i)", i) for i in range(8)]
    assert len({*colours[1:]}) >= 4 and colours[0] not in colours[1:]  # the first has no price
    assert rich.locator(".ends span").all_inner_texts() == ["1", "7"]
    rich.select_option("#by select", label="brand")
    assert rich.locator("#legend .key").all_inner_texts() == ["a\n2", "b\n2", "c\n2", "(empty)\n1", "no label\n1"]
    rich.locator("#legend .key").first.click()
    assert lit(rich) == [0, 2]


def test_names_are_on_the_map_and_more_of_them_when_zoomed_in(browser, tmp_path):
    names = [f"a rather long label {i}" for i in range(8)]
    close = Panel("t-SNE", CIRCLE * 0.2 + np.array([[5.0, 5.0]] * 7 + [[0.0, 0.0]], np.float32))
    path = write_page(tmp_path / "page.html", names=names, sizes=[1] * 8, codes=range(8), panels=[close])
    page = opened(browser, path, 1200, 800)
    page.wait_for_function("explorer.drawnNames.length > 0")
    before = page.evaluate("[...explorer.drawnNames]")
    page.evaluate("Object.assign(explorer.state, {zoom: 5, x: 0.95, y: 0.05}); explorer.paint()")
    after = page.evaluate("[...explorer.drawnNames]")
    assert 2 <= len(before) < len(after) == 7


def test_two_fingers_zoom_where_they_are(page):
    pinch = """([x, y]) => {
      const at = (id, type, dx) => document.querySelector("canvas").dispatchEvent(new PointerEvent(type,
        {pointerId: id, clientX: x + dx, clientY: y, bubbles: true}));
      document.querySelector("canvas").setPointerCapture = () => {};
      at(1, "pointerdown", -20); at(2, "pointerdown", 20);
      for (let d = 20; d <= 60; d += 4) { at(1, "pointermove", -d); at(2, "pointermove", d); }
      at(1, "pointerup", -60); at(2, "pointerup", 60); }"""
    x, y = place_of(page, 1)
    page.evaluate(pinch, [x, y])
    assert page.evaluate("explorer.state.zoom") == pytest.approx(3, rel=0.05)
    assert place_of(page, 1) == pytest.approx((x, y), abs=3)  # and the map did not slide away
    assert page.evaluate("explorer.state.chosen") == -1


def test_keys_and_buttons_move_and_zoom(page):
    x, y = place_of(page, 1)
    page.focus("canvas")
    page.keyboard.press("ArrowRight")
    assert place_of(page, 1) == pytest.approx((x - 60, y), abs=0.5)
    page.keyboard.press("0")
    page.click("#in")
    page.keyboard.press("Tab")
    assert page.evaluate("explorer.state.zoom") > 1.3
    page.click("#out")
    assert page.evaluate("explorer.state.zoom") == pytest.approx(1)
    page.focus("#legend .key")
    page.keyboard.press("Enter")
    assert lit(page) == [0, 1, 7] and page.locator("#legend .key").first.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.className").startswith("key")


def test_everything_that_acts_has_a_name(rich):
    rich.mouse.click(*place_of(rich, 2))
    unnamed = rich.evaluate(
        "[...document.querySelectorAll('button, input, select, canvas')].filter(e => !(e.innerText || e.ariaLabel ||"
        " e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_the_page_follows_the_system_into_the_dark_and_back(browser, tmp_path):
    page = browser.new_page(color_scheme="dark")
    page.goto(write_page(tmp_path / "page.html").as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 23, 29)"
    dark = page.evaluate("explorer.colourOf(0)")
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)" and page.evaluate("explorer.colourOf(0)") != dark


def test_what_is_filtered_away_stays_as_grey_dots(page):
    pixel = (
        "i => { explorer.paint(); const [x, y] = explorer.screen(i);"
        " return Array.from(document.querySelector('canvas').getContext('2d').getImageData(x, y, 1, 1).data) }"
    )
    page.locator("#legend .key").nth(1).click()
    red, green, blue, _ = page.evaluate(pixel, 7)
    assert max(red, green, blue) - min(red, green, blue) < 25 and red < 240
