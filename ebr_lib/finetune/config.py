"""Knobs of fine-tuning."""

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
    HUB,
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
from ebr_lib.names import (
    COLUMNS,
    Backend,
    BestMetric,
    Choice,
    Column,
    Hub,
    MiningChoice,
    NoiseKind,
    OnBadRow,
    OnChangedVectors,
    Tracker,
)


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
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    data_path: Places = knob(
        "./train_text",
        "Training pairs: a file (JSON, JSONL, CSV, TSV or Parquet, also gzipped), a folder of such files (without its "
        "subfolders), or a list of these.",
        "训练数据：文件（JSON、JSONL、CSV、TSV、Parquet，可用 gzip 压缩）、存放这些文件的目录（不读子目录），或由它们组成的列表。",
    )
    eval_data_path: Places | None = knob(
        None,
        "Held-out pairs in the same formats; null splits `eval_ratio` off the training data, with no text in both parts.",
        "验证数据，格式相同；null 从训练数据中划出 `eval_ratio`，同一文本不会同时出现在两边。",
    )
    output_dir: Place = knob(
        "./saved_model",
        "Output folder; the model is saved in it as `<model>-peft-lora/`.",
        "输出目录，模型保存为其中的 `<模型名>-peft-lora/`。",
    )
    on_bad_row: OnBadRow = knob(
        "error",
        "For an unusable row: error stops; skip counts it and writes it to a reject file.",
        "遇到无法使用的行：error 报错停止；skip 跳过、计数并写入拒收文件。",
    )
    label_column: Name | None = knob(None, *LABEL_COLUMN)
    prompt: str | dict[str, str] | None = knob(
        None,
        "Prompt prepended to every text, or one per column: `{anchor: 'query: ', positive: 'passage: '}`. Saved with the "
        "model. null keeps the model's own.",
        "加在每段文本前的提示词；也可按列给出：`{anchor: 'query: ', positive: 'passage: '}`。随模型保存。null 沿用模型自带的提示词。",
    )
    max_seq_length: Length = knob(
        256, "Maximum tokens per text, prompt included.", "每段文本的最大 token 数（含提示词），超出部分截断。"
    )
    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.1,
        "Share of anchors held out for evaluation; 0 trains on all and evaluates nothing.",
        "留作验证的 anchor 比例；0 表示全部用于训练、不评估。",
    )
    # LoRA
    lora_r: Annotated[int, Field(ge=1, le=1024)] = knob(16, "Rank of the adapter.", "LoRA 的秩。")
    lora_alpha: Annotated[int, Field(ge=1)] = knob(
        32,
        "LoRA scaling: alpha / √r, or alpha / r without `use_rslora`.",
        "LoRA 缩放系数，实际缩放为 alpha / √r；关闭 `use_rslora` 时为 alpha / r。",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.1, "Dropout on the adapter's input during training.", "训练时 LoRA 输入上的 dropout。"
    )
    use_dora: bool = knob(False, "Use DoRA (weight-decomposed LoRA).", "使用 DoRA（权重分解的 LoRA）。")
    use_rslora: bool = knob(
        True,
        "Use rsLoRA: scale by alpha / √r instead of alpha / r, which learns faster at the same learning rate.",
        "使用 rsLoRA：缩放为 alpha / √r 而不是 alpha / r，学习率相同时学得更快。",
    )
    adapter_side: Literal["both", "query"] = knob(
        "both",
        "query: apply the adapter to queries only. Documents keep the base model's vectors, so an encoded and indexed "
        "catalogue stays valid.",
        "query：只对查询训练并使用适配器，文档保持基座模型的向量，已编码、已建索引的商品库继续有效。",
    )
    merge_adapter: bool = knob(
        False, "Also save a merged model as `<model>-merged/`.", "另存一份合并后的完整模型 `<模型名>-merged/`。"
    )
    # loss
    temperature: Literal["auto"] | MoreThanZero = knob(
        "auto",
        "Temperature that cosines are divided by; 0.05 is a scale of 20. auto takes the one, from 0.01 to 0.1, at which "
        "the model's own loss on a sample of the training pairs is smallest before training.",
        "温度：余弦相似度除以该值；0.05 即放大 20 倍。auto 在 0.01 到 0.1 之间选取训练前模型在部分训练样本上损失最小的温度。",
    )
    adapter_strength: Literal["auto"] | Share = knob(
        "auto",
        "Share of the adapter that is saved: 1 as it was trained, 0 none of it. auto measures 0, 0.25, 0.5, 0.75 and 1 on "
        "one half of the held-out queries, saves the best by `best_metric` (nDCG@10 for loss), and reports on the other "
        "half; with fewer than 100 held-out queries, 1 unless it is worse than 0.",
        "保存适配器的多大比例：1 为训练所得，0 为完全不用。auto 在一半验证查询上测 0、0.25、0.5、0.75、1，按 `best_metric`（为 loss 时按 nDCG@10）"
        "保存最好的，另一半用于报告；验证查询不足 100 条时取 1，除非它比 0 差。",
    )
    guard_data_path: Places | None = knob(
        None,
        "A search of a more general kind, against forgetting: a BEIR folder, or pairs in the formats of training data. "
        "`adapter_strength: auto` takes no strength that costs more nDCG@10 there than `guard_tolerance`.",
        "防遗忘集：更通用的检索任务，BEIR 目录，或与训练数据同格式的样本对。`adapter_strength: auto` 不会选使其 nDCG@10 "
        "下降超过 `guard_tolerance` 的强度。",
    )
    guard_tolerance: Share = knob(0.01, "Largest loss of nDCG@10 on the guard.", "防遗忘集上允许下降的 nDCG@10。")
    replay_data_path: Places | None = knob(
        None,
        "Replay, against forgetting: pairs of a more general or an earlier kind, in the formats of training data, of which "
        "every batch holds `replay_share`. Rows that ask what is held out or guarded are left out.",
        "回放，防遗忘：更通用或更早的样本对，格式与训练数据相同，每批都含 `replay_share` 的比例。与验证集、防遗忘集查询相同的行不用。",
    )
    replay_share: Annotated[float, Field(gt=0, lt=1)] = knob(
        0.2,
        "Share of each batch that is replayed. An epoch still uses every training row once, so it has more steps.",
        "每批中回放样本的比例。每轮仍用到所有训练行，因此步数变多。",
    )
    drift_weight: NotNegative = knob(
        0.0,
        "Against forgetting, without other data: weight of how far training moves the vectors of its texts, and of random "
        "words, from what they were before. Higher keeps more of the model and learns less; 0 lets all move freely.",
        "防遗忘，无需其他数据：训练文本与随机词的向量偏离训练前多远，以该权重计入损失。越大保留原模型越多、学到的越少；0 表示不约束。",
    )
    contrastive_batch_size: Count = knob(
        0,
        "Pairs per contrastive batch, embedded `train_batch_size` at a time (GradCache); 0 means `train_batch_size`.",
        "互为负样本的样本对数，每次只前向 `train_batch_size` 对（GradCache）；0 表示等于 `train_batch_size`。",
    )
    mask_known_positives: bool = knob(
        True,
        "Never use a known positive of an anchor as its negative.",
        "某 anchor 在训练数据中的已知正例，不会被当作它的负样本。",
    )
    balanced_batches: bool = knob(
        True,
        "Spread the rows of popular documents evenly over the batches; every epoch uses every row.",
        "把热门文档的样本均匀分到各批；每轮都用到所有行。",
    )
    one_file_batches: bool = knob(
        False,
        "Fill each batch from one training file, so that negatives are of the same kind.",
        "每批只取自同一个训练文件，使负样本属于同一类数据。",
    )
    shares: dict[str, MoreThanZero] = knob(
        {},
        "Share of each epoch that a training file or folder gives, by its path or file name: `{clicks.jsonl: 0.7}`. An "
        "epoch has as many rows as there are; files without a share split the rest by their rows.",
        "每轮中各训练文件或目录所占比例，按路径或文件名给出：`{clicks.jsonl: 0.7}`。每轮总行数不变，未列出的文件按行数分配余下部分。",
    )
    packed_rows: bool = knob(
        True,
        "Pack several texts into one row under a block-diagonal mask: same loss and gradients, no padding. Models whose "
        "vectors would differ use padding, with a line in the log.",
        "训练时把多条文本拼进一行（块对角掩码）：损失与梯度不变，没有填充。若模型的向量会因此不同，则自动改用填充，并写入日志。",
    )
    matryoshka_dims: tuple[Positive, ...] = knob(
        [],
        "Also train vectors truncated to these dimensions (Matryoshka).",
        "同时训练截断到这些维度的向量（Matryoshka）。",
    )
    matryoshka_weights: tuple[NotNegative, ...] = knob(
        [],
        "Weight of each of `matryoshka_dims`, in their order; empty weighs all alike. Whole vectors that are not listed "
        "weigh 1.",
        "`matryoshka_dims` 各维度的损失权重，顺序相同；留空则相同。没有列出的完整维度权重为 1。",
    )
    logq_correction: bool = knob(
        False,
        "logQ correction: take ln(expected count in a batch) off each document's logit, so that popular documents are "
        "not pushed away for being frequent negatives.",
        "logQ 校正：每个文档的 logit 减去 ln(它在一批中的期望次数)，热门文档不会仅因常作负例而被压低。",
    )
    false_negative_margin: Annotated[float, Field(ge=-1, le=1)] | None = knob(
        None,
        "Leave a document of the batch out of an anchor's negatives if the untrained base finds its cosine above the "
        "positive's by more than this (GIST). null turns it off.",
        "假负例：未训练的基座认为批内某文档与 anchor 的余弦比正例高出该值以上时，不把它当负例（GIST）。null 关闭。",
    )
    guide_model: Place | None = knob(
        None,
        "Model that judges `false_negative_margin`, with its own prompts; null takes the base.",
        "判断 `false_negative_margin` 的模型，使用它自己的提示词；null 用基座模型。",
    )
    bidirectional_loss: bool = knob(
        False,
        "Also find the anchor of each positive among the batch's anchors, and take the mean of both losses; for "
        "item-to-item pairs.",
        "双向损失：同时在批内 anchor 中找每个正例对应的 anchor，取两者平均；适合商品到商品的数据。",
    )
    # a teacher
    distill_weight: NotNegative = knob(
        0.0,
        "Weight of learning from a teacher: KL to its `pos_scores` and `neg_scores` over each row's own documents, beside "
        "the contrastive loss. 0 ignores the scores.",
        "向教师学习的权重：在每行自己的文档上，对 `pos_scores`、`neg_scores` 做 KL 散度，与对比损失相加；0 表示不使用这些分数。",
    )
    distill_temperature: MoreThanZero = knob(
        1.0,
        "The teacher's scores (raw logits) are divided by this before their softmax; higher is softer.",
        "教师分数（原始 logits）在 softmax 前除以该值；越大分布越平缓。",
    )
    # hard negatives
    mine_hard_negatives: Count = knob(
        0,
        "Hard negatives per row, mined with the current model before training from the training documents and "
        "`mining_corpus_path`; 0 mines none. The rows are saved as `mined_negatives.jsonl`.",
        "每行的难负例个数，训练前用当前模型从训练数据的文档与 `mining_corpus_path` 中挖掘；0 表示不挖掘。结果另存为 `mined_negatives.jsonl`。",
    )
    mining_corpus_path: Place | None = knob(
        None,
        "Catalogue to mine in besides the training documents: a table with a header row (Hive text, CSV, TSV, JSON, "
        "Parquet), or an embedding file of this model, whose vectors are used. Held-out texts are left out.",
        "除训练文档外还从中挖掘的商品库：带表头的表格（Hive 文本、CSV、TSV、JSON、Parquet），或由该模型生成的向量文件（直接使用其向量）。不含验证集文本。",
    )
    mining_corpus_column: Name | None = knob(
        None,
        "Its column with the text; null takes the one that was encoded, or looks for text, description, document, "
        "passage, positive or content.",
        "商品库的文本列；null 取编码时的列，或依次查找 text、description、document、passage、positive、content。",
    )
    mining_choice: MiningChoice = knob(
        "top",
        "top takes the nearest candidates within the ranks, random draws them by `seed`.",
        "在名次范围内如何选取：top 取最近的，random 按 `seed` 随机抽取。",
    )
    mining_rank_min: Positive = knob(
        1,
        "First rank to mine; 1 is the nearest document that is not a known positive.",
        "从第几名开始挖掘；第 1 名是不在已知正例中的最近文档。",
    )
    mining_rank_max: Positive = knob(50, "Last rank to mine.", "挖掘到第几名为止。")
    mining_margin: Share | None = knob(
        0.05,
        "Guard against false negatives: a mined document's cosine must be lower than the positive's by this share of it; "
        "null sets no limit.",
        "防止假负例：挖到的文档与 anchor 的余弦须比正例低这一比例；null 不限制。",
    )
    reranker_name: Place | None = knob(
        None,
        "Cross-encoder that looks at the rows before training: mined candidates that it scores as high as a positive are "
        "left out, and its scores of positives and negatives are a teacher's (`pos_scores`, `neg_scores`).",
        "训练前用来把关的重排模型（cross-encoder）：得分不低于正例的候选不会被当作负例；它给正例与负例打的分（`pos_scores`、`neg_scores`）还可用于蒸馏。",
    )
    reranker_margin: NotNegative = knob(
        0.0,
        "Raw logits that a mined negative must score below its anchor's lowest positive.",
        "挖到的负例在重排模型下须比该 anchor 得分最低的正例低多少（原始 logit）。",
    )
    positive_rank_max: Positive | None = knob(
        None,
        "Noisy positives: drop training rows whose positive ranks below this for the current model, among the documents "
        "that are mined in; they are written to `noisy_positives.jsonl` in `output_dir`. null keeps all rows.",
        "噪声正例：当前模型在被挖掘的文档中把正例排在该名次之后的训练行会被去掉，并写入 `output_dir` 下的 `noisy_positives.jsonl`。null 保留全部。",
    )
    # optimisation
    num_epochs: MoreThanZero = knob(1, "Epochs; may be a fraction.", "训练轮数，可以是小数。")
    train_batch_size: Positive = knob(6, "Pairs per device and step.", "每个设备每步的样本对数。")
    eval_batch_size: Positive | None = knob(
        None,
        "Pairs embedded at a time for the held-out loss. It always compares as many pairs as a training batch; null "
        "embeds as in training.",
        "计算验证损失时每次前向的样本对数；互相比较的样本对数始终与训练批相同。null 与训练一致。",
    )
    learning_rate: MoreThanZero = knob(2e-4, "Peak learning rate.", "学习率峰值。")
    weight_decay: NotNegative = knob(
        0.01, "AdamW weight decay on the adapter matrices.", "AdamW 对 LoRA 矩阵的权重衰减。"
    )
    l1_regularization: NotNegative = knob(
        0.0,
        "Weight of the L1 penalty, the sum of |w| over the adapter; added to the loss and logged separately.",
        "L1 惩罚（LoRA 参数绝对值之和）的权重；加入损失并单独记录。",
    )
    max_grad_norm: NotNegative = knob(
        1.0, "Clip gradients to this norm; 0 turns clipping off.", "梯度裁剪的范数上限；0 表示不裁剪。"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.0,
        "Label smoothing: share of the target spread evenly over all documents in the batch.",
        "标签平滑：目标中均分给批内所有文档的比例。",
    )
    lr_scheduler_type: Scheduler = knob(
        "linear",
        "Learning rate schedule. `reduce_lr_on_plateau` and `greedy` lower it when `best_metric` has not improved for three "
        "evaluations; these two and `constant` have no warm-up. `cosine_with_restarts` has one cycle per epoch, at least "
        "two; `polynomial` decays with the square of the remaining steps.",
        "学习率调度方式。`reduce_lr_on_plateau` 与 `greedy` 在 `best_metric` 连续三次评估未提升时降低学习率；"
        "这两种与 `constant` 没有预热。`cosine_with_restarts` 每轮一个周期（至少两个）；"
        "`polynomial` 按剩余步数的平方下降。",
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = knob(
        0.0, "Share of the steps used for learning rate warm-up.", "学习率预热占总步数的比例。"
    )
    gradient_accumulation_steps: Positive = knob(
        1,
        "Batches per optimizer step; negatives come from the same batch only.",
        "梯度累积步数；负样本仍只来自同一批。",
    )
    gradient_checkpointing: bool = knob(
        False,
        "Recompute the activations of every other layer in the backward pass: less memory, about 25 % more time.",
        "反向传播时重算一半层的激活：省显存，耗时约增加四分之一。",
    )
    fp16: bool = knob(
        False,
        "Half precision if the hardware has it, otherwise the closest that works.",
        "半精度；硬件不支持时改用最接近的可用精度。",
    )
    bf16: bool | None = knob(
        None,
        "bfloat16 if the hardware has it, otherwise float32; null is true, unless fp16 is set.",
        "bfloat16；硬件不支持时用 float32；null 等同 true，设了 fp16 时除外。",
    )
    dataloader_num_workers: Count = knob(
        0, "Processes that prepare batches; 0 uses the main process.", "准备数据的进程数；0 表示由主进程准备。"
    )
    dataloader_pin_memory: bool = knob(
        True, "Pin host memory for faster copies to the GPU.", "使用锁页内存，加快向 GPU 拷贝。"
    )
    # noise
    noise_enabled: bool = knob(
        False, "Add noise to the training texts, drawn again each epoch.", "对训练文本加噪，每轮重新抽取。"
    )
    noise_type: NoiseKind = knob(
        "random_delete",
        "Delete words, swap neighbouring words, or delete characters.",
        "加噪方式：随机删词、交换相邻词、随机删字符。",
    )
    noise_prob: Share = knob(
        0.1,
        "Share of samples that get noise, in all columns of `noise_apply_to_fields`.",
        "加噪样本的比例；被选中的样本在 `noise_apply_to_fields` 的各列上都加噪。",
    )
    noise_strength: Share = knob(
        0.1, "Share of the words or characters that change in a text with noise.", "被加噪文本中改动的词或字符比例。"
    )
    noise_apply_to_fields: tuple[Column, ...] = knob(["anchor", "positive"], "Columns that get noise.", "加噪的列。")
    # evaluation and stopping
    early_stopping_patience: Count = knob(
        0,
        "Evaluations without improvement before training stops; 0 turns early stopping off.",
        "连续多少次评估没有提升就停止训练；0 表示不早停。",
    )
    early_stopping_threshold: NotNegative = knob(0.0, "Smallest improvement that counts.", "算作提升的最小幅度。")
    eval_steps: Count = knob(
        0, "Steps between evaluations; 0 evaluates after each epoch.", "评估间隔步数；0 表示每轮结束时评估。"
    )
    best_metric: BestMetric = knob(
        "ndcg@10", "Held-out metric that selects which weights to keep.", "用于选择保留哪一步权重的验证指标。"
    )
    eval_corpus_size: Positive = knob(
        2000,
        "Documents in the held-out search: all held-out documents plus a sample of the training documents.",
        "验证检索的文档数：验证集的全部文档，加上抽样的训练文档。",
    )
    leave_out_own: Literal["text", "none"] = knob(
        "text",
        "text: leave documents with the text of a held-out anchor out of its answers and its ranking, because it would "
        "find itself; none keeps them.",
        "text：把与验证 anchor 文本相同的文档从其答案和排序中去掉（否则只是找到自己）；none 全部保留。",
    )
    resume_from_checkpoint: Literal["no", "auto"] = knob(
        "no", "auto: resume from the last checkpoint of an interrupted run.", "auto：从上次中断的检查点继续训练。"
    )
    save_steps: Count = knob(
        0, "Steps between checkpoints; 0 saves after each epoch.", "检查点间隔步数；0 表示每轮结束时保存。"
    )
    report_to: tuple[Tracker, ...] = knob(
        [],
        "Experiment trackers to log to besides `training_log.jsonl`; tensorboard writes to `tensorboard/` in `output_dir`.",
        "除 `training_log.jsonl` 外还写入的实验跟踪工具；tensorboard 写在 `output_dir` 下的 `tensorboard/`。",
    )
    run_name: Name | None = knob(
        None,
        "Name of this run in the trackers; null takes the model's name and the time.",
        "该次运行在跟踪工具中的名称；null 用模型名加时间。",
    )
    backend: Backend = knob("auto", *BACKEND)
    memory_limit_gb: NotNegative = knob(
        0.0,
        "Without a GPU, treat more resident memory than this (in GB) as out of memory; 0 sets no limit.",
        "无 GPU 时，常驻内存超过该值（GB）即按内存不足处理；0 表示不限制。",
    )
    seed: Seed = knob(
        42,
        "Random seed of the split, the order, the noise and the adapter.",
        "随机种子：划分、顺序、噪声与适配器初始化。",
    )

    @property
    def compared(self) -> int:
        """Pairs that are compared with each other."""
        return self.contrastive_batch_size or self.train_batch_size

    @property
    def embedded(self) -> int | None:
        """How many of them are embedded at a time; None is all."""
        return self.train_batch_size if self.contrastive_batch_size else None

    def conflicts(self) -> Iterator[str]:
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            yield (
                f"matryoshka_weights: {len(self.matryoshka_weights)} weights for {len(self.matryoshka_dims)} "
                "matryoshka_dims; give one for each"
            )
        if self.matryoshka_weights and not any(self.matryoshka_weights):
            yield "matryoshka_weights: one has to be above 0"
        if self.guide_model and self.false_negative_margin is None:
            yield "guide_model judges false_negative_margin: set that too, such as to 0"
        if self.fp16 and self.bf16:
            yield "fp16 and bf16: choose one"
        if self.early_stopping_patience and not (self.eval_ratio or self.eval_data_path):
            yield "early_stopping_patience needs held-out data: set eval_ratio above 0, or eval_data_path"
        if self.lr_scheduler_type in FOLLOW_THE_METRIC and not (self.eval_ratio or self.eval_data_path):
            yield (
                f"lr_scheduler_type: {self.lr_scheduler_type} needs held-out data for best_metric: set eval_ratio above 0, "
                "or eval_data_path"
            )
        yield from self._data_conflicts()
        if self.merge_adapter and self.adapter_side == "query":
            yield ("merge_adapter and adapter_side query: merging would change document vectors too; choose one")
        if isinstance(self.prompt, dict) and (wrong := set(self.prompt) - set(COLUMNS)):
            yield f"prompt: unknown column {', '.join(sorted(wrong))}; columns are {', '.join(COLUMNS)}"

    def _data_conflicts(self) -> Iterator[str]:
        if self.mine_hard_negatives > max(0, self.mining_rank_max - self.mining_rank_min + 1):
            yield (
                f"mine_hard_negatives: {self.mine_hard_negatives} is more than the ranks from mining_rank_min "
                f"{self.mining_rank_min} to mining_rank_max {self.mining_rank_max}"
            )
        if (self.shares or self.one_file_batches or self.replay_data_path) and not self.balanced_batches:
            yield "shares, one_file_batches and replay_data_path need balanced_batches"
        if self.replay_data_path and self.compared < 2:
            yield "replay_data_path needs batches of at least 2 pairs: raise train_batch_size or contrastive_batch_size"
        if (total := sum(self.shares.values())) > 1.000001:
            yield f"shares add up to {total:g}; wanted at most 1"
        if self.mining_corpus_path and not (self.mine_hard_negatives or self.positive_rank_max):
            yield "mining_corpus_path does nothing alone: set mine_hard_negatives or positive_rank_max"
        if self.reranker_name and not (self.mine_hard_negatives or self.distill_weight):
            yield "reranker_name does nothing alone: set mine_hard_negatives or distill_weight"
        if self.logq_correction and (self.shares or self.one_file_batches):
            yield (
                "logq_correction needs every row once per epoch, in batches of all files: turn off shares and "
                "one_file_batches"
            )
