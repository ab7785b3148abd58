"""What a person sees in a terminal and in a notebook."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from ebr_lib.logs import RESULT, logger, show_logs
from ebr_lib.tables import LEFT, WHOLE, Table, html_link, html_picture


@pytest.fixture
def place(monkeypatch, request):
    """Where the library runs: "terminal", "IPython" (a terminal, too), or "notebook"."""
    shells = {"terminal": None, "IPython": SimpleNamespace(), "notebook": SimpleNamespace(kernel=object())}
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shells[request.param]))
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers.clear()
    yield request.param
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.parametrize("place", ["terminal", "IPython", "notebook"], indirect=True)
def test_a_notebook_shows_a_result_once(place, capsys):
    show_logs()
    show_logs()
    logger.info("saved: here")
    logger.info("recall 0.5", extra=RESULT)
    shown = capsys.readouterr().out
    assert shown.count("saved: here") == 1
    assert shown.count("recall 0.5") == (place != "notebook")


@pytest.mark.parametrize("place", ["terminal"], indirect=True)
def test_lines_below_the_level_are_not_shown(place, capsys):
    show_logs(logging.WARNING)
    logger.info("news")
    logger.warning("trouble")
    assert "trouble" in (shown := capsys.readouterr().out) and "news" not in shown


def test_columns_of_numbers_stay_to_the_right_and_texts_go_to_the_left():
    rows = [
        ("2 boxes", "a box that is long", 1, "+0.0603 [+0.0000, +0.1293] *", "2.6 %", 0.5),
        ("blue", "蓝" * 13, 20, "-0.1", "", "0.5"),
    ]
    shown = Table("t", ("short", "long", "count", "difference", "share", "mixed"), rows).html()
    assert f"<th{WHOLE}>short</th><th{LEFT}>long</th><th>count</th><th>difference</th><th>share</th><th>mixed" in shown
    assert f"<td{WHOLE}>2 boxes</td><td{LEFT}>a box that is long</td><td>1</td><td>+0.0603" in shown


def test_a_table_without_rows_has_its_head():
    assert Table("t", ("a", "b"), []).html().count("<th") == 3  # of them one is <thead>


def test_a_picture_is_in_the_page_and_what_no_page_shows_is_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.PNG").write_bytes(b"abc")
    assert 'alt="it" src="data:image/png;base64,YWJj"' in html_picture(tmp_path / "a.PNG", "it")
    place = tmp_path / "out" / 'a"<b>.pdf'
    assert html_picture(place, "it") == html_link(place)
    assert html_picture(tmp_path / "gone.png", "it") == html_link(tmp_path / "gone.png")
    assert 'href="out/a&quot;&lt;b&gt;.pdf"' in html_link(place)
