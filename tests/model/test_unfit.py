"""A model that does not know the language of the texts is named, in each stage that reads texts."""

from __future__ import annotations

import json

import pytest

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.finetune.doctor import examine
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model
from ebr_lib.model.unfit import unfit_advice, unknown_share
from tests.models import load_tiny

CHINESE = ["静音折叠走步机", "烘焙称咖啡粉克秤", "iphone15透明壳 防摔"]
WARNED = "of their tokens are unknown"


@pytest.fixture(scope="module")
def english(minilm):
    return load_model(str(minilm), device="cpu")


def test_the_share_is_that_of_the_words_that_are_not_in_the_vocabulary(english):
    words = [word for text in CHINESE for word in english.tokenizer.tokenize(text)]
    share = words.count("[UNK]") / len(words)
    assert 0.3 < share < 1
    assert unknown_share(english.tokenizer, CHINESE) == share
    assert unknown_share(english.tokenizer, ["a quiet treadmill"]) == 0


def test_an_encoder_counts_them_without_prompt_and_special_tokens(english):
    encoder = Encoder(english, prompt="find this: ", backend="torch", precision="float32")
    encoder.encode(CHINESE)
    assert encoder.stats.unknown_share == unknown_share(english.tokenizer, CHINESE)


def test_an_unknown_token_that_ends_every_text_is_not_counted(tiny_models):
    model = load_tiny(tiny_models, "qwen2")
    model.tokenizer.unk_token = "</s>"
    encoder = Encoder(model, backend="torch", precision="float32")
    encoder.encode(CHINESE)
    assert encoder.stats.tokens_fixed == 2 * len(CHINESE)
    assert encoder.stats.unknown_share == unknown_share(model.tokenizer, CHINESE) == 0


def test_advice_begins_above_a_tenth():
    assert unfit_advice(0.1) is None
    said = unfit_advice(0.654)
    assert said and "65%" in said and "multilingual-e5-small" in said and "requirements-zh.txt" in said


def test_the_doctor_of_fine_tuning_says_it():
    rows = [TrainingRow(anchor=text, positive=f"{text}。") for text in CHINESE]
    how = {"max_seq_length": 16, "batch_size": 2}
    report = examine(rows, lambda texts: [3] * len(texts), unknown_of=lambda texts: 0.5, **how)
    assert WARNED in report.advice[0] and report.unknown_share == 0.5
    assert WARNED not in " ".join(examine(rows, lambda texts: [3] * len(texts), **how).advice)


def test_encoding_says_it_and_counts_in_the_manifest(minilm, tmp_path, caplog):
    items = tmp_path / "items.csv"
    for texts, warned in ((CHINESE, True), (["a quiet treadmill"], False)):
        items.write_text("description\n" + "".join(f"{text}\n" for text in texts), encoding="utf-8")
        caplog.clear()
        config = {"model_name": str(minilm), "data_path": str(items), "output_path": str(tmp_path / "e.txt")}
        result = run_batch_inference(config | {"delimiter": "\t", "restart": True})
        assert (WARNED in caplog.text) == warned == (result.counts["tokens_unknown"] > 0)


def test_evaluation_says_it_of_the_model(minilm, tmp_path, caplog):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"anchor": text[:4], "positive": text} for text in CHINESE]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluate_retrieval({
        "models": [str(minilm)], "data_path": str(pairs), "output_dir": str(tmp_path / "out"), "resamples": 100,
    })  # fmt: skip
    assert f"{minilm}: 模型不认识这些文本" in caplog.text
    how = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["how"]
    assert any(of.get("unknown tokens", "0%") > "10%" for of in how.values())
