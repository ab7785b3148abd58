"""Prompts that rows bring along: each is put before its anchor, in training, mining and measuring, and saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ebr_lib import evaluate_retrieval
from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.errors import ModelError
from ebr_lib.finetune.doctor import examine
from ebr_lib.finetune.prompts import own_prompts, query_prompt, use_own_prompts
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model
from tests.finetune.conftest import make_trainer, same, step, train, write_rows

FIND, ASK = "Find it: ", "Answer: "


def rows_with(*prompts: str | None) -> list[TrainingRow]:
    return [TrainingRow(f"a {i}", f"p {i}", (), prompt) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "given", "wanted", "said"),
    [
        ((None, None), False, "query: ", []),
        ((FIND, FIND), False, FIND, ["prompts of rows"]),
        ((FIND, FIND), True, FIND, ["prompts of rows", "replaces prompt 'query: '"]),
        ((ASK, FIND, FIND), False, FIND, ["prompts of rows", "several prompts"]),
        ((ASK, FIND, FIND), True, "query: ", ["prompts of rows", "several prompts"]),
        ((FIND, FIND, None), False, "query: ", ["prompts of rows", "several prompts"]),
    ],
)
def test_which_prompt_is_saved(caplog, prompts, given, wanted, said):
    caplog.set_level("INFO", "ebr_lib")
    assert query_prompt(rows_with(*prompts), "query: ", given=given) == wanted
    assert len(caplog.messages) == len(said)
    assert all(part in line for part, line in zip(said, caplog.messages, strict=True))


def test_the_doctor_counts_them():
    report = examine(
        rows_with(FIND, FIND, ASK, None), lambda texts: list(map(len, texts)), max_seq_length=9, batch_size=2
    )
    assert report.prompts == ((FIND, 2), (ASK, 1))
    assert next(column for column in report.tokens if column.column == "anchor").longest == len(FIND + "a 0")
    assert report.table.to_string().count("own prompt") == 2


@pytest.fixture
def given(pairs, tmp_path):
    """A function: the pairs, with these prompts in turn."""

    def write(*prompts: str | None) -> str:
        rows = expand(read_pairs(pairs))
        lines = [
            {"anchor": row.anchor, "positive": row.positive, "prompt": prompts[i % len(prompts)]}
            for i, row in enumerate(rows)
        ]
        return write_rows(tmp_path / "prompted.jsonl", lines)

    return write


def test_one_prompt_for_all_rows_is_the_prompt_of_the_run(settings, given):
    own = step(settings, data_path=given(FIND))
    assert same(own.adapter, step(settings, prompt={"anchor": FIND}).adapter)
    assert own.trainer.model.prompts["query"] == FIND


def test_each_anchor_has_its_own_prompt_and_noise_leaves_it_alone(plain, given):
    prompts = {"Q" * 12 + " ": 0, "Z" * 12 + " ": 1}
    seen = step(
        plain, data_path=given(*prompts, None), prompt={"anchor": "none: "}, eval_ratio=0.25, max_seq_length=64,
        noise_enabled=True, noise_type="char_delete", noise_prob=1.0, noise_strength=0.9,
    )  # fmt: skip
    rows, model = [*seen.rows.train, *seen.rows.heldout], seen.trainer.model
    for columns, labels in [*seen.batches, *seen.evaluated]:
        anchors, positives = (model.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in columns)
        for label, anchor, positive in zip(labels.tolist(), anchors, positives, strict=True):
            assert anchor.startswith(rows[label].prompt or "none: ")
            assert not positive.startswith(("QQ", "ZZ", "none"))
    assert {row.prompt for row in rows} == {None, *prompts}
    assert seen.evaluated


def test_mining_ranks_with_them(settings, given, monkeypatch):
    encoded = {}
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts, *more: encoded.setdefault(self.prompt, texts) and encode(self, texts, *more),
    )
    seen = make_trainer(settings, data_path=given(FIND, ASK), eval_ratio=0.0, mine_hard_negatives=1, mining_margin=None)
    for prompt in (FIND, ASK):
        assert set(encoded[prompt]) == {row.anchor for row in seen.rows.train if row.prompt == prompt}


def test_the_encoder_takes_a_prompt_for_each_text(tiny_bert):
    encoder = Encoder(load_model(str(tiny_bert), device="cpu"), prompt=FIND, backend="torch")
    texts = ["red kite", "blue pan", "red kite"]
    found = encoder.encode_each(texts, [None, ASK, ASK])
    asked = encoder.with_prompt(ASK).encode(texts)
    np.testing.assert_allclose(found, [encoder.encode(texts)[0], asked[1], asked[2]], atol=1e-6)
    assert np.array_equal(encoder.encode_each(texts, [None] * 3), encoder.encode(texts))
    assert not np.allclose(found[0], found[2], atol=1e-3)


def test_pooling_without_the_prompt_takes_one_prompt(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu")
    model[1].include_prompt = False
    with pytest.raises(ModelError, match="train on one prompt"):
        use_own_prompts(model, rows_with(FIND, ASK), [], None)


def test_several_prompts_are_saved_and_the_evaluation_has_the_same_numbers(settings, given, tmp_path):
    result = train(settings, data_path=given(FIND, FIND, ASK), learning_rate=2e-2)
    folder = Path(result.model_path)
    lines = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["anchor"]: line["prompt"] for line in lines} == own_prompts(
        expand(read_pairs(folder / "heldout.jsonl"))
    )
    assert {line["prompt"] for line in lines} == {FIND, ASK}
    assert load_model(result.model_path, device="cpu").prompts["query"] == FIND
    assert "own prompt: Find it" in (folder / "README.md").read_text(encoding="utf-8")

    def found(**more):
        common = {"models": [result.model_path], "data_path": result.model_path, "bm25": False, "resamples": 100}
        return evaluate_retrieval(
            common | {"output_dir": str(tmp_path / "evaluation"), "max_seq_length": 32, "backend": "torch"} | more
        )

    (values,) = found().metrics.values()
    assert values["ndcg@10"] == result.after["all"]["ndcg@10"]
    (one_prompt,) = found(query_prompt="x y z " * 4).metrics.values()
    assert one_prompt["ndcg@10"] != values["ndcg@10"]
