"""Names that both the configs and the parts know. Light: `--help` reads them and imports no numpy."""

from __future__ import annotations

from typing import Literal, get_args

Column = Literal["anchor", "positive", "negative"]
COLUMNS = get_args(Column)
"""What a training row has."""

OnBadRow = Literal["error", "skip"]
NoiseKind = Literal["random_delete", "random_swap", "char_delete", "none"]

Metric = Literal["recall@1", "recall@10", "mrr@10", "ndcg@10"]
METRICS = get_args(Metric)
"""What is measured on the held-out anchors."""

BestMetric = Literal[Metric, "loss"]
LOWER_IS_BETTER = "loss"
