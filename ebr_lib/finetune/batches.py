"""Batches for in-batch negatives: many different documents in each, no row lost, and a mask for what still repeats."""

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

# swaps tried for a row whose anchor is in its batch already: with rows of the same document, then with any
_TRIES_SAME, _TRIES_ANY = 8, 16
_MENDED_AN_EPOCH = 30_000  # rows; some seconds


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches that use every row once an epoch and hold as many different documents as the data allows.

    All batches but the last are full. A document of c rows stands in min(c, batches) of them: rows are dealt like
    cards, the most popular document first, so that no batch gets two of it while another has none. (The one exception:
    a short last batch has no room for more popular documents than it has rows.) Rows of one anchor are kept apart
    where a few random swaps that repeat no document can do it. Equal counts are shuffled, as are the rows of a
    document, the rows of a batch and the batches, by (seed, epoch) alone.

    :param documents: a number a row; equal numbers, same document.
    :param anchors: a number a row; equal numbers, same anchor.
    :param drop_last: leave out the last batch where it is short; which rows that hits changes every epoch.
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
    """Any integer keys as 0, 1, 2 …"""
    return np.unique(np.asarray(keys, dtype=np.int64), return_inverse=True)[1]


def deal(documents: Ints, batch_size: int, rng: np.random.Generator) -> Ints:
    """The batch of every row, shape (rows,): all of `batch_size` but the last, which holds the rest.

    With b batches, a document's first b rows are dealt to one batch each, most popular document first; rows beyond b
    cannot but repeat, and come last. The last batch sits out the rounds it has no room for: first those of documents
    that can do without it.

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
    """Rows in the order they are dealt, and how many of them are of documents that belong into every batch."""
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

    Tries a few swaps a row, and gives up on anchors that have more rows than there are batches.
    """
    repeats = _repeats(batch_of, anchors, rng)
    hopeless = np.bincount(anchors)[anchors[repeats]] > batch_of.max(initial=0) + 1
    repeats = rng.permutation(repeats[~hopeless])[:_MENDED_AN_EPOCH]
    if not len(repeats):
        return
    swaps = _Swaps(batch_of, documents, anchors)
    candidates = rng.random((len(repeats), _TRIES_SAME + _TRIES_ANY))
    for row, chances in zip(repeats.tolist(), candidates, strict=True):
        swaps.mend(row, chances)


def _repeats(batch_of: Ints, anchors: Ints, rng: np.random.Generator) -> Ints:
    """Rows whose anchor another row brought to the batch before."""
    shuffled = rng.permutation(len(anchors))
    order = shuffled[np.lexsort((anchors[shuffled], batch_of[shuffled]))]
    same = (batch_of[order][1:] == batch_of[order][:-1]) & (anchors[order][1:] == anchors[order][:-1])
    return order[1:][same]


class _Swaps:
    """Who sits where, for deciding whether two rows may change places."""

    def __init__(self, batch_of: Ints, documents: Ints, anchors: Ints) -> None:
        self.batch_of = batch_of
        self.documents, self.anchors = documents.tolist(), anchors.tolist()
        seats = batch_of.tolist()
        self.document_at = Counter(zip(seats, self.documents, strict=True))
        self.anchor_at = Counter(zip(seats, self.anchors, strict=True))
        self.by_document = np.argsort(documents, kind="stable")
        self.counts = np.bincount(documents)
        self.first = np.cumsum(self.counts) - self.counts

    def mend(self, row: int, chances: NDArray[np.float64]) -> None:
        """Swap `row` away from its batch, with the first candidate that allows it."""
        if self.anchor_at[int(self.batch_of[row]), self.anchors[row]] < 2:
            return  # the other one has left
        document = self.documents[row]
        same = self.first[document] + (chances[:_TRIES_SAME] * self.counts[document]).astype(np.int64)
        anyone = (chances[_TRIES_SAME:] * len(self.documents)).astype(np.int64)
        for other in [*self.by_document[same].tolist(), *anyone.tolist()]:
            if self._may_move(row, other) and self._may_move(other, row):
                self._swap(row, other)
                return

    def _may_move(self, row: int, other: int) -> bool:
        """May `row` take the seat of `other`, who leaves?"""
        seat = int(self.batch_of[other])
        if seat == self.batch_of[row] or self.anchors[row] == self.anchors[other]:
            return False
        new_document = self.documents[row] == self.documents[other] or not self.document_at[seat, self.documents[row]]
        return new_document and not self.anchor_at[seat, self.anchors[row]]

    def _swap(self, row: int, other: int) -> None:
        for who, sign in ((row, -1), (other, -1)):
            self._count(who, sign)
        self.batch_of[[row, other]] = self.batch_of[[other, row]]
        for who, sign in ((row, 1), (other, 1)):
            self._count(who, sign)

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
    """Every (anchor, document) that a set of rows knows to be positive, by `normalised` text.

    Equal texts are one number, whichever column they stand in, and a pair counts both ways: where y answers x, x is no
    negative of y. So does a text beside itself.

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
        self._base = len(keys) + 1  # texts are numbered from 1; 0 is no text
        self.anchors, self.documents, negatives = np.split(numbers + 1, [len(rows), 2 * len(rows)])
        self.columns = np.zeros((len(rows), 1 + per_row.max(initial=0)), dtype=np.int64)
        self.columns[:, 0] = self.documents
        self.columns[:, 1:][np.arange(self.columns.shape[1] - 1) < per_row[:, None]] = negatives
        self._columns = torch.from_numpy(self.columns)
        self._anchors = torch.from_numpy(self.anchors)
        self._pairs = torch.from_numpy(self._coded())

    def _coded(self) -> Ints:
        one, other = self.anchors, self.documents
        texts = np.arange(self._base)
        return np.unique(np.concatenate([one * self._base + other, other * self._base + one, texts * (self._base + 1)]))

    def mask(self, rows: Tensor) -> Tensor:
        """Which documents of a batch answer which of its anchors; each row's own positive is among them.

        :param rows: row numbers, shape (n,); the tables move to their device.
        :return: bool, shape (n, n · columns): the positives of the n rows, then their first negatives, and so on; a row
            with fewer negatives than others has False there.
        """
        if self._pairs.device != rows.device:
            self._pairs, self._columns, self._anchors = (
                table.to(rows.device) for table in (self._pairs, self._columns, self._anchors)
            )
        return self.answers(self._anchors[rows], self._columns[rows].T.flatten())

    def answers(self, anchors: Tensor, documents: Tensor) -> Tensor:
        """Text numbers (q,) and (d,) to bool (q, d): is the pair a known positive?"""
        return self._known(anchors[:, None], documents)

    def own_answers(self) -> NDArray[np.bool_]:
        """Shape of `columns`: does that document answer the anchor of its own row? True for all positives."""
        return self._known(torch.from_numpy(self.anchors)[:, None], torch.from_numpy(self.columns)).numpy()

    def pairs(self) -> tuple[Ints, Ints]:
        """All known pairs of text numbers, both ways and each text with itself, sorted: (pairs,) and (pairs,)."""
        one, other = np.divmod(self._pairs.numpy(force=True), self._base)
        return one, other

    def answers_among(self, anchors: Ints, documents: Ints) -> int:
        """How many of the q · d combinations of text numbers (q,) and (d,) are known positives; builds no matrix."""
        one, other = self.pairs()
        asked, offered = (np.bincount(side, minlength=self._base) for side in (anchors, documents))
        offered[0] = 0
        return int((asked[one] * offered[other]).sum())

    def _known(self, anchors: Tensor, documents: Tensor) -> Tensor:
        codes = anchors * self._base + documents
        place = torch.searchsorted(self._pairs, codes).clamp_(max=len(self._pairs) - 1)
        return (self._pairs[place] == codes) & (documents != 0)
