"""Everything that it takes to make an encoder, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebr_lib.model.bases import given_bases, look_for_models, sides_have_own_weights
from ebr_lib.model.hubs import asked_hub
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.shapes import Side
from ebr_lib.names import Asked, Backend, Choice, Hub, OnChangedVectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ebr_lib.model.encoder import Encoder


@dataclass(frozen=True)
class EncoderSpec:
    """How to make an encoder, in plain values that can be sent to another process or machine.

    A prompt of None is the one that the model was trained with; for the others see `load_model` and `Encoder`.
    """

    model_name: str
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_seq_length: int | None = None
    normalize: bool = True
    truncate_dim: int | None = None
    precision: Asked = "auto"
    backend: Backend = "auto"
    batch_tokens: int | None = None
    device: str | None = None
    trust_remote_code: Choice = False
    on_changed_vectors: OnChangedVectors = "error"
    base_folders: tuple[str, ...] = field(default_factory=lambda: tuple(given_bases))  # for another process
    hub: Hub = field(default_factory=asked_hub)  # too

    def model(self, side: Side) -> SentenceTransformer:
        """Load the model, its adapter merged."""
        look_for_models(self.base_folders, self.hub)
        return load_model(
            self.model_name,
            trust_remote_code=self.trust_remote_code,
            max_seq_length=self.max_seq_length,
            device=self.device,
            side=side,
            merged=True,
            on_changed_vectors=self.on_changed_vectors,
        )

    def encoder(self, side: Side) -> Encoder:
        """Load the model and wrap it for queries or for documents."""
        from ebr_lib.model.encoder import Encoder

        model = self.model(side)
        return Encoder(
            model,
            prompt=prompt_of(model, side, self.query_prompt if side == "query" else self.document_prompt),
            normalize=self.normalize,
            truncate_dim=self.truncate_dim,
            precision=self.precision,
            batch_tokens=self.batch_tokens,
            backend=self.backend,
        )

    def encoder_pair(self) -> tuple[Encoder, Encoder]:
        """Encoders for queries and for documents, of one loaded model where both sides share their weights."""
        queries = self.encoder("query")
        if sides_have_own_weights(self.model_name):
            return queries, self.encoder("document")
        return queries, queries.with_prompt(prompt_of(queries.model, "document", self.document_prompt))
