"""One LoRA training step, packed rows beside the library's two padded forwards; prints a Markdown table.

    python benchmarks/training_step.py --data DIR [--quick] [--threads N] [--cpu-time]

DIR holds banking77/: two texts of one intent make a pair. Packaged MiniLM, adapters of rank 16 on all linear layers,
32 pairs a step, in-batch negatives, AdamW. Contenders take turns within a round. `--cpu-time` counts processor seconds
instead of the clock's; with one thread that is fair on a busy machine.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Columns = list[dict[str, Any]]
Embed = Callable[[Columns], list["Tensor"]]
Contender = tuple[Embed, Callable[[], AbstractContextManager[None]]]

PAIRS = 32
BASE = "library: two padded forwards"


def pairs_of(data: Path, count: int) -> list[tuple[str, str]]:
    """Pairs of texts of one intent, shuffled."""
    by_intent: dict[str, list[str]] = {}
    with open(data / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_intent.setdefault(row["category"], []).append(row["text"])
    pairs = [pair for texts in by_intent.values() for pair in zip(texts[::2], texts[1::2], strict=False)]
    random.Random(0).shuffle(pairs)
    return pairs[:count]


def adapted_model(dropout: bool) -> SentenceTransformer:
    """MiniLM with an adapter; with `dropout`, the model's own rates and 0.1 in the adapter."""
    import torch

    from ebr_lib.model.adapters import add_lora
    from ebr_lib.model.loading import load_model

    torch.manual_seed(0)
    model = load_model("all-MiniLM-L6-v2")
    add_lora(model, r=16, alpha=32, dropout=0.1 if dropout else 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    return model.train()


def contenders_of(model: SentenceTransformer) -> dict[str, Contender]:
    from ebr_lib.model.cpu_speed import fast_training
    from ebr_lib.model.packing import packed_forward

    def padded(columns: Columns) -> list[Tensor]:
        return [model(dict(column))["sentence_embedding"] for column in columns]

    packed = packed_forward(model)
    assert packed is not None
    return {
        BASE: (padded, nullcontext),
        "padded, fast_training": (padded, lambda: fast_training(model)),
        "packed": (packed, nullcontext),
        "packed, fast_training": (packed, lambda: fast_training(model)),
    }


def step(embed: Embed, columns: Columns, optimizer: Any) -> float:
    """One step; returns its loss."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    anchors, positives = (normalize(vectors, dim=1) for vectors in embed(columns))
    optimizer.zero_grad()
    loss = cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors), device=anchors.device))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def measure(dropout: bool, pairs: Sequence[tuple[str, str]], rounds: int, clock: Callable[[], float]) -> str:
    import torch

    model = adapted_model(dropout)
    contenders = contenders_of(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # all contenders see the same weights
    chunks = [pairs[i : i + PAIRS] for i in range(0, len(pairs), PAIRS)]
    batches = [[model.preprocess([pair[side] for pair in chunk]) for side in (0, 1)] for chunk in chunks]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for columns in batches[:1] if turn == 0 else batches:  # the first turn warms up
            for name, (embed, speed) in contenders.items():
                with speed():
                    start = clock()
                    loss = step(embed, columns, optimizer)
                    elapsed = clock() - start
                if turn:
                    seconds[name].append(elapsed)
                    losses[name].append(loss)
    return markdown(dropout, seconds, losses)


def markdown(dropout: bool, seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> str:
    steps = len(seconds[BASE])
    lines = [
        f"\ndropout {'0.1' if dropout else 'off'}, {steps} steps each\n",
        "| contender | pairs/s (median) | × library | mean loss |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, taken in seconds.items():
        ratio = median(b / s for b, s in zip(seconds[BASE], taken, strict=True))
        lines.append(f"| {name} | {PAIRS / median(taken):.1f} | {ratio:.2f} | {mean(losses[name]):.5f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one round of one batch: only to see that it runs")
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    rounds, batches = (1, 1) if args.quick else (args.rounds, args.batches)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for dropout in (False, True):
        print(measure(dropout, pairs_of(args.data, batches * PAIRS), rounds, clock), flush=True)


if __name__ == "__main__":
    main()
