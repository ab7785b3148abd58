"""The data doctor: every number against one worked out by hand, by enumeration or by simulation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib import names
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import language_of
from ebr_lib.errors import DataError
from ebr_lib.finetune import doctor as finetune_doctor
from ebr_lib.finetune import setup
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.doctor import ColumnTokens, examine


def words_of(texts):
    return [len(text.split()) for text in texts]


def look(rows, batch_size=4, max_seq_length=3, **more):
    return examine(rows, words_of, max_seq_length=max_seq_length, batch_size=batch_size, **more)


ROWS = [
    TrainingRow("red shoes", "a pair of red shoes"),
    TrainingRow("red shoes", "a pair of red shoes"),
    TrainingRow("Red  Shoes", "a pair of red shoes", ("boots", "A pair of RED shoes")),
    TrainingRow("红色鞋子", "a pair of red shoes", ("boots",)),
    TrainingRow("blue hat", "Blue Hat"),
    TrainingRow(" ", "nothing"),
]


def test_counts_by_hand():
    report = look(ROWS)
    assert (report.rows, report.anchors, report.documents) == (6, 4, 3)
    assert (report.exact_duplicates, report.duplicates, report.duplicate_share) == (1, 2, 2 / 6)
    assert (report.positives_as_negatives, report.anchor_is_positive, report.empty_texts) == (1, 1, 1)
    assert report.popular == (("a pair of red shoes", 4), ("Blue Hat", 1), ("nothing", 1))
    assert report.languages == {"Chinese": 1 / 12, "English": 10 / 12, "mixed": 0, "other": 1 / 12}
    assert report.tokens == (
        ColumnTokens("anchor", 6, 0, 0.0, 9 / 6, 2, 2),
        ColumnTokens("positive", 6, 4, 8 / 23, 23 / 6, 5, 5),
        ColumnTokens("negative", 3, 1, 2 / 7, 7 / 3, 5, 5),
    )


def test_the_table_by_hand():
    table = list(look(ROWS).table.itertuples(index=False, name=None))
    assert table[:-2] == [
        ("行数 rows", "6", "100.0%"),
        ("不同的 anchor unique anchors", "4", "66.7%"),
        ("不同的 positive unique positives", "3", "50.0%"),
        ("完全重复 exact duplicates", "1", "16.7%"),
        ("归一化后重复 normalised duplicates", "2", "33.3%"),
        ("正样本又作负样本 positives as negatives", "1", "16.7%"),
        ("anchor 与 positive 相同 anchor = positive", "1", "16.7%"),
        ("空文本 empty texts", "1", "16.7%"),
        ("anchor 超过 over 3 tokens (mean 2, longest 2)", "0", "0.0%"),
        ("positive 超过 over 3 tokens (mean 4, longest 5)", "4", "66.7%, 丢失 lost 34.8%"),
        ("negative 超过 over 3 tokens (mean 2, longest 5)", "1", "33.3%, 丢失 lost 28.6%"),
        ("语言 language: Chinese", "", "8.3%"),
        ("语言 language: English", "", "83.3%"),
        ("语言 language: other", "", "8.3%"),
        ("未知 token unknown tokens", "", "0.0%"),
        ("热门文档 popular: a pair of red shoes", "4", "66.7%"),
        ("热门文档 popular: Blue Hat", "1", "16.7%"),
        ("热门文档 popular: nothing", "1", "16.7%"),
    ]


def test_a_short_last_batch_is_not_looked_at():
    """One document answers everybody: in a batch of two, each anchor has one more beside its own, a false negative."""
    report = look([TrainingRow(f"query {i}", "the document") for i in range(5)], 2)
    assert (report.negatives, report.false_negatives, report.false_negatives_balanced) == (2, 2, 2)
    assert list(report.table.itertuples(index=False, name=None))[-3:] == [
        ("每批假负例 false negatives, random batch of 2", "2.0", "100.0%"),
        ("每批假负例 false negatives, balanced batch of 2", "2.0", "100.0%"),
        ("没有负例的行 rows without a negative, balanced batch of 2", "", "100.0%"),
    ]


def test_a_preset_is_recommended_with_its_reason():
    few, usual = ([TrainingRow(f"query {i}", f"document {i}") for i in range(rows)] for rows in (99, 100))
    assert look(few).preset == ("configs/finetune/small_data.yaml", "只有 99 行 only 99 rows")
    assert look(usual).preset[0] == "configs/finetune/default.yaml"
    report = replace(look(usual), documents=5120, batch_size=63)
    preset, why = report.preset
    assert preset == "configs/finetune/large_batch.yaml"
    assert "a batch compares 63 of 5,120 different documents" in why
    assert preset in report._repr_html_()
    for other in (replace(report, documents=5119), replace(report, batch_size=64)):
        assert other.preset[0] == "configs/finetune/default.yaml"


def test_prompts_count():
    tokens = look(ROWS, prompts={"anchor": "query : "}).tokens
    assert (tokens[0].longest, tokens[0].over, tokens[1].longest) == (4, 4, 5)


def test_tokens_are_those_of_the_tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = [TrainingRow("a red shoe", "text " * 700), TrainingRow("hat", "红色的鞋子")]
    model = SimpleNamespace(tokenizer=tokenizer, prompts={})
    report = setup.examine_rows(FinetuneConfig(max_seq_length=8, train_batch_size=2), rows, model)
    lengths = [len(tokenizer(row.positive)["input_ids"]) for row in rows]
    assert report.tokens[1].longest == max(lengths) > 700
    assert report.tokens[1].over == sum(length > 8 for length in lengths)
    assert report.tokens[1].mean == pytest.approx(np.mean(lengths))


texts = st.text("ab", min_size=1, max_size=2)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.lists(st.builds(TrainingRow, texts, texts, st.lists(texts, max_size=2).map(tuple)), min_size=1, max_size=7),
    st.integers(1, 5),
)
def test_false_negatives_are_those_of_every_batch(rows, batch_size):
    """The expectation is the mean over all batches there are."""
    report = look(rows, batch_size)
    mask = KnownPositives(rows).mask
    found = [
        int(mask(torch.tensor(batch)).sum()) - report.batch_size
        for batch in itertools.combinations(range(len(rows)), report.batch_size)
    ]
    assert report.false_negatives == pytest.approx(np.mean(found))
    columns = 1 + max(len(row.negatives) for row in rows)
    assert report.negatives == mask(torch.arange(report.batch_size)).numel() - report.batch_size
    assert report.negatives == report.batch_size * (report.batch_size * columns - 1)


def click_log(rows=3000):
    documents = np.minimum(np.random.default_rng(0).zipf(1.5, rows), 10**6)
    return [TrainingRow(f"query {i // 2}", f"document {d}") for i, d in enumerate(documents)]


def test_false_negatives_of_a_click_log():
    rows = click_log()
    report = look(rows, 64)
    mask, rng = KnownPositives(rows).mask, np.random.default_rng(1)
    drawn = [int(mask(torch.from_numpy(rng.choice(len(rows), 64, replace=False))).sum()) - 64 for _ in range(600)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - report.false_negatives) < 4 * error
    assert report.false_negatives_balanced < report.false_negatives


ONE_DOCUMENT = [TrainingRow(f"question {i}", "see our delivery page") for i in range(40)]
ONE_ANCHOR = [TrainingRow("gift", f"gift idea {i}") for i in range(300)]
ALL_WITH_ALL = [TrainingRow(f"query {i}", f"document {j}") for i in range(5) for j in range(5)]
OTHERS = [TrainingRow(f"query {i}", f"document {i}") for i in range(12)]


@pytest.mark.parametrize(
    ("rows", "share", "cause"),
    [
        (ONE_DOCUMENT, 1.0, "the document 'see our delivery page' is the positive of 100.0% of the rows"),
        (ONE_ANCHOR + OTHERS, None, "the anchor 'gift' has 96.2% of the rows"),
        (ALL_WITH_ALL, 1.0, "the 5 anchors and 5 documents nearly all answer each other"),
    ],
)
def test_rows_whose_negatives_are_all_masked_are_counted_and_the_cause_is_named(rows, share, cause):
    report = look(rows, 8)
    assert share is None or report.without_negatives == share
    (line,) = [line for line in report.advice if "the learning rate is not the cause" in line]
    assert cause in line and f"{100 * report.without_negatives:.1f}% of the rows have no negative left" in line
    assert not any("Keep on" in line or "smaller batch" in line for line in report.advice)
    unmasked = look(rows, 8, masks=False)  # wrong negatives, but no row without any
    assert unmasked.without_negatives == 0 and not any("the learning rate is not" in line for line in unmasked.advice)


def test_rows_without_negatives_are_those_that_the_mask_fills():
    rows = [TrainingRow("a", "b"), TrainingRow("b", "a")]
    assert look(rows, 2).without_negatives == 1
    apart = [TrainingRow("a", "b"), TrainingRow("c", "d")]
    assert look(apart, 2).without_negatives == 0
    assert not any("learning rate" in line for line in look(apart, 2).advice)
    assert look([TrainingRow("a", "b", ("n",)), TrainingRow("b", "a", ("n",))], 2).without_negatives == 0


def test_advice_names_the_knob_that_helps():
    """Balanced batches help where many documents repeat a little, the mask alone where one document is everywhere."""
    spread = [TrainingRow(f"query {i}", f"document {i % 40}") for i in range(2000)]
    (line,) = look(spread, 32).advice[-1:]
    assert line.endswith("Keep on, as is the default: balanced_batches, mask_known_positives.")
    lumped = [TrainingRow(f"query {i}", f"document {max(0, i - 1500)}") for i in range(2000)]
    (line,) = look(lumped, 32).advice[-1:]
    assert line.endswith("Keep on, as is the default: mask_known_positives.")


def test_few_rows_are_warned_about_in_both_languages():
    rows = [TrainingRow(f"question number {i}", f"answer number {i}") for i in range(100)]
    assert look(rows).advice == look(rows * 1, max_seq_length=9).advice == ()
    (line,) = look(rows[:99]).advice
    chinese, english = line.index("训练数据过少"), line.index("Only 99 training rows")
    assert chinese < english
    assert line.count(names.STRONG_PRESET) == line.count(names.SMALL_DATA_PRESET) == 2


def test_the_presets_that_advice_points_to_are_there():
    presets = [value for name, value in vars(names).items() if name.endswith("_PRESET")]
    assert presets and all((Path(names.__file__).parents[1] / preset).is_file() for preset in presets)


def test_each_fault_has_its_advice():
    advice = " ".join(look(ROWS, batch_size=6).advice)
    for piece in (
        "2 rows repeat",
        "1 negatives are known positives",
        "1 rows have the same text",
        "1 texts are empty",
        "Texts are cut (positive 66.7%, negative 33.3%): max_seq_length 5",
        "There are 3 different documents, fewer than the batch of 6",
    ):
        assert piece in advice


def test_large_data_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(finetune_doctor, "SAMPLE", 50)
    rows = [TrainingRow(f"query {i}", "short" if i % 2 else "a much longer text") for i in range(500)]
    report = look(rows)
    assert (report.sampled, report.rows, report.tokens[0].texts) == (50, 500, 50)
    assert report.tokens[1].over / 50 == pytest.approx(0.5, abs=0.3)
    assert ("以上 token 与语言为抽样 tokens and languages: a sample", "50", "") in list(
        report.table.itertuples(index=False, name=None)
    )
    assert report == look(rows)
    assert "a sample" not in str(look(rows[:50]).table)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("无线蓝牙耳机", "Chinese"),
        ("这件T恤的质量很不错，穿着也很舒服", "Chinese"),
        ("iPhone 15 手机壳", "mixed"),
        ("where is my card?", "English"),
        ("où est ma carte", "English"),
        ("где моя карта", "other"),
        ("カードはどこ", "other"),
        ("12345 !!", "other"),
        ("", "other"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


def test_no_rows():
    with pytest.raises(DataError, match="no training rows"):
        look([])


def test_one_row():
    report = look([TrainingRow("a", "b")])
    assert (report.batch_size, report.false_negatives, report.false_negatives_balanced) == (1, 0, 0)
    assert tuple(report.table.iloc[-2]) == (
        "每批假负例 false negatives, balanced batch of 1",
        "0.0",
        "",
    )  # a share of nothing
    assert not any("repeat" in advice for advice in report.advice)
    assert (
        "a pair of" in look(ROWS)._repr_html_() and "<script" not in look([TrainingRow("a", "<script>")])._repr_html_()
    )


def test_item_to_item_data_is_found():
    items = [TrainingRow(f"item {i}", f"item {(i + 1) % 50}") for i in range(50)]
    turned = [TrainingRow(row.positive, row.anchor) for row in items[:10]]
    report = look([*items, *turned, TrainingRow("self", "SELF")])
    assert (report.both_ways, report.on_both_sides) == (20, 50)
    assert any("bidirectional_loss: true" in line for line in report.advice)
    searches = look([TrainingRow(f"query {i}", f"item {i}") for i in range(50)] + [TrainingRow("self", "SELF")])
    assert (searches.both_ways, searches.on_both_sides) == (0, 0)
    assert not any("bidirectional_loss" in line for line in searches.advice)
