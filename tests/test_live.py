"""A notebook's cells use no config of a cell that failed, and a user's mistake is a box without a stack."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.live import Stale

FIRST = "from ebr_lib import check_configs, show_logs\nshow_logs()\nA_CONFIG = {'num_epochs': 1}\nRUN_A = True"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The errors of cells, by number, in a notebook where the parameters fail when they are run again."""
    sources = [
        FIRST,
        "A_CONFIG = {'num_epochs': 2\nRUN_A = True",
        "if RUN_A:\n    print('ran')",
        "check_configs(finetune=A_CONFIG)",
        "A_CONFIG = {'num_epoch': 2}\nRUN_A = True",
        "if RUN_A:\n    check_configs(finetune=A_CONFIG)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": "."}})
    client.execute()
    return [next(iter(cell.outputs), {}) for cell in notebook.cells]


def test_after_a_syntax_error_the_old_config_is_not_used(outputs):
    assert outputs[1].ename == "SyntaxError"
    for cell in (2, 3):
        assert (
            outputs[cell].ename == "ConfigError" and "the cell that sets it failed (SyntaxError" in outputs[cell].evalue
        )


def test_once_corrected_the_new_config_is_used_and_its_mistake_is_a_box_without_a_stack(outputs):
    shown = "\n".join(outputs[5].traceback)
    assert "did you mean num_epochs?" in shown and shown.startswith("\x1b[31m┏━ ") and "参数有误 ConfigError" in shown
    assert "Traceback" not in shown and "line" not in shown and len(shown.splitlines()) <= 6


def test_a_stale_config_refuses_every_use():
    stale = Stale("RUN_A", SyntaxError("bad"))
    for use in (bool, list, lambda s: s | {}, lambda s: s["a"], dict):
        with pytest.raises(ConfigError, match=r"RUN_A: .*the cell that sets it failed"):
            use(stale)


def test_boxes_hold_every_line_of_a_message():
    assert MissingError("one\ntwo")._render_traceback_()[0].count("┃") == 2
