"""Reading pairs: every layout reads the same, every bad row is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebr_lib.data import records
from ebr_lib.data import text as data_text
from ebr_lib.data.pairs import Pair, expand, read_pairs, warn_of_heldout_names
from ebr_lib.data.text import normalised
from ebr_lib.errors import DataError, MissingError
from ebr_lib.finetune import split
from ebr_lib.finetune.split import near_duplicate_groups, split_pairs

ROWS = [
    {"anchor": "无线耳机", "positive": "蓝牙降噪耳机", "negative": "有线音箱"},
    {"anchor": "running shoes", "positive": ["light trainers", "跑鞋"], "negative": ["boots", "sandals"]},
    {"anchor": 'a "quoted"\nline\u2028', "positive": "x"},
]


def texts(pairs):
    return [(p.anchor, p.positives, p.negatives) for p in pairs]


WANTED = [
    ("无线耳机", ("蓝牙降噪耳机",), ("有线音箱",)),
    ("running shoes", ("light trainers", "跑鞋"), ("boots", "sandals")),
    ('a "quoted"\nline\u2028', ("x",), ()),
]


@pytest.mark.parametrize(
    "text", ["Phone case", " phone\u3000CASE\n", "ｐｈｏｎｅ case", "\ufeffpho\u00adne case\u200b", "\u2060phone case"]
)
def test_equal_texts_differ_in_what_shows_nothing(text):
    assert data_text.normalised(text) == "phone case"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, ensure_ascii=False),
        json.dumps(ROWS, ensure_ascii=False, indent=2),
        "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS),
        "\r\n\r\n".join(json.dumps(r) for r in ROWS) + "\r\n\r\n",
        "\n\n" + json.dumps(ROWS, indent=4).replace("\n", "\r\n"),
    ],
    ids=["array", "indented", "lines", "crlf lines", "crlf array"],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_layouts_read_the_same(tmp_path, monkeypatch, text, bom, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    file = tmp_path / "any.ending"
    file.write_bytes(bom + text.encode())
    assert texts(read_pairs(file)) == WANTED


json_texts = st.text(st.sampled_from('ab"\\\\\n\t{}[],: 好\u2028\U0001f600'), min_size=1).filter(lambda t: t.strip())


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(json_texts, st.lists(json_texts, min_size=1, max_size=2)), min_size=1, max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.sampled_from([1, 3, 50]),
)
def test_any_texts_come_back(tmp_path_factory, rows, indent, ascii_only, chunk):
    file = tmp_path_factory.mktemp("rows") / "a.json"
    values = [{"anchor": anchor, "positive": positives} for anchor, positives in rows]
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        found = read_pairs(file)
    assert [(p.anchor, list(p.positives)) for p in found] == rows
    lines = file.read_text(encoding="utf-8").split("\n")
    assert all("{" in lines[p.line - 1] for p in found)


def test_a_broken_array_is_not_read_to_its_end(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    row = '{"anchor": "a", "positive": "b"},\n'
    file.write_text("[" + row + '{"anchor": "a" "positive": "b"},\n' + row * 1000 + row[:-2] + "]")
    monkeypatch.setattr(records, "_CHUNK", 100)
    window = records._Window(file)
    window.take("[")
    window.row()
    window.take(",")
    window.next_letter()
    with pytest.raises(DataError, match="line 2: the JSON is broken"):
        window.row()
    assert len(window._text) < 300


def test_lines_are_those_of_the_file(tmp_path):
    indented = tmp_path / "a.json"
    indented.write_text("[\n" + ",\n\n".join(json.dumps(r, indent=1) for r in ROWS[:2]) + "\n]")
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n" + "\n\n".join(json.dumps(r) for r in ROWS))
    assert [(Path(p.file).name, p.line) for p in read_pairs(tmp_path)] == [
        ("a.json", 2), ("a.json", 8), ("b.jsonl", 2), ("b.jsonl", 4), ("b.jsonl", 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1.0], "neg_scores": [0.1, 0.2],
          "prompt": "Represent", "type": "normal"}, ("q", ("p",), ("n", "m"))),
        ({"query": "q", "pos": "p", "neg": []}, ("q", ("p",), ())),
        ({"anchor": "q", "positives": ["p"], "negatives": None}, ("q", ("p",), ())),
        ({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": None}, ("q", ("p",), ("n",))),
    ],
)  # fmt: skip
def test_other_libraries_names(tmp_path, row, wanted):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    assert texts(read_pairs(file)) == [wanted]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"query_id": "7", "query": "q", "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
          "negative_passages": [{"docid": "2", "title": "", "text": "n"}, {"docid": "3", "text": "m"}]},
         ("q", ("T p",), ("n", "m"))),
        ({"query": "q", "positive_passages": [{"docid": "1", "title": None, "text": "p", "score": 12.5}],
          "negative_passages": []}, ("q", ("p",), ())),
        ({"query": "q", "positive_passages": ["p"], "negative_passages": [{"text": "n", "label": 0}]},
         ("q", ("p",), ("n",))),
        ({"messages": [{"role": "user", "content": "q"}],
          "positive_messages": [[{"role": "user", "content": "p"}]],
          "negative_messages": [[{"role": "user", "content": "n"}], [{"role": "assistant", "content": "m"}]]},
         ("q", ("p",), ("n", "m"))),
        ({"messages": [{"role": "system", "content": "Find it."}, {"role": "user", "content": "q"}],
          "positive_messages": [{"role": "assistant", "content": "p"}], "label": 1}, ("Find it. q", ("p",), ())),
        ({"query": "q", "response": "p", "rejected_response": ["n", "m"]}, ("q", ("p",), ("n", "m"))),
        ({"query": "q", "response": "p", "rejected_response": "n", "label": 1.0}, ("q", ("p",), ("n",))),
    ],
)  # fmt: skip
def test_rows_of_tevatron_and_swift(tmp_path, row, wanted):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    assert texts(read_pairs(file)) == [wanted]


@pytest.mark.parametrize("blank", ["", "  ", "\u200b", None, float("nan"), [], ["", None, float("nan")], {"text": ""}])
@pytest.mark.parametrize("column", ["neg", "negative_1", "negative_passages"])
def test_a_blank_negative_is_none(tmp_path, blank, column):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"query": "q", "pos": ["p"], column: blank}))
    assert texts(read_pairs(file)) == [("q", ("p",), ())]


def test_blank_negatives_go_and_the_others_stay(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n", "", None, "m"], "negative_1": " "}))
    assert texts(read_pairs(file)) == [("q", ("p",), ("n", "m"))]


PAIR = {"anchor": "a", "positive": "b"}
YES = [1, 1.0, True, "1", "1.0", "true", "Entailment", "duplicate", "是", [1]]
NO = [0, 0.0, False, -1, "0", "-1", "no", "contradiction", "neutral", "不相似", [0], [1, 0], None, "", float("nan")]
DEGREE = [0.2, 4.5, 2, "0.8", "Kitchen", [0.7], {"a": 1}]


@pytest.mark.parametrize("label", YES, ids=repr)
@pytest.mark.parametrize("column", ["label", "Score", "similarity", "is_duplicate", "relevance"])
def test_a_label_that_says_yes_is_a_positive(tmp_path, label, column):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR | {column: label}))
    assert texts(read_pairs(file)) == [("a", ("b",), ())]


@pytest.mark.parametrize("label", NO, ids=repr)
@pytest.mark.parametrize("column", ["label", "Score", "similarity", "is_duplicate", "relevance"])
def test_a_label_that_says_no_is_never_a_positive(tmp_path, label, column):
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR | {column: label})}")
    with pytest.raises(DataError, match=f"line 2: `{column}` is"):
        read_pairs(file)
    assert [pair.line for pair in read_pairs(file, on_bad_row="skip")] == [1]


@pytest.mark.parametrize("label", DEGREE, ids=repr)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_label_of_degree_stops_the_run_for_no_row_says_where_it_begins(tmp_path, label, mode):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(PAIR | {"score": one}) + "\n" for one in (1.0, label)))
    with pytest.raises(DataError, match=r"line 2: `score` is .*, neither yes .* nor no"):
        read_pairs(file, on_bad_row=mode)


@pytest.mark.parametrize("name", ["gold_label", "Similarity Score", "cosine_score", "isMatch", "is-relevant", "label "])
def test_a_label_is_known_by_the_words_of_its_name(tmp_path, name):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR | {name: 0}))
    with pytest.raises(DataError, match=f"line 1: `{name}` is 0"):
        read_pairs(file)


@pytest.mark.parametrize("name", ["pos_scores", "neg_scores", "type", "labelled_by", "score_source"])
def test_other_columns_are_read_past(tmp_path, name):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR | {name: [0.2]}))
    assert texts(read_pairs(file)) == [("a", ("b",), ())]


def test_the_label_column_can_be_given(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    rows = [PAIR | {"score": 37.5, "click": click} for click in (1, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, PAIR)))
    with pytest.raises(DataError, match=r"`score` is 37.5.*set label_column: none"):
        read_pairs(file)
    assert len(read_pairs(file, label_column="none")) == 3
    assert "set label_column to it" not in caplog.text
    with pytest.raises(DataError, match=r"(?s)2 of 3 rows.*line 2: `click` is 0.*line 3: `click` is missing"):
        read_pairs(file, label_column="click")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize(("values", "warned"), [([0, 1], True), ([0, 0], True), ([1, 1], False), ([0, 2], False)])
def test_columns_of_0_and_1_that_are_not_used_are_warned_of(tmp_path, caplog, name, values, warned):
    frame = pd.DataFrame([PAIR | {"click": value} for value in values])
    file = tmp_path / name
    if name == "a.jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        (frame.to_csv if name == "a.csv" else frame.to_parquet)(file, index=False)
    assert len(read_pairs(file)) == 2
    assert ("set label_column to it" in caplog.text) is warned


def test_labels_of_a_list(tmp_path):
    file = tmp_path / "a.jsonl"

    def read(label):
        file.write_text(json.dumps({"query": "q", "pos": ["p", "r"], "neg": ["n"], "labels": label}))
        return texts(read_pairs(file))

    assert read([1, 1]) == read([1, 1, 0]) == [("q", ("p", "r"), ("n",))]
    for wrong in ([1, 0], [1], [1, 1, 1], [0, 1, 0], []):
        with pytest.raises(DataError, match="line 1: `labels` is"):
            read(wrong)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "q", "positive_passages": [{"text": "p", "label": 0}]}, "a passage whose `label` is 0"),
        ({"query": "q", "pos": [{"text": "p", "score": 0.0}]}, "a passage whose `score` is 0.0"),
        ({"query": "q", "pos": ["p"], "neg": [{"text": "n", "label": 1}]}, "a passage whose `label` is 1"),
        ({"query": "q", "pos": [{"docid": "1"}]}, "`pos`: wanted a text, found an object"),
        ({"messages": [{"role": "user", "content": "q"}], "positive_messages": [[{"role": "user", "content": "p"}]],
          "images": ["a.jpg"]}, "`images`: only texts are trained on"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "p"}],
          "positive_messages": [[{"role": "user", "content": "p"}]]}, "`messages`: wanted one message"),
        ({"messages": "q", "positive_messages": [[{"role": "user", "content": "p"}]]}, "`messages`: wanted one"),
        ({"query": "q", "positive_document_ids": ["1"]}, "Tevatron's rows that name documents by id"),
        ({"question": "q", "positive_ctxs": [{"text": "p"}]}, "DPR's rows"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "NLI's rows; keep the entailments alone"),
        ({"data": {"train": [{"anchor": "a", "positive": "b"}]}}, "the rows seem to be inside of these"),
        ({"0": {"anchor": "a", "positive": "b"}}, "the rows seem to be inside of these"),
        ({"rows": [{"row_idx": 0, "row": {"anchor": "a", "positive": "b"}}]}, "the rows seem to be inside of these"),
        ({"columns": ["anchor", "positive"], "data": [["a", "b"]]}, "the rows seem to be inside of these"),
        ({"sentence1": "a", "sentence2": "b"}, "rename them to `anchor` and `positive`"),
        ({"query": {"0": "q", "1": "r"}, "pos": {"0": "p", "1": "s"}}, "to_json(path, orient='records', lines=True"),
        ({"query": ["q", "r"], "pos": ["p", "s"]}, "to_json(path, orient='records', lines=True"),
    ],
)  # fmt: skip
def test_rows_that_say_something_else_are_named(tmp_path, row, reason):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError) as error:
        read_pairs(file)
    assert reason in str(error.value) and "a.jsonl, line 1: " in str(error.value)


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("text_a", "text_b"), ("question1", "question2")])
def test_sentence_pairs_are_read_by_their_labels(tmp_path, names):
    file = tmp_path / "a.jsonl"
    rows = [dict(zip((*names, "label"), (f"a {i}", f"b {i}", i % 2), strict=True)) for i in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="2 of 4 rows"):
        read_pairs(file)
    found = read_pairs(file, on_bad_row="skip")
    assert texts(found) == [("a 1", ("b 1",), ()), ("a 3", ("b 3",), ())]


def test_unused_columns_are_logged(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"query": "q", "pos": ["p"], "prompt": "x", "type": "y", "half \ud83d": 1}))
    with caplog.at_level("INFO", "ebr_lib"):
        read_pairs(file)
    assert caplog.messages[1:] == ["未使用的列 columns not used: prompt, type, half \\ud83d"]


BAD = [
    ('{"anchor": "a"}', "no `positive` column; found 'anchor': rename the column"),
    ('{"anchor": "a", "positve": "b"}', "rename `positve` to `positive`"),
    ('{"Query": "a", "pos": "b"}', "rename `Query` to `anchor`"),
    ('{"anchor": "", "positive": "b"}', "`anchor` is empty"),
    ('{"anchor": "a", "positive": " \\u200b\\t"}', "`positive` is blank"),
    ('{"anchor": "a", "positive": null}', "`positive`: wanted a text, found null"),
    ('{"anchor": "a", "positive": []}', "`positive` is an empty list"),
    ('{"anchor": "a", "positive": ["b", 3]}', "`positive`: wanted a text, found the number 3"),
    ('{"anchor": ["a"], "positive": "b"}', "`anchor`: wanted a text, found a list"),
    ('{"anchor": "a", "positive": "b", "negative": 3}', "`negative`: wanted a text, found the number 3"),
    ('{"anchor": "a", "positive": "b", "pos": "c"}', "`positive` and `pos` both name the positive"),
    ('{"anchor": "a", "positive": "\\ud83d"}', "half a character"),
    ('{"anchor": true, "positive": "b"}', "`anchor`: wanted a text, found true or false"),
    ("{}", "no `anchor` column; found none: rename the column that holds the anchor to `anchor`"),
    ('["a", "b"]', "found a list"),
    ('"a, b"', "found a text"),
    ("12", "found the number 12"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_bad_rows_are_named(tmp_path, row, reason, layout):
    good = '{"anchor": "a", "positive": "b"}'
    file = tmp_path / "bad.json"
    file.write_text(f"{good}\n{good}\n{row}\n" if layout == "lines" else f"[{good},\n{good},\n{row}\n]")
    with pytest.raises(DataError, match="1 of 3 rows") as error:
        read_pairs(file)
    assert reason in str(error.value)
    assert "bad.json, line 3:" in str(error.value)


def test_the_first_bad_rows_are_listed_one_a_line_and_the_others_counted(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"anchor": "", "positive": "b"}\n' * 7)
    with pytest.raises(DataError) as error:
        read_pairs(file)
    first, *lines, last = str(error.value).split("\n")
    assert first.startswith("7 of 7 rows cannot be used")
    assert lines == [f"  {file}, line {line}: `anchor` is empty" for line in range(1, 6)]
    assert last == "  … and 2 more"


def test_bad_lines_that_are_not_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"anchor": "a", "positive": "b"}\n{"anchor": \n' + '{"anchor": "中文", "positive": "b"}'.encode("gbk")
    )
    with pytest.raises(DataError) as error:
        read_pairs(file)
    assert "line 2: not a JSON object on one line" in str(error.value)
    assert "line 3: not UTF-8 (byte 13 of the line)" in str(error.value)


def test_skip_counts_and_keeps_the_rows(tmp_path, caplog):
    file, rejects = tmp_path / "a.json", tmp_path / "out" / "rejects.jsonl"
    file.write_text("[\n" + ",\n".join(row for row, _ in BAD) + ',\n{"anchor": "a", "positive": "b"}]')
    found = read_pairs(file, on_bad_row="skip", rejects=rejects)
    assert found == [Pair("a", ("b",), (), str(file), 2 + len(BAD))]
    assert f"bad rows skipped: {len(BAD)} (first: {BAD[0][1]}" in caplog.text
    kept = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(k["file"], k["line"], k["row"]) for k in kept] == [
        (str(file), 2 + i, row) for i, (row, _) in enumerate(BAD)
    ]
    file.write_text('[{"anchor": "a", "positive": "b"}]')
    read_pairs(file, on_bad_row="skip", rejects=rejects)
    assert not rejects.exists()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            '[{"anchor": "a", "positive": "b"}\n{"anchor"',
            "line 2: wanted ',' or ']', found '{'; the JSON is broken there",
        ),
        ('[{"anchor": "a", "positive": "b"},\n\n{"anchor": \n oops}]', "line 4: the JSON is broken"),
        ('[{"anchor": "a", "positive": "b"}', "found the end of the file"),
        ('[{"anchor": "a", "positive": "b"}]\n]', "line 2: ']' after the end"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_broken_arrays_always_stop(tmp_path, text, where, mode):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_pairs(file, on_bad_row=mode)
    assert where in str(error.value)


def test_missing_and_empty(tmp_path):
    with pytest.raises(MissingError, match="no such file or folder"):
        read_pairs(tmp_path / "nothing")
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(MissingError, match=r"holds notes.txt \(no pattern .*\), sub \(in a subfolder\)"):
        read_pairs(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no training rows"):
        read_pairs(tmp_path)
    (tmp_path / "c.json").write_bytes('[{"anchor": "a", "positive": "b"}]'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_pairs(tmp_path)


def test_folder_order_and_several(tmp_path):
    for name in ("b.jsonl", "a.json", "C.JSON", ".hidden.json"):
        (tmp_path / name).write_text(json.dumps({"anchor": name, "positive": "p"}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.json").write_text(json.dumps({"anchor": "d", "positive": "p"}))
    assert [p.anchor for p in read_pairs(tmp_path)] == ["C.JSON", "a.json", "b.jsonl"]
    assert [p.anchor for p in read_pairs([tmp_path / "sub", str(tmp_path / "a.json")])] == ["d", "a.json"]
    assert [p.anchor for p in read_pairs([tmp_path, tmp_path / "a.json"])] == ["C.JSON", "a.json", "b.jsonl"]


def test_a_folder_names_what_it_took_and_what_it_did_not(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.jsonl").write_text(json.dumps(PAIR))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 2)
    (folder / "rows.csv").write_text("anchor,positive\nc,d\n")
    (folder / "packed.csv.GZ").write_bytes(gzip.compress(b"anchor,positive\ne,f\ng,h\n"))
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "linked.jsonl").symlink_to(elsewhere / "linked.jsonl")
    (folder / "broken.jsonl").symlink_to(elsewhere / "nothing.jsonl")
    (folder / "empty.jsonl").touch()
    (folder / "notes.md").write_text("x")
    (folder / ".hidden.jsonl").write_text("x")
    (tmp_path / "by_link").symlink_to(folder)
    for place in (folder, tmp_path / "by_link"):
        caplog.clear()
        with caplog.at_level("INFO", "ebr_lib"):
            assert len(read_pairs(place)) == 6
        (read,) = [line for line in caplog.messages if "read:" in line and "not read" not in line]
        for name, rows in {
            "a.jsonl": 2,
            "rows.csv": 1,
            "packed.csv.GZ": 2,
            "blank.jsonl": 0,
            "linked.jsonl": 1,
        }.items():
            assert f"{name} ({rows} rows)" in read
        left_out = [line for line in caplog.messages if "not read" in line]
        for name in ("broken.jsonl", "empty.jsonl", "notes.md", ".hidden.jsonl"):
            assert sum(line.endswith(f": {name}") for line in left_out) == 1
        assert any("no rows in" in line and "blank.jsonl" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("name", "warned"),
    [("dev.jsonl", True), ("my-test.json", True), ("train_valid.csv", True), ("EVAL.jsonl", True),
     ("验证集.jsonl", True), ("testset.jsonl", True),
     ("latest.jsonl", False), ("contest.jsonl", False), ("device.jsonl", False)],
)  # fmt: skip
def test_names_of_held_out_data_are_warned_of(tmp_path, caplog, name, warned):
    (tmp_path / name).write_text("anchor,positive\na,b\n" if name.endswith("csv") else json.dumps(PAIR))
    warn_of_heldout_names(tmp_path, read_pairs(tmp_path))
    assert any("is trained on" in line and name in line for line in caplog.messages) is warned
    caplog.clear()
    warn_of_heldout_names(tmp_path / name, read_pairs(tmp_path / name))  # it was asked for by name
    assert not caplog.messages


def test_normalised():
    assert normalised("  Ｈello　\n WORLD ") == normalised("hello world") == "hello world"
    assert normalised("Straße") == normalised("STRASSE")
    assert normalised("ＡＢＣ１２３") == "abc123"


def test_expand_gives_every_positive_a_row():
    rows = expand([Pair("a", ("p", "q"), ("n",)), Pair("b", ("r",))])
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        ("a", "p", ("n",)), ("a", "q", ("n",)), ("b", "r", ()),
    ]  # fmt: skip


# --- splitting ----------------------------------------------------------------------------------------------------

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
    """Texts that are no near-duplicates."""
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
