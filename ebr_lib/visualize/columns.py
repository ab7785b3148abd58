"""The kept columns of the rows on the explorer page: what each can be coloured by, and which holds ids or titles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ebr_lib.visualize.groups import Groups, groups_of

FEW, MOST_LABELS = 20, 1000  # different values: so few are labels whatever they are; more are texts
IDS = ("id", "item_id", "sku_id", "doc_id", "goods_id", "_id", "sku", "asin", "商品id", "商品编号")
TITLES = ("title", "name", "item_name", "product_title", "product_name", "商品名称", "商品标题", "标题", "名称")


@dataclass(frozen=True)
class Column:
    """A column of the page: texts as they are in the file, None where a row has none.

    :param groups: the rows by value, if the column can colour as labels do.
    :param is_number: whether all values are numbers, which colour as a scale does.
    """

    name: str
    values: Sequence[str | None]
    groups: Groups | None = None
    is_number: bool = False


def column_of(name: str, values: Sequence[str | None]) -> Column:
    """A column and what it can be coloured by: a scale of numbers, labels that repeat, or nothing."""
    known = {value for value in values if value}
    if len(known) > FEW and all(map(_is_number, known)):
        return Column(name, values, is_number=True)
    if len(known) <= FEW or (len(known) <= MOST_LABELS and 2 * len(known) <= len(values)):
        return Column(name, values, groups_of(values, name))
    return Column(name, values)


def labels_column(groups: Groups) -> Column:
    """Labels that are in no column of the file: clusters."""
    return Column(groups.title, [None if code < 0 else groups.names[code] for code in groups.codes], groups)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def usual_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first column with one of the usual names, whatever their case."""
    lower: dict[str, str] = {}
    for name in columns:
        lower.setdefault(name.lower(), name)
    return next((lower[name] for name in names if name in lower), None)
