"""Presets: YAML files of knobs, in which 3e-5 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ebr_lib.errors import ConfigError, MissingError

PRESET_KEY = "preset"
_LIBRARY = Path(__file__).parents[1]
_SHIPPED = [_LIBRARY, _LIBRARY.parent]  # folders with our `configs/`: in the installed package, in a clone


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-5` as a float; by YAML 1.1 only `3.0e-5` is one, and `3e-5` a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """Parse a YAML text: plain values only, and `3e-5` is a number."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_preset(path: str | Path) -> dict[str, Any]:
    """Read one preset file: a YAML mapping of knobs.

    A path such as `configs/index/hnsw.yaml` that is not in the current folder names the preset that we ship.

    :raises MissingError: there is no such file.
    :raises ConfigError: the file is not YAML, or not a mapping.
    """
    place = next((place for place in (Path(path), *(root / path for root in _SHIPPED)) if place.is_file()), None)
    if place is None:
        raise MissingError(
            f"preset {path}: there is no such file; presets here: {', '.join(_near(Path(path))) or 'none'}"
        )
    try:
        values = read_yaml(place.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"preset {path}: wanted a mapping of knobs (`name: value`), found {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def _near(path: Path) -> list[str]:
    """Presets in a path's folder, or in that folder of ours; all of ours if there are none."""
    for root in (Path(), *_SHIPPED):
        if found := sorted(str(path.parent / p.name) for p in (root / path.parent).glob("[!.]*.yaml")):
            return found
    return sorted({p.relative_to(root).as_posix() for root in _SHIPPED for p in root.glob("configs/*/*.yaml")})


def shipped_presets(folder: str) -> dict[str, str]:
    """The presets that we ship in a folder of `configs/`, with what the first line of each says."""
    for root in _SHIPPED:
        if files := sorted((root / "configs" / folder).glob("*.yaml")):
            return {f"configs/{folder}/{p.name}": p.read_text("utf-8").split("\n")[0].strip("# ") for p in files}
    return {}
