"""The held-out anchors as a small retrieval task, and how well a model does on it."""

from __future__ import annotations

import functools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Encode, Floats, Vectors
from ebr_lib.data.pairs import TrainingRow, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.finetune.prompts import own_prompts
from ebr_lib.names import METRICS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ebr_lib.model.encoder import Encoder
    from ebr_lib.names import Backend

GroupMeans = Mapping[str, Mapping[str, float]]
"""Group of queries ("all", "seen", "unseen") to metric to mean."""


@dataclass(frozen=True)
class HeldoutTask:
    """Queries, documents, and what answers what."""

    queries: tuple[str, ...]  # held-out anchors, equal ones once
    documents: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]  # the numbers of the documents that answer each query
    seen: tuple[bool, ...]  # whether a training row has the text of one of the query's answers, in any column
    own: tuple[frozenset[int], ...] = ()  # documents equal to the query, neither its answers nor competitors
    without_answer: int = 0  # anchors with no other answer, which are not measured
    prompts: Mapping[str, str] = field(default_factory=dict)  # the own prompts of queries that have one

    def seen_by(self, texts: Collection[str]) -> HeldoutTask:
        """The same task for a training that has seen these texts (normalised)."""
        known = [normalised(document) in texts for document in self.documents]
        return replace(self, seen=tuple(any(known[number] for number in answers) for answers in self.relevant))

    def texts_of(self, chosen: NDArray[np.bool_]) -> set[str]:
        """The normalised texts of these queries."""
        return {normalised(query) for query, is_chosen in zip(self.queries, chosen, strict=True) if is_chosen}

    def measure(self, encode_queries: Encode, encode_documents: Encode) -> dict[str, Floats]:
        """Each metric of `METRICS`, one value per query."""
        from ebr_lib.metrics import evaluate_vectors

        grades = [dict.fromkeys(answers, 1) for answers in self.relevant]
        queries, documents = encode_queries(self.queries), encode_documents(self.documents)
        values = evaluate_vectors(queries, documents, grades, ks=(1, 10), left_out=self.own)
        return {name: values[name] for name in METRICS}

    def measure_model(
        self, model: SentenceTransformer, query_only: bool = False, backend: Backend = "auto"
    ) -> dict[str, Floats]:
        """A model's metrics, one value per query; with `query_only` documents are encoded without the adapter."""
        return self.measure(*encoders_of(model, query_only, backend=backend, own_prompts=self.prompts))

    def means(self, values: Mapping[str, Floats], among: NDArray[np.bool_] | None = None) -> GroupMeans:
        """Means over all queries, over those whose documents training has seen, and over the others.

        :param among: the queries that count, shape (queries,); None counts all.
        """
        seen = np.asarray(self.seen, dtype=bool)
        counted = np.ones_like(seen) if among is None else among
        groups = {"all": counted, "seen": seen & counted, "unseen": ~seen & counted}
        return {
            group: {"queries": int(chosen.sum())}
            | {name: float(value[chosen].mean()) for name, value in values.items()}
            for group, chosen in groups.items()
            if chosen.any()
        }


def encoders_of(
    model: SentenceTransformer,
    query_only: bool,
    *,
    backend: Backend = "auto",
    show_bar: bool = False,
    own_prompts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Encode, Encode]:
    """Functions that encode queries and documents, each with its prompt; `query_only` encodes documents with the base.

    Both use the weights as they are at the first call.

    :param own_prompts: query to its own prompt, for queries that have one.
    """
    from ebr_lib.finetune.losses import base_model_only
    from ebr_lib.model.encoder import Encoder
    from ebr_lib.model.loading import prompt_of

    @functools.cache
    def of_queries() -> Encoder:
        return Encoder(model, prompt=prompt_of(model, "query"), backend=backend)

    def encode_queries(texts: Sequence[str]) -> Vectors:
        return of_queries().encode_each(texts, [own_prompts.get(text) for text in texts], show_bar)

    def encode_documents(texts: Sequence[str]) -> Vectors:
        prompt = prompt_of(model, "document")
        if not query_only:
            return of_queries().with_prompt(prompt).encode(texts, show_bar)
        with base_model_only(model):
            return Encoder(model, prompt=prompt, backend=backend).encode(texts, show_bar)

    return encode_queries, encode_documents


def build_task(
    heldout: Sequence[TrainingRow],
    train: Sequence[TrainingRow],
    corpus_size: int,
    seed: int,
    leave_out_own: bool = True,
) -> HeldoutTask:
    """Make the task from held-out rows; texts are one if they are equal once `normalised`.

    :param train: training rows; a sample of their positives joins the corpus as distractors.
    :param corpus_size: number of documents; those of the held-out pairs are always in, even beyond it.
    :param seed: seed of the sample.
    :param leave_out_own: a document equal to the anchor is neither its answer nor a competitor.
    """
    answers: dict[str, set[str]] = {}
    anchors: dict[str, str] = {}
    texts: dict[str, str] = {}
    for row in heldout:
        query, document = normalised(row.anchor), normalised(row.positive)
        anchors.setdefault(query, row.anchor)
        answers.setdefault(query, set()).add(document)
        texts.setdefault(document, row.positive)
    trained = {normalised(row.positive): row.positive for row in train}
    others = sorted(set(trained) - set(texts))
    room = max(0, corpus_size - len(texts))
    chosen = others if len(others) <= room else random.Random(seed).sample(others, room)
    texts |= {key: trained[key] for key in chosen}
    number = {key: i for i, key in enumerate(texts)}
    own = {query: {query} & number.keys() if leave_out_own else set() for query in anchors}
    measured = [query for query in anchors if answers[query] - own[query]]
    task = HeldoutTask(
        queries=tuple(anchors[query] for query in measured),
        documents=tuple(texts.values()),
        relevant=tuple(frozenset(number[key] for key in answers[query] - own[query]) for query in measured),
        seen=(),
        own=tuple(frozenset(number[key] for key in own[query]) for query in measured),
        without_answer=len(anchors) - len(measured),
        prompts=own_prompts(heldout),
    )
    return task.seen_by(texts_of(train))
