"""Two processes on a CPU train like one on the same global batch: negatives are gathered, one process writes."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.test_finetune import pairs, settings  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent


def test_two_processes_equal_one(settings, tiny_models, tmp_path):  # noqa: F811
    from ebr_lib import train_sentence_transformer

    # a Qwen2 has no dropout of its own: two ways to the same loss can be compared
    common = settings | {
        "model_name": str(tiny_models("qwen2")),
        "lora_dropout": 0.0,
        "packed_rows": False,
        "lr_scheduler_type": "constant",
    }
    one = train_sentence_transformer(common | {"train_batch_size": 8})
    flags = [f"--{name}={value}" for name, value in common.items()]
    flags += ["--train_batch_size=4", f"--output_dir={tmp_path / 'two'}"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
    ]
    run = subprocess.run(
        [*command, "ebr_finetune.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    folder = tmp_path / "two" / Path(one.model_path).name

    def losses(path: Path) -> list[float]:
        log = [json.loads(line) for line in (path / "training_log.jsonl").read_text().splitlines()]
        return [entry["loss"] for entry in log if "loss" in entry]

    # a last batch that is too small to share out is left out by two processes, so the first steps are compared
    together, apart = losses(Path(one.model_path)), losses(folder)
    assert len(apart) >= 4
    torch.testing.assert_close(torch.tensor(apart[:4]), torch.tensor(together[:4]), atol=1e-4, rtol=1e-4)
    assert load_file(folder / "adapter_model.safetensors").keys()
    assert [path.name for path in (tmp_path / "two").iterdir()] == [folder.name]
