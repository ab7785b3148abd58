"""The configs of all stages, checked together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.index.config import IndexConfig
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.visualize.config import VisConfig


@dataclass(frozen=True)
class Configs:
    """Checked configs of a workflow; a notebook shows them as tables."""

    finetune: FinetuneConfig
    inference: InferenceConfig
    visualize: VisConfig
    evaluate: EvalConfig
    index: IndexConfig
    given: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        return "".join(getattr(self, stage.name)._repr_html_() for stage in fields(self) if stage.name in self.given)


def check_configs(**given: Mapping[str, Any]) -> Configs:
    """Resolve the configs of all stages, and list all their errors at once.

    :param given: a dict of knobs per stage: finetune, inference, visualize, evaluate, index. Others get their defaults.
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
