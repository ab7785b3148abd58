"""The rows of a run: which are read, which are held out, which held-out texts leak."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ebr_lib.data.pairs import Pair
from ebr_lib.errors import DataError
from ebr_lib.finetune.rows import read_rows, warn_of_leaks
from tests.finetune.conftest import write_rows

GIVEN = {
    "on_bad_row": "error", "rejects": None, "heldout_rejects": None, "label_column": None, "eval_ratio": 0.25,
    "eval_corpus_size": 2000, "leave_out_own": True, "seed": 42,
}  # fmt: skip


def read(data_path, eval_data_path=None, **more):
    return read_rows(str(data_path), eval_data_path, **(GIVEN | more))


def test_the_held_out_corpus_has_the_size_given(pairs):
    own = len(read(pairs, eval_corpus_size=1).task.documents)  # those of the held-out pairs are always in
    assert len(read(pairs, eval_corpus_size=own + 1).task.documents) == own + 1
    assert own + 1 < len(read(pairs).task.documents) == 16


def test_the_label_column_decides_which_rows_are_trained_on(tmp_path):
    rows = [{"anchor": f"want {i}", "positive": f"thing {i}", "score": 0.5, "click": i % 2} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for column, count in (("none", 6), ("click", 3)):
        found = read(path, path, label_column=column, on_bad_row="skip")
        assert (len(found.train), len(found.heldout)) == (count, count)
    with pytest.raises(DataError, match=r"`score` is 0\.5"):
        read(path, path, on_bad_row="skip")


def test_an_anchor_is_neither_its_answer_nor_a_competitor(pairs, tmp_path, caplog):
    """Item to item: of the held-out anchors the first has one more answer, the second none, the third another one."""
    caplog.set_level("INFO", "ebr_lib")
    rows = [("anchor", ["ANCHOR ", "answer"]), ("alone", ["alone"]), ("third", ["answer"])]
    rows = [{"anchor": anchor, "positive": positives} for anchor, positives in rows]
    heldout = tmp_path / "heldout.json"
    heldout.write_text(json.dumps(rows))
    one, other = (read(pairs, str(heldout), leave_out_own=own).task for own in (True, False))
    assert one.documents == other.documents and one.documents[:3] == ("ANCHOR ", "answer", "alone")
    assert (one.queries, other.queries) == (("anchor", "third"), ("anchor", "alone", "third"))
    assert (one.relevant, other.relevant) == (({1}, {1}), ({0, 1}, {2}, {1}))
    assert (one.own, one.without_answer, other.without_answer) == (({0}, set()), 1, 0)
    assert "held-out anchors that are their only answer are not measured: 1" in caplog.text

    vectors = dict(zip(one.documents, np.eye(len(one.documents), dtype=np.float32), strict=True))
    vectors |= {"anchor": vectors["ANCHOR "] + 0.5 * vectors["answer"], "third": vectors["answer"]}

    def encode(texts):
        return np.stack([vectors[text] for text in texts])

    assert [task.measure(encode, encode)["recall@1"].tolist() for task in (one, other)] == [[1, 1], [0.5, 1, 1]]
    heldout.write_text(json.dumps(rows[1:2]))
    with pytest.raises(DataError, match="every held-out anchor has itself as its only answer"):
        read(pairs, str(heldout))


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
        warn_of_leaks([Pair(train[0], (train[1],))], [Pair(heldout[0], (heldout[1],))])
    assert len(caplog.messages) == len(said)
    for line, wanted in zip(caplog.messages, said, strict=True):
        assert wanted in line
        assert ("泄漏" in line) is ("held-out" in wanted)
