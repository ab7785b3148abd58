"""The page."""

from __future__ import annotations

from dataclasses import replace

from ebr_lib.evaluate.compare import Change, Difference, Verdict
from ebr_lib.evaluate.report import Document, Duel, Example, Report, Slice

SHORT = Difference("a", "b", "ndcg@10", 0.5, 0.55, 0.05, 0.01, 0.1, p=0.03, p_holm=0.03, won=3, lost=1, equal=2)


def report_of(means, duels, slices=(), **more) -> Report:
    return Report(
        "r", "ndcg@10", {"queries": 6}, means, duels, (), slices, {"data": "d" * 99, "date": "today"}, {}, {}, **more
    )


def page_of(report, browser, place, width=390):
    place.write_text(report.html(), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto(place.as_uri())
    return page


def test_the_verdict_is_on_the_first_screen_of_a_phone_and_the_tuned_column_in_sight(browser, tmp_path):
    names = ["all-MiniLM-L6-v2", "all-MiniLM-L6-v2-peft-lora"]
    verdict = Verdict("better", "更好 better: nDCG@10 0.470 → 0.558", ["only 6 queries"])
    differences = [replace(SHORT, metric=name) for name in ("ndcg@10", "recall@100", "mrr@10")]
    duel = Duel(*names, "ndcg@10", differences, [], [], verdict)
    means = {name: {"ndcg@10": 0.5} for name in names}
    slices = [Slice("length", "up to 6 words", 5, means, {names[1]: Change(0.1, None, None)})]
    page = page_of(report_of(means, [duel], slices), browser, tmp_path / "report.html")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("h1").inner_text() == verdict.sentence
    first = page.locator("table").first
    box = first.locator("tr").nth(1).bounding_box()
    assert box["y"] + box["height"] < 844 and first.evaluate("e => e.clientWidth <= e.parentNode.clientWidth")
    assert page.locator(".note").inner_text() == "only 6 queries"
    assert "too few" in page.locator("table").nth(1).inner_text()


def test_on_a_phone_wide_tables_scroll_but_the_page_does_not(browser, tmp_path):
    names = [f"a-contender-with-a-long-name-{i}" for i in range(12)]
    means = {name: {"ndcg@10": 0.25, "recall@100": 0.5} for name in names}
    found = [Document("v" * 60, "t" * 99, "v" * 300, True)]
    example = Example("q" * 30, "一" * 300, 0.0, 1.0, found, found, [])
    duel = Duel(
        names[0], names[1], "ndcg@10", [SHORT], [example], [example], Verdict("unclear", "s" * 300, ["n" * 300])
    )
    slices = [Slice("city", "b" * 100, 3, means, {})]
    page = page_of(report_of(means, [duel, replace(duel, verdict=None)] * 2, slices), browser, tmp_path / "report.html")
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator(".wide", has_text="city").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && (e.scrollLeft = 999) && e.scrollLeft > 100")
    # the group's name stays in sight
    assert table.locator("td").first.bounding_box()["x"] == table.bounding_box()["x"]


def test_only_differences_significant_after_holm_are_coloured():
    # without correction the interval and p both exclude chance
    chance, sure = (replace(SHORT, p=0.03, p_holm=p) for p in (0.2, 0.049))
    means = {"a": {"ndcg@10": 0.5}, "b": {"ndcg@10": 0.55}}
    duels = [Duel("a", "b", "ndcg@10", [d], [], [], Verdict("unclear", "", ())) for d in (chance, sure)]
    assert ['class="up"' in report_of(means, [duel]).html() for duel in duels] == [False, True]


def test_examples_show_titles_and_ids_and_repeated_measures_are_named_once():
    hit = Document("sku-7", "Head torch", "Shines far.", True)
    example = Example("q9", "lamp for night hikes", 0.0, 1.0, [hit], [], [hit])
    differences = [SHORT, replace(SHORT, metric="recall@1"), replace(SHORT, metric="hit@1", same_as="recall@1")]
    duel = Duel("a", "b", "ndcg@10", differences, [example], [], Verdict("better", "s", ()))
    page = report_of({"a": {"ndcg@10": 0.5}, "b": {"ndcg@10": 0.6}}, [duel]).html()
    assert "<b>Head torch</b> <small>sku-7</small> Shines far." in page and "<small>q9</small>" in page
    assert "hit@1 = recall@1" in page and page.count("hit@1") == 1
