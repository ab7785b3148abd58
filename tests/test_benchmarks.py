"""The machinery of the benchmarks: what they measure is not tested, only that they run and keep what they found."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import contest
import quality
import run


@pytest.mark.parametrize("part", run.PARTS.values(), ids=list(run.PARTS))
def test_every_part_starts_with_options_that_its_script_knows(part, capsys):
    script, *_ = part.command.split()
    with pytest.raises(SystemExit) as stop:
        import_module(Path(script).stem).main(["--help"])
    known = set(re.split(r"[\s,\[\]]+", capsys.readouterr().out))
    given = {word for word in f"{part.command} {part.quick}".split() if word.startswith("--")}
    assert stop.value.code == 0 and given | {"--quick"} <= known


def counting(start: int):
    """A contender whose turns count, in its own process; a negative one fails at its second turn."""
    turns = iter(range(start, start + 3) if start >= 0 else range(1))
    return partial(lambda: (next(turns), os.getpid()))


def test_turns_come_in_order_from_a_process_each():
    found = contest.take_turns({"a": partial(counting, 10), "b": partial(counting, 20)}, rounds=2)
    assert {name: [number for number, _ in turns] for name, turns in found.items()} == {
        "a": [10, 11, 12],
        "b": [20, 21, 22],
    }
    processes = {name: {process for _, process in turns} for name, turns in found.items()}
    assert len(processes["a"]) == len(processes["b"]) == 1
    assert len(processes["a"] | processes["b"] | {os.getpid()}) == 3


def test_a_failing_contender_is_reported_and_the_others_continue(capfd):
    found = contest.take_turns({"bad": partial(counting, -1), "good": partial(counting, 1)}, rounds=1)
    assert [number for number, _ in found.pop("good")] == [1, 2]
    assert not found
    assert "bad failed" in capfd.readouterr().out


def test_a_section_replaces_its_own_and_leaves_the_others(tmp_path: Path):
    results = tmp_path / "RESULTS.md"
    for title, text in (("Files", "old"), ("Files and more", "kept"), ("Index", "kept too"), ("Files", "new \\1")):
        run.keep(results, title, text)
    assert results.read_text(encoding="utf-8") == (
        f"{run.HEAD}\n## Files\n\nnew \\1\n\n## Files and more\n\nkept\n\n## Index\n\nkept too\n"
    )


@pytest.mark.parametrize("fault", [ValueError("no such data"), SystemExit("too few sentences")])
def test_a_failing_part_is_reported_without_tables(fault: BaseException, monkeypatch, capfd):
    def main(words: list[str]) -> None:
        sys.stdout.write("half a table")
        raise fault

    monkeypatch.setattr("files.main", main)
    assert run.run("files.py --rows DIR", {"DIR": Path("here")}) is None
    assert str(fault) in capfd.readouterr().err


def test_a_part_prints_into_its_section_with_its_places_filled_in(monkeypatch, capfd):
    monkeypatch.setattr("files.main", lambda words: sys.stdout.write("\n| table | " + " ".join(words) + "\n"))
    assert run.run("files.py --rows DIR", {"DIR": Path("here")}) == "| table | --rows here"
    assert not capfd.readouterr().out


def test_quick_results_never_lie_over_full_ones():
    assert run.QUICK_RESULTS.parent != run.RESULTS.parent


def test_a_measured_result_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch, capfd):
    measured = []

    def score(task, model, contender, knobs, seed):
        measured.append((contender, seed))
        return {"hit@1": 0.5 + seed / 10, "guard": 0.25, "seconds": 3.0}

    monkeypatch.setattr(quality, "score", score)
    search = quality.Search([], [], [])
    task = quality.Set([("a", "b")], [], search, search, {}, ("hit@1",))
    file = tmp_path / "results.jsonl"
    for seeds in (1, 2):  # the second call measures what the first did not
        quality.report("set", task, "model", {"ours": {"lora_r": 2}}, seeds=seeds, results=quality.Results(file))
    quality.report("set", task, "model", {"ours": {"lora_r": 4}}, seeds=1, results=quality.Results(file))
    assert measured == [("ours", 0), ("ours", 1), ("ours", 0)]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert "| ours | 0.5500 ± 0.0707 | 0.2500 ± 0.0000 | 3 ± 0 |  |  |" in capfd.readouterr().out


def test_what_chooses_is_neither_trained_on_nor_reported(monkeypatch):
    monkeypatch.setattr(quality, "of_names", lambda data, queries: None)
    shop = quality.shop(Path())
    assert len(shop.pairs) + len(shop.choosing) == 640
    assert not {anchor for anchor, _ in shop.choosing} & {*shop.search.queries, *(anchor for anchor, _ in shop.pairs)}
