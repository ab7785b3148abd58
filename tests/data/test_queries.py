"""Tables of queries and documents are read as records."""

from __future__ import annotations

import pytest

from ebr_lib.data.queries import read_records
from ebr_lib.errors import DataError


def test_tables_are_read_as_hive_writes_them(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_bytes('id\x01text\x01city\r\n1\x01左\r右\x01\\N\r\n2\x01red\u2028shoe "x\x01\r\n\r\n'.encode())
    assert read_records(path) == [
        {"id": "1", "text": "左\r右", "city": None},
        {"id": "2", "text": 'red\u2028shoe "x', "city": ""},
    ]
    path.write_bytes("id\x01text\n1\x01透明手机壳\n2\x01红鞋\n".encode("gb18030"))
    assert [row["text"] for row in read_records(path)] == ["透明手机壳", "红鞋"]
    path.write_bytes(b"id\x01text\n1\x01a\n2\n")
    with pytest.raises(DataError, match=r"line 3: 1 fields, wanted 2"):
        read_records(path)


def test_an_array_of_json_may_begin_after_white_space(tmp_path):
    path = tmp_path / "queries.json"
    path.write_text('\ufeff\n  [{"text": "a"}]', encoding="utf-8")
    assert read_records(path) == [{"text": "a"}]


def test_an_open_quote_does_not_join_rows(tmp_path):
    place = tmp_path / "q.tsv"
    place.write_text('query\tpositive\n"5 inch pan\tx\nb\ty\n"c" d\tz\n')
    assert [row["query"] for row in read_records(place)] == ['"5 inch pan', "b", '"c" d']
    place.write_text('query\tpositive\n"5 inch pan\tx\nb\ty"\n')
    assert [row["query"] for row in read_records(place)] == ['"5 inch pan', "b"]
    place.write_text('query\tpositive\n"two\tparts"\t"x\ny"\nb\ty\n')  # as pandas writes it
    assert [row["query"] for row in read_records(place)] == ["two\tparts", "b"]
    place = tmp_path / "q.csv"
    place.write_text('query,positive\n"two\nlines, 5"" pan",x\nb,y\n')
    assert [row["query"] for row in read_records(place)] == ['two\nlines, 5" pan', "b"]
    place.write_text('query,positive\n"two\nlines",x\n"not closed,y\nc,z\n')
    with pytest.raises(DataError, match=r"q\.csv: line 4: a quote that is not closed"):
        read_records(place)
    place.write_text('query,positive\n"two\nlines",x\nb,y,z\n')
    with pytest.raises(DataError, match=r"q\.csv: line 4: 3 fields, the header has 2"):
        read_records(place)


def test_error_names_a_damaged_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tmp_path / "q.parquet"
    pq.write_table(pa.table({"text": [f"query {i} {i * i}" for i in range(500)]}), place, compression="snappy")
    whole = bytearray(place.read_bytes())
    whole[60:560] = b"\xff" * 500
    place.write_bytes(whole)
    with pytest.raises(DataError, match=r"q\.parquet"):
        read_records(place)


def test_csv_fields_may_be_longer_than_the_csv_module_s_limit(tmp_path):
    (tmp_path / "c.csv").write_text(f"id,text\n1,{'ab ' * 70_000}\n")
    assert len(read_records(tmp_path / "c.csv")[0]["text"]) == 210_000
