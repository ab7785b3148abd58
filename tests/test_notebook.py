"""The notebook runs headlessly, with other parameters where wanted, and leaves what it says."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ebr_lib.cli import main
from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.notebook import INJECTED, NotebookError, headline, inject, parse_parameters, run_notebook

ROOT = Path(__file__).parent.parent


def small_notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_parameters_are_injected_after_their_cell_and_replaced():
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("A = {'x': 1}\nRUN = True", metadata={"tags": ["parameters"]})]
    )
    inject(notebook, {"A": {"x": 2}, "RUN": False})
    inject(notebook, {"A": {"x": 3}})
    assert [cell.source for cell in notebook.cells] == ["A = {'x': 1}\nRUN = True", "A |= {'x': 3}"]
    assert notebook.cells[1].metadata["tags"] == [INJECTED]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RUM": True}, r"RUM: the parameters cell does not set it; did you mean RUN\? It sets A, MODEL, RATE, RUN"),
        ({"RUN": "flase"}, "RUN: 'flase'; wanted true or false"),
        ({"RUN": 1}, "RUN: 1; wanted true or false"),
        ({"RUN": None}, "RUN: None; wanted true or false"),
        ({"A": 5}, r"A: 5; wanted knobs \(NAME\.knob=value\)"),
        ({"zzz": 5}, r"zzz: the parameters cell does not set it\. It sets A, MODEL"),
        ({"RUN": {"x": 1}}, r"RUN: {'x': 1}; wanted true or false"),
        ({"RATE": "fast"}, "RATE: 'fast'; wanted a number"),
        ({"RATE": True}, "RATE: True; wanted a number"),
        ({"MODEL": 3}, "MODEL: 3; wanted a text .quotes"),
    ],
)
def test_unknown_parameters_and_other_types_are_refused(given, said):
    source = "A = {'x': 1}\nRUN: bool = True\nRATE = 0.5\nMODEL = 'm'"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    inject(notebook, {"RATE": 1, "RUN": False})
    with pytest.raises(ConfigError, match=said):
        inject(notebook, given)


def test_settings_are_yaml():
    settings = ["RUN=false", "C.rate=3e-5", "C.names=[a, b]"]
    assert parse_parameters(settings) == {"RUN": False, "C": {"rate": 3e-5, "names": ["a", "b"]}}
    with pytest.raises(ConfigError, match="wanted NAME=VALUE"):
        parse_parameters(["RUN"])
    with pytest.raises(ConfigError, match="is not YAML"):
        parse_parameters(["C.names=[a"])
    with pytest.raises(ConfigError, match="C already has a value"):
        parse_parameters(["C=1", "C.x=2"])
    assert parse_parameters(["C.day=2026-11-01", "C.x="]) == {"C": {"day": "2026-11-01", "x": None}}


def test_a_failing_cell_is_named_and_its_outputs_kept(tmp_path, capsys):
    path = small_notebook(tmp_path, "x = 1", "print('before')", "raise ValueError('no ' * x)")
    arguments = ["notebook", "--notebook", str(path), "--output", str(tmp_path / "out.ipynb"), "--set", "x=2"]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert "error: ValueError: no no" in shown and "In [4] (raise ValueError" in shown and "out.ipynb" in shown
    assert "Traceback" not in shown
    kept = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert kept.cells[2].outputs[0].text == "before\n"
    assert not any(cell.outputs for cell in nbformat.read(path, as_version=4).cells)
    with pytest.raises(MissingError):
        run_notebook(tmp_path / "none.ipynb", tmp_path / "out.ipynb")


def test_a_user_error_in_a_cell_keeps_its_class(tmp_path, capsys, monkeypatch):
    """Of a notebook in another folder, without the library on Python's path; and this Python runs it."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "train.jsonl").write_text("{}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    specification = tmp_path / "kernels" / "python3" / "kernel.json"
    specification.parent.mkdir(parents=True)
    specification.write_text('{"argv": ["/bin/false"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    says = "import sys, pathlib; print(sys.executable, pathlib.Path('train.jsonl').exists())"
    config = "from ebr_lib import check_configs; check_configs(finetune={'num_epoch': 3})"
    path = small_notebook(tmp_path / "notebooks", "x = 1", says, config)
    monkeypatch.chdir(tmp_path)
    assert main(["notebook", "--notebook", "notebooks/small.ipynb", "--output", "out.ipynb"]) == 2
    shown = capsys.readouterr().err
    assert "num_epoch: unknown; did you mean num_epochs?" in shown and "In [3]" in shown and "Traceback" not in shown
    assert f"{sys.executable} True" in shown
    assert main(["notebook", "--notebook", str(path), "--output", str(path)]) == 2
    assert "would replace the input" in capsys.readouterr().err
    (tmp_path / "no.ipynb").write_text("no")
    assert main(["notebook", "--notebook", "no.ipynb"]) == 2
    assert "no.ipynb is not a notebook" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "cause"),
    [("os._exit(3)", "with exit status 3"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL, probably out of memory")],
)
def test_a_dead_kernel_is_reported_with_its_cell_and_cause(tmp_path, end, cause):
    path = small_notebook(tmp_path, "x = 1", f"import os\n{end}")
    with pytest.raises(NotebookError, match=rf"cell In \[2\] \(import os\): the kernel died, {cause}; see .*out.ipynb"):
        run_notebook(path, tmp_path / "out.ipynb")


def test_ctrl_c_interrupts_the_cell_with_one_line(tmp_path):
    """As in a terminal: the signal comes to the program, whose cell may save what it has."""
    waits = "    print('begun', flush=True)\n    time.sleep(60)"
    saves = f"try:\n{waits}\nexcept KeyboardInterrupt:\n    print('saved')\n    raise"
    path = small_notebook(tmp_path, "import time", saves)
    command = [
        sys.executable,
        "-m",
        "ebr_lib",
        "notebook",
        "--notebook",
        str(path),
        "--output",
        str(tmp_path / "o.ipynb"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "saved\ninterrupted\n")
    assert "saved" in (tmp_path / "o.ipynb").read_text(encoding="utf-8")


BARS = [
    "import sys, time\nfrom IPython.display import display",
    "for share in (10, 50, 100):\n    print(f'\\r{share}%', end='', file=sys.stderr, flush=True)",
    "print('\\r50%', end='', file=sys.stderr)\nprint('\\r    \\r', end='', file=sys.stderr)",
    """
for share in (10, 50):
    print(f"\\r{share}%", end="", file=sys.stderr, flush=True)
    time.sleep(0.3)  # the streams reach the notebook one after the other
    print(f"at {share}", flush=True)
    time.sleep(0.3)
print("\\r     \\r", end="", file=sys.stderr)""",
    "display({'application/vnd.jupyter.widget-view+json': {'model_id': 'a'}, 'text/plain': '0%'}, raw=True)\n"
    "print('encoded')",
]


def test_bars_keep_their_last_state_or_leave_nothing(tmp_path):
    """Widgets too: their kernel has ended, and what is left of a bar would be an error, or 0 %."""
    run_notebook(small_notebook(tmp_path, *BARS), tmp_path / "out.ipynb")
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    shown = ["".join(output.text for output in cell.outputs) for cell in cells]
    assert shown == ["", "100%", "", "at 10\nat 50\n", "encoded\n"]


def test_the_workflow_runs_end_to_end(tiny_bert, tmp_path):
    """All stages on the beginning of the sample data, with a tiny model; the demo does it on all, with the real one."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join((ROOT / "train_text" / "queries.jsonl").open(encoding="utf-8").readlines()[:80]), "utf-8")
    saved = tmp_path / "saved" / "tiny-bert-peft-lora"
    vectors, base = tmp_path / "faiss" / "embeds_2.txt", tmp_path / "faiss" / "embeds_base.txt"
    picture = tmp_path / "scatter.png"
    parameters = {
        "FINETUNE_CONFIG": {
            "model_name": str(tiny_bert), "data_path": str(pairs), "output_dir": str(tmp_path / "saved"),
            "num_epochs": 1, "max_seq_length": 48, "backend": "torch",
        },
        "INFERENCE_CONFIG": {
            "model_name": str(saved), "data_path": "infer_data/catalogue_000.csv", "output_path": str(vectors),
        },
        "BASE_CONFIG": {"model_name": str(tiny_bert), "output_path": str(base)},
        "VIS_CONFIG": {
            "embedding_path": str(vectors), "compare_path": str(base), "output_path": str(picture), "method": "tsne",
        },
        "EVAL_CONFIG": {
            "models": [str(tiny_bert), str(saved)], "data_path": str(saved), "output_dir": str(tmp_path / "evaluation"),
            "backend": "torch",
        },
        "INDEX_CONFIG": {"embedding_path": str(vectors), "output_dir": str(tmp_path / "index")},
        "BASE_INDEX_CONFIG": {"embedding_path": str(base), "output_dir": str(tmp_path / "index_base")},
        "SEARCH_QUERIES": [],
        "RUN_EVALUATION": True,
        "RUN_INDEX": True,
    }  # fmt: skip
    executed = run_notebook(ROOT / "EBR_workflow.ipynb", tmp_path / "executed.ipynb", parameters)
    assert (saved / "adapter_model.safetensors").is_file()
    assert vectors.read_bytes().count(b"\n") == 127  # a header and 126 products
    assert json.loads(Path(f"{vectors}.json").read_text(encoding="utf-8"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.with_suffix(".html").is_file()
    assert (tmp_path / "evaluation" / "report.html").is_file()
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "训练集大小: 80" in text
    assert any("base64" in o.data.get("text/html", "") or "image/png" in o.data for o in outputs if "data" in o)
    assert "评估 evaluation: step 0 of " in text
    first = json.loads((ROOT / "train_text" / "heldout" / "queries.jsonl").read_text("utf-8").splitlines()[0])["anchor"]
    found = next(o.data["text/html"] for o in outputs if "data" in o and "微调 tuned" in o.data.get("text/html", ""))
    assert "基座 base" in found and first in found  # without queries of its own, those that the index was measured with
    errors = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert not errors  # bars go when they are done
    assert str(executed) in headline(executed)
    assert len(headline(executed)) < 20_000
