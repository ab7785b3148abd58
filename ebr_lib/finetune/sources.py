"""Several training files: their shares of an epoch, batches of one file, replay in every batch, and files without
in-batch negatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ebr_lib.arrays import Floats, Ints
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.finetune.batches import BalancedBatchSampler
from ebr_lib.finetune.processes import world_size
from ebr_lib.logs import logger

if TYPE_CHECKING:
    from ebr_lib.finetune.rows import Rows

NO_IN_BATCH_NEGATIVES = "no_in_batch_neg"  # FlagEmbedding's ending of names
REPLAYED = -1


class Mix:
    """The rows that each epoch takes, and how batches are made of them.

    :param files: the file of each training row.
    :param counts: rows per epoch of each file.
    :param one_file: whether a batch holds rows of one file alone, besides replayed ones.
    :param replayed: rows after these, of which each batch holds a `share`.
    """

    def __init__(
        self, files: Sequence[str], counts: Mapping[str, int], one_file: bool, replayed: int = 0, share: float = 0.0
    ) -> None:
        numbers = {name: number for number, name in enumerate(counts)}
        self.files = np.array([numbers[name] for name in files] + [REPLAYED] * replayed)  # of each row, shape (rows,)
        self.counts = np.array([*counts.values()])  # shape (files,)
        self.one_file, self.replay_share = one_file, share if replayed else 0.0

    def replayed_in(self, batch_size: int) -> int:
        """Replayed rows per batch: the number nearest to the share that leaves room for both kinds."""
        return min(max(1, round(self.replay_share * batch_size)), batch_size - 1) if self.replay_share else 0

    def batches_in(self, batch_size: int) -> int:
        """Batches per epoch."""
        size = batch_size - self.replayed_in(batch_size)
        return int((-(-self.counts // size)).sum()) if self.one_file else -(-int(self.counts.sum()) // size)

    def rates(self, batch_size: int) -> Floats:
        """How often each row is in a full batch of all files on average, shape (rows,), if an epoch has each once."""
        replayed, is_replayed = self.replayed_in(batch_size), self.files == REPLAYED
        count = is_replayed.sum()
        own = len(self.files) - count
        return np.where(is_replayed, replayed / max(count, 1), min(batch_size - replayed, own) / own)


def make_mix(
    rows: Rows, shares: Mapping[str, float], one_file: bool, replay_share: float, batch_size: int
) -> Mix | None:
    """The rows that each epoch takes, if that is not each once; logs the rows per file, and those replayed per batch.

    :param shares: see `rows_per_file`.
    :raises ConfigError: a share names no training file, or several processes train.
    """
    if not (shares or one_file or rows.replay):
        return None
    if world_size() > 1:
        raise ConfigError(
            "shares, one_file_batches and replay_data_path work in one process; start training without torchrun"
        )
    files = [row.file for row in rows.train]
    counts = rows_per_file(files, shares)
    logger.info("每轮各文件行数 rows per epoch: %s", ", ".join(f"{file} {count:,}" for file, count in counts.items()))
    mix = Mix(files, counts, one_file, len(rows.replay), replay_share)
    if rows.replay:
        replayed = mix.replayed_in(batch_size)
        logger.info("每批回放 replayed rows per batch: %d of %d, from %d rows", replayed, batch_size, len(rows.replay))
    return mix


def rows_per_file(files: Sequence[str], shares: Mapping[str, float]) -> dict[str, int]:
    """How many rows of each file an epoch has, as many in all as there are rows.

    :param files: the file of each row.
    :param shares: path or name of a file, or of a folder, to its share of an epoch. Files without a share split the
        rest by their rows; if all have one, the shares are scaled to add up to 1.
    :raises ConfigError: a share names no file that was read, two name one file, or nothing is left for the others.
    """
    rows = Counter(files)
    group_of: dict[str, str] = {}
    for key in shares:
        found = [file for file in rows if _is_named(file, key)]
        if not found:
            raise ConfigError(f"shares: {key} is none of the training files that were read: {', '.join(rows)}")
        if twice := [file for file in found if file in group_of]:
            raise ConfigError(f"shares: {key} and {group_of[twice[0]]} both name {twice[0]}; keep one")
        group_of |= dict.fromkeys(found, key)
    rest = 1 - sum(shares.values())
    others = sum(count for file, count in rows.items() if file not in group_of)
    if others and rest <= 0:
        raise ConfigError("shares: they leave nothing for the other training files; lower them, or name every file")
    size = Counter({key: sum(rows[file] for file in rows if group_of.get(file) == key) for key in shares})
    weights = {
        file: shares[group_of[file]] * count / size[group_of[file]] if file in group_of else rest * count / others
        for file, count in rows.items()
    }
    return _whole(weights, len(files))


def _is_named(file: str, key: str) -> bool:
    place, wanted = Path(file).resolve(), Path(key).expanduser().resolve()
    return key == place.name or place == wanted or wanted in place.parents


def _whole(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the proportion of the weights that add up to the total (largest remainders)."""
    exact = {name: weight * total / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class MixedBatches(Sampler[list[int]]):
    """Balanced batches of an epoch's rows, which `mix` chooses.

    A file with c rows of n per epoch gives every row c // n times and the rest at random without repeats, drawn again
    each epoch by (seed, epoch). With `one_file`, each file is dealt by itself, its last batch may be short, and batches
    of all files are shuffled. To each batch are added as many replayed rows, dealt and drawn alike; what an epoch does
    not draw of them, later ones may.
    """

    def __init__(self, mix: Mix, documents: Ints, anchors: Ints, *, batch_size: int, seed: int) -> None:
        self.mix, self.batch_size, self.seed, self.epoch = mix, batch_size, seed, 0
        self._documents, self._anchors = documents, anchors

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.mix.batches_in(self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        drawn = [_drawn(np.flatnonzero(self.mix.files == n), count, rng) for n, count in enumerate(self.mix.counts)]
        groups = drawn if self.mix.one_file else [np.concatenate(drawn)]
        replayed = self.mix.replayed_in(self.batch_size)
        batches = [batch for rows in groups if len(rows) for batch in self._dealt(rows, self.batch_size - replayed)]
        order = rng.permutation(len(batches)) if self.mix.one_file else range(len(batches))
        others = np.flatnonzero(self.mix.files == REPLAYED)
        replay = (
            self._dealt(_drawn(others, replayed * len(batches), rng), replayed) if replayed else [[]] * len(batches)
        )
        for place, more in zip(order, replay, strict=True):
            yield batches[place] + more

    def _dealt(self, rows: Ints, size: int) -> list[list[int]]:
        batches = BalancedBatchSampler(self._documents[rows], self._anchors[rows], batch_size=size, seed=self.seed)
        batches.set_epoch(self.epoch)
        found = [rows[batch].tolist() for batch in batches]
        alone = self.mix.one_file and not self.mix.replay_share and len(found) > 1 and len(found[-1]) == 1
        if alone:  # it would be compared with nothing
            found[-1].append(found[0][0])
        return found


def _drawn(rows: Ints, count: int, rng: np.random.Generator) -> Ints:
    whole, rest = divmod(int(count), len(rows))
    return np.concatenate([np.tile(rows, whole), rng.permutation(rows)[:rest]])


# --- files without in-batch negatives -----------------------------------------------------------------------------


def rows_alone(rows: Rows, negatives: int, *, bidirectional: bool) -> Tensor | None:
    """Which rows, held-out ones after training rows, are compared with their own documents alone; None if none is.

    :raises ConfigError: their documents would be compared with the anchors of other rows.
    :raises DataError: no row has a negative.
    """
    alone = without_in_batch_negatives([row.file for row in (*rows.trained, *rows.heldout)])
    if alone is None:
        return None
    if bidirectional:
        raise ConfigError(
            f"bidirectional_loss compares each positive with the anchors of other rows, and files whose names end in "
            f"{NO_IN_BATCH_NEGATIVES} must not be; set bidirectional_loss: false, or rename the files"
        )
    if not negatives:
        raise DataError(
            f"training files whose names end in {NO_IN_BATCH_NEGATIVES} have no negative, so their rows would be "
            "compared with nothing; give `negative`, or rename the files"
        )
    logger.info("不用批内负例 rows without in-batch negatives, by the names of their files: %d", int(alone.sum()))
    return alone


def without_in_batch_negatives(files: Sequence[str]) -> Tensor | None:
    """Which rows are of files, or of folders of files, whose names end in `no_in_batch_neg`, (rows,); None if none."""
    names = {file: (Path(file).name.split(".")[0], Path(file).resolve().parent.name) for file in set(files)}
    ends = {file: any(name.endswith(NO_IN_BATCH_NEGATIVES) for name in found) for file, found in names.items()}
    return torch.tensor([ends[file] for file in files]) if any(ends.values()) else None


def own_documents_only(mask: Tensor, alone: Tensor) -> Tensor:
    """The mask of known positives with all documents of other rows added for the rows that are `alone`.

    :param mask: shape (n, n · columns); see `KnownPositives.mask`.
    :param alone: shape (n,).
    """
    own = torch.eye(len(alone), dtype=torch.bool, device=mask.device).repeat(1, mask.shape[1] // len(alone))
    return mask | (alone.to(mask.device)[:, None] & ~own)
