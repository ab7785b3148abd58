"""From a log to pairs: hand-worked numbers, decisions, formats, bad input."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import shutil
from math import sqrt

import polars as pl
import pytest

from ebr_lib.config import check_configs
from ebr_lib.data.pairs import read_pairs
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.evaluate.corpus import Columns
from ebr_lib.evaluate.task import find_sources, read_task
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.pairs import counts
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.rows import is_id, query_key
from tests.pairs.conftest import HEAD, event

COUNTS = ("query", "item_id", "day", "position", "impressions", "clicks", "orders")
COUNTED = [
    ("a", "1", "2026-11-01", 1, 10, 4, 0),
    ("a", "1", "2026-11-01", 2, 10, 2, 1),
    ("a", "2", "2026-11-02", 1, 10, 1, 0),
    ("b", "2", "2026-11-02", 1, 10, 4, 0),
    ("b", "3", "2026-11-02", 2, 10, 0, 0),
]


# --- weights by hand ----------------------------------------------------------------------------------------------


def weights(shop, **knobs):
    return {key: line["weight"] for key, line in shop.pairs(min_ctr_ratio=0.0, **knobs).items()}


def relative(found, expected):
    """Both with mean 1."""
    mean = sum(expected.values()) / len(expected)
    assert found == pytest.approx({key: value / mean for key, value in expected.items()}, rel=1e-3)


def test_events_are_weighed_and_corrected_for_position(shop):
    shop.write(COUNTED, COUNTS)
    # 4 clicks at 1; 2 clicks and an order of 3 at position 2, looked at half as often
    expected = {("a", "1"): 4 + (2 + 3) / 0.5, ("a", "2"): 1, ("b", "2"): 4}
    relative(weights(shop, propensities=[1.0, 0.5], damping="none"), expected)
    capped = {("a", "1"): 4 + 5 * 1.25, ("a", "2"): 1, ("b", "2"): 4}
    relative(weights(shop, propensities=[1.0, 0.5], damping="none", max_correction=1.25), capped)
    plain = {("a", "1"): 9, ("a", "2"): 1, ("b", "2"): 4}
    relative(weights(shop, propensities="none", damping="none"), plain)


def test_a_position_beyond_the_table_has_the_last_propensity(shop):
    shop.write([*COUNTED[:1], ("b", "2", "2026-11-02", 7, 10, 4, 0), ("c", "3", "2026-11-02", "", 10, 4, 0)], COUNTS)
    expected = {("a", "1"): 4, ("b", "2"): 4 / 0.5, ("c", "3"): 4}
    relative(weights(shop, propensities=[1.0, 0.5], damping="none"), expected)


def test_orders_without_any_click_are_kept(shop):
    shop.write([("a", "1", "2026-11-01", 1, 10, 0, 2)], COUNTS)
    assert set(shop.pairs(min_ctr_ratio=0.5)) == {("a", "1")}


def test_a_position_as_a_float_is_that_position(shop):
    shop.write(COUNTED, COUNTS)
    expected = weights(shop, propensities=[1.0, 0.5])
    shop.write([(*row[:3], f"{row[3]}.0", *row[4:]) for row in COUNTED], COUNTS)
    assert weights(shop, propensities=[1.0, 0.5]) == expected


def test_totals_of_queries_then_of_items_are_damped(shop):
    shop.write(COUNTED, COUNTS)
    # query a: total 10 becomes sqrt(10), shared 9 : 1; query b: 4 becomes 2
    first, shared, other = 9 / 10 * sqrt(10), 1 / 10 * sqrt(10), 2.0
    second = shared + other  # item 2
    expected = {
        ("a", "1"): sqrt(first),
        ("a", "2"): shared / second * sqrt(second),
        ("b", "2"): other / second * sqrt(second),
    }
    relative(weights(shop, propensities="none"), expected)


def test_older_events_count_less(shop):
    shop.write(COUNTED, COUNTS)
    expected = {("a", "1"): 9 / 2, ("a", "2"): 1, ("b", "2"): 4}  # one day before the last
    relative(weights(shop, propensities="none", damping="none", half_life_days=1.0), expected)


def test_pairs_below_a_share_of_the_logs_click_rate_are_dropped(shop):
    shop.write(COUNTED, COUNTS)
    # 11 clicks in 50 impressions; (1 + 20 r) / (10 + 20) / r for a and 2: 0.8182
    rate = 11 / 50
    smoothed = (1 + 20 * rate) / 30 / rate
    assert set(shop.pairs(propensities="none", min_ctr_ratio=smoothed - 0.001)) == {("a", "1"), ("a", "2"), ("b", "2")}
    assert set(shop.pairs(propensities="none", min_ctr_ratio=smoothed + 0.001)) == {("a", "1"), ("b", "2")}
    assert shop.funnel()["training pairs", "click rate below min_ctr_ratio"] == (1, 2)
    weaker = (1 + 5 * rate) / 15 / rate
    assert ("a", "2") in shop.pairs(propensities="none", prior_strength=5, min_ctr_ratio=weaker - 0.001)
    assert ("a", "2") not in shop.pairs(propensities="none", prior_strength=5, min_ctr_ratio=weaker + 0.001)


def test_thresholds_and_caps_have_a_line_in_the_funnel(shop):
    shop.write(COUNTED, COUNTS)
    assert set(shop.pairs(min_clicks=2)) == {("a", "1"), ("b", "2")}
    assert shop.funnel()["training pairs", "fewer than min_clicks"] == (1, 2)
    assert set(shop.pairs(min_impressions=11)) == {("a", "1")}
    assert set(shop.pairs(max_items_per_query=1)) == {("a", "1"), ("b", "2")}
    assert set(shop.pairs(max_queries_per_item=1)) == {("a", "1"), ("b", "2")}
    assert shop.funnel()["training pairs", "over max_queries_per_item"] == (1, 2)


# --- decisions ----------------------------------------------------------------------------------------------------


def test_spellings_are_merged_under_the_most_frequent(shop):
    rows = [
        event(query, "1", "click", second=i) for i, query in enumerate(["Red  Shoe?", "ＲＥＤ shoe?", "Red  Shoe?"])
    ]
    shop.write(rows)
    ((key, line),) = shop.pairs().items()
    assert (key, line["clicks"]) == (("Red Shoe?", "1"), 3)


def test_equal_rows_count_once_where_they_cannot_be_two_events(shop):
    shop.write([event("a", "1", "click")] * 3 + [event("a", "1", "click", second=1)])
    assert shop.pairs()["a", "1"]["clicks"] == 2
    assert shop.funnel()["rows", "equal to another row"] == (2, 2)
    dated = [("a", "1", "click", "2026-11-01")] * 3
    shop.write(dated, HEAD[:4])
    assert shop.pairs()["a", "1"]["clicks"] == 3
    shop.write([event("a", "1", "click")] * 3)
    assert shop.pairs(drop_duplicates=False)["a", "1"]["clicks"] == 3


def test_bots_ids_and_urls_are_dropped_and_counted(shop):
    bot = [event("b", "1", "click", second=i, session="bot") for i in range(11)]
    ids = [event(q, "1", "click") for q in ("https://x.example/a", "13800138000", "www.shop.cn", "4")]
    shop.write([*bot, *ids, event("a", "1", "click"), event("4", "4", "impression")])
    assert set(shop.pairs(max_session_events=10)) == {("a", "1")}
    assert shop.funnel()["rows", "bot-like session"] == (11, 6)
    assert shop.funnel()["rows", "query is an id, a number or a URL"] == (5, 1)
    assert len(shop.pairs(max_session_events=0, drop_id_queries=False)) == 6


def test_bots_are_dropped_from_a_log_without_times(shop):
    rows = [("b", "1", "click", i, "bot") for i in range(11)] + [("a", "1", "click", 1, "s")]
    shop.write(rows, ("query", "item_id", "event", "position", "session"))
    assert set(shop.pairs(max_session_events=10)) == {("a", "1")}
    assert shop.funnel()["rows", "bot-like session"] == (11, 1)


@pytest.mark.parametrize(
    "query", ["iphone 15 pro max", "rtx4090", "iphone13promax", "7 up", "4711", "羽绒服", "a.b", "2026"]
)
def test_product_names_are_not_ids(query):
    assert not pl.select(is_id(pl.lit(query))).item()


@pytest.mark.parametrize("query", ["Straight", "ＩＰＨＯＮＥ　１５", "a\u200bb", " 羽绒服\t女 ", "ÀÉ", "①"])
def test_a_query_key_is_the_normalised_text(query):
    from ebr_lib.data.text import normalised

    assert pl.select(query_key(pl.lit(query))).item() == normalised(query)


def test_languages_can_be_limited(shop):
    rows = [event(f"word {i}x", "1", "click") for i in range(5)] + [event(f"羽绒服{i}", "2", "click") for i in range(3)]
    shop.write(rows)
    kept = shop.pairs(queries_per_language={"English": 2})
    assert sum(query.startswith("word") for query, _ in kept) == 2
    assert len(kept) == 5
    assert shop.pairs(queries_per_language={"English": 2}) == kept


def test_shown_and_never_clicked_items_are_negatives_only_when_asked(shop):
    shop.write([*COUNTED, ("a", "3", "2026-11-01", 1, 30, 0, 0), ("a", "4", "2026-11-01", 1, 9, 0, 0)], COUNTS)
    assert all("negative" not in line for line in shop.pairs().values())
    lines = shop.pairs(exposed_negatives=1.0, propensities="none")
    assert {key: line.get("negative") for key, line in lines.items()} == {
        ("a", "1"): ["green hat"],
        ("a", "2"): ["green hat"],
        ("b", "2"): ["green hat"],
    }
    lines = shop.pairs(exposed_negatives=1.0, propensities="none", negatives_per_pair=2, negative_min_impressions=5)
    assert lines["a", "1"]["negative"] == ["green hat", "warm scarf"]  # the most seen first
    assert lines["b", "2"]["negative"] == ["green hat"]  # b was never shown the scarf


def test_items_of_equal_text_are_one_and_a_query_is_not_its_own_answer(shop):
    shop.write_items([("1", "red shoe"), ("2", "red shoe"), ("3", "a")])
    shop.write(
        [event("a", "1", "click"), event("a", "2", "click"), event("a", "2", "click", 2), event("a", "3", "click")]
    )
    ((key, line),) = shop.pairs().items()
    assert (key, line["clicks"]) == (("a", "2"), 3)


def test_items_to_items(shop):
    rows = [("1", "2", "click"), ("1", "3", "click"), ("2", "1", "click"), ("9", "1", "click")]
    rows = [(a, b, name, "2026-11-01 10:00:00") for a, b, name in rows]
    shop.write(rows, ("item_id", "clicked_id", "event", "time"))
    found = shop.pairs(query_is_item=True, query_column="item_id", item_column="clicked_id")
    assert set(found) == {("red shoe", "2"), ("red shoe", "3"), ("blue shoe", "1")}
    assert found["red shoe", "2"]["anchor_id"] == "1"
    assert [row["query"] for row in shop.rejects()] == ["9"]


# --- held-out queries ---------------------------------------------------------------------------------------------


def held_log():
    days = [event("a", "1", "click", day) for day in (1, 2, 9)] + [event("b", "2", "click", 3)]
    return [*days, event("b", "2", "order", 10), event("b", "3", "click", 10), event("c", "4", "click", 9)]


def test_the_last_days_are_held_out_with_grades_and_marks(shop):
    shop.write(held_log())
    result = shop.make(holdout_days=3)
    assert {line["anchor"] for line in map(json.loads, result.pairs.read_text().splitlines())} == {"a", "b"}
    queries = [json.loads(line) for line in (result.heldout / "queries.jsonl").read_text().splitlines()]
    assert [(q["text"], q["query_seen"], q["items_seen"]) for q in queries] == [
        ("a", "seen", "seen"),
        ("b", "seen", "some"),
        ("c", "unseen", "unseen"),
    ]
    grades = (result.heldout / "qrels/test.tsv").read_text().splitlines()[1:]
    assert grades == ["q1\t1\t1", "q2\t2\t2", "q2\t3\t1", "q3\t4\t1"]
    one = shop.make(holdout_days=3, max_heldout_queries=1)
    assert len((one.heldout / "queries.jsonl").read_text().splitlines()) == 1


def test_what_is_held_out_does_not_touch_training(shop):
    shop.write(held_log())
    held = shop.pairs(holdout_days=3)
    shop.write([row for row in held_log() if row[3] < "2026-11-08"])
    assert shop.pairs(holdout_days=0) == held


def test_position_bias_is_estimated_from_the_days_of_training(shop):
    trained = [("a", "1", "2026-11-01", 1, 1000, 400, 0), ("a", "1", "2026-11-01", 2, 1000, 200, 0)]
    shop.write([*trained, ("a", "1", "2026-11-02", 2, 1000, 900, 0)], COUNTS)
    shop.make(propensities="estimate", holdout_days=1)
    found = json.loads((shop.out / "manifest.json").read_text())["propensities"]["by_position"]
    assert found == pytest.approx({"1": 1.0, "2": 0.5}, abs=1e-4)


def test_the_other_stages_read_the_files_by_the_presets(shop):
    shop.write(held_log())
    result = shop.make(holdout_days=3)
    finetune = FinetuneConfig.resolve(None, [result.finetune_preset])
    assert len(read_pairs(finetune.data_path)) == 2
    assert {pair.anchor for pair in read_pairs(finetune.eval_data_path)} == {"a", "b", "c"}
    evaluate = EvalConfig.resolve(None, [result.evaluate_preset])
    task = read_task(find_sources(evaluate.data_path, None, None, None), Columns(), evaluate.slice_columns, set())
    assert task.queries == ["a", "b", "c"]
    assert len(task.corpus) == 4


def test_later_stages_are_checked_as_if_the_pairs_were_there(shop, tmp_path):
    shop.write(held_log())
    pairs = {"log_path": str(shop.log), "catalogue_path": str(shop.items), "output_dir": str(shop.out)}
    finetune = {"data_path": f"{shop.out}/pairs.jsonl", "eval_data_path": f"{shop.out}/heldout/pairs.jsonl"}
    finetune["output_dir"] = str(tmp_path / "models")
    check_configs(pairs=pairs, finetune=finetune, run={"pairs": True, "finetune": True})
    with pytest.raises(ConfigError, match="data_path"):
        check_configs(pairs=pairs, finetune=finetune, run={"pairs": False, "finetune": True})
    heldout = f"{shop.out}/heldout"
    of_folder = {"data_path": heldout, "train_data_path": finetune["data_path"], "models": []}
    of_files = {"queries_path": f"{heldout}/queries.jsonl", "corpus_path": f"{heldout}/corpus.jsonl"}
    of_files |= {"qrels_path": f"{heldout}/qrels/test.tsv", "models": []}
    for evaluate in (of_folder, of_files):
        check_configs(pairs=pairs, evaluate=evaluate, run={"pairs": True, "evaluate": True})
        with pytest.raises(ConfigError, match="evaluate:"):
            check_configs(pairs=pairs | {"holdout_days": 0}, evaluate=evaluate, run={"pairs": True, "evaluate": True})


def test_pairs_that_fine_tuning_does_not_read_are_a_mistake(shop, tmp_path):
    shop.write(held_log())
    pairs = {"log_path": str(shop.log), "catalogue_path": str(shop.items), "output_dir": str(shop.out)}
    other = tmp_path / "other.jsonl"
    other.write_text('{"anchor": "a", "positive": "b"}\n')
    finetune = {"data_path": str(other), "output_dir": str(tmp_path / "models")}
    run = {"pairs": True, "finetune": True}
    with pytest.raises(ConfigError, match=f"data_path: {other} has nothing of the pairs .* to {shop.out}/pairs.jsonl"):
        check_configs(pairs=pairs, finetune=finetune, run=run)
    check_configs(pairs=pairs, finetune=finetune, run=run | {"pairs": False})
    both = [str(other), f"{shop.out}/pairs.jsonl"]
    check_configs(pairs=pairs, finetune=finetune | {"data_path": both}, run=run)


# --- formats ------------------------------------------------------------------------------------------------------


def as_text(rows, mark):
    return "".join(mark.join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("kind", ["hive", "tsv", "jsonl", "parquet", "orc", "gzip", "bz2", "partitions", "numbers"])
def test_every_format_gives_the_same_pairs(shop, kind):
    rows = [event(f"q{i % 3}", str(1 + i % 4), "click", 1 + i % 5, i) for i in range(12)]
    shop.write(rows)
    expected = shop.pairs()
    frame = pl.DataFrame(rows, schema=list(HEAD), orient="row")
    knobs, log = {}, shop.folder / "x"
    if kind == "hive":
        log.write_text(as_text(rows, "\x01"))
        knobs["columns"] = list(HEAD)
    elif kind == "tsv":
        log.write_text(as_text([HEAD, *rows], "\t"))
    elif kind == "jsonl":
        frame.write_ndjson(log)
    elif kind == "parquet":
        frame.with_columns(pl.col("time").str.to_datetime(), pl.col("item_id").cast(pl.Float64)).write_parquet(log)
    elif kind == "numbers":
        frame.with_columns(pl.col("time").str.to_datetime().dt.epoch("s")).write_parquet(log)
    elif kind == "orc":
        from pyarrow import orc

        orc.write_table(frame.to_arrow().cast(frame.to_arrow().schema), log)
    elif kind == "gzip":
        log.write_bytes(gzip.compress(shop.log.read_bytes()))
    elif kind == "bz2":
        log.write_bytes(bz2.compress(shop.log.read_bytes()))
    else:
        for day in range(1, 6):
            part = frame.filter(pl.col("time").str.starts_with(f"2026-11-0{day}")).drop("time")
            (log / f"dt=2026-11-0{day}").mkdir(parents=True)
            part.write_parquet(log / f"dt=2026-11-0{day}" / "part-0")
    assert shop.pairs(log_path=str(log), **knobs) == expected


def test_columns_and_events_of_other_names(shop):
    rows = [event("a", "1", "show", position=2), event("a", "1", "click"), event("b", "2", "click")]
    shop.write([(*row[:2], row[2].replace("show", "impression"), *row[3:]) for row in rows])
    expected = shop.pairs()
    names = {"query": "q", "item_id": "sku", "event": "what", "time": "at", "position": "place", "session": "uid"}
    shop.write(rows, tuple(names.values()))
    columns = {f"{name.removesuffix('_id')}_column": own for name, own in names.items()}
    headless = shop.folder / "items.csv"
    headless.write_text(
        shop.items.read_text().replace('{"item_id": "', "").replace('", "description": "', ",").replace('"}', "")
    )
    catalogue = {"catalogue_path": str(headless), "catalogue_columns": ["item_id", "description"]}
    assert shop.pairs(**columns, **catalogue, impression_event="show") == expected


def test_counts_under_other_names(shop):
    shop.write(COUNTED, COUNTS)
    expected = shop.pairs()
    named = {"impression": "views", "click": "taps", "order": "sales"}
    shop.write(COUNTED, (*COUNTS[:4], *named.values()))
    assert shop.pairs(count_columns=named) == expected


def test_any_number_of_parts_gives_the_same_files(shop, monkeypatch):
    rows = [
        event(f"q{i % 7}", str(1 + i % 4), "click" if i % 3 else "impression", 1 + i % 9, i % 60) for i in range(300)
    ]
    shop.write(rows)
    whole = {
        name: (shop.make(holdout_days=2).folder / name).read_bytes()
        for name in ("pairs.jsonl", "heldout/qrels/test.tsv")
    }
    monkeypatch.setattr(counts, "BYTES_PER_PART", 1000)
    monkeypatch.setattr(counts, "ROW_GROUP", 7)
    assert whole == {name: (shop.make(holdout_days=2).folder / name).read_bytes() for name in whole}


@pytest.mark.parametrize(
    ("time", "zone", "day"),
    [
        ("2026-11-01 23:30:00", "Asia/Shanghai", "2026-11-01"),
        ("2026/11/1 23:30", "UTC", "2026-11-01"),
        ("20261101", "UTC", "2026-11-01"),
        ("2026-11-01T23:30:00Z", "Asia/Shanghai", "2026-11-02"),
        ("2026-11-01T23:30:00.123+00:00", "Asia/Shanghai", "2026-11-02"),
        ("2026-11-02 01:00:00 +0800", "UTC", "2026-11-01"),
        ("1793575800", "Asia/Shanghai", "2026-11-02"),  # 2026-11-01 23:30 UTC
        ("1793575800000", "UTC", "2026-11-01"),
    ],
)
def test_times_are_read_in_the_zone_of_the_days(shop, time, zone, day):
    shop.write([("a", "1", "click", time)], HEAD[:4])
    shop.make(time_zone=zone)
    assert json.loads((shop.out / "manifest.json").read_text())["days"] == [day, day]


def test_days_of_a_format_of_their_own(shop):
    shop.write([("a", "1", "click", "02.11.2026 17:00")], HEAD[:4])
    shop.make(time_format="%d.%m.%Y %H:%M")
    assert json.loads((shop.out / "manifest.json").read_text())["days"] == ["2026-11-02", "2026-11-02"]
    with pytest.raises(DataError, match="time_format %I: Invalid format"):
        shop.make(time_format="%I")


@pytest.mark.parametrize(
    ("time", "form", "day"),
    [
        ("01.11.2026 23:30 +0000", "%d.%m.%Y %H:%M %z", "2026-11-02"),
        ("01.11.2026 23:30 +00:00", "%d.%m.%Y %H:%M %:z", "2026-11-02"),
        ("01.11.2026 23:30 +00", "%d.%m.%Y %H:%M %#z", "2026-11-02"),
        ("2026-11-01T23:30:00+00:00", "%+", "2026-11-02"),
        ("1793575800", "%s", "2026-11-02"),
        ("01.11.2026 23:30", "%d.%m.%Y %R", "2026-11-01"),
        ("01.11.2026 11:30:00 PM", "%d.%m.%Y %r", "2026-11-01"),
        ("01.11.2026 23:30", "%d.%m.%Y %k:%M", "2026-11-01"),
    ],
)
def test_a_zone_in_a_format_is_converted_to_the_zone_of_the_days(shop, time, form, day):
    shop.write([("a", "1", "click", time)] * 2, HEAD[:4])
    shop.make(time_format=form, time_zone="Asia/Shanghai")
    manifest = json.loads((shop.out / "manifest.json").read_text())
    assert manifest["days"] == [day, day]
    assert shop.funnel()["rows", "equal to another row"] == (1, 1)  # a time of day, not a date alone


# --- bad input ----------------------------------------------------------------------------------------------------


GOOD = [event("a", "1", "click", second=i) for i in range(3)]


@pytest.mark.parametrize(
    ("rows", "head", "knobs", "message"),
    [
        (GOOD, HEAD, {"query_column": "qeury"}, r"query_column: .* no column qeury; did you mean query\?; its columns"),
        (GOOD, ("a", *HEAD[1:]), {}, "looked for a column query, anchor.*no header row, all of them with columns$"),
        (GOOD, ("a", "a", *HEAD[2:]), {}, "column a is there more than once; .* name all columns with columns$"),
        ([r[:2] for r in GOOD], HEAD[:2], {}, "neither an event per row .* nor counts"),
        (GOOD, HEAD, {"text_template": "{titel}"}, "text_template: .* has no column titel"),
        ([("a", f"x{i}", *r[2:]) for i, r in enumerate(GOOD)], HEAD, {}, "100% .*x0, x1, x2; its ids look like 1, 2"),
        ([(*r[:2], "clik", *r[3:]) for r in GOOD], HEAD, {}, r"100% .*unknown event.*clik; did you mean click"),
        ([(*r[:3], "yesterday", *r[4:]) for r in GOOD], HEAD, {}, "3 time not read .*yesterday.*time_format"),
        ([("a", "1", "yesterday", 1, 5, 1, 0)], COUNTS, {}, "1 time not read .*yesterday"),
        ([(*r[:3], "1793575", *r[4:]) for r in GOOD], HEAD, {}, "time not read"),
        ([(*r[:3], "1026-11-01", *r[4:]) for r in GOOD], HEAD, {}, "time before 2000 or after tomorrow"),
        ([("a", "1", "2026-11-01", 1, 5, -1, 0)], COUNTS, {}, "1 negative count: clicks"),
        ([("a", "1", "2026-11-01", 1, 5, "many", 0)], COUNTS, {}, "count is not a number: clicks"),
        ([("a", "1", "2026-11-01", "top", 5, 1, 0)], COUNTS, {}, "1 position is not a whole number"),
        ([("a", "1", "2026-11-01", "1.5", 5, 1, 0)], COUNTS, {}, "1 position is not a whole number"),
        ([("a", "1", "2026-11-01", -1, 5, 1, 0)], COUNTS, {}, "1 negative position"),
        ([], HEAD, {}, "no rows"),
        ([(*r[:2], "impression", *r[3:]) for r in GOOD], HEAD, {}, "no rows are left .*; the log has none of click"),
        (GOOD, HEAD, {"holdout_days": 1}, r"holdout_days: 1 of the 1 days .* leave none to train on"),
        ([r[:3] for r in GOOD], HEAD[:3], {"holdout_days": 1}, "no column of times to split by"),
        (GOOD, HEAD, {"propensities": "estimate"}, "no impressions"),
        (GOOD, HEAD, {"min_clicks": 9}, "no training pairs are left with a click; fewer than min_clicks: 0 left$"),
        ([*GOOD, (*GOOD[0], "and", "more")], HEAD, {}, "cannot be read"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_and_loses_nothing(shop, rows, head, knobs, message):
    shop.write(GOOD)
    before = shop.make().pairs.read_bytes()
    shop.write(rows, head)
    with pytest.raises(DataError, match=message):
        shop.make(**knobs)
    assert (shop.out / "pairs.jsonl").read_bytes() == before
    assert [path.name for path in shop.folder.iterdir() if path.name.startswith(".")] == []


def test_a_few_unusable_rows_go_to_the_rejects_with_their_reason(shop, caplog):
    bad = [
        ("", "1", *GOOD[0][2:]),
        ("a", "", *GOOD[0][2:]),
        ("a", "1", "clik", *GOOD[0][3:]),
        ("a", "77", *GOOD[0][2:]),
    ]
    shop.write([*GOOD, *GOOD[:1], event("b", "2", "click"), event("b", "3", "click"), *bad])
    with caplog.at_level(logging.WARNING):
        shop.make()
    assert [row["reason"] for row in shop.rejects()] == [
        "no query",
        "no item",
        "unknown event",
        "item without text in the catalogue",
    ]
    assert shop.rejects()[0]["file"].endswith("log.csv")
    assert "clik; did you mean click?" in caplog.text
    funnel = shop.funnel()
    assert funnel["rows", "read"] == (0, 10)
    assert funnel["training pairs", "item without text in the catalogue"] == (1, 3)


def test_a_row_of_hive_text_that_does_not_fit_is_a_reject(shop):
    log = shop.folder / "000000_0"
    log.write_bytes(
        as_text(GOOD, "\x01").encode() + b"a\x011\x01click\n" + b"\xff\xfe" + as_text(GOOD[:1], "\x01").encode()
    )
    shop.make(log_path=str(log), columns=list(HEAD))
    assert sorted(row["reason"] for row in shop.rejects()) == ["not UTF-8", "wrong number of fields"]


def test_rejects_name_the_file_that_was_given_not_its_unpacked_copy(shop):
    shop.write([*GOOD, ("", *GOOD[0][1:])])
    log = shop.folder / "log.bz2"
    log.write_bytes(bz2.compress(shop.log.read_bytes()))
    shop.make(log_path=str(log))
    assert [row["file"] for row in shop.rejects()] == [str(log)]


def test_odd_logs_are_warned_of(shop, caplog):
    shop.write(
        [
            event("a", "1", "click", 1),
            (*GOOD[0][:3], "2026-11-05T10:00:00Z", 1, "s"),
            *[event("b", "1", "click", 5)] * 5,
        ]
    )
    with caplog.at_level(logging.WARNING):
        shop.make()
    assert "days without a row between 2026-11-01 and 2026-11-05: 2026-11-02, 2026-11-03, 2026-11-04" in caplog.text
    assert (
        "times are written in several ways: 6 rows have a time without a zone, 1 rows have a time with a zone"
        in caplog.text
    )
    assert "was the log exported twice?" in caplog.text


def test_a_copy_of_a_log_file_is_left_out(shop, caplog):
    shop.write([("a", "1", "click", "2026-11-01")] * 3, HEAD[:4])
    folder = shop.folder / "logs"
    folder.mkdir()
    for name in ("1.csv", "2.csv"):
        shutil.copy(shop.log, folder / name)
    assert shop.pairs(log_path=str(folder))["a", "1"]["clicks"] == 3
    assert "the same bytes as another file" in caplog.text


def test_an_empty_log_is_an_error(shop):
    shop.log.touch()
    with pytest.raises(DataError, match="is empty"):
        shop.make()


def test_most_held_out_queries_that_training_has_are_said_to_be_memory(shop):
    shop.write(held_log())
    assert "2 of 3 held-out queries are in training" in shop.make(holdout_days=3).report_html.read_text("utf-8")


def test_a_catalogue_id_with_two_texts_is_an_error(shop):
    shop.write(GOOD)
    shop.write_items([("1", "red shoe"), ("1", "blue shoe")])
    with pytest.raises(DataError, match=r"1 ids have two texts, such as 1 .*give one snapshot"):
        shop.make()


def test_missing_places_and_knobs_that_contradict(shop):
    with pytest.raises(MissingError, match="log_path"):
        shop.make()
    with pytest.raises(ConfigError) as caught:
        PairsConfig(event_weights={"impression": 1.0}, text_template="title", time_zone="Mars", delimiter="||")
    for knob in ("event_weights", "text_template", "time_zone", "delimiter"):
        assert knob in str(caught.value)
    shop.out.mkdir()
    (shop.out / "mine.txt").touch()
    shop.write(GOOD)
    with pytest.raises(ConfigError, match="holds other files"):
        shop.make()


def test_the_report_shows_everything_and_escapes_texts(shop):
    shop.write([*held_log(), event("<script>x", "1", "click"), event("<script>x", "1", "click", 9)])
    result = shop.make(holdout_days=3)
    page = result.report_html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
    for table in result.tables.values():
        assert not len(table) or table.attrs["title"] in page
    assert result.tables["funnel"].iloc[0].tolist()[:4] == ["rows", "read", 0, 9]
    assert repr(result).startswith("从日志到样本")
