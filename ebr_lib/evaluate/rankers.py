"""Who is measured: embedding models, and BM25 as the floor that a dense model has to beat."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.text import split_words
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.logs import logger
from ebr_lib.metrics import CHUNK, Ranking, rank_vectors
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import find_model
from ebr_lib.model.provenance import Provenance, changed_files, weights_of
from ebr_lib.model.spec import EncoderSpec

if TYPE_CHECKING:
    from ebr_lib.model.encoder import Encoder

BM25_NAME, BM25_K1, BM25_B = "BM25", 1.5, 0.75
_TOKEN = re.compile(r"\w+")


How = Mapping[str, object]
"""How a contender was used, for the report: prompts, precision and the like."""


def check_model(recipe: EncoderSpec, corpus: Corpus, *, load: bool) -> bool:
    """Whether the model's document vectors are stored, see `stored_vectors`; what cannot be measured is told here.

    :param load: load the model once to see that it can be.
    :raises MissingError: the model is not there.
    :raises ModelError: it does not load, or not with so many tokens.
    :raises DataError: the corpus holds other vectors, and no texts.
    """
    find_model(recipe.model_name)
    if load:
        recipe.model("query")
    return stored_vectors(recipe, corpus)


def rank_with_model(recipe: EncoderSpec, task: RetrievalTask, stored: bool) -> tuple[Ranking, How]:
    """Rank a task's documents by the inner product of unit vectors.

    :param stored: read the documents' vectors from the embedding file that is the corpus, else encode their texts; of
        either only a batch is in memory.
    """
    corpus = task.corpus
    if stored:
        maker = Provenance.of(read_manifest(corpus.vectors) or {}) if corpus.vectors else None
        cut = recipe.truncate_dim or (maker.dimension if maker else None)
        queries = replace(recipe, truncate_dim=cut).encoder("query")
        vectors = _encode_queries(queries, task, corpus)
        ranking = rank_vectors(vectors, corpus.vector_batches(), task.relevant, left_out=task.own)
        return ranking, _how(queries, maker.prompt if maker else None, f"vectors of {corpus.vectors}")
    queries, documents = recipe.encoder_pair()
    vectors = queries.encode(task.queries)
    ranking = rank_vectors(vectors, _encoded(documents, corpus, recipe.model_name), task.relevant, left_out=task.own)
    return ranking, _how(queries, documents.prompt, "encoded")


def _how(queries: Encoder, document_prompt: str | None, documents: str) -> How:
    return {
        "query prompt": queries.prompt,
        "document prompt": "unknown" if document_prompt is None else document_prompt,
        "precision": queries.precision,
        "backend": queries.backend,
        "max_seq_length": queries.model.max_seq_length,
        "dimensions": queries.dim,
        "documents": documents,
    }


def _encode_queries(encoder: Encoder, task: RetrievalTask, corpus: Corpus) -> NDArray[np.float32]:
    dim = next(corpus.vector_batches()).shape[1] if corpus.vectors else encoder.dim
    if dim != encoder.dim:
        raise ConfigError(
            f"corpus {corpus.vectors} holds vectors of {dim} dimensions, the queries' have {encoder.dim}; "
            "set truncate_dim as it was in the inference run"
        )
    return encoder.encode(task.queries)


def stored_vectors(recipe: EncoderSpec, corpus: Corpus) -> bool:
    """Whether the corpus is an embedding file of this model, made as is wanted now; without a manifest that has to be
    believed where there are no texts.

    :raises DataError: it is not, and there are no texts to encode.
    """
    if corpus.vectors is None:
        return False
    maker = Provenance.of(read_manifest(corpus.vectors) or {})
    told = {
        "prompt": recipe.document_prompt,
        "max_seq_length": recipe.max_seq_length,
        "precision": None if recipe.precision == "auto" else recipe.precision,
        "dimension": recipe.truncate_dim,
        "description_column": corpus.column if maker.description_column else None,
    }
    if maker.sha256 is None and corpus.texts is None:
        logger.warning("%s has no manifest: taken to be vectors of %s", corpus.vectors, recipe.model_name)
        return True
    wrong = [] if maker.weights & weights_of(recipe.model_name) else [f"made by {maker.said}"]
    choice = check_remote_code(recipe.model_name, recipe.trust_remote_code)
    if maker.trust_remote_code not in (None, choice):
        wrong += maker.differences({"trust_remote_code": choice})
    if not wrong and maker.sha256 and changed_files(maker, recipe.model_name):
        wrong.append("its configs, tokenizer, pooling or .py files were others")
    wrong += maker.differences(told)
    if wrong and corpus.texts is None:
        raise DataError(
            f"{corpus.vectors} holds vectors that are not those wanted of {recipe.model_name} ({'; '.join(wrong)}) "
            "and no texts to encode; keep the text column in the inference run"
        )
    if wrong:
        logger.info("%s: its texts are encoded for %s (%s)", corpus.vectors, recipe.model_name, "; ".join(wrong))
    return not wrong


def _encoded(encoder: Encoder, corpus: Corpus, name: str) -> Iterator[NDArray[np.float32]]:
    from tqdm.auto import tqdm

    assert corpus.texts is not None
    with tqdm(total=len(corpus), desc=f"编码语料 encode {name}", unit="doc", delay=2, leave=False) as bar:
        for start in range(0, len(corpus), CHUNK):
            texts = corpus.texts[start : start + CHUNK]
            yield encoder.encode(texts)
            bar.update(len(texts))


# --- BM25 ---------------------------------------------------------------------------------------------------------


def bm25_tokens(text: str, stopwords: frozenset[str]) -> list[str]:
    """Lower-case words, Chinese ones by jieba, without punctuation and stop words."""
    words = (token for word in split_words(text.casefold()) for token in _TOKEN.findall(word))
    return [word for word in words if word not in stopwords]


def check_bm25(corpus: Corpus) -> None:
    """Check that there are texts.

    :raises DataError: the corpus holds none.
    """
    if corpus.texts is None:
        raise DataError(f"{corpus.vectors} holds no texts for BM25; set bm25 to false, or keep the text column")


def rank_with_bm25(task: RetrievalTask) -> Ranking:
    """Rank by BM25 (Lucene's form); a document that shares no word with the query is not retrieved.

    :raises DataError: the corpus holds no texts.
    """
    import bm25s
    from bm25s.stopwords import STOPWORDS_CHINESE, STOPWORDS_EN
    from tqdm.auto import tqdm

    check_bm25(task.corpus)
    assert task.corpus.texts is not None
    stopwords = frozenset(STOPWORDS_EN) | frozenset(STOPWORDS_CHINESE)
    documents = tqdm(task.corpus.texts, desc="BM25", unit="doc", delay=2, leave=False)
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    vocabulary: dict[str, int] = {}
    # numbers, not texts: a word is held once, however often it stands in the corpus
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in bm25_tokens(t, stopwords)] for t in documents]
    ranking = Ranking(task.relevant, left_out=task.own)
    if not vocabulary:
        return ranking
    index.index((words, vocabulary), show_progress=False)
    del words
    for number, query in enumerate(tqdm(task.queries, desc="BM25", unit="query", delay=2, leave=False)):
        tokens = [token for token in bm25_tokens(query, stopwords) if token in index.vocab_dict]
        if tokens:
            scores = index.get_scores(tokens).astype(np.float32)
            ranking.add(np.where(scores > 0, scores, np.float32("-inf"))[None, :], number, 0)
    return ranking


def labels(names: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Short, distinct labels for model names: the last part of the path, or as much of it as tells them apart and from
    those that are taken."""
    parts = [name.rstrip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)) and not set(short) & set(taken):
            return short
    return [f"./{name}" if name in taken else name for name in names]
