"""Who is measured: embedding models, and BM25 as the floor that they have to beat."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ebr_lib.arrays import Vectors
from ebr_lib.data.bm25 import K1, B, Bm25
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import is_exact
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.logs import logger
from ebr_lib.metrics import CHUNK, Ranking, rank_vectors
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.provenance import Provenance, changed_files, weights_of
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.model.unfit import unfit_advice

if TYPE_CHECKING:
    from ebr_lib.model.encoder import Encoder

BM25_NAME, PER_QUERY = "BM25", "milliseconds per query"

How = Mapping[str, object]
"""The settings of a ranker, for the report: prompts, precision and so on."""


def labels(names: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Short, distinct labels for model names: as many of the path's last parts as distinguish them from each other and
    from `taken`."""
    parts = [name.rstrip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)) and not set(short) & set(taken):
            return short
    return [f"./{name}" if name in taken else name for name in names]


def rank_with_model(
    spec: EncoderSpec, task: RetrievalTask, stored: bool, keep: list[Vectors] | None = None
) -> tuple[Ranking, How]:
    """Rank a task's documents by the inner product of unit vectors, a batch of documents in memory at a time.

    :param stored: read the documents' vectors from the embedding file that is the corpus; otherwise encode the texts.
    :param keep: takes the vectors of the queries, then those of each batch of documents.
    :raises ConfigError: the stored vectors have other dimensions than the queries'.
    """
    corpus = task.corpus
    documents: Iterable[Vectors]
    if stored:
        maker = Provenance.of(read_manifest(corpus.vectors) or {}) if corpus.vectors else None
        cut = spec.truncate_dim or (maker.dimension if maker else None)
        queries = replace(spec, truncate_dim=cut).encoder("query")
        dim = next(corpus.vector_batches()).shape[1]
        if dim != queries.dim:
            raise ConfigError(
                f"corpus {corpus.vectors} holds vectors of {dim} dimensions, the queries' have {queries.dim}; "
                "set truncate_dim as it was in the inference run"
            )
        documents, prompt, source = corpus.vector_batches(), maker.prompt if maker else None, "vectors of"
    else:
        queries, encoder = spec.encoder_pair()
        documents, prompt, source = _encoded(encoder, corpus, spec.model_name), encoder.prompt, "encoded"
    own = task.query_prompts if spec.query_prompt is None else ()
    vectors = queries.encode_each(task.queries, own or [None] * len(task.queries))
    if keep is not None:
        keep += [vectors, *documents]
        documents = keep[1:]
    ranking = rank_vectors(vectors, documents, task.relevant, left_out=task.own)
    unknown = max(side.stats.unknown_share for side in ([queries] if stored else [queries, encoder]))
    if advice := unfit_advice(unknown):
        logger.warning("%s: %s", spec.model_name, advice)
    several = dict.fromkeys(queries.prompt if prompt is None else prompt for prompt in own) or [queries.prompt]
    return ranking, {
        "query prompt": " | ".join(several),
        "document prompt": "unknown" if prompt is None else prompt,
        "precision": queries.precision,
        "backend": queries.backend,
        "max_seq_length": queries.model.max_seq_length,
        "dimensions": queries.dim,
        "unknown tokens": f"{unknown:.1%}",
        "documents": f"{source} {corpus.vectors}" if stored else source,
    }


def stored_vectors(spec: EncoderSpec, corpus: Corpus, *, exact: bool = False) -> bool:
    """Whether the corpus is an embedding file of this model with these settings; without a manifest that is assumed
    when there is no text.

    :param exact: vectors that are stored in fewer bytes than float32 do not count.
    :raises DataError: it is not, and there are no texts to encode.
    """
    if corpus.vectors is None:
        return False
    maker = Provenance.of(read_manifest(corpus.vectors) or {})
    rounded = ["stored in fewer bytes than float32"] if exact and not is_exact(corpus.vectors) else []
    if maker.sha256 is None and corpus.texts is None and not rounded:
        logger.warning("%s 没有清单 has no manifest: assumed to be vectors of %s", corpus.vectors, spec.model_name)
        return True
    wrong = rounded if maker.weights & weights_of(spec.model_name) else [*rounded, f"made by {maker.said}"]
    code = check_remote_code(spec.model_name, spec.trust_remote_code)
    if maker.trust_remote_code is not None:
        wrong += maker.differences({"trust_remote_code": code})
    if not wrong and maker.sha256 and changed_files(maker, spec.model_name):
        wrong.append("its configs, tokenizer, pooling or .py files were different")
    wrong += maker.differences({
        "prompt": spec.document_prompt,
        "max_seq_length": spec.max_seq_length,
        "precision": None if spec.precision == "auto" else spec.precision,
        "dimension": spec.truncate_dim,
        "description_column": corpus.column if maker.description_column else None,
    })  # fmt: skip
    if wrong and corpus.texts is None:
        raise DataError(
            f"{corpus.vectors} holds other vectors than {spec.model_name} makes now ({'; '.join(wrong)}) and no "
            "texts to encode; keep the text column in the inference run"
        )
    if wrong:
        logger.info(
            "%s: 重新编码文本 its texts are encoded for %s (%s)", corpus.vectors, spec.model_name, "; ".join(wrong)
        )
    return not wrong


def _encoded(encoder: Encoder, corpus: Corpus, name: str) -> Iterator[Vectors]:
    from tqdm.auto import tqdm

    assert corpus.texts is not None
    with tqdm(total=len(corpus), desc=f"编码语料 encode {name}", unit="doc", delay=2, leave=False) as bar:
        for start in range(0, len(corpus), CHUNK):
            texts = corpus.texts[start : start + CHUNK]
            yield encoder.encode(texts)
            bar.update(len(texts))


# --- BM25 ---------------------------------------------------------------------------------------------------------


def check_texts(corpus: Corpus, reader: str, knob: str) -> None:
    """Check that there are texts for a ranker that reads them.

    :raises DataError: the corpus holds none.
    """
    if corpus.texts is None:
        raise DataError(f"{corpus.vectors} holds no texts for {reader}; {knob}, or keep the text column")


def rank_with_bm25(task: RetrievalTask) -> tuple[Ranking, How]:
    """Rank by BM25; a document that shares no word with the query is not retrieved."""
    from tqdm.auto import tqdm

    assert task.corpus.texts is not None
    index = Bm25(task.corpus.texts)
    ranking, start = Ranking(task.relevant, left_out=task.own), time.perf_counter()
    for number, query in enumerate(tqdm(task.queries, desc="BM25", unit="query", delay=2, leave=False)):
        if (scores := index.scores(query)) is not None:
            ranking.add(scores[None, :], number, 0)
    milliseconds = (time.perf_counter() - start) / len(task.queries) * 1e3
    return ranking, {"k1": K1, "b": B, PER_QUERY: round(milliseconds, 2)}
