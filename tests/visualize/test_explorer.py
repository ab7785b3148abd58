"""The explorer page, in a real browser where there is one: no network, clicks do what they say, text stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from ebr_lib.visualize import explorer
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


def write_page(path, texts=TEXTS, near=NEAR, *, names=NAMES, sizes=SIZES, codes=CODES, more=(), panels=None):
    groups = Groups(np.array(codes), names, sizes, "category")
    explorer.write_explorer(
        path,
        panels or [Panel("t-SNE", CIRCLE, "trust 0.9"), Panel("UMAP", CIRCLE[::-1], "trust 0.8", space=len(more))],
        groups,
        texts=texts,
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
    assert data["texts"] == [" ".join((text or "").split()) for text in TEXTS]
    assert data["labels"] == NAMES and len(data["colours"]) == 5


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
    assert data["texts"] == [text or "" for text in texts] and data["longest"] is None
    monkeypatch.setattr(explorer, "TEXT_ROOM", 6 * 5 + 1000)
    data = embedded(write_page(tmp_path / "page.html", texts).read_text(encoding="utf-8"))
    assert data["texts"] == ["长" * 1000 + "…", *["short"] * 6, ""] and data["longest"] == 1000


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
    page.fill("input", "热水器")
    assert lit(page) == [0, 1]
    assert "2 points" in page.inner_text("#hits")
    page.fill("input", "RED")
    assert lit(page) == [2, 3]
    page.fill("input", "clothes")  # labels are searched too
    assert lit(page) == [2, 3]
    page.fill("input", "")
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


def test_labels_beyond_the_largest_are_one_row_of_the_legend(browser, tmp_path):
    names = [f"label {i}" for i in range(30)]
    page = browser.new_page(locale="en-US")
    codes = (0, 1, 19, 20, 25, 29, -1, 0)
    page.goto(write_page(tmp_path / "page.html", names=names, sizes=[2] + [1] * 29, codes=codes).as_uri())
    keys = page.locator("#legend .key")
    assert keys.all_inner_texts() == ["label 0\n2", "label 1\n1", "label 19\n1", "10 other labels\n3", "no label\n1"]
    keys.nth(3).click()
    assert lit(page) == [3, 4, 5]
    page.mouse.move(*place_of(page, 4))
    assert page.inner_text("#tip b") == "label 25"  # its own name all the same
    page.click("#reset")
    page.fill("input", "label 29")
    assert lit(page) == [5]
    page.fill("input", "label")
    assert 6 not in lit(page)  # a row without a label is not found by the words for that


def opened(browser, path, width, height):
    page = browser.new_page(viewport={"width": width, "height": height}, locale="en-US")
    page.goto(path.as_uri())
    return page


def test_the_end_of_a_long_text_is_found_and_read(browser, tmp_path):
    texts = [f"{i} " + "word " * 1000 + ("Ende" if i == 3 else "stop") for i in range(8)]
    page = opened(browser, write_page(tmp_path / "page.html", texts), 1200, 800)
    page.fill("input", "ende")
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
