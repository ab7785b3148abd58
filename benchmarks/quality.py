"""How good the fine-tuned model is, beside what the library's loss and samplers give; prints Markdown tables.

    python benchmarks/quality.py --data DIR               # all sets except cmrc, three seeds
    python benchmarks/quality.py --data DIR --sets cmrc --multilingual MODEL
    python benchmarks/quality.py --data DIR --alone       # ours by default, and with every knob changed alone
    python benchmarks/quality.py --data DIR --results FILE --contenders "ours, defaults"    # in pieces
    python benchmarks/quality.py --data DIR --quick       # few rows, one seed: to see that it runs

Equal pairs, steps, batch, rank and learning rate. All contenders run in our trainer, whose loss is the library's to
rounding (see training.py for the gap), so that a table takes minutes: "random batches" is MultipleNegativesRankingLoss
with the library's default sampler, "no duplicates" the same with its NO_DUPLICATES. One seed is trained with the
library's own trainer: "random batches", its GISTEmbedLoss, whose guide is the untrained model, and its DistillKLDivLoss
added to MultipleNegativesRankingLoss (the last two with NO_DUPLICATES). The teacher is the untrained model; it scores
the positive and two near documents of each pair. Replay, and a guard that chooses, are pairs of the guard's kind
without its queries.

Queries that choose something (a strength of the adapter) are other ones than those trained on and those reported; only
contenders that choose get them. `--results` keeps every single result as a line, and skips those that it has.
`seconds` is the training alone. `guard` is nDCG@10 on a search of another kind: what the model forgets.

clicks64, clicks256: banking77 as a click log. Anchor = the customer's text, positive = the intent's name; 77 documents
answer 4,096 queries, in batches of 64 (one epoch) or 256 (two). The test texts search the 77 names.
wrong30: clicks64 with a wrong name in 30 % of the pairs, those that choose included. tenth: 409 pairs, five epochs.
log_clicks, log_distinct, log_pairs: what is made of the simulated click log of the sample shop; the held-out truth is
searched. Every click as a pair (one epoch), every clicked pair once, and the pairs of the stage `pairs` with their
weights (three epochs: about as many steps).
shop: the sample data of this project, in batches of 32, three epochs; its held-out queries search all its documents.
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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from a checkout

Pairs = list[tuple[str, str]]

OTHER_KIND, TAUGHT = "other_kind.jsonl", "taught.jsonl"  # files that a run writes where its knobs name them

RANDOM, NO_DUPLICATES, OURS = "random batches", "no duplicates", "ours, defaults"
SCALE_ONLY, BATCHES_ONLY = "random batches, rsLoRA", "ours, without rsLoRA"
MASK_ONLY, LIBRARY = "random batches, known positives masked", "random batches, the library's own trainer, one seed"
GIST, UNTRAINED = "GISTEmbedLoss, the library's own trainer, one seed", "untrained"
KD = "DistillKLDivLoss beside it, the library's own trainer, one seed"
ONE_SEED = (LIBRARY, GIST, KD)
REPLAY, GUARD, TEACHER = "ours, replay of a quarter", "ours, a guard", "ours, a teacher"
FOUND = ("temperature", "adapter_strength")  # what a run finds by itself
FIXED = "ours, temperature 0.05, adapter_strength 1"
TEMPERATURE_ONLY, STRENGTH_ONLY = "ours, temperature auto, adapter_strength 1", "ours, temperature 0.05, strength auto"
STOCK = {
    "balanced_batches": False,
    "mask_known_positives": False,
    "use_rslora": False,
    "temperature": 0.05,
    "adapter_strength": 1,
}
CONTENDERS: dict[str, dict[str, Any]] = {
    LIBRARY: {},
    GIST: {},
    KD: {},
    RANDOM: STOCK,
    NO_DUPLICATES: STOCK,
    MASK_ONLY: STOCK | {"mask_known_positives": True},
    SCALE_ONLY: STOCK | {"use_rslora": True},
    BATCHES_ONLY: {"use_rslora": False, "temperature": 0.05, "adapter_strength": 1},
    FIXED: {"temperature": 0.05, "adapter_strength": 1},
    TEMPERATURE_ONLY: {"adapter_strength": 1},
    STRENGTH_ONLY: {"temperature": 0.05},
    OURS: {},
}
CHANGES = (  # of the defaults, one at a time
    "use_rslora=false",
    "lora_alpha=16",
    "lora_alpha=64",
    "lora_dropout=0",
    "learning_rate=1e-4",
    "learning_rate=4e-4",
    "balanced_batches=false",
    "mask_known_positives=false",
    "label_smoothing=0.1",
    "logq_correction=true",
    "false_negative_margin=0",
    "bidirectional_loss=true",
    "mine_hard_negatives=2",
    "positive_rank_max=50",
    "noise_enabled=true",
)


def changed(words: Iterable[str]) -> dict[str, Any]:
    """Knobs out of NAME=VALUE."""
    return {name: json.loads(value) for name, value in (word.split("=", 1) for word in words)}


ALONE = {f"ours, {change}": changed([change]) for change in CHANGES} | {
    REPLAY: {"replay_data_path": OTHER_KIND, "replay_share": 0.25},
    GUARD: {"guard_data_path": OTHER_KIND},
    TEACHER: {"data_path": TAUGHT, "distill_weight": 1.0},
}


@dataclass(frozen=True)
class Search:
    """Queries, documents, and the numbers of the documents that answer each query; `pairs` are others of its kind."""

    queries: list[str]
    documents: list[str]
    answers: list[list[int]]
    pairs: Pairs = field(default_factory=list)


@dataclass(frozen=True)
class Set:
    """Pairs to train on, others to choose by, and two searches to judge by: of the task, and of another kind."""

    pairs: Pairs
    choosing: Pairs
    search: Search
    guard: Search
    knobs: Mapping[str, Any]
    measures: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]] = ()  # of `pairs`, where they say more than two texts

    def shortened(self) -> Set:
        """Few rows, to see that it runs."""
        search = replace(self.search, queries=self.search.queries[:50], answers=self.search.answers[:50])
        return replace(self, pairs=self.pairs[:128], rows=self.rows[:128], choosing=self.choosing[:32], search=search)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=[name for name in SETS if name != "cmrc"])
    parser.add_argument("--seeds", type=int, default=3)
    everyone = CONTENDERS | ALONE
    parser.add_argument("--contenders", nargs="+", choices=everyone, metavar="NAME")
    parser.add_argument("--alone", action="store_true", help="ours by default, and with every knob changed alone")
    parser.add_argument("--knob", nargs="*", default=[], metavar="NAME=VALUE", help="a further contender: ours with …")
    parser.add_argument("--multilingual", help="model of the Chinese set")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines: a result each, not measured again")
    parser.add_argument(
        "--quick", action="store_true", help="few rows, one seed, two contenders unless others are given"
    )
    args = parser.parse_args(words)
    if "cmrc" in args.sets and not args.multilingual:
        parser.error("the set cmrc is Chinese: give the folder of a model that knows it with --multilingual")
    usual = [OURS, *ALONE] if args.alone else [RANDOM, OURS] if args.quick else CONTENDERS
    contenders = {UNTRAINED: {}} | {name: everyone[name] for name in args.contenders or usual}
    if args.knob:
        contenders["ours, " + " ".join(args.knob)] = changed(args.knob)
    results = Results(args.results)
    for name in args.sets:
        task = SETS[name](args.data)
        task = task.shortened() if args.quick else task
        model = args.multilingual if name == "cmrc" else "all-MiniLM-L6-v2"
        rows, search = len(task.pairs), task.search
        print(f"\n{name}: {rows} pairs, {len(search.queries)} test queries, {len(search.documents)} documents")
        report(name, task, model, contenders, seeds=1 if args.quick else args.seeds, results=results)


class Results:
    """Every single result, as a line of a file that is added to at once; without a file, in memory."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **run: Any) -> dict[str, Any] | None:
        """The result of this run: set, contender, seed, knobs, pairs."""
        return next((row for row in self.rows if all(row[name] == value for name, value in run.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row


# --- sets ---------------------------------------------------------------------------------------------------------


def banking(data: Path, part: str) -> Pairs:
    """(text, intent)"""
    with open(data / "banking77" / f"{part}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def clicks(data: Path, batch: int, epochs: int, pairs: int = 4096, wrong: float = 0.0) -> Set:
    """A tenth as many pairs as train choose; `wrong` is the share of all of them with another intent's name."""
    rows = [(text, intent.replace("_", " ")) for text, intent in banking(data, "train")]
    random.Random(0).shuffle(rows)
    names = sorted({intent for _, intent in rows})
    draw = random.Random(1)
    spoilt = [
        (text, draw.choice([other for other in names if other != intent]) if draw.random() < wrong else intent)
        for text, intent in rows
    ]
    return Set(
        spoilt[:pairs],
        spoilt[4096 : 4096 + pairs // 10],
        of_names(data),
        shop_search(),
        {"contrastive_batch_size": 0, "train_batch_size": batch, "num_epochs": epochs},
        ("hit@1", "mrr@10"),
    )


def of_names(data: Path, queries: int | None = None) -> Search:
    """The test texts search the names of the intents."""
    test = [(text, intent.replace("_", " ")) for text, intent in banking(data, "test")]
    names = sorted({intent for _, intent in test})
    random.Random(0).shuffle(test)
    test = test[:queries]
    pairs = [(text, intent.replace("_", " ")) for text, intent in banking(data, "train")]
    return Search([text for text, _ in test], names, [[names.index(intent)] for _, intent in test], pairs)


def intents(data: Path) -> Set:
    from training import banking_pairs

    train, test = banking(data, "train"), banking(data, "test")
    by_intent: dict[str, list[int]] = {}
    for number, (_, intent) in enumerate(train):
        by_intent.setdefault(intent, []).append(number)
    pairs = banking_pairs(data)
    answers = [by_intent[intent] for _, intent in test]
    return Set(
        pairs[:4096],
        pairs[4096:4505],
        Search([text for text, _ in test], [text for text, _ in train], answers),
        shop_search(),
        {"train_batch_size": 64},
        ("ndcg@10", "hit@1"),
    )


def shop_pairs(name: str) -> Pairs:
    lines = (HERE.parent / "train_text" / name).read_text(encoding="utf-8").splitlines()
    return [(row["anchor"], row["positive"]) for row in map(json.loads, lines)]


def shop_search() -> Search:
    """The sample shop's held-out queries search all its documents."""
    queries: dict[str, list[str]] = {}
    for anchor, positive in shop_pairs("heldout/queries.jsonl"):
        queries.setdefault(anchor, []).append(positive)
    pairs = shop_pairs("queries.jsonl")
    documents = list(
        dict.fromkeys([text for texts in queries.values() for text in texts] + [text for _, text in pairs])
    )
    answers = [[documents.index(text) for text in texts] for texts in queries.values()]
    return Search(list(queries), documents, answers, pairs)


def shop(data: Path) -> Set:
    rows = shop_pairs("queries.jsonl")
    random.Random(0).shuffle(rows)
    knobs = {"train_batch_size": 32, "num_epochs": 3}
    return Set(rows[64:], rows[:64], shop_search(), of_names(data, 500), knobs, ("ndcg@10", "hit@1"))


def click_log(data: Path, kind: str) -> Set:
    """Pairs out of the simulated log: every click, every clicked pair once, or what the stage makes."""
    import polars as pl

    from ebr_lib import make_training_pairs

    place = HERE.parent / "train_text" / "click_log"
    texts = {
        row["item_id"]: row["description"] for row in map(json.loads, (place / "items.jsonl").open(encoding="utf-8"))
    }
    log = pl.read_csv(place / "events.csv.gz", infer_schema=False).filter(pl.col("event") == "click")
    clicks = log.select("query", "item_id")
    clicks = clicks if kind == "clicks" else clicks.unique(maintain_order=True)
    pairs = [(query, texts[item]) for query, item in clicks.iter_rows()]
    rows: list[dict[str, Any]] = []
    if kind == "pairs":
        with tempfile.TemporaryDirectory() as folder:
            result = make_training_pairs({"holdout_days": 0, "output_dir": f"{folder}/out"})
            rows = [json.loads(line) for line in result.pairs.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["anchor"], row["positive"]) for row in rows]
    knobs = {"train_batch_size": 32, "num_epochs": 1 if kind == "clicks" else 3}
    return Set(pairs, pairs[:64], shop_search(), of_names(data, 500), knobs, ("ndcg@10", "hit@1"), rows)


def cmrc(data: Path) -> Set:
    """Half of the paragraphs are trained on; of the others, a quarter chooses and the rest is reported."""
    articles = json.loads((data / "cmrc2018" / "trial.json").read_text(encoding="utf-8"))["data"]
    asked = [(p["context"], [qa["question"] for qa in p["qas"]]) for a in articles for p in a["paragraphs"]]
    random.Random(0).shuffle(asked)
    half, test = len(asked) // 2, len(asked) * 5 // 8

    def pairs(paragraphs: Iterable[tuple[str, list[str]]]) -> Pairs:
        return [(question, text) for text, questions in paragraphs for question in questions]

    queries = [(question, number) for number, (_, qs) in enumerate(asked) if number >= test for question in qs]
    return Set(
        pairs(asked[:half]),
        pairs(asked[half:test]),
        Search([question for question, _ in queries], [text for text, _ in asked], [[n] for _, n in queries]),
        shop_search(),
        {"train_batch_size": 32, "prompt": {"anchor": "query: ", "positive": "passage: "}, "max_seq_length": 256},
        ("mrr@10", "hit@1"),
    )


def cranfield(data: Path) -> Set:
    """Of the queries, 6 in 10 are trained on, 1 chooses, 3 are reported."""

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
    trained, chosen = 6 * len(judged) // 10, 7 * len(judged) // 10

    def pairs(rows: Iterable[dict[str, Any]]) -> Pairs:
        return [(row["text"], texts[number]) for row in rows for number in answers[str(row["id"])]]

    test = judged[chosen:]
    return Set(
        pairs(judged[:trained]),
        pairs(judged[trained:chosen]),
        Search([row["text"] for row in test], texts, [answers[str(row["id"])] for row in test]),
        shop_search(),
        {"train_batch_size": 32, "max_seq_length": 256},
        ("ndcg@10", "hit@1"),
    )


SETS: dict[str, Callable[[Path], Set]] = {
    "clicks64": lambda data: clicks(data, 64, 1),
    "clicks256": lambda data: clicks(data, 256, 2),
    "wrong30": lambda data: clicks(data, 64, 1, wrong=0.3),
    "tenth": lambda data: clicks(data, 64, 5, pairs=409),
    "intents": intents,
    "shop": shop,
    "log_clicks": lambda data: click_log(data, "clicks"),
    "log_distinct": lambda data: click_log(data, "distinct"),
    "log_pairs": lambda data: click_log(data, "pairs"),
    "cmrc": cmrc,
    "cranfield": cranfield,
}


# --- training and judging -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A fine-tuned model, the seconds that it took, and what the run found by itself."""

    folder: str
    seconds: float
    found: Mapping[str, Any]


def trained(task: Set, model: str, knobs: Mapping[str, Any], seed: int, folder: str) -> Trained:
    """Fine-tune on the set's pairs; a run that chooses something gets the pairs for it."""
    from training import DECAY, LEARNING_RATE, RANK, write_pairs

    from ebr_lib import train_sentence_transformer
    from ebr_lib.finetune.config import FinetuneConfig

    config = {
        "model_name": model,
        "data_path": write_rows(Path(folder) / "pairs.jsonl", task),
        "output_dir": folder,
        "eval_ratio": 0.0,
        "max_seq_length": 128,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "learning_rate": LEARNING_RATE,
        "weight_decay": DECAY,
        "bf16": True,
        "seed": seed,
        **task.knobs,
        **knobs,
    }
    for name, value in knobs.items():
        if value == OTHER_KIND:
            config[name] = write_pairs(Path(folder) / OTHER_KIND, task.guard.pairs)
        if value == TAUGHT:
            config[name] = write_lines(Path(folder) / TAUGHT, taught(task, model))
    if getattr(FinetuneConfig.resolve(config), "adapter_strength", 1) == "auto":
        config["eval_data_path"] = write_pairs(Path(folder) / "choosing.jsonl", task.choosing)
    result = train_sentence_transformer(config)
    found = {name: value for name in FOUND if (value := getattr(result, name, None)) is not None}
    return Trained(result.model_path, result.seconds, found)


def write_rows(place: Path, task: Set) -> str:
    """Write the set's rows as they are, or its pairs."""
    from training import write_pairs

    return write_lines(place, task.rows) if task.rows else write_pairs(place, task.pairs)


def write_lines(place: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(place)


def taught(task: Set, model: str, negatives: int = 2) -> list[dict[str, Any]]:
    """Each pair with the nearest documents that do not answer it, and the scores of all by the model as it is."""
    from training import TEMPERATURE

    from ebr_lib.model.loading import load_model

    place = {text: number for number, text in enumerate(dict.fromkeys(text for _, text in task.pairs))}
    documents = list(place)
    answers: dict[str, set[int]] = {}
    for query, text in task.pairs:
        answers.setdefault(query, set()).add(place[text])
    loaded = load_model(model, max_seq_length=int(task.knobs.get("max_seq_length", 128)))
    queries, vectors = encoded(loaded, ([query for query, _ in task.pairs], documents), task.knobs.get("prompt", {}))
    rows = []
    for (query, text), scores in zip(task.pairs, queries @ vectors.T / TEMPERATURE, strict=True):
        others = [number for number in np.argsort(-scores).tolist() if number not in answers[query]][:negatives]
        found = [float(scores[number]) for number in (place[text], *others)]
        rows.append({
            "anchor": query, "positive": text, "negative": [documents[number] for number in others],
            "pos_scores": found[:1], "neg_scores": found[1:],
        })  # fmt: skip
    return rows


def without_duplicates(run: Callable[[], Trained]) -> Trained:
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


def encoded(model: Any, texts: tuple[list[str], list[str]], given: Mapping[str, str]) -> list[NDArray[np.float32]]:
    """Vectors of queries and of documents, with the model's prompts or those given."""
    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import prompt_of

    return [
        Encoder(model, prompt=prompt_of(model, side) or given.get(column, ""), precision="auto").encode(of_side)
        for side, column, of_side in zip(("query", "document"), ("anchor", "positive"), texts, strict=True)
    ]


def judged(search: Search, model: Any, given: Mapping[str, str]) -> dict[str, float]:
    """Means over the queries, with the model's prompts or those given; equal scores do not occur."""
    queries, documents = encoded(model, (search.queries, search.documents), given)
    ranked = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
    hits = np.array([np.isin(row, answers) for row, answers in zip(ranked, search.answers, strict=True)])
    discount = 1 / np.log2(np.arange(2, 12))
    ideal = np.array([discount[: len(answers)].sum() for answers in search.answers])
    first = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0)
    return {
        "hit@1": float(hits[:, 0].mean()),
        "mrr@10": float(first.mean()),
        "ndcg@10": float((hits @ discount / ideal).mean()),
    }


def judged_twice(task: Set, model: str) -> dict[str, float]:
    """The measures of the task's search, and the nDCG@10 of the other one."""
    from ebr_lib.model.loading import load_model

    loaded = load_model(model, max_seq_length=int(task.knobs.get("max_seq_length", 128)), merged=True)
    prompts = task.knobs.get("prompt", {})
    return judged(task.search, loaded, prompts) | {"guard": judged(task.guard, loaded, prompts)["ndcg@10"]}


def gist(job: Any, trained: Any) -> Any:
    """GISTEmbedLoss guided by the untrained model."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
    from training import TEMPERATURE

    from ebr_lib.model.loading import load_model

    guide = load_model(job.model, max_seq_length=job.max_seq_length)
    return GISTEmbedLoss(trained, guide, temperature=TEMPERATURE)


def ranking_and_teacher(trained: Any) -> Any:
    """MultipleNegativesRankingLoss + DistillKLDivLoss, whose factor temperature² is taken out: both weigh alike."""
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MultipleNegativesRankingLoss
    from sentence_transformers.util import pairwise_cos_sim
    from torch import nn
    from training import TEMPERATURE

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ranking = MultipleNegativesRankingLoss(trained, scale=1 / TEMPERATURE)
            self.teacher = DistillKLDivLoss(
                trained, pairwise_cos_sim, student_temperature=TEMPERATURE, teacher_temperature=1.0
            )

        def forward(self, features: Any, labels: Any) -> Any:
            vectors = embed_columns(trained, features)
            divergence = self.teacher.compute_loss_from_embeddings(vectors, labels) / TEMPERATURE**2
            return self.ranking.compute_loss_from_embeddings(vectors, labels) + divergence

    return Both()


def as_the_library_reads(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `taught` with a column per negative, and the scores as its label."""
    negatives = {f"negative_{number}": text for number, text in enumerate(row["negative"], 1)}
    texts = {"anchor": row["anchor"], "positive": row["positive"], **negatives}
    return texts | {"label": [*row["pos_scores"], *row["neg_scores"]]}


def by_the_library(task: Set, model: str, contender: str, seed: int, folder: str) -> Trained:
    """A model trained by the library's own trainer, in float32."""
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from training import Job, stock_trainer, write_pairs

    from ebr_lib.model.adapters import merge_adapter

    place, knobs = Path(folder) / "pairs.jsonl", task.knobs
    prompts = knobs.get("prompt", {})
    if contender == KD:
        rows = taught(task, model)
        pairs = write_lines(place, map(as_the_library_reads, rows))
        prompts = prompts and prompts | dict.fromkeys(("negative_1", "negative_2"), prompts["positive"])
    else:
        pairs = write_pairs(place, task.pairs)
    job = Job(model, pairs, knobs["train_batch_size"], 0.1, knobs.get("max_seq_length", 128), seed)
    loss = {GIST: partial(gist, job), KD: ranking_and_teacher}.get(contender)
    trainer = stock_trainer(job, folder, epochs=knobs.get("num_epochs", 1), make_loss=loss, prompts=prompts)
    if contender != LIBRARY:
        trainer.args.batch_sampler = BatchSamplers.NO_DUPLICATES
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    merge_adapter(trainer.model)
    trainer.model.save_pretrained(f"{folder}/merged")
    return Trained(f"{folder}/merged", seconds, {})


def report(
    name: str, task: Set, model: str, contenders: Mapping[str, Mapping[str, Any]], *, seeds: int, results: Results
) -> None:
    """Print a row per contender, as soon as it is known."""
    columns = (*task.measures, "guard", "seconds", *FOUND)
    print("\n| contender | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for contender, knobs in contenders.items():
        once = contender in (UNTRAINED, *ONE_SEED)
        found = []
        for seed in range(1 if once else seeds):
            run = {"set": name, "contender": contender, "seed": seed, "knobs": knobs, "pairs": len(task.pairs)}
            found.append(results.find(**run) or results.add(run | score(task, model, contender, knobs, seed)))
        print(row(contender, columns, found), flush=True)


def score(task: Set, model: str, contender: str, knobs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train one contender with one seed, and judge it."""
    if contender == UNTRAINED:
        return judged_twice(task, model)
    with tempfile.TemporaryDirectory() as folder:
        if contender in ONE_SEED:
            run = by_the_library(task, model, contender, seed, folder)
        else:
            ours = partial(trained, task, model, knobs, seed, folder)
            run = without_duplicates(ours) if contender == NO_DUPLICATES else ours()
        return judged_twice(task, run.folder) | {"seconds": run.seconds} | run.found


def row(name: str, columns: Sequence[str], found: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds."""
    cells = []
    for column in columns:
        values = [scores[column] for scores in found if column in scores]
        digits = 0 if column == "seconds" else 4
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
