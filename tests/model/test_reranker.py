"""Rerankers against the bare transformer: its logits, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from ebr_lib.errors import MissingError, ModelError, NotFiniteError
from ebr_lib.model.reranker import load_reranker
from tests.models import build_tiny_reranker, edit_json, tiny_tokenizer

PAIRS = [
    ("warm blanket", "wool"),
    ("kettle", "买一个 iPhone 手机壳 送给妈妈"),
    ("a", "a"),
    ("书籍", "the quick brown fox"),
]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return build_tiny_reranker(tmp_path_factory.mktemp("reranker") / "tiny-reranker")


def logits(folder, pairs) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in pairs]


def test_scores_are_the_raw_logits_in_the_order_of_the_pairs(reranker):
    scores = load_reranker(str(reranker), device="cpu", batch_size=2)(PAIRS)
    assert scores.shape == (4,)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(logits(reranker, PAIRS), abs=1e-5)
    assert scores.min() < 0  # a sigmoid has none below 0
    assert load_reranker(str(reranker), device="cpu")([]).shape == (0,)


def test_a_folder_of_the_library_is_read_without_its_activation(reranker, tmp_path):
    CrossEncoder(str(reranker), device="cpu", activation_fn=torch.nn.Sigmoid()).save_pretrained(str(tmp_path / "saved"))
    scores = load_reranker(str(tmp_path / "saved"), device="cpu")(PAIRS)
    assert scores == pytest.approx(logits(reranker, PAIRS), abs=1e-5)


def test_a_bi_encoder_is_refused(tiny_bert, tmp_path, minilm):
    for folder in (tiny_bert, minilm):
        with pytest.raises(ModelError, match="is a SentenceTransformer, not a cross-encoder"):
            load_reranker(str(folder))
    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="is a BertModel, not a cross-encoder"):
        load_reranker(str(tmp_path / "bare"))
    with pytest.raises(MissingError, match="no such folder"):
        load_reranker(str(tmp_path / "nowhere"))


def test_a_model_that_claims_a_head_and_has_none_is_refused(tiny_bert, tmp_path):
    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "headless")
    tiny_tokenizer().save_pretrained(tmp_path / "headless")
    edit_json(tmp_path / "headless/config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(ModelError, match=r"would be random numbers: classifier"):
        load_reranker(str(tmp_path / "headless"))


def test_labels_own_code_and_nan_are_refused(reranker, tmp_path):
    labels = build_tiny_reranker(tmp_path / "labels", labels=3)
    with pytest.raises(ModelError, match="gives a pair 3 scores, one per label"):
        load_reranker(str(labels), device="cpu")
    edit_json(labels / "config.json", auto_map={"AutoModelForSequenceClassification": "own.Reranker"})
    with pytest.raises(ModelError, match=r"brings its own code .*own\.Reranker.*trust_remote_code: true"):
        load_reranker(str(labels), device="cpu")
    broken = AutoModelForSequenceClassification.from_pretrained(reranker)
    broken.classifier.weight.data[:] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(NotFiniteError, match="4 of 4 pairs a score that is not a finite number"):
        load_reranker(str(tmp_path / "broken"), device="cpu")(PAIRS)
