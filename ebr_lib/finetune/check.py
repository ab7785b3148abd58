"""Check fine-tuning's files before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.data.pairs import find_pair_files
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.paths import Paths
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.handover import Handover, check_paths, errors_of


def check(config: FinetuneConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong; add the model that will be saved to what is handed over."""
    look_for_models(config.base_model_path, config.hub)
    yield from before.check_model("model_name", config.model_name)
    pairs = {name: getattr(config, name) for name in ("data_path", "eval_data_path", "replay_data_path")}
    read = {name: before.not_written(given) for name, given in pairs.items()}
    missing = list(check_paths(**read, guard_data_path=before.not_written(config.guard_data_path)))
    yield from missing
    given = [config.data_path] if isinstance(config.data_path, str) else config.data_path
    if before.pairs and before.pairs.resolve() not in (Path(path).expanduser().resolve() for path in given):
        yield (
            f"data_path: {', '.join(given)} has nothing of the pairs that are made of the log before; set data_path to "
            f"{before.pairs}, or switch one of the two stages off"
        )
    paths = Paths(config.output_dir, config.model_name)
    if not missing:
        for data in filter(None, read.values()):
            yield from errors_of(lambda data=data: find_pair_files(data))  # type: ignore[misc] # bound at once
        yield from errors_of(lambda: paths.check([*pairs.values(), config.guard_data_path, config.presets]))
    holds_out = bool(config.eval_ratio or config.eval_data_path)
    before.models[paths.adapter.resolve()] = holds_out
    if config.merge_adapter:
        before.models[paths.merged.resolve()] = False
