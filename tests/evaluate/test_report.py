"""The page."""

from __future__ import annotations

from dataclasses import replace

from ebr_lib.evaluate.compare import Difference
from ebr_lib.evaluate.report import Duel, Example, Report, Slice


def test_on_a_phone_wide_tables_scroll_but_the_page_does_not(browser, tmp_path):
    names = [f"a-contender-with-a-long-name-{i}" for i in range(6)]
    means = {name: {"recall@1": 0.25, "recall@100": 0.5} for name in names}
    difference = Difference(names[0], names[1], "recall@1", 0.25, 0.25, 0.0, -0.1, 0.1, 1.0, 1.0)
    example = Example("一" * 300, 0.0, 1.0, ["w" * 300], [("v" * 300, True)], [])
    duel = Duel(names[0], names[1], "recall@1", [difference], [example], [example])
    slices = [Slice("city", "b" * 100, 3, means)]
    place = tmp_path / "report.html"
    how = {name: {"query prompt": "p" * 99} for name in names}
    report = Report("r", {"queries": 3}, means, [duel], slices, ["recall@1"], {"data": "d" * 99}, how)
    place.write_text(report.html(), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(place.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator(".wide").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && (e.scrollLeft = 999) && e.scrollLeft > 100")
    differences = page.locator(".wide").nth(1)
    assert differences.evaluate("e => e.scrollWidth <= e.clientWidth")
    # the measure's name stays in sight
    assert table.locator("td").first.bounding_box()["x"] == table.bounding_box()["x"]


def test_only_differences_significant_after_holm_are_coloured():
    wins = {"low": 0.01, "high": 0.1, "p": 0.03}  # without correction the interval and p both exclude chance
    chance, sure = (Difference("a", "b", "mrr@10", 0.5, 0.55, 0.05, **wins, p_holm=p) for p in (0.2, 0.049))
    report = Report("r", {}, {"a": {"mrr@10": 0.5}, "b": {"mrr@10": 0.55}}, [], [], [], {}, {})
    pages = [replace(report, duels=[Duel("a", "b", "mrr@10", [d], [], [])]).html() for d in (chance, sure)]
    assert ['class="up"' in page for page in pages] == [False, True]
