"""Knobs as flags of the command line, and their `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from ebr_lib.knobs.checks import Config, default_of, shown_value, unknown_name
from ebr_lib.knobs.fields import Place
from ebr_lib.knobs.presets import PRESET_KEY, read_yaml

LONGEST_CHOICES = 30  # characters of the choices that a metavar lists
_KNOB = re.compile(r"    (\w+): .*= knob\(")


def kind_text(kind: Any) -> str:
    """Describe a type for people: `int, ≥ 1`, `random_delete | random_swap`."""
    if get_origin(kind) is typing.Annotated:
        base, *rest = get_args(kind)
        return ", ".join(filter(None, [kind_text(base), _range_text(rest)]))
    if get_origin(kind) is typing.Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of ({kind_text(get_args(kind)[0])})"
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(kind_text(k) for k in get_args(kind))
    return "null" if kind is type(None) else kind.__name__


def _range_text(constraints: Sequence[Any]) -> str:
    signs = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< "}
    parts = []
    for info in constraints:
        for bound in getattr(info, "metadata", ()):
            parts += [f"{sign}{getattr(bound, key)}" for key, sign in signs.items() if hasattr(bound, key)]
    return ", ".join(parts)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add `--config` and one flag per knob to a parser; flags that are not given are absent from the result.

    A comment line above knobs in the class names their group in `--help`.
    """
    groups = {"": parser.add_argument_group("knobs")}
    parser.add_argument(
        "--config",
        "--preset",
        dest=PRESET_KEY,
        nargs="+",
        default=[],
        metavar="YAML",
        help="preset files; later ones override earlier ones",
    )
    hints = get_type_hints(config_class, include_extras=True)
    titles = _group_titles(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        title = titles.get(field.name, "")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = shown_value(default_of(field))
        notes = filter(None, (_range_of(kind), f"default {default}"))
        text = f"{field.metadata['help']} [{'; '.join(notes)}]".replace("%", "%%")
        many = "*" if get_origin(kind) is tuple else "+" if _one_or_several(kind) else None
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if _is_switch(kind) else {"nargs": many} if many else {}
        groups[title].add_argument(
            f"--{field.name}", default=argparse.SUPPRESS, metavar=_metavar(kind), help=text, **extra
        )


def _group_titles(config_class: type[Config]) -> dict[str, str]:
    """Knob to the comment line that begins its group, read from the source of the class; none without a source."""
    try:
        lines = inspect.getsource(config_class).splitlines()
    except OSError:
        return {}
    titles, title = {}, ""
    for line in lines:
        if line.startswith("    # "):
            title = line.removeprefix("    # ")
        elif found := _KNOB.match(line):
            titles[found[1]] = title
    return titles


def _metavar(kind: Any) -> str:
    """What a flag takes, in one word: INT, NUMBER, PATH, TEXT, or the choices where they are short."""
    words = list(dict.fromkeys(_value_words(kind)))
    text = "|".join(words)
    return text if len(text) <= LONGEST_CHOICES else "CHOICE" if all(map(str.islower, words)) else "VALUE"


def _leaves(kind: Any) -> Iterator[Any]:
    """The types and choices that a union, a list or a constrained type is made of, without None."""
    if get_origin(kind) in (typing.Union, types.UnionType, tuple):
        for inner in get_args(kind):
            yield from _leaves(inner)
    elif get_origin(kind) is typing.Annotated and kind != Place:
        yield from _leaves(get_args(kind)[0])
    elif kind not in (type(None), Ellipsis):
        yield kind


def _value_words(kind: Any) -> Iterator[str]:
    for leaf in _leaves(kind):
        if get_origin(leaf) is typing.Literal:
            yield from map(str, get_args(leaf))
        elif leaf == Place:
            yield "PATH"
        else:
            word = "YAML" if get_origin(leaf) is dict else "TEXT"
            yield {bool: "true|false", int: "INT", float: "NUMBER"}.get(leaf, word)


def _range_of(kind: Any) -> str:
    """What the metavar leaves out: a range, or choices that are too long for it."""
    text = kind_text(kind)
    if _metavar(kind) in ("CHOICE", "VALUE") or any(sign in text for sign in "≥≤<>"):
        return re.sub(r"(int|float), |null or | or null", "", text)
    return ""


def from_flags(config_class: type[Config], arguments: Mapping[str, Any]) -> Any:
    """Build the config from parsed arguments."""
    hints = get_type_hints(config_class, include_extras=True)
    presets = arguments.get(PRESET_KEY, [])
    given = {
        field.name: _parsed(arguments[field.name], hints[field.name], split=field.metadata["split"])
        for field in dataclasses.fields(config_class)
        if field.name in arguments
    }
    return config_class.resolve(given, presets)


def unknown_flag(flag: str, config_class: type[Config] | None) -> str:
    """Error for an unknown flag or a stray word."""
    names = [field.name for field in dataclasses.fields(config_class)] if config_class else []
    return (
        "--" + unknown_name(flag.removeprefix("--"), names)
        if flag.startswith("--")
        else f"{flag}: unexpected; write knobs as --name value"
    )


def _parsed(value: str | list[str], kind: Any, *, split: bool = True) -> Any:
    """Parse a flag's text like a preset's value; text knobs keep their text, e.g. `007`."""
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
    """Whether a knob is a bool, possibly with a third choice: the flag alone means true."""
    return kind is bool or bool in get_args(kind)


def _one_or_several(kind: Any) -> bool:
    """Whether a knob takes one value or a list."""
    is_union = get_origin(kind) in (typing.Union, types.UnionType)
    return is_union and any(get_origin(inner) is tuple for inner in get_args(kind))


def _list_items(part: str) -> list[str]:
    inner = part.strip()
    return [item.strip() for item in inner.strip("[]").split(",")] if inner.startswith("[") or "," in inner else [part]


def _takes_text(kind: Any) -> bool:
    leaves = list(_leaves(kind))
    return any(leaf in (str, Place) or get_origin(leaf) is typing.Literal for leaf in leaves) and not (
        int in leaves or float in leaves
    )
