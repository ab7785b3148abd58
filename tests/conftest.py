"""Fixtures for all tests: tiny models, the packaged MiniLM, a browser; and how tests are spread over processes."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

import coverage
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # pytest-cov starts twice in a worker process, and `no_cover` does not end the first measurement. It is ended here;
    # the second starts with the session, after the libraries, which would take twice as long to load
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

# The longest files, longest first: each runs in one process, and should not be what the other process waits for.
LONGEST = ["test_visualize", "test_run", "test_ray", "test_trainer", "test_notebook"]
# Files that share a process with another file, which has loaded or compiled what they need: UMAP, a process server.
TOGETHER = {
    "test_projection": "test_visualize",
    "test_distributed": "test_run",
    "test_inference": "test_run",
    "test_inference_restart": "test_run",
    "test_index_store": "test_run",
    "test_serve": "test_run",
}
# Files that start processes, kernels or clusters: a CI job of their own.
APART = {"test_distributed", "test_guides", "test_inference_restart", "test_notebook", "test_notebook_page", "test_ray"}
# Files and tests that take long for lines that others run too: measuring coverage adds half to their time or more.
UNWATCHED = set(re.findall(r"\w+", """
    test_batches test_checkpoints test_dataset test_distributed test_docs test_guides test_inference_nasty
    test_mining test_noise test_openvino test_preflight test_projection test_schedulers test_speed test_structure
    test_temperature test_trainer
    test_the_saved_config_repeats_the_run test_every_shape_trains test_one_number_in_log_table_and_evaluation
    test_the_saved_mined_rows_train_to_the_same_weights test_an_adapter_and_a_merged_model_are_trained_further
    test_before_is_the_base_model_and_after_is_what_was_saved
    test_each_knob_bites_and_a_cached_batch_is_the_whole_batch
    test_learning_from_a_teacher_bites_and_is_off_by_default test_vectors_stay_when_saved_loaded_merged_and_resumed
    test_in_bfloat16_a_trained_model_and_its_saved_one_give_the_same_vectors
    test_an_adapter_for_queries_leaves_documents_to_the_base
    test_only_the_adapter_is_trained_when_new_and_when_continued test_every_stage_stops_or_warns
    test_the_real_one_reads_chinese test_a_broken_model_is_explained
    test_the_base_model_without_its_adapter_also_with_a_second_mistake test_a_sentence_transformers_folder
    test_a_prompt_may_be_missing_doubled_or_the_other_side_s test_half_precision_is_allowed_when_asked_for
    test_another_model_is_unknown test_a_damaged_input_is_fetched_again_and_the_files_before_it_are_kept
    test_help_names_every_knob_with_its_default_and_fits_80_columns test_other_kinds_of_picture
"""))  # fmt: skip


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
        if item.path.stem in APART:
            item.add_marker("apart")


# --- a worker that dies shows where it was ------------------------------------------------------------------------


_STACKS = "EBR_TEST_STACKS"  # environment variable: folder of a file per worker
_stack: TextIO | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _stack  # noqa: PLW0603
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and _STACKS in os.environ:
        _stack = (Path(os.environ[_STACKS]) / worker).open("w", encoding="utf-8")
    elif config.getoption("numprocesses", None):
        folder = tempfile.TemporaryDirectory(prefix="ebr-stacks-")
        config.add_cleanup(folder.cleanup)
        os.environ[_STACKS] = folder.name


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Write the stack of a crash or of a test past its time to the worker's file, whatever a library has set since."""
    if _stack is not None:
        faulthandler.enable(_stack)
        limit = float(item.config.getini("faulthandler_timeout"))
        faulthandler.dump_traceback_later(limit, exit=True, file=_stack)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: object) -> None:
    """Show the dead worker's stack in its report."""
    stack = Path(os.environ[_STACKS]) / report.node.gateway.id  # type: ignore[attr-defined]
    report.longrepr = f"{report.longrepr}\n\n{stack.read_text(encoding='utf-8')}"


@pytest.fixture(autouse=True)
def _log_as_imported():
    """Reset the log before each test, so that caplog receives it."""
    from ebr_lib.logs import logger

    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def on_torch():
    """Encode on torch, since converting a tiny model to OpenVINO takes longer than all else with it."""
    from ebr_lib.model import openvino

    def refuse(*_: object) -> None:
        raise openvino.ConversionError("tests that convert ask for the fixture `openvino`")

    converts, openvino.compiled_transformer = openvino.compiled_transformer, refuse
    return converts


@pytest.fixture
def openvino(on_torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of OpenVINO: models are converted."""
    monkeypatch.setattr("ebr_lib.model.openvino.compiled_transformer", on_torch)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, on_torch):
    """A function from a kind (bert, xlm-r, qwen2, kalm …) or shape (dense, towers …) to the folder of a tiny model."""
    from tests.models import SHAPES, build_shape, build_tiny, build_tiny_kalm

    built: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in built:
            folder = tmp_path_factory.mktemp("model") / f"tiny-{kind}"
            if kind in SHAPES:
                built[kind] = build_shape(kind, folder)
            else:
                built[kind] = build_tiny_kalm(folder) if kind == "kalm" else build_tiny(kind, folder)
            gc.freeze()  # each training collects garbage; the loaded libraries need not be searched
        return built[kind]

    return folder_of


@pytest.fixture(scope="session")
def tiny_bert(tiny_models) -> Path:
    return tiny_models("bert")


@pytest.fixture(scope="session")
def minilm(on_torch) -> Path:
    from ebr_lib.model.packaged import packaged_model

    return packaged_model()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, per module, since its event loop disturbs the notebook's."""
    if not CHROMIUM or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs chromium and the playwright package")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()
