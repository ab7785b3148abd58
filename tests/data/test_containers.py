"""What a file is goes by its bytes: read, unpacked, or refused by name; text is never taken for a container."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import orc

from ebr_lib.data import containers, hive
from ebr_lib.data.hive import Layout
from ebr_lib.errors import DataError
from ebr_lib.inference.inputs import need_columns

ROWS = b"".join(b"%d\x01title %d \xe8\x8b\xb9\x01text %d\n" % (i, i, i * i) for i in range(3000))
COLUMNS = ("id", "title", "text")


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def snappy(content: bytes) -> bytes:
    return pa.compress(content, "snappy", asbytes=True)


def in_blocks(codec: str, size: int) -> bytes:
    """As Hadoop's BlockCompressorStream writes: sizes before each block."""
    parts = [ROWS[start : start + size] for start in range(0, len(ROWS), size)]
    packed = [pa.compress(part, codec, asbytes=True) for part in parts]
    return b"".join(struct.pack(">II", len(p), len(z)) + z for p, z in zip(parts, packed, strict=True))


def tar_gz() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("000000_0"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("000000_0", ROWS)
    return out.getvalue()


READ = {
    "gzip": gzip.compress(ROWS),
    "two gzip members": gzip.compress(ROWS[:500]) + gzip.compress(ROWS[500:]),
    "bz2": bz2.compress(ROWS),
    "two bz2 streams": bz2.compress(ROWS[:500]) + bz2.compress(ROWS[500:]),
    "zstd": zstd(ROWS),
    "two zstd frames": zstd(ROWS[:500]) + zstd(ROWS[500:]),
    "a skippable zstd frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00meta" + zstd(ROWS),
    "text": ROWS,
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_compressed_text_is_read_from_any_row_on_whatever_it_is_called(tmp_path: Path, content: bytes):
    path = tmp_path / "000000_0"
    path.write_bytes(content)
    layout = Layout(columns=COLUMNS)
    source = hive.open_source(path, layout)
    rows = list(hive.read_rows(source, COLUMNS, layout))
    assert b"".join(b"\x01".join(row.values) + b"\n" for row in rows) == ROWS
    for at in (0, 1, 1500, 2999):
        assert list(hive.read_rows(source, COLUMNS, layout, rows[at].after)) == rows[at + 1 :]


@pytest.mark.parametrize("name", ["gzip", "bz2", "zstd", "two bz2 streams", "two zstd frames"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compressed_text_is_an_error_that_names_the_file(tmp_path: Path, name: str, damage: str):
    content = READ[name]
    half = len(content) // 2
    path = tmp_path / "000000_0"
    path.write_bytes(content[:-40] if damage == "cut" else content[:half] + b"\x00" * 40 + content[half + 40 :])
    with pytest.raises(DataError, match=f"^{path}.* is damaged or cut short"):
        list(hive.read_rows(hive.open_source(path, Layout(columns=COLUMNS)), COLUMNS, Layout(columns=COLUMNS)))


REFUSED = {
    "raw snappy": snappy(ROWS),
    "raw snappy of a line": snappy(b"1\x01a short line\n"),
    "framed snappy": b"\xff\x06\x00\x00sNaPpY" + b"\x01\x08\x00\x00abcdefgh",
    "snappy in Hadoop's blocks": in_blocks("snappy", 65536),
    "lz4 in Hadoop's blocks": in_blocks("lz4_raw", 3000),
    "LZO or lz4 in Hadoop's blocks": in_blocks("lz4_raw", 65536),
    "lz4 frame": pa.compress(ROWS, "lz4", asbytes=True),
    "deflate": zlib.compress(ROWS),
    "LZO": b"\x89LZO\x00\x0d\x0a\x1a\x0a" + bytes(99),
    "xz": __import__("lzma").compress(ROWS),
    "zip archive": zipped(),
    "gzip that holds a tar archive": tar_gz(),
    "gzip that holds gzip": gzip.compress(READ["gzip"]),
    "SequenceFile": b"SEQ\x06\x19org.apache.hadoop.io.Text",
    "RCFile": b"RCF\x01\x00",
    "Avro": b"Obj\x01\x04\x14avro.codec",
    "Arrow": b"ARROW1\x00\x00\xff\xff\xff\xff",
    "encrypted Parquet": b"PARE" + bytes(30),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_containers_are_refused_by_name(tmp_path: Path, name: str):
    path = tmp_path / "000000_0"
    path.write_bytes(REFUSED[name])
    with pytest.raises(DataError, match=f"^{path} is .*{name.removesuffix(' of a line')}.* not read; "):
        hive.open_source(path, Layout(columns=COLUMNS))


def test_text_is_never_taken_for_a_container(tmp_path: Path):
    generator, path = random.Random(0), tmp_path / "a"
    for letters in ("abc ,\x01\n", "id\x01text\n0123456789", "苹果手机壳abc\x01\n", "x\x01^xyzORCSEQPK\n"):
        for _ in range(300):
            text = "".join(generator.choices(letters, k=generator.choice([1, 2, 8, 40, 200])))
            path.write_bytes(text.encode(generator.choice(["utf-8", "gb18030"])))
            assert containers.kind_of(path) == containers.TEXT, text


def test_short_text_within_gzip_is_not_taken_for_snappy(tmp_path: Path):
    """Its 24 bytes begin as raw snappy of 44 could, and end too early for that."""
    path = tmp_path / "x.csv"
    path.write_bytes(gzip.compress(b",\\\n3\x01\xe3\x80\x80\x01\n\x0b\n\\N\x01ok\x01\\N\n\xc2\x85"))
    assert containers.kind_of(path) == containers.GZIP


def test_orc_is_read_by_its_bytes_and_from_any_row_on(tmp_path: Path):
    path = tmp_path / "000000_0"
    table = pa.table({"id": list(range(5000)), "text": [None, "苹果", ""] * 1666 + ["x", "y"], "tags": [["t"]] * 5000})
    orc.write_table(table, str(path), stripe_size=1024, batch_size=500)
    source = hive.open_source(path, Layout())
    assert (source.kind, source.extent, source.columns) == ("orc", 5000, ("id", "text", "tags"))
    rows = list(hive.read_rows(source, ["text", "id"], Layout()))
    assert [row.values[1] for row in rows] == [b"%d" % i for i in range(5000)]
    assert [row.values[0] for row in rows[:3]] == [None, "苹果".encode(), b""]
    for at in (0, 700, 4998):
        assert list(hive.read_rows(source, ["text", "id"], Layout(), rows[at].after)) == rows[at + 1 :]
    with pytest.raises(DataError, match="column tags is list"):
        need_columns(source, ["tags"], b"\x01")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"^{path} is not a complete ORC file"):
        hive.open_source(path, Layout())
    path.write_bytes(b"ORC\n1\n")  # a column of that name
    assert hive.open_source(path, Layout()).columns == ("ORC",)
