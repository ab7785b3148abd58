"""The generated SQL, run by an engine, gives the stage the same pairs as the log itself."""

from __future__ import annotations

import json

import polars as pl
import pytest

from ebr_lib.pairs.run import make_training_pairs
from tests.pairs.conftest import HEAD, event

duckdb = pytest.importorskip("duckdb")


def rows():
    names = ("impression", "CLICK", "order")
    found = [
        event(
            f"Q{i % 5}" if i % 4 else f"q{i % 5}",
            str(1 + i % 4),
            names[i % 3],
            1 + i % 9,
            i % 7,
            position=1 + i % 3,
            session=f"s{i % 6}",
        )
        for i in range(400)
    ]
    bots = [event("q1", "1", "click", 3, i % 60, session="bot") for i in range(30)]
    return [*found, *bots, event("q1", "1", "share"), *[event("q2", "2", "click", session="")] * 2]


@pytest.mark.parametrize("with_session", [True, False])
def test_counts_by_sql_give_the_same_files_as_the_events(shop, tmp_path, with_session):
    head = HEAD if with_session else HEAD[:5]
    table = pl.DataFrame([row[: len(head)] for row in rows()], schema=list(head), orient="row")
    dated = pl.Series("time", [time[:10] if place % 5 else time for place, time in enumerate(table["time"])])
    table = table if with_session else table.with_columns(dated)
    table.write_csv(shop.log)
    knobs = {"holdout_days": 2, "max_session_events": 25, "event_weights": {"click": 1.0, "order": 3.0, "share": 0.0}}
    shop.make(**knobs)
    names = ("pairs.jsonl", "heldout/queries.jsonl", "heldout/qrels/test.tsv")
    expected = {name: (shop.out / name).read_text(encoding="utf-8") for name in names}
    sql = (shop.out / "aggregate.sql").read_text(encoding="utf-8")
    click_log = table.to_arrow()  # noqa: F841 - DuckDB finds it by its name
    counted = tmp_path / "counted.parquet"
    duckdb.sql(sql).write_parquet(str(counted))
    assert len(pl.read_parquet(counted)) < len(table)
    shop.make(**knobs, log_path=str(counted))
    assert {name: (shop.out / name).read_text(encoding="utf-8") for name in names} == expected


def test_sql_of_a_table_reads_nothing(tmp_path):
    knobs = {"time_column": "event_time", "session_column": "uid", "log_path": "nowhere"}
    result = make_training_pairs({"sql_table": "dw.search_log", "output_dir": str(tmp_path / "out")} | knobs)
    sql = str(result)
    assert "FROM dw.search_log" in sql
    assert "uid AS session" in sql
    assert json.dumps(sql).count("SELECT") >= 4
