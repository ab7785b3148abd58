"""Values of filters and ids, as kept columns hold them: texts, and None for null."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np

from ebr_lib.errors import ConfigError, DataError


def allowed_values(where: object) -> dict[str, list[str | None]]:
    """A filter, column to value or values, with its values as kept columns hold them.

    :raises ConfigError: it is not a mapping, or a value is not a plain one.
    :raises DataError: a value holds half of a character.
    """
    if not isinstance(where, Mapping):
        raise ConfigError(f"where: {where!r}; wanted column to value, such as {{'kind': 'a'}}")
    allowed = {str(name): as_texts(values) for name, values in where.items()}
    for name, values in allowed.items():
        for value in values:
            check_unicode(f"where: the value of {name}", value or "")
    return allowed


def as_texts(values: object) -> list[str | None]:
    """One value or several; a text is one value, not its letters."""
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if isinstance(values, np.ndarray) and not values.ndim:
        several, values = False, values[()]
    return [text for value in (cast(Iterable[object], values) if several else [values]) for text in _spellings(value)]


def _spellings(value: object) -> list[str | None]:
    """How a kept column may hold a value: null as null, true as Hive and as Python write it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (type(value) is float and np.isnan(value)):
        return [None]
    if isinstance(value, bool):
        return [str(value).lower(), str(value)]
    if isinstance(value, bytes | Mapping) or (isinstance(value, Iterable) and not isinstance(value, str)):
        raise ConfigError(f"{value!r}; wanted a text, a number, a truth value or None, or a list of them")
    return [str(value)]


def check_unicode(what: str, text: str) -> None:
    """Make sure that UTF-8 can write a text.

    :raises DataError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} {text!r} holds half of a character ({text[error.start]!r}), which UTF-8 cannot write; it was cut "
            "or decoded wrongly before"
        ) from error
