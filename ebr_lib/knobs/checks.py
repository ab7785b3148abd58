"""A knob, and a config that checks its values."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ebr_lib.errors import ConfigError
from ebr_lib.files import written_whole
from ebr_lib.knobs.presets import PRESET_KEY, read_preset
from ebr_lib.names import did_you_mean


def knob(default: Any, help: str, zh: str, *, split: bool = True) -> Any:
    """Declare a knob: its default and its help in English and Chinese.

    :param split: whether a comma in the flag separates list items; False for texts that may contain commas.
    """
    meta = {"help": help, "zh": zh, "split": split}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


# --- checking -----------------------------------------------------------------------------------------------------


_PYDANTIC_LEAD = re.compile("^(Input should be|String should have) ")


@functools.cache
def _adapter(config_class: Any, name: str) -> TypeAdapter[Any]:
    kind = get_type_hints(config_class, include_extras=True)[name]
    # strict: True is not an int, "12" not a number; NaN would pass `low <= x`
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _frozen(value: Any) -> Any:
    """Copy lists as tuples, and dicts, so that nobody changes a config after its check."""
    if isinstance(value, dict):
        return {name: _frozen(inner) for name, inner in value.items()}
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def validated(config_class: type[Config], name: str, value: Any) -> tuple[Any, list[str]]:
    """Return a knob's value in its type, and its errors."""
    try:
        return _adapter(config_class, name).validate_python(value), []  # type: ignore[arg-type] # a class is hashable
    except ValidationError as error:
        # a union has an error per branch; one line per knob is enough
        reasons = dict.fromkeys(_PYDANTIC_LEAD.sub("", e["msg"]) for e in error.errors())
        return value, [f"{name}: {value!r} is not allowed; wanted {' or '.join(reasons)}"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of a stage's config: a frozen dataclass that checks itself and lists all errors at once."""

    def __post_init__(self) -> None:
        errors = []
        for field in dataclasses.fields(self):
            given = _frozen(getattr(self, field.name))
            value, wrong = validated(type(self), field.name, given)
            object.__setattr__(self, field.name, given if given == value else value)  # 1 epoch stays 1, not 1.0
            errors += wrong
        errors = errors or list(self.conflicts())
        if errors:
            raise ConfigError(_listed(type(self), errors))

    def conflicts(self) -> Iterator[str]:
        """Yield an error for knobs that contradict each other; called when each is valid by itself."""
        return iter(())

    @property
    def presets(self) -> list[str]:
        """Preset files that it was resolved from, except files that `save` wrote, which have every knob."""
        return getattr(self, "_presets", [])

    @classmethod
    def resolve(cls, given: Self | Mapping[str, Any] | None = None, presets: Sequence[str | Path] = ()) -> Self:
        """Build a config: default < presets, in order < what is given.

        :param given: a config (returned unchanged), or a dict of knobs whose key `preset` may name preset files.
        :raises ConfigError: lists every unknown name and every bad value, including those of presets.
        :raises MissingError: a preset does not exist.
        """
        if isinstance(given, cls):
            return given
        if not (given is None or isinstance(given, Mapping)):
            raise ConfigError(f"{cls.__name__}: wanted a dict of knobs, found {given!r}")
        values: dict[str, Any] = dict(given or {})
        named = values.pop(PRESET_KEY, ())
        layers = [*presets, *([named] if isinstance(named, str | Path) else named)]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= read_preset(layer)
        merged |= values
        config = cls._checked(merged)
        object.__setattr__(
            config, "_presets", [str(p) for p in layers if len(read_preset(p)) < len(dataclasses.fields(cls))]
        )
        return config

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> Self:
        names = [field.name for field in dataclasses.fields(cls)]
        errors = [unknown_name(name, names) for name in values if name not in names]
        known = {name: value for name, value in values.items() if name in names}
        if not errors:
            return cls(**known)
        for name, value in known.items():
            errors += validated(cls, name, _frozen(value))[1]
        raise ConfigError(_listed(cls, errors))

    def to_dict(self) -> dict[str, Any]:
        """Return every knob with its value, in types that YAML and JSON have."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Write all knobs as YAML, atomically; the file is a preset that repeats the run."""
        text = yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)
        with written_whole(path) as new:
            new.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        from ebr_lib.tables import as_html, make_table

        rows = list(self.rows())
        changed = [row for row in rows if row[2]]
        own = as_html(make_table(type(self).__name__, ("knob", "value", "default"), changed))
        every = as_html(make_table("", ("knob", "value"), [row[:2] for row in rows]))
        return f"{own}<details><summary>全部 {len(rows)} 项 all knobs</summary>{every}</details>"

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, value and default of each knob, as in a preset; the default is empty where the value is the default."""
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), default_of(field)
            yield field.name, shown_value(value), "" if value == default else shown_value(default)


def unknown_name(name: str, names: Sequence[str]) -> str:
    """Error for an unknown knob name, with the nearest known one."""
    return f"{name}: unknown{did_you_mean(name, names)}"


def _listed(config_class: type[Config], errors: Sequence[str]) -> str:
    return f"{config_class.__name__}: {len(errors)} {'error' if len(errors) == 1 else 'errors'}\n" + "\n".join(
        f"  - {error}" for error in errors
    )


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Default of a field, in the type of its knob."""
    if field.default is not dataclasses.MISSING:
        return _frozen(field.default)
    assert field.default_factory is not dataclasses.MISSING
    return _frozen(field.default_factory())


def shown_value(value: Any) -> str:
    """Write a value as in a preset."""
    text = yaml.safe_dump(_plain(value), allow_unicode=True, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()
