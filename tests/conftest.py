"""Fixtures that every test may use, as tiny models, the packaged MiniLM, a browser; and what is run where."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import coverage
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # pytest-cov watches twice in such a process: what it began before it knew where it is goes on where a test has
    # `no_cover`. It is ended here; the second begins with the session, after what would take twice its time to load
    if watching := coverage.Coverage.current():
        watching.stop()
    import sentence_transformers  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The longest files, longest first: a file is one process's, and none of these may be what the others wait for.
LONGEST = [
    "test_visualize",
    "test_finetune",
    "test_ray",
    "test_inference_restart",
    "test_training_knobs",
    "test_mining",
    "test_notebook",
]
# Files of one process with another, which has loaded or compiled what they need too: UMAP, a server of processes.
TOGETHER = {
    "test_projection": "test_visualize",
    "test_guides": "test_visualize",
    "test_distributed": "test_finetune",
    "test_inference": "test_finetune",
}
# Files and tests that train again and again, over lines that others run too: watched, a training takes twice its time.
UNWATCHED = {
    "test_continuing",
    "test_distributed",
    "test_guides",
    "test_knobs_bite",
    "test_mining",
    "test_training_knobs",
    "test_a_checkpoint_that_a_kill_cut_short_is_passed_over",
    "test_a_run_that_died_while_it_saved_is_not_trained_on",
    "test_after_a_signal_the_run_goes_on_as_if_there_had_been_none",
    "test_every_knob_changes_the_weights",
    "test_noise_is_the_same_with_and_without_workers",
    "test_off_is_bit_equal_to_never_heard_of",
    "test_the_saved_config_repeats_the_run",
    "test_workers_change_nothing",
}


def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class ByFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(super()._split_scope(nodeid)).stem
            return TOGETHER.get(file, file)

    return ByFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if {item.path.stem, getattr(item, "originalname", "")} & UNWATCHED:
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def _log_as_imported():
    """Each test finds the log silent, whatever a test or a wider fixture before it showed: caplog hears it."""
    from ebr_lib.logs import logger

    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory):
    """A function: kind (bert, xlm-r, modernbert, qwen2, kalm …) or shape (dense, towers …) to a tiny model's folder."""
    from tests.models import SHAPES, build_shape, build_tiny, build_tiny_kalm

    built: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in built:
            folder = tmp_path_factory.mktemp("model") / f"tiny-{kind}"
            if kind in SHAPES:
                built[kind] = build_shape(kind, folder)
            else:
                built[kind] = build_tiny_kalm(folder) if kind == "kalm" else build_tiny(kind, folder)
            gc.freeze()  # the libraries that are loaded by now stay: each training collects garbage, in what is left
        return built[kind]

    return folder_of


@pytest.fixture(scope="session")
def tiny_bert(tiny_models) -> Path:
    return tiny_models("bert")


@pytest.fixture(scope="session")
def minilm() -> Path:
    from ebr_lib.model.loading import packaged_model

    return packaged_model()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; for one module at a time, since its event loop would hinder the notebook's."""
    if not CHROMIUM or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs chromium and the playwright package")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()
