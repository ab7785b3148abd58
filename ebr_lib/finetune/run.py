"""Stage 1: fine-tune an embedding model with LoRA on pairs, measure whether it got better, and save it."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ebr_lib.data.catalogue import Catalogue, read_catalogue
from ebr_lib.data.pairs import keys_of
from ebr_lib.errors import Interrupted, ModelError
from ebr_lib.files import named_when_full, written_whole
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.guard import read_guard
from ebr_lib.finetune.heldout import HeldoutTask
from ebr_lib.finetune.outputs import FinetuneResult, before_after, card_facts, save_heldout, save_rows, verdict
from ebr_lib.finetune.paths import CONFIG_FILE, CURVE_FILE, FOUND_FILE, LOG_FILE, MINED_FILE, Paths
from ebr_lib.finetune.processes import from_first_process, is_first_process
from ebr_lib.finetune.prompts import use_own_prompts
from ebr_lib.finetune.rows import Rows, read_rows
from ebr_lib.finetune.saving import is_finite, make_contract, model_card, save_adapter
from ebr_lib.finetune.strength import halves_of, settle_strength
from ebr_lib.finetune.trackers import need_trackers
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.adapters import trainable_counts
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.contract import PROBES
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.main_guard import refuse_script_without_guard
from ebr_lib.model.merged import save_merged
from ebr_lib.model.provenance import ModelIdentity, files_of, identify, weights_of
from ebr_lib.tables import as_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from ebr_lib.finetune.trainer import EbrTrainer

# Knobs that a resumed run may change: where, how often, how to go on. Data and models are compared by their contents.
FREE_ON_RESUME = (
    "model_name",
    "base_model_path",
    "hub",
    "data_path",
    "eval_data_path",
    "replay_data_path",
    "mining_corpus_path",
    "label_column",
    "output_dir",
    "resume_from_checkpoint",
    "merge_adapter",
    "memory_limit_gb",
    "eval_batch_size",
    "dataloader_num_workers",
    "save_steps",
    "report_to",
    "run_name",
    "on_changed_vectors",
)


def train_sentence_transformer(config: FinetuneConfig | Mapping[str, Any] | None = None) -> FinetuneResult:
    """Fine-tune with LoRA on the pairs under `data_path`; save to `<output_dir>/<model>-peft-lora/`.

    :param config: a FinetuneConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed).
    :raises DataError: the training data is broken; names file and line.
    :raises ModelError: the model cannot be loaded or trained.
    :raises MissingError: data or model does not exist.
    """
    if not is_first_process():
        logger.setLevel(logging.ERROR)  # the first one logs
    config = FinetuneConfig.resolve(config)
    _check_machine(config)
    paths = Paths(config.output_dir, config.model_name)
    inputs = [config.data_path, config.eval_data_path, config.mining_corpus_path, config.guard_data_path]
    paths.check([*inputs, config.replay_data_path, config.presets])
    look_for_models(config.base_model_path, config.hub)
    paths.check_base(_identify(config))
    rows = _read(config, paths)
    catalogue = _read_catalogue(config, rows)

    # these load torch for seconds: not before config and data are known to be right
    from ebr_lib.finetune import logbook, setup
    from ebr_lib.finetune.temperature import settle_temperature

    guard, rows = _read_guard(config, rows)
    config, precision = setup.settle_precision(config)
    model = setup.make_model(config, precision)
    _check_start(model, config.model_name)
    base = _identify(config)  # again: a model of the hub is on this machine only now
    paths.check_base(base)
    config = setup.keep_adapter_settings(config, model)
    setup.check_against_data(config, rows, model)
    use_own_prompts(model, rows.train, [*rows.replay, *rows.heldout], config.prompt)
    rows = setup.with_mined_negatives(config, rows, model, catalogue, paths.noisy)
    config = setup.ensure_negatives(config, rows.train)
    report = setup.examine_rows(config, rows.train, model)
    halves = halves_of(rows.task, config.seed, config.adapter_strength == "auto") if rows.task else None
    measured = partial(setup.measured, config, rows.task, halves, guard, model)
    start = time.perf_counter()
    first = measured()
    measuring = time.perf_counter() - start
    fp16 = precision.dtype == "float16"
    trainable = trainable_counts(model)[0]
    watch = logbook.LossWatch(report, config.learning_rate, trainable)
    trainer = setup.make_trainer(config, rows, model, paths=paths, watch=watch, fp16=fp16, halves=halves)
    trainer.first_means = first[0]
    checkpoint = _find_checkpoint(config, paths, _what_decides(config, rows, base, catalogue))
    if config.temperature == "auto":
        found = settle_temperature(trainer, paths.checkpoints / FOUND_FILE, resumed=checkpoint is not None)
        config = dataclasses.replace(config, temperature=found)
    watch.causes_of_nan = logbook.causes_of_nan(config.learning_rate, config.temperature, fp16)
    seconds = _train(trainer, paths, checkpoint, measuring=measuring)
    _check_end(model, paths, watch.causes_of_nan)
    before = first[1]
    strength, after, tables = settle_strength(
        trainer,
        first,
        measured,
        halves,
        strength=config.adapter_strength,
        best_metric=config.best_metric,
        guard_tolerance=config.guard_tolerance,
    )
    tables = {"before_after": before_after(before, after), **tables, "data": report.table}
    result = FinetuneResult(
        model_path=str(paths.adapter),
        merged_path=str(paths.merged) if config.merge_adapter else None,
        train_rows=len(rows.train),
        heldout_rows=len(rows.heldout),
        trainable_parameters=trainable,
        steps=trainer.state.global_step,
        seconds=seconds,
        temperature=float(config.temperature),
        adapter_strength=strength,
        before=before,
        after=after,
        doctor=report,
        verdict=verdict(before, after, strength, config.best_metric, len(rows.train)),
        tables=tables,
    )
    if trainer.is_world_process_zero():
        reporting, best_step = halves.reporting if halves else None, trainer.best_step
        _save(config, rows, model, base, paths=paths, result=result, reporting=reporting, best_step=best_step)
    return result


def _check_machine(config: FinetuneConfig) -> None:
    """Check what the run needs of this machine besides data and models: installed trackers, a guarded script."""
    if config.dataloader_num_workers and multiprocessing.get_start_method() != "fork":
        refuse_script_without_guard("preparing batches in processes", "dataloader_num_workers: 0")
    need_trackers(config.report_to)


def _identify(config: FinetuneConfig) -> ModelIdentity:
    """Which model is trained, and whether its own code runs.

    :raises ModelError: it brings code, and nobody decided about it.
    """
    return identify(config.model_name, check_remote_code(config.model_name, config.trust_remote_code))


def _read(config: FinetuneConfig, paths: Paths) -> Rows:
    writes_rejects = config.on_bad_row == "skip" and is_first_process()
    rows = read_rows(
        config.data_path,
        config.eval_data_path,
        on_bad_row=config.on_bad_row,
        rejects=paths.rejects if writes_rejects else None,
        heldout_rejects=paths.heldout_rejects if writes_rejects else None,
        label_column=config.label_column,
        eval_ratio=config.eval_ratio,
        eval_corpus_size=config.eval_corpus_size,
        leave_out_own=config.leave_out_own != "none",
        seed=config.seed,
    )
    return rows if config.replay_data_path is None else rows.with_replay(config.replay_data_path)


def _read_guard(config: FinetuneConfig, rows: Rows) -> tuple[HeldoutTask | None, Rows]:
    """The search that must not get worse, if there is one, and the rows without replayed ones that ask the same."""
    if config.guard_data_path is None:
        return None, rows
    guard = read_guard(config.guard_data_path, config.eval_corpus_size, config.seed)
    return guard, rows.without_guarded(guard.queries)


def _read_catalogue(config: FinetuneConfig, rows: Rows) -> Catalogue | None:
    """The catalogue to mine in, without held-out texts: they stay unseen."""
    if config.mining_corpus_path is None or not is_first_process():
        return None
    whole = read_catalogue(config.mining_corpus_path, config.mining_corpus_column, "mining_corpus_column")
    kept = whole.without(keys_of(rows.heldout) - keys_of(rows.train))
    if held_out := len(whole) - len(kept):
        logger.info("验证集文本不参与挖掘 held-out texts are not mined: %d", held_out)
    return kept


def _what_decides(
    config: FinetuneConfig, rows: Rows, base: ModelIdentity, catalogue: Catalogue | None
) -> dict[str, Any]:
    """All that decides a run's result: knobs, and the contents of data and models, wherever they are."""
    from ebr_lib.finetune.sources import without_in_batch_negatives

    run = {name: value for name, value in config.to_dict().items() if name not in FREE_ON_RESUME}
    # those that only some runs have; without them the record is as it always was
    alone = without_in_batch_negatives([row.file for row in (*rows.trained, *rows.heldout)])
    if alone is not None:
        runs = groupby(alone.tolist())
        run["rows_without_in_batch_negatives"] = [[is_alone, len(list(same))] for is_alone, same in runs]
    for knob in ("guide_model", "reranker_name"):
        if run[knob]:
            run[f"{knob}_sha256"] = sorted(weights_of(run[knob]))
    by_file = bool(config.shares) or config.one_file_batches  # batches depend on the files that rows come from
    return run | {
        "data_sha256": rows.sha256,
        "rows_per_file": list(Counter(row.file for row in rows.train).values()) if by_file else None,
        "mining_corpus_sha256": catalogue.sha256 if catalogue else None,
        "model_sha256": base.sha256 or base.name,
        "base_sha256": base.base_sha256 or base.base_model,
        "model_files": list(dict.fromkeys(files_of(base))),
    }


def _find_checkpoint(config: FinetuneConfig, paths: Paths, run: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from; one process tidies up, all resume from the same place."""
    from ebr_lib.finetune.checkpoints import find_checkpoint

    resume = config.resume_from_checkpoint == "auto"
    return from_first_process(find_checkpoint(paths.checkpoints, run, resume=resume) if is_first_process() else None)


def _train(trainer: EbrTrainer, paths: Paths, checkpoint: str | None, *, measuring: float) -> float:
    """Train, from a checkpoint if there is one to resume from; restore the best weights; return the seconds.

    :param measuring: seconds that it takes to measure the model.
    """
    from ebr_lib.finetune.preflight import log_preflight
    from ebr_lib.finetune.speed import fast_training

    start = time.perf_counter()
    with fast_training(trainer.model), named_when_full(paths.checkpoints):
        log_preflight(trainer, measuring)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            trainer.bar.close()
            trainer.stop.put_handlers_back()
    if trainer.stop.received:
        advice = f"go on with resume_from_checkpoint: auto (checkpoints in {paths.checkpoints})"
        logger.warning("已中断 interrupted; %s", advice)
        raise Interrupted(advice)
    trainer.restore_best()
    return time.perf_counter() - start


def _check_start(model: SentenceTransformer, name: str) -> None:
    if not is_finite(model):
        raise ModelError(
            f"model {name} makes vectors that are not finite numbers (NaN) before any training, of texts such as "
            f"{PROBES[0]!r} or {PROBES[2]!r}: look for NaN in its weights, or get the model again"
        )


def _check_end(model: SentenceTransformer, paths: Paths, causes: Sequence[str]) -> None:
    if not is_finite(model):
        raise ModelError(
            "training ended in weights or vectors that are not finite numbers (NaN); nothing is saved, and what was in "
            f"{paths.adapter} stays. Likely causes: {'; '.join(causes)}"
        )


def _save(
    config: FinetuneConfig,
    rows: Rows,
    model: SentenceTransformer,
    base: ModelIdentity,
    *,
    paths: Paths,
    result: FinetuneResult,
    reporting: NDArray[np.bool_] | None,
    best_step: int | None,
) -> None:
    """Save the model, and beside it all that explains it; then remove the checkpoints, and log the outcome."""
    from ebr_lib.finetune import logbook

    contract = make_contract(model, base, adapter_side=config.adapter_side, matryoshka_dims=config.matryoshka_dims)
    with written_whole(paths.adapter) as folder:
        save_adapter(model, folder, base, contract)
        config.save(folder / CONFIG_FILE)
        shutil.copy(paths.checkpoints / LOG_FILE, folder / LOG_FILE)
        logbook.log_result(folder / LOG_FILE, result)
        logbook.draw_curve(folder / LOG_FILE, folder / CURVE_FILE, config.best_metric, best_step=best_step)
        save_heldout(rows, folder, reporting)
        if config.mine_hard_negatives or config.reranker_name:
            save_rows(rows.train, folder / MINED_FILE)
        titles = {"before_after": "Before and after", "strengths": "Strengths of the adapter", "data": "Data"}
        tables = {title: as_text(result.tables[name]) for name, title in titles.items() if name in result.tables}
        facts = card_facts(result, config.data_path, config.replay_data_path)
        card = model_card(result.model_path, base, contract, facts, tables)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if config.merge_adapter:
        with written_whole(paths.merged) as folder:
            save_merged(result.model_path, folder, trust_remote_code=base.trust_remote_code, device=model.device.type)
    shutil.rmtree(paths.checkpoints)
    for name in ("strengths", "before_after"):
        if name in result.tables:
            logger.info("%s", as_text(result.tables[name]), extra=RESULT)
    for note in result.notes:
        logger.warning("%s", note, extra=RESULT)
    logger.info("模型已保存 saved: %s", result.model_path)
