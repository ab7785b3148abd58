"""The knobs of `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ebr_lib.index.config import NO_RERANKER
from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BASE_PATH,
    CHANGED_VECTORS,
    HUB,
    QUERY_PROMPT,
    REMOTE_CODE,
    RERANK_DEPTH,
    RERANKER,
    TOKEN_FILE,
    Name,
    Place,
    Places,
    RerankDepth,
)
from ebr_lib.names import Choice, Hub, OnChangedVectors


@dataclass(frozen=True)
class ServeConfig(Config):
    """`serve`: search an index and encode texts over HTTP, with a page to compare models and judge answers."""

    index_dir: Place = knob("./faiss/index", "Index folder.", "索引目录。")
    base_index_dir: Place | None = knob(
        None,
        "Index of the same rows by the base model, shown beside on the page.",
        "用基座模型为同一批行建的索引，在页面上并排显示。",
    )
    bm25: bool = knob(
        True,
        "Show BM25 beside on the page; its words are read into memory at the start.",
        "页面上并排显示 BM25；启动时读入全部文本的词。",
    )
    text_column: Name | None = knob(
        None,
        "Kept column with the text that the page shows and BM25 reads; null looks for text, description, title and others.",
        "页面显示、BM25 使用的文本列（须为保留列）；null 依次查找 text、description、title 等。",
    )
    reranker_name: Place | None = knob("auto", *RERANKER)
    rerank_depth: RerankDepth | None = knob(None, *RERANK_DEPTH)
    id_column: Name | None = knob(
        None,
        "Kept column with the ids that judgements name; null uses the index's. Without ids nothing can be judged.",
        "标注所用的 ID 列（须为保留列）；null 使用建索引时的 id_column。没有 ID 列就不能标注。",
    )
    judgements_dir: Place = knob(
        "./judgements",
        "Folder for the answers that people mark on the page, which `evaluate` reads as `data_path`.",
        "页面上标注结果的目录，`evaluate` 用 `data_path` 读取。",
    )
    host: Name = knob(
        "127.0.0.1",
        "Address to listen on: 127.0.0.1 is this machine only; 0.0.0.0 is everyone who reaches it, and needs `token_file`.",
        "监听地址：127.0.0.1 仅本机可访问；0.0.0.0 对外开放，须同时给出 `token_file`。",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = knob(8000, "Port; 0 takes a free one.", "端口；0 表示任取空闲端口。")
    token_file: Place | None = knob(None, *TOKEN_FILE)
    model_name: Place | None = knob(
        None,
        "Where the index's model is now, if it was moved; null uses the path saved with the index.",
        "索引的模型被移动后的位置；null 使用索引中记录的路径。",
    )
    query_prompt: str | None = knob(None, *QUERY_PROMPT)
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)

    def conflicts(self) -> Iterator[str]:
        if self.rerank_depth is not None and self.reranker_name in (None, "none"):
            yield NO_RERANKER

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "localhost", "::1")
