"""Small logs and catalogues."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ebr_lib.pairs.run import make_training_pairs

HEAD = ("query", "item_id", "event", "time", "position", "session")
ITEMS = {"1": "red shoe", "2": "blue shoe", "3": "green hat", "4": "warm scarf"}


class Shop:
    """A folder with a log and a catalogue, and what the stage makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log.csv"
        self.items = folder / "items.jsonl"
        self.write_items(ITEMS.items())

    def write_items(self, items) -> None:
        lines = (json.dumps({"item_id": id_, "description": text}) for id_, text in items)
        self.items.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(self, rows, head=HEAD) -> None:
        with self.log.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows([head, *rows])

    def make(self, **knobs):
        given = {"log_path": str(self.log), "catalogue_path": str(self.items), "output_dir": str(self.out)}
        return make_training_pairs(given | {"holdout_days": 0} | knobs)

    def pairs(self, **knobs) -> dict[tuple[str, str], dict]:
        """(anchor, item id) to its line."""
        lines = map(json.loads, self.make(**knobs).pairs.read_text(encoding="utf-8").splitlines())
        return {(line["anchor"], line["item_id"]): line for line in lines}

    def rejects(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]

    def funnel(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(of, step) to how many were left out, and are left."""
        steps = json.loads((self.out / "manifest.json").read_text(encoding="utf-8"))["funnel"]
        return {(step["of"], step["step"]): (step["left_out"], step["left"]) for step in steps}


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path)


def event(query, item, name, day=1, second=0, *, position=1, session="s"):
    return query, item, name, f"2026-11-{day:02d} 10:00:{second:02d}", position, session
