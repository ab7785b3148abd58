"""Encoding on this machine: in this process, or one process a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.engines.job import EncodeReport

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderRecipe:
    """How to make an encoder, in plain values that another process or machine can be told."""

    model_name: str
    trust_remote_code: bool = False
    prompt: str | None = None
    max_seq_length: int | None = None
    normalize: bool = True
    truncate_dim: int | None = None
    precision: str = "auto"
    batch_tokens: int = 4096
    device: str | None = None


class LocalEncoder:
    """The model in this process."""

    def __init__(self, recipe: EncoderRecipe) -> None:
        from ebr_lib.model.loading import load_model, prompt_of

        self.model: SentenceTransformer = load_model(
            recipe.model_name,
            trust_remote_code=recipe.trust_remote_code,
            max_seq_length=recipe.max_seq_length,
            device=recipe.device,
            side="document",
        )
        self.trained_prompt = prompt_of(self.model, "document")
        self.prompt = prompt_of(self.model, "document", recipe.prompt)
        self.max_seq_length = int(self.model.max_seq_length)
        self._recipe = recipe
        self.precision = "float32"
        self.dim = recipe.truncate_dim or int(self.model.get_embedding_dimension())

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.model.encode(
            list(texts),
            prompt=self.prompt or None,
            normalize_embeddings=self._recipe.normalize,
            truncate_dim=self._recipe.truncate_dim,
            show_progress_bar=False,
        )

    def take_report(self) -> EncodeReport:
        return EncodeReport(Counter(), [])
