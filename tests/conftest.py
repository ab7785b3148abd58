"""Fixtures that every test may use: tiny models (built once a run) and the packaged MiniLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory):
    """A function: kind (bert, xlm-r, modernbert, qwen2, kalm) to the folder of a tiny model."""
    from tests.models import build_tiny, build_tiny_kalm

    built: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in built:
            folder = tmp_path_factory.mktemp("model") / f"tiny-{kind}"
            built[kind] = build_tiny_kalm(folder) if kind == "kalm" else build_tiny(kind, folder)
        return built[kind]

    return folder_of


@pytest.fixture(scope="session")
def tiny_bert(tiny_models) -> Path:
    return tiny_models("bert")


@pytest.fixture(scope="session")
def minilm() -> Path:
    from ebr_lib.model.loading import packaged_model

    return packaged_model()
