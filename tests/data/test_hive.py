"""Delimited text: every byte of a kept column comes through, and what does not fit is handed over as a reject."""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
import time
from pathlib import Path

import pytest

from ebr_lib.data import hive
from ebr_lib.data.fields import Dialect, Record
from ebr_lib.data.hive import Layout, Position
from ebr_lib.errors import DataError, MissingError
from ebr_lib.inference.inputs import need_columns


def rows_of(path: Path, wanted: list[str], **layout):
    layout = Layout(**layout)
    source = hive.open_source(path, layout)
    return list(hive.read_rows(source, wanted, layout))


def values_of(path: Path, wanted: list[str], **layout):
    return [row.values for row in rows_of(path, wanted, **layout) if not row.reason]


def written(folder: Path, content: bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "none"])
def test_damaged_parquet_is_read_or_is_our_error(tmp_path: Path, codec: str):
    """A byte is changed at each of many places: the rows are read, or the error is ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, errors = tmp_path / "a.parquet", 0
    pq.write_table(pa.table({"id": [f"苹果 {i % 99} {i}" for i in range(199)]}), path, compression=codec)
    whole = path.read_bytes()
    for place in range(4, len(whole) - 8, max(1, len(whole) // 200)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            source = hive.open_source(path, Layout())
            need_columns(source, ["id"], b"\x01")
            list(hive.read_rows(source, ["id"], Layout()))
        except DataError as error:
            errors += "is not a complete Parquet file" in str(error)
    assert errors > 9


def test_only_delimiter_and_newline_split(tmp_path: Path):
    odd = [
        '"unclosed',
        '"苹果" 手机壳',
        "a\rb",
        "a\u2028b",
        "a\u0085b",
        "\x0b\x0c\x1c",
        "NA",
        "null",
        "001",
        " x ",
        "a,b\tc",
        "\x00",
    ]
    content = "id\x01text\n" + "".join(f"{i}\x01{text}\n" for i, text in enumerate(odd))
    found = values_of(written(tmp_path, content.encode()), ["text", "id"])
    assert found == [[text.encode(), str(i).encode()] for i, text in enumerate(odd)]


def test_null_is_not_the_empty_string(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\n\\N\x01\n\x01\\N\n\\\\N\x01\\n\n")
    assert values_of(path, ["id", "text"]) == [[None, b""], [b"", None], [b"\\\\N", b"\\n"]]


def test_bom_and_windows_newlines(tmp_path: Path):
    path = written(tmp_path, b"\xef\xbb\xbfid\x01text\r\n1\x01a\r\n2\x01b\r\r\n3\x01c\n")
    assert values_of(path, ["id", "text"]) == [[b"1", b"a"], [b"2", b"b\r"], [b"3", b"c"]]
    plain = written(tmp_path, b"id\x01text\n1\x01a\r\n2\x01b\n3\x01c\n")
    assert values_of(plain, ["text"]) == [[b"a\r"], [b"b"], [b"c"]]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "auto"])
def test_chinese_encodings_become_utf8(tmp_path: Path, encoding: str):
    text = "镕基 手机壳丂乗" + ("𠀀" if encoding == "gb18030" else "")
    content = f"编号\x01描述\n1\x01{text}\n\\N\x01{text}\n2\x01abc\n"
    path = written(tmp_path, content.encode("gb18030" if encoding == "auto" else encoding))
    found = values_of(path, ["编号", "描述"], encoding=encoding)
    assert found == [[b"1", text.encode()], [None, text.encode()], [b"2", b"abc"]]


def test_one_bad_byte_does_not_turn_utf8_into_gb18030(tmp_path: Path):
    path = written(tmp_path, "id\x01text\n1\x01苹果\n2\x01手机\n".encode() + b"3\x01\xc4\xe3\n")
    rows = rows_of(path, ["text"])
    assert [row.reason for row in rows] == ["", "", "not utf-8: column text"]
    assert rows[2].raw == b"3\x01\xc4\xe3"


def test_a_row_that_ends_within_a_character_is_not_utf8(tmp_path: Path):
    rows = rows_of(written(tmp_path, b"id\x01text\n1\x01\xe8\x8b\xb9\n2\x01\xe8\x8b\n"), ["text"])
    assert [row.reason for row in rows] == ["", "not utf-8: column text"]
    # two bytes that begin a character of UTF-8, and are one of GB18030
    path = written(tmp_path, b"id\x01text\n1\x01\xe4\xa1\n2\x01\xe4\xa1\n")
    assert hive.open_source(path, Layout()).encoding == "gb18030"


@pytest.mark.parametrize(("gbk", "utf8", "encoding"), [(2, 3, "utf-8"), (2, 2, "utf-8"), (3, 2, "gb18030")])
def test_the_majority_of_rows_decides_the_encoding(tmp_path: Path, caplog, gbk, utf8, encoding):
    caplog.set_level("INFO")
    rows = ["1\x01透 明 手 机\n".encode("gb18030")] * gbk + ["1\x01手机\n".encode()] * utf8 + [b"1\x01ascii\n"] * 9
    path = written(tmp_path, b"id\x01text\n" + b"".join(rows))
    assert hive.open_source(path, Layout()).encoding == encoding
    line = f"{path}: 编码识别为 GB18030 ({gbk} of {gbk + utf8} rows are not UTF-8"
    assert (line in caplog.text) == (encoding == "gb18030")


def test_a_byte_order_mark_means_utf8(tmp_path: Path):
    path = written(tmp_path, b"\xef\xbb\xbfid\x01text\n1\x01" + "透明手机".encode("gb18030") + b"\n")
    assert [row.reason for row in rows_of(path, ["text"], encoding="gb18030")] == ["not utf-8: column text"]


def test_a_bad_byte_costs_its_row_only_where_the_column_is_wanted(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\x01junk\n1\x01a\x01\xff\n2\x01\xff\x01b\n")
    assert [row.reason for row in rows_of(path, ["id", "text"])] == ["", "not utf-8: column text"]
    assert [row.reason for row in rows_of(path, ["junk", "text"])] == [
        "not utf-8: column junk",
        "not utf-8: column text",
    ]


def test_rejects_carry_place_reason_and_bytes(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\n1\x01a\nbroken\n\n2\x01b\x01c\n3\x01d")
    rejects = [row for row in rows_of(path, ["id"]) if row.reason]
    assert [(row.position, row.reason, row.raw) for row in rejects] == [
        (Position(3, 12), "1 fields, wanted 2", b"broken"),
        (Position(4, 19), "empty line", b""),
        (Position(5, 20), "3 fields, wanted 2", b"2\x01b\x01c"),
    ]
    assert [row.values for row in rejects] == [[]] * 3
    assert values_of(path, ["id", "text"]) == [[b"1", b"a"], [b"3", b"d"]]


def test_every_row_carries_its_place(tmp_path: Path):
    rows = rows_of(written(tmp_path, b"id\x01text\n1\x01a\nbroken\n2\x01b\n"), ["id"])
    assert [(row.position, row.after) for row in rows] == [
        (Position(2, 8), Position(3, 12)),
        (Position(3, 12), Position(4, 19)),
        (Position(4, 19), Position(5, 23)),
    ]


def test_a_source_knows_its_name_its_end_and_whether_it_is_still_the_same(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = b"id\x01text\n1\x01a\n2\x01b\n" * 100
    pq.write_table(pa.table({"id": ["1", "2", "3"]}), tmp_path / "a.parquet")
    written(tmp_path, gzip.compress(content), "a.gz")
    for path, extent in (
        (written(tmp_path, content), len(content)),
        (tmp_path / "a.gz", len(content)),
        (tmp_path / "a.parquet", 3),
    ):
        for layout in (Layout(), Layout(columns=("a", "b"))):
            source = hive.open_source(path, layout)
            assert source.extent == extent
            assert list(hive.read_rows(source, source.columns[:1], layout))[-1].after.offset == extent
            assert source.name == path.name
            assert hive.open_source(path, layout, "shop/a").name == "shop/a"
            source.check_unchanged()
        before = path.read_bytes()
        path.write_bytes(before + b"more")
        with pytest.raises(DataError, match=rf"^{path} changed .*\({len(before)} bytes then, {len(before) + 4} now\)"):
            source.check_unchanged()
        path.unlink()
        with pytest.raises(MissingError, match=f"^{path}: the file is no longer there"):
            source.check_unchanged()


def test_the_bytes_a_reject_is_reported_with(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (row,) = rows_of(written(tmp_path, b"id\x01text\n1\x01a\n"), ["text"])
    assert hive.raw_of(["text"], row) == b"1\x01a"
    pq.write_table(pa.table({"id": ["1"], "text": ["苹果"], "label": [None]}), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet", ["text", "label"])
    assert row.raw == b""
    assert hive.raw_of(["text", "label"], row) == '{"text": "苹果", "label": null}'.encode()


def test_reading_goes_on_at_any_row(tmp_path: Path):
    content = b"id\x01text\x01x\n" + b"".join(
        b"%d\x01a\xe8\x8b\xb9\x01\n" % i if i % 5 else b"bro\x01\nken\x01\n" for i in range(40)
    )
    for name, packed in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        path = written(tmp_path, packed, name)
        for heal in (False, True):
            layout = Layout(heal=heal)
            source = hive.open_source(path, layout)
            rows = list(hive.read_rows(source, ["id"], layout))
            for at in range(0, len(rows), 7):
                if rows[at].resumable:
                    assert list(hive.read_rows(source, ["id"], layout, rows[at].after)) == rows[at + 1 :]
            assert list(hive.read_rows(source, ["id"], layout, rows[-1].after)) == []


def test_healing_joins_what_a_newline_broke(tmp_path: Path):
    broken, whole = b"1\x01one\ntwo\nthree\x01x\n", b"2\x01whole\x01y\n"
    last, lost = b"3\x01last\x01z\nrest\n\n", b"4\x01a\n5\x01b\x01c\n"
    path = written(tmp_path, b"id\x01text\x01label\n" + broken + whole + last + lost)
    rows = rows_of(path, ["id", "text", "label"], heal=True)
    assert [row.values for row in rows if not row.reason] == [
        [b"1", b"one two three", b"x"],
        [b"2", b"whole", b"y"],
        [b"3", b"last", b"z rest "],
        [b"5", b"b", b"c"],
    ]
    assert [row.lines for row in rows] == [3, 1, 3, 1, 1]
    assert [(row.reason, row.raw) for row in rows if row.reason] == [("2 fields, wanted 3", b"4\x01a")]
    assert sum(bool(row.reason) for row in rows_of(path, ["id"])) == 6


def test_healing_joins_two_lines_also_at_the_end(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\x01x\n1\x01a\nb\x01c\n2\x01d\ne\x01f")
    rows = rows_of(path, ["id", "text", "x"], heal=True)
    assert [row.values for row in rows] == [[b"1", b"a b", b"c"], [b"2", b"d e", b"f"]]
    assert [(row.position, row.after) for row in rows] == [
        (Position(2, 10), Position(4, 18)),
        (Position(4, 18), Position(6, 25)),
    ]
    assert values_of(written(tmp_path, b"id\x01text\n1\x01a\nb\n"), ["text"], heal=True) == [[b"a b"]]
    assert values_of(written(tmp_path, b"text\na\nb\n"), ["text"], heal=True) == [[b"a"], [b"b"]]


def test_healing_leaves_lines_apart_that_make_no_row(tmp_path: Path):
    content = b"id\x01text\x01x\nlog\n1\x01a\x01b\n2\x01c\n3\x01d\x01e\n4\x01f\n"
    rows = rows_of(written(tmp_path, content + b"\x01\x01\x01\n5\ng\n"), ["id"], heal=True)
    assert [(row.raw, row.lines, bool(row.reason)) for row in rows] == [
        (b"log", 1, True),
        (b"1\x01a\x01b", 1, False),
        (b"2\x01c", 1, True),
        (b"3\x01d\x01e", 1, False),
        (b"4\x01f", 1, True),
        (b"\x01\x01\x01", 1, True),
        (b"5", 1, True),
        (b"g", 1, True),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_with_healing_reading_goes_on_at_any_resumable_row(tmp_path: Path, seed: int, monkeypatch):
    monkeypatch.setattr(hive, "HEAL_LINES", 4)
    generator = random.Random(seed)
    pieces = [b"1\x01a\x01b\x01c\n", b"2\x01x\n", b"y\n", b"\n", b"3\x01z\x01w\n", b"\x01\x01\x01\x01\n"]
    path = written(tmp_path, b"a\x01b\x01c\x01d\n" + b"".join(generator.choices(pieces, k=40)))
    layout = Layout(heal=True)
    source = hive.open_source(path, layout)
    rows = list(hive.read_rows(source, ["a", "b"], layout))
    ends = [at for at, row in enumerate(rows) if row.resumable]
    assert ends[-1] == len(rows) - 1
    for at in ends:
        assert list(hive.read_rows(source, ["a", "b"], layout, rows[at].after)) == rows[at + 1 :]
    assert b"\n".join(row.raw for row in rows) + b"\n" == path.read_bytes().split(b"\n", 1)[1]  # no byte is lost
    assert max(row.lines for row in rows) <= 4


def test_what_healing_holds_is_bounded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hive, "HEAL_BYTES", 1000)
    path = written(tmp_path, b"id\x01text\x01x\n1\x01a\x01b\n" + b"log line\n" * 3000)
    rows = rows_of(path, ["id"], heal=True)
    assert max(len(row.raw) for row in rows) < 1200
    assert sum(row.lines for row in rows) == 3001


def test_a_file_without_a_header_shows_its_newlines_by_its_rows(tmp_path: Path):
    layout = {"columns": ("id", "text")}
    assert values_of(written(tmp_path, b"1\x01a\r\n2\x01\r\n"), ["text"], **layout) == [[b"a"], [b""]]
    assert values_of(written(tmp_path, b"1\x01a\r\n2\x01b\n"), ["text"], **layout) == [[b"a\r"], [b"b"]]
    assert values_of(written(tmp_path, b"1\x01a\r\n"), ["text"], **layout) == [[b"a"]]
    assert values_of(written(tmp_path, b"1\x01a\r"), ["text"], **layout) == [[b"a\r"]]


def test_a_header_of_another_order_than_columns_is_warned_about(tmp_path: Path, caplog):
    values_of(written(tmp_path, b"id\x01text\n1\x01a\n"), ["id"], columns=("id", "text"))
    assert not caplog.text
    path = written(tmp_path, b"text\x01id\na\x011\n")
    values_of(path, ["id"], columns=("id", "text"))
    assert f"{path}: the first row has the names in columns in another order (text, id)" in caplog.text


def first_row_long(filler: str) -> str:
    return f"1\x01{'苹果' * 400_000}\n2\x01手机\n"


def ascii_for_megabytes(filler: str) -> str:
    return "".join(f"{i}\x01{filler}\n" for i in range(30_000)) + "x\x01手机\n" * 3


@pytest.mark.parametrize("encoding", ["gbk", "utf-8"])
@pytest.mark.parametrize("rows", [first_row_long, ascii_for_megabytes])
def test_the_encoding_is_detected_from_lines_that_show_it(tmp_path: Path, encoding: str, rows):
    path = written(tmp_path, ("id\x01text\n" + rows("plain " * 12)).encode(encoding))
    found = rows_of(path, ["text"])
    assert not [row.reason for row in found if row.reason]
    assert found[-1].values == ["手机".encode()]


def test_a_cut_line_is_judged_without_its_broken_end(tmp_path: Path, monkeypatch):
    for size in range(1, 7):
        monkeypatch.setattr(hive, "SAMPLE_BYTES", size)
        for encoding in ("gb18030", "utf-8"):
            text = "苹果手机壳透明"
            path = written(tmp_path, f"id\x01text\n\x01{text}\n".encode(encoding))
            found = hive.open_source(path, Layout()).encoding
            # fewer than two bytes of a character say nothing
            assert found == encoding or (size <= 3 and found == "utf-8")


def test_a_line_cut_in_a_later_block_is_judged_without_its_broken_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hive, "SAMPLE_BYTES", 10)
    path = written(tmp_path, b"id\x01text\n" + b"1\x01ascii!!\n" + "2\x01苹果手机\n".encode())
    assert "苹果手".encode()[:8].decode("gb18030")  # what the second block holds of it would pass for GB18030
    assert hive.open_source(path, Layout()).encoding == "utf-8"


@pytest.mark.parametrize(("ascii_rows", "encoding"), [(1, "gb18030"), (9, "utf-8")])
def test_detecting_the_encoding_reads_a_bounded_part(tmp_path: Path, monkeypatch, ascii_rows: int, encoding: str):
    monkeypatch.setattr(hive, "SAMPLE_BYTES", 10)
    monkeypatch.setattr(hive, "SAMPLE_LIMIT", 60)
    content = b"id\x01text\n" + b"1\x01ascii!!\n" * ascii_rows + "2\x01苹果手机壳透明\n".encode("gb18030")
    assert hive.open_source(written(tmp_path, content), Layout()).encoding == encoding


def test_gb18030_and_a_delimiter_that_can_be_half_a_character(tmp_path: Path):
    assert "丂".encode("gb18030").endswith(b"@")
    assert "𠀀".encode("gb18030")[1:2] == b"2"
    for delimiter in ("@", "0"):
        path = written(tmp_path, f"id{delimiter}text\n1{delimiter}丂货好\n".encode("gb18030"))
        with pytest.raises(DataError, match="second byte of a character"):
            hive.open_source(path, Layout(delimiter=delimiter.encode()))


def test_files_without_a_header(tmp_path: Path):
    for mark, encoding in ((b"", "utf-8"), (b"", "gb18030"), (b"\xef\xbb\xbf", "utf-8")):
        path = written(tmp_path, mark + "1\x01a\n2\x01苹果手机壳\n".encode(encoding))
        rows = rows_of(path, ["id", "text"], columns=("id", "text"))
        assert [row.values for row in rows] == [[b"1", b"a"], [b"2", "苹果手机壳".encode()]]
        assert [row.position for row in rows] == [Position(1, len(mark)), Position(2, len(mark) + 4)]
    headed = written(tmp_path, b"id\x01text\n2\x01b\n")
    assert values_of(headed, ["text"], columns=("id", "text")) == [[b"b"]]
    assert values_of(written(tmp_path, b""), ["text"], columns=("id", "text")) == []
    bad = written(tmp_path, b"1\x01\xff\n2\x01b\n")  # the first row is looked at as a header, too
    assert values_of(bad, ["text"], columns=("id", "text")) == [[b"b"]]


def test_rows_of_several_megabytes(tmp_path: Path):
    long = b"\xe8\x8b\xb9" * 2_000_000
    assert values_of(written(tmp_path, b"id\x01text\n1\x01" + long + b"\n2\x01b\n"), ["text"]) == [[long], [b"b"]]


def test_gzip_is_known_by_its_bytes_and_damage_is_an_error(tmp_path: Path):
    packed = gzip.compress(b"id\x01text\n" + b"".join(b"%d\x01%d\n" % (i, i * i) for i in range(9999)))
    assert len(values_of(written(tmp_path, packed, "000000_0"), ["id"])) == 9999
    path = written(tmp_path, packed[:-2000])
    with pytest.raises(DataError, match=f"^{path}: .* damaged or cut short"):
        values_of(path, ["id"])


def test_other_delimiters(tmp_path: Path):
    assert values_of(written(tmp_path, b"id\ttext\n1\ta\x01b\n"), ["text"], delimiter=b"\t") == [[b"a\x01b"]]


def test_parquet_input(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(10)), "text": ["a\nb", None, "", "\\N", *"cdefgh"], "tags": [["x"]] * 10})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=3)
    assert values_of(path, ["text", "id"])[:4] == [[b"a\nb", b"0"], [None, b"1"], [b"", b"2"], [b"\\N", b"3"]]
    layout = Layout()
    source = hive.open_source(path, layout)
    rows = list(hive.read_rows(source, ["id"], layout))
    for at in range(10):
        assert list(hive.read_rows(source, ["id"], layout, rows[at].position)) == rows[at:]
        assert list(hive.read_rows(source, ["id"], layout, rows[at].after)) == rows[at + 1 :]
    assert [(row.position, row.after) for row in rows] == [
        (Position(i + 1, i), Position(i + 2, i + 1)) for i in range(10)
    ]
    need_columns(source, ["id", "text"], b"\x01")
    with pytest.raises(DataError, match="column tags is list"):
        need_columns(source, ["tags"], b"\x01")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^{path} is not a complete Parquet"):
        hive.open_source(path, layout)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "string", "dictionary"])
def test_a_parquet_value_that_is_not_utf8_costs_its_row(tmp_path: Path, kind: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array([b"1", b"\xff", None, "苹".encode()], pa.binary())
    if kind == "string":
        values = pa.Array.from_buffers(pa.string(), 4, values.buffers(), values.null_count)
    elif kind == "dictionary":
        values = values.dictionary_encode()
    else:
        values = values.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"id": values, "text": list("abcd"), "none": [None] * 4}), tmp_path / "a.parquet")
    source = hive.open_source(tmp_path / "a.parquet", Layout())
    need_columns(source, ["id", "text"], b"\x01")
    rows = list(hive.read_rows(source, ["id", "text", "none"], Layout()))
    assert [row.values for row in rows] == [[b"1", b"a", None], [], [None, b"c", None], ["苹".encode(), b"d", None]]
    assert rows[1].reason == "bytes that are not utf-8: column id"
    assert rows[1].raw == b'{"id": "\\\\xff", "text": "b", "none": null}'
    assert (rows[1].position, rows[1].after, rows[3].position) == (Position(2, 1), Position(3, 2), Position(4, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\xff\xfe" + "id\x01文本\n".encode("utf-16-le"), ["UTF-16", "iconv"]),
        (b"\xfe\xff" + "id\x01文本\n".encode("utf-16-be"), ["UTF-16", "iconv"]),
        (b"id\x01text\x01id\n", ["column id is there more than once"]),
    ],
)
def test_broken_headers_say_what_is_wrong(tmp_path: Path, content: bytes, words: list[str]):
    with pytest.raises(DataError) as error:
        hive.open_source(written(tmp_path, content), Layout())
    assert all(word in str(error.value) for word in words)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path):
    source = hive.open_source(written(tmp_path, b"id\x01text\n"), Layout())
    with pytest.raises(DataError, match=r"no column description; found id, text .* columns=\[…\]"):
        need_columns(source, ["description"], b"\x01")
    for sign, name in ((",", "a comma"), ("\t", "a tab"), ("|", "a bar"), (";", "a semicolon")):
        source = hive.open_source(written(tmp_path, f"id{sign}description\n".encode()), Layout())
        with pytest.raises(DataError, match=f"the first row holds {name}: is that the delimiter"):
            need_columns(source, ["description"], b"\x01")
    source = hive.open_source(written(tmp_path, b"id\xff\n"), Layout())
    with pytest.raises(DataError, match=r"found id\ufffd .* columns=\[…\]"):
        need_columns(source, ["description"], b"\x01")


def test_a_vanished_file_is_an_error(tmp_path: Path):
    source = hive.open_source(written(tmp_path, b"id\n1\n"), Layout())
    source.path.unlink()
    with pytest.raises(MissingError, match=f"^{source.path}: the file is no longer there"):
        list(hive.read_rows(source, ["id"], Layout()))


# --- quotes and escapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "delimiter", "knobs", "quoted"),
    [
        ("a.csv", ",", {}, True),
        ("000000_0", ",", {}, True),
        ("a.csv", "\t", {}, True),
        ("a.tsv.gz", "\t", {}, True),
        ("000000_0", "\t", {}, False),
        ("a.csv", ";", {}, True),
        ("a.csv", "\x01", {}, False),
        ("a.csv", ",", {"quoting": "none"}, False),
        ("a.csv", ",", {"heal": True}, False),
        ("000000_0", "\x01", {"quoting": "csv"}, True),
    ],
)
def test_when_quotes_are_quotes(tmp_path: Path, name: str, delimiter: str, knobs: dict, quoted: bool):
    path = written(tmp_path, f'id{delimiter}text\n1{delimiter}"a"\n'.encode(), name)
    assert values_of(path, ["text"], delimiter=delimiter.encode(), **knobs) == [[b"a" if quoted else b'"a"']]


@pytest.mark.parametrize(
    "rows",
    [
        ['1\t"six inch', "2\tb"],  # not closed
        ['1\t"six inch', '2\t"seven" inch', "3\tc"],  # letters after it
        ['1\t"six inch', '2\tb"', "3\tc"],  # a field of whole rows
    ],
)
def test_loose_quotes_between_tabs_are_letters(tmp_path: Path, rows: list[str]):
    path = written(tmp_path, "\n".join(["id\ttext", *rows, ""]).encode(), "a.tsv")
    assert values_of(path, ["id", "text"], delimiter=b"\t") == [row.encode().split(b"\t") for row in rows]


def test_loose_quotes_far_into_a_file_cost_no_other_row(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hive, "SAMPLE_BYTES", 40)
    path = written(tmp_path, b'id\ttext\n0\t"a\tb"\n' + b"1\tx\n" * 20 + b'2\t"six\n3\tb"\n4\t"c\nd"\n', "a.tsv")
    *_, first, second, last = rows_of(path, ["text"], delimiter=b"\t")
    assert (first.raw, first.reason, second.values) == (b'2\t"six', hive.OPEN_QUOTE, [b'b"'])
    assert last.values == [b"c\nd"]


def test_a_field_of_many_lines_is_put_together_once():
    record, line, began = Record(Dialect(b",", True)), b"\n2,b" + b"x" * 3000, time.process_time()
    assert not record.add(b'1,"open')
    assert not any(record.add(line) for _ in range(8000))
    assert record.add(b'"') and record.fields == [b"1", b"open" + 8000 * line]
    assert time.process_time() - began < 5  # 0.05; half a minute where each line copies those before it


def test_old_orc_takes_the_names_that_it_is_given(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import orc

    path = tmp_path / "000000_0"
    orc.write_table(pa.table({"_col0": ["1", "2"], "_col1": ["a", "b"]}), path)
    assert values_of(path, ["text", "id"], columns=("id", "text")) == [[b"a", b"1"], [b"b", b"2"]]
    with pytest.raises(DataError, match=r"found _col0, _col1; give their names in order: columns=\[…\]"):
        need_columns(hive.open_source(path, Layout()), ["text"], b"\x01")
    with pytest.raises(DataError, match="has 2 columns without names of their own, columns names 1"):
        hive.open_source(path, Layout(columns=("text",)))


def test_a_file_of_a_byte_order_mark_alone_is_empty(tmp_path: Path):
    assert hive.is_empty(written(tmp_path, hive.BOM)) and not hive.is_empty(written(tmp_path, hive.BOM + b"a"))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(8))
def test_quoted_rows_are_those_of_the_csv_module(tmp_path: Path, newline: str, seed: int):
    generator = random.Random(seed)
    rows = [["".join(generator.choices('a",\n 苹\\', k=generator.randint(0, 6))) for _ in range(3)] for _ in range(60)]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=newline, quoting=generator.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows(
        [["id", "ti,tle", "text"], *rows]
    )
    for encoding in ("utf-8", "gb18030"):
        path = written(tmp_path, out.getvalue().encode(encoding))
        layout = Layout(delimiter=b",", encoding=encoding)
        source = hive.open_source(path, layout)
        found = list(hive.read_rows(source, ["id", "ti,tle", "text"], layout))
        assert [row.values for row in found] == [[value.encode() for value in row] for row in rows]
        for at in range(0, len(found), 9):
            assert list(hive.read_rows(source, ["id", "ti,tle", "text"], layout, found[at].after)) == found[at + 1 :]
        assert found[-1].after.offset == path.stat().st_size


def test_a_quote_that_is_not_closed_costs_its_row_alone(tmp_path: Path, monkeypatch):
    path = written(tmp_path, b'id,text\n1,"open\n2,b\n3,"c\nd"\n4,"e" f\n5,12" pan\n6,"\n')
    rows = rows_of(path, ["id", "text"], delimiter=b",")
    assert [row.values for row in rows if not row.reason] == [[b"2", b"b"], [b"3", b"c\nd"], [b"5", b'12" pan']]
    assert [(row.raw, row.reason) for row in rows if row.reason] == [
        (b'1,"open', "a letter after a closing quote"),
        (b'4,"e" f', "a letter after a closing quote"),
        (b'6,"', "a quote that is not closed"),
    ]
    monkeypatch.setattr(hive, "HEAL_LINES", 3)
    path = written(tmp_path, b'id,text\n1,"open\n' + b"2,b\n" * 9)
    assert [bool(row.reason) for row in rows_of(path, ["id"], delimiter=b",")] == [True, *[False] * 9]


@pytest.mark.parametrize("seed", range(8))
def test_escaped_rows_come_back(tmp_path: Path, seed: int):
    generator = random.Random(seed)
    rows = [
        ["".join(generator.choices('a\x01\n\\"nr苹N丂', k=generator.randint(0, 6))) for _ in range(3)]
        for _ in range(60)
    ]
    spelled = [
        [re.sub(r"[\x01\\\n]", lambda m: "\\n" if m[0] == "\n" and seed % 2 else "\\" + m[0], v) for v in row]
        for row in rows
    ]
    content = "id\x01title\x01text\n" + "".join("\x01".join(row) + "\n" for row in spelled)
    for encoding in ("utf-8", "gb18030"):  # the second byte of 丂 may be a backslash's
        path = written(tmp_path, content.encode(encoding))
        layout = Layout(encoding=encoding, escape=b"\\")
        source = hive.open_source(path, layout)
        found = list(hive.read_rows(source, ["id", "title", "text"], layout))
        assert [row.values for row in found] == [[value.encode() for value in row] for row in rows]
        for at in range(0, len(found), 9):
            assert list(hive.read_rows(source, ["id"], layout, found[at].after))[0:1] == [
                row._replace(values=row.values[:1]) for row in found[at + 1 : at + 2]
            ]


def test_null_and_backslashes_with_escapes(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\n\\N\x01\\\\N\n1\x01\\t\n")
    assert values_of(path, ["id", "text"], escape=b"\\") == [[None, b"\\N"], [b"1", b"t"]]
    both = written(tmp_path, b'id,text\n1,"12\\" pan, steel"\n\\N,"a\\\\"\n')
    assert values_of(both, ["id", "text"], delimiter=b",", escape=b"\\") == [[b"1", b'12" pan, steel'], [None, b"a\\"]]


# --- line ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"id\x01text\r\n1\x01a\n2\x01b\n", [b"a", b"b"]),
        (b"id\x01text\n1\x01a\r\n2\x01b\r\n", [b"a", b"b"]),
        (b"id\x01text\r1\x01a\r2\x01b\r", [b"a", b"b"]),
        (b"id\x01text\r1\x01a\r2\x01b", [b"a", b"b"]),
        (b"id\x01text\r\n1\x01a", [b"a"]),
        (b"id\x01text\n1\x01a\rc\n2\x01b\n", [b"a\rc", b"b"]),
    ],
)
def test_line_ends_go_by_the_rows(tmp_path: Path, content: bytes, values: list[bytes], monkeypatch):
    monkeypatch.setattr(hive, "CR_BLOCK", 5)
    path = written(tmp_path, content)
    rows = rows_of(path, ["text"])
    assert [row.values for row in rows] == [[value] for value in values]
    assert rows[-1].after.offset == len(content)
    source = hive.open_source(path, Layout())
    assert list(hive.read_rows(source, ["text"], Layout(), rows[0].after)) == rows[1:]


def test_mixed_line_ends_are_warned_about(tmp_path: Path, caplog):
    values_of(written(tmp_path, b"id\n1\r\n2\n3\n"), ["id"])
    assert "1 of its first 3 rows end in" in caplog.text


# --- columns of Parquet -------------------------------------------------------------------------------------------


def test_parquet_columns_of_every_kind_have_their_text_or_are_named(tmp_path: Path):
    import decimal
    import uuid

    import pyarrow as pa
    import pyarrow.parquet as pq

    key = uuid.UUID(int=7)
    columns = {
        "uuid": (pa.array([key.bytes, None], pa.uuid()), str(key)),
        "json": (pa.array(['{"a": 1}', None], pa.json_()), '{"a": 1}'),
        "decimal": (pa.array([decimal.Decimal("1.50"), None]), "1.50"),
        "utc": (pa.array([0, None], pa.timestamp("ms", "UTC")), "1970-01-01 00:00:00.000Z"),
        "dict": (pa.array(["x", None]).dictionary_encode(), "x"),
        "large": (pa.array(["x", None], pa.large_string()), "x"),
        "bool": (pa.array([True, None]), "true"),
        "zone": (pa.array([0, None], pa.timestamp("us", "Mars/Base")), None),
        "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())), None),
        "nested": (pa.array([{"a": 1}, None]), None),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: values for name, (values, _) in columns.items()}), path)
    source = hive.open_source(path, Layout())
    good = [name for name, (_, text) in columns.items() if text is not None]
    need_columns(source, good, b"\x01")
    rows = list(hive.read_rows(source, good, Layout()))
    assert [value.decode() for value in rows[0].values] == [columns[name][1] for name in good]
    assert rows[1].values == [None] * len(good)
    for name, words in (("zone", "time zone Mars/Base is not known"), ("map", "map<"), ("nested", "struct<")):
        with pytest.raises(DataError, match=rf"column {name} is .*{words}"):
            need_columns(source, [name], b"\x01")


def test_text_in_a_file_named_parquet_is_read_as_text(tmp_path: Path):
    assert values_of(written(tmp_path, b"id\x01text\n1\x01a\n", "a.parquet"), ["text"]) == [[b"a"]]


def test_columns_that_folders_give_are_put_where_they_are_wanted(tmp_path: Path):
    path = written(tmp_path, b"id\x01text\n1\x01a\nbroken\n")
    source = hive.open_source(path, Layout(), partitions={"dt": b"2026", "text": b"no", "city": None})
    assert source.partitions == {"dt": b"2026", "city": None}
    need_columns(source, ["dt", "text"], b"\x01")
    rows = list(hive.read_rows(source, ["dt", "id", "city", "text"], Layout()))
    assert [row.values for row in rows] == [[b"2026", b"1", None, b"a"], []]
