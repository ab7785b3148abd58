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
    window = records._JsonText(file)
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
def test_a_label_that_means_yes_is_a_positive(tmp_path, label, column):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR | {column: label}))
    assert texts(read_pairs(file)) == [("a", ("b",), ())]


@pytest.mark.parametrize("label", NO, ids=repr)
@pytest.mark.parametrize("column", ["label", "Score", "similarity", "is_duplicate", "relevance"])
def test_a_label_that_means_no_is_never_a_positive(tmp_path, label, column):
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR | {column: label})}")
    with pytest.raises(DataError, match=f"line 2: `{column}` is"):
        read_pairs(file)
    assert [pair.line for pair in read_pairs(file, on_bad_row="skip")] == [1]


@pytest.mark.parametrize("label", DEGREE, ids=repr)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_graded_label_stops_the_run(tmp_path, label, mode):
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


@pytest.mark.parametrize("name", ["type", "scores_of", "labelled_by", "score_source"])
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
def test_unused_columns_of_0_and_1_are_warned_about(tmp_path, caplog, name, values, warned):
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
def test_rows_of_other_tasks_are_named(tmp_path, row, reason):
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
    file.write_text(json.dumps({"query": "q", "pos": ["p"], "prompt": "x", "id": 1, "type": "y", "half \ud83d": 1}))
    with caplog.at_level("INFO", "ebr_lib"):
        read_pairs(file)
    assert caplog.messages[1:] == ["未使用的列 columns not used: id, type, half \\ud83d"]


@pytest.mark.parametrize(
    ("value", "wanted"), [("Find it: ", "Find it: "), (" ", None), (None, None), ("", None)], ids=repr
)
def test_a_row_s_prompt_is_read(tmp_path, value, wanted):
    rows = pd.DataFrame([{"query": "q", "pos": ["p", "r"], "prompt": value}])
    rows.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    rows.to_parquet(tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        assert [row.prompt for row in expand(read_pairs(tmp_path / file))] == [wanted] * 2


def test_weights_and_scores_are_read(tmp_path):
    rows = [
        {"query": "q", "pos": ["p", "r"], "neg": ["n", " ", "m"], "pos_scores": [9.5, 8], "neg_scores": [-1, 7, None],
         "weight": 2.5},
        {"query": "q", "pos": ["p"], "neg": [], "pos_scores": None, "neg_scores": [], "weight": 0},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        found = expand(read_pairs(tmp_path / file))
        assert [row.weight for row in found] == [2.5, 2.5, 0]
        np.testing.assert_equal([row.scores for row in found], [(9.5, -1, np.nan), (8, -1, np.nan), ()])
    (tmp_path / "a.csv").write_text("anchor,positive,weight\nq,p,3\n")
    assert read_pairs(tmp_path / "a.csv")[0].weight == 3
    assert read_pairs(tmp_path / "a.csv")[0].negative_scores == ()


BAD = [
    ('{"anchor": "a", "positive": "b", "weight": -1}', "`weight` is -1: wanted a number of 0 or more"),
    ('{"anchor": "a", "positive": "b", "weight": NaN}', "`weight` is nan: wanted a number of 0 or more"),
    ('{"anchor": "a", "positive": "b", "weight": "much"}', "`weight`: wanted a number, found a text"),
    ('{"anchor": "a", "positive": "b", "weight": null}', "`weight`: wanted a number, found null"),
    ('{"anchor": "a", "positive": "b", "weight": true}', "`weight`: wanted a number, found true or false"),
    ('{"query": "a", "pos": ["b"], "neg": ["c"], "neg_scores": [1]}', "`pos_scores` has 0 scores for 1 texts"),
    (
        '{"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [1], "neg_scores": [2, 3]}',
        "`neg_scores` has 2 scores",
    ),
    ('{"query": "a", "pos": ["b"], "pos_scores": ["high"]}', "`pos_scores`: wanted a number, found a text"),
    ('{"anchor": "a", "positive": "b", "prompt": ["find it"]}', "`prompt`: wanted a text, found a list"),
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
def test_names_of_held_out_data_are_warned_about(tmp_path, caplog, name, warned):
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
