"""How fast LoRA training is, beside the library's own trainer; prints Markdown tables.

    python benchmarks/training.py --data DIR                  # packaged MiniLM, dropout off and on
    python benchmarks/training.py --data DIR --parts shape    # a Qwen2 of four layers, of the 0.5B model's widths
    python benchmarks/training.py --data DIR --quick          # a step or two: to see that it runs

DIR holds banking77/ and online_shopping/. Every contender lives in a process of its own; they take turns within a
round. A rate is the median over the rounds, a ratio the median of the rounds' ratios. On a CUDA machine `shape` is the
whole 24 layers, in batches of 128, with Unsloth beside where it is installed; without one it takes a quarter of the
steps. Quality is measured by quality.py.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from contest import MODELS, has_bf16, machine, take_turns

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from a checkout

STOCK, STOCK_BF16, OURS, OURS_FP32 = (
    "sentence-transformers, float32",
    "sentence-transformers, bf16 autocast",
    "ours, bfloat16 weights",
    "ours, float32",
)
CHECKPOINTED, PADDED = "ours, bfloat16, gradient checkpointing", "ours, bfloat16, padded"
UNSLOTH = "Unsloth, bf16"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUTS = (("off", 0.0), ("0.1, in the model and the adapter", 0.1))
LEARNING_RATE, RANK, DECAY, TEMPERATURE = 2e-4, 16, 0.01, 0.05


@dataclass(frozen=True)
class Job:
    """One training run, the same for every contender."""

    model: str
    pairs: str
    batch_size: int
    lora_dropout: float
    max_seq_length: int
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What a run took: seconds of the trainer's loop, the loss of each step, and how far memory grew in it, in MB."""

    seconds: float
    losses: list[float] = field(repr=False)
    grown_mb: float


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--parts", nargs="+", choices=["minilm", "shape"], default=["minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="one round of two steps: only to see that it runs")
    args = parser.parse_args(words)
    print(machine(), file=sys.stderr, flush=True)
    rounds, steps = (1, 2) if args.quick else (args.rounds, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        if "minilm" in args.parts:
            measure_minilm(args.data, Path(folder), rounds, steps, args.quick)
        if "shape" in args.parts:
            measure_shape(args.data, Path(folder), rounds, steps, args.quick)


def measure_minilm(data: Path, folder: Path, rounds: int, steps: int, quick: bool) -> None:
    """Two texts of one intent are a pair: 32 pairs per batch, 16 tokens per text on average."""
    pairs = write_pairs(folder / "banking.jsonl", banking_pairs(data)[: 32 * steps])
    names = possible([STOCK, STOCK_BF16, OURS_FP32, OURS])
    names = [names[0], names[-1]] if quick else names
    for name, rate in DROPOUTS[-1:] if quick else DROPOUTS:
        job = Job(minilm(folder / f"minilm{rate}", rate), pairs, 32, rate, 128)
        runs = measure(names, job, rounds)
        print(markdown(f"MiniLM, banking77, batches of 32, {steps} steps, dropout {name}", job, runs), flush=True)


def measure_shape(data: Path, folder: Path, rounds: int, steps: int, quick: bool) -> None:
    """The first half of a review and the rest are a pair."""
    import torch
    from shapes import build_qwen2, reviews

    names = possible([STOCK, STOCK_BF16, OURS_FP32, PADDED, CHECKPOINTED, OURS])
    layers, batch = 4, 32
    if torch.cuda.is_available():
        layers, batch = 24, 128  # float32 would not fit beside the others
        names = [STOCK_BF16, *([UNSLOTH] if find_spec("unsloth") else []), PADDED, CHECKPOINTED, OURS]
    else:
        steps = max(2, steps // 4)
    if quick:
        layers, batch, names = 1, 4, [names[0], names[-1]]
    texts = reviews(data)
    model = str(build_qwen2(folder / "qwen2", texts, layers))
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts if len(text) > 3]
    pairs = write_pairs(folder / "reviews.jsonl", halves[: batch * steps])
    job = Job(model, pairs, batch, 0.1, 512)
    runs = measure(names, job, rounds)
    print(
        markdown(f"Qwen2, {layers} layers of 0.5B's widths, batches of {batch}, {steps} steps", job, runs), flush=True
    )


def possible(names: Sequence[str]) -> list[str]:
    """Without those in bfloat16 where the processor has none: ours would be float32, the library's takes minutes."""
    return [name for name in names if has_bf16() or name in (STOCK, OURS_FP32)]


# --- data and models ----------------------------------------------------------------------------------------------


def banking_pairs(data: Path) -> list[tuple[str, str]]:
    """Pairs of texts of one intent, shuffled; each text stands in one pair."""
    by_intent: dict[str, list[str]] = {}
    with open(data / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_intent.setdefault(row["category"], []).append(row["text"])
    pairs = [pair for texts in by_intent.values() for pair in zip(texts[::2], texts[1::2], strict=False)]
    random.Random(0).shuffle(pairs)
    return pairs


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> str:
    rows = (json.dumps({"anchor": anchor, "positive": positive}, ensure_ascii=False) for anchor, positive in pairs)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def minilm(folder: Path, dropout: float) -> str:
    """The packaged model with another dropout rate."""
    from ebr_lib.model.loading import load_model

    model = load_model("all-MiniLM-L6-v2")
    config = model[0].model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


# --- contenders ---------------------------------------------------------------------------------------------------


def stock_model(job: Job) -> Any:
    from ebr_lib.model.adapters import add_lora
    from ebr_lib.model.loading import load_model

    model = load_model(job.model, max_seq_length=job.max_seq_length)
    add_lora(model, r=RANK, alpha=2 * RANK, dropout=job.lora_dropout)
    return model


def unsloth_model(job: Job) -> Any:
    """The same adapter on the same model, by Unsloth."""
    from unsloth import FastSentenceTransformer

    model = FastSentenceTransformer.from_pretrained(job.model, max_seq_length=job.max_seq_length, load_in_4bit=False)
    return FastSentenceTransformer.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=job.lora_dropout,
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=False,
        random_state=job.seed,
        task_type="FEATURE_EXTRACTION",
    )


def stock_trainer(
    job: Job,
    folder: str,
    *,
    bf16: bool = False,
    epochs: int = 1,
    build: Callable[[Job], Any] = stock_model,
    make_loss: Callable[[Any], Any] | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Any:
    """The library's trainer and loss (or another of its losses) on the same pairs, in the same order, with the same
    adapter."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import PrinterCallback, set_seed

    from ebr_lib.finetune.processes import training_device

    set_seed(job.seed)
    model = build(job)
    rows = [json.loads(line) for line in Path(job.pairs).read_text(encoding="utf-8").splitlines()]
    args = SentenceTransformerTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=job.batch_size,
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE,
        weight_decay=DECAY,
        bf16=bf16,
        use_cpu=training_device() == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        prompts=dict(prompts) if prompts else None,
        seed=job.seed,
    )
    loss = make_loss(model) if make_loss else MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), loss=loss)
    trainer.remove_callback(PrinterCallback)
    return trainer


def stock(job: Job, bf16: bool, build: Callable[[Job], Any]) -> Run:
    """One run of the library's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock_trainer(job, folder, bf16=bf16, build=build)
        before = held_mb()
        trainer.train()
    return run_of(trainer.state.log_history, before)


def ours(job: Job, **knobs: Any) -> Run:
    """The finetuning stage, as a user calls it, in the library's order of rows."""
    from ebr_lib import train_sentence_transformer
    from ebr_lib.finetune import setup

    before: list[float] = []

    class Weighed(setup.EbrTrainer):
        def __init__(self, **kwargs: Any) -> None:
            before.append(held_mb())
            super().__init__(**kwargs)

    setup.EbrTrainer, kept = Weighed, setup.EbrTrainer  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "model_name": job.model,
                "data_path": job.pairs,
                "output_dir": folder,
                "eval_ratio": 0.0,
                "max_seq_length": job.max_seq_length,
                "lora_r": RANK,
                "lora_alpha": 2 * RANK,
                "lora_dropout": job.lora_dropout,
                "use_rslora": False,  # as the library's own adapter
                "learning_rate": LEARNING_RATE,
                "weight_decay": DECAY,
                "temperature": TEMPERATURE,
                "adapter_strength": 1,
                "train_batch_size": job.batch_size,
                "balanced_batches": False,
                "seed": job.seed,
            }
            result = train_sentence_transformer(config | knobs)
            lines = (Path(result.model_path) / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        setup.EbrTrainer = kept  # type: ignore[misc]
    return run_of([json.loads(line) for line in lines], before[0])


def held_mb() -> float:
    """The memory held now; its peak is counted from here on, for loading a model can take more than training does."""
    from ebr_lib.finetune.memory import peak_memory_mb, reset_peak

    reset_peak()
    return peak_memory_mb()


def run_of(log: Sequence[dict[str, Any]], before_mb: float) -> Run:
    from ebr_lib.finetune.memory import peak_memory_mb

    grown_mb = peak_memory_mb() - before_mb
    seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    return Run(seconds, [float(entry["loss"]) for entry in log if "loss" in entry], grown_mb)


def train(contender: str, job: Job) -> Run:
    """Runs in the contender's process."""
    knobs: dict[str, dict[str, Any]] = {
        OURS: {"bf16": True},
        OURS_FP32: {},
        PADDED: {"bf16": True, "packed_rows": False},
        CHECKPOINTED: {"bf16": True, "gradient_checkpointing": True},
    }
    if contender in knobs:
        return ours(job, **knobs[contender])
    return stock(job, contender != STOCK, unsloth_model if contender == UNSLOTH else stock_model)


def prepare(contender: str, job: Job) -> Callable[[], Run]:
    """In the contender's process: what does a run, and gives the GPU's memory back."""
    if contender == UNSLOTH:
        import unsloth  # noqa: F401 - before the libraries that it changes
    import torch

    def turn() -> Run:
        run = train(contender, job)
        gc.collect()
        torch.cuda.empty_cache()
        return run

    return turn


def measure(contenders: Sequence[str], job: Job, rounds: int) -> dict[str, list[Run]]:
    """Runs of every contender. A round before them warms up; its memory counts, for then a process has grown."""
    runs = take_turns({name: partial(prepare, name, job) for name in contenders}, rounds, MODELS)
    return {name: [replace(run, grown_mb=found[0].grown_mb) for run in found[1:]] for name, found in runs.items()}


def markdown(title: str, job: Job, runs: dict[str, list[Run]]) -> str:
    base = next(iter(runs.values()))
    pairs = len(Path(job.pairs).read_text(encoding="utf-8").splitlines())
    lines = [
        f"\n{title}; {len(base)} rounds\n",
        "| contender | pairs/s (median) | slowest–fastest | × first row | memory grows by | largest gap of the loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in runs.items():
        rates = sorted(pairs / run.seconds for run in found)
        ratio = median(b.seconds / run.seconds for b, run in zip(base, found, strict=True))
        gap = max(abs(a - b) for a, b in zip(base[0].losses, found[0].losses, strict=True))
        lines.append(
            f"| {name} | {median(rates):.1f} | {rates[0]:.1f}–{rates[-1]:.1f} | {ratio:.2f} "
            f"| {found[0].grown_mb:.0f} MB | {gap:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
