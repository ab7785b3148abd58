"""Optional packages: which extra of the installation brings what a stage needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec

from ebr_lib.errors import NotInstalledError

EXTRAS = {
    "index": ("faiss",),
    "view": ("faiss", "sklearn", "umap", "openTSNE", "threadpoolctl"),
    "onnx": ("onnx", "onnxscript"),
    "milvus": ("pymilvus", "milvus_lite"),
    "tensorboard": ("tensorboard",),
    "sweep": ("optuna",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "modelscope": ("modelscope",),
    "notebook": ("nbclient", "nbformat", "ipykernel"),
}
"""Extra in pyproject.toml to the modules that it installs."""


@functools.cache
def require(extra: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    :raises NotInstalledError: names the missing ones and the command that installs them.
    """
    need_packages(EXTRAS[extra], f"'ebr-workflow[{extra}]'")


def need_packages(names: Sequence[str], package: str) -> None:
    """Check that modules are installed, without importing them.

    :param package: what pip installs them with.
    :raises NotInstalledError: names the missing ones and the command that installs them.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise NotInstalledError(f"not installed: {', '.join(missing)}; run: pip install {package}")
