"""The machinery of configuration: a knob is one line of a dataclass, everything else is read off that line.

From a field's name, type, default and help come: the check of a dict, of a YAML preset and of command-line flags,
the help text, the table in the README and the saved config of a run. Order: default < preset < what the user gave.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.files import written_whole

PRESET_KEY = "preset"


def knob(default: Any, help: str, zh: str, *, split: bool = True) -> Any:
    """Declare a field: its default and what it does, in English and in Chinese.

    :param split: whether a flag's comma parts items of a list; a text that may hold one is an item as it stands.
    """
    meta = {"help": help, "zh": zh, "split": split}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


# --- YAML: 3e-5 is a number ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-5` as a float; YAML 1.1 wants `3.0e-5` and would hand over the text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """A YAML text's value: plain values only, and `3e-5` is a number."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_preset(path: str | Path) -> dict[str, Any]:
    """Read one preset file: a YAML mapping of knobs.

    :raises MissingError: there is no such file.
    :raises ConfigError: the file is not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) or sorted(
            str(p) for p in Path("configs").rglob("*.yaml")
        )
        raise MissingError(f"preset {path}: there is no such file; presets here: {', '.join(near) or 'none'}")
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"preset {path}: wanted a mapping of knobs (`name: value`), found {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


# --- checking -----------------------------------------------------------------------------------------------------


_PYDANTIC_LEAD = re.compile("^(Input should be|String should have) ")


@functools.cache
def _adapter(config_class: Any, name: str) -> TypeAdapter[Any]:
    kind = get_type_hints(config_class, include_extras=True)[name]
    # strict: True is no int, "12" is no number. NaN passes `low <= x`, so it is refused outright.
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _frozen(value: Any) -> Any:
    """Lists become tuples and dicts copies, so that a config stays what it was when it was checked."""
    if isinstance(value, dict):
        return {name: _frozen(inner) for name, inner in value.items()}
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _validated(config_class: type[Config], name: str, value: Any) -> tuple[Any, list[str]]:
    """A knob's value as its type makes it, and what is wrong with it."""
    try:
        return _adapter(config_class, name).validate_python(value), []  # type: ignore[arg-type] # a class is hashable
    except ValidationError as error:
        # a union reports every branch it tried; one line per knob is enough for a person
        reasons = dict.fromkeys(_PYDANTIC_LEAD.sub("", e["msg"]) for e in error.errors())
        return value, [f"{name}: {value!r} is not allowed; wanted {' or '.join(reasons)}"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of a stage's config: a frozen dataclass that checks itself and lists all that is wrong at once."""

    def __post_init__(self) -> None:
        errors = []
        for field in dataclasses.fields(self):
            given = _frozen(getattr(self, field.name))
            value, wrong = _validated(type(self), field.name, given)
            object.__setattr__(self, field.name, given if given == value else value)  # 1 epoch stays 1, is not 1.0
            errors += wrong
        errors = errors or list(self.conflicts())
        if errors:
            raise ConfigError(_listed(type(self), errors))

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for every pair of knobs that cannot go together; called when each alone is right."""
        return iter(())

    @property
    def presets(self) -> list[str]:
        """The preset files that it was resolved from, without those that `save` wrote, which hold every knob."""
        return getattr(self, "_presets", [])

    @classmethod
    def resolve(cls, given: Self | Mapping[str, Any] | None = None, presets: Sequence[str | Path] = ()) -> Self:
        """Build a config: default < presets, in order < what is given.

        :param given: a config (returned as it is), or a dict of knobs; its key `preset` names a preset file or several.
        :raises ConfigError: lists every unknown name and every bad value, of the presets too.
        :raises MissingError: a preset is not there.
        """
        if isinstance(given, cls):
            return given
        values: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
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
        errors = [_unknown(name, names) for name in values if name not in names]
        known = {name: value for name, value in values.items() if name in names}
        if not errors:
            return cls(**known)
        for name, value in known.items():
            errors += _validated(cls, name, _frozen(value))[1]
        raise ConfigError(_listed(cls, errors))

    def to_dict(self) -> dict[str, Any]:
        """Every knob and its value, as plain values that YAML and JSON hold."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Write every knob as YAML, whole or not at all; the file is itself a preset that repeats the run."""
        text = yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)
        with written_whole(path) as new:
            new.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        from ebr_lib.tables import Table

        rows = list(self._rows())
        changed = [row for row in rows if row[2]]
        own = Table(type(self).__name__, ("knob", "value", "default"), changed).html()
        every = Table("", ("knob", "value"), [row[:2] for row in rows]).html()
        return f"{own}<details><summary>全部 {len(rows)} 项 all knobs</summary>{every}</details>"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), _default(field)
            yield field.name, _shown(value), "" if value == default else _shown(default)


def _unknown(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name}: unknown; did you mean {near[0]}?" if near else f"{name}: unknown"


def _listed(config_class: type[Config], errors: Sequence[str]) -> str:
    return f"{config_class.__name__}: {len(errors)} to mend\n" + "\n".join(f"  - {error}" for error in errors)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return _frozen(field.default)
    assert field.default_factory is not dataclasses.MISSING
    return _frozen(field.default_factory())


def _shown(value: Any) -> str:
    """A value as a preset would write it."""
    text = yaml.safe_dump(_plain(value), allow_unicode=True, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()


# --- command line -------------------------------------------------------------------------------------------------


def _kind_text(kind: Any) -> str:
    """What a type allows, for people: `int, 1 to 1024`, `random_delete | random_swap`."""
    if get_origin(kind) is typing.Annotated:
        base, *rest = get_args(kind)
        return ", ".join(filter(None, [_kind_text(base), _range_text(rest)]))
    if get_origin(kind) is typing.Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of ({_kind_text(get_args(kind)[0])})"
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_kind_text(k) for k in get_args(kind))
    return "null" if kind is type(None) else kind.__name__


def _range_text(constraints: Sequence[Any]) -> str:
    signs = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< "}
    parts = []
    for info in constraints:
        for bound in getattr(info, "metadata", ()):
            parts += [f"{sign}{getattr(bound, key)}" for key, sign in signs.items() if hasattr(bound, key)]
    return ", ".join(parts)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Give a parser `--config` and one flag a knob; a knob that is not given does not appear in the result."""
    parser.add_argument(
        "--config",
        "--preset",
        dest=PRESET_KEY,
        nargs="+",
        default=[],
        metavar="YAML",
        help="preset files, later ones win",
    )
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        text = f"{field.metadata['help']} ({_kind_text(kind)}; default {_shown(_default(field))})".replace("%", "%%")
        many = "*" if get_origin(kind) is tuple else "+" if _one_or_several(kind) else None
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if _is_switch(kind) else {"nargs": many} if many else {}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar="X", help=text, **extra)


def from_flags(config_class: type[Config], arguments: Mapping[str, Any]) -> Any:
    """Build the config from what argparse found."""
    hints = get_type_hints(config_class, include_extras=True)
    presets = arguments.get(PRESET_KEY, [])
    given = {
        field.name: _parsed(arguments[field.name], hints[field.name], split=field.metadata["split"])
        for field in dataclasses.fields(config_class)
        if field.name in arguments
    }
    return config_class.resolve(given, presets)


def unknown_flag(flag: str, config_class: type[Config] | None) -> str:
    """The sentence for a flag, or another word, that no knob has."""
    names = [field.name for field in dataclasses.fields(config_class)] if config_class else []
    return (
        "--" + _unknown(flag.removeprefix("--"), names)
        if flag.startswith("--")
        else f"{flag}: unexpected; a knob is given as --name value"
    )


def _parsed(value: str | list[str], kind: Any, *, split: bool = True) -> Any:
    """A flag's text as the value that a preset would hold; text knobs keep their text, `007` included."""
    if _one_or_several(kind) and isinstance(value, list):
        one = next(inner for inner in get_args(kind) if get_origin(inner) is not tuple)
        return _parsed(value[0], one) if len(value) == 1 else [_parsed(item, one) for item in value]
    if isinstance(value, list):
        (inner, *_) = get_args(kind)
        items = [item for part in value for item in _list_items(part)] if split else value
        return [_parsed(item, inner) for item in items]
    is_text = (get_args(kind)[0] if get_origin(kind) is typing.Annotated else kind) is str
    if is_text or (_takes_text(kind) and not _is_switch(kind) and not value.startswith("{") and value != "null"):
        return value
    try:
        return read_yaml(value)
    except yaml.YAMLError:
        return value


def _is_switch(kind: Any) -> bool:
    """Whether a knob is a yes or no, perhaps with a third answer: its flag alone means true."""
    return kind is bool or bool in get_args(kind)


def _one_or_several(kind: Any) -> bool:
    """Whether a knob takes one value as well as a list of such."""
    is_union = get_origin(kind) in (typing.Union, types.UnionType)
    return is_union and any(get_origin(inner) is tuple for inner in get_args(kind))


def _list_items(part: str) -> list[str]:
    inner = part.strip()
    return [item.strip() for item in inner.strip("[]").split(",")] if inner.startswith("[") or "," in inner else [part]


def _takes_text(kind: Any) -> bool:
    if get_origin(kind) is typing.Annotated:
        return _takes_text(get_args(kind)[0])
    if get_origin(kind) in (typing.Union, types.UnionType):
        return any(_takes_text(k) for k in get_args(kind)) and not any(_is_number(k) for k in get_args(kind))
    if get_origin(kind) is typing.Literal:
        return all(isinstance(v, str) for v in get_args(kind))
    return kind is str


def _is_number(kind: Any) -> bool:
    return (get_args(kind)[0] if get_origin(kind) is typing.Annotated else kind) in (int, float)


# --- documents ----------------------------------------------------------------------------------------------------


def knob_table(config_class: type[Config], language: str = "help") -> str:
    """The Markdown table of a stage's knobs; `language` is the metadata key, "help" or "zh"."""
    head = {
        "help": "| knob | type and range | default | what it does |",
        "zh": "| 参数 | 类型与范围 | 默认值 | 作用 |",
    }[language]
    lines = [head, "| --- | --- | --- | --- |"]
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        cells = (
            f"`{field.name}`",
            _kind_text(hints[field.name]),
            f"`{_shown(_default(field))}`",
            field.metadata[language],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


_TABLE = re.compile(r"(<!-- knobs:(\w+)(:zh)? -->\n).*?(<!-- /knobs -->)", re.DOTALL)


def with_tables(document: str, classes: Mapping[str, type[Config]]) -> str:
    """A Markdown document with the knob tables between its `<!-- knobs:stage -->` marks (`:zh` for Chinese) anew."""

    def table(found: re.Match[str]) -> str:
        language = "zh" if found[3] else "help"
        return f"{found[1]}{knob_table(classes[found[2]], language)}\n{found[4]}"

    return _TABLE.sub(table, document)
