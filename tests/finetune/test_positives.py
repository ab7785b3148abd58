"""Ranks of positives: a case worked by hand, and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import normalised
from ebr_lib.finetune import positives
from ebr_lib.finetune.pool import Pool, remembered
from ebr_lib.finetune.positives import positive_ranks, without_noisy
from tests.finetune.test_mining import catalogue_of, click_log, encode_documents, encode_queries

# degrees on the unit circle: the nearer, the larger the cosine
DEGREES = {"tent": 0, "kettle": 90, "big tent": 10, "kite": 20, "small tent": 30, "iron pot": 60, "lid": 65}


def on_the_circle(texts):
    radians = np.radians([DEGREES[normalised(text)] for text in texts])
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_ranks_worked_by_hand():
    rows = [
        TrainingRow("tent", "small tent"),  # kite is nearer; big tent too, but it is a known answer: rank 2
        TrainingRow("tent", "Big Tent"),  # rank 1
        TrainingRow("kettle", "iron pot"),  # rank 1, and 2 with the catalogue's lid
        TrainingRow("kettle", "kite", ("small tent",)),  # small tent is nearer, iron pot is known: rank 2
    ]
    assert positive_ranks(Pool(rows, on_the_circle, on_the_circle)).tolist() == [2, 1, 1, 2]
    lid = catalogue_of(["lid"])
    assert positive_ranks(Pool(rows, on_the_circle, on_the_circle, lid)).tolist() == [2, 1, 2, 3]
    encoders = on_the_circle, on_the_circle
    assert without_noisy(rows, *encoders, rank_max=2, catalogue=lid) == (rows[:3], rows[3:])
    assert without_noisy(rows, *encoders, rank_max=2) == (rows, [])


@pytest.mark.parametrize("cells", [1, 1 << 24])
def test_ranks_by_brute_force(monkeypatch, cells):
    monkeypatch.setattr(positives, "_CELLS", cells)
    rows = click_log(60, 25)
    answered = {(normalised(row.anchor), normalised(row.positive)) for row in rows}
    corpus = sorted({normalised(text) for row in rows for text in (row.positive, *row.negatives)})
    vectors = encode_documents(corpus)
    ranks = positive_ranks(Pool(rows, encode_queries, encode_documents))
    for row, rank in zip(rows, ranks, strict=True):
        anchor = normalised(row.anchor)
        cosine = dict(zip(corpus, vectors @ encode_queries([anchor])[0], strict=True))
        others = [d for d in corpus if d != anchor and not {(anchor, d), (d, anchor)} & answered]
        assert rank == 1 + sum(cosine[d] > cosine[normalised(row.positive)] for d in others)


def test_texts_are_encoded_once():
    asked = []
    encode = remembered(lambda texts: asked.append(list(texts)) or on_the_circle(texts))
    assert np.array_equal(encode(["tent", "kite", "tent"]), on_the_circle(["tent", "kite", "tent"]))
    assert np.array_equal(encode(["kite", "lid"]), on_the_circle(["kite", "lid"]))
    assert asked == [["tent", "kite"], ["lid"]]
