"""How fast texts become vectors, beside SentenceTransformer.encode; prints a Markdown table.

    python benchmarks/inference.py --data DIR                          # short and long English texts, packaged MiniLM
    python benchmarks/inference.py --data DIR --sets chinese --model M # Chinese texts, a multilingual model
    python benchmarks/inference.py --data DIR --quick                  # few texts: to see that it runs
    python benchmarks/inference.py --data DIR --threads 1 --cpu-time   # processor seconds: fair on a busy machine

DIR holds banking77/, cranfield/ and online_shopping/. Every contender lives in a process of its own; they take turns
within a round, so that what disturbs the machine disturbs all of them. A rate is the median over the rounds, a ratio
the median of the rounds' ratios. "Files" reads a file and writes an embedding file; everything but loading the model
counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

Vectors = NDArray[np.float32]

BASE = "SentenceTransformer.encode, float32, batch 32"
BASE_BF16 = "SentenceTransformer.encode, bfloat16, batch 32"
# texts a set: (full run, quick run); one contender takes 2 to 10 seconds of a full run on two cores with AMX
COUNTS = {"short": (4096, 128), "long": (480, 24), "chinese": (1024, 48)}


def texts_of(name: str, data: Path) -> list[str]:
    """Real texts: bank customers' questions, aerodynamics abstracts, Chinese shop reviews; each text once."""
    if name == "short":
        with open(data / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
    elif name == "long":
        lines = (data / "cranfield" / "docs.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
    else:
        rows = (data / "online_shopping" / "reviews.csv").read_text(encoding="utf-8").split("\n")[1:]
        texts = [row.split("\x01")[3] for row in rows if row]
    clean = [" ".join(text.split()) for text in texts]
    chosen = list(dict.fromkeys(filter(None, clean)))
    return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]


def stock(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    vectors = model.encode(list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


def through_files(model_name: str, texts: Sequence[str], precision: str, folder: Path) -> Path:
    """The inference stage on a two-column file; returns the embedding file."""
    from ebr_lib.inference import run_batch_inference

    source, output = folder / "catalogue.csv", folder / f"{precision}.txt"
    rows = (f"{number}\x01{text}\n" for number, text in enumerate(texts))
    source.write_text("id\x01description\n" + "".join(rows), encoding="utf-8")
    config = {"model_name": model_name, "data_path": str(source), "output_path": str(output), "precision": precision}
    run_batch_inference(config | {"prompt": ""})  # the model's own prompt would be more tokens than the others have
    return output


class Contest:
    """The contenders, each in a process of its own, for memory that one gave back is not the next one's."""

    def __init__(self, model_name: str, texts: Sequence[str], *, threads: int | None, cpu_time: bool) -> None:
        task = Task(model_name, tuple(texts), threads, cpu_time)
        spawn = get_context("spawn")
        self.pools = {name: ProcessPoolExecutor(1, spawn, prepare, (name, task)) for name in names_of_contenders()}

    def measure(self, rounds: int) -> dict[str, tuple[list[float], float]]:
        """Name to (seconds of each round, smallest cosine to the base's vectors)."""
        seconds: dict[str, list[float]] = {name: [] for name in self.pools}
        vectors: dict[str, Vectors] = {}
        for turn in range(rounds + 1):
            for name, pool in self.pools.items():
                elapsed, vectors[name] = pool.submit(take_turn).result()
                if turn:  # the first turn warms up
                    seconds[name].append(elapsed)
        for pool in self.pools.values():
            pool.shutdown()
        return {name: (seconds[name], float((vectors[name] * vectors[BASE]).sum(axis=1).min())) for name in self.pools}


@dataclass(frozen=True)
class Task:
    """What every contender is told."""

    model: str
    texts: tuple[str, ...]
    threads: int | None
    cpu_time: bool


def names_of_contenders() -> list[str]:
    from ebr_lib.model.precision import choose_precision
    from ebr_lib.model.training import training_device

    if choose_precision("auto", training_device()).dtype != "bfloat16":
        return [BASE, "Encoder, float32", "Files, float32"]
    return [BASE, BASE_BF16, "Encoder, float32", "Files, float32", "Encoder, bfloat16", "Files, bfloat16"]


_turn: Callable[[], tuple[float, Vectors]]  # of a contender's process


def take_turn() -> tuple[float, Vectors]:
    return _turn()


def prepare(name: str, task: Task) -> None:
    """In a contender's process: load its model and keep what a turn does."""
    global _turn  # noqa: PLW0603 - a pool's initializer has no other way to hand over
    import torch

    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import load_model

    if task.threads:
        torch.set_num_threads(task.threads)
    clock = time.process_time if task.cpu_time else time.perf_counter
    if name.startswith("Files"):
        _turn = partial(files_turn, task, name.rpartition(" ")[2], clock)
        return
    if name.startswith("Encoder"):
        precision: Any = name.rpartition(" ")[2]
        run = partial(Encoder(load_model(task.model), precision=precision).encode, list(task.texts))
    else:
        model = load_model(task.model, dtype=torch.bfloat16 if name == BASE_BF16 else torch.float32)
        run = partial(stock, model, task.texts)
    _turn = partial(memory_turn, run, clock)


def memory_turn(run: Callable[[], Vectors], clock: Callable[[], float]) -> tuple[float, Vectors]:
    start = clock()
    vectors = run()
    return clock() - start, vectors


def files_turn(task: Task, precision: str, clock: Callable[[], float]) -> tuple[float, Vectors]:
    """Seconds of the whole stage, less those of loading the model, which the others have loaded beforehand."""
    from ebr_lib.data.vectors import read_embeddings
    from ebr_lib.model.loading import load_model

    start = clock()
    load_model(task.model)
    loading = clock() - start
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        output = through_files(task.model, task.texts, precision, Path(folder))
        elapsed = clock() - start - loading
        return elapsed, np.asarray(read_embeddings(output).vectors)


def markdown(name: str, texts: Sequence[str], found: dict[str, tuple[list[float], float]]) -> str:
    base = found[BASE][0]
    lines = [
        f"\n{name}: {len(texts)} texts, {np.mean([len(text) for text in texts]):.0f} characters on average\n",
        "| contender | texts/s (median) | slowest–fastest | × base | smallest cosine to base |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for contender, (seconds, cosine) in found.items():
        rates = [len(texts) / s for s in seconds]
        ratio = median(b / s for b, s in zip(base, seconds, strict=True))
        spread = f"{min(rates):.0f}–{max(rates):.0f}"
        lines.append(f"| {contender} | {median(rates):.0f} | {spread} | {ratio:.2f} | {cosine:.6f} |")
    return "\n".join(lines)


def machine() -> str:
    import sentence_transformers
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or [platform.processor()])[0]
    instructions = torch.backends.cpu.get_cpu_capability() + (" with AMX" if "amx_bf16" in cpu else "")
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{device}, {torch.get_num_threads()} threads, {instructions}{load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"sentence-transformers {sentence_transformers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--sets", nargs="+", choices=list(COUNTS), default=["short", "long"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few texts")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    print(machine(), file=sys.stderr)
    for name in args.sets:
        texts = texts_of(name, args.data)[: COUNTS[name][args.quick]]
        contest = Contest(args.model, texts, threads=args.threads, cpu_time=args.cpu_time)
        print(markdown(name, texts, contest.measure(args.rounds)), flush=True)


if __name__ == "__main__":
    main()
