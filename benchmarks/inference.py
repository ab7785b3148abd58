"""How fast texts become vectors, beside SentenceTransformer.encode; prints a Markdown table.

    python benchmarks/inference.py --data DIR                          # short and long English texts, packaged MiniLM
    python benchmarks/inference.py --data DIR --sets chinese --model M # Chinese texts, a multilingual model
    python benchmarks/inference.py --data DIR --quick                  # few texts: to see that it runs
    python benchmarks/inference.py --data DIR --threads 1 --cpu-time   # processor seconds: fair on a busy machine

DIR holds banking77/, cranfield/ and online_shopping/. Contenders take turns within a round, so that what disturbs the
machine disturbs all of them; a rate is the median over the rounds, a ratio the median of the rounds' ratios.
"Files" reads a file and writes an embedding file, everything but loading the model included.
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

Vectors = NDArray[np.float32]
Contender = Callable[[], Vectors | Path]

BASE = "SentenceTransformer.encode, float32, batch 32"
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


def load_seconds(make: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    make()
    return clock() - start


def through_files(model_name: str, texts: Sequence[str], precision: str, folder: Path) -> Path:
    """The inference stage on a two-column file; returns the embedding file."""
    from ebr_lib.inference import run_batch_inference

    source, output = folder / "catalogue.csv", folder / f"{precision}.txt"
    rows = (f"{number}\x01{text}\n" for number, text in enumerate(texts))
    source.write_text("id\x01description\n" + "".join(rows), encoding="utf-8")
    config = {"model_name": model_name, "data_path": str(source), "output_path": str(output), "precision": precision}
    run_batch_inference(config)
    return output


def contenders_of(
    model_name: str, texts: Sequence[str], folder: Path, clock: Callable[[], float]
) -> dict[str, tuple[Contender, float]]:
    """Name to (what to time, seconds of it that are the loading of the model)."""
    import torch

    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import load_model
    from ebr_lib.model.precision import choose_precision

    model = load_model(model_name)
    found: dict[str, tuple[Contender, float]] = {BASE: (partial(stock, model, texts), 0.0)}
    has_bf16 = choose_precision("auto", model.device.type).dtype == "bfloat16"
    if has_bf16:
        half = load_model(model_name, dtype=torch.bfloat16)
        found["SentenceTransformer.encode, bfloat16, batch 32"] = (partial(stock, half, texts), 0.0)
    for precision in ("float32", "bfloat16") if has_bf16 else ("float32",):
        encoder = Encoder(model, precision=precision)
        found[f"Encoder, {precision}"] = (partial(encoder.encode, texts), 0.0)
        load = median(load_seconds(partial(load_model, model_name), clock) for _ in range(3))
        found[f"Files, {precision}"] = (partial(through_files, model_name, texts, precision, folder), load)
    return found


def measure(
    contenders: dict[str, tuple[Contender, float]], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[list[float], float]]:
    """Name to (seconds of each round, smallest cosine to the base's vectors)."""
    from ebr_lib.data.vectors import read_embeddings

    reference = contenders[BASE][0]()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cosines = {}
    for turn in range(rounds + 1):
        for name, (run, load) in contenders.items():
            start = clock()
            result = run()
            elapsed = clock() - start - load
            vectors = read_embeddings(result).vectors if isinstance(result, Path) else result
            cosines[name] = float((vectors * reference).sum(axis=1).min())
            if turn:  # the first turn warms up
                seconds[name].append(elapsed)
    return {name: (seconds[name], cosines[name]) for name in contenders}


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

    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or [platform.processor()])[0]
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{device}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{load}; "
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
    clock = time.process_time if args.cpu_time else time.perf_counter
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(), file=sys.stderr)
    for name in args.sets:
        texts = texts_of(name, args.data)[: COUNTS[name][args.quick]]
        with tempfile.TemporaryDirectory() as folder:
            contenders = contenders_of(args.model, texts, Path(folder), clock)
            print(markdown(name, texts, measure(contenders, args.rounds, clock)), flush=True)


if __name__ == "__main__":
    main()
