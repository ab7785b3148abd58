"""Presets: YAML files of knobs, in which 3e-5 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ebr_lib.errors import ConfigError, MissingError

PRESET_KEY = "preset"


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
