"""EBR workflow: fine-tune an embedding model, encode a catalogue, see it, measure retrieval, search.

The stages and their configs are loaded on first use, so that `import ebr_lib` and `--help` stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebr_lib.config import (
        EvalConfig,
        FinetuneConfig,
        IndexConfig,
        InferenceConfig,
        SearchConfig,
        VisConfig,
        check_configs,
    )
    from ebr_lib.evaluate import evaluate_retrieval
    from ebr_lib.finetune import train_sentence_transformer
    from ebr_lib.index import add_rows, build_faiss_index, delete_rows, search
    from ebr_lib.inference import run_batch_inference
    from ebr_lib.logs import show_logs
    from ebr_lib.visualize import visualize_embeddings

_HOMES = {
    "train_sentence_transformer": "finetune",
    "run_batch_inference": "inference",
    "visualize_embeddings": "visualize",
    "evaluate_retrieval": "evaluate",
    "build_faiss_index": "index",
    "search": "index",
    "add_rows": "index",
    "delete_rows": "index",
    "FinetuneConfig": "config",
    "InferenceConfig": "config",
    "VisConfig": "config",
    "EvalConfig": "config",
    "IndexConfig": "config",
    "SearchConfig": "config",
    "check_configs": "config",
    "show_logs": "logs",
}

__all__ = [
    "EvalConfig",
    "FinetuneConfig",
    "IndexConfig",
    "InferenceConfig",
    "SearchConfig",
    "VisConfig",
    "add_rows",
    "build_faiss_index",
    "check_configs",
    "delete_rows",
    "evaluate_retrieval",
    "run_batch_inference",
    "search",
    "show_logs",
    "train_sentence_transformer",
    "visualize_embeddings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ebr_lib' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ebr_lib.{_HOMES[name]}"), name)
