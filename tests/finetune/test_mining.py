"""Mined negatives against brute force: cosines by numpy, ranks by sorting, known positives by sets of texts."""

from __future__ import annotations

import functools
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import normalised, text_keys
from ebr_lib.finetune import mining
from ebr_lib.finetune.mining import mine_hard_negatives

OPEN = {"count": 3, "first_rank": 1, "last_rank": 50, "margin": None}


@functools.cache
def vector_of(text: str) -> np.ndarray:
    """A unit vector, the same for the same text."""
    vector = np.random.default_rng(np.frombuffer(text.encode(), dtype=np.uint8)).standard_normal(6)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def encode_queries(texts):
    return np.stack([vector_of(f"query {normalised(text)}") for text in texts])


def encode_documents(texts):
    return np.stack([vector_of(f"document {normalised(text)}") for text in texts])


def mine(rows, **more):
    return mine_hard_negatives(rows, encode_queries, encode_documents, **(OPEN | more))


def by_brute_force(rows, *, count, first_rank, last_rank, margin, more=()):
    answered = {(normalised(row.anchor), normalised(row.positive)) for row in rows}
    corpus = sorted(
        {normalised(text) for row in rows for text in (row.positive, *row.negatives)} | set(map(normalised, more))
    )
    documents, mined = encode_documents(corpus), []
    for row in rows:
        anchor = normalised(row.anchor)
        cosine = dict(zip(corpus, (documents @ encode_queries([anchor])[0]).tolist(), strict=True))
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
        [normalised(text) for text in new.negatives[len(old.negatives) :]] for old, new in zip(rows, mined, strict=True)
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


WINDOWS = [(1, 5), (1, 1), (4, 12), (3, 10_000)]
CASES = [(1 << 22, window, margin) for window in WINDOWS for margin in (None, 0.0, 0.05, 0.9)]
CASES += [(700, window, 0.05) for window in WINDOWS] + [(1, (4, 12), 0.05)]  # some anchors at a time, or one


@pytest.mark.parametrize(("cells", "ranks", "margin"), CASES)
def test_mined_documents_are_in_the_window_and_below_the_margin(monkeypatch, cells, ranks, margin):
    monkeypatch.setattr(mining, "_CELLS", cells)
    rows = click_log(60, 25)
    window = {"count": 3, "first_rank": ranks[0], "last_rank": ranks[1], "margin": margin}
    mined = mine(rows, **window)
    wanted = by_brute_force(rows, **window)
    assert found(rows, mined) == wanted


@pytest.mark.parametrize("window", [1, 60, mining._CELLS])
def test_groups_have_as_many_anchors_as_fit_and_at_least_one(window):
    positives = np.random.default_rng(0).integers(1, 2000, size=5000)
    groups = [group.tolist() for group in mining._groups(positives, window)]
    assert sorted(itertools.chain(*groups)) == list(range(5000))

    def cells(group):
        return len(group) * (window + max(positives[group]))

    assert all(cells(group) <= mining._CELLS or len(group) == 1 for group in groups)
    assert all(cells([*group, after[0]]) > mining._CELLS for group, after in itertools.pairwise(groups))


def catalogue_of(texts, vectors=None) -> Catalogue:
    return Catalogue(Path("catalogue.txt"), list(texts), text_keys(texts), vectors)


@pytest.mark.parametrize("has_vectors", [False, True])
def test_a_catalogue_is_mined_in_besides_the_documents_of_the_rows(has_vectors):
    """It has documents of the rows spelt otherwise, others, and texts that are anchors of the rows."""
    rows = click_log(60, 25)
    texts = [f"商品  ITEM {n}" for n in range(10, 70)] + ["查询 query 3", "查询 query 4"]
    encoded = []

    def encode(documents):
        encoded.extend(map(normalised, documents))
        return encode_documents(documents)

    catalogue = catalogue_of(texts, encode_documents(texts) if has_vectors else None)
    window = {"count": 3, "first_rank": 2, "last_rank": 12, "margin": 0.05}
    mined = mine_hard_negatives(rows, encode_queries, encode, **window, catalogue=catalogue)
    assert found(rows, mined) == by_brute_force(rows, **window, more=texts) != by_brute_force(rows, **window)
    assert bool(set(encoded) & set(map(normalised, texts))) is not has_vectors


def test_random_choice_draws_within_the_ranks_by_seed_and_row():
    rows = click_log(60, 25)
    window = {"first_rank": 4, "last_rank": 12, "margin": 0.05}
    candidates = by_brute_force(rows, count=100, **window)
    drawn = [found(rows, mine(rows, count=3, choice="random", seed=seed, **window)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for texts, among in zip(drawn[0], candidates, strict=True):
        assert texts == [text for text in among if text in texts]  # nearest first, none twice
        assert len(texts) == min(3, len(among))
    many = [found(rows, mine(rows, count=3, choice="random", seed=seed, **window)) for seed in range(60)]
    row = int(np.argmax([len(among) for among in candidates]))
    assert {text for run in many for text in run[row]} == set(candidates[row])
    same = [TrainingRow("a", f"x {i}") for i in range(2)] + [TrainingRow(f"b {i}", f"y {i}") for i in range(40)]
    one, other, *_ = found(same, mine(same, count=3, choice="random"))
    assert one != other  # rows of one anchor draw for themselves


@pytest.mark.parametrize("choice", ["top", "random"])
def test_candidates_that_a_reranker_takes_for_answers_are_left_out(choice, caplog):
    rows = click_log(60, 25)
    asked: list[tuple[str, str]] = []

    def score(query, document):
        return float(np.random.default_rng(text_keys([query + document]).view(np.uint64)).standard_normal())

    def reranker(pairs):
        asked.extend(pairs)
        return np.array([score(normalised(query), normalised(document)) for query, document in pairs])

    window = {"first_rank": 1, "last_rank": 20, "margin": None}
    with caplog.at_level(logging.INFO, "ebr_lib"):
        mined = found(
            rows, mine(rows, count=3, choice=choice, seed=1, reranker=reranker, reranker_margin=0.1, **window)
        )
    lowest: dict[str, float] = {}
    for row in rows:
        anchor, own = normalised(row.anchor), score(normalised(row.anchor), normalised(row.positive))
        lowest[anchor] = min(own, lowest.get(anchor, own))
    for row, texts, candidates in zip(rows, mined, by_brute_force(rows, count=100, **window), strict=True):
        anchor = normalised(row.anchor)
        fine = [text for text in candidates if score(anchor, text) < lowest[anchor] - 0.1]
        assert set(texts) <= set(fine) and len(texts) == min(3, len(fine))
        assert choice == "random" or texts == fine[:3]
    assert "taken for answers by the reranker" in caplog.text
    assert len(asked) - len(rows) < sum(map(len, by_brute_force(rows, count=100, **window)))  # it stops early


def test_no_row_is_lost_and_texts_are_unchanged():
    rows = click_log(60, 25)
    mined = mine(rows, count=4, margin=0.5)
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


@pytest.mark.parametrize("more", [None, catalogue_of(["Warm cover", "lid"])])
def test_dropped_positives_are_not_mined_for_their_anchor(more):
    rows = [TrainingRow("wool blanket", "throw"), TrainingRow("pot", "kettle")]
    dropped = [TrainingRow("Wool  Blanket", "KETTLE"), TrainingRow("wool blanket", "warm  cover")]
    mined = found(rows, mine(rows, dropped=dropped, catalogue=more))
    among = [set(), {"throw"}] if more is None else [{"lid"}, {"throw", "warm cover", "lid"}]
    assert [set(texts) for texts in mined] == among


def test_rows_with_too_few_documents_keep_those(caplog):
    rows = [TrainingRow("a", "x"), TrainingRow("b", "y")]
    mined = mine(rows, count=5)
    assert [row.negatives for row in mined] == [("y",), ("x",)]
    lonely = mine([TrainingRow("a", "x"), TrainingRow("b", "X")])
    assert [row.negatives for row in lonely] == [(), ()]
    assert mine(rows, first_rank=40) == rows
    assert "no hard negatives found" in caplog.text


def test_the_table_counts(caplog, capsys, monkeypatch):
    rows = [TrainingRow("热水器", "电热水器 60L"), TrainingRow("书籍", "小说"), TrainingRow("书", "小说")]
    tables = []
    monkeypatch.setattr(mining, "as_text", lambda table: tables.append(dict(table.to_numpy())))
    with caplog.at_level(logging.INFO, "ebr_lib"):
        mine(rows, count=2, margin=None)
    assert caplog.messages[0] == "挖掘难负例 mining hard negatives: 3 anchors, 2 documents"
    assert capsys.readouterr().out == ""  # the library's miner would print
    (table,) = tables
    assert table["行数 rows"] == "3"
    assert table["挖到的负例 negatives found"] == "3"
    assert table["不足 2 个的行 rows with fewer than 2"] == "3"
    assert table["一个也没有的行 rows with none"] == "0"
    assert (table["例 example: anchor"], table["negative"]) == ("热水器", "小说")
    cosines = [float((encode_queries([a]) @ encode_documents([d]).T).item()) for a, d in
               [("热水器", "小说"), ("书籍", "电热水器 60L"), ("书", "电热水器 60L")]]  # fmt: skip
    assert table["与 anchor 的余弦 cosines with the anchors"] == f"{min(cosines):.3f} … {max(cosines):.3f}"
