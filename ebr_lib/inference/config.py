"""The knobs of inference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BACKEND,
    BASE_PATH,
    CHANGED_VECTORS,
    DEVICE,
    OWN_LENGTH,
    PRECISION,
    REMOTE_CODE,
    Count,
    Length,
    Name,
    Place,
    Places,
    Positive,
    Share,
)
from ebr_lib.names import Asked, Backend, Choice, OnChangedVectors


@dataclass(frozen=True)
class InferenceConfig(Config):
    """Stage 2, `run_batch_inference`: encode a catalogue of Hive text."""

    model_name: Place = knob(
        "all-MiniLM-L6-v2",
        "Model: a fine-tuned folder (`./saved_model/…-peft-lora`), the packaged name, a local folder or a hub name.",
        "模型：微调后的目录（`./saved_model/…-peft-lora`）、内置名称、本地目录或 Hub 名称。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    # input
    data_path: Place = knob("./infer_data", "A file or a folder of delimited text.", "分隔文本文件，或装有它们的目录。")
    file_patterns: tuple[Name, ...] = knob(
        ["*.csv", "*.csv.gz", "*.csv.bz2", "*.csv.zst", "*.tsv", "*.parquet", "*.orc", "part-[0-9]*", "0*_[0-9]*"],
        "Which files of a folder are read; `0*_[0-9]*` are Hive's own parts (`000000_0_copy_1`, `000002_1000`). "
        "The log names what is left out.",
        "读取目录中的哪些文件；`0*_[0-9]*` 即 Hive 原始分片（`000000_0_copy_1`、`000002_1000`）。未读取的文件会写入日志。",
    )
    description_column: Name = knob("description", "Column whose text is encoded.", "要编码的文本列。")
    columns: tuple[Name, ...] = knob(
        [],
        "Column names of files without a header row; empty takes each file's first row.",
        "无表头文件的列名；留空表示每个文件首行为表头。",
    )
    delimiter: Name = knob(
        "\\001",
        "One character between fields; `\\001` and `\\t` may be spelled so.",
        "字段分隔符（单字符），可写作 `\\001`、`\\t`。",
    )
    encoding: Literal["auto", "utf-8", "gbk", "gb18030"] = knob(
        "auto", "Encoding of the input; auto tells UTF-8 from GB18030.", "输入编码；auto 自动区分 UTF-8 与 GB18030。"
    )
    quoting: Literal["auto", "none", "csv"] = knob(
        "auto",
        "Fields in quotes as in CSV (RFC 4180); auto reads them with commas, and with tabs and other signs in files named "
        "`.csv` or `.tsv` where all quotes of the first rows enclose fields; with \\001, and with `heal_rows`, a quote is "
        "a letter.",
        "字段是否可带引号（CSV，RFC 4180）；auto：逗号分隔，以及名为 `.csv`、`.tsv`、且前若干行引号均成对包住字段的制表符等分隔文件按引号解析；"
        "\\001 分隔或 `heal_rows` 时引号为普通字符。",
    )
    escaped_by: Name | None = knob(
        None,
        "Character that takes the next one as it is, as in Hive's ESCAPED BY (`\\`); `n` after it is a newline.",
        "转义字符，同 Hive 的 ESCAPED BY（`\\`），其后的 `n` 表示换行；null 表示不转义。",
    )
    heal_rows: bool = knob(
        False,
        "Join lines that a newline inside a field has broken, a space in its place; otherwise they are rejected.",
        "把被字段内换行拆断的行接回（换行变为空格）；否则进入拒绝文件。",
    )
    on_empty_text: Literal["skip", "empty", "error"] = knob(
        "skip",
        "A null or blank text: skip it (to the rejects), keep the row with an empty vector, or stop.",
        "文本为空或 \\N 时：跳过（进入拒绝文件）、保留该行但向量留空、或报错停止。",
    )
    max_rejected_share: Share = knob(
        0.05,
        "More rows than this share that cannot be read are an error, and the output stays as it was; large input is "
        "sampled first. Rows skipped for an empty text do not count.",
        "无法读取的行超过该比例时报错，原有输出保持不变；数据量大时先抽样检查。因文本为空而跳过的行不计。",
    )
    # output
    output_path: Place = knob(
        "./faiss/embeds_2.txt",
        "The embedding file to write; .parquet and .npy by their ending, text otherwise.",
        "输出的向量文件；按后缀写 .parquet、.npy，其余为文本。",
    )
    output_columns: tuple[Name, ...] = knob(
        [], "Columns kept beside the vector, in this order; empty keeps all.", "输出中保留的列及顺序；留空保留全部。"
    )
    output_header: bool = knob(
        True,
        "Begin text with a row of the column names; false for files that a Hive table loads.",
        "文本输出是否带表头行；供 Hive 表加载的文件设为 false。",
    )
    append: bool = knob(
        False,
        "Add the files that the finished output does not hold yet.",
        "在已完成的输出后追加新增文件。",
    )
    restart: bool = knob(
        False, "Drop an unfinished run instead of continuing it.", "放弃未完成的运行，从头开始（默认断点续跑）。"
    )
    # encoding
    prompt: str | None = knob(
        None,
        "Put before every text; null takes what the model was trained with.",
        "加在每段文本前的提示词；null 使用模型训练时的提示词。",
    )
    max_seq_length: Length | None = knob(None, *OWN_LENGTH)
    normalize: bool = knob(True, "Scale every vector to length 1.", "把向量归一化为单位长度。")
    truncate_dim: Positive | None = knob(
        None,
        "Keep the first dimensions of a Matryoshka model, normalised after the cut.",
        "只保留前若干维（Matryoshka 模型），截断后再归一化。",
    )
    precision: Asked = knob("auto", *PRECISION)
    backend: Backend = knob("auto", *BACKEND)
    batch_tokens: Annotated[int, Field(ge=16)] | None = knob(
        None,
        "Tokens a batch, padding included; null takes what measured fastest. Lower it when memory runs out.",
        "每批 token 数（含填充）；null 使用实测最快的值。显存不足时调小。",
    )
    device: str | None = knob(None, *DEVICE)
    num_processes: Count = knob(
        0, "Processes that encode; 0 takes one a GPU, one on a CPU.", "编码进程数；0 表示每块 GPU 一个，CPU 一个。"
    )
    engine: Literal["local", "ray"] = knob(
        "local",
        "This machine, or a Ray cluster: input files are shards, the output is a folder of part files.",
        "本机运行，或在 Ray 集群上运行（每个输入文件为一个分片，输出为分片文件目录）。",
    )
    num_actors: Count = knob(
        0,
        "Workers of the Ray cluster; 0 takes one a GPU, or one on CPUs.",
        "Ray 工作进程数；0 表示每块 GPU 一个，无 GPU 时一个。",
    )
    ray_address: str | None = knob(
        None, "An existing cluster (`auto`, `ray://…`); null starts one here.", "已有集群的地址；null 在本机启动。"
    )
    window_rows: Positive = knob(
        16384,
        "Rows held in memory at once, sorted by length, encoded and brought to the disk together.",
        "一次载入内存的行数；按长度排序、编码后一起落盘，也是断点续跑的单位。",
    )

    def conflicts(self) -> Iterator[str]:
        yield from self._format_conflicts()
        yield from self._engine_conflicts()

    def _format_conflicts(self) -> Iterator[str]:
        if len(delimiter_byte(self.delimiter)) != 1:
            yield f"delimiter: {self.delimiter!r} is not one ASCII character"
        elif delimiter_byte(self.delimiter) in (b"\n", b"\r"):
            yield "delimiter: a newline ends rows"
        elif self.encoding.startswith("gb") and delimiter_byte(self.delimiter) >= b"0":
            yield f"delimiter: {self.delimiter!r} can be the second byte of a GBK character; use one below '0', like \\001"
        yield from self._quoting_conflicts()
        if self.columns and self.description_column not in self.columns:
            yield f"columns: {', '.join(self.columns)} do not hold description_column {self.description_column!r}"
        if len(set(self.columns)) != len(self.columns):
            yield "columns: a name is there twice"
        if len(set(self.output_columns)) != len(self.output_columns):
            yield "output_columns: a name is there twice"
        if self.output_path.endswith((".gz", ".bz2", ".xz", ".zst", ".zip")):
            yield f"output_path: {self.output_path!r} is said to be compressed, and no format is; give .txt or .parquet"
        if not self.output_header and self.output_path.lower().endswith((".parquet", ".npy")):
            yield f"output_header: only text has a header row, and {self.output_path!r} is not text; leave it out"
        if "vector" in self.output_columns:
            yield "output_columns: `vector` is the name of the column that is written; rename the input's"

    def _quoting_conflicts(self) -> Iterator[str]:
        sign = escape_byte(self.escaped_by)
        if sign is not None and (
            len(sign) != 1 or sign.isspace() or sign == b'"' or sign == delimiter_byte(self.delimiter)
        ):
            yield f"escaped_by: {self.escaped_by!r} is not one ASCII character other than the delimiter, a quote or a space"
        if self.quoting == "csv" and self.delimiter == '"':
            yield "quoting: the delimiter is the quote itself"
        if self.heal_rows and (self.quoting == "csv" or self.escaped_by):
            yield "heal_rows: joins rows of plain text; with quoting: csv or escaped_by, newlines in fields are read as they are"

    def _engine_conflicts(self) -> Iterator[str]:
        if self.append and self.restart:
            yield "append and restart: choose one"
        if self.engine == "ray" and self.append:
            yield "append: engine ray writes a part a file; run the new files into another output_path"
        if self.engine == "ray" and self.num_processes:
            yield "num_processes: engine ray is told num_actors"
        if self.engine == "local" and (self.num_actors or self.ray_address):
            yield "num_actors, ray_address: only engine ray reads them"


def delimiter_byte(text: str) -> bytes:
    """The byte that a delimiter knob means: a character itself, or an escape like `\\001`, `\\x01`, `\\t`."""
    spelled = {"\\t": b"\t", "\\a": b"\a"}
    if octal := re.fullmatch(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{3}))", text):
        return bytes([int(octal[1], 16) if octal[1] else int(octal[2], 8) % 256])
    return spelled.get(text, text.encode() if text.isascii() else b"")


def escape_byte(text: str | None) -> bytes | None:
    """The byte that `escaped_by` means; a backslash may be spelled `\\\\`, as in a CREATE TABLE."""
    return None if text is None else b"\\" if text == "\\\\" else delimiter_byte(text)
