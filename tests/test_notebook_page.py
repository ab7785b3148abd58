"""What Jupyter Notebook shows in a browser: outputs as the library makes them, and one cell that runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from ebr_lib.errors import ConfigError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.visualize.run import SCREEN, VisResult
from tests.visualize.test_explorer import write_page

pytest.importorskip("notebook")
WAIT = 60_000  # milliseconds
BAR = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), leave=False):\n    pass\nprint('encoded')"


def pictured(folder: Path) -> VisResult:
    """A result whose picture is as tall as that of before and after, with an explorer."""
    from matplotlib.image import imsave

    imsave(folder / "map.png", np.zeros((2500, 2000, 3)))
    numbers = {"rows": 8, "numbers": {"same label @10": {"value": 0.4}, "chance": {"value": 0.1}}, "before": None}
    page, table = write_page(folder / "map.html"), pd.DataFrame({"label": ["热水器"] * 20})
    return VisResult(folder / "map.png", page, folder / "map.json", numbers, {"numbers": table})


def small_notebook(folder: Path, monkeypatch) -> Path:
    """A cell to run, a picture, and a mistake of a user."""
    monkeypatch.chdir(folder)  # links are relative to the folder in which the program runs
    shown = nbformat.v4.new_output("display_data", {"text/html": pictured(folder)._repr_html_()})
    with pytest.raises(ConfigError) as mistake:
        EvalConfig.resolve({"modles": ["a"]})
    box = mistake.value._render_traceback_()
    error = nbformat.v4.new_output("error", ename="ConfigError", evalue=str(mistake.value), traceback=box)
    cells = [
        nbformat.v4.new_code_cell(BAR),
        nbformat.v4.new_code_cell("pictured", outputs=[shown], execution_count=2),
        nbformat.v4.new_code_cell("check_configs()", outputs=[error], execution_count=3),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "small.ipynb")
    return folder / "small.ipynb"


@pytest.fixture
def jupyter(tmp_path):
    """Jupyter Notebook on a free port; yields the address of a notebook in its folder."""
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / "jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "notebook", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += ["--IdentityProvider.token=", "--ServerApp.open_browser=False", f"--ServerApp.root_dir={tmp_path}"]
    with subprocess.Popen(command, env=os.environ | places, stderr=subprocess.DEVNULL) as server:
        try:
            ends = time.monotonic() + WAIT / 1000
            while not (found := list((tmp_path / "jupyter" / "RUNTIME").glob("jpserver-*.json"))):
                assert server.poll() is None and time.monotonic() < ends, "Jupyter did not start"
                time.sleep(0.1)
            yield lambda name: f"{json.loads(found[0].read_text())['url']}notebooks/{name}"
        finally:
            server.terminate()


def test_a_notebook_shows_boxes_pictures_and_no_bars(jupyter, browser, tmp_path, monkeypatch):
    address = jupyter(small_notebook(tmp_path, monkeypatch).name)
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(WAIT)
    page.goto(address)
    picture = page.locator(".jp-OutputArea img[alt=maps]")
    picture.wait_for()
    assert picture.bounding_box()["height"] == SCREEN
    assert page.locator(".jp-mod-outputsScrolled").count() == 0
    with page.expect_popup() as opened:
        page.locator(".jp-OutputArea a", has_text="map.html").click()
    opened.value.wait_for_function("explorer.points === 8")
    box = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").inner_text()
    assert "参数有误 ConfigError" in box and "did you mean models?" in box and "Traceback" not in box
    page.locator(".jp-CodeCell").first.click()
    page.keyboard.press("Control+Enter")
    first = page.locator(".jp-CodeCell").first.locator(".jp-OutputArea")
    first.get_by_text("encoded").wait_for()
    assert first.inner_text().strip() == "encoded" and first.locator(".jupyter-widgets").count() == 0


def test_without_scripts_the_picture_and_links_are_there(browser, tmp_path, monkeypatch):
    """As in a viewer that blocks them; the explorer needs scripts, and its place says what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_text(pictured(tmp_path)._repr_html_(), encoding="utf-8")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("img[alt=maps]").bounding_box()["height"] == SCREEN
    page.locator("summary", has_text="explorer").click()
    assert page.get_by_text("blank? trust the notebook, or open the file").is_visible()
    assert page.locator("a[href='map.html']").count() == 1
