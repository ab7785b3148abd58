"""The training log, and the warning when the loss goes wrong: said once, with the causes that the numbers support."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from ebr_lib.finetune.logbook import JsonLinesLog, LossWatch, causes_of_nan, draw_curve, read_log

STATE = SimpleNamespace(is_world_process_zero=True, global_step=7)
OTHER_PROCESS = SimpleNamespace(is_world_process_zero=False, global_step=7)


def watch_of(*, learning_rate=1e-4, trainable=10_000, **report) -> LossWatch:
    harmless = {"rows": 5000, "anchors": 4000, "documents": 3000, "duplicate_share": 0.0}
    return LossWatch(SimpleNamespace(**harmless | report), learning_rate, trainable)


def heard(caplog, entries, state=STATE, **facts) -> list[str]:
    watch = watch_of(**facts)
    watch.causes_of_nan = causes_of_nan(1e-4, 0.05, fp16=True)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        for entry in entries:
            watch.on_log(None, state, None, entry)
    return caplog.messages


def test_a_loss_near_0_is_logged_once(caplog):
    (said,) = heard(caplog, [{"loss": x} for x in (2.0, 9e-4, 8e-4, 7e-4)])
    assert "损失接近零" in said and "the data may be too easy" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_logged_with_its_own_causes(caplog, value):
    entries = [{"loss": x} for x in (8e-4, 7e-4, value, value)]  # after another warning too
    nothing, said = heard(caplog, entries, rows=9)
    assert "损失接近零" in nothing and "9 training rows" in nothing
    assert "损失不是有限数" in said and f"loss is {value}" in said and "rows" not in said
    assert all(cause in said for cause in ("learning_rate 0.0001", "temperature 0.05", "fp16"))


def test_half_precision_is_only_a_cause_if_it_is_on():
    assert not [cause for cause in causes_of_nan(1e-4, 0.05, fp16=False) if "fp16" in cause]


def test_l1_does_not_hide_a_loss_near_0(caplog):
    (said,) = heard(caplog, [{"loss": 1.6 + x, "contrastive": x, "l1": 1.6} for x in (2.0, 9e-4, 8e-4)])
    assert "损失接近零" in said and "0.0008" in said
    caplog.clear()
    assert heard(caplog, [{"loss": 0.9, "contrastive": 0.9}, {"loss": 9e-4 + 1, "contrastive": 1.0, "l1": 9e-4}]) == []


@pytest.mark.parametrize(("shares", "loss"), [((1.0, 1.0, 1.0), 0.0), ((0.9, 0.95, 1.0), 2e-4), ((0.1, 0.4, 0.7), 0.3)])
def test_masked_negatives_are_named_as_the_cause(caplog, shares, loss):
    """And nothing else is blamed, whatever the learning rate."""
    entries = [{"loss": loss, "masked_share": share} for share in shares]
    (said,) = heard(caplog, entries, learning_rate=1e-2, anchors=640, documents=3)
    assert "负例大多被屏蔽" in said and "negatives are masked" in said
    assert "3 different documents and 640 different anchors" in said and "learning rate" not in said


def test_a_loss_near_0_with_negatives_has_other_causes(caplog):
    (said,) = heard(caplog, [{"loss": 1e-4, "masked_share": 0.3}] * 3)
    assert "损失接近零" in said and "mask" not in said


def test_rising_held_out_loss_with_falling_training_loss_is_overfitting(caplog):
    entries = [
        e for train, held in ((1.0, 2.0), (0.8, 2.1), (0.6, 2.2)) for e in ({"loss": train}, {"eval_loss": held})
    ]
    (said,) = heard(caplog, entries)
    assert "过拟合" in said


@pytest.mark.parametrize(
    "entries",
    [
        [{"loss": 9e-4}],  # one step may be an easy batch
        [{"loss": 9e-4}, {"loss": 0.5}, {"loss": 9e-4}],
        [{"eval_loss": x} for x in (1.0, 2.0, 3.0)],  # training has not logged yet
        [e for x in (1.0, 1.1, 1.2) for e in ({"loss": x}, {"eval_loss": x})],  # both rise
        [e for x, y in ((1.0, 2.0), (0.9, 1.9), (0.8, 2.1)) for e in ({"loss": x}, {"eval_loss": y})],
    ],
)
def test_healthy_losses_are_not_logged(caplog, entries):
    assert heard(caplog, entries) == []


def test_only_the_first_process_logs(caplog):
    assert heard(caplog, [{"loss": 1e-6}] * 3, state=OTHER_PROCESS) == []


def test_the_causes_follow_from_the_numbers():
    assert watch_of().causes() == ["the data may be too easy: add hard negatives"]
    bad = watch_of(rows=99, duplicate_share=0.21, learning_rate=3.1e-4, trainable=99_001)
    few, duplicates, fast, large = bad.causes()
    assert "99 training rows" in few and "21%" in duplicates and "0.00031" in fast and "1,000 trainable" in large
    on_the_line = watch_of(rows=100, duplicate_share=0.2, learning_rate=3e-4, trainable=100_000)
    assert on_the_line.causes() == watch_of().causes()


def test_the_log_is_one_entry_a_line_without_nan(tmp_path):
    log = JsonLinesLog(tmp_path / "log" / "log.jsonl")
    log.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=0), None)
    log.on_log(None, STATE, None, {"loss": float("nan"), "grad_norm": -float("inf"), "epoch": 0.5})
    log.on_log(None, OTHER_PROCESS, None, {"loss": 1.0})
    assert log.path.read_text() == '{"step": 7, "loss": null, "grad_norm": null, "epoch": 0.5}\n'


def test_a_resumed_run_drops_the_steps_it_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "lo')
    JsonLinesLog(path).on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=4), None)
    assert [entry["step"] for entry in read_log(path)] == [2, 4]
    JsonLinesLog(path).on_train_begin(None, OTHER_PROCESS, None)
    assert len(read_log(path)) == 2  # another process leaves it alone


def test_the_curve_of_training_is_on_the_scale_of_the_held_out_loss(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    log, drawn = tmp_path / "log.jsonl", []
    log.write_text(
        '{"step": 1, "loss": 3.0, "contrastive": 2.0, "l1": 0.6, "smoothing": 0.4}\n{"step": 1, "eval_loss": 2.1}\n'
        '{"step": 2, "loss": 1.5}\n'
    )
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *style, **more: drawn.append((more["label"], list(y))))
    draw_curve(log, tmp_path / "curve.png", "loss")
    assert drawn == [("training loss", [2.0, 1.5]), ("held-out loss", [2.1])]


@pytest.mark.parametrize("metric", ["ndcg@10", "loss"])
def test_the_curve_is_a_picture_of_what_was_logged(tmp_path, metric):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "eval_loss": 1.0, "eval_ndcg@10": 0.5}\n{"step": 3, "loss": null}\n'
        '{"step": 4, "eval_loss": null, "eval_ndcg@10": null}\n'
    )
    draw_curve(log, tmp_path / "curve.png", metric, best_step=2)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
