"""The word list of `make lint` finds what reads as if translated, and leaves plain sentences alone."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/plain_words.py"


@pytest.fixture(scope="module")
def words():
    spec = importlib.util.spec_from_file_location("plain_words", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("the engine is told of it", "told"),
        ("in the stead of another", "stead"),
        ("this is no picture", "is no"),
        ("one process a GPU", "one process a GPU"),
        ("a row a pair", "a row a pair"),
        ("Tokens a batch, padding included", "Tokens a batch"),
        ("all but for one", "but for"),
        ("def test_a_run_is_told(): ...", "told"),
        ("def test_it_is_no_picture(): ...", "is_no"),
    ],
)
def test_translated_words_are_found(words, line, word):
    assert [found for found, _ in words.forbidden(line)] == [word]


@pytest.mark.parametrize(
    "line",
    [
        "replace it instead",
        "there is no such file",
        "def test_there_is_no_cycle(): ...",
        "Tokens a text is cut to",
        "rows of a file",
        "it is no longer used",
    ],
)
def test_plain_sentences_pass(words, line):
    assert not list(words.forbidden(line))
