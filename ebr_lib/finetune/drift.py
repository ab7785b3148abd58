"""How far training moves vectors that were right before: a pull against forgetting that needs no other data.

A model that is trained on pairs of one kind forgets the others. What holds it are its own vectors from before training,
of the texts that it trains on and of random words, which stand for all other texts (pseudo-rehearsal, Robins 1995,
doi:10.1080/09540099550039318). Measured, the two together cost less of the task than either alone at a larger weight.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebr_lib.arrays import Encode

RANDOM = "random"  # the column of random words
PULLED_ROWS = 100_000  # of a larger training set, a sample: what encoding costs and keeps has a bound
RANDOM_TEXTS, WORDS = 2048, (3, 24)


@dataclass(frozen=True)
class Drift:
    """Vectors from before training, and how much it weighs that training moves away from them.

    :ivar compared: columns of a training row before that of random words.
    :ivar weight: of mean(1 − cos) over the texts of the rows, and of the same over random words.
    :ivar place: each row's number in `texts`, −1 for a row that is not pulled, (rows,).
    :ivar texts: of the anchors and positives (only the anchors, where documents keep their vectors), float16 (2 or 1,
        pulled rows, dim).
    :ivar words: random words, one text after another in turn for the rows; `word_vectors` are theirs, (words, dim).
    """

    compared: int
    weight: float
    place: Tensor
    texts: Tensor
    words: Sequence[str]
    word_vectors: Tensor

    def of(self, columns: Sequence[Tensor], words: Tensor | None, rows: Tensor) -> Tensor:
        """How far rows have moved, in all, (q,), with the weight in.

        :param columns: vectors of the anchors and positives as they are now, (q, dim) each.
        :param words: vectors of the rows' random words, (q, dim).
        :param rows: numbers of the rows (q,).
        """
        place = self.place[rows.cpu()]
        pulled = (place >= 0).to(rows.device)
        start = self.texts[:, place].to(rows.device)
        moved = torch.stack([_distance(now, then) for now, then in zip(columns, start, strict=False)]).mean(dim=0)
        moved = moved * pulled * (len(rows) / pulled.sum().clamp(min=1))
        if words is not None:
            moved = moved + _distance(words, self.word_vectors[rows.cpu() % len(self.words)].to(rows.device))
        return self.weight * moved

    def words_of(self, rows: int) -> list[str]:
        """The random words of each of the first `rows` rows."""
        return [self.words[row % len(self.words)] for row in range(rows)]


def make_drift(
    columns: Sequence[Sequence[str]],
    encoders: Sequence[Encode],
    words: Sequence[str],
    encode_words: Encode,
    *,
    compared: int,
    weight: float,
    seed: int,
) -> Drift:
    """Encode what `Drift` compares with: at most `PULLED_ROWS` rows, drawn by the seed, and the random words.

    :param columns: the anchors of all rows, and the positives; `encoders` has one function for each.
    """
    rows = len(columns[0])
    chosen = sorted(random.Random(seed).sample(range(rows), min(rows, PULLED_ROWS)))
    place = torch.full((rows,), -1)
    place[chosen] = torch.arange(len(chosen))
    texts = [_encoded_once([column[row] for row in chosen], of) for column, of in zip(columns, encoders, strict=True)]
    return Drift(compared, weight, place, torch.stack(texts), words, _encoded_once(words, encode_words))


def random_words(tokenizer: Any, prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """Texts of words drawn evenly from a tokenizer's vocabulary: tokens of letters alone, in whatever script.

    :param prompts: put before the texts in turn.
    """
    draw = random.Random(seed)
    tokens = tokenizer.batch_decode([[number] for number in sorted(tokenizer.get_vocab().values())])
    words = [token.strip() for token in tokens if token.strip().isalpha()]
    return [prompts[i % len(prompts)] + " ".join(draw.choices(words, k=draw.randint(*WORDS))) for i in range(count)]


def _distance(now: Tensor, then: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(now, then.float(), dim=1)


def _encoded_once(texts: Sequence[str], encode: Encode) -> Tensor:
    """Vectors of texts, each different one encoded once, float16 (texts, dim)."""
    different = list(dict.fromkeys(texts))
    number = {text: i for i, text in enumerate(different)}
    vectors = torch.from_numpy(np.ascontiguousarray(encode(different))).half()
    return vectors[torch.tensor([number[text] for text in texts])]
