"""Who may import whom: the notebook and the command line import stages, stages import parts, parts import parts."""

import ast
import json
import re
from pathlib import Path

import pytest

import ebr_lib
from ebr_lib import cli

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "ebr_lib"
STAGES = {stage.module.rpartition(".")[2] for stage in cli.STAGES.values()}
PARTS = {"data", "model", "view", "retrieval", "engines"}
FRONT = {"cli", "notebook", "config"}


def modules() -> list[str]:
    return sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in LIBRARY.rglob("*.py"))


def imported(module: str) -> set[str]:
    """What of ebr_lib a module imports, at the top or inside functions, types included."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    known = set(modules())
    return {m for name in names if name.startswith("ebr_lib") for m in [name, name.rpartition(".")[0]] if m in known}


@pytest.mark.parametrize("module", [m for m in modules() if m.split(".")[1] in PARTS])
def test_parts_know_neither_stages_nor_configs(module):
    seen = {name.split(".")[1] for name in imported(module) if "." in name}
    assert not seen & (STAGES | FRONT | {"knobs"})


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_each_other(stage):
    if (LIBRARY / f"{stage}.py").exists():
        assert not {name.split(".")[1] for name in imported(f"ebr_lib.{stage}")} & (STAGES - {stage})


def test_there_is_no_import_cycle():
    graph = {m: imported(m) - {m, "ebr_lib.__init__"} for m in modules() if not m.endswith("__init__")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' → '.join([*path, module])}"
        for other in () if module in done else graph.get(module, ()):
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_library_prints_nothing():
    for module in modules():
        if module not in ("ebr_lib.cli", "ebr_lib.__main__"):
            tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
            calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
            assert not calls, module


def test_the_notebook_holds_no_logic_and_no_outputs():
    cells = json.loads((ROOT / "EBR_workflow.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        tree = ast.parse("".join(cell["source"]))
        logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try, ast.Lambda)
        assert not any(isinstance(node, logic) for node in ast.walk(tree))
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)  # literals only, so that a program can read and change them


def test_the_front_door_offers_what_it_says():
    """Its names stand three times: for the type checker, for loading on first use, and as what is public."""
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    typed -= {"annotations", "TYPE_CHECKING", "Any"}
    assert typed == set(ebr_lib._HOMES) == set(ebr_lib.__all__)
    assert all(getattr(ebr_lib, name) is not None for name in ebr_lib.__all__)


def test_what_the_suite_is_told_of_its_files_and_tests_names_some():
    from tests.conftest import LONGEST, TOGETHER, UNWATCHED

    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    tests = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert {*LONGEST, *TOGETHER, *TOGETHER.values()} <= sources.keys()
    assert sources.keys() | tests >= UNWATCHED
