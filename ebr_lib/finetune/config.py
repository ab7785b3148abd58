"""The knobs of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ebr_lib.finetune.schedulers import FOLLOW_THE_METRIC, Scheduler
from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import (
    BACKEND,
    BASE_PATH,
    CHANGED_VECTORS,
    LABEL_COLUMN,
    REMOTE_CODE,
    Count,
    Length,
    MoreThanZero,
    Name,
    NotNegative,
    Place,
    Places,
    Positive,
    Seed,
    Share,
)
from ebr_lib.names import COLUMNS, Backend, BestMetric, Choice, Column, NoiseKind, OnBadRow, OnChangedVectors


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Stage 1, `train_sentence_transformer`: LoRA fine-tuning on pairs or triplets."""

    # model and data
    model_name: Place = knob(
        "all-MiniLM-L6-v2",
        "Base model: the packaged all-MiniLM-L6-v2, a local folder, or a hub name.",
        "基座模型：内置的 all-MiniLM-L6-v2、本地目录或 Hub 名称。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    data_path: Places = knob(
        "./train_text",
        "Training pairs: a file (JSON, JSONL, CSV, TSV, Parquet; gzip too) or a folder of them (files of the folder "
        "itself, not of its subfolders), or a list of these.",
        "训练数据：一个文件（JSON、JSONL、CSV、TSV、Parquet，可用 gzip 压缩），或装有它们的目录（只读该目录本身，不读子目录），也可以是它们的列表。",
    )
    eval_data_path: Places | None = knob(
        None,
        "Held-out pairs in the same formats; null splits `eval_ratio` off the training data, so that no text is on both "
        "sides.",
        "验证数据，格式相同；为 null 时从训练数据中划出 `eval_ratio`，同一文本不会出现在两边。",
    )
    output_dir: Place = knob(
        "./saved_model",
        "Folder under which `<model>-peft-lora/` is saved.",
        "输出目录，模型保存为其中的 `<模型名>-peft-lora/`。",
    )
    on_bad_row: OnBadRow = knob(
        "error",
        "A row that cannot be used stops the run, or is skipped, counted and written to a reject file.",
        "遇到坏行时报错停止，或跳过、计数并写入拒收文件。",
    )
    label_column: Name | None = knob(None, *LABEL_COLUMN)
    prompt: str | dict[str, str] | None = knob(
        None,
        "Put before every text; or one a column: `{anchor: 'query: ', positive: 'passage: '}`. Saved into the model. "
        "Null keeps the model's own.",
        "加在每段文本前的提示词；也可按列给出：`{anchor: 'query: ', positive: 'passage: '}`。会存入模型。null 表示沿用模型自带的。",
    )
    max_seq_length: Length = knob(
        256, "Tokens a text is cut to, prompt included.", "文本截断长度（token 数，含提示词）。"
    )
    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.1,
        "Share of the anchors held out; 0 trains on all and measures nothing.",
        "留作验证的 anchor 比例；0 表示全部用于训练、不评估。",
    )
    # LoRA
    lora_r: Annotated[int, Field(ge=1, le=1024)] = knob(16, "Rank of the adapter.", "LoRA 的秩。")
    lora_alpha: Annotated[int, Field(ge=1)] = knob(
        32,
        "The adapter is scaled by alpha / √r, or by alpha / r without `use_rslora`.",
        "LoRA 缩放系数，实际缩放为 alpha / √r；关闭 `use_rslora` 时为 alpha / r。",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.1, "Dropout on the adapter's input, in training.", "训练时 LoRA 输入上的 dropout。"
    )
    use_dora: bool = knob(False, "Weight-decomposed adapter (DoRA).", "使用 DoRA（权重分解的 LoRA）。")
    use_rslora: bool = knob(
        True,
        "Scale the adapter by alpha / √r (rsLoRA) instead of alpha / r: it learns faster at the same learning rate.",
        "使用 rsLoRA，缩放为 alpha / √r 而不是 alpha / r：学习率相同时学得更快。",
    )
    adapter_side: Literal["both", "query"] = knob(
        "both",
        "query: train and apply the adapter to queries only; documents keep the base model's vectors, so that an "
        "encoded and indexed catalogue stays valid.",
        "query：只对查询训练并使用适配器，文档保持基座模型的向量，已编码、已建索引的商品库继续有效。",
    )
    merge_adapter: bool = knob(
        False, "Save a merged model too, as `<model>-merged/`.", "另存一份合并后的完整模型 `<模型名>-merged/`。"
    )
    # loss
    temperature: MoreThanZero = knob(
        0.05, "Cosines are divided by it; 0.05 is a scale of 20.", "余弦相似度除以该温度；0.05 即放大 20 倍。"
    )
    contrastive_batch_size: Count = knob(
        0,
        "Pairs that see each other as negatives, embedded `train_batch_size` at a time (GradCache); 0 is "
        "`train_batch_size`.",
        "互为负样本的样本对数，每次只前向 `train_batch_size` 对（GradCache）；0 表示等于 `train_batch_size`。",
    )
    mask_known_positives: bool = knob(
        True,
        "A document that the training data knows to answer an anchor is never its negative.",
        "训练数据中已知能回答某 anchor 的文档，不会被当作它的负样本。",
    )
    balanced_batches: bool = knob(
        True,
        "Deal the rows of popular documents evenly over the batches; no row is left out of an epoch.",
        "把热门文档的样本均匀分到各批；每轮不漏任何一行。",
    )
    packed_rows: bool = knob(
        True,
        "Train on several texts a row under a block-diagonal mask: the same loss and gradients without padding. Models "
        "whose vectors would differ are padded; the log says so.",
        "把多条文本装进一行（块对角掩码）训练：损失与梯度不变、没有填充。向量会不同的模型自动退回填充方式并写入日志。",
    )
    matryoshka_dims: tuple[Positive, ...] = knob(
        [], "Also train the vectors cut to these dimensions.", "同时训练截断到这些维度的向量（Matryoshka）。"
    )
    # hard negatives
    mine_hard_negatives: Count = knob(
        0,
        "Hard negatives to find for every row before training, among the documents of the training data, with the model "
        "as it is then; 0 finds none. The rows are saved as `mined_negatives.jsonl`.",
        "训练前用当前模型在训练数据的文档中为每行挖掘的难负例个数；0 不挖掘。结果另存为 `mined_negatives.jsonl`。",
    )
    mining_rank_min: Positive = knob(
        1,
        "First rank that may be mined; 1 is the nearest document not known to answer the anchor.",
        "从第几名开始挖掘；1 为最近的、未知能回答该 anchor 的文档。",
    )
    mining_rank_max: Positive = knob(50, "Last rank that may be mined.", "挖掘到第几名为止。")
    mining_margin: Share | None = knob(
        0.05,
        "Against false negatives: a mined document's cosine stays below its anchor's positive by this share of the "
        "positive's; null takes any.",
        "防止误伤：挖到的文档与 anchor 的余弦须比正例低这一比例；null 不限制。",
    )
    # optimisation
    num_epochs: MoreThanZero = knob(1, "Passes over the training data; may be a fraction.", "训练轮数，可以是小数。")
    train_batch_size: Positive = knob(6, "Pairs a device and step.", "每个设备每步的样本对数。")
    eval_batch_size: Positive | None = knob(
        None,
        "Pairs embedded at a time for the held-out loss, which always compares as many as a training batch does; null "
        "embeds as training does.",
        "计算验证损失时每次前向的样本对数；互相比较的对数始终与训练批相同。null 表示与训练一致。",
    )
    learning_rate: MoreThanZero = knob(2e-4, "Peak learning rate.", "学习率峰值。")
    weight_decay: NotNegative = knob(
        0.01, "AdamW weight decay on the adapter matrices.", "AdamW 对 LoRA 矩阵的权重衰减。"
    )
    l1_regularization: NotNegative = knob(
        0.0,
        "Weight of the sum of |w| over the adapter, added to the loss and logged apart.",
        "LoRA 参数绝对值之和的权重，加入损失并单独记录。",
    )
    max_grad_norm: NotNegative = knob(
        1.0, "Gradients are clipped to this norm; 0 switches it off.", "梯度裁剪的范数上限；0 为关闭。"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.0,
        "Share of the target spread evenly over all documents of the batch.",
        "对比损失的标签平滑：目标中均分给批内所有文档的比例。",
    )
    lr_scheduler_type: Scheduler = knob(
        "linear",
        "How the learning rate moves. `reduce_lr_on_plateau` and `greedy` lower it when `best_metric` has not got better "
        "for three evaluations; these two and `constant` have no warm-up. `cosine_with_restarts` has a cycle an epoch, at "
        "least two; `polynomial` falls with the square of the steps left.",
        "学习率调度方式。`reduce_lr_on_plateau` 与 `greedy` 在 `best_metric` 连续三次评估未提升时降低学习率；"
        "这两种与 `constant` 没有预热。`cosine_with_restarts` 每轮一个周期（至少两个）；"
        "`polynomial` 按剩余步数的平方下降。",
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.0, "Share of the steps in which the learning rate rises.", "学习率预热占总步数的比例。"
    )
    gradient_accumulation_steps: Positive = knob(
        1, "Batches a step; negatives stay within a batch.", "梯度累积步数；负样本仍只来自同一批。"
    )
    gradient_checkpointing: bool = knob(
        False,
        "Recompute the activations of every other layer backward: less memory, a quarter more time.",
        "反向时重算一半层的激活：省显存，多用约四分之一的时间。",
    )
    fp16: bool = knob(
        False,
        "Half precision, where the hardware has it; else the nearest that works.",
        "半精度；硬件不支持时改用最接近的可用精度。",
    )
    bf16: bool = knob(False, "bfloat16, where the hardware has it; else float32.", "bfloat16；硬件不支持时用 float32。")
    dataloader_num_workers: Count = knob(
        0, "Processes that prepare batches; 0 prepares them in this one.", "准备数据的进程数；0 表示在主进程中。"
    )
    dataloader_pin_memory: bool = knob(
        True, "Pin host memory, for faster copies to a GPU.", "锁页内存，加快向 GPU 的拷贝。"
    )
    # noise
    noise_enabled: bool = knob(
        False, "Put noise into the training texts, anew each epoch.", "对训练文本加噪，每轮重新抽取。"
    )
    noise_type: NoiseKind = knob(
        "random_delete",
        "Drop words, swap neighbouring words, or drop characters.",
        "加噪方式：随机删词、交换相邻词、删字符。",
    )
    noise_prob: Share = knob(
        0.1,
        "Share of the samples that noise touches, each in all columns of `noise_apply_to_fields`.",
        "被加噪的样本比例；被选中的样本在 `noise_apply_to_fields` 的各列上都加噪。",
    )
    noise_strength: Share = knob(
        0.1, "Share of a touched text's words or characters that change.", "被加噪文本中改动的词或字符比例。"
    )
    noise_apply_to_fields: tuple[Column, ...] = knob(
        ["anchor", "positive"], "Columns that noise may touch.", "允许加噪的列。"
    )
    # evaluation and stopping
    early_stopping_patience: Count = knob(
        0,
        "Evaluations without improvement before training stops; 0 never stops.",
        "连续多少次评估无提升就停止；0 为不早停。",
    )
    early_stopping_threshold: NotNegative = knob(0.0, "Improvement that counts.", "算作提升的最小幅度。")
    eval_steps: Count = knob(
        0, "Steps between evaluations; 0 evaluates at the end of each epoch.", "评估间隔步数；0 表示每轮结束时评估。"
    )
    best_metric: BestMetric = knob(
        "ndcg@10", "Held-out metric that decides which weights are kept.", "决定保留哪一步权重的验证指标。"
    )
    eval_corpus_size: Positive = knob(
        2000,
        "Documents that held-out anchors are searched in: all of their own, and a sample of the training documents.",
        "验证检索的文档数：验证集自己的全部文档，加上训练文档的抽样。",
    )
    leave_out_own: Literal["text", "none"] = knob(
        "text",
        "Documents with the text of a held-out anchor, left out of its answers and its ranking: it would find itself; "
        "none keeps them.",
        "与验证 anchor 文本相同的文档不算其答案、也不参与其排序（否则只是找到自己）；none 全部保留。",
    )
    resume_from_checkpoint: Literal["no", "auto"] = knob(
        "no", "auto: go on from the last checkpoint of an interrupted run.", "auto：从上次中断的检查点继续训练。"
    )
    save_steps: Count = knob(
        0, "Steps between checkpoints; 0 saves at the end of each epoch.", "检查点间隔步数；0 表示每轮结束时保存。"
    )
    backend: Backend = knob("auto", *BACKEND)
    memory_limit_gb: NotNegative = knob(
        0.0,
        "Treat more resident memory than this as out of memory, on machines without a GPU; 0 is no limit.",
        "无 GPU 时，常驻内存超过该值即按内存不足处理；0 为不限制。",
    )
    seed: Seed = knob(
        42, "Seed of the split, the order, the noise and the adapter.", "随机种子：划分、顺序、噪声与适配器初始化。"
    )

    def conflicts(self) -> Iterator[str]:
        if self.fp16 and self.bf16:
            yield "fp16 and bf16: choose one"
        if self.early_stopping_patience and not (self.eval_ratio or self.eval_data_path):
            yield "early_stopping_patience needs held-out data: set eval_ratio above 0, or eval_data_path"
        if self.lr_scheduler_type in FOLLOW_THE_METRIC and not (self.eval_ratio or self.eval_data_path):
            yield (
                f"lr_scheduler_type: {self.lr_scheduler_type} follows best_metric on held-out data: set eval_ratio "
                "above 0, or eval_data_path"
            )
        if self.mine_hard_negatives > max(0, self.mining_rank_max - self.mining_rank_min + 1):
            yield (
                f"mine_hard_negatives: {self.mine_hard_negatives} do not fit the ranks from mining_rank_min "
                f"{self.mining_rank_min} to mining_rank_max {self.mining_rank_max}"
            )
        if self.merge_adapter and self.adapter_side == "query":
            yield (
                "merge_adapter and adapter_side query: merged weights would move the documents too, which the adapter "
                "keeps where they are; choose one"
            )
        if isinstance(self.prompt, dict) and (wrong := set(self.prompt) - set(COLUMNS)):
            yield f"prompt: unknown column {', '.join(sorted(wrong))}; columns are {', '.join(COLUMNS)}"
