"""Names that configs and parts share. They import nothing heavy, since `--help` reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name, to end a message with; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


Column = Literal["anchor", "positive", "negative"]
COLUMNS = get_args(Column)
"""Columns of a training row."""

OnBadRow = Literal["error", "skip"]
OnChangedVectors = Literal["error", "warn"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"]
MiningChoice = Literal["top", "random"]
NoiseKind = Literal["random_delete", "random_swap", "char_delete", "none"]

LANGUAGES = ("Chinese", "English", "mixed", "other")
"""Languages of texts, by script; see `language_of`."""

Metric = Literal["recall@1", "recall@10", "mrr@10", "ndcg@10"]
METRICS = get_args(Metric)
"""Measured on the held-out anchors."""

EvalMetric = Literal["ndcg@10", "mrr@10", "map@100", "recall@1", "recall@5", "recall@10", "recall@50", "recall@100"]
"""Of the evaluation stage: which one decides."""

LeaveOutOwn = Literal["text_and_id", "text", "none"]
"""Which documents count as the query itself, and so neither as its answers nor as competitors."""

BestMetric = Literal[Metric, "loss"]
LOWER_IS_BETTER = "loss"

# presets that advice points to
DEFAULT_PRESET = "configs/finetune/default.yaml"
LARGE_BATCH_PRESET = "configs/finetune/large_batch.yaml"
LOW_MEMORY_PRESET = "configs/finetune/low_memory.yaml"
SMALL_DATA_PRESET = "configs/finetune/small_data.yaml"
STRONG_PRESET = "configs/finetune/strong_regularization.yaml"
FULL_PRESET = "configs/finetune/full_regularization.yaml"

HELDOUT_FILE, CORPUS_FILE, QUERIES_FILE = "heldout.jsonl", "corpus.jsonl", "queries.jsonl"

VectorType = Literal["float32", "float16", "int8", "binary"]
"""Numbers that an embedding file holds; binary is one bit per dimension."""

Asked = Literal["auto", "float32", "bfloat16"]  # precision of encoding; float16 is for training on an older GPU
Backend = Literal["auto", "torch", "openvino"]  # library that runs the transformer when texts are encoded

FusionKind = Literal["none", "rrf", "weighted"]
FusionChoice = Literal["auto", FusionKind]
"""How a model's ranking and BM25's become one; auto: as evaluation recommends."""

Hub = Literal["auto", "huggingface", "modelscope"]  # where models that are not folders are downloaded from

Choice = bool | Literal["ignore"]
"""True: run the model's own code. "ignore": load the library's class of its type. False: refuse such a model."""
