"""Hard negatives: documents near an anchor and not known to answer it, found by the library's miner."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ebr_lib.arrays import Encode, Floats, Ints, Vectors
from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import normalised
from ebr_lib.finetune.pool import Pairs, Pool
from ebr_lib.finetune.reranking import accepted, highest_allowed
from ebr_lib.logs import logger
from ebr_lib.model.reranker import Scores
from ebr_lib.names import MiningChoice
from ebr_lib.tables import as_text, make_table, shortened

_CELLS = 1 << 22  # cells of the miner's score table at a time: a few hundred MB


def mine_hard_negatives(
    rows: Sequence[TrainingRow],
    encode_queries: Encode,
    encode_documents: Encode,
    *,
    count: int,
    first_rank: int,
    last_rank: int,
    margin: float | None,
    catalogue: Catalogue | None = None,
    choice: MiningChoice = "top",
    seed: int = 0,
    reranker: Scores | None = None,
    reranker_margin: float = 0.0,
    dropped: Sequence[TrainingRow] = (),
) -> list[TrainingRow]:
    """Give each row up to `count` hard negatives, after its own; rows for which fewer are found are kept too.

    The documents are those of the rows, negatives included, and of the catalogue; equal texts (`normalised`) are one.
    For each anchor they are ranked by cosine, exactly, without those that `KnownPositives` knows to answer it: rank 1
    is the nearest. Candidates are the ranks from `first_rank` to `last_rank` that the row does not have yet and whose
    cosine is at most p − margin · |p|, where p is the lowest cosine of the anchor's known positives (NV-Retriever's
    "percentage of the positive", arXiv 2407.15831).

    :param encode_queries: returns vectors of length one, as `encode_documents` does.
    :param margin: None takes documents however near.
    :param choice: `top` takes the nearest candidates, `random` draws them by the seed and the row's number.
    :param reranker: leaves out candidates that it scores as high as the anchor's lowest positive, less
        `reranker_margin`: they are likely answers that nobody labelled.
    :param dropped: rows that are not trained on; their positives are not mined for their anchors.
    """
    pool = Pool(rows, encode_queries, encode_documents, catalogue)
    logger.info("挖掘难负例 mining hard negatives: %d anchors, %d documents", len(pool.anchors), len(pool.texts))
    found = _far_enough(pool, first_rank, last_rank, margin)
    texts = [pool.texts[document] for document in found.document]
    preferred = _without_dropped(_candidates(found, pool), rows, texts, dropped)
    if choice == "random":
        preferred = [np.random.default_rng((seed, row)).permutation(places) for row, places in enumerate(preferred)]
    if reranker is None:
        taken = [np.sort(places[:count]) for places in preferred]
    else:
        limits = highest_allowed(rows, pool.known.anchors, reranker, reranker_margin)
        taken = _without_answers(preferred, count, rows, texts, reranker=reranker, limits=limits)
    mined = [
        dataclasses.replace(row, negatives=(*row.negatives, *(texts[place] for place in places)))
        for row, places in zip(rows, taken, strict=True)
    ]
    _log_outcome(mined, found.cosine, taken, count)
    return mined


# --- searching ----------------------------------------------------------------------------------------------------


class _Vectors:
    """A model for the miner whose texts are row numbers of these arrays: the miner copies texts freely."""

    device = torch.device("cpu")

    def __init__(self, queries: Vectors, documents: Vectors) -> None:
        self.queries, self.documents = queries, documents

    def get_embedding_dimension(self) -> int:
        return self.documents.shape[1]

    def encode_query(self, places: Sequence[int], **kwargs: Any) -> Vectors:
        return self.queries[places]

    def encode_document(self, places: Sequence[int], **kwargs: Any) -> Vectors:
        return self.documents[places]

    def similarity_pairwise(self, queries: Vectors, documents: Vectors) -> torch.Tensor:
        return torch.from_numpy(np.einsum("nd,nd->n", queries, documents))


class _Found(NamedTuple):
    """Candidates, shapes (found,), grouped by anchor, nearest first."""

    anchor: Ints
    document: Ints
    cosine: NDArray[np.float64]

    def at(self, places: NDArray[Any]) -> _Found:
        return _Found(self.anchor[places], self.document[places], self.cosine[places])


def _far_enough(pool: Pool, first: int, last: int, margin: float | None) -> _Found:
    """Each anchor's documents of ranks `first` to `last`, without known positives, that respect the margin."""
    vectors, pairs = _Vectors(pool.queries, pool.vectors), pool.pairs()
    last = min(last, len(vectors.documents))
    if first > last:
        return _Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    groups = _groups(np.bincount(pairs.anchor), last)
    chosen = (np.isin(pairs.anchor, group) for group in groups)
    parts = [_searched(vectors, Pairs(pairs.anchor[c], pairs.document[c]), first, last, margin) for c in chosen]
    anchor, document, cosine = map(np.concatenate, zip(*parts, strict=True))
    return _Found(anchor, document, cosine).at(np.argsort(anchor, kind="stable"))


def _groups(positives: Ints, window: int) -> Iterator[Ints]:
    """Anchors in groups whose score tables fit: one row each, as wide as the window plus the most positives of any."""
    order = np.argsort(positives, kind="stable")
    while len(order):
        cells = np.arange(1, len(order) + 1) * (window + positives[order])
        size = max(1, int(np.searchsorted(cells, _CELLS, side="right")))
        yield order[:size]
        order = order[size:]


def _searched(vectors: _Vectors, pairs: Pairs, first: int, last: int, margin: float | None) -> _Found:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives as library_miner

    # we apply the margin: the library removes near documents before it counts ranks, which moves the window; and its
    # n-tuple format drops every row that lacks a negative
    ranked: Any = library_miner(
        Dataset.from_dict({"anchor": pairs.anchor, "document": pairs.document}),
        vectors,
        corpus=list(range(len(vectors.documents))),
        range_min=first - 1,
        range_max=last,
        num_negatives=last - first + 1,
        output_format="labeled-pair",
        output_scores=True,
        use_faiss=True,
        verbose=False,
    ).with_format("numpy")
    found = _Found(ranked["anchor"][:], ranked["document"][:], ranked["score"][:].astype(np.float64))
    width = len(vectors.documents)
    answers = np.isin(found.anchor * width + found.document, pairs.anchor * width + pairs.document)
    return found.at(~answers & (found.cosine <= _highest_allowed(found, answers, margin)[found.anchor]))


def _highest_allowed(found: _Found, answers: NDArray[np.bool_], margin: float | None) -> NDArray[np.float64]:
    """The highest cosine that each anchor's negatives may have."""
    lowest = np.full(found.anchor.max() + 1, 2.0)  # above all cosines
    np.minimum.at(lowest, found.anchor[answers], found.cosine[answers])
    return lowest - margin * np.abs(lowest) if margin is not None else np.full_like(lowest, 2.0)


# --- handing out --------------------------------------------------------------------------------------------------


def _candidates(found: _Found, pool: Pool) -> list[Ints]:
    """For each row, the positions in `found` of the documents that are not yet its negatives, nearest first."""
    known, documents = pool.known, pool.documents[found.document]
    ends = np.searchsorted(found.anchor, np.arange(len(pool.anchors) + 1))
    candidates = []
    for anchor, own in zip(np.searchsorted(pool.anchors, known.anchors), known.columns[:, 1:], strict=True):
        places = np.arange(ends[anchor], ends[anchor + 1])
        candidates.append(places[~np.isin(documents[places], own)])
    return candidates


def _without_dropped(
    candidates: list[Ints], rows: Sequence[TrainingRow], texts: Sequence[str], dropped: Sequence[TrainingRow]
) -> list[Ints]:
    """The candidates, whose texts are `texts`, without those that a dropped row pairs with the anchor."""
    barred = defaultdict[str, set[str]](set)
    for row in dropped:
        barred[normalised(row.anchor)].add(normalised(row.positive))
    if not barred:
        return candidates
    kept = []
    for row, places in zip(rows, candidates, strict=True):
        answers = barred.get(normalised(row.anchor), set())
        kept.append(places[[normalised(texts[place]) not in answers for place in places]] if answers else places)
    return kept


def _without_answers(
    preferred: Sequence[Ints],
    count: int,
    rows: Sequence[TrainingRow],
    texts: Sequence[str],
    *,
    reranker: Scores,
    limits: Floats,
) -> list[Ints]:
    """The candidates that each row takes, without those that the reranker scores like an answer; log how many."""
    looked_at = answers = 0

    def fine(asked: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
        nonlocal looked_at, answers
        scores = reranker([(rows[row].anchor, texts[place]) for row, place in asked])
        below = scores < limits[[row for row, _ in asked]]
        looked_at, answers = looked_at + len(asked), answers + int((~below).sum())
        return below

    taken = accepted(preferred, count, fine)
    logger.info("重排模型认为是答案 taken for answers by the reranker: %d of %d candidates", answers, looked_at)
    return taken


def _log_outcome(rows: Sequence[TrainingRow], cosines: Floats, taken: Sequence[Ints], wanted: int) -> None:
    counts, cosines = np.array([len(places) for places in taken]), cosines[np.concatenate(taken)]
    lines = [
        ("行数 rows", f"{len(rows):,}"),
        ("挖到的负例 negatives found", f"{len(cosines):,}"),
        (f"不足 {wanted} 个的行 rows with fewer than {wanted}", f"{int((counts < wanted).sum()):,}"),
        ("一个也没有的行 rows with none", f"{int((counts == 0).sum()):,}"),
    ]
    if len(cosines):
        row = rows[int(np.argmax(counts))]
        lines += [
            ("与 anchor 的余弦 cosines with the anchors", f"{cosines.min():.3f} … {cosines.max():.3f}"),
            ("例 example: anchor", shortened(row.anchor, 60)),
            ("positive", shortened(row.positive, 60)),
            ("negative", shortened(row.negatives[-int(counts.max())], 60)),
        ]
    logger.info("%s", as_text(make_table("难负例 mined hard negatives", ("项目 what", "值 value"), lines)))
    if not len(cosines):
        logger.warning(
            "没有挖到难负例 no hard negatives found: raise mining_rank_max, or lower mining_rank_min or mining_margin"
        )
