"""Resuming: the right checkpoint of the same run, and a training that goes on as if it had not been interrupted."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest

from ebr_lib.errors import ConfigError
from ebr_lib.finetune.checkpoints import RUN_FILE, find_checkpoint
from ebr_lib.finetune.trainer import EbrTrainer
from tests.finetune.conftest import Stepped, same, step

RUN = {"learning_rate": 1e-3, "data_sha256": "1"}


@pytest.fixture
def interrupted(tmp_path):
    """A function: a run that wrote checkpoints at these steps and was then killed."""

    def make(*steps: int, name: str = "bert-checkpoints", run: dict = RUN):
        folder = tmp_path / name
        for number in steps:
            (folder / f"checkpoint-{number}").mkdir(parents=True)
            (folder / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
        folder.mkdir(exist_ok=True)
        (folder / RUN_FILE).write_text(json.dumps(run))
        return folder

    return make


def test_the_newest_checkpoint_is_resumed(interrupted):
    folder = interrupted(2, 10, 8)
    assert find_checkpoint(folder, RUN, resume=True) == str(folder / "checkpoint-10")


@pytest.mark.parametrize("cut", ["no state", "half a state"])
def test_an_incomplete_checkpoint_is_removed(interrupted, caplog, cut):
    folder = interrupted(6, 8)
    state = folder / "checkpoint-8" / "trainer_state.json"
    state.write_text('{"epoch') if cut == "half a state" else state.unlink()
    with caplog.at_level(logging.INFO, "ebr_lib"):
        assert find_checkpoint(folder, RUN, resume=True) == str(folder / "checkpoint-6")
    assert "removed an incomplete checkpoint" in caplog.text and not state.parent.exists()


def test_another_run_is_not_resumed(interrupted):
    folder = interrupted(2)
    with pytest.raises(ConfigError, match=r"learning_rate: was 0.001, is 0.002\. .*resume_from_checkpoint: no"):
        find_checkpoint(folder, RUN | {"learning_rate": 2e-3}, resume=True)


def test_checkpoints_are_moved_aside_and_never_lost(interrupted, tmp_path):
    for steps in ((2,), (), (2,), (2, 4)):
        folder = interrupted(*steps)
        assert find_checkpoint(folder, RUN, resume=False) is None
        assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/checkpoint-*"))
    names = [f"bert-checkpoints.previous{end}/checkpoint-{n}" for end, n in (("", 2), ("-2", 2), ("-3", 2), ("-3", 4))]
    assert found == sorted(names)


def test_checkpoints_of_a_renamed_model_are_found(interrupted, tmp_path):
    interrupted(2, name="other-checkpoints", run=RUN | {"data_sha256": "2"})
    interrupted(2, name="a-checkpoints")
    folder = tmp_path / "b-checkpoints"
    assert find_checkpoint(folder, RUN, resume=True) == str(folder / "checkpoint-2")
    assert not (tmp_path / "a-checkpoints").exists() and (tmp_path / "other-checkpoints").exists()


def test_with_nothing_to_resume_it_starts_at_the_beginning(tmp_path, caplog):
    with caplog.at_level("INFO", "ebr_lib"):
        assert find_checkpoint(tmp_path / "x-checkpoints", RUN, resume=True) is None
    assert "no checkpoint to go on from" in caplog.text
    assert json.loads((tmp_path / "x-checkpoints" / RUN_FILE).read_text()) == RUN


# --- the training that goes on ------------------------------------------------------------------------------------


def evaluations(seen: Stepped) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in seen.log if "eval_loss" in entry]


def assert_resumed_as_if_uninterrupted(settings, whole: Stepped, knobs: dict) -> None:
    resumed = step(settings, checkpoint=True, **knobs)
    assert resumed.steps == whole.steps
    assert same(resumed.adapter, whole.adapter)
    assert evaluations(resumed) == evaluations(whole)
    for seen in (whole, resumed):
        seen.trainer.restore_best()
    assert same(resumed.adapter, whole.adapter)


@pytest.mark.parametrize(
    ("number", "knobs"),
    [
        (5, {"save_steps": 100}),  # at the end of an epoch of five steps
        (3, {"eval_steps": 2}),  # within it
        (3, {"lr_scheduler_type": "reduce_lr_on_plateau", "early_stopping_patience": 1}),
        (8, {"num_epochs": 1.6, "lr_scheduler_type": "constant"}),  # at the end of the run, within an epoch
    ],
)
def test_after_a_signal(settings, monkeypatch, tmp_path, number, knobs):
    knobs = {"num_epochs": 2, "lora_dropout": 0.3, **knobs}
    whole = step(settings, **knobs, save=True, output_dir=str(tmp_path / "whole"))
    make = EbrTrainer.training_step

    def signalled(self, model, inputs, num=None):
        if self.state.global_step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, model, inputs, num)

    with monkeypatch.context() as patch:
        patch.setattr(EbrTrainer, "training_step", signalled)
        stopped = step(settings, **knobs, save=True)
    assert (stopped.trainer.stop.received, stopped.steps) == (signal.SIGTERM, number)
    assert_resumed_as_if_uninterrupted(settings, whole, knobs)


@pytest.mark.parametrize("knobs", [{"save_steps": 5}, {"save_steps": 5, "num_epochs": 1.6}])
def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(settings, monkeypatch, tmp_path, knobs):
    """Five steps per epoch, and the run dies in the next one."""
    knobs = {"num_epochs": 2, "lora_dropout": 0.3, **knobs}
    whole = step(settings, **knobs, save=True, output_dir=str(tmp_path / "whole"))
    make = EbrTrainer.training_step

    def dies(self, *given):
        if self.state.global_step == 6:
            raise RuntimeError("injected")
        return make(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
        patch.setattr(EbrTrainer, "training_step", dies)
        step(settings, **knobs, save=True)
    assert_resumed_as_if_uninterrupted(settings, whole, knobs)


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        # the first evaluation is the best, for no other is better by so much; the second ends the run
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0}, 10),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "eval_steps": 2}, 4),
        ({"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "eval_steps": 2, "save_steps": 3}, 4),
        ({"num_epochs": 1.6, "lr_scheduler_type": "constant", "best_metric": "loss"}, 8),
    ],
)
def test_a_finished_training_whose_saving_failed_makes_no_more_steps(settings, knobs, steps):
    knobs = {"num_epochs": 4, **knobs}
    whole = step(settings, **knobs, save=True)
    assert whole.steps == steps
    assert_resumed_as_if_uninterrupted(settings, whole, knobs)
