"""What made a set of document vectors: the one comparison that evaluation, search and adding rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebr_lib.errors import ModelError
from ebr_lib.logs import logger
from ebr_lib.model.loading import check_remote_code, files_of, identify, one_sided
from ebr_lib.names import Choice, OnChangedVectors


@dataclass(frozen=True)
class Maker:
    """The model and settings that made an embedding file or an index, as far as its manifest says; else None."""

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
    def of(cls, manifest: Mapping[str, Any]) -> Maker:
        """Read it off the manifest of an embedding file, or of an index, which repeats that of its file."""
        model, settings = manifest.get("model") or {}, manifest.get("settings") or {}
        return cls(
            name=model.get("asked_for") or model.get("name"),
            path=model.get("path"),
            sha256=model.get("sha256"),
            prompt=settings.get("prompt"),
            max_seq_length=settings.get("max_seq_length"),
            precision=settings.get("precision"),
            dimension=settings.get("dimension"),
            description_column=settings.get("description_column"),
            trust_remote_code=model.get("trust_remote_code"),
            files=tuple(settings.get("model files") or ()),
        )

    @property
    def said(self) -> str:
        """For an error."""
        return f"model {self.name}" if self.name else "a model that no manifest names"

    @property
    def weights(self) -> frozenset[str]:
        """As `weights_of`, where the model is still at its place."""
        if self.sha256 is None:
            return frozenset()
        there = weights_of(self.path) if self.path and Path(self.path).is_dir() else frozenset()
        return there if self.sha256 in there else frozenset({self.sha256})

    def differences(self, other: Mapping[str, object]) -> list[str]:
        """Which of the other's settings are given (not None) and are not those that made these vectors."""
        return [
            f"{name} {getattr(self, name)!r}, not {value!r}"
            for name, value in other.items()
            if value is not None and value != getattr(self, name)
        ]


def check_same_code(maker: Maker, model_name: str, choice: Choice) -> None:
    """Check that a model is loaded as it was when it made the vectors, with or without its own code.

    :raises ModelError: nothing was chosen about code that it brings, or another thing than then.
    """
    now = check_remote_code(model_name, choice, maker.trust_remote_code)
    if maker.trust_remote_code not in (None, now):
        raise ModelError(
            f"the vectors of {maker.said} were made with trust_remote_code: {str(maker.trust_remote_code).lower()}, "
            f"and {model_name} no longer brings code of its own; give the model as it was, or encode again"
        )


def changed_files(maker: Maker, model_name: str) -> bool:
    """Whether the configs, tokenizer, modules or code of a model are not those that made the vectors, as far as it is
    known; of an adapter for queries only its base's count, which made them."""
    identity = identify(model_name)
    recorded = (maker.files, files_of(identity), files_of(identity, with_place=True))
    then, now, before = (tuple(dict.fromkeys(files)) for files in recorded)
    if one_sided(model_name):
        then, now, before = then[-1:], now[-1:], before[-1:]
    return len(then) == len(now) and None not in (*then, *now) and then not in (now, before)


def say_changed_files(maker: Maker, model_name: str, where: str, on_changed_vectors: OnChangedVectors) -> None:
    """Report a model of equal weights whose other files have changed since it made the vectors.

    :raises ModelError: they have, unless `on_changed_vectors` is "warn".
    """
    if not maker.sha256 or not changed_files(maker, model_name):
        return
    said = (
        f"{where} holds vectors of {maker.said}, whose configs, tokenizer, pooling or .py files have changed since "
        f"({model_name}); put them back, or encode and index again"
    )
    if on_changed_vectors == "error":
        raise ModelError(f"{said}; on_changed_vectors: warn goes on")
    logger.warning("模型文件已改变 %s", said)


def weights_of(model_name: str) -> frozenset[str]:
    """The sha256 of a model's weights, and of its base's too where the adapter is for queries only: documents go
    through the base alone, so either has made the same vectors."""
    identity = identify(model_name)
    both = (identity.sha256, identity.base_sha256 if one_sided(model_name) else None)
    return frozenset(sha256 for sha256 in both if sha256)
