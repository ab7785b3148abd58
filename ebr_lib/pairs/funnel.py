"""The funnel: from the rows that were read to the pairs that were written, nothing unaccounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebr_lib.tables import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ebr_lib.pairs.choose import Step

COLUMNS = ("对象 of", "步骤 step", "去掉 left out", "剩余 left", "例 examples")
ROWS, TRAIN, HELDOUT = "rows", "training pairs", "held-out pairs"


@dataclass
class Funnel:
    """Steps in order, each of rows or of pairs: how many it left out, how many are left, a few that it left out."""

    steps: list[tuple[str, str, int, int, str]] = field(default_factory=list)

    def add(self, of: str, step: str, out: int, left: int, examples: Sequence[str] = ()) -> None:
        """Add a step."""
        self.steps.append((of, step, out, left, " · ".join(examples)))

    def add_all(self, of: str, steps: Sequence[Step]) -> None:
        """Add steps without examples."""
        for step, out, left in steps:
            self.add(of, step, out, left)

    def left(self, of: str) -> int:
        """What is left after the last step."""
        return next((left for kind, _, _, left, _ in reversed(self.steps) if kind == of), 0)

    @property
    def table(self) -> DataFrame:
        """The funnel for logs and notebooks."""
        title = (
            f"从日志到样本 from the log to pairs: {self.left(TRAIN)} 训练 training, {self.left(HELDOUT)} 留出 held out"
        )
        return make_table(title, COLUMNS, self.steps, width=60)
