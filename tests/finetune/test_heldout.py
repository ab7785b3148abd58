"""The held-out task and what the run says of it: which documents training has seen, and which texts leak."""

from __future__ import annotations

import json

import pytest

from ebr_lib.data.pairs import Pair, TrainingRow
from ebr_lib.data.text import normalised
from ebr_lib.finetune.heldout import build_task
from ebr_lib.finetune.run import _Data, _save_heldout, _say_what_leaks

HELDOUT = [("query", "The  Document")]
TRAIN = {
    "its text is a positive": (TrainingRow("other", "the document"), True),
    "its text is an anchor": (TrainingRow("THE document", "other"), True),
    "its text is a negative": (TrainingRow("other", "another", ("x", "the document")), True),
    "nowhere": (TrainingRow("query two", "the documents"), False),
}


@pytest.mark.parametrize(("row", "seen"), TRAIN.values(), ids=TRAIN)
def test_a_document_is_unseen_when_no_training_row_has_its_text(row, seen, tmp_path):
    """In the measure, and in the corpus that the evaluation stage reads."""
    assert build_task(HELDOUT, [row], normalised, 10, 0).seen == (seen,)
    _save_heldout(_Data([row], [TrainingRow(*HELDOUT[0])], None, ""), tmp_path)
    corpus = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    flags = {normalised(document["text"]): document["seen"] for document in corpus}
    assert flags == {normalised(row.positive): True} | {"the document": seen}


@pytest.mark.parametrize(
    ("train", "heldout", "said"),
    [
        (("where is my card", "page a"), ("where is my card?", "a thing of wool"), ["1 条 held-out anchors"]),
        (("where is my card", "page a"), ("Page A", "a thing of wool"), ["1 条 held-out anchors"]),
        (("where is my card", "page a"), ("my tent", "where is my cards"), ["1 条 held-out documents"]),
        (("x y z", "page a"), ("page a", "x y z"), ["1 条 held-out anchors", "1 条 held-out documents"]),
        (("where is my card", "page a"), ("my tent", "page a"), ["that training has too (seen): 1"]),
        (
            ("where is my card", "a page of wool"),
            ("my tent", "a page of wools"),
            ["near-duplicates of training documents: 1"],
        ),
        (("where is my card", "page a"), ("my tent", "a thing of wool"), []),
    ],
)
def test_leaks_are_found_in_both_columns(caplog, train, heldout, said):
    with caplog.at_level("INFO", "ebr_lib"):
        _say_what_leaks([Pair(train[0], (train[1],))], [Pair(heldout[0], (heldout[1],))])
    assert len(caplog.messages) == len(said)
    for line, wanted in zip(caplog.messages, said, strict=True):
        assert wanted in line
        assert ("泄漏" in line) is ("held-out" in wanted)
