"""Labels, BM25, and when stored vectors serve."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import DataError
from ebr_lib.evaluate.corpus import Corpus
from ebr_lib.evaluate.rankers import labels, rank_with_bm25, stored_vectors
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.model.provenance import identify
from ebr_lib.model.spec import EncoderSpec
from tests.evaluate.tasks import DOCS, task_of


def test_labels():
    assert labels(["a/x", "b/x", "y"]) == ["a/x", "b/x", "y"]
    assert labels(["./m/one/", "two"]) == ["one", "two"]
    assert labels(["m/BM25", "two"], ["BM25"]) == ["m/BM25", "two"]
    assert labels(["BM25"], ["BM25"]) == ["./BM25"]


def test_bm25_memory_does_not_grow_with_repeated_words():
    """50 bytes a word are 2 GB for a million documents of 40 words; a text for each word would take 4.6 GB."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}x" for i in range(3000)])
    texts = [" ".join(row) for row in words[rng.integers(0, 3000, (1500, 40))]]
    corpus = Corpus([str(i) for i in range(1500)], texts, {}, {})
    task = RetrievalTask(["q"], [texts[7]], {}, corpus, [{7: 1}], 0)
    rank_with_bm25(replace(task, corpus=replace(corpus, texts=texts[:10])))  # what is loaded on first use
    tracemalloc.start()
    try:
        ranking, _ = rank_with_bm25(task)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1500 * 40
    finally:
        tracemalloc.stop()
    assert ranking.ids[0, 0] == 7


@pytest.mark.parametrize(
    "settings", [{"document_prompt": "passage: "}, {"max_seq_length": 8}, {"precision": "bfloat16"}]
)
def test_stored_vectors_made_with_other_settings_are_not_used(beir, tiny_bert, tmp_path, settings):
    docs = {"id": [f"d{i}" for i in range(len(DOCS))], "description": DOCS}
    made_by = {"model": {"name": "tiny", "sha256": identify(str(tiny_bert)).sha256}}
    made_by["settings"] = {"prompt": "", "max_seq_length": 128, "precision": "float32"}
    corpora = []
    for name, columns in (("e.txt", docs), ("e.npy", {"id": docs["id"]})):
        write_embeddings(tmp_path / name, columns, np.eye(len(DOCS), 32, dtype=np.float32))
        manifest_path(tmp_path / name).write_text(json.dumps(made_by))
        corpora.append(task_of(beir, corpus=tmp_path / name).corpus)
    as_made = EncoderSpec(str(tiny_bert), document_prompt="", max_seq_length=128, precision="float32")
    assert all(stored_vectors(spec, c) for spec in (as_made, EncoderSpec(str(tiny_bert))) for c in corpora)
    other = replace(as_made, **settings)
    assert not stored_vectors(other, corpora[0])
    with pytest.raises(DataError, match=f"{next(iter(settings)).removeprefix('document_')} .* and no texts to encode"):
        stored_vectors(other, corpora[1])
