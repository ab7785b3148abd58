"""Knobs of the visualization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import MoreThanZero, Place, Positive, Seed, Share


@dataclass(frozen=True)
class VisConfig(Config):
    """Stage 3, `visualize_embeddings`: draw an embedding file and measure its clusters."""

    embedding_path: Place = knob("./faiss/embeds_2.txt", "The embedding file to read.", "要读取的向量文件。")
    output_path: Place = knob(
        "./embedding_scatter.png", "The picture to write: .png, .svg or .pdf.", "输出的图片：.png、.svg 或 .pdf。"
    )
    # what is drawn
    label_column: str | None = knob(
        None, "Column to colour by; null colours by k-means cluster.", "用于着色的列；null 按 k-means 聚类着色。"
    )
    text_column: str | None = knob(
        None,
        "Column whose text the explorer and the tables show; null uses the one that was encoded, or else the one with the longest texts.",
        "交互页面和表格中展示的文本列；null 取编码所用的列，没有则取文本最长的列。",
    )
    chinese_fonts: tuple[Place, ...] = knob(
        [
            "Noto Sans CJK SC",
            "Source Han Sans SC",
            "Microsoft YaHei",
            "PingFang SC",
            "WenQuanYi Micro Hei",
            "SimHei",
        ],
        "Fonts for Chinese text, tried in order: family names or font files. System fonts and the packaged font come after these.",
        "中文字体，按顺序尝试：字体名或字体文件；之后使用系统字体和随包安装的字体。",
    )
    max_points: Annotated[int, Field(ge=3)] = knob(
        50_000,
        "Points that t-SNE and UMAP are computed on, sampled by label; the others are placed by their nearest neighbours.",
        "参与 t-SNE 与 UMAP 计算的点数（按标签抽样）；其余的点按最近邻放置。",
    )
    explorer: bool = knob(
        True,
        "Write an interactive HTML page next to the picture, and a Parquet file with its points.",
        "在图片旁生成交互式网页，以及其中各点的 Parquet 文件。",
    )
    # the maps
    method: Literal["both", "tsne", "umap"] = knob("both", "Maps to draw.", "绘制哪种降维图。")
    tsne_perplexity: Annotated[float, Field(ge=1)] = knob(
        30.0,
        "Perplexity of t-SNE; lowered if there are too few points.",
        "t-SNE 的困惑度；点数太少时自动降低。",
    )
    tsne_learning_rate: Literal["auto"] | MoreThanZero = knob(
        "auto",
        "Learning rate of t-SNE, as in openTSNE; auto sets it from the number of points.",
        "t-SNE 的学习率（openTSNE 的定义）；auto 按点数自动选择。",
    )
    umap_neighbors: Annotated[int, Field(ge=2)] = knob(
        15,
        "Number of neighbours in UMAP; lowered if there are too few points.",
        "UMAP 的邻居数；点数太少时自动降低。",
    )
    umap_min_dist: Share = knob(0.1, "Minimum distance between points in the UMAP map.", "UMAP 图中点之间的最小距离。")
    seed: Seed = knob(42, "Random seed; the same seed gives the same picture.", "随机种子；种子相同则图片相同。")
    fast: bool = knob(
        False,
        "Run UMAP on all cores: faster, but the map differs between runs.",
        "UMAP 使用全部 CPU 核：更快，但每次结果不同。",
    )
    cache: bool = knob(
        True,
        "Cache the maps next to the picture; recolouring reuses them.",
        "在图片旁缓存降维结果；只换着色时直接复用。",
    )
    # the numbers
    clusters: Positive | None = knob(
        None,
        "Number of k-means clusters; null uses the number of labels or, without labels, the number with the best silhouette.",
        "k-means 的聚类数；null 取标签的个数，没有标签时取轮廓系数最高的聚类数。",
    )
    # before and after
    compare_path: Place | None = knob(
        None,
        "Earlier embedding file of the same items, e.g. from the base model: draws and measures before and after.",
        "同一批数据此前的向量文件（如基座模型的）：绘图并比较前后变化。",
    )
    id_column: str | None = knob(
        None,
        "Column that matches the rows of the two files; null matches them by order and checks that the texts agree.",
        "匹配两个文件各行的列；null 按行的顺序匹配，并核对文本是否一致。",
    )

    def conflicts(self) -> Iterator[str]:
        if not self.output_path.lower().endswith((".png", ".svg", ".pdf")):
            yield f"output_path: {self.output_path!r} is not a picture; use a name that ends in .png, .svg or .pdf"
        if self.id_column is not None and self.compare_path is None:
            yield "id_column: it matches rows with compare_path, which is null; set compare_path or leave id_column out"
        if self.compare_path == self.embedding_path:
            yield "compare_path: same file as embedding_path; give the earlier file"
