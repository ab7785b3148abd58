"""The funnel: from the rows that were read to the pairs that were written, nothing unaccounted for."""

from __future__ import annotations

from collections.abc import Sequence

from pandas import DataFrame

from ebr_lib.tables import make_table

COLUMNS = ("对象 of", "步骤 step", "去掉 left out", "剩余 left", "例 examples")
ROWS, TRAIN, HELDOUT = "rows", "training pairs", "held-out pairs"


class Funnel(list[tuple[str, str, int, int, str]]):
    """Steps in order, each of rows or of pairs: how many it left out, how many are left, a few that it left out."""

    def add(self, of: str, step: str, out: int, left: int, examples: Sequence[str] = ()) -> None:
        """Add a step."""
        self.append((of, step, out, left, " · ".join(examples)))

    @property
    def table(self) -> DataFrame:
        """The funnel for logs and notebooks."""
        left = {of: left for of, _, _, left, _ in self}  # after the last step
        title = f"从日志到样本 from the log to pairs: {left[TRAIN]} 训练 training, {left.get(HELDOUT, 0)} 留出 held out"
        return make_table(title, COLUMNS, self, width=60)
