"""EBR workflow: fine-tune an embedding model, encode a catalogue, see it, measure retrieval, search.

The stages and their configs are loaded on first use, so that `import ebr_lib` and `--help` stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebr_lib.config import check_configs as check_configs
    from ebr_lib.evaluate.config import EvalConfig as EvalConfig
    from ebr_lib.evaluate.run import evaluate_retrieval as evaluate_retrieval
    from ebr_lib.export.config import ExportConfig as ExportConfig
    from ebr_lib.export.run import export_model as export_model
    from ebr_lib.finetune.config import FinetuneConfig as FinetuneConfig
    from ebr_lib.finetune.run import train_sentence_transformer as train_sentence_transformer
    from ebr_lib.index.change import add_rows as add_rows
    from ebr_lib.index.change import delete_rows as delete_rows
    from ebr_lib.index.config import IndexConfig as IndexConfig
    from ebr_lib.index.config import SearchConfig as SearchConfig
    from ebr_lib.index.run import build_faiss_index as build_faiss_index
    from ebr_lib.index.search import search as search
    from ebr_lib.index.side_by_side import search_box as search_box
    from ebr_lib.index.side_by_side import search_examples as search_examples
    from ebr_lib.inference.config import InferenceConfig as InferenceConfig
    from ebr_lib.inference.run import run_batch_inference as run_batch_inference
    from ebr_lib.logs import show_logs as show_logs
    from ebr_lib.pairs.config import PairsConfig as PairsConfig
    from ebr_lib.pairs.run import make_training_pairs as make_training_pairs
    from ebr_lib.serve.config import ServeConfig as ServeConfig
    from ebr_lib.serve.run import serve_index as serve_index
    from ebr_lib.verify.config import VerifyConfig as VerifyConfig
    from ebr_lib.verify.run import verify_endpoint as verify_endpoint
    from ebr_lib.visualize.config import VisConfig as VisConfig
    from ebr_lib.visualize.run import visualize_embeddings as visualize_embeddings

__version__ = "0.1.0"

_HOMES = {
    "make_training_pairs": "pairs.run",
    "train_sentence_transformer": "finetune.run",
    "run_batch_inference": "inference.run",
    "visualize_embeddings": "visualize.run",
    "evaluate_retrieval": "evaluate.run",
    "build_faiss_index": "index.run",
    "search": "index.search",
    "search_examples": "index.side_by_side",
    "search_box": "index.side_by_side",
    "add_rows": "index.change",
    "delete_rows": "index.change",
    "PairsConfig": "pairs.config",
    "FinetuneConfig": "finetune.config",
    "InferenceConfig": "inference.config",
    "VisConfig": "visualize.config",
    "EvalConfig": "evaluate.config",
    "IndexConfig": "index.config",
    "SearchConfig": "index.config",
    "export_model": "export.run",
    "serve_index": "serve.run",
    "verify_endpoint": "verify.run",
    "ServeConfig": "serve.config",
    "ExportConfig": "export.config",
    "VerifyConfig": "verify.config",
    "check_configs": "config",
    "show_logs": "logs",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - type checkers read the imports above


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ebr_lib' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ebr_lib.{_HOMES[name]}"), name)
