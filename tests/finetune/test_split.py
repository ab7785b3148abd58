"""Splitting pairs: near-duplicates and shared texts stay on one side, and the same seed gives the same split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib.data.pairs import Pair
from ebr_lib.data.text import normalised
from ebr_lib.finetune import split
from ebr_lib.finetune.split import near_duplicate_groups, split_pairs

LONG = (
    "我在上个星期五晚上订了一件红色的羊毛大衣尺码是中号到现在已经过了十天"
    "还没有收到请问能不能帮我查一下这个包裹现在到底在哪里什么时候可以送到我家门口谢谢"
)
LONG_EN = (
    "i ordered a red woollen coat last friday evening in size medium and ten days later it has still not arrived here"
)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("where is my card", "where is my card?", True),
        ("where is my card", "where is my cards", True),
        ("where is my card", "where is my carb", True),
        ("where is my card", "where is my crad", True),
        ("where is my card", "my card where is", True),
        ("where is my card", "where was my card", False),
        ("iphone 13 case", "iphone 14 case", False),
        ("iphone 13 case", "iphone 13 cases", True),
        ("iphone case", "i phone case", True),
        ("无线蓝牙耳机", "无线篮牙耳机", True),
        ("无线蓝牙耳机", "无线蓝牙耳机。", True),
        ("无线蓝牙耳机", "无线耳机", False),
        ("手机壳", "手机膜", False),
        ("第1代 播放器", "第2代 播放器", False),
        ("की कहानी", "का कहाना", False),  # vowel signs are marks, not letters, and count all the same
        (LONG, LONG.replace("红色", "蓝色"), True),
        (LONG, LONG[:30], False),
        (
            "are there any discounts for frequent currency exchanges?",
            "are there discounts for frequent currency exchanges?",
            True,
        ),
        ("are there any discounts for frequent currency exchanges?", "are there any discounts for students?", False),
        (
            "京东客服帮我查一下上个星期五晚上买的那双红色运动鞋现在到哪里了",
            "帮我查一下上个星期五晚上买的那双红色运动鞋现在到哪里了",
            True,
        ),
        (LONG_EN, LONG_EN.replace("friday", "fridya"), True),
        (LONG_EN, LONG_EN.replace("woollen", "wollen"), True),
        (LONG_EN, "the " + LONG_EN[::-1], False),
        ("???", "!!!", False),
    ],
)
def test_near_duplicates(one, other, near):
    groups = near_duplicate_groups([normalised(one), normalised(other), "quite another text"])
    assert bool(groups[0] == groups[1]) is near
    assert groups[2] not in groups[:2]


def one_letter_apart(one: str, other: str) -> bool:
    def dropped(text):
        shorter = {text[:i] + text[i + 1 :] for i in range(len(text)) if not text[i].isdigit()}
        return {text} | (shorter if len(text) >= 5 else set())

    return bool(dropped(one) & dropped(other))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.text("ab1好", min_size=1, max_size=8), min_size=2, max_size=6, unique=True))
def test_groups_are_those_of_brute_force(texts):
    label = list(range(len(texts)))
    for _ in texts:
        for i, one in enumerate(texts):
            for j, other in enumerate(texts):
                if one_letter_apart(one, other):
                    label[i] = label[j] = min(label[i], label[j])
    wanted = [sorted(set(label)).index(x) for x in label]
    assert near_duplicate_groups(texts).tolist() == wanted


def test_letters_are_mixed_as_splitmix64_does():
    """The generator's first three numbers from seed 0, as its authors' C gives them."""
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert split._mixed(states).tolist() == wanted


def test_long_texts_are_near_from_an_overlap_of_four_fifths():
    """Of n − 3 4-grams, two texts that are k letters apart share n − 3 − k of n − 3 + k: 0.8 where n is 9 k + 3."""
    rng, letters = np.random.default_rng(0), [chr(code) for code in range(0x4E00, 0x5800)]

    def found(k: int, n: int) -> int:
        """How many of 150 pairs, among each other, are near."""
        texts = ["".join(rng.choice(letters, n + k)) for _ in range(150)]
        groups = near_duplicate_groups([text[:n] for text in texts] + [text[k:] for text in texts])
        assert len(set(groups[:150])) == 150
        return int((groups[:150] == groups[150:]).sum())

    for k in (8, 15):
        assert found(k, 9 * k + 3) >= 147  # MinHash misses three in a thousand
        assert found(k, 9 * k + 2) == 0


def test_groups_over_many_blocks(monkeypatch):
    texts = [f"{word} {LONG_EN}" for word in ("apple", "appel", "zebra crossing and traffic light rules")] + [
        "short text"
    ]
    whole = near_duplicate_groups(texts)
    monkeypatch.setattr(split, "_BLOCK_LETTERS", 1)
    assert near_duplicate_groups(texts).tolist() == whole.tolist()


def test_blocks_are_full_but_not_larger(monkeypatch):
    monkeypatch.setattr(split, "_BLOCK_LETTERS", 10)
    blocks = list(split._blocks(["four"] * 12, range(2, 12)))
    assert [block.owners.tolist() for block in blocks] == [[2, 3, 4], [5, 6, 7], [8, 9, 10], [11]]


anchors = st.lists(st.text("abcde 一二三", min_size=1, max_size=9).filter(lambda t: t.strip()), min_size=1, max_size=30)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(anchors, st.floats(0.01, 0.99), st.integers(0, 3), st.randoms(use_true_random=False))
def test_split_keeps_its_promises(texts, ratio, seed, random):
    pairs = [Pair(text, ("d",), (), "f", i) for i, text in enumerate(texts)]
    train, held = split_pairs(pairs, ratio, seed)
    assert sorted(p.line for p in train + held) == list(range(len(pairs)))
    keys = sorted({normalised(t) for t in texts})
    assert train
    assert bool(held) is (len(keys) > 1)
    groups = dict(zip(keys, near_duplicate_groups(keys).tolist(), strict=True))
    if len(set(groups.values())) > 1:
        assert not {groups[normalised(p.anchor)] for p in train} & {groups[normalised(p.anchor)] for p in held}
    assert not {normalised(p.anchor) for p in train} & {normalised(p.anchor) for p in held}
    shuffled = pairs[:]
    random.shuffle(shuffled)
    assert {p.line for p in split_pairs(shuffled, ratio, seed)[1]} == {p.line for p in held}


def test_split_size_and_seed():
    words = np.random.default_rng(0).integers(0, 10**9, (500, 3)).astype(str)
    pairs = [Pair(" ".join(row), ("d",)) for row in words for _ in range(2)]
    train, held = split_pairs(pairs, 0.1, 0)
    assert (len(train), len(held)) == (900, 100)
    assert {p.anchor for p in held} != {p.anchor for p in split_pairs(pairs, 0.1, 1)[1]}
    assert split_pairs(pairs, 0, 0) == (pairs, [])


def test_a_split_that_near_duplicates_make_larger_is_said(caplog):
    halves = ["where is my parcel number {}x", "how do i cancel a standing order {}y"]
    pairs = [Pair(half.format(letter), ("d",)) for half in halves for letter in "abcdefghijklmnopqrstuvwxyz"]
    _, held = split_pairs(pairs, 0.1, 0)
    assert len(held) == 26
    assert "50 % are held out, eval_ratio is 0.1" in caplog.text


def test_anchors_that_are_all_alike_are_still_split(caplog):
    pairs = [Pair(f"question {letter}", ("d",)) for letter in "abcdefgh"]
    train, held = split_pairs(pairs, 0.25, 0)
    assert (len(train), len(held)) == (6, 2)
    assert "all anchors are near-duplicates" in caplog.text


# --- texts that are on both sides ---------------------------------------------------------------------------------


def sides(pairs):
    """All texts of some pairs."""
    return {normalised(text) for pair in pairs for text in (pair.anchor, *pair.positives)}


def words(count: int, seed: int = 0) -> list[str]:
    """Texts that are not near-duplicates."""
    return [" ".join(row) for row in np.random.default_rng(seed).integers(0, 10**9, (count, 3)).astype(str)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=25), st.integers(0, 3))
def test_what_shares_a_text_stays_on_one_side(edges, seed):
    """Against a walk over the graph by hand; where one part holds too many anchors, no anchor is on both sides."""
    texts = words(31)
    pairs = [Pair(texts[a], (texts[b],), (), "f", i) for i, (a, b) in enumerate(edges)]
    part = {text: {text} for text in texts}
    for pair in pairs:
        one, other = part[pair.anchor], part[pair.positives[0]]
        if one is not other:
            one |= other
            part.update(dict.fromkeys(other, one))
    train, held = split_pairs(pairs, 0.3, seed)
    assert sorted(pair.line for pair in train + held) == list(range(len(pairs)))
    anchors = {pair.anchor for pair in pairs}
    if len(anchors) < 2:
        return
    wanted = max(1, round(0.3 * len(anchors)))
    sizes = [len(group & anchors) for group in part.values() if group & anchors]
    assert train and held
    if len(anchors) - max(sizes) >= wanted and min(sizes) <= max(2 * wanted, len(anchors) // 3):
        assert not sides(train) & sides(held)
    else:
        assert not {pair.anchor for pair in train} & {pair.anchor for pair in held}


def test_pairs_both_ways_stay_together():
    texts = words(200)
    pairs = [pair for a, b in zip(texts[::2], texts[1::2], strict=True) for pair in (Pair(a, (b,)), Pair(b, (a,)))]
    train, held = split_pairs(pairs, 0.2, 0)
    assert (len(train), len(held)) == (160, 40)
    assert not sides(train) & sides(held)


def test_near_duplicate_documents_stay_together():
    texts = words(100)
    pairs = [
        Pair(f"{text} asked", (f"{text} is the answer to the question, says page {i}",)) for i, text in enumerate(texts)
    ]
    pairs += [Pair(other, (pair.positives[0] + "!",)) for other, pair in zip(words(100, 1), pairs, strict=True)]
    train, held = split_pairs(pairs, 0.2, 0)
    assert 30 <= len(held) <= 40
    assert not {text.rstrip("!") for text in sides(train)} & {text.rstrip("!") for text in sides(held)}


def test_where_no_text_is_shared_the_split_is_that_of_the_anchors():
    """Which anchors are held out is a hash of the seed and the text: a split that older versions made comes back."""
    import hashlib

    pairs = [Pair(text, (document,)) for text, document in zip(words(50), words(50, 1), strict=True)]
    order = sorted((pair.anchor for pair in pairs),
                   key=lambda text: hashlib.blake2b(text.encode(), digest_size=8, salt=b"42").digest())  # fmt: skip
    assert {pair.anchor for pair in split_pairs(pairs, 0.1, 42)[1]} == set(order[:5])


def test_popular_documents_fall_back_to_the_anchors_and_say_so(caplog):
    anchors = words(100)
    pairs = [Pair(anchor, ("the page of everything", f"page {i}x{i}")) for i, anchor in enumerate(anchors)]
    train, held = split_pairs(pairs, 0.1, 0)
    assert (len(train), len(held)) == (90, 10)
    (line,) = caplog.messages
    assert "shared texts tie up to 100 % of the anchors together" in line and "unseen" in line


def test_a_few_large_parts_are_not_held_out_whole(caplog):
    """Of two documents with half the anchors each, one would leave the half for training."""
    pairs = [
        Pair(anchor, (f"the page of everything {'A' if i % 2 else 'zebra'}",)) for i, anchor in enumerate(words(100))
    ]
    train, held = split_pairs(pairs, 0.1, 0)
    assert (len(train), len(held)) == (90, 10)
    assert "shared texts tie up to 50 % of the anchors together" in caplog.text
    fifths = [Pair(anchor, (words(5, 2)[i % 5],)) for i, anchor in enumerate(words(100))]
    assert [len(side) for side in split_pairs(fifths, 0.1, 0)] == [80, 20]


def test_a_large_part_is_trained_on_whole_and_the_log_says_so(caplog):
    texts = words(100)
    pairs = [Pair(text, ("the page of everything" if i < 70 else f"{text} page",)) for i, text in enumerate(texts)]
    with caplog.at_level("INFO", "ebr_lib"):
        train, held = split_pairs(pairs, 0.1, 0)
    assert (len(train), len(held)) == (90, 10) and not sides(train) & sides(held)
    assert "tie 70 % of the anchors into one part" in caplog.text


def test_near_duplicate_documents_that_tie_everything_count_when_equal_only(caplog):
    """Titles of one series are all near each other; the pairs both ways stay together all the same."""
    title = "a silicone case for the phone of last year in the colour of the sea, number {}"
    anchors = words(40)
    pairs = [Pair(anchor, (title.format(f"{i}{i}"),)) for i, anchor in enumerate(anchors)]
    pairs += [Pair(pair.positives[0] + " ?", (pair.anchor,)) for pair in pairs[:1]]
    train, held = split_pairs(pairs, 0.2, 0)
    assert len(held) >= 6 and not caplog.messages
    assert not sides(train) & sides(held)
