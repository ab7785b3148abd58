"""Tables of results in a terminal and in a notebook."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pandas as pd

from ebr_lib.tables import (
    as_html,
    as_text,
    columns_of,
    html_link,
    html_page,
    html_picture,
    html_verdict,
    make_table,
    shortened,
    squeezed,
)

ROWS = [
    ("2 boxes", "a box that is long", 1, "+0.0603 [+0.0000, +0.1293] *", "2.6 %", 0.5),
    ("blue", "蓝" * 13, 20, "-0.1", "", "0.5"),
]
COLUMNS = ("short", "long", "count", "difference", "share", "mixed")


def styles_of(page: str) -> dict[str, str]:
    """Column number to its style."""
    return {
        number: props
        for names, props in re.findall(r"([^{}]*)\{([^{}]*)\}", page)
        for number in re.findall(r"\.col(\d)", names)
    }


def cells_of(page: str) -> list[str]:
    cells: list[str] = []
    parser = HTMLParser()
    parser.handle_data = cells.append
    parser.feed(page.split("</style>")[1])
    return [cell.strip() for cell in cells if cell.strip()]


def test_numbers_are_right_and_texts_left_in_a_notebook():
    page = as_html(make_table("t", COLUMNS, ROWS))
    styles = styles_of(page)
    assert styles.keys() == {"0", "1"} and all("text-align: left" in style for style in styles.values())
    assert "nowrap" in styles["0"] and "nowrap" not in styles["1"]
    assert cells_of(page) == ["t", *COLUMNS, *map(str, ROWS[0][:5]), "0.5000", *filter(None, map(str, ROWS[1]))]


def test_numbers_are_right_and_texts_left_in_a_terminal():
    table = make_table("名 t", ("文", "n", "long"), [("a", 1, "热水器"), ("热水器", 20, "b")])
    assert as_text(table) == "名 t\n文       n  long\na        1  热水器\n热水器  20  b"


def test_texts_of_users_are_escaped():
    page = as_html(make_table("<b>", ("<i>",), [("<script>",)]))
    assert all(f"&lt;{name}&gt;" in page and f"<{name}>" not in page for name in ("b", "i", "script"))


def test_numbers_have_four_decimals_changes_a_sign_and_nulls_nothing():
    table = make_table("t", ("change", "big", "text"), [(0.5, 1234.5, None), (-0.25, float("nan"), "x")])
    assert as_text(table).split("\n")[2:] == ["+0.5000  1,234", "-0.2500         x"]
    assert "x" in as_text(make_table("t", ("change",), [("x",)]))


def test_a_table_without_rows_has_its_head():
    table = make_table("t", ("a", "b"), [])
    assert as_html(table).count("<th ") == 2 and as_text(table).split() == ["t", "a", "b"]


def test_any_frame_can_be_shown():
    frame = pd.DataFrame({"a": [1]})
    assert as_text(frame).split() == ["a", "1"] and "<td" in as_html(frame)


def test_texts_are_cut_in_the_middle_where_shown_and_whole_in_the_frame():
    names = ["衣服>女装/女士精品>连衣裙>长袖连衣裙>" + "某" * 40 + end for end in "12"]
    table = make_table("t", ("label",), [[name] for name in names], width=30)
    assert table["label"].tolist() == names
    cut = [squeezed(name, 30) for name in names]
    assert cut[0] != cut[1] and all(columns_of(name) <= 30 for name in cut)
    assert as_text(table).split() == cells_of(as_html(table)) == ["t", "label", *cut]


def test_texts_are_cut_to_the_width_they_take():
    assert shortened("short", 10) == "short"
    assert shortened("热水器洗发水", 9) == "热水器洗…"
    assert shortened("two\nlines\t here", 40) == "two lines here"
    assert columns_of(shortened("长" * 100, 30)) <= 30


def test_labels_that_begin_alike_stay_apart():
    names = ["balance_not_updated_after_bank_transfer", "balance_not_updated_after_cheque_or_cash", "余额" * 30 + "末"]
    cut = [squeezed(name, 24) for name in names]
    assert cut == ["balance_not_upd…transfer", "balance_not_upd…_or_cash", cut[2]]
    assert all(columns_of(name) <= 24 for name in cut) and cut[2].endswith("末")
    assert squeezed("short", 24) == "short"


def test_a_notebook_gets_the_picture_itself_or_a_link_to_a_kind_it_cannot_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.PNG").write_bytes(b"abc")
    assert 'alt="it" src="data:image/png;base64,YWJj"' in html_picture(tmp_path / "a.PNG", "it")
    place = tmp_path / "out" / 'a"<b>.pdf'
    assert html_picture(place, "it") == html_link(place)
    assert html_picture(tmp_path / "gone.png", "it") == html_link(tmp_path / "gone.png")
    assert 'href="out/a&quot;&lt;b&gt;.pdf"' in html_link(place)


def test_a_page_is_shown_in_a_frame_without_the_notebook_s_origin_and_linked(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text('<script>alert("a" && 1)</script>', encoding="utf-8")
    shown = html_page(page, "map <1>")
    frame = re.search(r'<iframe sandbox="([^"]*)" .*srcdoc="([^"]*)"', shown)
    assert "allow-scripts" in frame[1] and "allow-same-origin" not in frame[1]
    assert html.unescape(frame[2]) == page.read_text(encoding="utf-8")
    assert "<script>" not in shown and "map &lt;1&gt;" in shown and 'page.html" target="_blank"' in shown
    monkeypatch.setattr("ebr_lib.tables.LARGEST_PAGE", 8)
    assert html_page(page, "map") == html_link(page)  # a notebook would hold all of it


def test_a_verdict_is_one_bold_sentence_with_its_notes():
    shown = html_verdict("better: 0.1 < 0.2", ["few <queries>"], "tuned & base")
    assert "<b " in shown and "0.1 &lt; 0.2" in shown and "few &lt;queries&gt;" in shown and "tuned &amp; base" in shown
