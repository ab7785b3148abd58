"""The inference stage: rows in are rows out, and every knob does what its help says."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ebr_lib.data import hive
from ebr_lib.data.embeddings.files import read_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError, NotFiniteError, UserError
from ebr_lib.inference import encode, inputs, local, windows
from ebr_lib.inference import run as inference
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.inference.job import EncodeReport
from ebr_lib.inference.local import EncoderFacts
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.model.provenance import ModelIdentity
from ebr_lib.model.spec import EncoderSpec
from tests.children import SERVER


def fake_vector(text: str) -> np.ndarray:
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest, dtype=np.uint8)[:6].astype(np.float32) / np.float32(7)


class FakeEncoder:
    """Vectors that show which text they are of, at once; records what it was asked for."""

    def __init__(self, prompt: str = "", trained: str = "", sha: str = "a" * 64) -> None:
        self.facts = EncoderFacts(6, "float32", prompt, trained, 128)
        self.dim = 6
        self.sha = sha
        self.asked: list[str] = []

    def prepare(self, texts: list[str]) -> list[str]:
        return texts

    def encode(self, prepared: list[str], on_progress):
        self.asked += prepared
        counts = Counter(texts=len(prepared), tokens=10 * len(prepared), slots=16 * len(prepared))
        return np.stack([fake_vector(text) for text in prepared]), EncodeReport(counts, lost=np.zeros(len(prepared)))

    def close(self) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, encoder: FakeEncoder) -> FakeEncoder:
    monkeypatch.setattr(local, "open_encoder", lambda spec, processes: encoder)
    monkeypatch.setattr(
        inference, "identify", lambda name, own: ModelIdentity(name, f"/models/{name}", encoder.sha, name, encoder.sha)
    )
    return encoder


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    return use(monkeypatch, FakeEncoder())


def catalogue(folder: Path, rows: list[str], name: str = "a.csv", header: str = "id\x01description\x01label") -> Path:
    path = folder / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8", newline="")
    return path


def run(folder: Path, **knobs):
    """Run the stage on `in`; any share of rows may be lost."""
    places = {"data_path": str(folder / "in"), "output_path": str(folder / "out.txt"), "max_rejected_share": 1.0}
    return run_batch_inference(places | knobs)


def rejects_of(path: Path) -> list[list[bytes]]:
    head, *rows = path.read_bytes().split(b"\n")
    assert head == b"file\x01line\x01offset\x01reason\x01raw"
    return [row.split(b"\x01", 4) for row in rows[:-1]]


# --- rows ---------------------------------------------------------------------------------------------------------


def test_output_keeps_columns_order_and_duplicates(tmp_path: Path, encoder: FakeEncoder):
    rows = [f"{i}\x01text {i % 7}\x01\\N" for i in range(100)]
    catalogue(tmp_path, rows[:60])
    catalogue(tmp_path, rows[60:], "b.csv")
    result = run(tmp_path, window_rows=9)
    back = read_embeddings(result.output)
    assert back.columns == {
        "id": [str(i) for i in range(100)],
        "description": [f"text {i % 7}" for i in range(100)],
        "label": [None] * 100,
    }
    assert (back.vectors == np.stack([fake_vector(f"text {i % 7}") for i in range(100)])).all()
    assert sorted(encoder.asked) == sorted({f"text {i % 7}" for i in range(100)})  # each once, across windows
    assert (result.counts["encoded"], result.counts["duplicates"]) == (7, 93)
    assert not (tmp_path / "out.txt.work").exists()


def test_output_columns_are_kept_in_their_order(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01x"])
    assert list(read_embeddings(run(tmp_path, output_columns=["label", "id"]).output).columns) == ["label", "id"]


def test_without_knobs_it_reads_and_writes_where_the_guide_says(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("infer_data").mkdir()
    Path("infer_data/a.csv").write_text("id\x01description\n1\x01a\n")
    result = run_batch_inference()
    assert result.output == Path("faiss/embeds_2.txt")
    assert Path("faiss/embeds_2.txt").read_bytes().startswith(b"id\x01description\x01vector\n1\x01a\x01")
    assert result.rejects is None
    again = run_batch_inference({"preset": "faiss/embeds_2.txt.yaml"})  # the saved config is a preset
    assert again.output.read_bytes() == Path("faiss/embeds_2.txt").read_bytes()


@pytest.mark.parametrize("ending", [".txt", ".parquet", ".npy"])
def test_every_format_holds_the_same(tmp_path: Path, encoder: FakeEncoder, ending: str):
    catalogue(tmp_path, ["1\x01a\x01x", "2\x01\x01\\N", "3\x01b\x01"])
    result = run(tmp_path, output_path=str(tmp_path / f"o{ending}"), on_empty_text="empty")
    back = read_embeddings(result.output, keep_empty=True)
    assert back.columns == {"id": ["1", "2", "3"], "description": ["a", "", "b"], "label": ["x", None, ""]}
    assert back.valid.tolist() == [True, False, True]
    assert (back.vectors[back.valid] == np.stack([fake_vector("a"), fake_vector("b")])).all()


@pytest.mark.parametrize(("name", "head"), [("o.PARQUET", b"PAR1"), ("o.Npy", b"\x93NUMPY"), ("o", b"id\x01")])
def test_the_ending_picks_the_format_in_any_case(tmp_path: Path, encoder: FakeEncoder, name: str, head: bytes):
    catalogue(tmp_path, ["1\x01a\x01x"])
    result = run(tmp_path, output_path=str(tmp_path / name))
    assert result.output.read_bytes().startswith(head)
    assert (read_embeddings(result.output).vectors == fake_vector("a")).all()


EMPTY = ["1\x01\\N\x01x", "2\x01\x01x", "3\x01 \u3000\x01x", "4\x01ok\x01x"]


def test_empty_texts_are_skipped_to_the_rejects(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, EMPTY)
    result = run(tmp_path)
    assert read_embeddings(result.output).columns["id"] == ["4"]
    assert result.rejects is not None
    offset = len("id\x01description\x01label\n")
    assert rejects_of(result.rejects)[0] == [b"a.csv", b"2", str(offset).encode(), b"null text", b"1\x01\\N\x01x"]
    assert [row[3] for row in rejects_of(result.rejects)] == [b"null text", b"empty text", b"blank text"]
    catalogue(tmp_path, EMPTY[3:])
    assert run(tmp_path).rejects is None
    assert not result.rejects.exists()  # those of the earlier run do not stay beside another output


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\u00ad", "\x00", "\x1c\x7f", "\u2028 \u200e\u3000\x85", "\t"])
def test_a_text_that_shows_nothing_gets_no_vector(tmp_path: Path, encoder: FakeEncoder, text: str):
    catalogue(tmp_path, [f"1\x01{text}\x01x", f"2\x01{text}a{text}\x01x", f"3\x01{text}。\x01x", f"4\x01😀{text}\x01x"])
    result = run(tmp_path)
    assert read_embeddings(result.output).columns["id"] == ["2", "3", "4"]
    assert [row[3] for row in rejects_of(result.rejects)] == [b"blank text"]
    assert encoder.asked == [f"{text}a{text}", f"{text}。", f"😀{text}"]


def test_empty_texts_are_kept_without_a_vector(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, EMPTY)
    result = run(tmp_path, on_empty_text="empty")
    back = read_embeddings(result.output)
    assert (back.rows.tolist(), back.total, result.counts["empty"]) == ([3], 4, 3)
    assert encoder.asked == ["ok"]


def test_empty_texts_are_an_error(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, EMPTY)
    with pytest.raises(DataError, match=r"a\.csv, line 2: null text in column description"):
        run(tmp_path, on_empty_text="error")


def test_healing_is_counted(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01one\ntwo\x01x", "2\x01b\x01x"])
    assert run(tmp_path).counts["rejected"] == 2
    result = run(tmp_path, heal_rows=True)
    assert (result.counts["healed"], result.counts["rejected"]) == (1, 0)
    assert read_embeddings(result.output).columns["description"] == ["one two", "b"]


def test_input_knobs(tmp_path: Path, encoder: FakeEncoder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "000000_0").write_bytes("1\t苹果\n".encode("gbk"))
    result = run(
        tmp_path,
        file_patterns=["0*_0"],
        columns=["id", "text"],
        description_column="text",
        delimiter="\\t",
        encoding="gbk",
    )
    assert read_embeddings(result.output).columns == {"id": ["1"], "text": ["苹果"]}
    assert encoder.asked == ["苹果"]


@pytest.mark.parametrize("ending", ["txt", "npy"])
def test_values_that_text_cannot_hold_are_written_with_spaces_and_counted(
    tmp_path: Path, encoder: FakeEncoder, caplog, ending: str
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    ids = ["1", "a\nb\r\nc", "a\x01b", "\\N", None]
    texts = ["a", "b\nb", "c", "d", "e"]
    pq.write_table(pa.table({"id": ids, "description": texts}), tmp_path / "in" / "a.parquet")
    result = run(tmp_path, output_path=str(tmp_path / f"o.{ending}"), max_rejected_share=0.0)
    back = read_embeddings(result.output)
    assert back.columns == {"id": ["1", "a b c", "a b", None, None], "description": ["a", "b b", "c", "d", "e"]}
    assert (back.vectors == np.stack([fake_vector(text) for text in texts])).all()  # the text itself is encoded
    assert result.counts["altered"] == 4 and result.rejects is None
    assert json.loads(result.manifest.read_text())["altered"] == {"id": 3, "description": 1}
    assert "id 3, description 1; write Parquet" in caplog.text
    whole = run(tmp_path, output_path=str(tmp_path / "o.parquet"))
    assert read_embeddings(whole.output).columns == {"id": ids, "description": texts}
    assert not whole.counts["altered"]


@pytest.mark.parametrize(
    ("content", "knobs"),
    [
        ("id\x01description\n1\x01a\\\x01b\n2\x01a\\\nb\n3\x01a\\nb\n", {"escaped_by": "\\"}),
        ('id,description\n1,a b\n2,"a\nb"\n3,"a\r\nb"\n', {"delimiter": ","}),
    ],
    ids=["escaped", "quoted"],
)
def test_no_row_is_lost_for_a_kept_value_that_was_quoted_or_escaped(tmp_path, encoder, content: str, knobs: dict):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(content, newline="")
    back = read_embeddings(run(tmp_path, max_rejected_share=0.0, **knobs).output)
    assert back.columns == {"id": ["1", "2", "3"], "description": ["a b"] * 3}


def test_a_repeated_header_row_is_rejected(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01x", "id\x01description\x01label", "2\x01b\x01x"])
    result = run(tmp_path, max_rejected_share=0.0)
    assert read_embeddings(result.output).columns["id"] == ["1", "2"]
    assert rejects_of(result.rejects)[0][3] == b"the header row again"


def test_large_input_that_cannot_be_read_is_refused_before_it_is_encoded(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch
):
    monkeypatch.setattr(inputs, "SAMPLED_BYTES", 1000)
    for part in range(9):  # in the rows of all files, not of the first alone
        rows = [f"{i}\x01text {part} {i}\x01" + ("a\\\x01b" if part and i % 3 == 0 else "") for i in range(60)]
        catalogue(tmp_path, rows, f"part-{part}")
    with pytest.raises(DataError) as error:
        run(tmp_path, max_rejected_share=0.1)
    assert "of the first 540 rows of its files, 30% cannot be read (160 × 4 fields, wanted 3)" in str(error.value)
    assert r"--escaped_by '\\'" in str(error.value) and not encoder.asked
    assert not (tmp_path / "out.txt.work").exists()
    assert run(tmp_path, max_rejected_share=0.31).counts["rejected"] == 160  # as the error says
    catalogue(tmp_path, [f"{i}\x01new {i}\x01" for i in range(60)], "part-9")
    assert run(tmp_path, append=True, max_rejected_share=0.0).counts["written"] == 440  # of the new file alone


def test_a_healed_row_that_is_rejected_is_reported_as_it_was(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01 \n \x01x", "2\x01b\x01x"])
    result = run(tmp_path, heal_rows=True)
    assert result.rejects is not None
    assert result.rejects.read_bytes().endswith(b"\x01blank text\x011\x01 \n \x01x\n")


def test_a_file_whose_name_is_not_utf8_is_spelled(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01x", "lost"]).rename(tmp_path / "in" / os.fsdecode(b"\xc4\xe3.csv"))
    result = run(tmp_path)
    assert json.loads(result.manifest.read_text())["inputs"][0]["path"] == "\\xc4\\xe3.csv"
    assert rejects_of(result.rejects)[0][0] == b"\\xc4\\xe3.csv"
    assert run(tmp_path, append=True).counts["read"] == 2


def test_empty_files_among_others_are_left_out_with_a_warning(tmp_path: Path, encoder: FakeEncoder, caplog):
    catalogue(tmp_path, ["1\x01a\x01x"])
    (tmp_path / "in" / "b.csv").write_bytes(b"")
    (tmp_path / "in" / "c.parquet").write_bytes(b"")
    (tmp_path / "in" / "d.csv.gz").write_bytes(gzip.compress(b""))
    assert run(tmp_path).counts["written"] == 1
    assert "not read: 3 under" in caplog.text
    assert "(zero bytes): b.csv, c.parquet, d.csv.gz" in caplog.text
    (tmp_path / "in" / "a.csv").unlink()
    with pytest.raises(DataError, match=r"b\.csv \(zero bytes\)"):
        run(tmp_path, file_patterns=["*.csv"])


def test_rows_that_are_not_utf8_hint_at_gb18030(tmp_path: Path, encoder: FakeEncoder, caplog):
    path = catalogue(tmp_path, ["1\x01苹果\x01x"] * 3)
    path.write_bytes(path.read_bytes() + "2\x01手机\x01x\n".encode("gbk"))
    run(tmp_path)
    assert "they may be GB18030: set encoding to gb18030" in caplog.text
    caplog.clear()
    run(tmp_path, encoding="utf-8")
    assert "GB18030" not in caplog.text


def test_parquet_is_known_by_its_bytes_and_gets_no_hint_about_encodings(tmp_path: Path, encoder, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    table = pa.table({"id": ["1", "2"], "description": [b"a", "手机".encode("gbk")]})
    pq.write_table(table, tmp_path / "in" / "000000_0")
    catalogue(tmp_path, ["a\x01b"], "text_0", header="PAR1\x01description")
    knobs = {"file_patterns": ["*_0"], "output_columns": ["description"]}
    result = run(tmp_path, **knobs)
    assert read_embeddings(result.output).columns == {"description": ["a", "b"]}
    assert "bytes that are not utf-8: column description" in caplog.text
    assert "GB18030" not in caplog.text


def test_append_takes_in_new_files_only(tmp_path: Path, encoder: FakeEncoder):
    for ending in (".txt", ".parquet", ".npy"):
        out = str(tmp_path / f"o{ending}")
        catalogue(tmp_path, ["1\x01a\x01x", "broken"], "b.csv")
        run(tmp_path, output_path=out)
        catalogue(tmp_path, ["2\x01b\x01x", "lost"], "a.csv")
        encoder.asked.clear()
        result = run(tmp_path, output_path=out, append=True)
        assert encoder.asked == ["b"]
        assert read_embeddings(out).columns["id"] == ["1", "2"]
        assert [row[4] for row in rejects_of(result.rejects)] == [b"broken", b"lost"]
        assert (result.counts["read"], result.counts["written"], result.counts["rejected"]) == (4, 2, 2)
        manifest = json.loads(result.manifest.read_text())
        assert [entry["path"] for entry in manifest["inputs"]] == ["b.csv", "a.csv"]
        assert read_embeddings(run(tmp_path, output_path=out, append=True).output).total == 2  # nothing new
        (tmp_path / "in" / "a.csv").unlink()


@pytest.mark.parametrize("cut", ["o.txt", "o.parquet", "o.npy", "o.ids.txt"])
def test_append_refuses_an_output_that_was_cut(tmp_path: Path, encoder: FakeEncoder, cut: str):
    out = tmp_path / cut.replace(".ids.txt", ".npy")
    catalogue(tmp_path, ["1\x01a\x01x", "2\x01b\x01x"])
    run(tmp_path, output_path=str(out))
    whole = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(whole[:-3])
    catalogue(tmp_path, ["3\x01c\x01x"], "b.csv")
    with pytest.raises(DataError, match=r"its manifest says \d+: the file was cut short"):
        run(tmp_path, output_path=str(out), append=True)
    assert (tmp_path / cut).read_bytes() == whole[:-3]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".npy"])
def test_an_output_among_the_input_is_never_input(tmp_path: Path, encoder: FakeEncoder, ending: str):
    catalogue(tmp_path, ["1\x01a\x01x", "broken"])
    knobs = {"output_path": str(tmp_path / "in" / f"out{ending}"), "file_patterns": ["*"]}
    assert run(tmp_path, **knobs).counts["read"] == 2
    assert run(tmp_path, **knobs).counts["read"] == 2
    catalogue(tmp_path, ["2\x01b\x01x"], "b.csv")
    result = run(tmp_path, **knobs, append=True)
    assert result.counts["read"] == 3
    assert [entry["path"] for entry in json.loads(result.manifest.read_text())["inputs"]] == ["a.csv", "b.csv"]


def test_an_unfinished_run_among_the_input_is_never_input(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    catalogue(tmp_path, [f"{i}\x01text {i}\x01x" for i in range(9)])
    knobs = {"output_path": str(tmp_path / "in" / "out.csv"), "file_patterns": ["*"], "window_rows": 3}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder, "encode", lambda texts, on_progress: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, **knobs)
    assert run(tmp_path, **knobs).counts["read"] == 9


@pytest.mark.parametrize("output", ["in/a.csv", "in/../in/a.csv", "link/a.csv", "in/a"])
@pytest.mark.parametrize("data_path", ["in", "in/a.csv", "link"])
def test_an_input_is_never_written_over(tmp_path: Path, encoder: FakeEncoder, output: str, data_path: str):
    before = catalogue(tmp_path, ["1\x01a\x01x"]).read_bytes()
    (tmp_path / "link").symlink_to("in")
    if output == "in/a":  # whose companion the input is
        (tmp_path / "in" / "a.csv").rename(tmp_path / "in" / "a.json")
    files = sorted((tmp_path / "in").iterdir())
    place = (tmp_path / data_path).with_suffix(files[0].suffix if data_path.endswith(".csv") else "")
    with pytest.raises(ConfigError, match="would write over its input"):
        run(tmp_path, data_path=str(place), output_path=str(tmp_path / output), file_patterns=["*"])
    assert files == sorted((tmp_path / "in").iterdir())
    assert files[0].read_bytes() == before
    assert not encoder.asked


def test_an_unwritable_output_is_refused_before_the_model_loads(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(local, "open_encoder", lambda spec, processes: pytest.fail("the model was loaded"))
    catalogue(tmp_path, ["1\x01a\x01x"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder is a folder; give the name of a file"):
        run(tmp_path, output_path=str(tmp_path / "folder"))
    with pytest.raises(ConfigError, match=r"cannot be made"):
        run(tmp_path, output_path=str(tmp_path / "in" / "a.csv" / "out.txt"))


@pytest.mark.parametrize(
    ("content", "knobs", "words"),
    [
        (b"id\x01x\tdescription\n1\ta\n", {"delimiter": "\\t"}, r"column name 'id\\x01x' holds what separates"),
        (b"\xff\xfbid\x01description\n1\x01a\n", {"encoding": "utf-8"}, "is not utf-8; set encoding"),
        (b"\\N\x01description\n1\x01a\n", {}, r"column name '\\\\N' holds"),
    ],
)
def test_names_of_columns_are_checked_as_values_are(tmp_path: Path, encoder, content: bytes, knobs: dict, words: str):
    catalogue(tmp_path, []).write_bytes(content)
    with pytest.raises(DataError, match=words):
        run(tmp_path, **knobs)
    assert not encoder.asked
    chosen = run(tmp_path, **knobs, output_columns=["description"])
    assert read_embeddings(chosen.output).columns == {"description": ["a"]}


def test_a_parquet_column_of_lists_is_refused_before_the_work(tmp_path: Path, encoder: FakeEncoder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, tags in (("a", ["x"]), ("b", [["x"]])):
        (tmp_path / "in").mkdir(exist_ok=True)
        table = pa.table({"id": ["i\nd"], "description": ["a"], "tags": tags})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: column tags is list"):
        run(tmp_path)
    assert not encoder.asked


def test_append_refuses_another_model_and_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use(monkeypatch, FakeEncoder())
    catalogue(tmp_path, ["1\x01a\x01x"])
    run(tmp_path)
    before = (tmp_path / "out.txt").read_bytes()
    catalogue(tmp_path, ["1\x01b\x01x"])
    use(monkeypatch, FakeEncoder(sha="b" * 64))
    with pytest.raises(DataError) as error:
        run(tmp_path, append=True)
    assert all(words in str(error.value) for words in ("model: 'aaa", "'bbb", "input a.csv: its contents changed"))
    (tmp_path / "out.txt.json").unlink()
    with pytest.raises(DataError, match="has no manifest"):
        run(tmp_path, append=True)
    assert (tmp_path / "out.txt").read_bytes() == before


# --- the model ----------------------------------------------------------------------------------------------------


def test_a_prompt_other_than_the_models_is_warned_about(tmp_path: Path, monkeypatch, caplog):
    catalogue(tmp_path, ["1\x01a\x01x"])
    use(monkeypatch, FakeEncoder(prompt="item: ", trained="passage: "))
    run(tmp_path, prompt="item: ")
    assert "prompt 'item: ' is not what the model was trained with ('passage: ')" in caplog.text
    caplog.clear()
    use(monkeypatch, FakeEncoder(prompt="passage: ", trained="passage: "))
    run(tmp_path, prompt="passage: ")
    run(tmp_path)
    assert "not what the model" not in caplog.text


def test_a_vector_that_is_not_finite_is_an_error(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    catalogue(tmp_path, ["1\x01a\x01x", "2\x01b\x01x"])
    monkeypatch.setattr(
        encoder, "encode", lambda texts, on_progress: (np.full((2, 6), np.nan, np.float32), EncodeReport())
    )
    named = r"2 texts, the first in a\.csv, line 2 \('a'\); a\.csv, line 3 \('b'\); set precision"
    with pytest.raises(NotFiniteError, match=named):
        run(tmp_path)


@pytest.mark.parametrize("part", ["1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.json"])
def test_append_refuses_a_model_of_equal_weights_but_other_parts(tmp_path: Path, monkeypatch, part: str):
    encoder = use(monkeypatch, FakeEncoder())
    folder = tmp_path / "model"
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.json", "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    identity = ModelIdentity("m", str(folder), encoder.sha, "m", encoder.sha)
    monkeypatch.setattr(inference, "identify", lambda name, own: identity)
    catalogue(tmp_path, ["1\x01a\x01x"])
    run(tmp_path)
    (folder / "README.md").write_text("a word on the model")
    assert run(tmp_path, append=True).counts["read"] == 1
    (folder / part).write_text("other")
    with pytest.raises(DataError, match=r"model files: \["):
        run(tmp_path, append=True)


def test_rows_that_were_truncated_are_counted_not_texts(tmp_path: Path, tiny_bert: Path):
    long = " ".join(["blanket"] * 300)
    catalogue(tmp_path, [f"{i}\x01{long if i % 2 else 'short'}\x01x" for i in range(20)])
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "device": "cpu"}
    for window in (3, 7, 100):
        result = run(tmp_path, **knobs, window_rows=window)
        assert json.loads(result.manifest.read_text())["truncated"]["rows"] == 10
        assert (result.counts["truncated"], result.counts["encoded"]) == (10, 2)


def test_a_model_of_static_embeddings(tmp_path: Path, tiny_bert: Path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    model.save_pretrained(str(tmp_path / "static"))
    catalogue(tmp_path, ["1\x01red shoes\x01x", "2\x01红鞋\x01x", "3\x01red shoes\x01x"])
    result = run(tmp_path, model_name=str(tmp_path / "static"), precision="float32", device="cpu")
    wanted = model.encode(["red shoes", "红鞋", "red shoes"], normalize_embeddings=True)
    assert np.allclose(read_embeddings(result.output).vectors, wanted, atol=1e-6)


def test_unknown_token_counts_are_none_and_not_zero(tmp_path: Path, tiny_bert: Path, monkeypatch):
    from ebr_lib.model import encoder as encoders

    catalogue(tmp_path, [f"{i}\x01{'blanket ' * 300}{i}\x01x" for i in range(5)])
    monkeypatch.setattr(encoders, "_tokenizer_of", lambda model, prompt: None)
    one = local.LocalEncoder(EncoderSpec(str(tiny_bert), device="cpu"))
    monkeypatch.setattr(local, "open_encoder", lambda spec, ignored: one)
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "device": "cpu"}
    result = run(tmp_path, **knobs)
    catalogue(tmp_path, ["6\x01short\x01x"], "b.csv")
    for one in (result, run(tmp_path, **knobs, append=True)):
        manifest = json.loads(one.manifest.read_text())
        assert (one.counts["truncated"], one.counts["tokens"], manifest["truncated"]["rows"]) == (None, None, None)
        assert dict(one.tables["counts"].to_numpy())["truncated 截断"] == "-"
    assert (one.counts["read"], one.counts["uncounted"]) == (6, 6)


def test_the_summary_shows_texts_encoded_and_speed(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, [f"{i}\x01text {i % 5}\x01x" for i in range(20)])
    result = run(tmp_path, output_path=str(tmp_path / "o.npy"))
    shown = dict(result.tables["counts"].to_numpy())
    assert (shown["texts encoded 编码文本"], shown["encoded in this run 本次编码"]) == (5, 5)
    assert int(shown["texts/s 每秒编码"]) > 0
    sizes = [(tmp_path / name).stat().st_size for name in ("o.npy", "o.ids.txt")]
    assert shown["MB"] == f"{sum(sizes) / 1e6:.1f}"


def test_a_real_model_its_knobs_and_the_manifest(tmp_path: Path, tiny_bert: Path):
    from ebr_lib.model.loading import load_model

    long = " ".join(["blanket"] * 300)
    catalogue(tmp_path, ["1\x01red shoes\x01x", f"2\x01{long}\x01x", "3\x01红鞋\x01x"])
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "device": "cpu"}
    result = run(tmp_path, **knobs, prompt="item: ", truncate_dim=8, max_seq_length=32, batch_tokens=64)
    back = read_embeddings(result.output)
    model = load_model(str(tiny_bert), max_seq_length=32, device="cpu")
    wanted = model.encode(["item: red shoes", f"item: {long}", "item: 红鞋"], truncate_dim=8, normalize_embeddings=True)
    assert np.allclose(back.vectors, wanted, atol=1e-5)
    assert np.allclose(np.linalg.norm(back.vectors, axis=1), 1, atol=1e-6)
    manifest = json.loads(result.manifest.read_text())
    assert manifest["model"]["path"] == str(tiny_bert)
    assert len(manifest["model"]["sha256"]) == 64
    assert (manifest["prompt"], manifest["dimension"], manifest["precision"]) == ("item: ", 8, "float32")
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256((tmp_path / "in" / "a.csv").read_bytes()).hexdigest()
    assert manifest["truncated"]["rows"] == 1
    example = manifest["truncated"]["examples"][0]
    assert (example["file"], example["line"], example["kept"]) == ("a.csv", 3, 32)
    assert manifest["truncated"]["token_share"] == pytest.approx((example["tokens"] - 32) / manifest_tokens(manifest))
    raw = run(tmp_path, **knobs, normalize=False, truncate_dim=8)
    assert not np.allclose(np.linalg.norm(read_embeddings(raw.output).vectors, axis=1), 1, atol=1e-3)


def manifest_tokens(manifest: dict) -> int:
    return manifest["rows"]["tokens"] + manifest["rows"]["tokens_lost"]


def test_several_processes_give_the_same_vectors(tmp_path: Path, tiny_bert: Path, monkeypatch):
    catalogue(tmp_path, [f"{i}\x01{'shop ' * (i % 9)}{i}\x01x" for i in range(40)])
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "backend": "torch", "max_seq_length": 8}
    one = run(tmp_path, **knobs)
    done = []
    real = local.ProcessEncoder.encode

    def encode(self, prepared, on_progress):
        return real(self, prepared, lambda texts: done.append(texts) or on_progress(texts))

    monkeypatch.setattr(local.ProcessEncoder, "encode", encode)
    monkeypatch.setattr(local, "multiprocessing", SimpleNamespace(get_context=lambda method: SERVER))  # there at once
    two = run(tmp_path, **knobs, num_processes=2, output_path=str(tmp_path / "two.txt"))
    assert done == [20, 40]
    assert np.allclose(read_embeddings(one.output).vectors, read_embeddings(two.output).vectors, atol=1e-6)
    assert one.counts["truncated"] == two.counts["truncated"] > 0


# Its processes have no model and no torch, and so start fast; they encode until they are ended.
PARENT = """
import contextlib, multiprocessing, signal, sys, threading, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would have it ignored
sys.modules["torch"] = torch = types.ModuleType("torch")
torch.set_num_threads, torch.cuda = abs, types.SimpleNamespace(device_count=lambda: 0)
from ebr_lib.inference import local
class Endless:
    facts = local.EncoderFacts(1, "float32", "", "", 128)
    def __init__(self, spec): pass
    def prepare(self, texts): return texts
    def encode(self, prepared, on_progress): threading.Event().wait()
local.LocalEncoder = Endless
if __name__ == "__main__":
    spec = local.EncoderSpec("none", device="cpu")
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(local.open_encoder(spec, 2)) as encoder:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        encoder.encode(["one", "two"], print)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_encoder_processes_end_quietly_with_their_parent(tmp_path: Path, kind: signal.Signals):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True)
    assert parent.stdout is not None
    assert len(parent.stdout.readline().split()) == 2
    (os.killpg if kind == signal.SIGINT else os.kill)(parent.pid, kind)
    try:
        _, errors = parent.communicate(timeout=60)  # ends when nobody holds the pipes any more
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert "Traceback" not in errors


def test_an_encoder_process_raises_the_error_of_loading(tmp_path: Path):
    spec = EncoderSpec(str(tmp_path / "no-model"), device="cpu")
    with pytest.raises(UserError) as alone:
        local.open_encoder(spec)
    with pytest.raises(UserError) as of_two:
        local.open_encoder(spec, processes=2)
    assert (type(of_two.value), str(of_two.value)) == (type(alone.value), str(alone.value))
    assert not multiprocessing.active_children()


def test_the_bar_moves_within_a_window(tmp_path: Path, tiny_bert: Path, monkeypatch):
    done = []
    real = local.LocalEncoder.encode

    def encode(self, prepared, on_progress):
        return real(self, prepared, lambda texts: done.append(texts) or on_progress(texts))

    monkeypatch.setattr(local.LocalEncoder, "encode", encode)
    catalogue(tmp_path, [f"{i}\x01{'shop ' * (i % 9)}{i}\x01x" for i in range(60)])
    knobs = {"model_name": str(tiny_bert), "precision": "float32", "device": "cpu"}
    small = run(tmp_path, **knobs, batch_tokens=64)
    assert len(done) > 3
    assert done == sorted(done)
    assert done[-1] == 60
    whole = run(tmp_path, **knobs, output_path=str(tmp_path / "whole.txt"))
    assert np.allclose(read_embeddings(small.output).vectors, read_embeddings(whole.output).vectors, atol=1e-6)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"delimiter": "ab"}, "delimiter: 'ab' is not one ASCII character"),
        ({"delimiter": "\n"}, "a newline ends rows"),
        ({"delimiter": "|", "encoding": "gbk"}, "second byte of a GBK character"),
        ({"columns": ["id", "text"]}, "do not contain description_column 'description'"),
        ({"columns": ["description", "description"]}, "twice"),
        ({"output_columns": ["vector"]}, "`vector` is the name"),
        ({"output_columns": ["id", "id"]}, "output_columns: a name occurs twice"),
        ({"output_path": "a.txt.gz"}, "compressed output is not supported"),
        ({"append": True, "restart": True}, "choose one"),
        ({"engine": "ray", "append": True}, "one part per input file"),
        ({"engine": "ray", "num_processes": 2}, "num_actors"),
        ({"num_actors": 2}, "only for engine: ray"),
    ],
)
def test_conflicting_knobs_are_refused(knobs: dict, words: str):
    with pytest.raises(ConfigError, match=words.replace("|", r"\|")):
        InferenceConfig.resolve(knobs)


def test_wrong_input_is_a_clear_error_and_loses_nothing(tmp_path: Path, encoder: FakeEncoder):
    with pytest.raises(MissingError, match="no such file or folder"):
        run(tmp_path)
    catalogue(tmp_path, ["1\x01a\x01x"])
    before = run(tmp_path).output.read_bytes()
    catalogue(tmp_path, ["1\x01a\x01x"], "b.csv", header="id\x01text\x01label")
    with pytest.raises(DataError, match=r"b\.csv: no column description; found id, text, label"):
        run(tmp_path)
    catalogue(tmp_path, ["1\x01a"], "b.csv", header="id\x01description")
    with pytest.raises(DataError, match=r"same columns \(label is in one of them only\)"):
        run(tmp_path)
    catalogue(tmp_path, ["1\x01a\x01x"], "b.csv", header="id\x01description\x01vector")
    (tmp_path / "in" / "a.csv").unlink()
    with pytest.raises(DataError, match="has a column `vector` already"):
        run(tmp_path)
    assert (tmp_path / "out.txt").read_bytes() == before


def test_after_a_full_disk_the_same_call_continues(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    catalogue(tmp_path, [f"{i}\x01text {i}\x01x" for i in range(50)])
    wanted = run(tmp_path, window_rows=5).output.read_bytes()
    real, calls = os.fsync, iter(range(1000))

    def full(file: int) -> None:
        if next(calls) > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"the disk is full .* rows written so far are whole"):
            run(tmp_path, window_rows=5)
    assert (tmp_path / "out.txt").read_bytes() == wanted  # the earlier output
    encoder.asked.clear()
    assert run(tmp_path, window_rows=5).output.read_bytes() == wanted
    assert 0 < len(encoder.asked) < 50


@pytest.mark.parametrize(("place", "name"), [(encode, "Store"), (inference, "write_json"), (encode, "finish_sink")])
def test_a_full_disk_before_or_after_the_rows_is_reported(tmp_path: Path, encoder, monkeypatch, place, name: str):
    catalogue(tmp_path, ["1\x01a\x01x"])

    def full(*ignored: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(DataError, match=r"the disk is full .* run the same call again"):
            run(tmp_path)
    assert run(tmp_path).counts["written"] == 1


def test_a_file_that_changes_or_vanishes_during_a_run_is_an_error(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    catalogue(tmp_path, [f"{i}\x01text {i}\x01x" for i in range(20)])
    path = catalogue(tmp_path, ["a\x01b\x01c"], "b.csv")
    wanted = run(tmp_path).output.read_bytes()
    whole, real = path.read_bytes(), encoder.encode

    def while_encoding(change):
        def encode(prepared, on_progress):
            change()
            return real(prepared, on_progress)

        return encode

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", while_encoding(lambda: path.unlink(missing_ok=True)))
        with pytest.raises(MissingError, match=r"b\.csv: the file is no longer there"):
            run(tmp_path, window_rows=4)
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", while_encoding(lambda: path.write_bytes(whole * 2)))
        with pytest.raises(DataError, match=r"b\.csv changed while it was read"):
            run(tmp_path, window_rows=4, restart=True)
    path.write_bytes(whole)
    assert run(tmp_path, window_rows=4).output.read_bytes() == wanted


@pytest.mark.parametrize("step", ["open_source", "sha256_of"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, encoder: FakeEncoder, monkeypatch, step: str):
    path = catalogue(tmp_path, ["1\x01a\x01x"])
    real = getattr(inputs, step)

    def vanishing(*arguments):
        path.unlink(missing_ok=True)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(MissingError, match=r"a\.csv: the file is no longer there"):
        patch.setattr(inputs, step, vanishing)
        run(tmp_path)

    def forbidden(*ignored):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    catalogue(tmp_path, ["1\x01a\x01x"])
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"a\.csv cannot be read \(Permission denied\)"):
        patch.setattr(inputs if step == "sha256_of" else hive, step if step == "sha256_of" else "kind_of", forbidden)
        run(tmp_path)


def test_rows_of_a_file_rewritten_during_a_run_are_never_written(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    path = catalogue(
        tmp_path, [f"{i}\x01good {i} {'x' * 9000}\x01x" for i in range(30)]
    )  # wider than what is read ahead
    wanted = run(tmp_path, output_path=str(tmp_path / "whole.txt"), window_rows=3).output.read_bytes()
    good, real = path.read_bytes(), encoder.encode

    def encode(prepared, on_progress):
        path.write_bytes(good.replace(b"good", b"evil"))
        os.utime(path, ns=(1, 1))
        return real(prepared, on_progress)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="changed while it was read"):
        patch.setattr(encoder, "encode", encode)
        run(tmp_path, window_rows=3)
    path.write_bytes(good)
    assert run(tmp_path, window_rows=3).output.read_bytes() == wanted


def test_two_runs_on_one_output_are_refused(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    catalogue(tmp_path, ["1\x01a\x01x"])
    real = encoder.encode

    def encode(prepared, on_progress):
        for knobs in ({}, {"restart": True}):
            with pytest.raises(DataError, match="another run is writing this output"):
                run(tmp_path, **knobs)
        return real(prepared, on_progress)

    monkeypatch.setattr(encoder, "encode", encode)
    assert run(tmp_path).counts["written"] == 1


def test_windows_are_limited_in_bytes(tmp_path: Path, encoder: FakeEncoder, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1000)
    sizes = []
    real = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda texts, on_progress: sizes.append(len(texts)) or real(texts, on_progress)
    )
    catalogue(tmp_path, [f"{i}\x01{i}{'long' * 100}\x01x" for i in range(10)])
    run(tmp_path)
    assert sizes == [3, 3, 3, 1]


# --- a run that loses rows ----------------------------------------------------------------------------------------


def lose(folder: Path, lost: int, empty: int = 0, name: str = "a.csv", raw: str = "1 field") -> None:
    """A file of 100 rows of which some do not fit and some have no text."""
    good = [f"{i}\x01text {i}\x01x" for i in range(100 - lost - empty)]
    catalogue(folder, [*good, *[raw] * lost, *["9\x01\x01x"] * empty, ""], name)


def test_a_run_that_loses_more_than_allowed_fails_and_leaves_the_output(tmp_path: Path, encoder: FakeEncoder):
    lose(tmp_path, 5, empty=60)  # rows without a text are not losses, nor is an empty line
    knobs = {"max_rejected_share": 0.05}
    before = run(tmp_path, **knobs).output.read_bytes()
    files = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    lose(tmp_path, 6)
    with pytest.raises(DataError) as failed:
        run(tmp_path, **knobs)
    words = [
        "6 of 100 rows",
        "6 × 1 fields, wanted 3",
        "max_rejected_share 0.05",
        "--max_rejected_share 0.06",
        "rejects",
    ]
    assert all(word in str(failed.value) for word in words)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*") if path.is_file()} == files
    asked = len(encoder.asked)
    result = run(tmp_path, max_rejected_share=0.06)  # the rows are there: nothing is encoded again
    assert (result.counts["written"], len(encoder.asked)) == (94, asked)
    assert result.output.read_bytes() != before


def test_after_a_run_that_failed_another_one_takes_its_place(tmp_path: Path, encoder: FakeEncoder):
    lose(tmp_path, 50)
    with pytest.raises(DataError):
        run(tmp_path, max_rejected_share=0.05)
    with pytest.raises(DataError):
        run(tmp_path, max_rejected_share=0.05, output_columns=["id"])
    lose(tmp_path, 0)
    assert run(tmp_path, max_rejected_share=0.05).counts["written"] == 100
    assert not (tmp_path / "out.txt.work").exists()


@pytest.mark.parametrize("rows", [[], ["1\x01\x01x"] * 3, ["lost"] * 3])
def test_nothing_written_is_an_error(tmp_path: Path, encoder: FakeEncoder, rows: list[str]):
    catalogue(tmp_path, ["1\x01a\x01x"])
    before = run(tmp_path).output.read_bytes()
    catalogue(tmp_path, rows)
    with pytest.raises(DataError, match=f"none of {len(rows)} rows was written"):
        run(tmp_path)
    assert (tmp_path / "out.txt").read_bytes() == before


def test_appending_counts_the_losses_of_the_new_files_alone(tmp_path: Path, encoder: FakeEncoder):
    lose(tmp_path, 0)
    before = run(tmp_path).output.read_bytes()
    lose(tmp_path, 10, name="b.csv")
    with pytest.raises(DataError, match="10 of 100 rows"):
        run(tmp_path, append=True, max_rejected_share=0.06)
    assert (tmp_path / "out.txt").read_bytes() == before
    assert run(tmp_path, append=True, max_rejected_share=0.1).counts["written"] == 190
    catalogue(tmp_path, [], "c.csv")
    assert run(tmp_path, append=True).counts["written"] == 190  # a file without rows


@pytest.mark.parametrize(
    ("content", "knobs", "words"),
    [
        (b'id,description\n1,"a, b"\n2,"c"\n', {"delimiter": ",", "quoting": "none"}, "--quoting csv"),
        (b'id,description\n1,"a" b\n2,"c" d\n', {"delimiter": ","}, "--quoting none"),
        (b'id,description\n1,"a \\" b"\n2,"\\" d"\n', {"delimiter": ","}, r"--escaped_by '\\\\'"),
        (b"id\x01description\n1\x01a\\\x01b\n2\x01c\\\nd\n", {}, r"--escaped_by '\\\\'"),
        (b"1,a\n2,b\n", {"columns": ["id", "description"]}, "--delimiter ','"),
        (b"1\ta\n2\tb\n", {"columns": ["id", "description"]}, r"--delimiter '\\t'"),
        (b"1\x01a\n2\x01b\n", {"columns": ["id", "description"], "delimiter": "|"}, r"--delimiter '\\001'"),
        (b"id\x01description\x01x\n1\x01a\nb\x01y\n", {}, "--heal_rows true"),
        (
            b"1\x01a\x01new\n2\x01b\x01new\n",
            {"columns": ["id", "description"]},
            "3 fields, more than the 2 .*--columns",
        ),
        (
            b"id,description\n1,a\n2,b, c\n3,d\n4,e, f\n",
            {"delimiter": ","},
            "(?s)a.csv, line 3, 5\n.*put such fields in quotes",
        ),
        ("id\x01description\n1\x01手机\n".encode() * 2 + "2\x01手机\n".encode("gbk"), {}, "--encoding gb18030"),
    ],
)
def test_the_error_over_lost_rows_names_the_likely_knob(
    tmp_path: Path, encoder, content: bytes, knobs: dict, words: str
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        run(tmp_path, max_rejected_share=0.0, **knobs)


def test_a_column_that_the_folders_give_is_not_one_of_the_files(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["2\x01b"], "dt=1/a.csv", header="1\x01a")
    with pytest.raises(DataError, match=r"the folders give dt, .* leave it out of columns"):
        run(tmp_path, columns=["id", "description", "dt"])


# --- partition folders, other readers -----------------------------------------------------------------------------


def test_partition_columns_are_kept_where_they_are_named(tmp_path: Path, encoder: FakeEncoder, caplog):
    caplog.set_level("INFO")
    catalogue(tmp_path, ["1\x01a\x01x"], "dt=2026-11-01/hour=03/a.csv")
    catalogue(tmp_path, ["2\x01b\x01x"], "dt=2026%3A02/hour=__HIVE_DEFAULT_PARTITION__/a.csv")
    assert list(read_embeddings(run(tmp_path).output).columns) == ["id", "description", "label"]
    assert "partition columns: dt, hour" in caplog.text
    for ending in (".txt", ".parquet", ".npy"):
        out = tmp_path / f"o{ending}"
        knobs = {"output_columns": ["dt", "id", "hour"], "output_path": str(out)}
        wanted = {"dt": ["2026:02", "2026-11-01"], "id": ["2", "1"], "hour": [None, "03"]}
        assert read_embeddings(run(tmp_path, **knobs).output).columns == wanted
        catalogue(tmp_path, ["3\x01c\x01x"], "dt=2026-11-02/hour=04/a.csv")
        appended = read_embeddings(run(tmp_path, **knobs, append=True).output).columns
        assert (appended["dt"][-1], appended["hour"][-1]) == ("2026-11-02", "04")
        (tmp_path / "in" / "dt=2026-11-02" / "hour=04" / "a.csv").unlink()
    catalogue(tmp_path, ["3\x01c\x01x"], "b.csv")
    with pytest.raises(DataError, match=r"b\.csv: no column dt"):
        run(tmp_path, output_columns=["dt"])
    (tmp_path / "in" / "b.csv").unlink()
    catalogue(tmp_path, ["file\x01d\x01x"], "dt=folder/b.csv", header="dt\x01description\x01label")
    (tmp_path / "in" / "dt=2026%3A02").rename(tmp_path / "gone")
    run(tmp_path, output_columns=["dt"])
    assert "column dt is in the file and in its folder's name: the file's is read" in caplog.text


BREAKS = ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def test_kept_values_that_other_readers_split_are_counted(tmp_path: Path, encoder: FakeEncoder, caplog):
    plain = ["1\x01a\x01苹果 \u2027 \xa0 \x1f\t"]
    catalogue(tmp_path, [*plain, *(f"{i}\x01text {i}\x01a{sign}b" for i, sign in enumerate(BREAKS))])
    assert not any(sign in plain[0] for sign in BREAKS)
    result = run(tmp_path, window_rows=3)
    assert result.counts["line_breaks"] == len(BREAKS)
    assert f"label {len(BREAKS)}; Spark and pandas may split such rows: write Parquet" in caplog.text
    assert json.loads(result.manifest.read_text())["line_breaks"] == {"label": len(BREAKS)}
    caplog.clear()
    assert run(tmp_path, output_columns=["id"]).counts["line_breaks"] == 0
    assert run(tmp_path, output_path=str(tmp_path / "o.parquet")).counts["line_breaks"] == 0
    assert "line break" not in caplog.text


def test_text_without_a_header_is_read_by_its_manifest(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01\\N", "2\x01b\x01x"])
    whole = run(tmp_path, output_columns=["id", "label"])
    bare = run(tmp_path, output_columns=["id", "label"], output_path=str(tmp_path / "bare.txt"), output_header=False)
    assert bare.output.read_bytes() == whole.output.read_bytes().split(b"\n", 1)[1]
    assert read_embeddings(bare.output).columns == read_embeddings(whole.output).columns
    catalogue(tmp_path, ["3\x01c\x01x"], "b.csv")
    run(
        tmp_path,
        output_columns=["id", "label"],
        output_path=str(tmp_path / "bare.txt"),
        output_header=False,
        append=True,
    )
    assert read_embeddings(bare.output).columns["id"] == ["1", "2", "3"]
    with pytest.raises(ConfigError, match="output_header"):
        InferenceConfig.resolve({"output_header": False, "output_path": "a.parquet"})


def test_the_manifest_names_files_that_were_not_read(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01x"])
    catalogue(tmp_path, ["2\x01b\x01x"], "b.txt")
    assert json.loads(run(tmp_path).manifest.read_text())["not_read"] == {"b.txt": "no pattern matches the name"}


# --- vectors in fewer bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_int8_is_written_appended_and_read_back_exactly(tmp_path: Path, encoder: FakeEncoder, ending: str):
    rows = [f"{i}\x01text {i}\x01x" for i in range(20)] + ["20\x01\x01blank"]
    catalogue(tmp_path, rows[:9])
    knobs = {"vector_type": "int8", "on_empty_text": "empty", "output_path": str(tmp_path / f"o{ending}")}
    result = run(tmp_path, window_rows=4, **knobs)
    assert json.loads(result.manifest.read_text())["settings"]["vector_type"] == "int8"
    catalogue(tmp_path, rows[9:], "b.csv")
    back = read_embeddings(run(tmp_path, append=True, **knobs).output)
    vectors = np.stack([fake_vector(f"text {i}") for i in range(20)])
    scales = vectors.max(axis=1, keepdims=True) / np.float32(127)  # none of them is below 0
    assert (back.vectors == np.round(vectors / scales) * scales).all()
    assert back.columns["id"] == [str(i) for i in range(20)]
    assert back.total == 21
    with pytest.raises(DataError, match="vector_type: 'int8' then, None now"):
        run(tmp_path, append=True, **knobs | {"vector_type": "float32"})


def test_vectors_in_fewer_bytes_have_their_limits(tmp_path: Path, encoder: FakeEncoder):
    catalogue(tmp_path, ["1\x01a\x01x"], header="id\x01description\x01vector_scale")
    out = str(tmp_path / "o.parquet")
    with pytest.raises(ConfigError, match=r"int8 is written to \.parquet and \.npy; './faiss/embeds_2\.txt' is text"):
        InferenceConfig.resolve({"vector_type": "int8"})
    with pytest.raises(ConfigError, match="`vector_scale` is the name of the output's own column"):
        InferenceConfig.resolve({"vector_type": "int8", "output_path": out, "output_columns": ["vector_scale"]})
    with pytest.raises(DataError, match="has a column `vector_scale` already"):
        run(tmp_path, vector_type="int8", output_path=out)
    with pytest.raises(ConfigError, match="binary needs a multiple of 8 dimensions, not 12"):
        InferenceConfig.resolve({"vector_type": "binary", "output_path": out, "truncate_dim": 12})
    with pytest.raises(ConfigError, match="binary needs a multiple of 8 dimensions, not 6"):
        run(tmp_path, vector_type="binary", output_path=out, output_columns=["id"])
    assert read_embeddings(run(tmp_path, output_path=out).output).columns["vector_scale"] == ["x"]
