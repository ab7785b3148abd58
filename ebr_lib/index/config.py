"""The knobs of the index, and of a search in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BASE_PATH,
    CHANGED_VECTORS,
    QUERY_COLUMN,
    QUERY_PROMPT,
    REMOTE_CODE,
    Name,
    Place,
    Places,
    Positive,
    Seed,
)
from ebr_lib.names import Choice, OnChangedVectors


@dataclass(frozen=True)
class IndexConfig(Config):
    """Extension, `build_faiss_index`: an index over an embedding file, measured."""

    embedding_path: Place = knob("./faiss/embeds_2.txt", "The embedding file to index.", "要建索引的向量文件。")
    output_dir: Place = knob(
        "./faiss/index",
        "Folder of the index, its columns, its manifest and the curve.",
        "索引目录：索引、保留列、清单与召回曲线图。",
    )
    id_column: Name | None = knob(
        None,
        "Kept column that holds the ids by which rows are deleted; null takes row numbers.",
        "用于删除的 ID 列；null 使用行号。",
    )
    kind: Name = knob(
        "auto",
        "A Faiss factory string (Flat, `HNSW32`, `IVF4096,SQ8`), or auto: Flat up to 50,000 rows, HNSW to a million, cells above.",
        "Faiss factory 字符串（如 Flat、`HNSW32`、`IVF4096,SQ8`），auto 按规模选择：5 万以内 Flat，百万以内 HNSW，更大用 IVF。",
    )
    compression: Literal["sq8", "pq"] = knob(
        "sq8",
        "Above a million rows: 8 bits a dimension, or product quantisation re-ranked by 8 bits (larger, faster).",
        "超过百万行时：sq8 每维 8 位；pq 为乘积量化并以 8 位向量重排（更大、更快）。",
    )
    ef_construction: Annotated[int, Field(ge=8, le=2000)] = knob(
        80,
        "Effort of building an HNSW graph: higher builds longer and finds more.",
        "HNSW 建图的搜索宽度，越大越慢、越准。",
    )
    # measuring
    queries_path: Place | None = knob(
        None,
        "File of real queries to measure with; null takes vectors of the index and leaves themselves out.",
        "用于测量的真实查询文件；null 使用索引内的向量（排除其自身）。",
    )
    query_column: Name | None = knob(None, *QUERY_COLUMN)
    model_name: Place | None = knob(
        None,
        "Model that encodes the queries; null takes the one that the embedding file's manifest names.",
        "编码查询的模型；null 使用向量文件清单中的模型。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    query_prompt: str | None = knob(None, *QUERY_PROMPT)
    measure_queries: Positive = knob(1000, "At most so many queries measure.", "测量使用的查询数上限。")
    target_recall: Annotated[float, Field(gt=0, le=1)] = knob(
        0.98,
        "Recall@10 against exact search that the saved setting has to reach.",
        "所选参数须达到的 recall@10（相对精确检索）。",
    )
    seed: Seed = knob(42, "Seed of the samples and of training.", "抽样与训练的随机种子。")


@dataclass(frozen=True)
class SearchConfig(Config):
    """`search`: find the rows of an index that are nearest to a query."""

    query: Name = knob("warm blanket", "What to look for.", "查询文本。")
    index_dir: Place = knob("./faiss/index", "Folder of the index.", "索引目录。")
    k: Positive = knob(10, "How many rows to show.", "返回条数。")
    where: tuple[Name, ...] = knob(
        [],
        "Filters `column=value` on kept columns, `column=\\N` for null; several values of a column are alternatives.",
        "按保留列过滤，写作 `列=值`，空值（null）写作 `列=\\N`；同一列的多个值为“或”。",
        split=False,
    )
    model_name: Place | None = knob(
        None, "The model, where it is not at the place that the index remembers.", "模型位置；null 使用索引记录的模型。"
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    query_prompt: str | None = knob(None, *QUERY_PROMPT)

    def conflicts(self) -> Iterator[str]:
        for condition in self.where:
            if condition.find("=") < 1:
                yield f"where: {condition!r} is no filter; wanted column=value"
