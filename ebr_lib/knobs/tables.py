"""Knob tables of the documents."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import get_type_hints

from ebr_lib.knobs.checks import Config, default_of, shown_value
from ebr_lib.knobs.flags import kind_text


def knob_table(config_class: type[Config], language: str = "help") -> str:
    """Markdown table of a stage's knobs; `language` is "help" (English) or "zh"."""
    head = {
        "help": "| knob | type and range | default | what it does |",
        "zh": "| 参数 | 类型与范围 | 默认值 | 作用 |",
    }[language]
    lines = [head, "| --- | --- | --- | --- |"]
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        cells = (
            f"`{field.name}`",
            kind_text(hints[field.name]),
            f"`{shown_value(default_of(field))}`",
            field.metadata[language],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


_TABLE = re.compile(r"(<!-- knobs:(\w+)(:zh)? -->\n).*?(<!-- /knobs -->)", re.DOTALL)


def with_tables(document: str, classes: Mapping[str, type[Config]]) -> str:
    """Replace the knob tables between a document's `<!-- knobs:stage -->` marks (`:zh` for Chinese)."""

    def table(found: re.Match[str]) -> str:
        language = "zh" if found[3] else "help"
        return f"{found[1]}{knob_table(classes[found[2]], language)}\n{found[4]}"

    return _TABLE.sub(table, document)
