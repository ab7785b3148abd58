"""The knobs of the picture."""

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
        "Column whose text the explorer and the tables show; null takes `description`, else the first other column.",
        "交互页面和表格中展示的文本列；null 取 `description`，没有则取第一个其他列。",
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
        "Fonts for Chinese, tried in this order: family names, or font files; then the system's and the packaged one.",
        "中文字体，按顺序尝试：字体名或字体文件；之后使用系统字体和随包安装的字体。",
    )
    max_points: Annotated[int, Field(ge=3)] = knob(
        50_000,
        "Points that t-SNE and UMAP work on, sampled by label; the rest are placed by their nearest neighbours.",
        "t-SNE 与 UMAP 计算的点数（按标签抽样）；其余点按最近邻放置。",
    )
    explorer: bool = knob(True, "Write the interactive page beside the picture.", "在图片旁生成交互式网页。")
    # the maps
    method: Literal["both", "tsne", "umap"] = knob("both", "Which maps to draw.", "绘制哪种降维图。")
    tsne_perplexity: Annotated[float, Field(ge=1)] = knob(
        30.0,
        "Perplexity of t-SNE; lowered where the points are too few.",
        "t-SNE 的困惑度；点数太少时自动降低。",
    )
    tsne_learning_rate: Literal["auto"] | MoreThanZero = knob(
        "auto",
        "Learning rate of t-SNE, as openTSNE defines it; auto chooses it by the number of points.",
        "t-SNE 的学习率（openTSNE 的定义）；auto 按点数自动选择。",
    )
    umap_neighbors: Annotated[int, Field(ge=2)] = knob(
        15,
        "Neighbours of UMAP; lowered where the points are too few.",
        "UMAP 的邻居数；点数太少时自动降低。",
    )
    umap_min_dist: Share = knob(0.1, "How tightly UMAP packs points.", "UMAP 中点的最小间距。")
    seed: Seed = knob(42, "Same seed, same picture.", "随机种子；种子相同则图片相同。")
    fast: bool = knob(
        False,
        "UMAP on all cores: faster, and another map each time.",
        "UMAP 使用全部 CPU 核：更快，但每次结果不同。",
    )
    cache: bool = knob(
        True,
        "Keep the maps beside the picture, so that another colour does not compute them again.",
        "在图片旁缓存降维结果，只改颜色时不再重新计算。",
    )
    # the numbers
    clusters: Positive | None = knob(
        None,
        "Clusters of k-means; null takes as many as labels, or without labels the number with the best silhouette.",
        "k-means 的聚类数；null 取标签个数，没有标签时取轮廓系数最好的数目。",
    )
    # before and after
    compare_path: Place | None = knob(
        None,
        "Embedding file of the same items from before, such as the base model's: draws and measures before and after.",
        "同一批数据之前的向量文件（如基座模型）：绘制并比较前后变化。",
    )
    id_column: str | None = knob(
        None,
        "Column by which rows of the two files are matched; null matches them by their order, and checks their texts.",
        "匹配两个文件各行的列；null 按行的顺序匹配，并核对文本是否一致。",
    )

    def conflicts(self) -> Iterator[str]:
        if not self.output_path.lower().endswith((".png", ".svg", ".pdf")):
            yield f"output_path: {self.output_path!r} is no picture; give a name that ends in .png, .svg or .pdf"
        if self.id_column is not None and self.compare_path is None:
            yield "id_column: matches the rows of compare_path, which is null; set compare_path, or leave it out"
        if self.compare_path == self.embedding_path:
            yield "compare_path: the same file as embedding_path; name the file from before"
