"""The notebook runs headlessly, with other parameters where wanted, and leaves what it says."""

import json
from pathlib import Path

import nbformat
import pytest

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.notebook import INJECTED, NotebookError, headline, inject, parse_parameters, run_notebook

ROOT = Path(__file__).parent.parent


def small_notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_parameters_are_injected_behind_their_cell_and_replaced():
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("A = {'x': 1}\nRUN = True", metadata={"tags": ["parameters"]})]
    )
    inject(notebook, {"A": {"x": 2}, "RUN": False})
    inject(notebook, {"A": {"x": 3}})
    assert [cell.source for cell in notebook.cells] == ["A = {'x': 1}\nRUN = True", "A |= {'x': 3}"]
    assert notebook.cells[1].metadata["tags"] == [INJECTED]
    with pytest.raises(ConfigError, match="sets no RUM; it sets A, RUN"):
        inject(notebook, {"RUM": 1})


def test_settings_are_yaml():
    settings = ["RUN=false", "C.rate=3e-5", "C.names=[a, b]"]
    assert parse_parameters(settings) == {"RUN": False, "C": {"rate": 3e-5, "names": ["a", "b"]}}
    with pytest.raises(ConfigError, match="wanted NAME=VALUE"):
        parse_parameters(["RUN"])


def test_a_failing_cell_is_named_and_its_outputs_kept(tmp_path):
    path = small_notebook(tmp_path, "x = 1", "print('before')", "raise ValueError('no ' * x)")
    with pytest.raises(NotebookError, match=r"small.ipynb: ValueError: no .*out.ipynb"):
        run_notebook(path, tmp_path / "out.ipynb", {"x": 2})
    kept = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert kept.cells[2].outputs[0].text == "before\n"
    assert not any(cell.outputs for cell in nbformat.read(path, as_version=4).cells)
    with pytest.raises(MissingError):
        run_notebook(tmp_path / "none.ipynb", tmp_path / "out.ipynb")


def test_bars_are_kept_as_they_ended(tmp_path):
    bar = "import sys\nfor share in (10, 50, 100):\n    print(f'\\r{share}%', end='', file=sys.stderr, flush=True)"
    run_notebook(small_notebook(tmp_path, "x = 1", bar), tmp_path / "out.ipynb")
    (shown,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
    assert shown.text == "100%"


def test_the_workflow_runs_end_to_end(tiny_bert, tmp_path):
    """All stages on the sample data, with a tiny model; the demo does it with the real one."""
    saved = tmp_path / "saved" / "tiny-bert-peft-lora"
    vectors = tmp_path / "faiss" / "embeds_2.txt"
    picture = tmp_path / "scatter.png"
    parameters = {
        "FINETUNE_CONFIG": {
            "model_name": str(tiny_bert), "output_dir": str(tmp_path / "saved"), "num_epochs": 1, "max_seq_length": 48,
        },
        "INFERENCE_CONFIG": {"model_name": str(saved), "output_path": str(vectors)},
        "VIS_CONFIG": {"embedding_path": str(vectors), "output_path": str(picture), "method": "tsne"},
        "EVAL_CONFIG": {
            "models": [str(tiny_bert), str(saved)], "data_path": str(saved), "output_dir": str(tmp_path / "evaluation"),
        },
        "INDEX_CONFIG": {"embedding_path": str(vectors), "output_dir": str(tmp_path / "index")},
        "RUN_EVALUATION": True,
        "RUN_INDEX": True,
    }  # fmt: skip
    executed = run_notebook(ROOT / "EBR_workflow.ipynb", tmp_path / "executed.ipynb", parameters)
    assert (saved / "adapter_model.safetensors").is_file()
    assert vectors.read_bytes().count(b"\n") == 253  # a header and 252 products
    assert json.loads(Path(f"{vectors}.json").read_text(encoding="utf-8"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.with_suffix(".html").is_file()
    assert (tmp_path / "evaluation" / "report.html").is_file()
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "训练集大小: 640" in text
    assert any("base64" in o.data.get("text/html", "") or "image/png" in o.data for o in outputs if "data" in o)
    assert str(executed) in headline(executed)
    assert len(headline(executed)) < 20_000
