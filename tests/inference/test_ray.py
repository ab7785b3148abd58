"""The Ray engine on a local two-CPU cluster: the rows and vectors of the local engine, also when a worker is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.embeddings.files import read_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.inference.job import EncodeReport
from ebr_lib.inference.local import EncoderFacts
from tests.inference.test_inference import catalogue, rejects_of, run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        # Ray gives its workers niceness 15, with which they hardly ever run beside anything else
        patch.setenv("RAY_worker_niceness", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def light_workers(monkeypatch):
    """Workers without a model, which are there in a third of the time; a vector is the length of its text."""
    from ebr_lib.inference import ray_cluster

    class Lengths:
        facts, dim = EncoderFacts(1, "float32", "", "", 128), 1

        def prepare(self, texts):
            return texts

        def encode(self, prepared, on_progress):
            return np.array([[len(text)] for text in prepared], dtype=np.float32), EncodeReport()

    class LightWorker(ray_cluster.ShardWorker):
        def _encoder(self):
            return Lengths()

    monkeypatch.setattr(ray_cluster, "ShardWorker", LightWorker)


def kill_worker_once_it_has_begun(work: Path, engine_run):
    """Wrap the engine's run: a thread waits for a shard's first state, then kills the process that holds it."""

    def wrapped(self, job, progress, check=None):
        stop = threading.Event()

        def kill() -> None:
            pid = ray.get(self.actors[0].__ray_call__.remote(lambda worker: os.getpid()))
            while not stop.wait(0.01):
                if any(work.glob("part-*.work/vectors.f32")):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return

        killed: list[int] = []
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            return engine_run(self, job, progress, check)
        finally:
            stop.set()
            killer.join()
            assert killed

    return wrapped


def test_a_lost_worker_loses_and_doubles_no_row(tmp_path: Path, tiny_bert: Path, cluster, monkeypatch):
    from ebr_lib.inference.ray_cluster import RayEngine

    for number in range(3):
        rows = [f"{number}-{i}\x01{'warm ' * (i % 5)}blanket 毯子 {i}\x01x" for i in range(60)]
        catalogue(tmp_path, [*rows, f"broken {number}"], f"{number}.csv")
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "backend": "torch", "window_rows": 4}
    local = run(tmp_path, **knobs)
    out = tmp_path / "parts.txt"
    wrapped = kill_worker_once_it_has_begun(tmp_path / "parts.txt.work", RayEngine.run)
    monkeypatch.setattr(RayEngine, "run", wrapped)
    result = run(tmp_path, **knobs, engine="ray", num_actors=1, output_path=str(out))
    assert sorted(path.name for path in out.iterdir()) == [f"part-0000{i}.txt" for i in range(3)]
    one, many = read_embeddings(local.output), read_embeddings(out)
    assert one.columns == many.columns
    assert np.abs(one.vectors - many.vectors).max() < 1e-6
    assert [row[4] for row in rejects_of(result.rejects)] == [b"broken 0", b"broken 1", b"broken 2"]
    assert result.counts["read"] == local.counts["read"] == 183
    assert result.counts["written"] == 180
    assert not (tmp_path / "parts.txt.work").exists()


@pytest.mark.usefixtures("cluster", "light_workers")
def test_as_many_workers_as_there_is_room_for_share_the_files(tmp_path: Path, tiny_bert: Path, monkeypatch, caplog):
    from ebr_lib.inference import ray_cluster

    for number in range(4):
        catalogue(tmp_path, [f"{number}-{i}\x01blanket 毯子 {i}\x01x" for i in range(20)], f"{number}.csv")

    @ray.remote(num_cpus=0)
    class Place:
        """Where workers wait until there are two."""

        def __init__(self):
            self.came, self.both = set(), asyncio.Event()

        async def meet(self, worker: int) -> int:
            self.came.add(worker)
            if len(self.came) == 2:
                self.both.set()
            await self.both.wait()
            return len(self.came)

    place = Place.remote()

    class Meeting(ray_cluster.ShardWorker):
        """Begins its first shard when another worker has begun one too."""

        def run(self, shard):
            ray.get(place.meet.remote(os.getpid()), timeout=120)
            return super().run(shard)

    monkeypatch.setattr(ray_cluster, "ShardWorker", Meeting)
    knobs = {"model_name": str(tiny_bert), "engine": "ray", "output_path": str(tmp_path / "p.PARQUET")}
    result = run(tmp_path, **knobs, num_actors=5)
    assert "num_actors 5: the cluster has 2 CPUs; 2 actors run" in caplog.text
    assert sorted(path.name for path in result.output.iterdir()) == [f"part-0000{i}.parquet" for i in range(4)]
    found = read_embeddings(result.output)
    assert found.columns["id"] == [f"{number}-{i}" for number in range(4) for i in range(20)]
    assert found.vectors[:, 0].tolist() == [len(f"blanket 毯子 {i}") for i in range(20)] * 4
    assert result.counts["written"] == 80
    assert ray.get(place.meet.remote(0)) == 3


def test_a_users_mistake_on_a_worker_is_raised_here(tmp_path: Path, tiny_bert: Path, cluster):
    catalogue(tmp_path, ["1\x01\x01x"])
    knobs = {"model_name": str(tiny_bert), "engine": "ray", "output_path": str(tmp_path / "parts.txt")}
    with pytest.raises(DataError, match=r"line 2: empty text"):
        run(tmp_path, **knobs, on_empty_text="error")
    with pytest.raises(MissingError, match="no-such-model"):
        run(tmp_path, **knobs | {"model_name": str(tmp_path / "no-such-model")})
    (tmp_path / "parts.txt").write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path, **knobs)


def test_stopped_at_its_end_it_has_lost_nothing(tmp_path: Path, cluster, light_workers, tiny_bert, monkeypatch):
    """Whichever step of the end is the last: the parts are in their place, or the same call encodes nothing again."""
    from ebr_lib.inference import ray_cluster

    for number in range(2):
        catalogue(tmp_path, [f"{number}-{i}\x01blanket {i}\x01x" for i in range(9)] + ["lost"], f"{number}.csv")
    knobs = {"model_name": str(tiny_bert), "engine": "ray", "output_path": str(tmp_path / "parts.txt")}
    work = tmp_path / "parts.txt.work"

    def stopped_at(place, step: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, step, lambda *ignored: (_ for _ in ()).throw(KeyboardInterrupt))
            run(tmp_path, **knobs)

    stopped_at(ray_cluster, "_collect_rejects")
    states = sorted(work.glob("part-*.work/state.sqlite"))
    written = [part.stat().st_mtime_ns for part in sorted(work.glob("part-*.txt"))]
    assert len(states) == len(written) == 2
    stopped_at(ray_cluster, "replace_folder")
    assert sorted(work.glob("part-*.work/state.sqlite")) == states
    assert [part.stat().st_mtime_ns for part in sorted(work.glob("part-*.txt"))] == written
    assert len(rejects_of(tmp_path / "parts.txt.rejects")) == 2
    stopped_at(ray_cluster.shutil, "rmtree")
    assert read_embeddings(tmp_path / "parts.txt").total == 18
    result = run(tmp_path, **knobs)
    assert read_embeddings(result.output).total == 18
    assert len(rejects_of(result.rejects)) == 2
    assert sorted(path.name for path in result.output.iterdir()) == ["part-00000.txt", "part-00001.txt"]


def test_a_resume_with_other_files_is_refused(tmp_path: Path, cluster, light_workers, tiny_bert, monkeypatch):
    from ebr_lib.inference import ray_cluster

    for name in "bc":
        catalogue(tmp_path, [f"{name}\x01blanket\x01x"], f"{name}.csv")
    knobs = {"model_name": str(tiny_bert), "engine": "ray", "output_path": str(tmp_path / "parts")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ray_cluster, "_collect_rejects", lambda *ignored: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, **knobs)
    (tmp_path / "in" / "c.csv").rename(tmp_path / "c.csv")
    catalogue(tmp_path, ["a\x01kettle\x01x"], "a.csv")
    with pytest.raises(DataError, match=r"input c\.csv: no longer there\n  - input a\.csv: new\n"):
        run(tmp_path, **knobs)
    (tmp_path / "in" / "a.csv").unlink()
    (tmp_path / "c.csv").rename(tmp_path / "in" / "c.csv")
    result = run(tmp_path, **knobs)
    assert sorted(path.name for path in result.output.iterdir()) == ["part-00000.txt", "part-00001.txt"]
    assert read_embeddings(result.output).columns["id"] == ["b", "c"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path, cluster):
    catalogue(tmp_path, ["1\x01a\x01x"])
    with pytest.raises(ConfigError, match=r"replaced as a whole and holds other files \(a\.csv\)"):
        run(tmp_path, engine="ray", output_path=str(tmp_path / "in"), data_path=str(tmp_path / "in" / "a.csv"))


def test_losses_count_over_all_files_and_folders_give_columns(tmp_path: Path, cluster, light_workers, tiny_bert):
    for day, rows in (("01", ["lost"]), ("02", [f"{i}\x01text {i}\x01x" for i in range(19)])):
        catalogue(tmp_path, rows, f"dt=2026-11-{day}/a.csv")
    knobs = {"model_name": str(tiny_bert), "engine": "ray", "output_path": str(tmp_path / "parts.txt")}
    with pytest.raises(DataError, match=r"1 of 20 rows .*1 × 1 fields, wanted 3"):
        run(tmp_path, **knobs, max_rejected_share=0.04)
    assert not (tmp_path / "parts.txt").exists()
    result = run(tmp_path, **knobs, max_rejected_share=0.05, output_columns=["dt", "id"])  # another job: begins again
    found = read_embeddings(result.output).columns
    assert (set(found["dt"]), len(found["id"]), result.counts["rejected"]) == ({"2026-11-02"}, 19, 1)
