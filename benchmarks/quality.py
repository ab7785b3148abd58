"""How good the fine-tuned model is, beside what the library's loss and samplers give; prints Markdown tables.

    python benchmarks/quality.py --data DIR               # clicks64 clicks256 intents cranfield, three seeds
    python benchmarks/quality.py --data DIR --sets cmrc --multilingual MODEL
    python benchmarks/quality.py --data DIR --quick       # few rows, one seed: to see that it runs

Equal pairs, steps, batch, rank and learning rate. All contenders run in our trainer, whose loss is the library's to
rounding (see training.py for the gap), so that a table takes minutes: "random batches" is MultipleNegativesRankingLoss
with the library's default sampler, "no duplicates" the same with its NO_DUPLICATES. The first seed of "random batches"
is trained with the library's own trainer too.

clicks64, clicks256: banking77 as a click log. Anchor = the customer's text, positive = the intent's name; 77 documents
answer 4,096 queries, in batches of 64 (one epoch) or 256 (two). The test texts search the 77 names.
intents: two texts of one intent are a pair; the test texts search the training texts.
cmrc: Chinese questions search paragraphs; paragraphs are split in halves for training and test.
cranfield: queries search abstracts; queries are split, 2 in 3 for training.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from a checkout

Pairs = list[tuple[str, str]]

RANDOM, NO_DUPLICATES, OURS = "random batches", "no duplicates", "ours, defaults"
SCALE_ONLY, BATCHES_ONLY = "random batches, rsLoRA", "ours, without rsLoRA"
MASK_ONLY, LIBRARY = "random batches, known positives masked", "random batches, the library's own trainer, one seed"
STOCK = {"balanced_batches": False, "mask_known_positives": False, "use_rslora": False}
CONTENDERS: dict[str, dict[str, Any]] = {
    LIBRARY: {},
    RANDOM: STOCK,
    NO_DUPLICATES: STOCK,
    MASK_ONLY: STOCK | {"mask_known_positives": True},
    SCALE_ONLY: STOCK | {"use_rslora": True},
    BATCHES_ONLY: {"use_rslora": False},
    OURS: {},
}


@dataclass(frozen=True)
class Set:
    """Pairs to train on, and a search to judge by: the documents that answer each test query."""

    pairs: Pairs
    queries: list[str]
    documents: list[str]
    answers: list[list[int]]
    knobs: Mapping[str, Any]
    measures: tuple[str, ...]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=[name for name in SETS if name != "cmrc"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--knob", nargs="*", default=[], metavar="NAME=VALUE", help="a further contender: ours with …")
    parser.add_argument("--multilingual", help="model of the Chinese set")
    parser.add_argument("--quick", action="store_true", help="few rows, one seed, two contenders")
    args = parser.parse_args(words)
    if "cmrc" in args.sets and not args.multilingual:
        parser.error("the set cmrc is Chinese: give the folder of a model that knows it with --multilingual")
    names = [RANDOM, OURS] if args.quick else args.contenders
    contenders = {name: CONTENDERS[name] for name in names}
    if args.knob:
        contenders["ours, " + " ".join(args.knob)] = {
            name: json.loads(value) for name, value in (knob.split("=", 1) for knob in args.knob)
        }
    for name in args.sets:
        task = SETS[name](args.data)
        model = args.multilingual if name == "cmrc" else "all-MiniLM-L6-v2"
        if args.quick:
            task = Set(
                task.pairs[:128], task.queries[:50], task.documents, task.answers[:50], task.knobs, task.measures
            )
        print(f"\n{name}: {len(task.pairs)} pairs, {len(task.queries)} test queries, {len(task.documents)} documents")
        report(task, model, contenders, 1 if args.quick else args.seeds)


# --- sets ---------------------------------------------------------------------------------------------------------


def banking(data: Path, part: str) -> Pairs:
    """(text, intent)"""
    with open(data / "banking77" / f"{part}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def clicks(data: Path, batch: int, epochs: int) -> Set:
    rows = [(text, intent.replace("_", " ")) for text, intent in banking(data, "train")]
    random.Random(0).shuffle(rows)
    names = sorted({intent for _, intent in rows})
    test = [(text, intent.replace("_", " ")) for text, intent in banking(data, "test")]
    return Set(
        rows[:4096],
        [text for text, _ in test],
        names,
        [[names.index(intent)] for _, intent in test],
        {"contrastive_batch_size": 0, "train_batch_size": batch, "num_epochs": epochs},
        ("hit@1", "mrr@10"),
    )


def intents(data: Path) -> Set:
    from training import banking_pairs

    train, test = banking(data, "train"), banking(data, "test")
    by_intent: dict[str, list[int]] = {}
    for number, (_, intent) in enumerate(train):
        by_intent.setdefault(intent, []).append(number)
    return Set(
        banking_pairs(data)[:4096],
        [text for text, _ in test],
        [text for text, _ in train],
        [by_intent[intent] for _, intent in test],
        {"train_batch_size": 64},
        ("ndcg@10", "hit@1"),
    )


def cmrc(data: Path) -> Set:
    articles = json.loads((data / "cmrc2018" / "trial.json").read_text(encoding="utf-8"))["data"]
    asked = [(p["context"], [qa["question"] for qa in p["qas"]]) for a in articles for p in a["paragraphs"]]
    random.Random(0).shuffle(asked)
    half = len(asked) // 2
    pairs = [(question, text) for text, questions in asked[:half] for question in questions]
    test = [(question, number) for number, (_, qs) in enumerate(asked) if number >= half for question in qs]
    return Set(
        pairs,
        [question for question, _ in test],
        [text for text, _ in asked],
        [[number] for _, number in test],
        {"train_batch_size": 32, "prompt": {"anchor": "query: ", "positive": "passage: "}, "max_seq_length": 256},
        ("mrr@10", "hit@1"),
    )


def cranfield(data: Path) -> Set:
    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "cranfield" / name).read_text(encoding="utf-8").splitlines()]

    documents, queries = lines("docs.jsonl"), lines("queries.jsonl")
    place = {str(row["id"]): number for number, row in enumerate(documents)}
    answers: dict[str, list[int]] = {}
    for line in (data / "cranfield" / "qrels.tsv").read_text(encoding="utf-8").splitlines():
        query, document, *_ = line.split("\t")
        if document in place:
            answers.setdefault(query, []).append(place[document])
    texts = [" ".join(row["text"].split()) or row["title"] for row in documents]
    judged = [row for row in queries if str(row["id"]) in answers]
    random.Random(0).shuffle(judged)
    cut = 2 * len(judged) // 3
    pairs = [(row["text"], texts[number]) for row in judged[:cut] for number in answers[str(row["id"])]]
    test = judged[cut:]
    return Set(
        pairs,
        [row["text"] for row in test],
        texts,
        [answers[str(row["id"])] for row in test],
        {"train_batch_size": 32, "max_seq_length": 256},
        ("ndcg@10", "hit@1"),
    )


SETS: dict[str, Callable[[Path], Set]] = {
    "clicks64": lambda data: clicks(data, 64, 1),
    "clicks256": lambda data: clicks(data, 256, 2),
    "intents": intents,
    "cmrc": cmrc,
    "cranfield": cranfield,
}


# --- training and judging -----------------------------------------------------------------------------------------


def trained(task: Set, model: str, knobs: Mapping[str, Any], seed: int, folder: str) -> str:
    """Where a model fine-tuned on the set's pairs was saved."""
    from training import DECAY, LEARNING_RATE, RANK, write_pairs

    from ebr_lib import train_sentence_transformer

    config = {
        "model_name": model,
        "data_path": write_pairs(Path(folder) / "pairs.jsonl", task.pairs),
        "output_dir": folder,
        "eval_ratio": 0.0,
        "max_seq_length": 128,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "learning_rate": LEARNING_RATE,
        "weight_decay": DECAY,
        "bf16": True,
        "seed": seed,
    }
    return train_sentence_transformer(config | dict(task.knobs) | dict(knobs)).model_path


def without_duplicates(run: Callable[[], str]) -> str:
    """Run with the library's own NO_DUPLICATES batches in our trainer."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    from ebr_lib.finetune import setup

    class Trainer(setup.EbrTrainer):
        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
            self.args.batch_sampler = BatchSamplers.NO_DUPLICATES
            return SentenceTransformerTrainer.get_batch_sampler(self, dataset, batch_size, drop_last, **kwargs)

    setup.EbrTrainer, kept = Trainer, setup.EbrTrainer  # type: ignore[misc]
    try:
        return run()
    finally:
        setup.EbrTrainer = kept  # type: ignore[misc]


def judged(task: Set, model: str) -> dict[str, float]:
    """Means over the test queries; equal scores do not occur."""
    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import load_model, prompt_of

    loaded = load_model(model, max_seq_length=int(task.knobs.get("max_seq_length", 128)), merged=True)
    given = task.knobs.get("prompt", {})
    queries, documents = (
        Encoder(loaded, prompt=prompt_of(loaded, side) or given.get(column, ""), precision="auto").encode(texts)
        for side, column, texts in (("query", "anchor", task.queries), ("document", "positive", task.documents))
    )
    ranked = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
    hits = np.array([np.isin(row, answers) for row, answers in zip(ranked, task.answers, strict=True)])
    discount = 1 / np.log2(np.arange(2, 12))
    ideal = np.array([discount[: len(answers)].sum() for answers in task.answers])
    first = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0)
    return {
        "hit@1": float(hits[:, 0].mean()),
        "mrr@10": float(first.mean()),
        "ndcg@10": float((hits @ discount / ideal).mean()),
    }


def by_the_library(task: Set, model: str, seed: int, folder: str) -> str:
    """Where a model trained by the library's own trainer, in float32, was saved."""
    from training import Job, stock_trainer, write_pairs

    from ebr_lib.model.adapters import merge_adapter

    pairs = write_pairs(Path(folder) / "pairs.jsonl", task.pairs)
    knobs = task.knobs
    job = Job(model, pairs, knobs["train_batch_size"], 0.1, knobs.get("max_seq_length", 128), seed)
    trainer = stock_trainer(job, folder, epochs=knobs.get("num_epochs", 1))
    trainer.train()
    merge_adapter(trainer.model)
    trainer.model.save_pretrained(f"{folder}/merged")
    return f"{folder}/merged"


def report(task: Set, model: str, contenders: Mapping[str, Mapping[str, Any]], seeds: int) -> None:
    """Print a row a contender, as it is known."""
    print("\n| contender | " + " | ".join(task.measures) + " |\n| --- |" + " ---: |" * len(task.measures))
    print(row("untrained", task.measures, [judged(task, model)]), flush=True)
    for name, knobs in contenders.items():
        found = [score(task, model, name, knobs, seed) for seed in range(1 if name == LIBRARY else seeds)]
        print(row(name, task.measures, found), flush=True)


def score(task: Set, model: str, contender: str, knobs: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train one contender with one seed, and judge it."""
    with tempfile.TemporaryDirectory() as folder:
        if contender == LIBRARY:
            return judged(task, by_the_library(task, model, seed, folder))
        run = partial(trained, task, model, knobs, seed, folder)
        return judged(task, without_duplicates(run) if contender == NO_DUPLICATES else run())


def row(name: str, measures: Sequence[str], found: Sequence[Mapping[str, float]]) -> str:
    """Mean ± standard deviation over the seeds."""
    cells = []
    for measure in measures:
        values = [scores[measure] for scores in found]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.4f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
