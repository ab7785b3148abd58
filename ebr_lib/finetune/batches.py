"""Batches for in-batch negatives: many different documents in each, no row lost, and a mask for known positives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from ebr_lib.arrays import Ints
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import text_keys

# swaps tried for a row whose anchor is already in its batch: with rows of the same document, then with any row
_TRIES_SAME, _TRIES_ANY = 8, 16
_SWAPPED_PER_EPOCH = 30_000  # rows; some seconds


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches that use every row once per epoch and hold as many different documents as the data allows.

    All batches but the last are full. A document with c rows is in min(c, batches) of them: rows are dealt like cards,
    the most popular document first, so that no batch gets two of it while another has none. (One exception: a short
    last batch has no room for more popular documents than it has rows.) Rows of one anchor are kept apart where a few
    random swaps that repeat no document can do it. The order of equal counts, of a document's rows, of a batch's rows
    and of the batches is shuffled by (seed, epoch) alone.

    :param documents: one number per row, shape (rows,); equal numbers, same document.
    :param anchors: one number per row, shape (rows,); equal numbers, same anchor.
    :param drop_last: leave out a short last batch; which rows that affects changes every epoch.
    :param processes: consecutive batches whose negatives are gathered into one; they are balanced as one.
    """

    def __init__(
        self,
        documents: Sequence[int] | Ints,
        anchors: Sequence[int] | Ints,
        *,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
        processes: int = 1,
    ) -> None:
        self.batch_size, self.drop_last = batch_size, drop_last
        self.seed, self.processes, self.epoch = seed, processes, 0
        self._documents = _numbered(documents)
        self._anchors = _numbered(anchors)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        rows = len(self._documents)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        size = self.batch_size * self.processes
        batch_of = deal(self._documents, size, rng)
        keep_anchors_apart(batch_of, self._documents, self._anchors, rng)
        order = _laid_out(batch_of, size, rng)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def _numbered(keys: Sequence[int] | Ints) -> Ints:
    """Number integer keys 0, 1, 2 …"""
    return np.unique(np.asarray(keys, dtype=np.int64), return_inverse=True)[1]


def deal(documents: Ints, batch_size: int, rng: np.random.Generator) -> Ints:
    """The batch of every row, shape (rows,): all have `batch_size` rows but the last, which has the rest.

    With b batches, a document's first b rows are dealt to one batch each, most popular document first; its other rows
    must repeat, and come last. The last batch is left out of the rounds it has no room for, first out of those whose
    documents need not be in every batch.

    :param documents: document of each row, shape (rows,), numbered from 0.
    """
    batches = -(-len(documents) // batch_size)
    order, rows_everywhere = _dealing_order(documents, batches, rng)
    room = len(documents) - (batches - 1) * batch_size  # of the last batch
    needed = min(room, rows_everywhere // max(batches, 1))
    others = rng.permutation(np.arange(needed, batch_size))[: room - needed]
    seated = np.ones((batch_size, batches), dtype=bool)
    seated[:, -1:] = False
    seated[:needed, -1:] = seated[others, -1:] = True
    batch_of = np.empty(len(documents), dtype=np.int64)
    batch_of[order] = np.nonzero(seated)[1]
    return batch_of


def _dealing_order(documents: Ints, batches: int, rng: np.random.Generator) -> tuple[Ints, int]:
    """Rows in the order they are dealt, and how many belong to documents that must be in every batch."""
    counts = np.bincount(documents)
    tie = rng.permutation(len(counts))[documents]
    popularity = np.minimum(counts, batches)[documents]
    shuffled = rng.permutation(len(documents))
    by_document = shuffled[np.argsort(documents[shuffled], kind="stable")]
    nth = np.empty(len(documents), dtype=np.int64)  # of its document's rows, which one this is
    nth[by_document] = np.arange(len(documents)) - (np.cumsum(counts) - counts)[documents[by_document]]
    beyond = nth >= batches
    order = np.lexsort((nth, tie, -popularity, beyond))
    return order, int(((counts >= batches) * batches).sum())


def keep_anchors_apart(batch_of: Ints, documents: Ints, anchors: Ints, rng: np.random.Generator) -> None:
    """Swap rows between batches, in place, where an anchor repeats in a batch; no swap repeats a document or an anchor.

    A few swaps per row are tried; anchors with more rows than there are batches are left alone.
    """
    repeats = _repeats(batch_of, anchors, rng)
    hopeless = np.bincount(anchors)[anchors[repeats]] > batch_of.max(initial=0) + 1
    repeats = rng.permutation(repeats[~hopeless])[:_SWAPPED_PER_EPOCH]
    if not len(repeats):
        return
    swaps = _Swaps(batch_of, documents, anchors)
    candidates = rng.random((len(repeats), _TRIES_SAME + _TRIES_ANY))
    for row, chances in zip(repeats.tolist(), candidates, strict=True):
        swaps.move_away(row, chances)


def _repeats(batch_of: Ints, anchors: Ints, rng: np.random.Generator) -> Ints:
    """Rows whose anchor another row has already brought into the batch."""
    shuffled = rng.permutation(len(anchors))
    order = shuffled[np.lexsort((anchors[shuffled], batch_of[shuffled]))]
    same = (batch_of[order][1:] == batch_of[order][:-1]) & (anchors[order][1:] == anchors[order][:-1])
    return order[1:][same]


class _Swaps:
    """The batch of each row, its seat, and what every batch holds: whether two rows may change places."""

    def __init__(self, batch_of: Ints, documents: Ints, anchors: Ints) -> None:
        self.batch_of = batch_of
        self.documents, self.anchors = documents.tolist(), anchors.tolist()
        seats = batch_of.tolist()
        self.document_at = Counter(zip(seats, self.documents, strict=True))
        self.anchor_at = Counter(zip(seats, self.anchors, strict=True))
        self.by_document = np.argsort(documents, kind="stable")
        self.counts = np.bincount(documents)
        self.first = np.cumsum(self.counts) - self.counts

    def move_away(self, row: int, chances: NDArray[np.float64]) -> None:
        """Swap `row` away from its batch, with the first candidate that allows it."""
        if self.anchor_at[int(self.batch_of[row]), self.anchors[row]] < 2:
            return  # the other one has left
        document = self.documents[row]
        same = self.first[document] + (chances[:_TRIES_SAME] * self.counts[document]).astype(np.int64)
        anyone = (chances[_TRIES_SAME:] * len(self.documents)).astype(np.int64)
        for other in [*self.by_document[same].tolist(), *anyone.tolist()]:
            if self._may_move(row, other) and self._may_move(other, row):
                for who in (row, other):
                    self._count(who, -1)
                self.batch_of[[row, other]] = self.batch_of[[other, row]]
                for who in (row, other):
                    self._count(who, 1)
                return

    def _may_move(self, row: int, other: int) -> bool:
        """May `row` take the seat of `other`, who leaves?"""
        seat = int(self.batch_of[other])
        if seat == self.batch_of[row] or self.anchors[row] == self.anchors[other]:
            return False
        new_document = self.documents[row] == self.documents[other] or not self.document_at[seat, self.documents[row]]
        return new_document and not self.anchor_at[seat, self.anchors[row]]

    def _count(self, row: int, change: int) -> None:
        seat = int(self.batch_of[row])
        self.document_at[seat, self.documents[row]] += change
        self.anchor_at[seat, self.anchors[row]] += change


def _laid_out(batch_of: Ints, batch_size: int, rng: np.random.Generator) -> Ints:
    """Rows batch after batch: the rows of a batch shuffled, full batches shuffled, a short one last."""
    batches = -(-len(batch_of) // batch_size)
    full = len(batch_of) // batch_size
    place = np.concatenate([rng.permutation(full), np.arange(full, batches)])
    return np.lexsort((rng.random(len(batch_of)), place[batch_of]))


# --- known positives ----------------------------------------------------------------------------------------------


class KnownPositives:
    """Every (anchor, document) pair that a set of rows knows to be positive, by `normalised` text.

    Equal texts have one number, whatever their column. A pair counts both ways: where y answers x, x is not a negative
    of y. A text is never a negative of itself.

    :ivar anchors: number of each row's anchor, shape (rows,).
    :ivar documents: number of each row's positive, shape (rows,).
    :ivar columns: number of each row's positive and negatives, shape (rows, 1 + most negatives); 0 where there is none.
    """

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        per_row = np.array([len(row.negatives) for row in rows], dtype=np.int64)
        sides = [
            text_keys(row.anchor for row in rows),
            text_keys(row.positive for row in rows),
            text_keys(text for row in rows for text in row.negatives),
        ]
        keys, numbers = np.unique(np.concatenate(sides), return_inverse=True)
        self._keys, self._base = keys, len(keys) + 1  # texts are numbered from 1; 0 means none
        self.anchors, self.documents, negatives = np.split(numbers + 1, [len(rows), 2 * len(rows)])
        self.columns = np.zeros((len(rows), 1 + per_row.max(initial=0)), dtype=np.int64)
        self.columns[:, 0] = self.documents
        self.columns[:, 1:][np.arange(self.columns.shape[1] - 1) < per_row[:, None]] = negatives
        self._columns = torch.from_numpy(self.columns)
        self._anchors = torch.from_numpy(self.anchors)
        one, other, base = self.anchors, self.documents, self._base
        coded = np.concatenate([one * base + other, other * base + one, np.arange(base) * (base + 1)])
        self._pairs = torch.from_numpy(np.unique(coded))

    def mask(self, rows: Tensor) -> Tensor:
        """Which documents of a batch answer which of its anchors, each row's own positive included.

        :param rows: row numbers, shape (n,); the tables move to their device.
        :return: bool, shape (n, n · columns): the positives of the n rows, then their first negatives, and so on; a row
            with fewer negatives than others has False there.
        """
        if self._pairs.device != rows.device:
            self._pairs, self._columns, self._anchors = (
                table.to(rows.device) for table in (self._pairs, self._columns, self._anchors)
            )
        return self.answers(self._anchors[rows][:, None], self._columns[rows].T.flatten())

    def answers(self, anchors: Tensor, documents: Tensor) -> Tensor:
        """Whether pairs of text numbers, in shapes that broadcast, are known positives."""
        codes = anchors * self._base + documents
        place = torch.searchsorted(self._pairs, codes).clamp_(max=len(self._pairs) - 1)
        return (self._pairs[place] == codes) & (documents != 0)

    def own_answers(self) -> NDArray[np.bool_]:
        """Shape of `columns`: does that document answer the anchor of its own row? True for all positives."""
        return self.answers(torch.from_numpy(self.anchors)[:, None], torch.from_numpy(self.columns)).numpy()

    def pairs(self) -> tuple[Ints, Ints]:
        """All known pairs of text numbers, both ways and each text with itself, sorted: (pairs,) and (pairs,)."""
        one, other = np.divmod(self._pairs.numpy(force=True), self._base)
        return one, other

    def numbers_of(self, keys: Ints) -> Ints:
        """The numbers of distinct texts by their `text_keys`; texts that no row has are numbered on from the rows'."""
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[place] == keys, place + 1, self._base + np.arange(len(keys)))

    def answers_among(self, anchors: Ints, documents: Ints) -> int:
        """Count the known positives among the q · d pairs of text numbers (q,) and (d,), without a (q, d) matrix."""
        one, other = self.pairs()
        asked, offered = (np.bincount(side, minlength=self._base) for side in (anchors, documents))
        offered[0] = 0
        return int((asked[one] * offered[other]).sum())
