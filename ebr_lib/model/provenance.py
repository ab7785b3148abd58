"""Which model made a set of vectors: the comparison that evaluation, search and adding rows share."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebr_lib.errors import MissingError, ModelError, NotInstalledError
from ebr_lib.logs import logger
from ebr_lib.model.bases import base_place, one_sided
from ebr_lib.model.contract import files_sha256, read_contract, weights_sha256
from ebr_lib.model.hubs import MODELSCOPE
from ebr_lib.model.loading import check_remote_code
from ebr_lib.model.packaged import find_model, local_folder
from ebr_lib.model.remote_code import own_code
from ebr_lib.names import Choice, OnChangedVectors


@dataclass(frozen=True)
class ModelIdentity:
    """Name, folder and sha256 of a model's weights, and of its base's.

    `trust_remote_code` is how it was loaded; False for a model without code of its own.
    """

    name: str
    path: str
    sha256: str | None
    base_model: str
    base_sha256: str | None
    trust_remote_code: Choice = False


def identify(name: str, trust_remote_code: Choice = False) -> ModelIdentity:
    """Identify a model without loading it.

    :param trust_remote_code: as `check_remote_code` returns it.
    """
    place = find_model(name)
    name = place if place.startswith(MODELSCOPE) else name  # whatever the knob `hub` was then
    folder = local_folder(name)
    contract = read_contract(folder) if folder else None
    own = weights_sha256(folder) if folder else None
    path = str(folder or name)
    if contract is None or contract.merged:  # a merged model is its own base
        return ModelIdentity(name, path, own, name, own, trust_remote_code)
    base = contract.base_model
    with contextlib.suppress(MissingError, ModelError, NotInstalledError):  # loading the model reports it
        base = base_place(name, path, contract)
        if find_model(contract.base_model) == base:
            base = contract.base_model
    return ModelIdentity(name, path, own, base, contract.base_sha256, trust_remote_code)


def files_of(identity: ModelIdentity) -> tuple[str | None, ...]:
    """`files_sha256` of a model, its base and the repositories that hold its code; None for one not on this machine."""
    folders: dict[str, Path | None] = {}
    for name in (identity.path, identity.base_model):
        with contextlib.suppress(MissingError, NotInstalledError):
            folders[name] = local_folder(name)
    repositories = {code.repository for folder in folders.values() if folder for code in own_code(folder)} - {None}
    elsewhere = {name: local_folder(str(name)) for name in sorted(map(str, repositories))}
    places = (elsewhere | folders).values()
    return tuple(files_sha256(folder) if folder else None for folder in places)


@dataclass(frozen=True)
class Provenance:
    """The model and settings that made an embedding file or an index, read from its manifest; None where unknown."""

    name: str | None
    path: str | None
    sha256: str | None
    prompt: str | None
    max_seq_length: int | None
    precision: str | None
    dimension: int | None
    description_column: str | None
    trust_remote_code: Choice | None
    files: tuple[str | None, ...]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Provenance:
        """Read the manifest of an embedding file, or of an index, which repeats that of its file."""
        model, settings = manifest.get("model") or {}, manifest.get("settings") or {}
        same_name = ("prompt", "max_seq_length", "precision", "dimension", "description_column")
        return cls(
            name=model.get("asked_for") or model.get("name"),
            path=model.get("path"),
            sha256=model.get("sha256"),
            trust_remote_code=model.get("trust_remote_code"),
            files=tuple(settings.get("model files") or ()),
            **{name: settings.get(name) for name in same_name},
        )

    @property
    def said(self) -> str:
        """The model's name, for an error."""
        return f"model {self.name}" if self.name else "a model that no manifest names"

    @property
    def weights(self) -> frozenset[str]:
        """`weights_of` the model, if its folder still has the same weights; else their sha256 alone."""
        if self.sha256 is None:
            return frozenset()
        there = weights_of(self.path) if self.path and Path(self.path).is_dir() else frozenset()
        return there if self.sha256 in there else frozenset({self.sha256})

    def differences(self, other: Mapping[str, object]) -> list[str]:
        """Settings in `other` that are not None and are not those that made these vectors."""
        return [
            f"{name} {getattr(self, name)!r}, not {value!r}"
            for name, value in other.items()
            if value is not None and value != getattr(self, name)
        ]


def check_same_code(made: Provenance, model_name: str, choice: Choice) -> None:
    """Check that a model's own code runs, or not, as it did when the vectors were made.

    :raises ModelError: it does not, or nothing was chosen about code that the model brings.
    """
    now = check_remote_code(model_name, choice, made.trust_remote_code)
    if made.trust_remote_code not in (None, now):
        raise ModelError(
            f"the vectors of {made.said} were made with trust_remote_code: {str(made.trust_remote_code).lower()}, "
            f"and {model_name} no longer brings code of its own; give the model as it was, or encode again"
        )


def changed_files(made: Provenance, model_name: str) -> bool:
    """Whether a model's configs, tokenizer, modules or code are known to have changed since it made the vectors.

    With an adapter for queries only, the base made the vectors of documents: only its files count.
    """
    then, now = (tuple(dict.fromkeys(files)) for files in (made.files, files_of(identify(model_name))))
    if one_sided(model_name):
        then, now = then[-1:], now[-1:]
    return len(then) == len(now) and None not in (*then, *now) and then != now


def say_changed_files(made: Provenance, model_name: str, where: str, on_changed_vectors: OnChangedVectors) -> None:
    """Report a model with the same weights whose other files have changed since it made the vectors.

    :raises ModelError: they have, unless `on_changed_vectors` is "warn".
    """
    if not made.sha256 or not changed_files(made, model_name):
        return
    said = (
        f"{where} holds vectors of {made.said}, whose configs, tokenizer, pooling or .py files have changed since "
        f"({model_name}); put them back, or encode and index again"
    )
    if on_changed_vectors == "error":
        raise ModelError(f"{said}; on_changed_vectors: warn goes on")
    logger.warning("模型文件已改变 model files changed: %s", said)


def weights_of(model_name: str) -> frozenset[str]:
    """The sha256 values of weights that make this model's document vectors: its own, and its base's where the adapter
    is for queries only."""
    identity = identify(model_name)
    both = (identity.sha256, identity.base_sha256 if one_sided(model_name) else None)
    return frozenset(sha256 for sha256 in both if sha256)
