"""Replay: which rows, how much they weigh, and a training whose every batch holds some of them."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from ebr_lib import train_sentence_transformer
from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.replay import read_replay, without_asked
from ebr_lib.finetune.trainer import EbrTrainer
from tests.finetune.conftest import make_trainer, same, step, train, write_rows

PRESET = Path(__file__).parents[2] / "configs/finetune/daily.yaml"


@pytest.fixture
def earlier(tmp_path) -> str:
    """Ten pairs of another kind; the document of the first is one of `pairs` too."""
    rows = [{"anchor": f"who sang song {i}", "positive": f"song {i} was sung by singer {i}"} for i in range(1, 10)]
    first = {"anchor": "what is pan 1", "positive": "this pan is what shops sell as pan number 1"}
    return write_rows(tmp_path / "earlier.jsonl", [first, *rows])


def test_weights_of_two_sources_are_on_one_scale(tmp_path):
    path = write_rows(
        tmp_path / "r.jsonl", [{"anchor": a, "positive": "p", "weight": w} for a, w in (("a", 1), ("b", 3))]
    )
    train_rows = [TrainingRow("x", "y", weight=weight) for weight in (2.0, 6.0)]
    assert [row.weight for row in read_replay(path, train_rows)] == [2.0, 6.0]  # the means are 2 and 4
    assert [row.weight for row in read_replay(path, [TrainingRow("x", "y", weight=2.0)])] == [1, 3]
    path = write_rows(tmp_path / "none.jsonl", [{"anchor": "a", "positive": "p", "weight": 0}])
    with pytest.raises(DataError, match=r"replay_data_path .*none\.jsonl: every row has the weight 0"):
        read_replay(path, train_rows)


def test_rows_that_ask_what_is_measured_are_left_out(caplog):
    rows = [TrainingRow("a", "p"), TrainingRow("b", "A "), TrainingRow("c", "q")]
    with caplog.at_level(logging.INFO, "ebr_lib"):
        assert without_asked(rows, {" a", "p2"}, "held out") == rows[2:]
    assert "what is measured (held out): 2" in caplog.text
    with pytest.raises(DataError, match=r"all 1 rows ask what is measured \(guard\)"):
        without_asked(rows[2:], {"C"}, "guard")


def test_training_replays_in_every_batch_and_masks_known_answers(plain, earlier):
    """48 rows, six of eight in each batch: eight steps. The replayed answer is masked for other queries."""
    off = step(plain)
    assert same(step(plain, replay_share=0.5).adapter, off.adapter)
    seen = step(plain, replay_data_path=earlier, replay_share=0.25)
    assert seen.steps == len(seen.labels) == 8 and off.steps == 6
    assert all(sum(label >= 48 for label in batch) == 2 for batch in seen.labels)
    assert sorted(label for batch in seen.labels for label in batch if label < 48) == list(range(48))
    assert not same(seen.adapter, off.adapter) and len(seen.rows.train) == 48
    pan = next(number for number, row in enumerate(seen.rows.train) if "this pan" in row.positive)
    mask = seen.trainer.loss.known_positives(torch.tensor([pan, 48, 49]))
    assert mask.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_held_out_queries_are_not_replayed_and_know_what_is_seen(settings, tmp_path):
    held_out = {"anchor": "a query of its own", "positive": "an answer of its own"}
    rows = [held_out, {"anchor": "another query", "positive": held_out["positive"]}, {"anchor": "x", "positive": "y"}]
    knobs = settings | {"eval_data_path": write_rows(tmp_path / "held.jsonl", [held_out])}
    replay = write_rows(tmp_path / "replay.jsonl", rows)
    seen = make_trainer(knobs, replay_data_path=replay)
    assert [row.anchor for row in seen.rows.replay] == ["another query", "x"]
    assert seen.rows.task.seen == (True,) and make_trainer(knobs).rows.task.seen == (False,)
    shas = {seen.rows.sha256, make_trainer(knobs).rows.sha256, seen.rows.without_guarded({"x"}).sha256}
    assert len(shas) == 3  # a resumed run notices other rows


def test_logq_and_shares_work_beside_it(plain, earlier):
    with_logq = step(plain, replay_data_path=earlier, logq_correction=True)
    assert not same(with_logq.adapter, step(plain, replay_data_path=earlier).adapter)
    counts = with_logq.trainer.loss.document_counts.log_counts.exp().flatten()
    assert counts[:48].max().item() == pytest.approx(3 * 6 / 48 + 2 / 10)  # three rows of the pan, and the first here
    shared = step(plain, replay_data_path=earlier, shares={"pairs.jsonl": 1.0}, one_file_batches=True)
    assert shared.steps == 8


def test_a_resumed_run_replays_the_same_rows_and_drifts_from_the_same_start(settings, earlier, monkeypatch, tmp_path):
    knobs = {"num_epochs": 2, "replay_data_path": earlier, "eval_ratio": 0.0, "drift_weight": 1.0}
    whole = step(settings, **knobs, save=True, output_dir=str(tmp_path / "whole"))
    make = EbrTrainer.training_step

    def signalled(self, model, inputs, num=None):
        if self.state.global_step == 10:  # within the second epoch of eight steps
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, model, inputs, num)

    with monkeypatch.context() as patch:
        patch.setattr(EbrTrainer, "training_step", signalled)
        step(settings, **knobs, save=True)
    resumed = step(settings, checkpoint=True, **knobs)
    assert resumed.labels == whole.labels[11:] and same(resumed.adapter, whole.adapter)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"balanced_batches": False}, "shares, one_file_batches and replay_data_path need balanced_batches"),
        ({"train_batch_size": 1}, "replay_data_path needs batches of at least 2 pairs"),
        ({"replay_share": 1.0}, "replay_share"),
        ({"replay_share": 0}, "replay_share"),
    ],
)
def test_knobs_that_leave_no_room_are_refused(knobs, said):
    with pytest.raises(ConfigError, match=said):
        FinetuneConfig(**{"replay_data_path": "earlier.jsonl", **knobs})


def test_a_guard_that_is_replayed_is_refused_before_training(settings, earlier):
    with pytest.raises(DataError, match=r"all 10 rows ask what is measured \(guard\)"):
        train(settings, replay_data_path=earlier, guard_data_path=earlier)
    with pytest.raises(MissingError, match="nowhere"):
        train(settings, replay_data_path="nowhere.jsonl")


def test_the_daily_preset_starts_from_yesterday_and_replays(settings, trained, earlier, tmp_path, caplog):
    preset = FinetuneConfig.resolve({}, [PRESET])
    assert (preset.data_path, preset.replay_data_path, preset.adapter_strength) == ("./today", "./earlier", "auto")
    rows = [{"anchor": row.anchor, "positive": row.positive} for row in expand(read_pairs(earlier))]
    guard = write_rows(tmp_path / "guard.jsonl", rows[:5])
    places = {"replay_data_path": earlier, "guard_data_path": guard}
    own = {name: settings[name] for name in ("data_path", "output_dir", "backend", "max_seq_length", "bf16")}
    with caplog.at_level(logging.INFO, "ebr_lib"):
        found = train_sentence_transformer(
            FinetuneConfig.resolve(own | places | {"model_name": trained.model_path}, [PRESET])
        )
    assert "what is measured (guard): 5" in caplog.text
    assert "replayed rows per batch: 6 of 32, from 5 rows" in caplog.text
    assert earlier in (Path(found.model_path) / "README.md").read_text(encoding="utf-8")
    assert "guard" in found.before and found.adapter_strength in (0.0, 1.0) and found.train_rows < 48
