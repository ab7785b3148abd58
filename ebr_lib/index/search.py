"""Search an index."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pandas as pd

from ebr_lib.data.advice import Advice, Reranking
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError, UserError
from ebr_lib.index import store
from ebr_lib.index.after import NO_FUSION, After, advice_in, text_column, words_column
from ebr_lib.index.config import NO_RERANKER, SearchConfig
from ebr_lib.index.filters import allowed_values, check_unicode
from ebr_lib.index.opened import Opened, opened
from ebr_lib.index.store import NO_ROWS
from ebr_lib.logs import RESULT, logger, warn_once
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.packaged import model_label
from ebr_lib.model.provenance import Provenance, check_same_code, say_changed_files, weights_of
from ebr_lib.model.reranker import Scores, is_here, load_reranker
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.names import Asked, Choice, FusionChoice, Hub, OnChangedVectors
from ebr_lib.tables import as_html, as_text, make_table

if TYPE_CHECKING:
    from ebr_lib.model.encoder import Encoder


RERANKED_ROWS = 50  # as in evaluation, where nothing else is known
_loading = threading.Lock()  # a server's threads load a reranker once
SHOWN = 100  # half-width columns of a kept text that a table shows


class SearchResult(pd.DataFrame):
    """What a query found, best first: rank, score (cosine) and the kept columns, which are texts or null.

    The index is the row number, as `delete_rows` takes it. `attrs` has `query`, `milliseconds`, which include the
    encoding of the query, `text_column`, the column that was encoded, and what the order is by if not by the score:
    `order`, and `why`.
    """

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def query_spec(manifest: Mapping[str, Any], dim: int, model_name: str | None, **knobs: Any) -> EncoderSpec:
    """How to encode queries for an index: with the model that made it, cut to its dimension.

    If the model is not known nothing is cut: another dimension then most likely means another model.
    """
    maker = Provenance.of(manifest)
    moved = maker.path is None or not Path(maker.path).is_dir()
    name = model_name or (maker.name if moved else maker.path)
    if name is None:
        raise ModelError("which model made these vectors is not known (they had no manifest); give model_name")
    return EncoderSpec(
        model_name=name,
        max_seq_length=maker.max_seq_length,
        truncate_dim=dim if maker.sha256 else None,
        precision=cast(Asked, maker.precision) if maker.precision in get_args(Asked) else "auto",
        backend="torch",  # converting a model takes longer than encoding a few queries
        **knobs,
    )


@functools.lru_cache(maxsize=2)
def query_encoder(spec: EncoderSpec, maker: Provenance, dim: int, where: str) -> Encoder:
    """The query encoder of an index, cached, so that the next search does not load the model again.

    :raises ModelError: the model is not the one that made the vectors, or has fewer dimensions.
    """
    check_same_code(maker, spec.model_name, spec.trust_remote_code)
    encoder = spec.encoder("query")
    found = weights_of(spec.model_name)
    advice = "give the model that made them, or encode and index again with this one"
    if maker.sha256 is None:
        logger.warning(
            "%s: 未知由哪个模型生成 which model made these vectors is not known; assumed: %s", where, spec.model_name
        )
    elif not maker.weights & found:
        raise ModelError(
            f"{where} holds vectors of model {maker.name} (weights sha256 {maker.sha256[:12]}…), but "
            f"{spec.model_name} has {', '.join(f'{sha[:12]}…' for sha in sorted(found)) or 'none'}: "
            f"their vectors cannot be compared; {advice}"
        )
    say_changed_files(maker, spec.model_name, where, spec.on_changed_vectors)
    if encoder.dim != dim:
        raise ModelError(f"{where} holds vectors of {dim} dimensions, {spec.model_name} makes {encoder.dim}; {advice}")
    return encoder


def search(
    index: str | Path | Opened,
    query: str | None = None,
    k: int = 10,
    *,
    like: str | Sequence[str] | None = None,
    id_column: str | None = None,
    where: Mapping[str, object] | None = None,
    distinct: bool | None = None,
    diversity: float = 0.0,
    fusion: FusionChoice = "auto",
    bm25_weight: float | None = None,
    reranker_name: str | None = "auto",
    rerank_depth: int | None = None,
    model_name: str | None = None,
    query_prompt: str | None = None,
    trust_remote_code: Choice = False,
    base_model_path: str | Sequence[str] | None = None,
    hub: Hub = "auto",
    on_changed_vectors: OnChangedVectors = "error",
) -> SearchResult:
    """Find the k rows nearest to a query, or to rows of the index. Index and model stay loaded for the next search.

    An index built with `hybrid` has two rankers, vectors and BM25, which see the same allowed rows and are then fused;
    a reranker, if there is one, reorders the best rows after that. The score is the cosine to the query all the same.
    Both are what evaluation recommended when the index was built, unless they are given.

    :param index: an index folder, or an opened one (`open_index`).
    :param query: the text to search for; None if `like` is given.
    :param like: find rows similar to the one with this id, or to the mean of several, as their vectors are in the
        index; these rows, and rows with the same vector, are not found. No model is loaded.
    :param id_column: the kept column that holds the ids of `like`; None takes the index's.
    :param where: filter on kept columns: column to the allowed value or values. Numbers mean their texts, None and NaN
        mean null.
    :param distinct: of rows with the same vector find only the first; None does so if `like` or `diversity` is given.
    :param diversity: from 0, the nearest, towards 1, those unlike what was found before: the next row has the largest
        (1 - diversity) · cosine to the query - diversity · largest cosine to the rows before it (maximal marginal
        relevance; Carbonell and Goldstein, SIGIR 1998), among the first 5 · k. Where the order is not that of cosines,
        what orders the rows, scaled to 0 to 1, counts for the cosine to the query.
    :param fusion: rrf, weighted or none; auto does what the index says, see `IndexConfig`. With `like`, BM25 looks for
        the words of these rows.
    :param bm25_weight: BM25's part in a weighted sum; None takes what evaluation chose.
    :param reranker_name: a cross-encoder that reorders the best rows; auto takes the one that evaluation recommends, if
        it is on this machine, and none with `like`, which evaluation does not measure; None or none uses none.
    :param rerank_depth: rows that it reads; None takes what evaluation measured, or else 50.
    :param model_name: the model, if it is not where the index's manifest says.
    :param query_prompt: put before the query; None takes what the model was trained with.
    :param trust_remote_code: as when the index's vectors were made; see `load_model`.
    :param base_model_path: where the base of a fine-tuned model is now, if it was moved.
    :param hub: where a model that is not here is downloaded from: auto, huggingface or modelscope.
    :param on_changed_vectors: raise an error when the model is no longer what it was, or only warn.
    :raises ConfigError: `k` is not a whole number from 1, `diversity` not from 0 to 1, `where` not a mapping, or both
        `query` and `like` are given; fusion with an index that keeps no BM25, or without a weight.
    :raises ModelError: the model is not the one that made the index's vectors.
    :raises DataError: a blank query, an id that no row has, a filter on a column that is not kept, a damaged index.
    :raises MissingError: there is no index at this place.
    """
    if query is not None and like is not None:
        raise ConfigError("search: give a query, or ids as like, and not both")
    text = _checked_query(query) if like is None else f"like {like}"
    if not 0 <= diversity < 1:
        raise ConfigError(f"diversity: {diversity!r}; wanted a number from 0 to below 1")
    for name, value in (("k", k), ("rerank_depth", 1 if rerank_depth is None else rerank_depth)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ConfigError(f"{name}: {value!r}; wanted a whole number from 1")
    allowed = allowed_values({} if where is None else where)
    held = opened(str(index), store.index_stamp(index)) if isinstance(index, str | Path) else index
    look_for_models(base_model_path, hub)
    after = after_vectors(
        held,
        text,
        fusion,
        weight=bm25_weight,
        reranker=None if like is not None and reranker_name == "auto" else reranker_name,
        depth=rerank_depth,
        trust_remote_code=trust_remote_code,
    )
    start = time.perf_counter()
    if like is not None:
        own = held.rows_like([like] if isinstance(like, str) else list(like), id_column)
        vector = held.mean_vector(own)
        after = replace(after, text=" ".join(held.texts(own, after.column))) if after.column else after
    else:
        knobs = {
            "query_prompt": query_prompt,
            "trust_remote_code": trust_remote_code,
            "on_changed_vectors": on_changed_vectors,
        }
        spec = query_spec(held.manifest, held.dim, model_name, **knobs)
        encoder = query_encoder(spec, Provenance.of(held.manifest), held.dim, str(held.folder))
        own, start = NO_ROWS, time.perf_counter()
        vector = encoder.encode([text])[0]
    distinct = like is not None or diversity > 0 if distinct is None else distinct
    found = held.find(vector, int(k), allowed, hidden=own, distinct=distinct, diversity=diversity, after=after)
    milliseconds = 1000 * (time.perf_counter() - start)
    names = _answer_names([store.ROW, *held.columns])
    columns = ["rank", "score", *names.values()]
    rows = [(rank, score, *row.values()) for rank, (score, row) in enumerate(found, 1)]
    title = " · ".join(filter(None, [f"检索 search: {text}", after.said, held.unfinished]))
    table = make_table(title, columns, rows, width=SHOWN).set_index(names[store.ROW])
    result = SearchResult(table)
    encoded = Provenance.of(held.manifest).description_column
    result.attrs = table.attrs | {"query": text, "milliseconds": milliseconds, "text_column": encoded}
    result.attrs |= {"order": after.said, "why": after.why}
    return result


def after_vectors(
    held: Opened,
    query: str,
    fusion: FusionChoice = "auto",
    *,
    weight: float | None = None,
    reranker: str | None = None,
    depth: int | None = None,
    trust_remote_code: Choice = False,
) -> After:
    """What a search does after the vectors, as its knobs and the index say; see `search`.

    :raises ConfigError: the index keeps no BM25, evaluation chose no weight, or there is a depth and no reranker.
    :raises DataError: the index keeps no texts for the reranker.
    """
    advice, words = advice_in(held.manifest), words_column(held.manifest)
    chosen, reranking = _fusion(held, advice, fusion, weight), _reranking(held, advice, reranker, trust_remote_code)
    if depth is not None and reranking is None:
        raise ConfigError(NO_RERANKER)
    after = After(query, chosen, column=words or "", said=chosen.said if words else "")
    if reranking:
        step, column, scores = reranking
        most = depth or step.depth
        said = f"重排 re-ranked by {model_label(step.name)}, first {most}"
        said = ", ".join(filter(None, (after.said, said)))
        after = replace(after, scores=scores, depth=most, column=column, said=said)
    is_advised = (words and fusion == "auto") or (reranking and reranker == "auto")
    return replace(after, why=advice.why if is_advised else "")


def _fusion(held: Opened, advice: Advice, kind: FusionChoice, weight: float | None) -> Fusion:
    known, words = advice.fusion or NO_FUSION, words_column(held.manifest)
    if kind not in get_args(FusionChoice):
        raise ConfigError(f"fusion: {kind!r}; wanted auto, none, rrf or weighted")
    if weight is not None and (kind != "weighted" or not 0 <= weight <= 1):
        raise ConfigError(f"bm25_weight: {weight!r}; wanted a number from 0 to 1, with fusion: weighted")
    if kind == "auto" or (kind == known.kind and weight is None):
        return known
    if kind != "none" and not words:
        raise ConfigError(f"fusion: {kind}: {held.folder} keeps no BM25; build it again with hybrid: true")
    if kind == "weighted" and weight is None:
        raise ConfigError("fusion: weighted: no evaluation chose a weight for this index; give bm25_weight")
    return Fusion(kind, weight or 0.0)


def _reranking(
    held: Opened, advice: Advice, name: str | None, trust_remote_code: Choice
) -> tuple[Reranking, str, Scores] | None:
    """The reranker, the column that it reads, and its scores; None if there is none.

    One that evaluation recommends is left out, with a warning, where it would have to be downloaded or does not load.
    """
    known = Reranking(name or "none", RERANKED_ROWS) if name != "auto" else advice.reranking
    if known is None or known.name == "none":
        return None
    try:
        if name == "auto" and not is_here(known.name):
            raise MissingError(f"it is not on this machine; reranker_name: {known.name} downloads it")
        encoded = Provenance.of(held.manifest).description_column
        column = words_column(held.manifest) or text_column(held.folder, held.columns, encoded)
        return known, column, _reranker(known.name, trust_remote_code)
    except UserError as error:
        if name != "auto":
            raise
        warn_once(
            "%s: 未按评估的建议重排 not re-ranked by %s, as evaluation recommends (%s): %s; "
            "reranker_name: none stops this warning",
            held.folder, known.name, advice.why, str(error),
        )  # fmt: skip
        return None


def _reranker(name: str, trust_remote_code: Choice) -> Scores:
    with _loading:
        return _loaded_reranker(name, trust_remote_code)


@functools.lru_cache(maxsize=1)
def _loaded_reranker(name: str, trust_remote_code: Choice) -> Scores:
    return load_reranker(name, trust_remote_code=trust_remote_code)


def _checked_query(query: object) -> str:
    """The query, if it is a text with some words.

    :raises DataError: it is not.
    """
    if not isinstance(query, str):
        raise DataError(f"the query is {query!r}; wanted a text")
    if not query.strip():
        raise DataError("the query is blank; give some words")
    check_unicode("the query", query)
    return query


def _answer_names(columns: Sequence[str]) -> dict[str, str]:
    """Names of the kept columns in an answer, which has a rank and a score of its own: `score` becomes `score_kept`."""
    names = {}
    for name in columns:
        shown = name
        while shown in ("rank", "score") or (shown != name and shown in columns):
            shown += "_kept"
        names[name] = shown
    return names


def run_search(config: SearchConfig | Mapping[str, Any] | None = None) -> SearchResult:
    """The command `python -m ebr_lib search "…"`: search once and show the table.

    :raises ConfigError: a knob is unknown or out of range.
    """
    config = SearchConfig.resolve(config)
    where: dict[str, list[str | None]] = {}
    for condition in config.where:
        column, _, value = condition.partition("=")
        where.setdefault(column, []).append(None if value == "\\N" else value)
    result = search(
        config.index_dir,
        None if config.like else config.query,
        config.k,
        like=config.like or None,
        id_column=config.id_column,
        where=where,
        distinct=config.distinct,
        diversity=config.diversity,
        fusion=config.fusion,
        bm25_weight=config.bm25_weight,
        reranker_name=config.reranker_name,
        rerank_depth=config.rerank_depth,
        model_name=config.model_name,
        query_prompt=config.query_prompt,
        trust_remote_code=config.trust_remote_code,
        base_model_path=config.base_model_path,
        hub=config.hub,
        on_changed_vectors=config.on_changed_vectors,
    )
    logger.info("%s", result, extra=RESULT)
    if result.attrs["why"]:
        logger.info("排序 order: %s (%s)", result.attrs["order"], result.attrs["why"], extra=RESULT)
    return result
