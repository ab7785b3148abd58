"""Where a training run writes, and the checks that nothing but our own models is replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ebr_lib.errors import ConfigError
from ebr_lib.files import check_apart, make_folder
from ebr_lib.model.contract import CONTRACT_FILE, Contract, read_contract
from ebr_lib.model.packaged import model_label
from ebr_lib.model.provenance import ModelIdentity

ADAPTER_SUFFIX, MERGED_SUFFIX, CHECKPOINTS_SUFFIX = "-peft-lora", "-merged", "-checkpoints"
CONFIG_FILE, LOG_FILE, CURVE_FILE = "finetune_config.yaml", "training_log.jsonl", "loss_curve.png"
MINED_FILE = "mined_negatives.jsonl"
FOUND_FILE = "found.json"  # among the checkpoints: what a run found before it trained


class Paths:
    """The places that one run writes to, all in its output folder; an adapter's name keeps one suffix."""

    def __init__(self, output_dir: str, model_name: str) -> None:
        folder, label = Path(output_dir), model_label(model_name).removesuffix(ADAPTER_SUFFIX)
        self.adapter = folder / f"{label}{ADAPTER_SUFFIX}"
        self.merged = folder / f"{label}{MERGED_SUFFIX}"
        self.checkpoints = folder / f"{label}{CHECKPOINTS_SUFFIX}"
        self.rejects = folder / "rejected_rows.jsonl"
        self.heldout_rejects = folder / "heldout_rejected_rows.jsonl"
        self.noisy = folder / "noisy_positives.jsonl"

    def check(self, inputs: Iterable[str | Sequence[str] | None]) -> None:
        """Check that the output paths are free or hold our models, and that none of them is an input.

        :raises ConfigError: a run would replace something else.
        """
        make_folder(self.adapter.parent)
        check_apart(vars(self).values(), inputs)
        for place in (self.adapter, self.merged, self.checkpoints):
            if place.exists() and not place.is_dir():
                raise ConfigError(f"output folder {place} is a file; give another output_dir, or move the file")
            is_ours = place == self.checkpoints or (place / CONTRACT_FILE).is_file()
            if place.is_dir() and any(place.iterdir()) and not is_ours:
                raise ConfigError(
                    f"output folder {place} would be replaced, and holds no model of this stage; give another "
                    "output_dir, or move the folder"
                )

    def check_base(self, base: ModelIdentity) -> None:
        """Check that a model that will be replaced was trained from the same base, not from another of that name.

        :raises ConfigError: it was trained from another.
        """
        for place in (self.adapter, self.merged):
            there = read_contract(place)
            if there is not None and not _same_base(there, base):
                raise ConfigError(
                    f"output folder {place} holds a model trained from another base ({there.base_model}, weights "
                    f"sha256 {there.base_sha256}) than {base.base_model} ({base.base_sha256}), and would be replaced; "
                    "give another output_dir, or move the folder"
                )


def _same_base(there: Contract, base: ModelIdentity) -> bool:
    if base.base_sha256 is None:  # not on this machine yet, or it has no weights of its own: compare the names
        return there.base_sha256 is not None or there.base_model == base.base_model
    return there.base_sha256 == base.base_sha256
