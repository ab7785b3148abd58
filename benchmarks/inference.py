"""Speed of encoding beside SentenceTransformer.encode, as a Markdown table.

    python benchmarks/inference.py --data DIR                          # short and long English texts, packaged MiniLM
    python benchmarks/inference.py --data DIR --sets chinese --model M # Chinese texts, a multilingual model
    python benchmarks/inference.py --data DIR --sets shape             # on a GPU: a Qwen2 of 0.5B, 200,000 reviews
    python benchmarks/inference.py --data DIR --quick                  # few texts: a test that it runs
    python benchmarks/inference.py --data DIR --threads 1 --cpu-time   # processor seconds: fair on a busy machine
    python benchmarks/inference.py --data DIR --backends PYTHON        # beside the library's other backends

DIR has banking77/, cranfield/ and online_shopping/. Each contender has its own process; they take turns in each round.
A rate is the median over the rounds, a ratio the median of the rounds' ratios. "Files" reads a file and writes an
embedding file; everything except loading and converting the model counts, over more rows, so that fixed costs hardly
count. "Outside the model" is the share of time in which no forward pass runs, by the GPU's own clock. `shape` compares
with the library's best of several batch sizes. PYTHON is an interpreter whose environment has the library's OpenVINO
and ONNX backends: see stock_backends.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from contest import MODELS, has_bf16, machine, start_server, take_turns
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

Vectors = NDArray[np.float32]

STOCK = "SentenceTransformer.encode, {}, batch {}"
BASE, BASE_BF16 = STOCK.format("float32", 32), STOCK.format("bfloat16", 32)
BATCH_SIZES = (32, 64, 128, 256, 512)  # on a GPU the library's best of these is taken
SAMPLE = 4096  # texts for choosing a batch size, and vectors that are compared
# texts per set: (where there is bfloat16, where there is none, quick); one contender takes some 2 to 10 seconds
COUNTS = {
    "short": (1024, 1024, 64),
    "long": (120, 120, 24),
    "chinese": (1024, 256, 48),
    "shape": (200_000, 200_000, 64),
}
# rows of the file that the stage reads: with few, the fixed costs of a run would dominate
FILE_ROWS = {"short": 20_000, "long": 0, "chinese": 0}


def texts_of(name: str, data: Path) -> list[str]:
    """Real texts without duplicates: bank customers' questions, aerodynamics abstracts, Chinese shop reviews."""
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


def stock(model: SentenceTransformer, texts: Sequence[str], batch: int) -> Vectors:
    vectors = model.encode(list(texts), batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


def through_files(model_name: str, texts: Sequence[str], precision: str, folder: Path) -> Path:
    """Run the inference stage on a two-column file; returns the embedding file."""
    from ebr_lib.inference.run import run_batch_inference

    source, output = folder / "catalogue.csv", folder / f"{precision}.txt"
    rows = (f"{number}\x01{text}\n" for number, text in enumerate(texts))
    source.write_text("id\x01description\n" + "".join(rows), encoding="utf-8")
    config = {"model_name": model_name, "data_path": str(source), "output_path": str(output), "precision": precision}
    run_batch_inference(config | {"prompt": ""})  # the model's own prompt would add tokens that the others do not have
    return output


@dataclass(frozen=True)
class Task:
    """Input of every contender."""

    model: str
    texts: tuple[str, ...]
    threads: int | None
    cpu_time: bool
    rows: int = 0  # of the file that the stage reads, if more than `texts`
    backends: str = ""  # interpreter that has the library's other backends


@dataclass(frozen=True)
class Turn:
    """Seconds of a turn, those in the model's forward pass, and the first vectors."""

    seconds: float
    forward: float
    vectors: Vectors = field(repr=False)


class Forward:
    """Measure seconds within forward passes, on a GPU by its own clock; the rest of a turn it waits for text."""

    def __init__(self, clock: Callable[[], float]) -> None:
        from sentence_transformers.sentence_transformer.modules import Transformer
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

        self.clock, self.kind = clock, Transformer
        self.start: Any = None
        self.spans: list[tuple[Any, Any]] = []
        register_module_forward_pre_hook(self._begins)
        register_module_forward_hook(self._ends)

    def _begins(self, module: Any, *_: Any) -> None:
        if isinstance(module, self.kind):  # the whole model, not a layer
            self.start = self._mark()

    def _ends(self, module: Any, *_: Any) -> None:
        if isinstance(module, self.kind):
            self.spans.append((self.start, self._mark()))

    def _mark(self) -> Any:
        import torch

        if not torch.cuda.is_available():
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Seconds since the last call."""
        spans, self.spans = self.spans, []
        return sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000 for a, b in spans)


OTHER_BACKENDS = ("openvino", "onnx", "onnx-int8")  # the library's


def contenders(backends: str) -> list[str]:
    """Names of the contenders of the text sets, the one to compare with first."""
    others = [f"SentenceTransformer, {backend}" for backend in OTHER_BACKENDS] if backends else []
    ours = ["Encoder on torch, float32", "Encoder, float32"]
    if not has_bf16():
        return [BASE, *others, *ours]
    return [BASE, BASE_BF16, *others, *ours, "Encoder on torch, bfloat16", "Encoder, bfloat16", "Files, bfloat16"]


def fastest_stock(task: Task) -> str:
    """The library's `encode` in bfloat16, with its fastest batch size on a sample of the texts."""
    names = [STOCK.format("bfloat16", size) for size in BATCH_SIZES]
    part = replace(task, texts=task.texts[:SAMPLE])
    turns = take_turns({name: partial(prepare, name, part) for name in names}, 1, MODELS)
    return min(names, key=lambda name: turns[name][-1].seconds)


def prepare(name: str, task: Task) -> Callable[[], Turn]:
    """In a contender's process: load its model, and return the turn."""
    import torch

    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import load_model

    if task.threads:
        torch.set_num_threads(task.threads)
    clock = time.process_time if task.cpu_time else time.perf_counter
    forward = Forward(clock)
    kind, precision, *batch = name.split(", ")
    if precision in OTHER_BACKENDS:
        return other_backend(task, precision)
    if kind == "Files":
        return partial(files_turn, task, precision, clock, forward)
    if kind.startswith("Encoder"):
        backend = "torch" if kind.endswith("torch") else "auto"
        encoder = Encoder(load_model(task.model), precision=precision, backend=backend)  # type: ignore[arg-type]
        run = partial(encoder.encode, list(task.texts))
    else:
        model = load_model(task.model, dtype=getattr(torch, precision))
        run = partial(stock, model, task.texts, int(batch[0].removeprefix("batch ")))
    return partial(memory_turn, run, clock, forward)


def other_backend(task: Task, backend: str) -> Callable[[], Turn]:
    """The library with another backend, in its own interpreter, which measures each turn itself."""
    from ebr_lib.model.packaged import PACKAGED_NAME, packaged_model

    folder = Path(tempfile.mkdtemp())
    texts, vectors = folder / "texts.json", folder / "vectors.npy"
    texts.write_text(json.dumps(task.texts), encoding="utf-8")
    model = str(packaged_model()) if task.model == PACKAGED_NAME else task.model
    command = [task.backends, str(Path(__file__).with_name("stock_backends.py")), model, backend, texts, vectors]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout = child.stdin, child.stdout
    while stdout.readline() != "ready\n":  # the exporter also prints lines
        if child.poll() is not None:
            raise RuntimeError(f"{backend}: its process has ended")

    def turn() -> Turn:
        stdin.write("\n")
        stdin.flush()
        seconds = float(stdout.readline())
        return Turn(seconds, seconds, np.load(vectors))

    return turn


def memory_turn(run: Callable[[], Vectors], clock: Callable[[], float], forward: Forward) -> Turn:
    forward.seconds()
    start = clock()
    vectors = run()
    return Turn(clock() - start, forward.seconds(), vectors[:SAMPLE])


def reordered(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts as long as these on average: these again and again, their words in another order."""
    draw, found = random.Random(0), list[str]()
    for number in range(count):
        words = texts[number % len(texts)].split()
        found.append(" ".join(draw.sample(words, len(words))))
    return found


def files_turn(task: Task, precision: str, clock: Callable[[], float], forward: Forward) -> Turn:
    """Seconds of the whole stage, less those of making its encoder, which the others have made beforehand.

    With rows enough that what comes before and after does not decide; the seconds are those of `task.texts` alone.
    """
    from ebr_lib.data.embeddings.files import read_embeddings
    from ebr_lib.model.spec import EncoderSpec

    texts = list(task.texts) + reordered(task.texts, task.rows - len(task.texts))
    start = clock()
    EncoderSpec(task.model, precision=precision).encoder("document")  # type: ignore[arg-type]
    making = clock() - start
    with tempfile.TemporaryDirectory() as folder:
        forward.seconds()
        start = clock()
        output = through_files(task.model, texts, precision, Path(folder))
        elapsed = (clock() - start - making) * len(task.texts) / len(texts)
        return Turn(elapsed, forward.seconds(), np.array(read_embeddings(output).vectors[: len(task.texts)][:SAMPLE]))


def markdown(title: str, texts: Sequence[str], turns: dict[str, list[Turn]]) -> str:
    """A row per contender, compared with the first."""
    import torch

    base, on_gpu = next(iter(turns.values())), torch.cuda.is_available()
    lines = [
        f"\n{title}: {len(texts)} texts, {np.mean([len(text) for text in texts]):.0f} characters on average\n",
        "| contender | texts/s (median) | slowest–fastest | × first row | outside the model | smallest cosine |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for contender, found in turns.items():
        rates = [len(texts) / turn.seconds for turn in found]
        ratio = median(b.seconds / turn.seconds for b, turn in zip(base, found, strict=True))
        outside = f"{median(1 - turn.forward / turn.seconds for turn in found):.0%}" if on_gpu else "–"
        cosine = float((found[-1].vectors * base[-1].vectors).sum(axis=1).min())
        spread = f"{min(rates):.0f}–{max(rates):.0f}"
        lines.append(f"| {contender} | {median(rates):.0f} | {spread} | {ratio:.2f} | {outside} | {cosine:.6f} |")
    return "\n".join(lines)


def measure(name: str, task: Task, rounds: int, names: Sequence[str]) -> None:
    turns = take_turns({contender: partial(prepare, contender, task) for contender in names}, rounds, MODELS)
    print(markdown(name, task.texts, {contender: found[1:] for contender, found in turns.items()}), flush=True)


def measure_shape(data: Path, folder: Path, task: Task, rounds: int, count: int) -> None:
    """A Qwen2 of 0.5B with random weights, on reviews with reordered clauses: meant for a GPU."""
    import torch
    from shapes import build_qwen2, reviews, varied

    layers = 24 if torch.cuda.is_available() else 1
    texts = reviews(data)
    model = build_qwen2(folder, texts, layers)
    task = replace(task, model=str(model), texts=tuple(varied(texts, count)))
    names = [fastest_stock(task), "Encoder, bfloat16", "Files, bfloat16"]
    measure(f"Qwen2, {layers} layers of 0.5B's widths, reviews", task, rounds, names)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--sets", nargs="+", choices=list(COUNTS), default=["short", "long"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few texts, and only the first and the last contender")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument(
        "--backends", default="", metavar="PYTHON", help="interpreter with the library's other backends"
    )
    parser.add_argument("--contenders", nargs="+", default=[], help="the first of all, and those whose names hold this")
    args = parser.parse_args(words)
    start_server(MODELS)
    print(machine(), file=sys.stderr)
    for name in args.sets:
        count = COUNTS[name][2 if args.quick else 0 if has_bf16() else 1]
        task = Task(args.model, (), args.threads, args.cpu_time, backends=args.backends)
        if name == "shape":
            with tempfile.TemporaryDirectory() as folder:
                measure_shape(args.data, Path(folder), task, args.rounds, count)
            continue
        names = contenders(args.backends)
        names = [n for n in names if n == names[0] or not args.contenders or any(part in n for part in args.contenders)]
        task = replace(task, texts=tuple(texts_of(name, args.data)[:count]), rows=0 if args.quick else FILE_ROWS[name])
        measure(name, task, args.rounds, [names[0], names[-1]] if args.quick else names)


if __name__ == "__main__":
    main()
