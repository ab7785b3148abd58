"""A run that is killed at any moment is continued by the same call, and ends in the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ebr_lib.data.embeddings.files import read_embeddings
from ebr_lib.errors import DataError, ModelError
from ebr_lib.inference import encode, local, windows
from ebr_lib.inference import run as inference
from ebr_lib.inference.job import EncodeReport
from ebr_lib.inference.resume import refuse_other_engine
from ebr_lib.inference.store import Store
from tests.children import encode_and_be_killed, ended, started
from tests.inference.test_inference import FakeEncoder, catalogue, fake_vector, run, use

WINDOW = 6


def encode_until(knobs: dict, log: Path, at: int = -1) -> int:
    """Run the stage in a process; returns its exit status: 0, or -9 when it was killed."""
    (status,) = ended(started(encode_and_be_killed, knobs, log, at))
    return status


def some_rows() -> list[str]:
    rows = []
    for i in range(60):
        text = f"{'warm ' * (i % 6)}blanket 毯子 {i % 40}" if i % 9 else ""
        rows.append(f"{i}\x01{text}\x01label {i % 3}" if i % 11 else f"broken {i}")
    return rows


def files_of(folder: Path) -> dict[str, bytes]:
    """Output, rejects and manifest: all that a run leaves, except the config, which names the folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".yaml"}


class Case(NamedTuple):
    """A catalogue that is encoded whole, and again with runs that are killed; `first` is what an append begins with."""

    ending: str
    kills: int
    heal_rows: bool = False
    appends: bool = False
    vector_type: str = "float32"


CASES = [
    Case(".txt", 4),
    Case(".parquet", 2),
    Case(".npy", 2, vector_type="int8"),
    Case(".txt", 2, heal_rows=True),
    Case(".txt", 2, appends=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ending} {case.heal_rows:d}{case.appends:d}")
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(tmp_path: Path, tiny_bert: Path, case: Case):
    """Twelve moments in all, each before the end of its run."""
    catalogue(tmp_path, some_rows()[:35])
    knobs = {
        "model_name": str(tiny_bert),
        "data_path": str(tmp_path / "in"),
        "window_rows": WINDOW,
        "max_rejected_share": 1.0,
        "precision": "float32",
        "device": "cpu",
        "backend": "torch",
        "heal_rows": case.heal_rows,
        "append": case.appends,
        "vector_type": case.vector_type,
    }

    def at(folder: str) -> dict:
        return knobs | {"output_path": str(tmp_path / folder / f"e{case.ending}")}

    log = tmp_path / "log"
    if case.appends:
        assert encode_until(at("begun"), log) == 0
        log.unlink()
    catalogue(tmp_path, some_rows()[35:], "b.csv")

    def begun(folder: str) -> str:
        if case.appends:
            shutil.copytree(tmp_path / "begun", tmp_path / folder)
        return folder

    assert encode_until(at(begun("whole")), log) == 0
    *windows, calls = log.read_text().splitlines()
    wanted = files_of(tmp_path / "whole")
    texts = [text for window in windows for text in json.loads(window)]
    assert len(texts) == len(set(texts)) > 3 * WINDOW
    generator = random.Random(str(case))
    killed = attempt = 0
    while killed < case.kills:
        attempt += 1
        folder, log = begun(f"out{attempt}"), tmp_path / f"log{attempt}"
        moments, ended = 0, False
        while moments < min(2, case.kills - killed) and not ended:
            status = encode_until(at(folder), log, generator.randrange(1, int(calls)))
            assert status in (0, -9)
            moments += status == -9
            # without a work folder it has come to its end, and the same call is a new run
            ended = status == 0 or not (tmp_path / folder / f"e{case.ending}.work" / "state.sqlite").exists()
        assert encode_until(at(folder), log) == 0
        assert files_of(tmp_path / folder) == wanted
        encoded = [t for line in log.read_text().splitlines() if line[0] == "[" for t in json.loads(line)]
        assert ended or len(encoded) - len(texts) <= moments * WINDOW
        killed += moments


# --- what a resume refuses ----------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose run stopped after some windows."""
    encoder = use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows())
    real = encoder.encode

    def stops(prepared: list[str], on_progress):
        if len(encoder.asked) > 12:
            raise KeyboardInterrupt
        return real(prepared, on_progress)

    monkeypatch.setattr(encoder, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, window_rows=WINDOW)
    return tmp_path


@pytest.mark.parametrize(
    ("encoder", "knobs", "words"),
    [
        (FakeEncoder(sha="b" * 64), {}, "model: 'aaaa"),
        (FakeEncoder(prompt="item: "), {}, "prompt: '' then, 'item: ' now"),
        (FakeEncoder(), {"on_empty_text": "empty"}, "on_empty_text: 'skip' then, 'empty' now"),
        (FakeEncoder(), {"output_columns": ["id"]}, "output_columns"),
        (FakeEncoder(), {"normalize": False}, "normalize: True then, False now"),
    ],
)
def test_a_resume_with_other_settings_names_them(interrupted: Path, monkeypatch, encoder, knobs, words):
    use(monkeypatch, encoder)
    with pytest.raises(DataError) as error:
        run(interrupted, window_rows=WINDOW, **knobs)
    assert words in str(error.value)
    assert "restart: true" in str(error.value)
    assert run(interrupted, window_rows=WINDOW, restart=True, **knobs).counts["read"] == 60


def test_a_resume_with_other_precision_is_refused(interrupted: Path, monkeypatch):
    from dataclasses import replace

    encoder = use(monkeypatch, FakeEncoder())
    encoder.facts = replace(encoder.facts, precision="bfloat16")
    with pytest.raises(DataError, match="precision: 'float32' then, 'bfloat16' now"):
        run(interrupted)


def test_a_resume_with_other_input_is_refused_and_new_files_are_appended(interrupted: Path, monkeypatch):
    encoder = use(monkeypatch, FakeEncoder())
    new = catalogue(interrupted, ["x\x01new\x01y"], "0.csv")
    with pytest.raises(DataError, match=r"input 0\.csv: new"):
        run(interrupted, window_rows=WINDOW)
    result = run(interrupted, window_rows=WINDOW, append=True)
    assert result.output.read_bytes().splitlines()[-1].startswith(b"x\x01new")
    assert result.counts["read"] == 61
    assert len(encoder.asked) < result.counts["encoded"]  # it went on
    new.unlink()


@pytest.mark.parametrize(("ending", "append"), [(".txt", False), (".parquet", True), (".npy", True)])
def test_a_damaged_input_is_fetched_again_and_the_files_before_it_are_kept(
    tmp_path: Path, monkeypatch, ending: str, append: bool
):
    encoder = use(monkeypatch, FakeEncoder())
    knobs = {"file_patterns": ["*.gz"], "window_rows": 7, "append": append}
    ours, fresh = ({"output_path": str(tmp_path / f"{name}{ending}")} for name in ("ours", "fresh"))
    if append:
        catalogue(tmp_path, [], "0.csv.gz").write_bytes(zipped("0"))
        run(tmp_path, **knobs, **ours)
        run(tmp_path, **knobs, **fresh)
    for name in "abc":
        catalogue(tmp_path, [], f"{name}.csv.gz").write_bytes(zipped(name))
    whole = zipped("c")
    (tmp_path / "in" / "c.csv.gz").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match="damaged or cut short"):
        run(tmp_path, **knobs, **ours)
    asked = len(encoder.asked)
    # other texts than those that were kept ahead
    (tmp_path / "in" / "c.csv.gz").write_bytes(zipped("C"))
    result = run(tmp_path, **knobs, **ours)
    again = encoder.asked[asked:]
    assert sum(not text.startswith("C") for text in again) < 7
    wanted = run(tmp_path, **knobs, **fresh)
    assert result.output.read_bytes() == wanted.output.read_bytes()
    assert result.counts == wanted.counts
    assert json.loads(result.manifest.read_text())["inputs"] == json.loads(wanted.manifest.read_text())["inputs"]


def test_an_input_that_changed_before_it_was_read_costs_no_row_of_the_others(tmp_path: Path, monkeypatch):
    encoder = use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows())
    catalogue(tmp_path, ["1\x01old\x01x"], "b.csv")
    stop(tmp_path, encode.WindowWriter, "write", 5, window_rows=WINDOW)
    asked = len(encoder.asked)
    catalogue(tmp_path, ["1\x01new\x01x"], "b.csv")
    result = run(tmp_path, window_rows=WINDOW)
    assert (
        len(set(encoder.asked[:asked]) & set(encoder.asked[asked:])) <= 2 * WINDOW
    )  # the windows that were kept ahead
    fresh = run(tmp_path, output_path=str(tmp_path / "fresh.txt"))
    assert result.output.read_bytes() == fresh.output.read_bytes()
    assert result.counts == fresh.counts


def zipped(name: str) -> bytes:
    """A file of 200 rows, some texts among them equal; larger than what is read of it to tell its encoding by."""
    rows = [f"{name}{i}\x01{name} 毯子 {hashlib.sha256(str(i % 150).encode()).hexdigest() * 300}" for i in range(200)]
    return gzip.compress("\n".join(["id\x01description", *rows, ""]).encode())


def test_an_input_that_changed_when_its_rows_were_written_is_refused(tmp_path: Path, monkeypatch):
    use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows()[:8])
    catalogue(tmp_path, some_rows()[8:], "b.csv")
    stop(tmp_path, encode.WindowWriter, "write", 2, window_rows=WINDOW)
    catalogue(tmp_path, some_rows()[:7])
    with pytest.raises(DataError, match=r"input a\.csv: its contents changed"):
        run(tmp_path, window_rows=WINDOW)


def test_a_run_of_another_version_is_refused_until_it_is_dropped(interrupted: Path, monkeypatch):
    use(monkeypatch, FakeEncoder())
    with sqlite3.connect(interrupted / "out.txt.work" / "state.sqlite") as database:
        (state,) = database.execute("SELECT value FROM state").fetchone()
        database.execute("UPDATE state SET value = ?", (json.dumps({"settings": json.loads(state)["settings"]}),))
    database.close()
    with pytest.raises(DataError, match=r"another version of this program.*restart: true"):
        run(interrupted, window_rows=WINDOW)
    assert run(interrupted, window_rows=WINDOW, restart=True).counts["read"] == 60


def test_a_run_of_the_other_engine_is_refused_until_it_is_dropped(interrupted: Path, monkeypatch):
    use(monkeypatch, FakeEncoder())
    work = interrupted / "out.txt.work"
    with pytest.raises(DataError, match=r"unfinished run of engine local \(state\.sqlite\).*restart: true"):
        refuse_other_engine(work, in_parts=True)
    shutil.rmtree(work)
    (work / "part-00000.txt.work").mkdir(parents=True)
    with pytest.raises(DataError, match=r"unfinished run of engine ray \(part-00000\.txt\.work\).*restart: true"):
        run(interrupted, window_rows=WINDOW)
    assert run(interrupted, window_rows=WINDOW, restart=True).counts["read"] == 60


def test_windows_grow_with_the_rows_before_them_and_a_resume_makes_the_same(tmp_path: Path, monkeypatch):
    """Of 2, 2, 4, 8 and then 10 rows, whatever was interrupted."""
    monkeypatch.setattr(windows, "FIRST_ROWS", 2)
    catalogue(tmp_path, [f"{i}\x01text {i}\x01x" for i in range(40)])
    encoder = use(monkeypatch, FakeEncoder())
    sizes, real = [], encoder.encode

    def stops_once(prepared: list[str], on_progress):
        sizes.append(len(prepared))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return real(prepared, on_progress)

    monkeypatch.setattr(encoder, "encode", stops_once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, window_rows=10)
    run(tmp_path, window_rows=10)
    assert sizes == [2, 2, 4, 4, 8, 10, 10, 4]


def test_speed_may_change_between_the_runs(interrupted: Path, monkeypatch):
    use(monkeypatch, FakeEncoder())
    assert run(interrupted, window_rows=50, batch_tokens=64).counts["read"] == 60


# --- stopped at certain moments -----------------------------------------------------------------------------------


LAST_STEPS = {"finish_sink": encode, "_move_rejects": encode, "write_json": inference, "clean_up": local}


class Stopped(BaseException):
    """What a kill does to a run, as far as its files show."""


def stopped_at(patch: pytest.MonkeyPatch, place: object, name: str, calls: int = 0) -> None:
    """Let a function be called `calls` times; the next call ends the run."""
    real, count = getattr(place, name), iter(range(calls))

    def stops(*arguments, **named):
        if next(count, None) is None:
            raise Stopped
        return real(*arguments, **named)

    patch.setattr(place, name, stops)


def stop(folder: Path, place: object, name: str, calls: int = 0, **knobs) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stopped_at(patch, place, name, calls)
        run(folder, **knobs)


@pytest.mark.parametrize(("ending", "appends"), [(".txt", False), (".parquet", True), (".npy", True)])
@pytest.mark.parametrize("step", LAST_STEPS)
def test_stopped_at_the_end_it_takes_in_new_files(tmp_path: Path, monkeypatch, ending: str, appends: bool, step: str):
    use(monkeypatch, FakeEncoder())
    knobs = {"append": True, "output_path": str(tmp_path / f"out{ending}"), "window_rows": WINDOW}
    catalogue(tmp_path, some_rows()[:20], "b.csv")
    if appends:
        run(tmp_path, **knobs)
        catalogue(tmp_path, some_rows()[20:40], "c.csv")
    stop(tmp_path, LAST_STEPS[step], step, **knobs)
    catalogue(tmp_path, some_rows()[40:], "a.csv")
    result = run(tmp_path, **knobs)
    held = ["b.csv", "c.csv", "a.csv"] if appends else ["b.csv", "a.csv"]
    rows = some_rows() if appends else some_rows()[:20] + some_rows()[40:]
    assert [entry["path"] for entry in json.loads(result.manifest.read_text())["inputs"]] == held
    back = read_embeddings(result.output)
    assert back.columns["id"] == [
        row.split("\x01")[0] for row in rows if row.count("\x01") == 2 and "\x01\x01" not in row
    ]
    assert all(
        (vector == fake_vector(text)).all()
        for vector, text in zip(back.vectors, back.columns["description"], strict=True)
    )
    assert result.counts["read"] == len(rows)
    assert not (tmp_path / f"out{ending}.work").exists()


def test_a_conversion_to_parquet_that_was_stopped_leaves_nothing(tmp_path: Path, monkeypatch):
    import pyarrow.parquet as pq

    use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows())
    knobs = {"output_path": str(tmp_path / "out" / "e.parquet")}
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(pq.ParquetWriter, "close", lambda self: os._exit(9))
        run(tmp_path, **knobs)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e.parquet.work"]
    assert not (tmp_path / "out" / "e.parquet.work" / Store.VECTORS).exists()  # the conversion has their room
    result = run(tmp_path, **knobs)
    assert result.counts["read"] == 60
    assert not (tmp_path / "out" / "e.parquet.work").exists()


@pytest.mark.parametrize("windows", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 4, WINDOW, 50])
def test_vectors_that_were_kept_but_not_written_are_used_in_windows_of_any_size(
    tmp_path: Path, monkeypatch, windows: int, rows: int
):
    encoder = use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows())
    whole = run(tmp_path, output_path=str(tmp_path / "whole.txt"))
    encoder.asked.clear()
    stop(tmp_path, encode.WindowWriter, "write", windows, window_rows=WINDOW)
    result = run(tmp_path, window_rows=rows)
    assert result.output.read_bytes() == whole.output.read_bytes()
    assert result.counts == whole.counts
    # of the window whose vectors were being made when the one before it could not be written
    assert len(encoder.asked) - len(set(encoder.asked)) <= WINDOW


def test_new_files_may_join_a_window_whose_vectors_were_kept(tmp_path: Path, monkeypatch):
    encoder = use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows()[:8])
    stop(tmp_path, encode.WindowWriter, "write", 1, window_rows=WINDOW)
    catalogue(tmp_path, some_rows()[8:], "b.csv")
    result = run(tmp_path, window_rows=WINDOW, append=True)
    assert len(encoder.asked) == len(set(encoder.asked)) == result.counts["encoded"]
    assert result.output.read_bytes() == run(tmp_path, output_path=str(tmp_path / "whole.txt")).output.read_bytes()


def test_windows_do_not_end_among_lines_that_healing_could_not_join(tmp_path: Path, monkeypatch):
    use(monkeypatch, FakeEncoder())
    # lines 2 and 3 would fit each other, but line 1 takes line 2, and is not a row with it
    lines = ["1\x01a", "2\x01b", "3\x01c\x01d", "4\x01e\x01f\x01g", "5\x01h", "i\x01j\x01k"]
    catalogue(tmp_path, lines * 3, header="id\x01description\x01label\x01more")
    knobs = {"heal_rows": True, "window_rows": 1}
    whole = run(tmp_path, output_path=str(tmp_path / "whole.txt"), **knobs)
    assert whole.counts["healed"] == 3
    for written in range(1, 12):
        stop(tmp_path, encode.WindowWriter, "write", written, **knobs)
        result = run(tmp_path, **knobs)
        assert result.output.read_bytes() == whole.output.read_bytes()
        assert (tmp_path / "out.txt.rejects").read_bytes() == (tmp_path / "whole.txt.rejects").read_bytes()


def test_advice_to_change_a_setting_names_restart_too(tmp_path: Path, monkeypatch):
    encoder = use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, some_rows())
    with pytest.raises(DataError, match="set on_empty_text to skip or empty, and restart: true"):
        run(tmp_path, on_empty_text="error")
    run(tmp_path, restart=True)
    bad = np.full((1, 6), np.nan, np.float32)
    monkeypatch.setattr(encoder, "encode", lambda texts, on_progress: (bad.repeat(len(texts), 0), EncodeReport()))
    with pytest.raises(ModelError, match="set precision to float32 and restart: true"):
        run(tmp_path)
