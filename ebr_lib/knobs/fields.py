"""Types of knobs, and the help of knobs that several stages share."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, Field

Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
MoreThanZero = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A file, a folder or a model. `~` is expanded here because shells do it only in some positions."""
Places = Place | tuple[Place, ...]
RerankDepth = Annotated[int, Field(ge=1, le=100)]
Length = Annotated[int, Field(ge=8, le=32768)]

# help of shared knobs: English, Chinese
REMOTE_CODE = (
    "For models that bring their own code: true runs it (read it first); ignore loads the library's class instead, if "
    "the model card says so; false refuses the model.",
    "模型自带代码时：true 执行该代码（请先阅读）；ignore 改用库自带的类（仅在模型说明允许时）；false 拒绝加载该模型。",
)
LABEL_COLUMN = (
    "Column that says whether a row is a positive pair: 1 yes, 0 no. null looks for usual names (`label`, `score`, "
    "`is_duplicate` …); none means there is no such column.",
    "标明该行是否为正例的列：1 是，0 不是。null 按常见列名识别（`label`、`score`、`is_duplicate` 等）；none 表示没有这样的列。",
)
BASE_PATH = (
    "Where the base model of a fine-tuned folder is now, if it was moved: a folder or a list of folders. The base is "
    "recognized by the sha256 of its weights.",
    "微调模型的基座模型被移动后的位置：目录或目录列表；按权重的 sha256 识别。",
)
HUB = (
    "Where a model that is not a folder here is downloaded from; auto asks ModelScope for names that begin with "
    "`modelscope:`, and for others if Hugging Face cannot be reached and the extra `modelscope` is installed.",
    "本机没有的模型从哪里下载；auto 时，以 `modelscope:` 开头的名称向 ModelScope 请求，其余向 Hugging Face 请求，连接不上且已装附加项 `modelscope` "
    "时改用 ModelScope。",
)
CHANGED_VECTORS = (
    "When a fine-tuned model's probe vectors differ from those saved with it, or a model's files have changed since it "
    "made an index's vectors: error stops; warn logs it and continues.",
    "微调模型的探针向量与保存时不一致，或生成索引向量的模型文件已改变时：error 报错停止，warn 仅记入日志并继续。",
)
OWN_LENGTH = (
    "Maximum tokens per text; null uses the model's own.",
    "每段文本的最大 token 数，超出部分截断；null 使用模型自带设置。",
)
PRECISION = (
    "Precision of the model; auto uses bfloat16 if the hardware has it.",
    "计算精度；auto 在硬件支持时使用 bfloat16。",
)
BACKEND = (
    "Library that runs the model for encoding; auto uses OpenVINO on a CPU if it gives the model's vectors, and torch on "
    "a GPU.",
    "编码时运行模型的库；auto 在 CPU 上使用 OpenVINO（仅当向量与模型一致），在 GPU 上使用 torch。",
)
DEVICE = "Torch device (cpu, cuda, cuda:1, mps); null picks the best available.", "运行设备；null 自动选择。"
RERANKER = (
    "Cross-encoder that reorders the best rows: a folder or a hub name. auto takes the one that evaluation found better, "
    "if it is on this machine; none uses none.",
    "重排模型（cross-encoder，目录或 Hub 名称）；auto 使用评估中更好的那个（须已在本机），none 不重排。",
)
RERANK_DEPTH = (
    "Rows that the reranker reads; null takes what evaluation measured, otherwise 50.",
    "交给重排模型的行数；null 与评估时相同，未评估则为 50。",
)
QUERY_COLUMN = (
    "Column with the query text; null looks for text, query, question or anchor.",
    "查询文本列；null 依次查找 text、query、question、anchor。",
)
QUERY_PROMPT = (
    "Prompt prepended to every query; null uses the model's own.",
    "加在每个查询前的提示词；null 使用模型训练时的提示词。",
)
TOKEN_FILE = (
    "File with the token that requests carry (`Authorization: Bearer …`), read when it starts; null means none.",
    "存放访问令牌的文件（请求头 `Authorization: Bearer …`），启动时读取；null 表示不用令牌。",
)


def delimiter_byte(text: str) -> bytes:
    """Byte of a delimiter knob: a character, or an escape such as `\\001`, `\\x01`, `\\t`."""
    spelled = {"\\t": b"\t", "\\a": b"\a"}
    if octal := re.fullmatch(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{3}))", text):
        return bytes([int(octal[1], 16) if octal[1] else int(octal[2], 8) % 256])
    return spelled.get(text, text.encode() if text.isascii() else b"")
