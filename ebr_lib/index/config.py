"""Knobs of the index and of search."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BASE_PATH,
    CHANGED_VECTORS,
    HUB,
    QUERY_COLUMN,
    QUERY_PROMPT,
    REMOTE_CODE,
    RERANK_DEPTH,
    RERANKER,
    Name,
    Place,
    Places,
    Positive,
    RerankDepth,
    Seed,
    Share,
)
from ebr_lib.names import Choice, FusionChoice, Hub, OnChangedVectors

COLLECTION = re.compile("[A-Za-z_][A-Za-z0-9_]{0,199}")
NO_RERANKER = "rerank_depth: there is no reranker; give reranker_name"


@dataclass(frozen=True)
class IndexConfig(Config):
    """Extension, `build_faiss_index`: build and measure a Faiss index of an embedding file."""

    embedding_path: Place = knob("./faiss/embeds_2.txt", "The embedding file to index.", "要建索引的向量文件。")
    output_dir: Place = knob(
        "./faiss/index",
        "Output folder: the index, the kept columns, the manifest and the recall curve.",
        "输出目录：索引、保留列、清单与召回曲线图。",
    )
    id_column: Name | None = knob(
        None,
        "Kept column with the ids for deleting rows; null uses row numbers.",
        "删除行时使用的 ID 列；null 使用行号。",
    )
    kind: Name = knob(
        "auto",
        "Faiss factory string (`Flat`, `HNSW32`, `IVF4096,SQ8`), or auto: Flat up to 50,000 rows, HNSW up to a million, IVF "
        "above. `milvus`, or `milvus:HNSW32`, builds a Milvus collection.",
        "Faiss factory 字符串（如 `Flat`、`HNSW32`、`IVF4096,SQ8`）；auto 按行数选择：5 万以内用 Flat，百万以内用 HNSW，更大用 IVF。"
        "`milvus` 或 `milvus:HNSW32` 建 Milvus 集合。",
    )
    milvus_uri: Name | None = knob(
        None,
        "With kind milvus: its address (`http://localhost:19530`); null takes the environment's MILVUS_URI, or else a file of "
        "Milvus Lite in `output_dir`.",
        "kind 为 milvus 时的地址（如 `http://localhost:19530`）；null 取环境变量 MILVUS_URI，没有时用 `output_dir` 中的 Milvus Lite 文件。",
    )
    milvus_token_file: Place | None = knob(
        None,
        "File with Milvus's token, or `user:password`; null takes the environment's MILVUS_TOKEN.",
        "存放 Milvus 令牌（或 `用户:密码`）的文件；null 取环境变量 MILVUS_TOKEN。",
    )
    collection: Name = knob(
        "ebr",
        "Name (an alias) under which Milvus has the finished collection.",
        "建好的集合在 Milvus 中的名称（别名）。",
    )
    compression: Literal["sq8", "pq"] = knob(
        "sq8",
        "Above a million rows: sq8 stores 8 bits per dimension; pq is product quantisation re-ranked with 8-bit vectors (larger, faster).",
        "超过百万行时：sq8 每维 8 位；pq 为乘积量化并以 8 位向量重排（更大、更快）。",
    )
    ef_construction: Annotated[int, Field(ge=8, le=2000)] = knob(
        80,
        "Search width while building an HNSW graph: higher is slower and more accurate.",
        "HNSW 建图时的搜索宽度：越大越慢、越准。",
    )
    # words beside vectors
    hybrid: bool = knob(
        False,
        "Also keep a BM25 index of the texts; searches fuse both as evaluation recommends.",
        "同时保存文本的 BM25 索引；检索时按评估的建议与向量融合。",
    )
    text_column: Name | None = knob(
        None,
        "Kept column that BM25 reads; null takes the one that was encoded.",
        "BM25 使用的文本列（须为保留列）；null 使用编码时的文本列。",
    )
    evaluation_dir: Place = knob(
        "./evaluation",
        "Output folder of `evaluate`; if it measured this model, searches do what it recommends. Otherwise those of a "
        "hybrid index fuse by reciprocal ranks (RRF).",
        "`evaluate` 的输出目录：评估过此模型时，检索按其建议进行；否则混合索引用 RRF 融合。",
    )
    # measuring
    queries_path: Place | None = knob(
        None,
        "File of real queries to measure with; null uses vectors of the index and leaves each out of its own results.",
        "用于测量的真实查询文件；null 使用索引中的向量（结果中排除其自身）。",
    )
    query_column: Name | None = knob(None, *QUERY_COLUMN)
    model_name: Place | None = knob(
        None,
        "Model for the queries; null uses the one in the manifest of the embedding file.",
        "编码查询的模型；null 使用向量文件清单中记录的模型。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    query_prompt: str | None = knob(None, *QUERY_PROMPT)
    measure_queries: Positive = knob(1000, "Maximum number of queries used for measuring.", "测量所用查询数的上限。")
    target_recall: Annotated[float, Field(gt=0, le=1)] = knob(
        0.98,
        "Recall@10 against exact search that the saved search setting must reach.",
        "所保存的检索参数须达到的 recall@10（相对精确检索）。",
    )
    seed: Seed = knob(42, "Random seed of sampling and index training.", "抽样与索引训练的随机种子。")

    @property
    def uri(self) -> str | None:
        """Address of Milvus; None is a file in the output folder."""
        return self.milvus_uri or os.environ.get("MILVUS_URI")

    def conflicts(self) -> Iterator[str]:
        if self.milvus_uri and "@" in self.milvus_uri:
            yield "milvus_uri: leave user and password out of it; put them into milvus_token_file or MILVUS_TOKEN"
        if (self.milvus_uri or self.milvus_token_file) and not self.kind.startswith("milvus"):
            yield f"milvus_uri and milvus_token_file need kind: milvus, not {self.kind}"
        if not COLLECTION.fullmatch(self.collection):
            yield (
                f"collection: {self.collection!r} is not a name that Milvus takes; wanted up to 200 letters (a to z, A to Z), "
                "digits and underscores, the first not a digit"
            )
        if self.text_column and not self.hybrid:
            yield "text_column: only hybrid: true reads it"


@dataclass(frozen=True)
class SearchConfig(Config):
    """`search`: find the rows of an index that are nearest to a query."""

    query: Name = knob("warm blanket", "Text to search for.", "查询文本。")
    index_dir: Place = knob("./faiss/index", "Index folder.", "索引目录。")
    k: Positive = knob(10, "Number of rows to return.", "返回条数。")
    like: tuple[Name, ...] = knob(
        [],
        "Ids of rows to find similar rows to, by the mean of their vectors, instead of a query.",
        "按这些 ID 的行（取向量均值）查找相似行，代替查询文本。",
        split=False,
    )
    id_column: Name | None = knob(
        None,
        "Kept column with the ids of `like`; null uses the index's `id_column`.",
        "`like` 的 ID 所在的保留列；null 使用建索引时的 `id_column`。",
    )
    distinct: bool | None = knob(
        None,
        "Of rows with the same vector return only the first; null does so for `like` and `diversity`.",
        "向量相同的行只返回第一条；null 在使用 `like` 或 `diversity` 时如此。",
    )
    diversity: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.0,
        "From 0, the nearest rows, towards 1, rows unlike those before them (maximal marginal relevance).",
        "多样性：0 返回最近的行，越接近 1 越避免与已返回的行相似（MMR）。",
    )
    fusion: FusionChoice = knob(
        "auto",
        "Of an index built with `hybrid`: rrf fuses with BM25 by reciprocal ranks, weighted by a weighted sum of scores, "
        "none uses the vectors alone; auto does what evaluation recommends.",
        "混合索引（`hybrid`）的排序：rrf 按倒数排名与 BM25 融合，weighted 按得分加权求和，none 仅用向量；auto 按评估的建议。",
    )
    bm25_weight: Share | None = knob(
        None,
        "BM25's part in a weighted sum; null takes the weight that evaluation chose.",
        "加权求和中 BM25 的权重；null 使用评估选出的权重。",
    )
    reranker_name: Place | None = knob("auto", *RERANKER)
    rerank_depth: RerankDepth | None = knob(None, *RERANK_DEPTH)
    where: tuple[Name, ...] = knob(
        [],
        "Filters on kept columns: `column=value`, or `column=\\N` for null; several values of one column mean any of them.",
        "按保留列过滤，写作 `列=值`，空值（null）写作 `列=\\N`；同一列可给多个值，满足其一即可。",
        split=False,
    )
    model_name: Place | None = knob(
        None,
        "Where the model is now, if it was moved; null uses the path saved with the index.",
        "模型被移动后的位置；null 使用索引中记录的路径。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    query_prompt: str | None = knob(None, *QUERY_PROMPT)

    def conflicts(self) -> Iterator[str]:
        for condition in self.where:
            if condition.find("=") < 1:
                yield f"where: {condition!r} is not a filter; use column=value"
        if self.bm25_weight is not None and self.fusion != "weighted":
            yield f"bm25_weight: only fusion: weighted uses it, and fusion is {self.fusion}"
        if self.rerank_depth is not None and self.reranker_name in (None, "none"):
            yield NO_RERANKER
