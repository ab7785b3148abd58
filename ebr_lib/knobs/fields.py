"""Types of knobs, and the help of those that several stages have."""

from __future__ import annotations

import os
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
"""A file, a folder or a model; `~` is the home folder, which a shell puts in only for some ways to write a flag."""
Places = Place | tuple[Place, ...]
Length = Annotated[int, Field(ge=8, le=32768)]

# what the knobs do that several stages have
REMOTE_CODE = (
    "Of a model that brings its own code: true runs it (read it first), ignore loads the library's class instead, where "
    "the model's card says so; false refuses such a model.",
    "模型自带代码时：true 执行该代码（请先阅读）；ignore 改用库自带的类（仅当模型说明如此要求）；false 拒绝加载这样的模型。",
)
LABEL_COLUMN = (
    "Column of pairs that says whether a row is a positive pair: 1 is one, 0 is not. null takes columns named "
    "so (`label`, `score`, `is_duplicate` …); none: no column says it.",
    "成对数据中标明该行是否为正例的列：1 为正例，0 不是。null 按列名识别（`label`、`score`、`is_duplicate` 等）；none 表示没有这样的列。",
)
BASE_PATH = (
    "Where the base of a fine-tuned folder is now, if it was moved: a folder or a list of them. The base is known by the "
    "sha256 of its weights.",
    "微调模型的基座被移动后的位置：一个目录或目录列表；按权重的 sha256 识别。",
)
CHANGED_VECTORS = (
    "error stops when a fine-tuned model's probe vectors are not those saved with it, or a model's files have changed "
    "since it made an index's vectors; warn logs it and goes on.",
    "微调模型的探针向量与保存时不一致，或生成索引向量的模型文件已改变时：error 报错停止，warn 仅记入日志并继续。",
)
OWN_LENGTH = "Tokens a text is cut to; null keeps the model's own.", "文本截断长度（token 数）；null 使用模型自带设置。"
PRECISION = (
    "Arithmetic of the model; auto takes bfloat16 where the hardware has it.",
    "计算精度；auto 在硬件支持时使用 bfloat16。",
)
BACKEND = (
    "What runs the transformer when texts are encoded; auto takes OpenVINO on a CPU, where it gives the model's vectors, "
    "and torch on a GPU.",
    "编码时由谁运行模型；auto 在 CPU 上使用 OpenVINO（向量与模型一致时），在 GPU 上使用 torch。",
)
DEVICE = "Torch device (cpu, cuda, cuda:1, mps); null takes the best there is.", "运行设备；null 自动选择。"
QUERY_COLUMN = "Column of the query's text; null takes text, query, question or anchor.", "查询文本列；null 自动识别。"
QUERY_PROMPT = (
    "Put before every query; null takes what the model was trained with.",
    "加在查询前的提示词；null 使用模型训练时的提示词。",
)
