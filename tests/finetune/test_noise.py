"""Noise: words are words, shares are what the knobs say, and the draw depends on nothing but its coordinates."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib.data.text import is_blank, split_words, words_and_gaps
from ebr_lib.finetune.noise import TextNoise, add_noise

KINDS = ["random_delete", "random_swap", "char_delete"]
ENGLISH = [
    "How do I return a pair of shoes that pinch at the toes after one short walk?",
    "My parcel says delivered, but neither I nor the neighbours have seen it since Tuesday.",
    "a warm waterproof jacket for cycling to work in the rain",
    "quiet fan",
    "Is the blue kettle back in stock before the weekend, and what does sending it to Leeds cost?",
]
CHINESE = [
    "这款无线蓝牙耳机的降噪效果怎么样，坐地铁的时候能听清楚吗？",
    "我上周买的羊毛大衣尺码偏小，请问可以免费换一件大一号的吗",
    "儿童防水运动鞋",
    "适合油性皮肤的洗发水，要无硅油而且味道清淡一点的",
    "买了iPhone 15 Pro手机壳，结果发成了 Samsung 的，怎么退货？",
]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("where is my  card?", ["where", "is", "my", "card?"]),
        ("我爱北京天安门", ["我", "爱", "北京", "天安门"]),
        ("买iPhone 13 Pro 数据线，很快!", ["买", "iPhone", "13", "Pro", "数据线", "很快"]),
        ("USB-C数据线 2 米\n白色", ["USB-C", "数据线", "2", "米", "白色"]),
        ("don't 买 it!!", ["don't", "买", "it!!"]),
        ("???", ["???"]),
        ("。。。 好", ["。。。", "好"]),
        (" \n\t", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab1 ，。！\n\t你好世界手机壳 e\u0301\U0001f600\u200d\U00020bb7"), max_size=30))
def test_joining_restores_the_text(text):
    words, gaps = words_and_gaps(text)
    assert len(gaps) == len(words) + 1
    assert gaps[0] + "".join(w + g for w, g in zip(words, gaps[1:], strict=True)) == text


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("ab1 ，。\n你好手机壳e\u0301\u200b"), min_size=1, max_size=20).filter(
        lambda t: not is_blank(t)
    ),
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_a_text_never_becomes_empty(text, kind, strength, seed):
    assert not is_blank(add_noise(text, kind, strength, random.Random(seed)))


def test_each_kind_by_hand():
    class Rng(random.Random):
        """Takes the first places, and rounds down."""

        def sample(self, population, k):
            return list(population)[:k]

        def shuffle(self, x):
            pass

        def random(self):
            return 0.999

    assert add_noise(" one two, three four. ", "random_delete", 0.5, Rng()) == " three four. "
    assert add_noise("你好，世界。", "random_delete", 0.5, Rng()) == "世界。"
    assert add_noise("one two\tthree\nfour", "random_delete", 0.1, Rng()) == "two\tthree\nfour"
    assert add_noise("one two, three four.", "random_swap", 0.5, Rng()) == "two, one three four."
    assert add_noise("one two, three four.", "random_swap", 1, Rng()) == "two, one four. three"
    assert add_noise("你好，世界。", "random_swap", 0.1, Rng()) == "世界，你好。"
    assert add_noise("go go now", "random_swap", 1, Rng()) == "go now go"
    assert add_noise("a b cd", "char_delete", 0.5, Rng()) == "  cd"
    assert add_noise("e\u0301a", "char_delete", 0.1, Rng()) == "a"
    assert add_noise("a b", "char_delete", 1, Rng()) == " b"


def test_words_beside_a_swapped_pair_are_still_free():
    class LastFirst(random.Random):
        def shuffle(self, x):
            x.reverse()

    assert add_noise("one two three four", "random_swap", 1, LastFirst()) == "two one four three"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a", "耳", "e\u0301"])
def test_one_unit_alone_does_not_change(kind, text):
    assert add_noise(text, kind, 1, random.Random(0)) == text


def test_a_lone_word_keeps_its_letters_under_word_noise():
    assert add_noise("shoes", "random_delete", 1, random.Random(0)) == "shoes"
    assert add_noise("go go go", "random_swap", 1, random.Random(0)) == "go go go"


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_zero_probability_or_strength_changes_nothing(kind):
    for text in ENGLISH + CHINESE:
        assert TextNoise(kind, 0, 0.5)(text, 0, 0, "anchor") == text
        assert TextNoise(kind, 1, 0)(text, 0, 0, "anchor") == text
        assert TextNoise("none", 1, 1)(text, 0, 0, "anchor") == text


def test_the_draw_depends_on_its_coordinates_alone():
    noise = TextNoise("random_delete", 0.5, 0.3, seed=7)
    places = [(epoch, row, column) for epoch in range(3) for row in range(50) for column in ("anchor", "positive")]
    text = ENGLISH[1]
    forward = {place: noise(text, *place) for place in places}
    backward = {place: TextNoise("random_delete", 0.5, 0.3, seed=7)(text, *place) for place in reversed(places)}
    assert forward == backward
    for varied in (
        [noise(text, 0, row, "anchor") for row in range(50)],
        [noise(text, epoch, 0, "anchor") for epoch in range(50)],
        [TextNoise("random_delete", 0.5, 0.3, seed=seed)(text, 0, 0, "anchor") for seed in range(50)],
    ):
        assert 10 < sum(one != text for one in varied) < 40
        assert len(set(varied)) > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_a_sample_is_touched_in_all_its_columns_or_in_none_and_each_in_its_own_way(kind, texts):
    texts = [text for text in texts if has_room(text, kind)]
    noise, columns = TextNoise(kind, 0.3, 0.3, seed=1), ("anchor", "positive", "negative_1", "negative_2")
    samples = [[noise(texts[row % len(texts)], 2, row, column) for column in columns] for row in range(800)]
    touched = [[text != texts[row % len(texts)] for text in sample] for row, sample in enumerate(samples)]
    assert all(len(set(sample)) == 1 for sample in touched)
    assert abs(sum(sample[0] for sample in touched) - 240) < 4 * math.sqrt(800 * 0.3 * 0.7)  # of a binomial
    ways = [len(set(sample)) for sample, (changed_, *_) in zip(samples, touched, strict=True) if changed_]
    assert sum(way > 1 for way in ways) > 0.75 * len(ways)


# --- both shares ------------------------------------------------------------------------------------------------------


def units(text: str, kind: str) -> list[str]:
    return list("".join(text.split())) if kind == "char_delete" else split_words(text)


def has_room(text: str, kind: str) -> bool:
    found = units(text, kind)
    return len(set(found)) > 1 if kind == "random_swap" else len(found) > 1


def changed(before: str, after: str, kind: str) -> int:
    """How many units of a text were dropped or moved, read off the two texts alone."""
    if kind == "char_delete":
        return len("".join(before.split())) - len("".join(after.split()))
    return {"random_delete": dropped_words, "random_swap": moved_words}[kind](before, after)


def letters(text: str) -> str:
    """Without spaces and punctuation, which go with a dropped word or stay, as the place has it."""
    return "".join(letter for letter in text if letter.isalnum())


def dropped_words(before: str, after: str) -> int:
    """The fewest words of `before` to drop so that the rest, run together, is `after` run together."""
    words, rest = map(letters, split_words(before)), letters(after)
    fewest = {0: 0}  # letters of `rest` explained so far: words dropped
    for word in words:
        following = {at: count + 1 for at, count in fewest.items()}
        for at, count in fewest.items():
            if rest.startswith(word, at):
                end = at + len(word)
                following[end] = min(count, following.get(end, count))
        fewest = following
    return fewest[len(rest)]


def moved_words(before: str, after: str) -> int:
    """The fewest words in swapped neighbouring pairs that turn `before` into `after`; gaps stay where they are."""
    words, gaps = words_and_gaps(before)
    at, moved = len(gaps[0]), [0] + [math.inf] * (len(words) + 1)
    for i, word in enumerate(words):
        if after.startswith(word + gaps[i + 1], at):
            moved[i + 1] = min(moved[i + 1], moved[i])
        if i + 1 < len(words) and after.startswith(words[i + 1] + gaps[i + 1] + word + gaps[i + 2], at):
            moved[i + 2] = min(moved[i + 2], moved[i] + 2)
        at += len(word + gaps[i + 1])
    return int(moved[len(words)])


def expected_change(n: int, strength: float, kind: str) -> float:
    """Units that change in a text of n: strength * n on average, but one drop or one swap at least."""
    least = 2 if kind == "random_swap" else 1
    return max(least, strength * n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [ENGLISH * 160, CHINESE * 160], ids=["english", "chinese"])
@pytest.mark.parametrize(("prob", "strength"), [(0.1, 0.1), (0.5, 0.3)])
def test_shares_are_what_the_knobs_say(texts, kind, prob, strength):
    texts = [text for text in texts if has_room(text, kind)]
    noise = TextNoise(kind, prob, strength, seed=3)
    noisy = [noise(text, 1, row, "anchor") for row, text in enumerate(texts)]
    touched = [(before, after) for before, after in zip(texts, noisy, strict=True) if before != after]
    spread = math.sqrt(len(texts) * prob * (1 - prob))  # of a binomial
    assert abs(len(touched) - prob * len(texts)) < 4 * spread

    moved = sum(changed(before, after, kind) for before, after in touched)
    wanted = sum(expected_change(len(units(before, kind)), strength, kind) for before, _ in touched)
    each = 2 if kind == "random_swap" else 1
    assert abs(moved - wanted) < 4 * each * math.sqrt(len(touched) / 4)  # rounding is a coin flip a text
