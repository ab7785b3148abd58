"""A thousand nasty files go through reading, encoding, writing and reading back: every row comes out, or is a reject.

What has to come out is worked out here from the words of the contract, apart from the library: lines, offsets, fields,
healing, encodings, and the very bytes of every reject.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ebr_lib.data.embeddings.files import read_embeddings
from ebr_lib.errors import DataError
from ebr_lib.inference import local
from ebr_lib.model.spec import EncoderSpec
from tests.inference.test_inference import FakeEncoder, fake_vector, run, use

RUNS, FILES_A_RUN = 50, 20
COLUMNS = ("id", "description", "label")
UNSEEN = "\r\t\n \x00\x01\x0b\u0085\u200b\u2028\u3000"
LETTERS = ["a", "苹果", '"', "'", "\\", "\\N", "é", "😀", ",", "好。", *UNSEEN.replace("\n", "").replace("\x01", "")]
LINES = [
    "\n1\x01good\x01row\n",
    "\n\\N\x01ok\x01\\N\n",
    "\n\x01\\N\x01\n",
    "\n2\x01\x01\n",
    "\n3\x01\u3000\x01\n",
    "\n4\x01",
    "\n5\x01broken\nin two\x01x\n",
]
BAD = [b"\xff\xfa", b"\xc4\xe3\xba\xc3", b"\xed\xa0\x80", b"\xe8\x8b", b"x" * 3000]
CELLS = [
    None,
    "",
    "\\N",
    "a\nb",
    "a\x01b",
    "苹果",
    "x",
    "7",
    " \u3000",
    "é\r",
    "good",
    "\ufeff",
    b"\xff\xc4",
    b"\xe8\x8b",
]


class Wanted(NamedTuple):
    """What must become of a row: its fields in the output (None for null), or a reject of its bytes at its place."""

    line: int
    offset: int
    raw: bytes
    fields: list[str | None] | None


class Knobs(NamedTuple):
    encoding: str
    columns: bool
    heal: bool
    on_empty: str
    ending: str


def shows(text: str) -> bool:
    """Whether a text of these files holds a character that can be seen."""
    return bool(text.translate(dict.fromkeys(map(ord, UNSEEN + "\ufeff"))))


def is_kept(fields: list[str | None], knobs: Knobs) -> bool:
    """Whether a row that was read well belongs into the output."""
    text = fields[1]
    return knobs.on_empty == "empty" or (text is not None and shows(text))


def as_kept(fields: list[str | None], knobs: Knobs) -> list[str | None]:
    """The fields as the output holds them: text has a space for what ends fields or rows, and `\\N` is null."""
    if knobs.ending == ".parquet":
        return fields
    spaced = [value and value.replace("\r\n", " ").replace("\n", " ").replace("\x01", " ") for value in fields]
    return [None if value == "\\N" else written for value, written in zip(fields, spaced, strict=True)]


# --- delimited text -----------------------------------------------------------------------------------------------


def text_file(drawn: bytes, knobs: Knobs) -> tuple[bytes, list[Wanted]]:
    """A file of bytes that each stand for a letter, a delimiter, a newline, a whole line or worse; and its rows."""
    letters = [text.encode(knobs.encoding, "ignore") for text in LETTERS + 3 * LINES]
    tokens = [b"\x01"] * 12 + [b"\n"] * 5 + letters + BAD
    flags, rest = drawn[0], drawn[1:]
    body = b"".join(tokens[byte % len(tokens)] for byte in rest)
    if flags & 1:
        body = body.replace(b"\n", b"\r\n")
    head = b"" if knobs.columns else b"\x01".join(map(str.encode, COLUMNS)) + (b"\r\n" if flags & 1 else b"\n")
    bom = b"\xef\xbb\xbf" if flags & 2 and knobs.encoding == "utf-8" else b""
    content = bom + head + body
    return gzip.compress(content) if flags % 8 == 4 else content, rows_of(bom, head, body, knobs)


def rows_of(bom: bytes, head: bytes, body: bytes, knobs: Knobs) -> list[Wanted]:
    lines, offset = [], len(bom) + len(head)
    newline = b"\r" if b"\n" not in head + body and b"\r" in body.rstrip(b"\r") else b"\n"
    for number, raw in enumerate(body.split(newline), 1 if knobs.columns else 2):
        lines.append((number, offset, raw))
        offset += len(raw) + 1
    if not lines[-1][2]:
        lines.pop()  # nothing follows the last newline
    newlines, carriage = body.count(b"\n"), body.count(b"\r\n")
    windows = 2 * carriage > newlines if newlines else head.endswith(b"\r\n")
    groups = [[line] for line in lines]
    if knobs.heal:
        groups = healed(lines)
    return [row_of(group, windows, knobs) for group in groups]


def healed(lines: list[tuple[int, int, bytes]]) -> list[list[tuple[int, int, bytes]]]:
    """Lines that make one row: as many short ones as fit, if they fill it."""
    groups, start = [], 0
    while start < len(lines):
        marks, end = lines[start][2].count(b"\x01"), start + 1
        while end < len(lines) and (more := lines[end][2].count(b"\x01")) < 2 and marks + more <= 2:
            marks, end = marks + more, end + 1
        group = lines[start:end]
        groups += [group] if marks == 2 else [[line] for line in group]
        start = end
    return groups


def row_of(group: list[tuple[int, int, bytes]], windows: bool, knobs: Knobs) -> Wanted:
    line, offset, _ = group[0]
    raw = b"\n".join(bytes_ for *_, bytes_ in group)
    fields = b" ".join(b.removesuffix(b"\r") if windows else b for *_, b in group).split(b"\x01")
    try:
        values = [None if field == b"\\N" else field.decode(knobs.encoding) for field in fields]
    except UnicodeDecodeError:
        values = []
    return Wanted(line, offset, raw, values if len(values) == 3 and is_kept(values, knobs) else None)


# --- Parquet ------------------------------------------------------------------------------------------------------


def parquet_file(drawn: bytes, place: Path, knobs: Knobs) -> list[Wanted]:
    """Write a file of drawn values; returns its rows."""
    cells = [CELLS[byte % len(CELLS)] for byte in drawn]
    rows = [cells[start : start + 3] for start in range(0, len(cells) // 3 * 3, 3)]
    as_bytes = [[value.encode() if isinstance(value, str) else value for value in row] for row in rows]
    columns = [[row[i] for row in as_bytes] for i in range(3)]
    table = pa.table({name: pa.array(column, pa.binary()) for name, column in zip(COLUMNS, columns, strict=True)})
    pq.write_table(table, place, row_group_size=7)
    return [parquet_row(number, row, knobs) for number, row in enumerate(rows)]


def parquet_row(number: int, row: list[str | bytes | None], knobs: Knobs) -> Wanted:
    shown = [value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value for value in row]
    raw = json.dumps(dict(zip(COLUMNS, shown, strict=True)), ensure_ascii=False).encode()
    texts = [value for value in row if not isinstance(value, bytes)]
    return Wanted(number + 1, number, raw, texts if len(texts) == 3 and is_kept(texts, knobs) else None)


# --- the test -----------------------------------------------------------------------------------------------------


def check_rejects(content: bytes, wanted: list[tuple[str, Wanted]]) -> None:
    """Walk through the file of rejects: each at its place, with its bytes as they were; only the reason is free."""
    place = len(b"file\x01line\x01offset\x01reason\x01raw\n") if wanted else 0
    for name, row in wanted:
        start = f"{name}\x01{row.line}\x01{row.offset}\x01".encode()
        assert content.startswith(start, place)
        end = content.index(b"\x01", place + len(start))
        assert end > place + len(start)
        assert content.startswith(row.raw + b"\n", end + 1)
        place = end + 1 + len(row.raw) + 1
    assert place == len(content)


@pytest.fixture(scope="module")
def real(tiny_bert: Path) -> local.LocalEncoder:
    return local.LocalEncoder(EncoderSpec(str(tiny_bert), precision="float32", device="cpu"))


def vectors_of(texts: list[str], real: local.LocalEncoder | None) -> np.ndarray:
    """What sentence-transformers makes of texts, or what the encoder that stands in for a model does."""
    if real is None:
        return np.stack([fake_vector(text) for text in texts])
    unique = list(dict.fromkeys(texts))
    model = real._encoder.model
    made = model.encode(unique, batch_size=8, normalize_embeddings=True, show_progress_bar=False)
    return made[[unique.index(text) for text in texts]]


KNOBS = st.builds(
    Knobs,
    encoding=st.sampled_from(["utf-8", "utf-8", "gb18030", "gbk"]),
    columns=st.booleans(),
    heal=st.booleans(),
    on_empty=st.sampled_from(["skip", "empty"]),
    ending=st.sampled_from([".txt", ".txt", ".parquet", ".npy"]),
)


# no shrinking: a failing draw is small enough to read, and shrinking a thousand files takes minutes
@settings(max_examples=RUNS, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_a_thousand_nasty_files_come_through(tmp_path_factory, real: local.LocalEncoder, data: st.DataObject):
    folder = tmp_path_factory.mktemp("nasty")
    (folder / "in").mkdir()
    knobs, with_model = data.draw(KNOBS), data.draw(st.booleans())
    rows: list[tuple[str, Wanted]] = []
    for number in range(FILES_A_RUN):
        drawn = data.draw(st.binary(min_size=1, max_size=80))
        name = f"{number:03}.parquet" if drawn[0] % 5 == 0 else f"{number:03}.csv"
        if name.endswith(".parquet"):
            wanted = parquet_file(drawn, folder / "in" / name, knobs)
        else:
            content, wanted = text_file(drawn, knobs)
            (folder / "in" / name).write_bytes(content)
        rows += [(name, row) for row in wanted]
    with pytest.MonkeyPatch.context() as patch:
        encoder = use(patch, FakeEncoder())
        if with_model:
            patch.setattr(local, "open_encoder", lambda spec, processes: real)
        patch.setattr(os, "fsync", lambda file: None)  # nothing is killed here, and a thousand files are many
        written = any(row.fields is not None for _, row in rows)
        with contextlib.nullcontext() if written else pytest.raises(DataError, match="none of"):
            result = run(
                folder,
                output_path=str(folder / f"out{knobs.ending}"),
                on_empty_text=knobs.on_empty,
                encoding=knobs.encoding,
                heal_rows=knobs.heal,
                columns=COLUMNS if knobs.columns else (),
                window_rows=data.draw(st.integers(10, 100)),
            )
    if not written:
        return
    kept = [row.fields for _, row in rows if row.fields is not None]
    rejects = [(name, row) for name, row in rows if row.fields is None]
    counts = result.counts
    assert (counts["read"], counts["written"], counts["rejected"]) == (len(rows), len(kept), len(rejects))
    check_rejects(result.rejects.read_bytes() if result.rejects else b"", rejects)
    texts = [fields[1] if fields[1] is not None and shows(fields[1]) else None for fields in kept]
    if not any(texts):
        return
    back = read_embeddings(result.output, keep_empty=True)
    assert [list(row) for row in zip(*(back.columns[name] for name in COLUMNS), strict=True)] == [
        as_kept(fields, knobs) for fields in kept
    ]
    assert back.valid.tolist() == [text is not None for text in texts]
    asked = [text for text in texts if text is not None]
    made = vectors_of(asked, real if with_model else None)
    assert np.abs(back.vectors[back.valid] - made).max() <= (1e-5 if with_model else 0)
    assert with_model or sorted(encoder.asked) == sorted(set(asked))
