"""The Chinese sample shop keeps what the documents say about it: counts, splits without leaks, texts of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ebr_lib.data.pairs import read_pairs
from ebr_lib.data.text import language_of

SHOP = Path(__file__).parents[2] / "train_text" / "zh"
COLUMNS = ["item_id", "title", "category", "category_zh", "price", "description"]


def rows_of(name: str) -> list[tuple[str, str]]:
    return [(row.anchor, row.positives[0]) for row in read_pairs(SHOP / name)]


@pytest.fixture(scope="module")
def items() -> list[dict[str, str]]:
    found = []
    for file in sorted((SHOP / "catalogue").glob("*.csv")):
        header, *lines = file.read_text(encoding="utf-8").splitlines()
        assert header.split("\x01") == COLUMNS
        found += [dict(zip(COLUMNS, line.split("\x01"), strict=True)) for line in lines]
    return found


def test_every_category_has_products_with_texts_of_their_own(items):
    assert len(items) == 241
    per_category = Counter((item["category"], item["category_zh"]) for item in items)
    assert len(per_category) == 12 and min(per_category.values()) >= 20
    for column in ("item_id", "title", "description"):
        assert len({item[column] for item in items}) == len(items), column
    assert all(language_of(item["description"]) == "Chinese" for item in items)
    assert all(float(item["price"]) > 0 and 40 <= len(item["description"]) <= 90 for item in items)


def test_no_description_is_made_from_a_template(items):
    texts = [item["description"] for item in items]
    shared = Counter(piece for text in texts for piece in {text[i : i + 7] for i in range(len(text) - 6)})
    assert [piece for piece, count in shared.items() if count > 1] == []
    assert max(Counter(text[:4] for text in texts).values()) <= 2


def test_every_product_has_three_queries_and_none_is_on_both_sides(items):
    train, heldout = rows_of("queries.jsonl"), rows_of("heldout/queries.jsonl")
    assert (len(train), len(heldout)) == (597, 126)
    asked = [query for query, _ in train + heldout]
    assert len(set(asked)) == len(asked)
    assert Counter(text for _, text in train + heldout) == {item["description"]: 3 for item in items}
    unseen = {text for _, text in heldout} - {text for _, text in train}
    assert len(unseen) == 26
    category = {item["description"]: item["category"] for item in items}
    assert len({category[text] for text in unseen}) == 12


def test_queries_are_short_and_typed_as_people_type(items):
    asked = [query for query, _ in rows_of("queries.jsonl") + rows_of("heldout/queries.jsonl")]
    assert max(map(len, asked)) <= 24 and sum(map(len, asked)) / len(asked) < 10
    assert sum(any(letter.isascii() and letter.isalpha() for letter in query) for query in asked) >= 50
    texts = "\n".join(item["title"] + item["description"] for item in items)
    assert sum(query in texts for query in asked) < 0.05 * len(asked)  # words alone do not find the product


def test_similar_items_are_products_and_held_out_ones_are_in_no_training_pair(items):
    train, heldout = rows_of("similar/pairs.jsonl"), rows_of("similar/heldout/pairs.jsonl")
    assert (len(train), len(heldout)) == (92, 28)
    pairs = [frozenset(pair) for pair in train + heldout]
    assert len(set(pairs)) == len(pairs) and all(len(pair) == 2 for pair in pairs)
    known = {item["description"] for item in items}
    sides = [{text for pair in rows for text in pair} for rows in (train, heldout)]
    assert sides[0] | sides[1] <= known and not sides[0] & sides[1]
