"""Two processes on a CPU train like one on the same global batch: negatives are gathered, one process writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ebr_lib import train_sentence_transformer
from tests.children import a_free_port, ended, finetune_as_a_process, started, train_as_a_machine


@pytest.fixture
def common(settings, tiny_models) -> dict:
    """A Qwen2 has no dropout of its own: two ways to the same loss can be compared."""
    return settings | {
        "model_name": str(tiny_models("qwen2")),
        "lora_dropout": 0.0,
        "packed_rows": False,
        "lr_scheduler_type": "constant",
    }


def log_of(folder: Path, name: str) -> list[float]:
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in log if name in entry]


def test_two_processes_equal_one(common, tmp_path):
    one = Path(train_sentence_transformer(common | {"train_batch_size": 8}).model_path)
    flags = [f"--{name}={value}" for name, value in common.items()]
    words = [*flags, "--train_batch_size=4", f"--output_dir={tmp_path / 'two'}"]
    port, said = a_free_port(), [tmp_path / f"said{rank}" for rank in (0, 1)]
    children = [started(finetune_as_a_process, rank, port, words, said[rank]) for rank in (0, 1)]
    assert ended(*children) == [0, 0]
    two = tmp_path / "two" / one.name
    # the last batch, which one process leaves short, is filled up by two: the steps before it are the same
    together, apart = log_of(one, "loss"), log_of(two, "loss")
    assert len(apart) == len(together) == 5
    torch.testing.assert_close(torch.tensor(apart[:4]), torch.tensor(together[:4]), atol=1e-4, rtol=1e-4)
    assert load_file(two / "adapter_model.safetensors").keys()
    assert [path.name for path in (tmp_path / "two").iterdir()] == [two.name]
    assert [file.read_text(encoding="utf-8").count("训练集大小") for file in said] == [1, 0]  # one process logs


@pytest.fixture
def repeating(tmp_path) -> Path:
    """30 rows of 15 anchors and 10 documents: whatever the batch, known positives are among its negatives."""
    path = tmp_path / "repeating.jsonl"
    rows = [
        {"anchor": f"warm {i % 15}", "positive": f"pan {i % 5} of shop {i // 15}", "weight": 1 + i % 4}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_machines_that_share_no_folder_mask_what_the_other_holds_and_use_every_row(common, repeating, tmp_path):
    knobs = {
        "data_path": str(repeating),
        "balanced_batches": False,
        "eval_ratio": 0.2,
        "num_epochs": 2,
        "mine_hard_negatives": 1,
        "mining_margin": None,
        "logq_correction": True,
        "bidirectional_loss": True,
        "false_negative_margin": 0.3,
        "drift_weight": 0.5,
    }
    one = Path(train_sentence_transformer(common | knobs | {"train_batch_size": 8}).model_path)
    unmasked = train_sentence_transformer(
        common | knobs | {"train_batch_size": 8, "mask_known_positives": False, "output_dir": str(tmp_path / "plain")}
    )
    config = common | knobs | {"train_batch_size": 4, "output_dir": str(tmp_path)}
    port = a_free_port()
    assert ended(*(started(train_as_a_machine, rank, port, config) for rank in (0, 1))) == [0, 0]
    two = tmp_path / "0" / one.name
    seen = [torch.load(tmp_path / f"seen{rank}") for rank in (0, 1)]

    rows, steps = 24, 3
    together, apart = log_of(one, "loss"), log_of(two, "loss")
    torch.testing.assert_close(torch.tensor(apart), torch.tensor(together), atol=1e-4, rtol=1e-4)
    assert log_of(two, "masked_share") == pytest.approx(log_of(one, "masked_share")) and apart[0] > 0
    assert (torch.tensor(apart) - torch.tensor(log_of(Path(unmasked.model_path), "loss"))).abs().max() > 1e-2

    epochs = [[row for each in seen for batch in each["labels"][at : at + steps] for row in batch] for at in (0, steps)]
    assert [sorted(set(epoch)) for epoch in epochs] == [list(range(rows))] * 2
    assert epochs[0] != epochs[1]
    assert all(torch.equal(weight, seen[1]["weights"][name]) for name, weight in seen[0]["weights"].items())
    assert not list((tmp_path / "1").glob("*-peft-lora"))
