"""Refuse weights that are pickles, which can hold code, and convert them to safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from ebr_lib.errors import ModelError
from ebr_lib.model.hubs import fetch_whole, with_hub
from ebr_lib.model.remote_code import module_folders

# file names of pickled weights, and of the safetensors that are loaded instead
PICKLED_WEIGHTS = {"pytorch_model*.bin": "model*.safetensors", "adapter_model.bin": "adapter_model.safetensors"}
INDEX, SAFE_INDEX = "pytorch_model.bin.index.json", "model.safetensors.index.json"


def refuse_pickles(name: str, folder: Path) -> None:
    """Refuse a model with a part whose weights are only a pickle.

    :raises ModelError: names the file, and the command that converts the model.
    """
    for part, _ in module_folders(folder):
        if found := next(_needed(part), None):
            raise pickle_error(name, str(found))


def _needed(part: Path) -> Iterator[Path]:
    """The pickles in a folder that have no safetensors."""
    for pickled, safe in PICKLED_WEIGHTS.items():
        if not any(part.glob(safe)):
            yield from sorted(part.glob(pickled))


def pickle_error(name: str, found: str) -> ModelError:
    """The error for a model whose weights `found` are a pickle."""
    copied_to = f"{Path(name).resolve().name}-safetensors"
    code = f"from ebr_lib.model.pickles import to_safetensors; to_safetensors({name!r}, {copied_to!r})"
    return ModelError(
        f"model {name}: {found} is a pickle, which can hold code, and is not loaded; "
        f'convert it once with python -c "{code}" and give that folder'
    )


def to_safetensors(name: str, target: str) -> Path:
    """Copy a model with its pickled weights as safetensors; only tensors are read from pickles.

    :param name: a folder, or a hub name, which is downloaded.
    :raises ModelError: the target exists, or a pickle holds anything but tensors.
    """
    folder, copy = Path(name).expanduser(), Path(target)
    if not folder.is_dir():
        folder = fetch_whole(with_hub(name))
    if copy.exists():
        raise ModelError(f"{copy} exists; give another folder, or move it")
    try:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*PICKLED_WEIGHTS, copy.name))
        for part, _ in module_folders(folder):
            _convert(part, copy / part.relative_to(folder))
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _convert(part: Path, target: Path) -> None:
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import save_file

    for pickled in _needed(part):
        try:
            weights = torch.load(pickled, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ModelError(f"{pickled} holds more than tensors and is not read: {error}") from error
        # safetensors takes no tensor that shares memory with another
        tensors = {key: tensor.clone().contiguous() for key, tensor in weights.items() if torch.is_tensor(tensor)}
        save_file(tensors, target / _safe_name(pickled.name), metadata={"format": "pt"})
    if (part / INDEX).is_file():
        index = json.loads((part / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {key: _safe_name(file) for key, file in index["weight_map"].items()}
        (target / SAFE_INDEX).write_text(json.dumps(index), encoding="utf-8")
        (target / INDEX).unlink()


def _safe_name(pickled: str) -> str:
    return f"{pickled.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"
