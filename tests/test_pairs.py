"""Reading pairs: every layout reads the same, every bad row is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebr_lib.data import pairs as pairs_module
from ebr_lib.data.pairs import Pair, expand, normalised, read_pairs
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
    monkeypatch.setattr(pairs_module, "_CHUNK", chunk)
    file = tmp_path / "any.ending"
    file.write_bytes(bom + text.encode())
    assert texts(read_pairs(file)) == WANTED


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


def test_unused_columns_are_logged(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"query": "q", "pos": ["p"], "prompt": "x", "type": "y"}))
    with caplog.at_level("INFO", "ebr_lib"):
        read_pairs(file)
    assert "columns not used: prompt, type" in caplog.text


BAD = [
    ('{"anchor": "a"}', "no `positive` column; found 'anchor': rename the column"),
    ('{"anchor": "a", "positve": "b"}', "rename `positve` to `positive`"),
    ('{"Query": "a", "pos": "b"}', "rename `Query` to `anchor`"),
    ('{"anchor": "", "positive": "b"}', "`anchor` is empty"),
    ('{"anchor": "a", "positive": " \\u200b\\t"}', "`positive` is blank"),
    ('{"anchor": "a", "positive": null}', "`positive`: wanted a text, found null"),
    ('{"anchor": "a", "positive": []}', "`positive` is an empty list"),
    ('{"anchor": "a", "positive": ["b", 3]}', "found the number 3"),
    ('{"anchor": ["a"], "positive": "b"}', "`anchor`: wanted a text, found a list"),
    ('{"anchor": "a", "positive": "b", "negative": ""}', "`negative` is empty"),
    ('{"anchor": "a", "positive": "b", "pos": "c"}', "`positive` and `pos` both name the positive"),
    ('{"anchor": "a", "positive": "\\ud83d"}', "half a character"),
    ('["a", "b"]', "found a list"),
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


def test_bad_lines_that_are_not_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"anchor": "a", "positive": "b"}\n{"anchor": \n' + '{"anchor": "中文", "positive": "b"}'.encode("gbk")
    )
    with pytest.raises(DataError) as error:
        read_pairs(file)
    assert "line 2: not a JSON object on one line" in str(error.value)
    assert "line 3: not UTF-8" in str(error.value)


def test_skip_counts_and_keeps_the_rows(tmp_path, caplog):
    file, rejects = tmp_path / "a.json", tmp_path / "out" / "rejects.jsonl"
    file.write_text("[\n" + ",\n".join(row for row, _ in BAD) + ',\n{"anchor": "a", "positive": "b"}]')
    found = read_pairs(file, on_bad_row="skip", rejects=rejects)
    assert found == [Pair("a", ("b",), (), str(file), 2 + len(BAD))]
    assert f"bad rows skipped: {len(BAD)}" in caplog.text
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
        ('[{"anchor": "a", "positive": "b"}\n{"anchor"', "line 2: wanted ',' or ']'"),
        ('[{"anchor": "a", "positive": "b"},\n\n{"anchor": \n oops}]', "line 4: the array is broken"),
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
    with pytest.raises(MissingError, match=r"holds notes.txt, sub/ "):
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


def test_normalised():
    assert normalised("  Ｈello　\n WORLD ") == normalised("hello world") == "hello world"
    assert normalised("Straße") == normalised("STRASSE")
    assert normalised("ＡＢＣ１２３") == "abc123"


def test_expand_gives_every_positive_a_row():
    rows = expand([Pair("a", ("p", "q"), ("n",)), Pair("b", ("r",))])
    assert [(r.anchor, r.positive, r.negatives) for r in rows] == [
        ("a", "p", ("n",)), ("a", "q", ("n",)), ("b", "r", ()),
    ]  # fmt: skip
