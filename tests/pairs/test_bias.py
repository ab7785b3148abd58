"""Position bias: exact on exact counts, and near the truth of a simulated log."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.pairs.bias import estimate_propensities
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.run import make_training_pairs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import simulate_clicks  # noqa: E402


def test_exact_counts_give_the_exact_propensities_whatever_ranked_the_items():
    looks, rates = np.array([1.0, 0.6, 0.2]), np.array([0.5, 0.1])
    # the good item is mostly first, the bad one mostly last: click rates by position alone would be far off
    shown = np.array([[8000.0, 1000, 1000], [1000, 1000, 8000]])
    pair, place = np.divmod(np.arange(6), 3)
    clicks = (shown * looks * rates[:, None]).ravel()
    found = estimate_propensities(pair, place + 1, shown.ravel(), clicks)
    assert list(found) == [1, 2, 3]
    assert list(found.values()) == pytest.approx([1.0, 0.6, 0.2], abs=1e-4)
    naive = clicks.reshape(2, 3).sum(0) / shown.sum(0)
    assert naive[2] / naive[0] < 0.1


def test_positions_that_nothing_links_to_the_first_take_the_one_before():
    pair, place = np.array([0, 0, 1, 1]), np.array([1, 2, 3, 4])
    found = estimate_propensities(pair, place, np.full(4, 10_000.0), np.array([1000.0, 500, 900, 300]))
    assert found == pytest.approx({1: 1.0, 2: 0.5, 3: 0.5, 4: 0.5})


def test_too_few_clicks_give_none():
    assert estimate_propensities(np.array([0, 0]), np.array([1, 2]), np.array([9.0, 9]), np.array([5.0, 4])) == {}


SHOPS = {
    "train_text": simulate_clicks.Habits(),
    "train_text/zh": simulate_clicks.Habits(searches=4000),
}
"""The sample shops, and how the log of each was made."""


@pytest.fixture(scope="module", params=SHOPS)
def simulated(request, tmp_path_factory):
    """A sample log: its folder, the truth that it was made from, and what the stage makes of it."""
    place = ROOT / request.param
    source, catalogue = place / "click_log", place / "catalogue"
    known = simulate_clicks.ids_in(catalogue) if catalogue.is_dir() else None
    shop = simulate_clicks.shop_of(simulate_clicks.read_lines(place / "queries.jsonl"), known)
    result = make_training_pairs(
        {
            "log_path": str(source / "events.csv.gz"),
            "catalogue_path": str(catalogue if known else source / "items.jsonl"),
            "output_dir": str(tmp_path_factory.mktemp("pairs") / "out"),
        }
    )
    return source, SHOPS[request.param], shop, result


@pytest.fixture(scope="module")
def rows(simulated):
    """What the simulator writes for the shop."""
    _, habits, shop, _ = simulated
    return list(simulate_clicks.events(shop, habits, 0))


def contents(folder):
    """Bytes of each file, and the manifest without the time that the run took."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop(Path("manifest.json")))
    return found, manifest | {"seconds": 0}


def test_a_run_from_its_own_config_writes_the_same_bytes(simulated):
    *_, result = simulated
    first = contents(result.folder)
    make_training_pairs(PairsConfig.resolve(None, [result.folder / "pairs_config.yaml"]))
    assert contents(result.folder) == first


def test_the_sample_log_is_what_the_simulator_writes(simulated, rows, tmp_path):
    source, _, shop, _ = simulated
    lines = gzip.decompress((source / "events.csv.gz").read_bytes()).decode().splitlines()
    assert list(csv.reader(lines)) == [
        list(simulate_clicks.COLUMNS),
        *(list(map(str, row)) for row in sorted(rows, key=time_of)),
    ]
    if (source / "items.jsonl").is_file():
        simulate_clicks.write_items(shop, tmp_path)
        assert (tmp_path / "items.jsonl").read_bytes() == (source / "items.jsonl").read_bytes()


def time_of(row):
    return row[3]


def test_the_simulated_bias_is_found(simulated):
    _, habits, _, result = simulated
    found = json.loads(result.manifest.read_text(encoding="utf-8"))["propensities"]["by_position"]
    assert [found[str(place)] for place in range(1, 6)] == pytest.approx(habits.propensities[:5], abs=0.08)


def test_the_true_pairs_get_the_weight(simulated):
    _, _, shop, result = simulated
    answers = {query.lower(): items for query, items in shop.answers.items()}
    lines = [json.loads(line) for line in result.pairs.read_text(encoding="utf-8").splitlines()]
    true = [line["item_id"] in answers[line["anchor"].lower()] for line in lines]
    weight = np.array([line["weight"] for line in lines])
    assert np.mean(true) < 0.7  # most of the others are one chance click
    assert weight[true].sum() / weight.sum() > 0.85
    assert weight.mean() == pytest.approx(1, abs=1e-3)


def test_every_row_of_the_simulation_is_accounted_for(simulated, rows):
    _, _, shop, result = simulated
    people = [row for row in rows if row[5] != "bot"]
    known = {query.lower() for query in shop.answers}
    ids = [row for row in people if row[0].strip().lower() not in known]
    twice = sum(count - 1 for count in Counter(people).values())
    funnel = json.loads(result.manifest.read_text(encoding="utf-8"))["funnel"]
    steps = {(step["of"], step["step"]): step["left_out"] for step in funnel}
    assert steps["rows", "bot-like session"] == len(rows) - len(people) > 0
    assert steps["rows", "equal to another row"] == twice > 0
    assert steps["rows", "query is an id, a number or a URL"] == len(ids) > 0
    left = [step["left"] for step in funnel if step["of"] == "rows"]
    assert left == [len(rows), *(len(rows) - sum(list(steps.values())[1 : n + 1]) for n in range(1, len(left)))]
