"""Rows of training files: every container gives the same rows, and whatever is broken is named with its line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebr_lib.data import records
from ebr_lib.data.pairs import read_pairs
from ebr_lib.errors import DataError

ROWS = [
    {"anchor": "无线耳机", "positive": "蓝牙降噪耳机, 黑色", "negative": "有线音箱"},
    {"anchor": 'a "quoted"\nline', "positive": "x; y", "negative": None},
    {"anchor": '27" monitor', "positive": "a\tb", "negative": "plain"},
]
WANTED = [(row["anchor"], (row["positive"],), (row["negative"],) if row["negative"] else ()) for row in ROWS]


def texts(pairs):
    return [(pair.anchor, pair.positives, pair.negatives) for pair in pairs]


def table(delimiter: str, rows=ROWS) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LAYOUTS = {
    "lines": LINES,
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "wrapped": json.dumps({"data": ROWS}),
    "wrapped after other keys": json.dumps(
        {"version": "1.0", "info": {"n": [1, 2]}, "tags": ["a"], "notes": [{"x": 1}], "rows": ROWS, "end": []}, indent=1
    ),
    "comma": table(","),
    "comma, unix lines": table(",").replace("\r\n", "\n"),
    "semicolon": table(";"),
    "tab, quoted": table("\t"),
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lambda raw: pa.compress(raw, "zstd", True)],
                         ids=["plain", "gzip", "bz2", "zstd"])  # fmt: skip
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_every_layout_gives_the_same_rows_packed_or_not(tmp_path, text, pack, bom):
    file = tmp_path / "any.ending"
    file.write_bytes(pack(bom + text.encode()))
    assert texts(read_pairs(file)) == WANTED


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", ["wrapped", "wrapped after other keys", "objects over lines"])
def test_chunks_make_no_difference(tmp_path, monkeypatch, chunk, name):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(LAYOUTS[name], encoding="utf-8")
    found = read_pairs(file)
    assert texts(found) == WANTED
    lines = LAYOUTS[name].split("\n")
    assert all("{" in lines[pair.line - 1] for pair in found)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    pq.write_table(pa.table(columns | {"vector": [[1.0, 2.0]] * 3, "negative_1": [None, "m", " "]}), file)
    found = read_pairs(file)
    assert [pair.line for pair in found] == [1, 2, 3]
    extra = [(), ("m",), ()]
    assert texts(found) == [(a, p, more + n) for (a, p, n), more in zip(WANTED, extra, strict=True)]


def test_parquet_of_lists_passages_labels_and_bytes(tmp_path):
    file = tmp_path / "part-0"  # known by its content
    passages = [[{"docid": "1", "title": "T", "text": "p"}], [{"docid": "2", "title": None, "text": "r"}]]
    pq.write_table(
        pa.table(
            {
                "query": [b"q1", b"q2"],
                "positive_passages": passages,
                "neg": [["n", None, float("nan") and None], []],
                "label": pa.array([Decimal(1), Decimal(1)], pa.decimal128(3)),
            }
        ),
        file,
    )
    assert texts(read_pairs(file)) == [("q1", ("T p",), ("n",)), ("q2", ("r",), ())]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("anchor\tpositive\n\"best\" mug\ta\n", ('"best" mug', ("a",), ())),
        ("anchor\tpositive\n\"a\tb\n", ('"a', ("b",), ())),
        ("anchor\x01positive\x01negative\n\"a\x01b\"\x01\\N\n", ('"a', ('b"',), ())),
        ('id,anchor,positive,neg\n1,a,b,"[""n"", ""m""]"\n', ("a", ("b",), ("n", "m"))),
        ("anchor,positive,negative\na,b\n", ("a", ("b",), ())),
        ("anchor,positive,negative\na,b,\n", ("a", ("b",), ())),
        ("anchor,positive,negative\na,b,NaN\n", ("a", ("b",), ())),
        ("anchor,positive,label\na,b,1\n", ("a", ("b",), ())),
        (" query , pos \na,b\n\n", ("a", ("b",), ())),
        ("question1,question2,is_duplicate\na,b,1\n", ("a", ("b",), ())),
    ],
)  # fmt: skip
def test_cells(tmp_path, text, wanted):
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8", newline="")
    assert texts(read_pairs(file)) == [wanted]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("anchor,positive\na,b\nc,d,e\n", "line 3: 3 fields, the header has 2"),
        ("anchor,positive\na,b\nc\n", "line 3: `positive`: wanted a text, found null"),
        ("anchor,positive\na,b\nc,\n", "line 3: `positive` is empty"),
        ("anchor,positive,label\na,b,1\nc,d,0\n", "line 3: `label` is '0'"),
        ("anchor,positive,label\na,b,1\nc,d\n", "line 3: `label` is missing"),
        ("anchor,positive,label\na,b,1\nc,d,0.7\n", "line 3: `label` is 0.7, neither yes"),
        ("anchor,positive\n\"a\n\nb\",c\nd,\"['x', 'y']\"\n", "line 5: a cell holds a Python list as text"),
        ("anchor,positive\na,b\n\"c\" d,e\n", "line 3: a quote that is not closed, or text after a closing one"),
        ("anchor,positive\na,b\n\"c,e\n", "line 3: a quote that is not closed"),
        ("anchor,positive,positive\na,b,c\n", "column positive is there more than once"),
        ("a query,a document\nc,d\n", "found 'a query"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_named(tmp_path, text, reason):
    file = tmp_path / "a.csv"
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(DataError) as error:
        read_pairs(file)
    assert reason in str(error.value) and "a.csv" in str(error.value)


def test_one_row_that_is_not_utf8_costs_one_row(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"anchor,positive\na,b\n" + "中文,b\n".encode("gbk") + b"c,d\n")
    with pytest.raises(DataError, match=r"line 3: not UTF-8; .*iconv -f GB18030"):
        read_pairs(file)
    assert [pair.line for pair in read_pairs(file, on_bad_row="skip")] == [2, 4]


KEYS_TWICE = '{"anchor": "a", "positive": "b", "positive": "c"}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'{{"anchor": "a", "positive": "b"}}\n{KEYS_TWICE}\n', 2),
        (f'[{{"anchor": "a", "positive": "b"}},\n\n{KEYS_TWICE}]', 3),
        (f'{{"data": [\n{{"anchor": "a", "positive": "b"}},\n{KEYS_TWICE}]}}', 3),
        ('{"query": "q",\n"pos": [{"text": "p", "text": "r"}]}', 1),
    ],
)
def test_a_key_that_is_there_twice_is_an_error(tmp_path, text, line):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=f"line {line}: the key `(positive|text)` is there twice"):
        read_pairs(file)


def test_a_list_of_rows_that_is_there_twice_is_an_error(tmp_path):
    row = '{"anchor": "a", "positive": "b"}'
    file = tmp_path / "a.json"
    for text, reason in (
        (f'{{"data": [{row}],\n"data": [{row}]}}', "line 2: the key `data` is there twice"),
        (f'{{"train": [{row}], "test": [{row}]}}', "both `train` and `test` are lists of rows"),
        (f'{{"data": [{row}]}}\n{row}', "line 2: '{' after the end of the object"),
    ):
        file.write_text(text)
        with pytest.raises(DataError) as error:
            read_pairs(file)
        assert reason in str(error.value)


@pytest.mark.parametrize(("packed", "chunk"), [(False, 40), (True, 40), (False, 1 << 20)])
@pytest.mark.parametrize("before", [0, 1, 500])
@pytest.mark.parametrize(
    "broken",
    [
        '{"anchor": "a" "positive": "b"}',
        '{"anchor": "a", positive: "b"}',
        '{"anchor": "a", "positive":}',
        "{'a': 1}",
        "x",
    ],
)
def test_a_broken_array_names_the_line_of_the_file(tmp_path, monkeypatch, packed, chunk, before, broken):  # noqa: PLR0917
    """Rows of three lines; the decoder's own line, which counts from the chunk's beginning, is not in the message."""
    monkeypatch.setattr(records, "_CHUNK", chunk)
    row = '{"anchor": "a",\n\n"positive": "b"},\n'
    file = tmp_path / "a.json"
    for after in (",\n" + row * 5, "\n\n\n]\n", "]"):
        text = ("[\n" + row * before + broken + after).encode()
        file.write_bytes(gzip.compress(text) if packed else text)
        with pytest.raises(DataError) as error:
            read_pairs(file)
        assert f"line {2 + 3 * before}: the JSON is broken there" in str(error.value)
        assert str(error.value).count("line ") == 1


def test_each_line_an_array_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('["a", "b"]\n["c", "d"]\n')
    with pytest.raises(DataError, match="line 2: each line is an array; wanted objects"):
        read_pairs(file)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (LINES.encode("utf-16"), "UTF-16"),
        (LINES.encode("utf-16-le"), "UTF-16"),
        (table("\t").encode("utf-16-be"), "UTF-16"),
        (b"PK\x03\x04 of a sheet", "a zip archive"),
        (b"\xfd7zXZ\0", " is xz, "),
        (gzip.compress(LINES.encode())[:-12], "gzip data is damaged or cut short"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, raw, kind):
    file = tmp_path / "a.jsonl"
    file.write_bytes(raw)
    with pytest.raises(DataError, match=kind):
        read_pairs(file)


def test_a_long_table_is_not_held(tmp_path, monkeypatch):
    """The first row is there before the rest is read: a table with a broken last row gives all the others."""
    file = tmp_path / "a.csv"
    file.write_text("anchor,positive\n" + "a,b\n" * 1000 + '"c')
    found = 0
    with pytest.raises(DataError, match="line 1002"):
        for _ in records.raw_rows(Path(file), {"anchor", "positive"}.__contains__):
            found += 1
    assert found == 1000
