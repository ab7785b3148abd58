"""What an evaluation recommends to put after a model. `evaluate` writes it, `index` keeps it, searches follow it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import DataError

REPORT_FILE = "report.json"
ADVICE = "recommended"
"""Key of the report: label of a model to `Advice.as_json`."""


@dataclass(frozen=True)
class Reranking:
    """A cross-encoder that reorders the `depth` best documents."""

    name: str
    depth: int

    @property
    def how(self) -> dict[str, object]:
        """Its settings, for a report."""
        return {"reranker": self.name, "documents": self.depth}


@dataclass(frozen=True)
class Advice:
    """What is recommended, and why. `fusion` is None if it was not measured, `reranking` if none is clearly better."""

    fusion: Fusion | None
    reranking: Reranking | None
    why: str

    @property
    def sentence(self) -> str:
        """The advice in one line."""
        fusion = [] if self.fusion is None else [self.fusion.said]
        reranking = [f"重排 re-ranked by {self.reranking.name}"] if self.reranking else []
        return f"{', '.join(fusion + reranking) or '未测 nothing measured'} ({self.why})"

    def as_json(self, sha256: str | None) -> dict[str, Any]:
        """The form in which a report holds it.

        :param sha256: of the weights of the model that it is for.
        """
        return asdict(self) | {"sha256": sha256}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Advice:
        """Read what `as_json` gave."""
        fusion, reranking = found["fusion"], found["reranking"]
        return cls(
            Fusion(**fusion) if fusion else None, Reranking(**reranking) if reranking else None, str(found["why"])
        )


def read_advice(folder: str, sha256: str | None) -> Advice:
    """The advice of an evaluation on one model; without one, reciprocal rank fusion, which has nothing to tune.

    :param sha256: of the model's weights, if they are known.
    :raises DataError: the report cannot be read.
    """
    place = Path(folder) / REPORT_FILE
    usual = Advice(Fusion("rrf"), None, f"没有评估 no evaluation in {folder}")
    if not place.is_file():
        return usual
    try:
        report = json.loads(place.read_text(encoding="utf-8"))
        found = {label: (entry["sha256"], Advice.of(entry)) for label, entry in report.get(ADVICE, {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place} is not a report of evaluate ({error!r}); evaluate again, or remove it") from error
    advice = (
        None if sha256 is None else next((advice for measured, advice in found.values() if measured == sha256), None)
    )
    if advice is None:
        others = ", ".join(found) or "nothing after a model"
        return replace(usual, why=f"未评估此模型 {place} measured {others}, not this model")
    if advice.fusion is None:
        return replace(advice, fusion=usual.fusion, why=f"未评估融合 {place} measured no fusion; {advice.why}")
    return advice
