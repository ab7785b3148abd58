"""Check the catalogue and the model before any stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebr_lib.files import followed
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.inference.inputs import find_inputs, kept_columns, open_inputs
from ebr_lib.inference.run import layout_of, written_beside
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.handover import Handover, check_paths, errors_of


def check(config: InferenceConfig, before: Handover) -> Iterator[str]:
    """Yield what is wrong; add the columns that will be kept to what is handed over."""
    look_for_models(config.base_model_path, config.hub)
    yield from before.check_model("model_name", config.model_name)
    output = Path(config.output_path).expanduser().resolve()
    before.encoded[output] = config.description_column
    before.columns[output] = config.output_columns  # so that other stages report their own mistakes
    if missing := list(check_paths(data_path=config.data_path)):
        yield from missing
        return

    def read() -> None:
        place, layout, kept = followed(Path(config.output_path)), layout_of(config), config.output_columns
        found = find_inputs(config.data_path, config.file_patterns, place, written_beside(place))
        sources = open_inputs(found, layout, [config.description_column, *kept], kept)
        before.columns[output] = kept_columns(sources, kept, config.output_path, layout, config.vector_type)

    yield from errors_of(read)
