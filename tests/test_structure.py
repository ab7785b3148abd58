"""Who may import whom: entry points → stages → `model`, `data` → ground files; nothing imports upwards."""

import ast
import functools
import json
import re
from pathlib import Path

import ebr_lib
from ebr_lib import cli

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "ebr_lib"
ENTRIES = {"", "__main__", "cli", "notebook", "config", "serve"}
STAGES = {stage.module.split(".")[1] for stage in cli.STAGES.values()} - ENTRIES
PARTS = {"model", "data"}
GROUND = {"metrics", "files", "errors", "extras", "logs", "tables", "names", "arrays", "knobs", "live"}
FLOORS = [GROUND, PARTS, STAGES, ENTRIES]
"""Lowest first: a higher floor may import a lower one."""


def path_of(module: str) -> Path:
    place = ROOT / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@functools.cache
def modules() -> list[str]:
    found = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in LIBRARY.rglob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in found)


def room_of(module: str) -> str:
    """Folder or file of ebr_lib that a module is in; "" is ebr_lib/__init__.py."""
    return module.partition(".")[2].partition(".")[0]


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@functools.cache
def nodes_of(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))))


@functools.cache
def imported(module: str) -> set[str]:
    """Modules of ebr_lib that a module imports, at the top or inside functions, also for types."""
    known, names = set(modules()), set()
    for node in nodes_of(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports by a relative name"
            names |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else str(node.module)
                for alias in node.names
            }
    return {name for name in names if room_of(name) or name == "ebr_lib"} & known


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Names of a cycle, first and last equal; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph.get(name, set()) - done):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_every_module_has_a_floor():
    assert {room_of(module) for module in modules()} == set().union(*FLOORS)


def test_no_module_imports_upwards_and_stages_do_not_import_each_other():
    for module in modules():
        room = room_of(module)
        others = {room_of(name) for name in imported(module)} - {room}
        assert not [other for other in sorted(others) if floor_of(other) > floor_of(room)], module
        assert not others & STAGES or room in ENTRIES, module


def test_there_is_no_import_cycle():
    graph = {module: imported(module) - {module} for module in modules()}
    assert cycle_in(graph) == []
    rooms: dict[str, set[str]] = {room_of(module): set() for module in modules()}
    for module, others in graph.items():
        rooms[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    assert cycle_in(rooms) == []


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_library_prints_nothing():
    for module in modules():
        if module not in ("ebr_lib.cli", "ebr_lib.__main__"):
            calls = [node for node in nodes_of(module) if isinstance(node, ast.Call)]
            assert not [call for call in calls if getattr(call.func, "id", "") == "print"], module


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
        ast.literal_eval(statement.value)  # literals only, so that `ebr notebook --set` can change them


def test_public_names_are_typed_loaded_and_listed():
    """Each name occurs twice: for the type checker, and for loading on first use."""
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    typed -= {"annotations", "TYPE_CHECKING", "Any"}
    assert typed == set(ebr_lib.__all__)
    assert all(getattr(ebr_lib, name) is not None for name in ebr_lib.__all__)


def test_files_and_tests_named_in_conftest_exist():
    from tests.conftest import APART, LONGEST, TOGETHER, UNWATCHED

    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    tests = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert {*APART, *LONGEST, *TOGETHER, *TOGETHER.values()} <= sources.keys()
    assert sources.keys() | tests >= UNWATCHED
