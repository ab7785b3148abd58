"""What a search does after the vectors have found rows: fusion with BM25, a reranker, diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.advice import Advice
from ebr_lib.data.fusion import Candidates, Fusion, reranked_scores, scaled
from ebr_lib.data.queries import DOCUMENT_TEXTS
from ebr_lib.errors import DataError
from ebr_lib.metrics import KS
from ebr_lib.model.reranker import Scores

NO_FUSION = Fusion()
NO_ADVICE = Advice(NO_FUSION, None, "")
POOL = 5  # times k: nearest rows that diverse ones are chosen from
FUSED_ROWS = max(KS)  # of each ranker, as evaluation fuses them


def words_column(manifest: Mapping[str, Any]) -> str | None:
    """The kept column that BM25 reads; None for an index without BM25."""
    found = manifest.get("hybrid")
    return str(found["column"]) if found else None


def advice_in(manifest: Mapping[str, Any]) -> Advice:
    """What evaluation recommends to do after the vectors of an index, as its build kept it."""
    found = manifest.get("advice") or (manifest.get("hybrid") or {}).get("advice")  # where it was kept before
    return Advice.of(found) if found else NO_ADVICE


@dataclass(frozen=True)
class After:
    """What changes the order that the vectors give.

    :ivar text: the query, for BM25 and the reranker.
    :ivar scores: a reranker, which reads the `depth` best rows.
    :ivar column: the kept column that the reranker reads.
    :ivar said: the order in words, `why` it is that one; both empty for an index without BM25, and no reranker.
    """

    text: str = ""
    fusion: Fusion = NO_FUSION
    scores: Scores | None = None
    depth: int = 0
    column: str = ""
    said: str = ""
    why: str = ""

    @property
    def is_fused(self) -> bool:
        """Whether BM25 counts too."""
        return self.fusion.kind != "none"

    def rows(self, wanted: int) -> int:
        """How many rows the vectors have to find."""
        return max(wanted, FUSED_ROWS if self.is_fused else 0, self.depth if self.scores else 0)


VECTORS_ALONE = After()


@dataclass(frozen=True)
class Found:
    """Rows, best first: numbers, cosines to the query (-inf where not computed yet), and what orders them."""

    ids: Ints
    cosines: NDArray[np.floating]
    worth: NDArray[np.floating]

    def at(self, places: Ints | slice) -> Found:
        """The rows at these places."""
        return Found(self.ids[places], self.cosines[places], self.worth[places])


def ordered(
    found: Found,
    words: NDArray[np.float32] | None,
    after: After,
    *,
    query: Vectors,
    k: int,
    diversity: float,
    texts: Callable[[Ints, str], Sequence[str]],
    vectors: Callable[[Ints], Vectors],
) -> Found:
    """The k best rows: those that the vectors found, fused, reranked and made diverse.

    :param words: see `fused`; None if BM25 does not count.
    :param texts: gives the texts of rows in a column, and `vectors` the unit vectors of rows.
    """
    wanted = POOL * k if diversity else k
    if words is not None:
        found = fused(found, words, after, after.rows(wanted))
    if after.scores:
        found = reranked(found, texts(found.ids[: after.depth], after.column), after)
    found = found.at(slice(wanted))
    if diversity:
        found = diverse(found, vectors(found.ids), k, diversity, after)
    if (by_words := found.cosines == -np.inf).any():  # rows that BM25 alone has found
        found.cosines[by_words] = vectors(found.ids[by_words]) @ query
    return found


def fused(found: Found, words: NDArray[np.float32], after: After, most: int) -> Found:
    """Fuse the rows that the vectors found with those that BM25 finds.

    :param words: BM25's score of every row of the index, -inf for those that may not be found.
    :param most: rows that BM25 gives.
    """
    best = best_places(words, most)
    candidates = Candidates.of((found.ids[None], found.worth[None]), (best[None], words[best][None]))
    ids, cosines, worth = candidates.ids[0], candidates.first[0], after.fusion.scores(candidates)[0]
    order = np.lexsort((ids, -worth))
    return Found(ids, cosines, worth).at(order[ids[order] >= 0])


def best_places(scores: NDArray[np.float32], most: int) -> Ints:
    """Places of the highest scores, best first, without those of -inf."""
    there = np.flatnonzero(scores > -np.inf)
    if len(there) > most:
        there = there[scores[there] >= np.partition(scores[there], -most)[-most]]
    return there[np.argsort(-scores[there], kind="stable")][:most]


def reranked(found: Found, texts: Sequence[str], after: After) -> Found:
    """Put the first rows in the order of a reranker.

    :param texts: of the first `after.depth` rows.
    """
    assert after.scores is not None
    worth = reranked_scores(found.worth.astype(np.float64), after.scores([(after.text, text) for text in texts]))
    order = np.argsort(-worth, kind="stable")
    return Found(found.ids, found.cosines, worth).at(order)


def diverse(found: Found, vectors: Vectors, k: int, diversity: float, after: After) -> Found:
    """k of the rows by maximal marginal relevance, see `search`.

    :param vectors: unit vectors of the rows (rows, dim).
    """
    changed = after.is_fused or after.scores is not None
    worth = scaled(found.worth[None].astype(np.float64))[0] if changed else found.cosines
    return found.at(marginal(worth, vectors, k, diversity))


def marginal(scores: NDArray[np.floating], vectors: Vectors, k: int, diversity: float) -> Ints:
    """Places of k rows by maximal marginal relevance, see `search`; of equal ones the first.

    :param scores: cosines to the query (rows,).
    :param vectors: unit vectors (rows, dim).
    """
    chosen, nearest = list[int](), np.zeros(len(scores))
    left = np.ones(len(scores), bool)
    for _ in range(min(k, len(scores))):
        worth = np.where(left, (1 - diversity) * scores - diversity * nearest, -np.inf)
        best = int(worth.argmax())
        chosen.append(best)
        left[best] = False
        likeness = vectors @ vectors[best]
        nearest = likeness if len(chosen) == 1 else np.maximum(nearest, likeness)
    return np.array(chosen, np.int64)


def text_column(path: object, columns: Sequence[str], encoded: str | None, wanted: str | None = None) -> str:
    """The kept column that BM25 and rerankers read: `wanted`, or that of the texts that were encoded, or a usual one.

    :param encoded: the column that was encoded, if that is known.
    :raises DataError: it is not kept.
    """
    usual = (wanted,) if wanted else (encoded,) if encoded else DOCUMENT_TEXTS
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise DataError(
            f"{path} keeps no texts (looked for {', '.join(usual)}; kept are {', '.join(columns) or 'none'}); keep the "
            "text column in the inference run (output_columns), or name another with text_column"
        )
    return found
