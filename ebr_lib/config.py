"""The configs of all stages, checked together: against each other, and against the files that they name."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.index.config import IndexConfig
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.knobs.checks import Config
from ebr_lib.knobs.fields import Place
from ebr_lib.logs import logger
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.tables import as_text, make_table
from ebr_lib.visualize.config import VisConfig

FOLDERS = {"base": "inference"}
"""Folders of stages that are not called as their folder is."""


@dataclass(frozen=True)
class Configs:
    """Checked configs of a workflow; a notebook shows them as tables.

    `base`: of encoding with the base model, to compare with; `on`: the stages whose files were checked.
    """

    pairs: PairsConfig
    finetune: FinetuneConfig
    inference: InferenceConfig
    base: InferenceConfig
    visualize: VisConfig
    evaluate: EvalConfig
    index: IndexConfig
    given: tuple[str, ...] = ()
    on: tuple[str, ...] = ()

    def __repr__(self) -> str:
        files = f"，以及文件、模型与列名 with the files, models and columns of {', '.join(self.on)}" if self.on else ""
        return f"参数检查通过 checked: {', '.join(self.given)}{files}"

    def _repr_html_(self) -> str:
        tables = [
            f"<details><summary>{name}</summary>{getattr(self, name)._repr_html_()}</details>" for name in self.given
        ]
        return f"<p><b>{self!r}</b></p>{''.join(tables)}"


def check_configs(*, run: Mapping[str, Any] | None = None, **given: Mapping[str, Any]) -> Configs:
    """Resolve the configs of all stages, and list all their errors at once.

    For stages that are switched on, files, models, columns and what earlier stages hand over are checked too. Data is
    read in part only, and no model is loaded.

    :param run: which stages are switched on, by name; None checks no files.
    :param given: a dict of knobs per stage: pairs, finetune, inference, base, visualize, evaluate, index. Others get
        their defaults.
    :raises ConfigError: any knob of any stage is unknown or out of range, or a file, model or column is not there.
    """
    kinds = {f.name: get_type_hints(Configs)[f.name] for f in fields(Configs) if f.name not in ("given", "on")}
    if unknown := sorted({*given, *(run or ())} - set(kinds)):
        raise ConfigError(f"check_configs: no stage {', '.join(unknown)}; stages are {', '.join(kinds)}")
    resolved, errors = {}, []
    for stage, kind in kinds.items():
        try:
            resolved[stage] = kind.resolve(given.get(stage))
        except (ConfigError, MissingError) as error:
            errors.append(str(error))
    on = tuple(stage for stage in kinds if run and run.get(stage))
    if run:
        errors += _check_files({stage: resolved[stage] for stage in on if stage in resolved})
        errors += _check_base(
            {stage: resolved[stage].model_name for stage in ("finetune", "base") if stage in on and stage in resolved}
        )
    if errors:
        raise ConfigError("\n".join(errors))
    return Configs(**resolved, given=tuple(given), on=on)


def _check_base(models: Mapping[str, str]) -> Iterator[str]:
    """An error if the base model is not the one that is fine-tuned: the map would not show what training changed."""
    if len(set(models.values())) > 1:
        yield (
            f"base: model_name is {models['base']}, and fine-tuning begins with {models['finetune']}; give the same, "
            "so that before and after are of one model"
        )


def _check_files(configs: Mapping[str, Any]) -> Iterator[str]:
    """A text per stage with what is wrong with its files, in the order in which they run."""
    from ebr_lib.model.handover import Handover

    handover = Handover()
    for stage, config in configs.items():
        check = importlib.import_module(f"ebr_lib.{FOLDERS.get(stage, stage)}.check").check
        with _quiet():  # the stage itself logs which files it reads
            errors = list(check(config, handover))
        if errors:
            yield "\n".join([f"{stage}:", *(f"  - {error}" for error in errors)])


def plan_of(command: str, stage: str, config: Config) -> str:
    """What a run of a stage would do: its changed knobs, and the places that it names.

    :raises ConfigError: a file, model or column is not there, or is not what the stage needs.
    """
    if type(config) in get_type_hints(Configs).values():
        for text in _check_files({stage: config}):
            raise ConfigError(text)
    changed = [(name, value, default) for name, value, default in config.rows() if default]
    places = [
        (name, place, _state(Path(place)))
        for name, kind in get_type_hints(type(config), include_extras=True).items()
        for place in _places(kind, getattr(config, name))
    ]
    tables = (
        make_table(f"计划 plan: {command}", ("knob", "value", "default"), changed),
        make_table("路径 places", ("knob", "value", "now"), places),
    )
    return "\n\n".join([*map(as_text, tables), "检查通过，未做任何计算 checked; nothing was computed"])


def _places(kind: Any, value: Any) -> Sequence[str]:
    """The paths that a knob holds; of a list, which may hold names too, those that are there."""
    if value is None or not any(inner in (Place, tuple[Place, ...]) for inner in (kind, *get_args(kind))):
        return ()
    return [each for each in value if Path(each).exists()] if isinstance(value, tuple) else [value]


def _state(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size:,} bytes"
    return "a folder" if path.is_dir() else "not there yet, or a name"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
