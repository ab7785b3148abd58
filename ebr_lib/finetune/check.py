"""Check fine-tuning's files before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator

from ebr_lib.data.pairs import find_pair_files
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.paths import Paths
from ebr_lib.model.bases import look_for_bases_in
from ebr_lib.model.handover import Handover, check_paths, errors_of


def check(config: FinetuneConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong; add the model that will be saved to what is handed over."""
    look_for_bases_in(config.base_model_path)
    yield from before.check_model("model_name", config.model_name)
    train, heldout = before.not_written(config.data_path), before.not_written(config.eval_data_path)
    missing = list(check_paths(data_path=train, eval_data_path=heldout))
    yield from missing
    paths = Paths.of(config.output_dir, config.model_name)
    if not missing:
        for data in filter(None, (train, heldout)):
            yield from errors_of(lambda data=data: find_pair_files(data))  # type: ignore[misc] # bound at once
        yield from errors_of(lambda: paths.check([config.data_path, config.eval_data_path, config.presets]))
    holds_out = bool(config.eval_ratio or config.eval_data_path)
    before.models[paths.adapter.resolve()] = holds_out
    if config.merge_adapter:
        before.models[paths.merged.resolve()] = False
