"""From the config to the parts of a run: the model with its adapter, the batches, the trainer.

The config goes no further than here and `run`: the parts take plain arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import Tensor
from transformers import TrainerCallback, set_seed

from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.errors import ConfigError, DataError, ModelError
from ebr_lib.finetune.callbacks import BEST_FOLDER, KeepBest
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.dataset import Datasets
from ebr_lib.finetune.doctor import PRESET_LINE, DoctorReport, examine
from ebr_lib.finetune.drift import RANDOM, RANDOM_TEXTS, Drift, make_drift, random_words
from ebr_lib.finetune.guide import guide
from ebr_lib.finetune.heldout import GroupMeans, HeldoutTask, encoders_of
from ebr_lib.finetune.logbook import JsonLinesLog, LossWatch
from ebr_lib.finetune.losses import ContrastiveLoss, Guided, base_model_only
from ebr_lib.finetune.mining import mine_hard_negatives
from ebr_lib.finetune.noise import TextNoise
from ebr_lib.finetune.paths import LOG_FILE, Paths
from ebr_lib.finetune.pool import check_vectors, remembered
from ebr_lib.finetune.positives import without_noisy
from ebr_lib.finetune.processes import from_first_process, is_first_process, training_device, world_size
from ebr_lib.finetune.prompts import own_prompts
from ebr_lib.finetune.reranking import with_teacher_scores
from ebr_lib.finetune.rows import Rows
from ebr_lib.finetune.schedulers import FOLLOW_THE_METRIC, NO_WARM_UP, scheduler_extras
from ebr_lib.finetune.signals import ExpectedCounts, check_scores
from ebr_lib.finetune.sources import Mix, make_mix, own_documents_only, rows_alone
from ebr_lib.finetune.strength import Both, Halves, Values
from ebr_lib.finetune.temperature import UNKNOWN
from ebr_lib.finetune.trackers import name_of_run, tensorboard
from ebr_lib.finetune.trainer import EbrTrainer, count_steps
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.adapters import (
    adapter_weights,
    add_lora,
    is_adapted,
    lora_knobs,
    set_adapter_weights,
    trainable_counts,
)
from ebr_lib.model.contract import read_contract
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.packaged import find_model, model_label
from ebr_lib.model.packing import packed_forward
from ebr_lib.model.precision import Dtype, Precision, choose_precision
from ebr_lib.model.reranker import load_reranker
from ebr_lib.model.shapes import Side, fit_length
from ebr_lib.model.unfit import unknown_share
from ebr_lib.names import LOWER_IS_BETTER, Asked
from ebr_lib.tables import as_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# every second layer is run again in backward: half of the activations, for a quarter more time
CHECKPOINTED = 2
SIDES: dict[str, Side] = {"anchor": "query", "positive": "document"}


# --- model --------------------------------------------------------------------------------------------------------


def settle_precision(config: FinetuneConfig) -> tuple[FinetuneConfig, Precision]:
    """The precision asked for, or the nearest that the hardware has; a config that left it open names it afterwards."""
    unset: Asked = "auto" if config.bf16 is None else "float32"
    asked: Asked | Dtype = "float16" if config.fp16 else "bfloat16" if config.bf16 else unset
    precision = choose_precision(asked, training_device())
    logger.info("精度 precision: %s%s", precision.dtype, f" ({precision.why})" if precision.why else "")
    if config.bf16 is None:
        config = dataclasses.replace(config, bf16=asked == "auto" and precision.dtype == "bfloat16")
    return config, precision


def make_model(config: FinetuneConfig, precision: Precision) -> SentenceTransformer:
    """The model to train, with the adapter that it was saved with or a new one; all draws follow the seed.

    :raises ConfigError: the saved adapter was trained for another side.
    :raises ModelError: another library saved the adapter.
    """
    set_seed(config.seed)
    model, is_new = _load(config, torch.bfloat16 if precision.dtype == "bfloat16" else torch.float32)
    if not is_new:
        _check_saved_adapter(config)
        logger.info("继续训练已有适配器 training goes on from the adapter in %s", config.model_name)
    if config.adapter_side == "query" and model.max_seq_length != config.max_seq_length:
        logger.warning(
            "训练时文档的截断长度不同 documents are cut at max_seq_length %d in training; encoding cuts them at the "
            "base model's %s, because adapter_side query keeps its vectors",
            config.max_seq_length,
            model.max_seq_length,
        )
    fit_length(model, config.max_seq_length, config.model_name)
    given = dict.fromkeys(SIDES, config.prompt) if isinstance(config.prompt, str) else config.prompt or {}
    model.prompts |= {SIDES[column]: text for column, text in given.items() if column in SIDES}
    trained, total = trainable_counts(model)
    share = 100 * trained / total
    logger.info("可训练参数: %s / %s (%.2f%%) trainable parameters", f"{trained:,}", f"{total:,}", share)
    return model


def _load(config: FinetuneConfig, dtype: torch.dtype) -> tuple[SentenceTransformer, bool]:
    """The model with the adapter that it was saved with, or a new one, and whether it is new."""
    model = load_model(
        config.model_name,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
        device=training_device(),
        dtype=dtype,
        trainable=True,
    )
    if is_new := not is_adapted(model):
        add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            dora=config.use_dora,
            rslora=config.use_rslora,
        )
    return model, is_new


def _check_saved_adapter(config: FinetuneConfig) -> None:
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


def keep_adapter_settings(config: FinetuneConfig, model: SentenceTransformer) -> FinetuneConfig:
    """The config with the LoRA knobs of the model's adapter, which keeps its shape, and with the model's length."""
    contract = read_contract(find_model(config.model_name))
    config = dataclasses.replace(config, max_seq_length=model.max_seq_length)  # less, if there are fewer positions
    if contract is not None:
        then = {"max_seq_length": contract.max_seq_length, "matryoshka_dims": tuple(contract.matryoshka_dims)}
        if changed := [f"{name} {now} (was {was})" for name, was, now in _differences(then, config)]:
            logger.warning("与该模型此前的训练不同 not as this model was trained before: %s", ", ".join(changed))
    own = lora_knobs(model)
    if ignored := [f"{name} {was} ({now} is ignored)" for name, was, now in _differences(own, config)]:
        logger.warning("适配器保持原有设置 the adapter stays as it was saved: %s", ", ".join(ignored))
    return dataclasses.replace(config, **own)


def _differences(then: dict[str, Any], config: FinetuneConfig) -> list[tuple[str, Any, Any]]:
    """(knob, its value then, its value now) of the knobs that differ."""
    return [(name, was, now) for name, was in then.items() if (now := getattr(config, name)) != was]


def as_served(config: FinetuneConfig, model: SentenceTransformer) -> SentenceTransformer:
    """The model as it will be loaded: its base in float32, which training in bfloat16 rounds."""
    if model.transformers_model.dtype == torch.float32:
        return model
    with torch.random.fork_rng():  # a new adapter draws its weights; training must not notice that it was measured
        served, _ = _load(config, torch.float32)
    served.max_seq_length, served.prompts = model.max_seq_length, dict(model.prompts)
    set_adapter_weights(served, adapter_weights(model))
    return served


def measure(config: FinetuneConfig, task: HeldoutTask, model: SentenceTransformer) -> Values:
    """Metrics of a task, per query."""
    query_only = config.adapter_side == "query"
    return task.measure_model(as_served(config, model), query_only=query_only, backend=config.backend)


def measured(
    config: FinetuneConfig,
    task: HeldoutTask | None,
    halves: Halves | None,
    guard: HeldoutTask | None,
    model: SentenceTransformer,
    *,
    known: GroupMeans | None = None,
) -> Both:
    """The means of the queries that choose, and of those that report with the guard's.

    :param known: the means of all queries, if they are known: of few, all choose and report.
    """
    choosing: GroupMeans = known or {}
    reporting = choosing
    if task and halves and not known:
        values = measure(config, task, model)
        choosing, reporting = task.means(values, halves.choosing), task.means(values, halves.reporting)
    guarded = {"guard": guard.means(measure(config, guard, model))["all"]} if guard else {}
    return choosing, {**reporting, **guarded}


# --- data ---------------------------------------------------------------------------------------------------------


def check_against_data(config: FinetuneConfig, rows: Rows, model: SentenceTransformer) -> None:
    """Check the knobs that only data and model can contradict.

    :raises ConfigError: the vectors lack a dimension, or a scheduler follows a metric that is not measured.
    """
    width = model.get_embedding_dimension() or 0
    if (widest := max(config.matryoshka_dims, default=0)) > width:
        raise ConfigError(
            f"matryoshka_dims: {widest} wanted, the vectors of {config.model_name} have {width} dimensions"
        )
    if config.lr_scheduler_type in FOLLOW_THE_METRIC and rows.task is None:
        raise ConfigError(
            f"lr_scheduler_type: {config.lr_scheduler_type} follows best_metric, and no rows were held out; "
            "give eval_data_path, or choose a scheduler that follows the steps, such as linear"
        )


def with_mined_negatives(
    config: FinetuneConfig,
    rows: Rows,
    model: SentenceTransformer,
    catalogue: Catalogue | None = None,
    noisy: Path | None = None,
) -> Rows:
    """The rows, without noisy positives and with hard negatives among the training rows; held-out rows stay.

    :param noisy: where dropped rows are written; None writes none.
    """
    if not (config.mine_hard_negatives or config.positive_rank_max or config.reranker_name):
        return rows
    # one process mines: another might round a cosine otherwise, and all have to number the same rows
    mined = from_first_process(_mined(config, rows.train, model, catalogue, noisy) if is_first_process() else None)
    task = rows.task.seen_by(texts_of([*mined, *rows.replay])) if rows.task else None
    return dataclasses.replace(rows, train=mined, task=task)


def _mined(
    config: FinetuneConfig,
    rows: Sequence[TrainingRow],
    model: SentenceTransformer,
    catalogue: Catalogue | None,
    noisy: Path | None,
) -> Sequence[TrainingRow]:
    if catalogue is not None:
        check_vectors(catalogue, model, config.model_name, config.on_changed_vectors)
    query_only, prompts = config.adapter_side == "query", own_prompts(rows)
    made = encoders_of(model, query_only, backend=config.backend, show_bar=True, own_prompts=prompts)
    encoders = [remembered(encode) for encode in made]
    dropped: Sequence[TrainingRow] = ()
    if config.positive_rank_max:
        rank_max = config.positive_rank_max
        rows, dropped = without_noisy(rows, *encoders, rank_max=rank_max, catalogue=catalogue, dropped_to=noisy)
    reranker = None
    if config.reranker_name is not None:
        choice, device = config.trust_remote_code, training_device()
        reranker = remembered(
            load_reranker(config.reranker_name, trust_remote_code=choice, device=device, show_bar=True)
        )
    if config.mine_hard_negatives:
        rows = mine_hard_negatives(
            rows,
            *encoders,
            count=config.mine_hard_negatives,
            first_rank=config.mining_rank_min,
            last_rank=config.mining_rank_max,
            margin=config.mining_margin,
            catalogue=catalogue,
            choice=config.mining_choice,
            seed=config.seed,
            reranker=reranker,
            reranker_margin=config.reranker_margin,
            dropped=dropped,
        )
    return rows if reranker is None else with_teacher_scores(rows, reranker)


def ensure_negatives(config: FinetuneConfig, rows: Sequence[TrainingRow]) -> FinetuneConfig:
    """The config, with larger batches where one pair would be compared with nothing: its loss is 0.

    Pairs that were to be accumulated are then embedded one at a time and compared together (GradCache), which takes as
    little memory.

    :raises DataError: there is one row, without a negative.
    """
    has_negatives = any(row.negatives for row in rows)
    if len(rows) == 1 and not has_negatives:
        raise DataError(
            "cannot train on one row without a negative; give more rows (eval_ratio: 0 holds none out), or a negative"
        )
    if config.compared > 1 or has_negatives:
        return config
    pairs = max(config.gradient_accumulation_steps, 2)
    logger.warning(
        "批大小为 1 时没有负样本 a batch of 1 has no negatives: %d pairs are compared together, embedded one at a time "
        "(contrastive_batch_size %d, gradient_accumulation_steps 1)",
        pairs,
        pairs,
    )
    return dataclasses.replace(config, contrastive_batch_size=pairs, gradient_accumulation_steps=1)


def examine_rows(config: FinetuneConfig, rows: Sequence[TrainingRow], model: SentenceTransformer) -> DoctorReport:
    """Have the data doctor look at the rows as they will be trained on; log what it finds."""
    check_scores(rows, config.distill_weight)

    def lengths_of(texts: Sequence[str]) -> list[int]:
        how = {"padding": False, "truncation": False, "verbose": False, "return_attention_mask": False}
        return [len(ids) for ids in model.tokenizer(list(texts), **how)["input_ids"]]

    report = examine(
        rows,
        lengths_of,
        max_seq_length=config.max_seq_length,
        batch_size=config.compared,
        prompts=_column_prompts(config, model),
        unknown_of=partial(unknown_share, model.tokenizer),
        masks=config.mask_known_positives,
        bidirectional=config.bidirectional_loss,
    )
    logger.info("%s", as_text(report.table), extra=RESULT)  # a notebook has it among the tables of the result
    for advice in report.advice:
        logger.warning("%s", advice)
    logger.info("%s: %s (%s)", PRESET_LINE, *report.preset)
    return report


def _column_prompts(config: FinetuneConfig, model: SentenceTransformer) -> dict[str, str]:
    prompts = {column: prompt_of(model, side) for column, side in SIDES.items()}
    given = config.prompt if isinstance(config.prompt, dict) else {}
    return prompts | {"negative": given.get("negative", prompts["positive"])}


# --- training -----------------------------------------------------------------------------------------------------


def make_trainer(
    config: FinetuneConfig,
    rows: Rows,
    model: SentenceTransformer,
    *,
    paths: Paths,
    watch: LossWatch,
    fp16: bool,
    halves: Halves | None = None,
) -> EbrTrainer:
    """The trainer of a run, ready to train.

    :param halves: which held-out queries evaluations count; None counts all.
    """
    task = rows.task
    if config.best_metric == LOWER_IS_BETTER and task and halves:
        # the held-out loss chooses the step: without the queries that only report
        left_out = task.texts_of(halves.reporting & ~halves.choosing)
        kept = [row for row in rows.heldout if normalised(row.anchor) not in left_out]
        rows = dataclasses.replace(rows, heldout=kept)
    data = Datasets(rows.trained, rows.heldout, config.compared, config.seed)
    mix = make_mix(rows, config.shares, config.one_file_batches, config.replay_share, config.compared)
    if (alone := rows_alone(rows, data.width, bidirectional=config.bidirectional_loss)) is not None:
        watch.mostly_masked = float("inf")  # that is what they asked for

    def known_positives(labels: Tensor) -> Tensor:
        mask = (data.known if model.training else data.all_known).mask(labels)
        if not config.mask_known_positives:
            mask = torch.zeros_like(mask)
        return mask if alone is None else own_documents_only(mask, alone[labels.cpu()])

    drift = _make_drift(config, data, rows.trained, model)
    # processes synchronise gradients in the wrapped model's forward, which packed rows skip
    packs = config.packed_rows and world_size() == 1
    loss = ContrastiveLoss(
        model,
        temperature=UNKNOWN if config.temperature == "auto" else config.temperature,
        label_smoothing=config.label_smoothing,
        l1=config.l1_regularization,
        matryoshka_dims=config.matryoshka_dims,
        known_positives=known_positives if config.mask_known_positives or alone is not None else None,
        mini_batch_size=config.embedded,
        eval_mini_batch_size=config.eval_batch_size,
        heldout=data.counted,
        query_only=config.adapter_side == "query",
        packed=packed_forward(model, one_row=not config.gradient_checkpointing) if packs else None,
        row_weights=data.weights,
        teacher=data.scores,
        distill_weight=config.distill_weight,
        distill_temperature=config.distill_temperature,
        guide=_make_guide(config, data, rows.trained, model),
        false_negative_margin=config.false_negative_margin or 0.0,
        bidirectional=config.bidirectional_loss,
        matryoshka_weights=config.matryoshka_weights,
        drift=drift,
        **_expected_counts(config, data, mix),
    )
    prompts, anchor_prompts = _prompts(config, data, model)
    run_name = name_of_run(config.run_name, model_label(config.model_name))
    arguments = training_arguments(
        config,
        paths.checkpoints,
        rows=len(rows.train) if mix is None else mix.batches_in(config.compared) * config.compared,
        evaluate=rows.task is not None,
        per_device_eval_batch_size=data.eval_batch,
        fp16=fp16,
        prompts=prompts,
        run_name=run_name,
    )
    noise = None
    if config.noise_enabled and config.noise_type != "none" and config.noise_prob:
        noise = TextNoise(config.noise_type, config.noise_prob, config.noise_strength, config.seed)
    callbacks: list[TrainerCallback] = [JsonLinesLog(paths.checkpoints / LOG_FILE), watch]
    if "tensorboard" in config.report_to:
        callbacks.append(tensorboard(paths.adapter.parent, run_name))
    if rows.task:
        best = str(paths.checkpoints / BEST_FOLDER)
        patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
        callbacks.append(KeepBest(config.best_metric, patience, threshold, best))

    def means(now: SentenceTransformer) -> GroupMeans:
        assert task is not None
        return task.means(measure(config, task, now), halves.choosing if halves else None)

    if drift:
        data.train = data.train.add_column(RANDOM, drift.words_of(len(data.train)))
    return EbrTrainer(
        model=model,
        args=arguments,
        data=data,
        loss=loss,
        balanced=config.balanced_batches,
        mix=mix,
        measure=means if task else None,
        noise=noise,
        noise_columns=config.noise_apply_to_fields,
        anchor_prompts=anchor_prompts,
        memory_limit_mb=config.memory_limit_gb * 1024,
        callbacks=callbacks,
    )


def _prompts(
    config: FinetuneConfig, data: Datasets, model: SentenceTransformer
) -> tuple[dict[str, str], list[str] | None]:
    """The prompt of each column of the data, and that of each row's anchor where rows have others."""
    prompts = _column_prompts(config, model)
    negative, anchor, anchor_prompts = prompts.pop("negative"), prompts["anchor"], None
    if set(data.prompts) - {None, anchor}:
        anchor_prompts, prompts["anchor"] = [anchor if own is None else own for own in data.prompts], ""
    return prompts | {f"negative_{i + 1}": negative for i in range(data.width)}, anchor_prompts


def training_arguments(
    config: FinetuneConfig, folder: Path, *, rows: int, evaluate: bool, **more: Any
) -> SentenceTransformerTrainingArguments:
    """The library's arguments: what the knobs say, and what follows from the number of steps.

    :param rows: training rows of an epoch.
    :param more: further arguments, as the library names them.
    """
    name, rises = config.lr_scheduler_type, config.best_metric != LOWER_IS_BETTER
    if config.warmup_ratio and name in NO_WARM_UP:
        logger.warning("没有预热 warmup_ratio %g does nothing: %s has no warm-up", config.warmup_ratio, name)
    steps = count_steps(rows, config.compared, config.gradient_accumulation_steps, config.num_epochs)
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.compared,
        num_train_epochs=config.num_epochs,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=scheduler_extras(name, steps, config.num_epochs, config.learning_rate, rises),
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"every_n_layers": CHECKPOINTED},
        metric_for_best_model=f"eval_{config.best_metric}",
        greater_is_better=rises,
        eval_strategy=("steps" if config.eval_steps else "epoch") if evaluate else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, min(50, steps // 40)),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # which would log 0 for NaN
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_drop_last=world_size() > 1,  # as the library insists; `EpochBatches` drops nothing
        dataloader_pin_memory=config.dataloader_pin_memory and training_device() != "cpu",
        ddp_find_unused_parameters=False,
        use_cpu=training_device() == "cpu",
        seed=config.seed,
        report_to=[tracker for tracker in config.report_to if tracker != "tensorboard"],
        **more,
    )


def _make_guide(
    config: FinetuneConfig, data: Datasets, rows: Sequence[TrainingRow], model: SentenceTransformer
) -> Guided | None:
    """Cosines by the base model as it is before training, or by `guide_model`, which has its own prompts."""
    if config.false_negative_margin is None:
        return None
    columns = [data.train[name][:] for name in data.train.column_names if name != "label"]
    make = partial(encoders_of, query_only=False, backend=config.backend, show_bar=True)
    if config.guide_model is None:
        with base_model_only(model):
            return guide(columns, data.known, *make(model, own_prompts=own_prompts(rows)))
    other = load_model(config.guide_model, trust_remote_code=config.trust_remote_code, device=training_device())
    return guide(columns, data.known, *make(other))


def _make_drift(
    config: FinetuneConfig, data: Datasets, rows: Sequence[TrainingRow], model: SentenceTransformer
) -> Drift | None:
    """What holds the vectors near those of the model as it is now."""
    if not config.drift_weight:
        return None
    logger.info("计算训练前的向量 encoding training texts once, so that training stays near the model as it is")
    query_only = config.adapter_side == "query"
    columns = list(SIDES)[: 1 if query_only else None]
    encoders = encoders_of(model, query_only, backend=config.backend, show_bar=True, own_prompts=own_prompts(rows))
    prompts = [prompt_of(model, SIDES[column]) for column in columns]
    return make_drift(
        [data.train[column][:] for column in columns],
        encoders[: len(columns)],
        random_words(model.tokenizer, prompts, min(len(rows), RANDOM_TEXTS), config.seed),
        Encoder(model, prompt="", backend=config.backend).encode,
        compared=2 + data.width,
        weight=config.drift_weight,
        seed=config.seed,
    )


def _expected_counts(config: FinetuneConfig, data: Datasets, mix: Mix | None) -> dict[str, ExpectedCounts]:
    if not config.logq_correction:
        return {}
    compared = config.compared * world_size()
    masked, balanced = config.mask_known_positives, config.balanced_batches
    rates = mix.rates(compared) if mix else None
    sides = {"document_counts": data.known.columns, "anchor_counts": data.known.anchors[:, None]}
    return {
        name: ExpectedCounts(numbers, compared, masked=masked, balanced=balanced, rates=rates)
        for name, numbers in sides.items()
    }
