"""The knobs of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BACKEND,
    BASE_PATH,
    CHANGED_VECTORS,
    DEVICE,
    HUB,
    LABEL_COLUMN,
    OWN_LENGTH,
    PRECISION,
    QUERY_COLUMN,
    QUERY_PROMPT,
    REMOTE_CODE,
    Count,
    Length,
    Name,
    Place,
    Places,
    Positive,
    Seed,
)
from ebr_lib.names import Asked, Backend, Choice, EvalMetric, Hub, LeaveOutOwn, OnChangedVectors


@dataclass(frozen=True)
class EvalConfig(Config):
    """Extension, `evaluate_retrieval`: measure whether retrieval got better."""

    # what is measured
    models: tuple[Place, ...] = knob(
        ["all-MiniLM-L6-v2"],
        "Models to compare: fine-tuned folders, local folders or hub names; the first is the baseline.",
        "要比较的模型：微调目录、本地目录或 Hub 名称；第一个为基线。",
    )
    bm25: bool = knob(
        True,
        "Also measure BM25, which an embedding model should beat.",
        "同时评估 BM25，向量模型应优于它；中文用 jieba 分词。",
    )
    fusion: bool = knob(
        True,
        "Also measure each model fused with BM25: by reciprocal ranks, and by a weighted sum of scores.",
        "同时评估各模型与 BM25 的融合：倒数排名（RRF）与加权求和。",
    )
    reranker_name: Place | None = knob(
        None,
        "Cross-encoder that reorders each model's best documents, measured too: a folder or a hub name.",
        "重排模型（cross-encoder，目录或 Hub 名称）：重排各模型的前若干篇文档，一并评估。",
    )
    rerank_depth: Annotated[int, Field(ge=1, le=100)] = knob(
        50, "Documents per query that the reranker reads.", "每个查询交给重排模型的文档数。"
    )
    # data
    data_path: Place | None = knob(
        "./saved_model/all-MiniLM-L6-v2-peft-lora",
        "A fine-tuned model's folder (its held-out split), a BEIR folder, or a file of queries with a `positive` column.",
        "微调模型目录（使用其留出集）、BEIR 目录，或带 `positive` 列的查询文件。",
    )
    queries_path: Place | None = knob(
        None,
        "File of queries (JSON, CSV, TSV, \\001 or Parquet), instead of `data_path`.",
        "查询文件（JSON、CSV、TSV、\\001 分隔或 Parquet），代替 `data_path`。",
    )
    corpus_path: Place | None = knob(
        None,
        "File of documents, or an embedding file from inference; its vectors are used for the model that made them.",
        "文档文件，或推理阶段输出的向量文件（其中的向量只用于生成它的模型）。",
    )
    qrels_path: Place | None = knob(
        None,
        "Judgements: lines of `query document grade` in BEIR or TREC format, or JSON, CSV or Parquet with the "
        "columns query-id, corpus-id and score.",
        "相关性标注：每行 `query document grade`（BEIR 或 TREC 格式），或含 query-id、corpus-id、score 列的 JSON、CSV、Parquet。",
    )
    train_data_path: Places | None = knob(
        None,
        "Training data: used to measure seen and unseen documents separately and to report queries that were trained on.",
        "训练数据：用于分别评估训练中见过与未见过的文档，并报告训练集中已有的查询。",
    )
    label_column: Name | None = knob(None, *LABEL_COLUMN)
    query_column: Name | None = knob(None, *QUERY_COLUMN)
    corpus_column: Name | None = knob(
        None,
        "Column with the document text; null looks for text, description, document, passage, positive or content.",
        "文档文本列；null 依次查找 text、description、document、passage、positive、content。",
    )
    id_column: Name | None = knob(
        None,
        "Column with document ids, also used for queries if their file has it; null looks for _id, id, doc_id or "
        "docid, and for queries query_id or qid.",
        "文档 ID 列（查询文件也有该列时同样使用）；null 依次查找 _id、id、doc_id、docid（查询为 query_id、qid）。",
    )
    leave_out_own: LeaveOutOwn = knob(
        "text_and_id",
        "Leave the query itself out of its answers and its ranking: documents with the same text, and with the same id "
        "if judgements use ids. Use text if queries and documents are numbered independently; none keeps all.",
        "把与查询自身相同的文档从答案和排序中去掉：文本相同的，以及按 ID 标注时 ID 相同的。查询与文档分别编号时用 text；none 全部保留。",
    )
    slice_columns: tuple[Name, ...] = knob(
        [], "Columns of the query file; each of their values is measured separately.", "按这些查询列的取值分组评估。"
    )
    frontier: bool = knob(
        False,
        "Also measure how small and fast the vectors of the last of `models` can be served: fewer dimensions, fewer bytes "
        "per number, kinds of index. Holds all vectors in memory.",
        "同时评估 `models` 中最后一个模型的向量能以多小的体积、多快的速度上线：降维、低精度与各类索引。全部向量会放进内存。",
    )
    frontier_dims: tuple[Positive, ...] = knob(
        [],
        "Dimensions to cut to; empty takes those that the model names (Matryoshka), else halves down to 64.",
        "评估哪些截断维度；留空则用模型注明的 Matryoshka 维度，没有注明时逐次减半，直到 64。",
    )
    frontier_tolerance: Annotated[float, Field(gt=0, le=1)] = knob(
        0.01,
        "The smallest size is recommended whose loss of `primary_metric`, with its 95 % interval, stays below this.",
        "推荐 `primary_metric` 的损失（含 95% 区间）小于该值的最小方案。",
    )
    # encoding
    query_prompt: str | None = knob(None, *QUERY_PROMPT)
    document_prompt: str | None = knob(
        None,
        "Prompt prepended to every document; null uses each model's own.",
        "加在每个文档前的提示词；null 使用各模型训练时的提示词。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    max_seq_length: Length | None = knob(None, *OWN_LENGTH)
    truncate_dim: Positive | None = knob(
        None, "Keep only the first dimensions (Matryoshka models).", "只保留前若干维（Matryoshka 模型）。"
    )
    precision: Asked = knob("auto", *PRECISION)
    backend: Backend = knob("auto", *BACKEND)
    device: str | None = knob(None, *DEVICE)
    # measures and report
    primary_metric: EvalMetric = knob(
        "ndcg@10",
        "Measure that decides whether a model is better; the others are reported beside it, corrected for their number.",
        "用于判定是否更好的指标；其余指标并列给出，并按指标个数校正。",
    )
    ks: tuple[Annotated[int, Field(ge=1, le=100)], ...] = knob(
        [1, 5, 10, 50, 100], "Cutoffs k for recall@k and hit rate@k.", "召回率与命中率的截断位置 k。"
    )
    resamples: Annotated[int, Field(ge=100)] = knob(
        10000,
        "Samples for bootstrap intervals and for the permutation test.",
        "自助法区间与置换检验的重采样次数。",
    )
    examples: Count = knob(
        10, "Number of queries to show that improved most, and that got worse most.", "展示提升最多与下降最多的查询数。"
    )
    seed: Seed = knob(42, "Random seed of intervals and tests.", "置信区间与检验的随机种子。")
    output_dir: Place = knob(
        "./evaluation",
        "Output folder: report.html, report.json, queries.csv, and the rankings and judgements in TREC format.",
        "输出目录：report.html、report.json、queries.csv 以及 TREC 格式的排序结果与标注。",
    )

    def conflicts(self) -> Iterator[str]:
        if not self.models and not self.bm25:
            yield "models is empty and bm25 is off: there is nothing to measure"
        if self.frontier and not self.models:
            yield "frontier measures the vectors of a model, and models is empty"
        if self.frontier_dims and not self.frontier:
            yield "frontier_dims: only with frontier: true"
        if not (self.data_path or self.queries_path):
            yield "set data_path or queries_path"
        if not self.ks:
            yield "ks is empty: give at least one cutoff"
        kind, _, k = self.primary_metric.partition("@")
        if kind == "recall" and int(k) not in self.ks:
            yield f"primary_metric: {self.primary_metric} is not measured; add {k} to ks"
        if len(set(self.models)) != len(self.models):
            yield "models: a name occurs twice"
