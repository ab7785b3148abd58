"""Mined negatives against brute force: cosines by numpy, ranks by sorting, known positives by sets of texts."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.pairs import TrainingRow, expand, read_pairs
from ebr_lib.data.text import normalised
from ebr_lib.errors import ConfigError
from ebr_lib.finetune import mining
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.mining import mine_hard_negatives
from ebr_lib.model import precision as model_precision
from ebr_lib.model.loading import load_model
from ebr_lib.tables import as_text
from tests.finetune.test_finetune import adapter, pairs, same, settings, train  # noqa: F401 - pairs: a fixture's fixture

OPEN = {"count": 3, "first_rank": 1, "last_rank": 50, "margin": None}


def vectors_of(texts, side: str) -> np.ndarray:
    """A unit vector a text, the same for equal texts; queries and documents differ."""
    seeds = [np.frombuffer(f"{side} {normalised(text)}".encode(), dtype=np.uint8) for text in texts]
    vectors = np.stack([np.random.default_rng(seed).standard_normal(6) for seed in seeds]).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def encode_queries(texts):
    return vectors_of(texts, "query")


def encode_documents(texts):
    return vectors_of(texts, "document")


def mine(rows, **more):
    return mine_hard_negatives(rows, encode_queries, encode_documents, **(OPEN | more))


def by_brute_force(rows, count, first_rank, last_rank, margin):
    answered = {(normalised(row.anchor), normalised(row.positive)) for row in rows}
    corpus = sorted({normalised(text) for row in rows for text in (row.positive, *row.negatives)})
    mined = []
    for row in rows:
        anchor = normalised(row.anchor)
        cosine = dict(zip(corpus, (encode_documents(corpus) @ encode_queries([anchor])[0]).tolist(), strict=True))
        answers = {d for d in corpus if d == anchor or {(anchor, d), (d, anchor)} & answered}
        ranked = sorted(set(corpus) - answers, key=lambda d: -cosine[d])[first_rank - 1 : last_rank]
        if margin is not None:
            lowest = min(cosine[d] for d in answers)
            ranked = [d for d in ranked if cosine[d] <= lowest - margin * abs(lowest)]
        own = {normalised(text) for text in row.negatives}
        mined.append([d for d in ranked if d not in own][:count])
    return mined


def found(rows, mined):
    """The mined negatives alone, normalised."""
    return [
        [normalised(text) for text in new.negatives[len(old.negatives) :]]
        for old, new in zip(rows, mined.rows, strict=True)
    ]


def click_log(rows: int, documents: int, seed: int = 0) -> list[TrainingRow]:
    """Popular documents, anchors with several, equal texts spelt differently, some negatives, some swapped pairs."""
    rng = np.random.default_rng(seed)
    log = []
    for i in range(rows):
        anchor, document = f"查询 Query {rng.integers(rows // 2)}", f"商品 item {min(rng.zipf(1.4), documents)}"
        if i % 3 == 0:
            anchor, document = anchor.upper(), f" {document}  "
        if i % 7 == 0:
            anchor, document = document, anchor
        negatives = tuple(f"item {n}" for n in rng.integers(documents, size=i % 3))
        log.append(TrainingRow(anchor, document, negatives))
    return [*log, TrainingRow("item 1", "ITEM 1")]


@pytest.mark.parametrize("margin", [None, 0.0, 0.05, 0.9])
@pytest.mark.parametrize(("first_rank", "last_rank"), [(1, 5), (1, 1), (4, 12), (3, 10_000)])
@pytest.mark.parametrize("cells", [1, 700, 1 << 22])
def test_they_are_the_documents_of_the_window_under_the_margin(monkeypatch, first_rank, last_rank, margin, cells):
    monkeypatch.setattr(mining, "_CELLS", cells)  # one anchor at a time, some, or all
    rows = click_log(60, 25)
    window = {"count": 3, "first_rank": first_rank, "last_rank": last_rank, "margin": margin}
    mined = mine(rows, **window)
    wanted = by_brute_force(rows, **window)
    assert found(rows, mined) == wanted
    assert mined.counts.tolist() == [len(texts) for texts in wanted]


@pytest.mark.parametrize("window", [1, 60, mining._CELLS])
def test_groups_are_as_many_anchors_as_fit_and_at_least_one(window):
    positives = np.random.default_rng(0).integers(1, 2000, size=5000)
    groups = [group.tolist() for group in mining._groups(positives, window)]
    assert sorted(itertools.chain(*groups)) == list(range(5000))

    def cells(group):
        return len(group) * (window + max(positives[group]))

    assert all(cells(group) <= mining._CELLS or len(group) == 1 for group in groups)
    assert all(cells([*group, after[0]]) > mining._CELLS for group, after in itertools.pairwise(groups))


def test_no_row_is_lost_and_texts_are_letter_by_letter():
    rows = click_log(60, 25)
    mined = mine(rows, count=4, margin=0.5).rows
    assert [(row.anchor, row.positive) for row in mined] == [(row.anchor, row.positive) for row in rows]
    given = {text for row in rows for text in (row.positive, *row.negatives)}
    for old, new in zip(rows, mined, strict=True):
        assert new.negatives[: len(old.negatives)] == old.negatives
        assert set(new.negatives) <= given


def test_a_known_answer_is_never_mined_however_it_is_spelt():
    rows = [
        TrainingRow("wool blanket", "throw"),
        TrainingRow("Wool  BLANKET", "warm cover"),
        TrainingRow("quilt", "wool blanket"),  # known the other way round
        TrainingRow("ＴＨＲＯＷ", "kettle"),  # full width: the text "throw"
    ]
    mined = found(rows, mine(rows))
    assert [set(texts) for texts in mined] == [
        {"kettle"},
        {"kettle"},
        {"throw", "warm cover", "kettle"},
        {"warm cover"},  # not itself, and not the blanket that "throw" answers
    ]


def test_rows_whose_documents_run_out_keep_what_there_is():
    rows = [TrainingRow("a", "x"), TrainingRow("b", "y")]
    mined = mine(rows, count=5)
    assert [row.negatives for row in mined.rows] == [("y",), ("x",)]
    lonely = mine([TrainingRow("a", "x"), TrainingRow("b", "X")])
    assert [row.negatives for row in lonely.rows] == [(), ()]
    beyond = mine(rows, first_rank=40)
    assert beyond.counts.tolist() == [0, 0]
    assert "rows with none" in as_text(beyond.table)


def test_the_table_counts(caplog, capsys):
    rows = [TrainingRow("热水器", "电热水器 60L"), TrainingRow("书籍", "小说"), TrainingRow("书", "小说")]
    with caplog.at_level(logging.INFO, "ebr_lib"):
        mined = mine(rows, count=2, margin=None)
    assert caplog.messages[0] == "挖掘难负例 mining hard negatives: 3 anchors, 2 documents"
    assert capsys.readouterr().out == ""  # the library's miner would print
    table = dict(mined.table.to_numpy())
    assert table["行数 rows"] == "3"
    assert table["挖到的负例 negatives found"] == "3"
    assert table["不足 2 个的行 rows with fewer than 2"] == "3"
    assert table["一个也没有的行 rows with none"] == "0"
    assert (table["例 example: anchor"], table["negative"]) == ("热水器", "小说")
    cosines = [float((encode_queries([a]) @ encode_documents([d]).T).item()) for a, d in
               [("热水器", "小说"), ("书籍", "电热水器 60L"), ("书", "电热水器 60L")]]  # fmt: skip
    assert table["与 anchor 的余弦 cosines with the anchors"] == f"{min(cosines):.3f} … {max(cosines):.3f}"


# --- as a knob of fine-tuning -------------------------------------------------------------------------------------


@pytest.fixture
def apart(settings, tmp_path) -> dict:  # noqa: F811
    """Settings whose held-out pairs are a file of their own."""
    held_out = [{"anchor": "warm thing", "positive": "a document that only the held-out file has"}]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    return settings | {"eval_data_path": str(path)}


def mined_file(result) -> Path:
    return Path(result.model_path) / "mined_negatives.jsonl"


def test_off_changes_no_bit_and_writes_nothing(settings, tmp_path):  # noqa: F811
    plain = train(settings)
    off = train(settings, mine_hard_negatives=0, mining_rank_min=7, mining_margin=None, output_dir=str(tmp_path / "o"))
    assert same(adapter(plain), adapter(off))
    assert not mined_file(off).exists()


def test_the_saved_rows_train_to_the_same_weights(apart, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ebr_lib"):
        mined = train(apart, mine_hard_negatives=3, mining_margin=0.025)
    assert "难负例 mined hard negatives" in caplog.text
    rows, given = expand(read_pairs(mined_file(mined))), expand(read_pairs(apart["data_path"]))
    assert [(row.anchor, row.positive) for row in rows] == [(row.anchor, row.positive) for row in given]
    assert 0 < sum(len(row.negatives) == 3 for row in rows) < len(rows)  # some rows got fewer
    assert not any("held-out" in text for row in rows for text in row.negatives)
    again = train(apart, data_path=str(mined_file(mined)), output_dir=str(tmp_path / "again"))
    assert same(adapter(mined), adapter(again))
    assert not same(adapter(mined), adapter(train(apart, output_dir=str(tmp_path / "plain"))))


@pytest.mark.parametrize("side", ["both", "query"])
def test_the_model_mines_with_its_prompts_and_queries_alone_with_the_adapter(
    apart, tiny_bert, tmp_path, monkeypatch, side
):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: False)  # which would change places of near ties
    prompts = {"prompt": {"anchor": "find: ", "positive": "good: "}, "adapter_side": side}
    first = train(apart, **prompts, num_epochs=4)
    more = train(
        apart, **prompts, model_name=first.model_path, output_dir=str(tmp_path / "more"), mine_hard_negatives=2,
        mining_rank_min=2, mining_rank_max=9, mining_margin=None,
    )  # fmt: skip
    queries = load_model(first.model_path, device="cpu")
    documents = queries if side == "both" else load_model(str(tiny_bert), device="cpu", max_seq_length=32)
    rows = expand(read_pairs(apart["data_path"]))
    corpus = sorted({row.positive for row in rows})
    vectors = documents.encode(corpus, prompt="good: ")
    for row, mined in zip(rows, expand(read_pairs(mined_file(more))), strict=True):
        cosines = vectors @ queries.encode([row.anchor], prompt="find: ")[0]
        ranked = [corpus[i] for i in np.argsort(-cosines) if corpus[i] != row.positive]
        assert list(mined.negatives) == ranked[1:3]


def test_a_batch_of_one_has_its_mined_negatives(apart, caplog):
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        result = train(apart, train_batch_size=1, mine_hard_negatives=1, mining_margin=None)
    assert "has no negatives" not in caplog.text
    assert result.steps == result.train_rows


def test_nothing_found_is_said(apart, caplog):
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        result = train(apart, mine_hard_negatives=1, mining_rank_min=500, mining_rank_max=600)
    assert "no hard negatives found" in caplog.text
    assert not any(row.negatives for row in expand(read_pairs(mined_file(result))))


def test_a_window_too_small_is_refused():
    with pytest.raises(ConfigError, match="mine_hard_negatives: 4 is more than the ranks from mining_rank_min 8 to"):
        FinetuneConfig(mine_hard_negatives=4, mining_rank_min=8, mining_rank_max=10)
    FinetuneConfig(mine_hard_negatives=3, mining_rank_min=8, mining_rank_max=10)
    FinetuneConfig(mining_rank_min=80)
