"""The hubs that models are downloaded from: Hugging Face, and ModelScope for names that begin with `modelscope:`."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ebr_lib.errors import MissingError
from ebr_lib.extras import EXTRAS, require
from ebr_lib.logs import logger
from ebr_lib.model.remote_code import LIBRARY, read_json
from ebr_lib.names import Hub

MODELSCOPE = "modelscope:"
BEFORE_WEIGHTS = ["*.json", "*.py", "*.txt", "*.model", "*.jinja"]
"""Files of a model on ModelScope that are downloaded before its weights."""
WITH_WEIGHTS = (".Transformer", ".Dense", ".LayerNorm", ".StaticEmbedding", ".CNN", ".LSTM")
"""Modules of sentence-transformers that have weights in their folder."""

_asked: Hub = "auto"
_elsewhere: set[str] = set()  # names that were on ModelScope when Hugging Face could not be reached


class HubError(Exception):
    """A hub did not provide a model; the message says which hub, and why."""


def ask_hub(hub: Hub) -> None:
    """From now on, look for names of models on this hub; see the knob `hub`."""
    global _asked  # noqa: PLW0603 - one answer for a process, as for folders of bases
    _asked = hub


def asked_hub() -> Hub:
    """The hub that names are looked for on."""
    return _asked


def with_hub(name: str) -> str:
    """A hub's name, with `modelscope:` before it if it is looked for there.

    :raises MissingError: it is not a name that ModelScope could have.
    :raises NotInstalledError: the package that downloads from there is missing.
    """
    if _asked == "modelscope" or (_asked == "auto" and name in _elsewhere):
        name = f"{MODELSCOPE}{name.removeprefix(MODELSCOPE)}"
    if name.startswith(MODELSCOPE):
        owner, _, model = name.removeprefix(MODELSCOPE).partition("/")
        if {owner, model} & {"", ".", ".."} or "/" in model:  # dots would lead out of its cache
            raise MissingError(
                f"model {name}: no such folder, and not a name of ModelScope, which are OWNER/NAME; give one such as "
                f"{MODELSCOPE}Qwen/Qwen3-Embedding-0.6B"
            )
        require("modelscope")
    return name


def hub_of(name: str) -> str:
    """Display name of the hub that a name (`with_hub`) is looked for on."""
    return "ModelScope" if name.startswith(MODELSCOPE) else "Hugging Face"


def cached(name: str) -> Path | None:
    """Folder of the files of a model that were downloaded before, maybe not all of them; None if there are none."""
    try:
        folder = Path(_snapshot(name, local_files_only=True))
    except HubError:
        return None
    return folder if any(folder.iterdir()) else None


def fetch_configs(name: str) -> str:
    """Download the configs and .py files of a model, to read them before its weights.

    :returns: the name under which the model is known from now on: that of ModelScope if `hub` is auto and Hugging Face
        cannot be reached.
    :raises HubError: no hub that was asked has it, or none can be reached.
    """
    logger.info("本机没有模型 %s，向 %s 请求 (not here; asking %s)", name, hub_of(name), hub_of(name))
    try:
        _snapshot(name, allow_patterns=BEFORE_WEIGHTS if name.startswith(MODELSCOPE) else ["*.json", "*.py"])
    except HubError as error:
        if not _may_be_elsewhere(name, error):
            raise
        logger.warning("连接不上 Hugging Face (Hugging Face cannot be reached)")
        there = fetch_configs(f"{MODELSCOPE}{name}")
        _elsewhere.add(name)
        return there
    return name


def fetch_weights(name: str) -> str:
    """Download the rest of a model of ModelScope, if it is not here.

    :returns: its folder; names of other hubs as they are, because sentence-transformers downloads from there.
    :raises HubError: ModelScope cannot be reached, or has no safetensors of it.
    """
    if not name.startswith(MODELSCOPE):
        return name
    folder = cached(name)
    if folder is None or not has_weights(folder):
        _snapshot(name, allow_patterns=BEFORE_WEIGHTS)  # without modules.json, it would be another model
        folder = Path(_snapshot(name, allow_patterns=[*BEFORE_WEIGHTS, "*.safetensors"]))
    if not has_weights(folder):
        raise HubError(f"{hub_of(name)} has no safetensors of it")
    return str(folder)


def has_weights(folder: Path) -> bool:
    """Whether all files of the weights are there: they are downloaded last, and each is complete or absent."""
    modules = read_json(folder / "modules.json") or [{"type": f"{LIBRARY}Transformer", "path": ""}]
    kinds = {folder / module["path"]: module["type"] for module in modules}
    own = {part for part, kind in kinds.items() if kind.startswith(LIBRARY) and kind.endswith(WITH_WEIGHTS)}
    indexes = {file: json.loads(file.read_text("utf-8")) for file in folder.rglob("*.safetensors.index.json")}
    shards = {file.parent / shard for file, index in indexes.items() for shard in index["weight_map"].values()}
    found = set(folder.rglob("*.safetensors"))
    return bool(found) and shards <= found and own <= {file.parent for file in found}


def fetch_whole(name: str) -> Path:
    """Download all files of a model.

    :raises HubError: its hub cannot be reached, or does not have it.
    """
    return Path(_snapshot(name))


def _may_be_elsewhere(name: str, error: HubError) -> bool:
    """Whether ModelScope is to be asked for a name that Hugging Face, which cannot be reached, did not provide."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if _asked != "auto" or name.startswith(MODELSCOPE) or name.count("/") != 1 or constants.HF_HUB_OFFLINE:
        return False
    cause = error.__cause__
    refused = isinstance(cause, OSError | ValueError) and not isinstance(cause, LocalEntryNotFoundError)
    return not refused and all(map(find_spec, EXTRAS["modelscope"]))


def _snapshot(name: str, **which: Any) -> str:
    """Folder of a repository, downloaded by what the packages of both hubs call `snapshot_download`.

    :raises HubError: it was not downloaded.
    """
    try:
        if not name.startswith(MODELSCOPE):
            from huggingface_hub import snapshot_download

            return snapshot_download(name, **which)
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it logs each try, and then raises
        from modelscope import snapshot_download as from_modelscope

        return str(from_modelscope(name.removeprefix(MODELSCOPE), **which))
    except Exception as error:  # of requests, httpx and both packages: without network, a name, a right, space
        raise HubError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
