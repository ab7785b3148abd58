"""The installed package: its files, its version, what it requires, and how it imports on other systems."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hatchling import build
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ebr_lib
from ebr_lib import cli, extras
from ebr_lib.errors import NotInstalledError
from ebr_lib.knobs.presets import read_preset

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def names(*requirements: str) -> dict[str, Requirement]:
    found = [Requirement(text) for text in requirements]
    return {canonicalize_name(one.name): one for one in found}


def pins() -> dict[str, Requirement]:
    lines = [line for file in ROOT.glob("requirements*.txt") for line in file.read_text(encoding="utf-8").splitlines()]
    return names(*(line.partition(" #")[0] for line in lines if line and not line.startswith(("#", "-r "))))


def ranges() -> dict[str, Requirement]:
    optional = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    return {name: one for name, one in names(*PROJECT["dependencies"], *optional).items() if name != PROJECT["name"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The built wheel; hatchling builds it in this process, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / build.build_wheel(str(folder)))


def test_the_wheel_has_every_module_preset_and_data_file(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info" not in name}
    files = {path for path in (ROOT / "ebr_lib").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    presets = {f"ebr_lib/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/*/*.yaml")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files} | presets
    assert {"ebr_lib/py.typed", "ebr_lib/visualize/page/paint.js", "ebr_lib/configs/index/hnsw.yaml"} <= packed


def test_the_wheel_has_the_library_s_version_and_the_licence(wheel):
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {ebr_lib.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_script_is_the_command_line():
    (script,) = PROJECT["scripts"].items()
    assert EntryPoint(*script, group="console_scripts").load() is cli.main


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"ebr-workflow {ebr_lib.__version__}\n"


def test_every_range_holds_the_pinned_version():
    pinned = {name: re.sub("^==", "", str(one.specifier)) for name, one in pins().items()}
    for name, one in ranges().items():
        assert one.specifier.contains(pinned[name]), one


def test_every_import_of_the_library_is_a_requirement():
    distributions = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "pyyaml", "umap": "umap-learn"}
    indirect = {
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "numba",
        "starlette",
        "grpc",
    }  # of others
    jupyter = {"traitlets", "jupyter_client", "jupyter_core"}  # of nbclient
    used = {name for path in (ROOT / "ebr_lib").rglob("*.py") for name in imports(path, top_level=False)}
    third = used - set(sys.stdlib_module_names) - indirect - jupyter - {"ebr_lib"}
    assert {canonicalize_name(distributions.get(name, name)) for name in third} <= ranges().keys()


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Packages that a file imports; with `top_level` those that importing the file itself loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_no_module_needs_a_package_that_windows_lacks():
    for path in (ROOT / "ebr_lib").rglob("*.py"):
        assert not imports(path, top_level=True) & POSIX_ONLY, path


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    extras.require("index")
    extras.require.cache_clear()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match=r"not installed: faiss; run: pip install 'ebr-workflow\[index\]'"):
        extras.require("index")


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = "configs/index/hnsw.yaml"
    shipped = read_preset(preset)
    assert shipped == read_preset(ROOT / preset)
    (tmp_path / "configs/index").mkdir(parents=True)
    (tmp_path / preset).write_text("k: 1\n")
    assert read_preset(preset) == {"k": 1}
