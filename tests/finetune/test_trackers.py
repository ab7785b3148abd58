"""Trackers: what TensorBoard gets is the training log; a missing tracker is refused before the work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ebr_lib import extras
from ebr_lib.errors import ConfigError, NotInstalledError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.trackers import name_of_run, need_trackers
from tests.finetune.conftest import adapter, log_of, same, train


def test_tensorboard_shows_the_training_log_and_changes_no_weight(settings, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(settings, report_to=["tensorboard"], run_name="monday")
    folder = Path(settings["output_dir"]) / "tensorboard/monday"
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name, tag in (("loss", "train/loss"), ("eval_ndcg@10", "eval/ndcg@10")):
        logged = [(entry["step"], entry[name]) for entry in log_of(run) if name in entry]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged and shown == [(step, pytest.approx(value)) for step, value in logged]
    assert same(adapter(run), adapter(train(settings, output_dir=str(tmp_path / "quiet"))))
    assert not (tmp_path / "quiet/tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match="not installed: swanlab; run: pip install swanlab"):
        need_trackers(["swanlab"])
    extras.require.cache_clear()
    with pytest.raises(NotInstalledError, match=r"run: pip install 'ebr-workflow\[tensorboard\]'"):
        need_trackers(["tensorboard"])
    need_trackers([])


def test_names_of_trackers_are_those_of_the_library():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    with pytest.raises(ConfigError, match="report_to"):
        FinetuneConfig(report_to=("tensorbord",))
    for name in ("tensorboard", "wandb", "mlflow", "swanlab", "trackio"):
        assert FinetuneConfig(report_to=(name,)).report_to == (name,)
        assert name in INTEGRATION_TO_CALLBACK
    assert importlib.util.find_spec("transformers.integrations")
    assert name_of_run("monday", "bert") == "monday"
    assert name_of_run(None, "bert").startswith("bert-20")
