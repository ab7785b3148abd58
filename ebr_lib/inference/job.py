"""What an encoding job is: its input and output, what it needs of an encoder, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings.base import DELIMITER
from ebr_lib.data.hive import EMPTY_LINE, HEADER_AGAIN, Layout, Source
from ebr_lib.names import VectorType

REJECT_HEADER = DELIMITER.join([b"file", b"line", b"offset", b"reason", b"raw"]) + b"\n"
EMPTY_TEXTS = ("null text", "blank text", "empty text")
SKIPPED = (*EMPTY_TEXTS, EMPTY_LINE, HEADER_AGAIN)  # rejects that are not losses: there was nothing to read
EXAMPLES = 5

OnProgress = Callable[[int, int, float], None]  # rows done, texts encoded in this run, share of the input
Check = Callable[["Outcome", Sequence[Path]], None]  # given the reject files too; raises to keep the old output


class TextEncoder(Protocol):
    """What a job needs of an encoder; the model's own is `ebr_lib.model.encoder.Encoder`."""

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""

    def prepare(self, texts: list[str]) -> Any:
        """Do what can be done while other texts are encoded: tokenise them, say."""

    def encode(self, prepared: Any, on_progress: Callable[[int], None]) -> tuple[Vectors, EncodeReport]:
        """Vectors (texts, dim) of what `prepare` returned; `on_progress` is called with the number of texts done."""


@dataclass(frozen=True)
class EncodeReport:
    """What was counted while texts were encoded.

    :param cut: some texts that were cut: index, tokens, tokens kept.
    :param lost: tokens cut off, per text; None when unknown.
    """

    counts: Counter[str] = field(default_factory=Counter)
    cut: list[tuple[int, int, int]] = field(default_factory=list)
    lost: NDArray[Any] | None = None


@dataclass(frozen=True)
class Job:
    """What to encode, and where to.

    :param settings: all that decides what is written; an interrupted run is continued only with equal settings.
    :param inputs: name, size and sha256 of each source.
    :param append: add to a finished output, and take new files into a run that is continued.
    """

    sources: tuple[Source, ...]
    layout: Layout
    text_column: str
    kept: tuple[str, ...]
    output: Path
    settings: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    on_empty_text: str = "skip"
    window_rows: int = 16384
    append: bool = False
    with_header: bool = True
    vector_type: VectorType = "float32"

    @property
    def folder(self) -> Path:
        """Where the job works."""
        return work_folder(self.output)

    @property
    def rejects(self) -> Path:
        """Where its rejects lie once it is done."""
        return rejects_path(self.output)

    @property
    def wanted(self) -> list[str]:
        """The columns to read: those kept, then the text."""
        return [*self.kept, self.text_column]


def work_folder(output: Path) -> Path:
    """Where a job works, beside its output; removed when the job is done."""
    return Path(f"{output}.work")


def rejects_path(output: Path) -> Path:
    """Where the rejects of an output lie."""
    return Path(f"{output}.rejects")


@dataclass(frozen=True)
class Tally:
    """What was counted over rows.

    :param counts: rows and tokens, by name.
    :param reasons: rejects, by reason.
    :param breaks: kept values with a line break at which other readers split rows, by column.
    :param altered: kept values that text cannot hold and that were written otherwise, by column.
    :param examples: some texts that were cut.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    breaks: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.counts + other.counts,
            self.reasons + other.reasons,
            self.breaks + other.breaks,
            self.altered + other.altered,
            [*self.examples, *other.examples][:EXAMPLES],
        )

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Tally:
        """The tally that was written as JSON, from its `vars`."""
        fields: dict[str, Any] = {n: v if n == "examples" else Counter(v) for n, v in stored.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Outcome:
    """What the output holds.

    :param tally: of all its rows.
    :param new_counts: of the rows that this job added; differs from the tally's when it appended.
    :param new_reasons: of the rejects that this job added.
    :param inputs: the input files; see `Job.inputs`.
    :param size: of the output, in bytes.
    """

    tally: Tally
    new_counts: Counter[str]
    new_reasons: Counter[str]
    inputs: list[dict[str, Any]]
    size: int = 0
