"""One dataclass a stage: every knob of the workflow is defined here and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.knobs import Config, knob
from ebr_lib.model.precision import Asked, Backend
from ebr_lib.model.remote_code import Choice
from ebr_lib.model.schedulers import FOLLOW_THE_METRIC, Scheduler
from ebr_lib.names import COLUMNS, BestMetric, Column, LeaveOutOwn, NoiseKind, OnBadRow, OnChangedVectors

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


@dataclass(frozen=True)
class InferenceConfig(Config):
    """Stage 2, `run_batch_inference`: encode a catalogue of Hive text."""

    model_name: Place = knob(
        "all-MiniLM-L6-v2",
        "Model: a fine-tuned folder (`./saved_model/…-peft-lora`), the packaged name, a local folder or a hub name.",
        "模型：微调后的目录（`./saved_model/…-peft-lora`）、内置名称、本地目录或 Hub 名称。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    # input
    data_path: Place = knob("./infer_data", "A file or a folder of delimited text.", "分隔文本文件，或装有它们的目录。")
    file_patterns: tuple[Name, ...] = knob(
        ["*.csv", "*.csv.gz", "*.csv.bz2", "*.csv.zst", "*.tsv", "*.parquet", "*.orc", "part-[0-9]*", "0*_[0-9]*"],
        "Which files of a folder are read; `0*_[0-9]*` are Hive's own parts (`000000_0_copy_1`, `000002_1000`). "
        "The log names what is left out.",
        "读取目录中的哪些文件；`0*_[0-9]*` 即 Hive 原始分片（`000000_0_copy_1`、`000002_1000`）。未读取的文件会写入日志。",
    )
    description_column: Name = knob("description", "Column whose text is encoded.", "要编码的文本列。")
    columns: tuple[Name, ...] = knob(
        [],
        "Column names of files without a header row; empty takes each file's first row.",
        "无表头文件的列名；留空表示每个文件首行为表头。",
    )
    delimiter: Name = knob(
        "\\001",
        "One character between fields; `\\001` and `\\t` may be spelled so.",
        "字段分隔符（单字符），可写作 `\\001`、`\\t`。",
    )
    encoding: Literal["auto", "utf-8", "gbk", "gb18030"] = knob(
        "auto", "Encoding of the input; auto tells UTF-8 from GB18030.", "输入编码；auto 自动区分 UTF-8 与 GB18030。"
    )
    quoting: Literal["auto", "none", "csv"] = knob(
        "auto",
        "Fields in quotes as in CSV (RFC 4180); auto reads them with commas, and with tabs and other signs in files named "
        "`.csv` or `.tsv` where all quotes of the first rows enclose fields; with \\001, and with `heal_rows`, a quote is "
        "a letter.",
        "字段是否可带引号（CSV，RFC 4180）；auto：逗号分隔，以及名为 `.csv`、`.tsv`、且前若干行引号均成对包住字段的制表符等分隔文件按引号解析；"
        "\\001 分隔或 `heal_rows` 时引号为普通字符。",
    )
    escaped_by: Name | None = knob(
        None,
        "Character that takes the next one as it is, as in Hive's ESCAPED BY (`\\`); `n` after it is a newline.",
        "转义字符，同 Hive 的 ESCAPED BY（`\\`），其后的 `n` 表示换行；null 表示不转义。",
    )
    heal_rows: bool = knob(
        False,
        "Join lines that a newline inside a field has broken, a space in its place; otherwise they are rejected.",
        "把被字段内换行拆断的行接回（换行变为空格）；否则进入拒绝文件。",
    )
    on_empty_text: Literal["skip", "empty", "error"] = knob(
        "skip",
        "A null or blank text: skip it (to the rejects), keep the row with an empty vector, or stop.",
        "文本为空或 \\N 时：跳过（进入拒绝文件）、保留该行但向量留空、或报错停止。",
    )
    max_rejected_share: Share = knob(
        0.05,
        "More rows than this share that cannot be read are an error, and the output stays as it was; large input is "
        "sampled first. Rows skipped for an empty text do not count.",
        "无法读取的行超过该比例时报错，原有输出保持不变；数据量大时先抽样检查。因文本为空而跳过的行不计。",
    )
    # output
    output_path: Place = knob(
        "./faiss/embeds_2.txt",
        "The embedding file to write; .parquet and .npy by their ending, text otherwise.",
        "输出的向量文件；按后缀写 .parquet、.npy，其余为文本。",
    )
    output_columns: tuple[Name, ...] = knob(
        [], "Columns kept beside the vector, in this order; empty keeps all.", "输出中保留的列及顺序；留空保留全部。"
    )
    output_header: bool = knob(
        True,
        "Begin text with a row of the column names; false for files that a Hive table loads.",
        "文本输出是否带表头行；供 Hive 表加载的文件设为 false。",
    )
    append: bool = knob(
        False,
        "Add the files that the finished output does not hold yet.",
        "在已完成的输出后追加新增文件。",
    )
    restart: bool = knob(
        False, "Drop an unfinished run instead of continuing it.", "放弃未完成的运行，从头开始（默认断点续跑）。"
    )
    # encoding
    prompt: str | None = knob(
        None,
        "Put before every text; null takes what the model was trained with.",
        "加在每段文本前的提示词；null 使用模型训练时的提示词。",
    )
    max_seq_length: Length | None = knob(None, *OWN_LENGTH)
    normalize: bool = knob(True, "Scale every vector to length 1.", "把向量归一化为单位长度。")
    truncate_dim: Positive | None = knob(
        None,
        "Keep the first dimensions of a Matryoshka model, normalised after the cut.",
        "只保留前若干维（Matryoshka 模型），截断后再归一化。",
    )
    precision: Asked = knob("auto", *PRECISION)
    backend: Backend = knob("auto", *BACKEND)
    batch_tokens: Annotated[int, Field(ge=16)] | None = knob(
        None,
        "Tokens a batch, padding included; null takes what measured fastest. Lower it when memory runs out.",
        "每批 token 数（含填充）；null 使用实测最快的值。显存不足时调小。",
    )
    device: str | None = knob(None, *DEVICE)
    num_processes: Count = knob(
        0, "Processes that encode; 0 takes one a GPU, one on a CPU.", "编码进程数；0 表示每块 GPU 一个，CPU 一个。"
    )
    engine: Literal["local", "ray"] = knob(
        "local",
        "This machine, or a Ray cluster: input files are shards, the output is a folder of part files.",
        "本机运行，或在 Ray 集群上运行（每个输入文件为一个分片，输出为分片文件目录）。",
    )
    num_actors: Count = knob(
        0,
        "Workers of the Ray cluster; 0 takes one a GPU, or one on CPUs.",
        "Ray 工作进程数；0 表示每块 GPU 一个，无 GPU 时一个。",
    )
    ray_address: str | None = knob(
        None, "An existing cluster (`auto`, `ray://…`); null starts one here.", "已有集群的地址；null 在本机启动。"
    )
    window_rows: Positive = knob(
        16384,
        "Rows held in memory at once, sorted by length, encoded and brought to the disk together.",
        "一次载入内存的行数；按长度排序、编码后一起落盘，也是断点续跑的单位。",
    )

    def conflicts(self) -> Iterator[str]:
        yield from self._format_conflicts()
        yield from self._engine_conflicts()

    def _format_conflicts(self) -> Iterator[str]:
        if len(delimiter_byte(self.delimiter)) != 1:
            yield f"delimiter: {self.delimiter!r} is not one ASCII character"
        elif delimiter_byte(self.delimiter) in (b"\n", b"\r"):
            yield "delimiter: a newline ends rows"
        elif self.encoding.startswith("gb") and delimiter_byte(self.delimiter) >= b"0":
            yield f"delimiter: {self.delimiter!r} can be the second byte of a GBK character; use one below '0', like \\001"
        yield from self._quoting_conflicts()
        if self.columns and self.description_column not in self.columns:
            yield f"columns: {', '.join(self.columns)} do not hold description_column {self.description_column!r}"
        if len(set(self.columns)) != len(self.columns):
            yield "columns: a name is there twice"
        if len(set(self.output_columns)) != len(self.output_columns):
            yield "output_columns: a name is there twice"
        if self.output_path.endswith((".gz", ".bz2", ".xz", ".zst", ".zip")):
            yield f"output_path: {self.output_path!r} is said to be compressed, and no format is; give .txt or .parquet"
        if not self.output_header and self.output_path.lower().endswith((".parquet", ".npy")):
            yield f"output_header: only text has a header row, and {self.output_path!r} is not text; leave it out"
        if "vector" in self.output_columns:
            yield "output_columns: `vector` is the name of the column that is written; rename the input's"

    def _quoting_conflicts(self) -> Iterator[str]:
        sign = escape_byte(self.escaped_by)
        if sign is not None and (
            len(sign) != 1 or sign.isspace() or sign == b'"' or sign == delimiter_byte(self.delimiter)
        ):
            yield f"escaped_by: {self.escaped_by!r} is not one ASCII character other than the delimiter, a quote or a space"
        if self.quoting == "csv" and self.delimiter == '"':
            yield "quoting: the delimiter is the quote itself"
        if self.heal_rows and (self.quoting == "csv" or self.escaped_by):
            yield "heal_rows: joins rows of plain text; with quoting: csv or escaped_by, newlines in fields are read as they are"

    def _engine_conflicts(self) -> Iterator[str]:
        if self.append and self.restart:
            yield "append and restart: choose one"
        if self.engine == "ray" and self.append:
            yield "append: engine ray writes a part a file; run the new files into another output_path"
        if self.engine == "ray" and self.num_processes:
            yield "num_processes: engine ray is told num_actors"
        if self.engine == "local" and (self.num_actors or self.ray_address):
            yield "num_actors, ray_address: only engine ray reads them"


def delimiter_byte(text: str) -> bytes:
    """The byte that a delimiter knob means: a character itself, or an escape like `\\001`, `\\x01`, `\\t`."""
    spelled = {"\\t": b"\t", "\\a": b"\a"}
    if octal := re.fullmatch(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{3}))", text):
        return bytes([int(octal[1], 16) if octal[1] else int(octal[2], 8) % 256])
    return spelled.get(text, text.encode() if text.isascii() else b"")


def escape_byte(text: str | None) -> bytes | None:
    """The byte that `escaped_by` means; a backslash may be spelled `\\\\`, as in a CREATE TABLE."""
    return None if text is None else b"\\" if text == "\\\\" else delimiter_byte(text)


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


@dataclass(frozen=True)
class EvalConfig(Config):
    """Extension, `evaluate_retrieval`: did retrieval get better?"""

    # what is measured
    models: tuple[Place, ...] = knob(
        ["all-MiniLM-L6-v2"],
        "Models to measure side by side: fine-tuned folders, local folders, hub names; the first is what the others are compared with.",
        "并排评估的模型（微调目录、本地目录或 Hub 名称）；第一个为对照基线。",
    )
    bm25: bool = knob(
        True,
        "Measure BM25 too: the floor that an embedding model has to beat.",
        "同时评估 BM25（向量模型至少应超过它）；中文用 jieba 分词。",
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
        "File of documents, or an embedding file of the inference stage, whose vectors are used for the model that made them.",
        "文档文件，或推理阶段的向量文件（向量只用于生成它的模型）。",
    )
    qrels_path: Place | None = knob(
        None,
        "Judgements: `query document grade` per line, as BEIR or TREC write them, or JSON, CSV or Parquet with the "
        "columns query-id, corpus-id and score.",
        "相关性标注：每行 `query document grade`（BEIR 或 TREC 格式），或含 query-id、corpus-id、score 列的 JSON、CSV、Parquet。",
    )
    train_data_path: Places | None = knob(
        None,
        "Training data, to measure queries with seen and unseen documents apart, and to report queries that training had.",
        "训练数据：用于区分见过与未见过的文档，并报告训练集中已有的查询。",
    )
    label_column: Name | None = knob(None, *LABEL_COLUMN)
    query_column: Name | None = knob(None, *QUERY_COLUMN)
    corpus_column: Name | None = knob(
        None,
        "Column of the document's text; null takes text, description, document, passage, positive or content.",
        "文档文本列；null 自动识别。",
    )
    id_column: Name | None = knob(
        None,
        "Column of the documents' ids, and of the queries' where their file has it; null takes _id, id, doc_id or docid, "
        "and of queries query_id or qid.",
        "文档的 ID 列（查询文件中也有该列时同样使用）；null 取 _id、id、doc_id 或 docid（查询为 query_id 或 qid）。",
    )
    leave_out_own: LeaveOutOwn = knob(
        "text_and_id",
        "Documents that are the query itself, left out of its answers and its ranking: those of its text, and where "
        "judgements name ids those of its id; text where queries and documents are numbered apart, none keeps all.",
        "查询自身对应的文档不算答案、也不参与排序：文本相同的，以及按 ID 标注时 ID 相同的；查询与文档各自编号时用 text，none 全部保留。",
    )
    slice_columns: tuple[Name, ...] = knob(
        [], "Columns of the query file whose values are measured apart.", "按这些查询列的取值分组评估。"
    )
    # encoding
    query_prompt: str | None = knob(None, *QUERY_PROMPT)
    document_prompt: str | None = knob(
        None,
        "Put before every document; null takes what each model was trained with.",
        "加在文档前的提示词；null 使用模型训练时的提示词。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    on_changed_vectors: OnChangedVectors = knob("error", *CHANGED_VECTORS)
    max_seq_length: Length | None = knob(None, *OWN_LENGTH)
    truncate_dim: Positive | None = knob(
        None, "Keep the first dimensions of a Matryoshka model.", "只保留前若干维（Matryoshka 模型）。"
    )
    precision: Asked = knob("auto", *PRECISION)
    backend: Backend = knob("auto", *BACKEND)
    device: str | None = knob(None, *DEVICE)
    # measures and report
    ks: tuple[Annotated[int, Field(ge=1, le=100)], ...] = knob(
        [1, 5, 10, 50, 100], "Ranks at which recall and hit rate are taken.", "计算召回率与命中率的截断位置。"
    )
    resamples: Annotated[int, Field(ge=100)] = knob(
        10000,
        "Samples of the bootstrap interval, and sign flips of the permutation test.",
        "自助法区间与置换检验的重采样次数。",
    )
    examples: Count = knob(10, "Queries to show that were won most, and lost most.", "展示提升最多与下降最多的查询数。")
    seed: Seed = knob(42, "Seed of interval and test.", "区间与检验的随机种子。")
    output_dir: Place = knob(
        "./evaluation",
        "Folder for report.html, report.json, and the runs and judgements in TREC format.",
        "输出目录：report.html、report.json 以及 TREC 格式的排序结果与标注。",
    )

    def conflicts(self) -> Iterator[str]:
        if not self.models and not self.bm25:
            yield "models is empty and bm25 is off: nothing to measure"
        if not (self.data_path or self.queries_path):
            yield "data_path or queries_path: give one"
        if not self.ks:
            yield "ks is empty: give at least one rank"
        if len(set(self.models)) != len(self.models):
            yield "models: a name is there twice"


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


@dataclass(frozen=True)
class Configs:
    """The checked configs of a workflow, shown as tables in a notebook."""

    finetune: FinetuneConfig
    inference: InferenceConfig
    visualize: VisConfig
    evaluate: EvalConfig
    index: IndexConfig
    given: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        return "".join(getattr(self, stage.name)._repr_html_() for stage in fields(self) if stage.name in self.given)


def check_configs(**given: Mapping[str, Any]) -> Configs:
    """Resolve the configs of all stages, and list the mistakes of all of them at once.

    :param given: stage (finetune, inference, visualize, evaluate, index) to its dict; a stage left out has defaults.
    :raises ConfigError: any knob of any stage is unknown or out of range.
    """
    kinds = {f.name: get_type_hints(Configs)[f.name] for f in fields(Configs) if f.name != "given"}
    if unknown := sorted(set(given) - set(kinds)):
        raise ConfigError(f"check_configs: no stage {', '.join(unknown)}; stages are {', '.join(kinds)}")
    resolved, errors = {}, []
    for stage, kind in kinds.items():
        try:
            resolved[stage] = kind.resolve(given.get(stage))
        except (ConfigError, MissingError) as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return Configs(**resolved, given=tuple(given))
