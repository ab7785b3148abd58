"""Stage 1: fine-tune an embedding model with LoRA on pairs, know whether it got better, and save it whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import json
import logging
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ConfigError, DataError, ModelError, NotFiniteError
from ebr_lib.files import check_apart, make_folder, named_when_full, write_json, written_whole
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.processes import from_first_process, is_first_process, training_device, world_size
from ebr_lib.finetune.schedulers import FOLLOW_THE_METRIC
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.main_guard import refuse_script_without_guard
from ebr_lib.names import LOWER_IS_BETTER, METRICS, SMALL_DATA_PRESET
from ebr_lib.tables import TableRepr, as_text, html_picture, make_table

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from ebr_lib.data.pairs import Pair, TrainingRow
    from ebr_lib.finetune.batches import KnownPositives
    from ebr_lib.finetune.doctor import DoctorReport
    from ebr_lib.finetune.heldout import GroupMeans, HeldoutTask
    from ebr_lib.finetune.losses import ContrastiveLoss, HeldoutRows
    from ebr_lib.finetune.trainer import EbrTrainer
    from ebr_lib.model.contract import Contract
    from ebr_lib.model.precision import Dtype, Precision
    from ebr_lib.model.provenance import ModelIdentity

ADAPTER_SUFFIX, MERGED_SUFFIX, CHECKPOINTS_SUFFIX = "-peft-lora", "-merged", "-checkpoints"
CONFIG_FILE, LOG_FILE, CURVE_FILE = "finetune_config.yaml", "training_log.jsonl", "loss_curve.png"
REJECTS_FILE = "rejected_rows.jsonl"
MINED_FILE = "mined_negatives.jsonl"
RUN_FILE = "run.json"
# knobs that say where, how often and how to go on; a resumed run may change them. Of data and models the contents count
FREE_ON_RESUME = (
    "model_name",
    "base_model_path",
    "data_path",
    "eval_data_path",
    "label_column",
    "output_dir",
    "resume_from_checkpoint",
    "merge_adapter",
    "memory_limit_gb",
    "eval_batch_size",
    "dataloader_num_workers",
    "save_steps",
    "on_changed_vectors",
)


@dataclass(frozen=True, repr=False)
class FinetuneResult(TableRepr):
    """What a run wrote and measured.

    `before` and `after` map "all", "seen" and "unseen" (documents that training saw or not) to metric means over the
    held-out anchors; both are empty when nothing was held out. `seconds` is the training alone.
    """

    model_path: str
    merged_path: str | None
    train_rows: int
    heldout_rows: int
    trainable_parameters: int
    steps: int
    seconds: float
    before: GroupMeans
    after: GroupMeans
    doctor: DoctorReport = field(repr=False)
    tables: dict[str, DataFrame] = field(compare=False)

    def __repr__(self) -> str:
        curve = Path(self.model_path) / CURVE_FILE
        return f"{super().__repr__()}\n模型 model: {self.model_path}\n曲线 loss curve: {curve}"

    def _repr_html_(self) -> str:
        model = f"<p>模型 model: <code>{html.escape(self.model_path)}</code></p>"
        return super()._repr_html_() + model + html_picture(Path(self.model_path) / CURVE_FILE, "loss curve")


@dataclass(frozen=True)
class _Data:
    """Rows as the run uses them, and the held-out ones as a retrieval task (None when nothing is held out).

    `sha256` is that of the rows as they were read.
    """

    train: Sequence[TrainingRow]
    heldout: Sequence[TrainingRow]
    task: HeldoutTask | None
    sha256: str


def train_sentence_transformer(config: FinetuneConfig | Mapping[str, Any] | None = None) -> FinetuneResult:
    """Fine-tune with LoRA on the pairs under `data_path`; save to `<output_dir>/<model>-peft-lora/`.

    :param config: a FinetuneConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed).
    :raises DataError: the training data is broken; names file and line.
    :raises ModelError: the model cannot be loaded or trained.
    :raises MissingError: data or model is not there.
    """
    if not is_first_process():
        logger.setLevel(logging.ERROR)  # the first one says it
    config = FinetuneConfig.resolve(config)
    if config.dataloader_num_workers and multiprocessing.get_start_method() != "fork":
        refuse_script_without_guard("preparing batches in processes", "dataloader_num_workers: 0")
    _check_places(config)
    _refuse_other_base(config)
    data = _read(config)
    _set_seed(config.seed)
    model = _model_with_adapter(config)
    _refuse_broken(config, model)
    _refuse_other_base(config)  # again, for a model of the hub is here only now
    config = _as_the_adapter_is(config, model)
    _refuse_what_cannot_be(config, data, model)
    data = _mine(config, data, model)
    config = _with_negatives(config, data.train)
    report = _examine(config, data.train, model)
    start = time.perf_counter()
    before = _measure(config, data.task, model)
    measuring = time.perf_counter() - start
    trainer = _trainer(config, data, model, report)
    seconds = _train(config, data, trainer, measuring)
    _refuse_nan(config, model)
    after = _measured_best(trainer) or _measure(config, data.task, model)
    result = FinetuneResult(
        model_path=str(_place(config, ADAPTER_SUFFIX)),
        merged_path=str(_place(config, MERGED_SUFFIX)) if config.merge_adapter else None,
        train_rows=len(data.train),
        heldout_rows=len(data.heldout),
        trainable_parameters=sum(weight.numel() for weight in trainer.loss.weights),
        steps=trainer.state.global_step,
        seconds=seconds,
        before=before,
        after=after,
        doctor=report,
        tables={"before_after": _before_after(before, after), "data": report.table},
    )
    if trainer.is_world_process_zero():
        _save(config, data, model, result)
        logger.info("%s", as_text(result.tables["before_after"]), extra=RESULT)
        _say_if_worse(config, before, after)
        logger.info("模型已保存 saved: %s", result.model_path)
    return result


def _set_seed(seed: int) -> None:
    from transformers import set_seed  # not before the config and the data are known to be right: it takes its time

    set_seed(seed)


def _place(config: FinetuneConfig, suffix: str) -> Path:
    from ebr_lib.model.packaged import model_label

    label = model_label(config.model_name).removesuffix(ADAPTER_SUFFIX)
    return Path(config.output_dir) / f"{label}{suffix}"


def _check_places(config: FinetuneConfig) -> None:
    """Make sure, before the work, that what will be written can be, in the stead of nothing but such."""
    from ebr_lib.model.contract import CONTRACT_FILE

    folder = make_folder(Path(config.output_dir))
    places = {suffix: _place(config, suffix) for suffix in (ADAPTER_SUFFIX, MERGED_SUFFIX, CHECKPOINTS_SUFFIX)}
    rejects = [folder / name for name in (REJECTS_FILE, f"heldout_{REJECTS_FILE}")]
    check_apart([*places.values(), *rejects], [config.data_path, config.eval_data_path, config.presets])
    for suffix, place in places.items():
        if place.exists() and not place.is_dir():
            raise ConfigError(f"output folder {place} is a file; give another output_dir, or move it")
        is_ours = suffix == CHECKPOINTS_SUFFIX or (place / CONTRACT_FILE).is_file()
        if place.is_dir() and any(place.iterdir()) and not is_ours:
            raise ConfigError(
                f"output folder {place} is replaced as a whole and holds no model of this stage; give another "
                "output_dir, or move it"
            )


def _refuse_other_base(config: FinetuneConfig) -> None:
    """Make sure that a model which will be replaced was trained from the same base, not from another of the same name.

    :raises ConfigError: it was trained from another.
    """
    from ebr_lib.model.bases import look_for_bases_in
    from ebr_lib.model.contract import read_contract

    look_for_bases_in(config.base_model_path)
    base = _base(config)
    for place in (_place(config, ADAPTER_SUFFIX), _place(config, MERGED_SUFFIX)):
        there = read_contract(place)
        if there is None or _same_base(there, base):
            continue
        raise ConfigError(
            f"output folder {place} holds a model that was trained from another base ({there.base_model}, weights "
            f"sha256 {there.base_sha256}) than {base.base_model} ({base.base_sha256}), and would be replaced; give "
            "another output_dir, or move it"
        )


def _same_base(there: Contract, base: ModelIdentity) -> bool:
    if base.base_sha256 is None:  # not on this machine yet, or without weights of its own: the name has to do
        return there.base_sha256 is not None or there.base_model == base.base_model
    return there.base_sha256 == base.base_sha256


# --- data ---------------------------------------------------------------------------------------------------------


def _read(config: FinetuneConfig) -> _Data:
    from ebr_lib.data.pairs import expand, read_pairs, warn_of_heldout_names
    from ebr_lib.data.text import normalised
    from ebr_lib.finetune.heldout import build_task
    from ebr_lib.finetune.split import split_pairs

    writes = config.on_bad_row == "skip" and is_first_process()
    rejects = Path(config.output_dir) / REJECTS_FILE if writes else None
    pairs = read_pairs(config.data_path, config.on_bad_row, rejects, config.label_column)
    warn_of_heldout_names(config.data_path, pairs)
    if config.eval_data_path is not None:
        more = rejects.with_name(f"heldout_{REJECTS_FILE}") if rejects else None
        train, heldout = pairs, read_pairs(config.eval_data_path, config.on_bad_row, more, config.label_column)
        _say_what_leaks(train, heldout)
    else:
        train, heldout = split_pairs(pairs, config.eval_ratio, config.seed)
    train_rows, heldout_rows = expand(train), expand(heldout)
    logger.info("训练集大小: %d (training rows)", len(train_rows))
    logger.info("验证集大小: %d (held-out rows)", len(heldout_rows))
    sha256 = _fingerprint(train_rows, heldout_rows)
    if not heldout_rows:
        return _Data(train_rows, heldout_rows, None, sha256)
    answers = [(row.anchor, row.positive) for row in heldout_rows]
    own = config.leave_out_own != "none"
    task = build_task(answers, train_rows, normalised, config.eval_corpus_size, config.seed, leave_out_own=own)
    _report_own(task)
    return _Data(train_rows, heldout_rows, task, sha256)


def _report_own(task: HeldoutTask) -> None:
    """Say for how many anchors a document of their own text is left out, and how many have no other answer."""
    if not task.queries:
        raise DataError(
            "every held-out anchor has no answer but itself: nothing can be measured; set leave_out_own: none to "
            "count it as one, or eval_ratio: 0"
        )
    if own := sum(map(bool, task.own)):
        logger.info("自身文档不参与验证检索 own documents left out: those of %d of %d anchors", own, len(task.queries))
    if task.without_answer:
        logger.warning(
            "除自身外没有答案的 anchor 不参与评估 held-out anchors that are their only answer are not measured: %d; "
            "leave_out_own: none keeps them",
            task.without_answer,
        )


def _say_what_leaks(train: Sequence[Pair], heldout: Sequence[Pair]) -> None:
    """Warn of held-out texts that training has seen, or nearly, in the other column too: they measure memory.

    A document that answers training anchors as well is not a leak, but its queries are `seen`.
    """
    import numpy as np

    from ebr_lib.data.text import normalised
    from ebr_lib.finetune.split import near_duplicate_groups

    columns = [
        [normalised(text) for text in texts]
        for pairs in (train, heldout)
        for texts in ([pair.anchor for pair in pairs], [text for pair in pairs for text in pair.positives])
    ]
    groups = near_duplicate_groups([text for column in columns for text in column])
    ends = np.cumsum([len(column) for column in columns])
    train_anchors, train_documents, anchors, documents = np.split(groups, ends[:-1])
    known = np.isin(anchors, np.union1d(train_anchors, train_documents))
    if known.any():
        logger.warning(
            "验证集泄漏: %d 条 held-out anchors are in the training data (as anchors or documents), or near-duplicates "
            "of it",
            known.sum(),
        )
    if (asked := np.isin(documents, train_anchors)).any():
        logger.warning(
            "验证集泄漏: %d 条 held-out documents are anchors of the training data, or near-duplicates of them",
            asked.sum(),
        )
    seen = np.isin(columns[3], columns[1])
    if seen.any():
        logger.info("训练中出现过的验证文档 held-out documents that training has too (seen): %d", seen.sum())
    if (near := np.isin(documents, train_documents) & ~seen).any():
        logger.info("近似文档 held-out documents that are near-duplicates of training documents: %d", near.sum())


def _fingerprint(*sets: Sequence[TrainingRow]) -> str:
    digest = hashlib.sha256(repr([len(rows) for rows in sets]).encode())
    for row in chain(*sets):
        digest.update(repr((row.anchor, row.positive, row.negatives)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _refuse_what_cannot_be(config: FinetuneConfig, data: _Data, model: SentenceTransformer) -> None:
    """Knobs against what only the data and the model can tell."""
    width = model.get_embedding_dimension() or 0
    if (widest := max(config.matryoshka_dims, default=0)) > width:
        raise ConfigError(
            f"matryoshka_dims: {widest} wanted, the vectors of {config.model_name} have {width} dimensions"
        )
    if config.lr_scheduler_type in FOLLOW_THE_METRIC and data.task is None:
        raise ConfigError(
            f"lr_scheduler_type: {config.lr_scheduler_type} follows best_metric, and no rows were held out; "
            "give eval_data_path, or choose a scheduler that follows the steps, such as linear"
        )


def _mine(config: FinetuneConfig, data: _Data, model: SentenceTransformer) -> _Data:
    """The data, with hard negatives for the training rows; nothing that is held out is looked at."""
    if not config.mine_hard_negatives:
        return data
    # one process mines: others might round a cosine otherwise, and all have to number the same rows
    rows = _mined_rows(config, data, model) if is_first_process() else None
    return dataclasses.replace(data, train=from_first_process(rows))


def _mined_rows(config: FinetuneConfig, data: _Data, model: SentenceTransformer) -> Sequence[TrainingRow]:
    from ebr_lib.finetune.heldout import encoders_of
    from ebr_lib.finetune.mining import mine_hard_negatives

    mined = mine_hard_negatives(
        data.train,
        *encoders_of(model, config.adapter_side == "query", backend=config.backend, show_bar=True),
        count=config.mine_hard_negatives,
        first_rank=config.mining_rank_min,
        last_rank=config.mining_rank_max,
        margin=config.mining_margin,
    )
    logger.info("%s", as_text(mined.table))
    if not mined.counts.any():
        logger.warning(
            "没有挖到难负例 no hard negatives found: raise mining_rank_max, or lower mining_rank_min or mining_margin"
        )
    return mined.rows


def _examine(config: FinetuneConfig, rows: Sequence[TrainingRow], model: SentenceTransformer) -> DoctorReport:
    from ebr_lib.finetune.doctor import examine

    batch = _batch_size(config)
    prompts = _column_prompts(config, model, 1)
    prompts["negative"] = prompts.pop("negative_1")
    report = examine(
        rows,
        model.tokenizer,
        max_seq_length=config.max_seq_length,
        batch_size=batch,
        prompts=prompts,
        masks=config.mask_known_positives,
    )
    logger.info("%s", as_text(report.table))
    for advice in report.advice:
        logger.warning("%s", advice)
    return report


# --- model --------------------------------------------------------------------------------------------------------


def _base(config: FinetuneConfig) -> ModelIdentity:
    """Which model is trained, and how its own code was decided about.

    :raises ModelError: it brings code, and nothing was decided.
    """
    from ebr_lib.model.loading import check_remote_code
    from ebr_lib.model.provenance import identify

    return identify(config.model_name, check_remote_code(config.model_name, config.trust_remote_code))


def _load_base(config: FinetuneConfig, dtype: torch.dtype) -> SentenceTransformer:
    """The model that is trained, with the adapter that it was saved with, if any."""
    from ebr_lib.model.loading import load_model

    return load_model(
        config.model_name,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
        device=training_device(),
        dtype=dtype,
        trainable=True,
    )


def _add_lora(config: FinetuneConfig, model: SentenceTransformer) -> None:
    from ebr_lib.model.adapters import add_lora

    add_lora(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        dora=config.use_dora,
        rslora=config.use_rslora,
    )


def _model_with_adapter(config: FinetuneConfig) -> SentenceTransformer:
    import torch

    from ebr_lib.model.adapters import is_adapted, trainable_counts
    from ebr_lib.model.shapes import fit_length

    precision = _precision(config)
    logger.info("精度 precision: %s%s", precision.dtype, f" ({precision.why})" if precision.why else "")
    model = _load_base(config, torch.bfloat16 if precision.dtype == "bfloat16" else torch.float32)
    if config.adapter_side == "query" and model.max_seq_length != config.max_seq_length:
        logger.warning(
            "训练时文档的截断长度不同 documents are cut at max_seq_length %d in training; encoding cuts them where the "
            "base model does, at %s, for adapter_side query keeps its vectors",
            config.max_seq_length,
            model.max_seq_length,
        )
    fit_length(model, config.max_seq_length, config.model_name)
    model.prompts |= _prompts(config)
    if is_adapted(model):
        _refuse_other_adapter(config, model)
        logger.info("继续训练已有适配器 training goes on from the adapter in %s", config.model_name)
    else:
        _add_lora(config, model)
    trained, total = trainable_counts(model)
    share = 100 * trained / total
    logger.info("可训练参数: %s / %s (%.2f%%) trainable parameters", f"{trained:,}", f"{total:,}", share)
    return model


def _refuse_other_adapter(config: FinetuneConfig, model: SentenceTransformer) -> None:
    """Training goes on from an adapter that this stage saved, on the side that it was trained for."""
    from ebr_lib.model.contract import read_contract
    from ebr_lib.model.packaged import find_model

    contract = read_contract(find_model(config.model_name))
    if contract is None:
        raise ModelError(
            f"model_name {config.model_name} holds an adapter that this stage did not save; merge it into its base "
            "with the library that made it, and give the merged model's folder"
        )
    if contract.adapter_side != config.adapter_side:
        raise ConfigError(
            f"adapter_side: {config.adapter_side!r} wanted, the adapter in {config.model_name} was trained for "
            f"{contract.adapter_side!r}; set adapter_side: {contract.adapter_side}, or start from {contract.base_model}"
        )


def _as_the_adapter_is(config: FinetuneConfig, model: SentenceTransformer) -> FinetuneConfig:
    """The config with the model's length, and the LoRA knobs of its adapter: one that was saved keeps its shape."""
    from ebr_lib.model.adapters import lora_knobs

    own = lora_knobs(model)
    config = dataclasses.replace(config, max_seq_length=model.max_seq_length)  # less, if there are fewer positions
    _say_what_changes(config)
    ignored = {name: getattr(config, name) for name, value in own.items() if getattr(config, name) != value}
    if ignored:
        shown = ", ".join(f"{name} {own[name]} ({value} is ignored)" for name, value in ignored.items())
        logger.warning("适配器保持原有设置 the adapter stays as it was saved: %s", shown)
    return dataclasses.replace(config, **own)


def _say_what_changes(config: FinetuneConfig) -> None:
    """Other settings that a saved adapter was trained with may change from here on, but not unnoticed."""
    from ebr_lib.model.contract import read_contract
    from ebr_lib.model.packaged import find_model

    if (contract := read_contract(find_model(config.model_name))) is None:
        return
    then = {"max_seq_length": contract.max_seq_length, "matryoshka_dims": tuple(contract.matryoshka_dims)}
    changed = {name: value for name, value in then.items() if getattr(config, name) != value}
    if changed:
        shown = ", ".join(f"{name} {getattr(config, name)} (was {value})" for name, value in changed.items())
        logger.warning("与该模型此前的训练不同 not as this model was trained before: %s", shown)


def _precision(config: FinetuneConfig) -> Precision:
    from ebr_lib.model.precision import choose_precision

    asked: Dtype = "float16" if config.fp16 else "bfloat16" if config.bf16 else "float32"
    return choose_precision(asked, training_device())


def _prompts(config: FinetuneConfig) -> dict[str, str]:
    """What the user told, a side; nothing for a side that the user told nothing of."""
    if config.prompt is None:
        return {}
    if isinstance(config.prompt, str):
        return {"query": config.prompt, "document": config.prompt}
    sides = {"anchor": "query", "positive": "document"}
    return {sides[column]: text for column, text in config.prompt.items() if column in sides}


def _measure(config: FinetuneConfig, task: HeldoutTask | None, model: SentenceTransformer) -> GroupMeans:
    if task is None:
        return {}
    return task.measure_model(
        _as_served(config, model), query_only=config.adapter_side == "query", backend=config.backend
    )


def _as_served(config: FinetuneConfig, model: SentenceTransformer) -> SentenceTransformer:
    """The model as whoever loads it has it: with a base in float32, which training in bfloat16 rounds."""
    import torch

    from ebr_lib.model.adapters import adapter_weights, is_adapted, set_adapter_weights

    if model.transformers_model.dtype == torch.float32:
        return model
    with torch.random.fork_rng():  # a new adapter draws its weights; training goes on as if it had not been measured
        served = _load_base(config, torch.float32)
        if not is_adapted(served):
            _add_lora(config, served)
    served.max_seq_length, served.prompts = model.max_seq_length, dict(model.prompts)
    set_adapter_weights(served, adapter_weights(model))
    return served


def _measure_in_training(config: FinetuneConfig, task: HeldoutTask, model: SentenceTransformer) -> GroupMeans:
    """Means of a model in training; NaN, which is never the best, once that has spoilt the vectors: what was kept
    before is saved."""
    try:
        return _measure(config, task, model)
    except NotFiniteError as error:
        logger.warning("验证指标无法计算 held-out metrics are NaN: %s", error)
        return {"all": dict.fromkeys(METRICS, math.nan)}


def _measured_best(trainer: EbrTrainer) -> GroupMeans | None:
    """The means of the weights that are kept, as they were measured in training: one number in log, curve and table.
    None where this process did not measure them, as after a resumed run that got no better."""
    from ebr_lib.finetune.callbacks import KeepBest

    kept = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, KeepBest)]
    return trainer.measured.get(kept[0].best_step) if kept and kept[0].best is not None else None


# --- training -----------------------------------------------------------------------------------------------------


def _trainer(config: FinetuneConfig, data: _Data, model: SentenceTransformer, report: DoctorReport) -> EbrTrainer:
    from ebr_lib.finetune import dataset
    from ebr_lib.finetune.callbacks import BEST_FOLDER, KeepBest
    from ebr_lib.finetune.logbook import JsonLinesLog, LossWatch, RunFacts
    from ebr_lib.finetune.losses import HeldoutRows
    from ebr_lib.finetune.trainer import EbrTrainer
    from ebr_lib.model.adapters import trainable_counts

    checkpoints = _place(config, CHECKPOINTS_SUFFIX)
    documents = [row.positive for row in data.train]
    train = dataset.with_equal_negatives(data.train, documents, config.seed)
    width = len(train[0].negatives)
    heldout = dataset.with_equal_negatives(data.heldout, documents, config.seed, known=data.train, width=width)
    known, all_known = _known_positives(train, heldout)
    batch = dataset.evaluation_batch(len(train), _batch_size(config), world_size())
    fill = dataset.fill_rows(train, len(heldout), batch * world_size(), config.seed) if heldout else ()
    compared = [*heldout, *(train[row] for row in fill)]
    numbers = [*range(len(train), len(train) + len(heldout)), *fill]
    batches = max(1, -(-len(compared) // (batch * world_size())) * world_size())
    facts = RunFacts(
        rows=len(data.train),
        anchors=report.anchors,
        documents=report.documents,
        duplicate_share=report.duplicate_share,
        learning_rate=config.learning_rate,
        trainable_parameters=trainable_counts(model)[0],
    )
    callbacks: list[Any] = [JsonLinesLog(checkpoints / LOG_FILE), LossWatch(facts, _causes_of_nan(config))]
    if data.task:
        callbacks.append(
            KeepBest(
                config.best_metric,
                config.early_stopping_patience,
                config.early_stopping_threshold,
                str(checkpoints / BEST_FOLDER),
            )
        )
    return EbrTrainer(
        model=model,
        args=_arguments(config, model, data, width, batch),
        train_dataset=dataset.to_dataset(train, range(len(train))),
        eval_dataset=dataset.to_dataset(compared, numbers) if heldout else None,
        loss=_loss(config, model, known, all_known, HeldoutRows(len(train), len(heldout) / batches)),
        anchors=all_known.anchors,
        documents=all_known.documents,
        balanced=config.balanced_batches,
        measure=partial(_measure_in_training, config, data.task) if data.task else None,
        noise=_noise(config),
        noise_columns=config.noise_apply_to_fields,
        memory_limit_mb=config.memory_limit_gb * 1024,
        callbacks=callbacks,
    )


def _known_positives(
    train: Sequence[TrainingRow], heldout: Sequence[TrainingRow]
) -> tuple[KnownPositives, KnownPositives]:
    """What training knows, which nothing held out decides; and, for evaluation, what both know."""
    from ebr_lib.finetune.batches import KnownPositives

    known = KnownPositives(train)
    return known, KnownPositives([*train, *heldout]) if heldout else known


def _arguments(config: FinetuneConfig, model: SentenceTransformer, data: _Data, negatives: int, eval_batch: int) -> Any:
    from ebr_lib.finetune.trainer import training_arguments

    return training_arguments(
        _place(config, CHECKPOINTS_SUFFIX),
        rows=len(data.train),
        batch_size=_batch_size(config),
        num_epochs=config.num_epochs,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        evaluate=data.task is not None,
        per_device_eval_batch_size=eval_batch,
        learning_rate=config.learning_rate,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        fp16=_precision(config).dtype == "float16",
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=config.dataloader_pin_memory and model.device.type == "cuda",
        metric_for_best_model=f"eval_{config.best_metric}",
        greater_is_better=config.best_metric != LOWER_IS_BETTER,
        prompts=_column_prompts(config, model, negatives),
        seed=config.seed,
    )


def _with_negatives(config: FinetuneConfig, rows: Sequence[TrainingRow]) -> FinetuneConfig:
    """The config, or one that learns: a batch of one pair has no negatives, its loss is nothing.

    Batches that were to be accumulated are then embedded one row at a time and compared together (GradCache), which
    takes as little memory.
    """
    has_negatives = any(row.negatives for row in rows)
    if len(rows) == 1 and not has_negatives:
        raise DataError(
            "one training row, and no negative to tell its positive from: nothing can be learnt; give more rows (with "
            "eval_ratio: 0 none is held out), or a negative"
        )
    if _batch_size(config) > 1 or has_negatives:
        return config
    pairs = max(config.gradient_accumulation_steps, 2)
    logger.warning(
        "批大小为 1 时没有负样本 a batch of 1 has no negatives: %d pairs are compared together, embedded one at a time "
        "(contrastive_batch_size %d, gradient_accumulation_steps 1)",
        pairs,
        pairs,
    )
    return dataclasses.replace(config, contrastive_batch_size=pairs, gradient_accumulation_steps=1)


def _batch_size(config: FinetuneConfig) -> int:
    return config.contrastive_batch_size or config.train_batch_size


def _column_prompts(config: FinetuneConfig, model: SentenceTransformer, negatives: int) -> dict[str, str]:
    from ebr_lib.model.loading import prompt_of

    document = prompt_of(model, "document")
    told = config.prompt if isinstance(config.prompt, dict) else {}
    negative = told.get("negative", document)
    columns = {"anchor": prompt_of(model, "query"), "positive": document}
    return columns | {f"negative_{i + 1}": negative for i in range(negatives)}


def _loss(
    config: FinetuneConfig,
    model: SentenceTransformer,
    known: KnownPositives,
    all_known: KnownPositives,
    heldout: HeldoutRows,
) -> ContrastiveLoss:
    from ebr_lib.finetune.losses import ContrastiveLoss
    from ebr_lib.model.packing import packed_forward

    def answers(rows: Tensor) -> Tensor:
        return (known if model.training else all_known).mask(rows)

    # processes synchronise gradients in the wrapped model's forward, which packed rows go past
    packs = config.packed_rows and world_size() == 1
    return ContrastiveLoss(
        model,
        temperature=config.temperature,
        label_smoothing=config.label_smoothing,
        l1=config.l1_regularization,
        matryoshka_dims=config.matryoshka_dims,
        known_positives=answers if config.mask_known_positives else None,
        mini_batch_size=config.train_batch_size if config.contrastive_batch_size else None,
        eval_mini_batch_size=config.eval_batch_size,
        heldout=heldout,
        query_only=config.adapter_side == "query",
        packed=packed_forward(model, one_row=not config.gradient_checkpointing) if packs else None,
    )


def _noise(config: FinetuneConfig) -> Any:
    from ebr_lib.finetune.noise import TextNoise

    if not config.noise_enabled or config.noise_type == "none" or not config.noise_prob:
        return None
    return TextNoise(config.noise_type, config.noise_prob, config.noise_strength, config.seed)


def _train(config: FinetuneConfig, data: _Data, trainer: EbrTrainer, measuring: float) -> float:
    """Train, from a checkpoint where there is one to go on from; put the best weights back; return the seconds.

    :param measuring: seconds that it takes to measure the model.
    """
    from ebr_lib.finetune.callbacks import KeepBest
    from ebr_lib.finetune.speed import fast_training

    # one process tidies up, all go on from the same place
    checkpoint = from_first_process(_last_checkpoint(config, data) if is_first_process() else None)
    start = time.perf_counter()
    with fast_training(trainer.model), named_when_full(_place(config, CHECKPOINTS_SUFFIX)):
        _preflight(trainer, measuring)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            trainer.stop.put_handlers_back()
    if trainer.stop.received:
        where = _place(config, CHECKPOINTS_SUFFIX)
        logger.warning("已中断 interrupted; go on with resume_from_checkpoint: auto (checkpoints in %s)", where)
        raise KeyboardInterrupt
    for callback in trainer.callback_handler.callbacks:  # a resumed run has its own copy, restored from the checkpoint
        if isinstance(callback, KeepBest):
            callback.restore(trainer.model)
    return time.perf_counter() - start


def _causes_of_nan(config: FinetuneConfig) -> list[str]:
    from ebr_lib.finetune.logbook import causes_of_nan

    return causes_of_nan(config.learning_rate, config.temperature, _precision(config).dtype == "float16")


def _refuse_broken(config: FinetuneConfig, model: SentenceTransformer) -> None:
    from ebr_lib.finetune.saving import is_finite
    from ebr_lib.model.contract import PROBES

    if not is_finite(model):
        raise ModelError(
            f"model {config.model_name} makes vectors that are not finite numbers (NaN) before any training, of texts "
            f"such as {PROBES[0]!r} or {PROBES[2]!r}: look for NaN in its weights, or get the model again"
        )


def _refuse_nan(config: FinetuneConfig, model: SentenceTransformer) -> None:
    from ebr_lib.finetune.saving import is_finite

    if not is_finite(model):
        raise ModelError(
            "training ended in weights, or vectors, that are not finite numbers (NaN); nothing is saved, and what "
            f"stood in {_place(config, ADAPTER_SUFFIX)} stays. Likely causes: {'; '.join(_causes_of_nan(config))}"
        )


def _preflight(trainer: EbrTrainer, measuring: float) -> None:
    from ebr_lib.finetune.trainer import estimated_seconds, preflight

    flown = preflight(trainer)
    seconds = estimated_seconds(trainer, flown, measuring)
    logger.info(
        "预检 preflight: longest batch %.2f s, peak memory %.0f MB; average batch %.2f s; "
        "预计训练用时（含评估与检查点）training with evaluations and checkpoints takes about %s",
        flown.longest,
        flown.peak_mb,
        flown.batch,
        f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min",
    )


def _last_checkpoint(config: FinetuneConfig, data: _Data) -> str | None:
    """Where to go on from, after a check that it is the same run; a run that starts over puts old checkpoints aside."""
    folder = _place(config, CHECKPOINTS_SUFFIX)
    run = _what_decides(config, data)
    note = folder / RUN_FILE
    if config.resume_from_checkpoint == "auto":
        _take_over(folder, run)
        if note.is_file() and (last := _last_whole_checkpoint(folder)):
            _refuse_other_run(json.loads(note.read_text(encoding="utf-8")), run, note)
            logger.info("从检查点继续 going on from %s", last)
            return last
        logger.info("没有可继续的检查点，从头训练 no checkpoint to go on from in %s: starting at the beginning", folder)
    if note.is_file() and _last_whole_checkpoint(folder):
        aside = _free_name(folder.with_name(folder.name + ".previous"))
        folder.rename(aside)
        logger.warning("上次中断的检查点已移到 checkpoints of an unfinished run were moved to %s", aside)
    elif note.is_file():
        shutil.rmtree(folder)  # it ended before its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, run)
    return None


def _what_decides(config: FinetuneConfig, data: _Data) -> dict[str, Any]:
    """All that decides a run's result: knobs, and the contents of data and models, wherever they lie."""
    from ebr_lib.model.provenance import files_of

    run = {name: value for name, value in config.to_dict().items() if name not in FREE_ON_RESUME}
    base = _base(config)
    return run | {
        "data_sha256": data.sha256,
        "model_sha256": base.sha256 or base.name,
        "base_sha256": base.base_sha256 or base.base_model,
        "model_files": list(dict.fromkeys(files_of(base))),
    }


def _take_over(folder: Path, run: Mapping[str, Any]) -> None:
    """Give the checkpoints of the same run, begun when its model had another name, the name of now."""
    if (folder / RUN_FILE).exists():
        return
    for note in sorted(folder.parent.glob(f"*{CHECKPOINTS_SUFFIX}/{RUN_FILE}")):
        if json.loads(note.read_text(encoding="utf-8")) == run:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()  # the trainer has made it
            note.parent.rename(folder)
            logger.info("检查点已改名 checkpoints of the same run: %s is now %s", note.parent, folder)
            return


def _free_name(place: Path) -> Path:
    """`place`, or it with the first number behind it that is not taken."""
    names = (place if n == 1 else place.with_name(f"{place.name}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest that was written to its end; later ones, which a kill cut short, are removed."""
    from transformers.trainer_utils import get_last_checkpoint

    while last := get_last_checkpoint(str(folder)):
        if _is_whole(Path(last)):
            break
        logger.warning("检查点不完整，已删除 removed a checkpoint that was not written to its end: %s", last)
        shutil.rmtree(last)
    return last


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer wrote its own state, which it does last."""
    from transformers.trainer import TRAINER_STATE_NAME

    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _refuse_other_run(before: Mapping[str, Any], now: Mapping[str, Any], note: Path) -> None:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        shown = "; ".join(f"{name}: was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise ConfigError(
            f"resume_from_checkpoint: the interrupted run was another one ({note}): {shown}. "
            "Set these back, or start anew with resume_from_checkpoint: no"
        )


# --- results ------------------------------------------------------------------------------------------------------


def _before_after(before: GroupMeans, after: GroupMeans) -> DataFrame:
    rows = [
        (group, int(before[group]["queries"]), name, was, now, now - was)
        for group in before
        for name in METRICS
        for was, now in [(before[group][name], after[group][name])]
    ]
    if not rows:
        return make_table(
            "微调前后 before and after: 没有验证集 no rows were held out, so nothing was measured", (), ()
        )
    columns = ("documents", "queries", "metric", "before", "after", "change")
    return make_table("微调前后 before and after, on the held-out anchors", columns, rows)


def _say_if_worse(config: FinetuneConfig, before: GroupMeans, after: GroupMeans) -> None:
    metric = config.best_metric if config.best_metric != LOWER_IS_BETTER else "ndcg@10"
    if before and after["all"][metric] <= before["all"][metric]:
        logger.warning(
            "没有超过基座模型 no better than the base model: %s %.4f before, %.4f after; see the data table above, and "
            f"try {SMALL_DATA_PRESET} or more data",
            metric,
            before["all"][metric],
            after["all"][metric],
        )


def _save(config: FinetuneConfig, data: _Data, model: SentenceTransformer, result: FinetuneResult) -> None:
    """Save the model, and beside it all that explains it; the checkpoints go once everything is in place."""
    from ebr_lib.finetune import saving
    from ebr_lib.finetune.logbook import draw_curve

    base = _base(config)
    checkpoints = _place(config, CHECKPOINTS_SUFFIX)
    contract = saving.make_contract(
        model, base, adapter_side=config.adapter_side, matryoshka_dims=config.matryoshka_dims
    )
    with written_whole(result.model_path) as folder:
        saving.save_adapter(model, folder, base, contract)
        config.save(folder / CONFIG_FILE)
        shutil.copy(checkpoints / LOG_FILE, folder / LOG_FILE)
        draw_curve(folder / LOG_FILE, folder / CURVE_FILE, config.best_metric)
        _save_heldout(data, folder)
        if config.mine_hard_negatives:
            _write_lines(folder / MINED_FILE, map(_as_line, data.train))
        tables = {"Before and after": as_text(result.tables["before_after"]), "Data": as_text(result.tables["data"])}
        card = saving.model_card(result.model_path, base, contract, _facts(config, result), tables)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if result.merged_path is not None:
        with written_whole(result.merged_path) as folder:
            saving.save_merged(
                result.model_path, folder, trust_remote_code=base.trust_remote_code, device=model.device.type
            )
    shutil.rmtree(checkpoints)


def _save_heldout(data: _Data, folder: Path) -> None:
    """The held-out anchors and every document of the data, for the evaluation stage."""
    from ebr_lib.data.pairs import texts_of
    from ebr_lib.data.text import normalised
    from ebr_lib.names import CORPUS_FILE, HELDOUT_FILE

    answers: dict[str, list[str]] = {}
    for row in data.heldout:
        answers.setdefault(row.anchor, []).append(row.positive)
    _write_lines(folder / HELDOUT_FILE, ({"anchor": anchor, "positive": texts} for anchor, texts in answers.items()))
    # those of the held-out measure first, in its order: the evaluation stage then encodes the same batches, to the bit
    own = data.task.documents if data.task else ()
    texts = dict.fromkeys((*own, *(row.positive for row in (*data.train, *data.heldout))))
    seen = texts_of(data.train)
    _write_lines(folder / CORPUS_FILE, ({"text": text, "seen": normalised(text) in seen} for text in texts))


def _as_line(row: TrainingRow) -> dict[str, Any]:
    return {"anchor": row.anchor, "positive": row.positive, "negative": list(row.negatives)}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _facts(config: FinetuneConfig, result: FinetuneResult) -> dict[str, object]:
    places = config.data_path if isinstance(config.data_path, str) else ", ".join(config.data_path)
    return {
        "data": f"{places} ({result.train_rows} rows; {result.heldout_rows} held out)",
        "steps": f"{result.steps} in {result.seconds:.0f} s",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "settings": f"`{CONFIG_FILE}`, itself a preset that repeats the run",
        "log": f"`{LOG_FILE}`, `{CURVE_FILE}`",
    }
