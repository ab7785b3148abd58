"""Knobs of inference."""

from __future__ import annotations

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
    HUB,
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
    delimiter_byte,
)
from ebr_lib.names import Asked, Backend, Choice, Hub, OnChangedVectors, VectorType

NOT_WHOLE_BYTES = "binary needs a multiple of 8 dimensions, not {}; set truncate_dim to one"


@dataclass(frozen=True)
class InferenceConfig(Config):
    """Stage 2, `run_batch_inference`: encode a catalogue of Hive text."""

    model_name: Place = knob(
        "all-MiniLM-L6-v2",
        "Model: a fine-tuned folder (`./saved_model/…-peft-lora`), the packaged model, a local folder or a hub name.",
        "模型：微调后的目录（`./saved_model/…-peft-lora`）、内置模型、本地目录或 Hub 名称。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    # input
    data_path: Place = knob(
        "./infer_data", "File of delimited text, or a folder of such files.", "分隔文本文件，或装有它们的目录。"
    )
    file_patterns: tuple[Name, ...] = knob(
        ["*.csv", "*.csv.gz", "*.csv.bz2", "*.csv.zst", "*.tsv", "*.parquet", "*.orc", "part-[0-9]*", "0*_[0-9]*"],
        "Files to read in a folder; `0*_[0-9]*` are Hive's parts (`000000_0_copy_1`, `000002_1000`). The log lists "
        "files that are not read.",
        "读取目录中的哪些文件；`0*_[0-9]*` 是 Hive 的分片文件（`000000_0_copy_1`、`000002_1000`）。未读取的文件会在日志中列出。",
    )
    description_column: Name = knob("description", "Column with the text to encode.", "要编码的文本列。")
    columns: tuple[Name, ...] = knob(
        [],
        "Column names for files without a header row; empty uses the first row of each file.",
        "无表头文件的列名；留空表示每个文件的首行为表头。",
    )
    delimiter: Name = knob(
        "\\001",
        "Field separator, one character; may be written `\\001` or `\\t`.",
        "字段分隔符（单字符），可写作 `\\001`、`\\t`。",
    )
    encoding: Literal["auto", "utf-8", "gbk", "gb18030"] = knob(
        "auto",
        "Encoding of the input; auto detects UTF-8 or GB18030.",
        "输入文件的编码；auto 自动区分 UTF-8 与 GB18030。",
    )
    quoting: Literal["auto", "none", "csv"] = knob(
        "auto",
        "Whether fields may be quoted as in CSV (RFC 4180). auto: yes with commas, and with other delimiters in `.csv` "
        "or `.tsv` files whose first rows use quotes only around fields; with \\001 or `heal_rows`, a quote is an ordinary "
        "character.",
        "字段是否可带引号（CSV，RFC 4180）。auto：逗号分隔时按引号解析；其他分隔符的 `.csv`、`.tsv` 文件，若前若干行的引号都只用来包住字段，也按引号解析；"
        "用 \\001 分隔或开启 `heal_rows` 时，引号是普通字符。",
    )
    escaped_by: Name | None = knob(
        None,
        "Escape character, as in Hive's ESCAPED BY (`\\`); followed by `n` it is a newline. null: nothing is escaped.",
        "转义字符，同 Hive 的 ESCAPED BY（`\\`）；后接 `n` 表示换行。null 表示不转义。",
    )
    heal_rows: bool = knob(
        False,
        "Rejoin rows that a newline inside a field has split, with a space for the newline; otherwise they are rejected.",
        "把被字段内换行拆断的行重新接上（换行变为空格）；否则写入拒收文件。",
    )
    on_empty_text: Literal["skip", "empty", "error"] = knob(
        "skip",
        "For a null or blank text: skip the row (to the reject file), keep it with an empty vector, or stop with an error.",
        "文本为空或 \\N 时：跳过该行（写入拒收文件）、保留该行但向量留空，或报错停止。",
    )
    max_rejected_share: Share = knob(
        0.05,
        "If more than this share of rows cannot be read, stop with an error and leave the output unchanged; large input "
        "is sampled first. Rows skipped because their text is empty do not count.",
        "无法读取的行超过该比例时报错，原有输出保持不变；数据量大时先抽样检查。因文本为空而跳过的行不计。",
    )
    # output
    output_path: Place = knob(
        "./faiss/embeds_2.txt",
        "Embedding file to write; the ending .parquet or .npy sets the format, all others are text.",
        "输出的向量文件；后缀 .parquet 或 .npy 决定格式，其余为文本。",
    )
    output_columns: tuple[Name, ...] = knob(
        [], "Columns kept with the vector, in this order; empty keeps all.", "输出中保留的列及顺序；留空保留全部。"
    )
    vector_type: VectorType = knob(
        "float32",
        "Numbers of the output: float16, int8 or binary take 2, 4 or 32 times less room than float32, in Parquet and "
        "`.npy`. int8 and binary are multiplied by their column `vector_scale`.",
        "输出向量的数值类型：float16、int8、binary 的体积分别是 float32 的 1/2、1/4、1/32，仅限 Parquet 与 `.npy`；"
        "int8 与 binary 须乘以 `vector_scale` 列还原。",
    )
    output_header: bool = knob(
        True,
        "Write a header row with the column names (text only); use false for files that Hive loads as a table.",
        "文本输出是否带表头行；要加载为 Hive 表的文件设为 false。",
    )
    append: bool = knob(
        False,
        "Append input files that the finished output does not contain yet.",
        "把新增的输入文件追加到已完成的输出。",
    )
    restart: bool = knob(
        False, "Discard an unfinished run instead of resuming it.", "放弃未完成的运行，从头开始（默认断点续跑）。"
    )
    # encoding
    prompt: str | None = knob(
        None,
        "Prompt prepended to every text; null uses the model's own.",
        "加在每段文本前的提示词；null 使用模型训练时的提示词。",
    )
    max_seq_length: Length | None = knob(None, *OWN_LENGTH)
    normalize: bool = knob(True, "Scale every vector to length 1.", "把向量归一化为单位长度。")
    truncate_dim: Positive | None = knob(
        None,
        "Keep only the first dimensions (Matryoshka models), then normalise again.",
        "只保留前若干维（Matryoshka 模型），截断后再归一化。",
    )
    precision: Asked = knob("auto", *PRECISION)
    backend: Backend = knob("auto", *BACKEND)
    batch_tokens: Annotated[int, Field(ge=16)] | None = knob(
        None,
        "Tokens per batch, padding included; null uses the fastest measured value. Lower it if memory runs out.",
        "每批 token 数（含填充）；null 使用实测最快的值。显存不足时调小。",
    )
    device: str | None = knob(None, *DEVICE)
    num_processes: Count = knob(
        0,
        "Encoding processes; 0 means one per GPU, or one on a CPU.",
        "编码进程数；0 表示每块 GPU 一个，仅有 CPU 时一个。",
    )
    engine: Literal["local", "ray"] = knob(
        "local",
        "This machine, or a Ray cluster, where every input file is a shard and the output is a folder of part files.",
        "本机运行，或在 Ray 集群上运行（每个输入文件为一个分片，输出为分片文件目录）。",
    )
    num_actors: Count = knob(
        0,
        "Ray workers; 0 means one per GPU, or one without GPUs.",
        "Ray 工作进程数；0 表示每块 GPU 一个，无 GPU 时一个。",
    )
    ray_address: str | None = knob(
        None,
        "Address of an existing cluster (`auto`, `ray://…`); null starts one on this machine.",
        "已有集群的地址（`auto`、`ray://…`）；null 在本机启动。",
    )
    window_rows: Positive = knob(
        16384,
        "Rows per window: read into memory, sorted by length, encoded and saved together; a run resumes after the last saved window.",
        "每个窗口的行数：一起读入内存、按长度排序、编码并落盘；断点续跑以窗口为单位。",
    )

    def conflicts(self) -> Iterator[str]:
        yield from self._format_conflicts()
        yield from self._output_conflicts()
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
            yield f"columns: {', '.join(self.columns)} do not contain description_column {self.description_column!r}"
        if len(set(self.columns)) != len(self.columns):
            yield "columns: a name occurs twice"

    def _output_conflicts(self) -> Iterator[str]:
        if len(set(self.output_columns)) != len(self.output_columns):
            yield "output_columns: a name occurs twice"
        if self.output_path.endswith((".gz", ".bz2", ".xz", ".zst", ".zip")):
            yield f"output_path: {self.output_path!r} compressed output is not supported; use .txt or .parquet"
        if not self.output_header and self.output_path.lower().endswith((".parquet", ".npy")):
            yield f"output_header: only text output has a header row, and {self.output_path!r} is not text; leave output_header out"
        for name in ("vector", *(["vector_scale"] if self.vector_type in ("int8", "binary") else [])):
            if name in self.output_columns:
                yield f"output_columns: `{name}` is the name of the output's own column; rename that column of the input"
        if self.vector_type != "float32" and not self.output_path.lower().endswith((".parquet", ".npy")):
            yield (
                f"vector_type: {self.vector_type} is written to .parquet and .npy; {self.output_path!r} is text, whose "
                "vectors Hive loads as ARRAY<FLOAT>"
            )
        if self.vector_type == "binary" and (self.truncate_dim or 0) % 8:
            yield f"vector_type: {NOT_WHOLE_BYTES.format(self.truncate_dim)}"

    def _quoting_conflicts(self) -> Iterator[str]:
        sign = escape_byte(self.escaped_by)
        if sign is not None and (
            len(sign) != 1 or sign.isspace() or sign == b'"' or sign == delimiter_byte(self.delimiter)
        ):
            yield f"escaped_by: {self.escaped_by!r} is not one ASCII character other than the delimiter, a quote or a space"
        if self.quoting == "csv" and self.delimiter == '"':
            yield "quoting: the delimiter cannot be the quote character"
        if self.heal_rows and (self.quoting == "csv" or self.escaped_by):
            yield "heal_rows: only for text without quotes and escapes; quoting: csv and escaped_by already read newlines in fields"

    def _engine_conflicts(self) -> Iterator[str]:
        if self.append and self.restart:
            yield "append and restart: choose one"
        if self.engine == "ray" and self.append:
            yield "append: engine ray writes one part per input file; write the new files to another output_path"
        if self.engine == "ray" and self.num_processes:
            yield "num_processes: with engine: ray, use num_actors"
        if self.engine == "local" and (self.num_actors or self.ray_address):
            yield "num_actors, ray_address: only for engine: ray"


def escape_byte(text: str | None) -> bytes | None:
    """Byte of `escaped_by`; a backslash may also be written `\\\\`, as in CREATE TABLE."""
    return None if text is None else b"\\" if text == "\\\\" else delimiter_byte(text)
