"""Headless runs: execute a copy of the notebook with other parameters, and show its log while it runs."""

from __future__ import annotations

import ast
import asyncio
import atexit
import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import traitlets
import yaml
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from ebr_lib import errors
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.files import check_apart, check_output_file, has_home, written_whole
from ebr_lib.knobs.presets import read_yaml
from ebr_lib.names import did_you_mean

PARAMETERS, INJECTED = "parameters", "injected-parameters"
LIBRARY = Path(__file__).parent.parent
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text (quotes make it one: 'NAME=\"3\"')",
    list: "a list ([a, b])",
    dict: "knobs (NAME.knob=value)",
}
"""How messages name the types of parameters."""

TEXT_BARS = "import tqdm.auto, tqdm.std; tqdm.auto.tqdm = tqdm.std.tqdm"
"""Run in the kernel: a terminal shows no widgets, so bars are text."""

WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(RuntimeError):
    """A cell failed with an error that is not a `UserError`; the executed copy is kept up to that cell."""


class _ThisPython(KernelSpecManager):
    """Starts this Python with this library, whatever kernel is installed under the name.

    `folder` holds what Jupyter would write to HOME, which a container may lack.
    """

    folder = traitlets.Unicode()

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        argv.append(f"--IPKernelApp.exec_lines={TEXT_BARS}")
        places = [str(LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHONPATH": os.pathsep.join(places), "JUPYTER_RUNTIME_DIR": self.folder}
        env |= {} if has_home() else {"HOME": self.folder}
        return KernelSpec(argv=argv, display_name=kernel_name, language="python", env=env)


class _Live(NotebookClient):
    """Prints the output of cells while they run, and knows which cell runs."""

    folder = ""
    current: NotebookNode | None = None
    number: int | None = None
    exit_status: int | None = None
    interrupted = False

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=_ThisPython(folder=self.folder),
            connection_file=str(Path(self.folder) / "kernel.json"),
        )
        return self.km

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        main = asyncio.current_task()

        def stop() -> None:
            """The first Ctrl-C interrupts the cell, as in a browser; the second ends the run."""
            if self.current is None or self.interrupted or self.km is None:
                main.cancel()  # type: ignore[union-attr] # a coroutine runs in a task
            else:
                self.stopping = asyncio.ensure_future(ensure_async(self.km.interrupt_kernel()))
            self.interrupted = True

        with contextlib.suppress(RuntimeError, NotImplementedError):  # another thread; Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop)
        await super().async_start_new_kernel(**kwargs)

    async def async_execute_cell(self, cell: NotebookNode, *given: Any, **named: Any) -> NotebookNode:
        self.current, self.number = cell, named.get("execution_count")
        try:
            return await super().async_execute_cell(cell, *given, **named)
        except DeadKernelError:
            self.exit_status = await self.km.provisioner.poll()  # type: ignore[union-attr] # it has run
            raise

    def output(self, outs: Any, msg: Any, display_id: str | None, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            sys.stderr.write(msg["content"]["text"])
            sys.stderr.flush()
        return super().output(outs, msg, display_id, cell_index)


def run_notebook(path: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a copy of a notebook in its own folder, as a browser would, and write it with its outputs.

    :param parameters: names of the cell tagged `parameters` to new values; a dict updates the cell's dict.
    :returns: path of the executed copy, which is also written when a cell fails.
    :raises MissingError: the notebook does not exist.
    :raises ConfigError: the cell is missing, does not set a name, or sets it to another type; or the output would
        replace the notebook.
    :raises UserError: a cell raised one; of the same class.
    :raises NotebookError: a cell raised anything else, or its kernel died.
    :raises KeyboardInterrupt: the run was stopped.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise MissingError(f"notebook {path}: there is no such file")
    check_output_file(output)
    check_apart([output], [path])
    notebook = _read(path)
    inject(notebook, parameters or {})
    client = _Live(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as client.folder:
            client.execute()
    except (CellExecutionError, DeadKernelError, RuntimeError, asyncio.CancelledError) as error:
        if client.interrupted:
            raise KeyboardInterrupt from None
        raise _explained(error, client, path, output) from error
    finally:
        atexit.unregister(client._cleanup_kernel)  # it stays registered if no kernel starts, and would fail
        _settle_bars(notebook)
        with written_whole(output) as new:
            nbformat.write(notebook, new)
    return output


def _read(path: Path) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise DataError(f"{path} is not a notebook ({str(error).splitlines()[0][:200]})") from error


def _explained(error: BaseException, client: _Live, path: Path, output: Path) -> Exception:
    """The error that stopped a notebook, with its cell; of the same class if a cell raised a `UserError`."""
    cell = client.current
    if cell is None:
        return NotebookError(f"{path.name}: the kernel did not start ({error})")
    first = next(iter(cell.source.strip().splitlines()), "")
    place = f"{path.name}, cell In [{client.number}] ({first[:60]})"
    if isinstance(error, CellExecutionError):
        kind = getattr(errors, error.ename, None)
        said = error.evalue if kind else f"{error.ename}: {error.evalue}"
        return (kind or NotebookError)(f"{said}\n{place}; see {output}")
    return NotebookError(f"{place}: the kernel died, {_cause(client.exit_status)}; see {output}")


def _cause(status: int | None) -> str:
    """Why a kernel's process ended, from its exit status (negative for a signal)."""
    if status is None or status >= 0:
        return f"with exit status {status}"
    name = signal.Signals(-status).name
    return f"killed by {name}" + (", probably out of memory" if name == "SIGKILL" else "")


def parse_parameters(settings: Sequence[str]) -> dict[str, Any]:
    """`RUN_X=false` and `FINETUNE_CONFIG.num_epochs=1` as the names and values to inject; values are YAML.

    :raises ConfigError: a setting without `=`, a value that is not YAML, or both a dict and one of its knobs.
    """
    parameters: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise ConfigError(f"{setting}: wanted NAME=VALUE")
        config, dot, knob = name.partition(".")
        if not dot:
            parameters[name] = _value(setting, text)
        elif isinstance(parameters.setdefault(config, {}), dict):
            parameters[config][knob] = _value(setting, text)
        else:
            raise ConfigError(f"{setting}: {config} already has a value; give one of the two")
    return parameters


def _value(setting: str, text: str) -> Any:
    """A YAML value that Python can write as a literal, otherwise the text: a date, for example."""
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{setting}: {text!r} is not YAML; put quotes around a text: 'NAME=\"…\"'") from error
    try:
        ast.literal_eval(repr(value))
    except ValueError:
        return text
    return value


def headline(executed: str | Path) -> str:
    """The results that an executed notebook displays, as text, and its path."""
    notebook = nbformat.read(executed, as_version=4)
    shown = [
        shown.data["text/plain"]
        for cell in notebook.cells
        for shown in cell.get("outputs", [])
        if shown.output_type == "display_data" and not shown.data.get("text/plain", "<").startswith("<")
    ]
    return "\n\n".join([*shown, f"executed notebook: {executed}"])


def inject(notebook: NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Put a cell tagged `injected-parameters` after the parameters cell, replacing any earlier one.

    :raises ConfigError: there is not exactly one parameters cell, or it does not set a name, or to another type.
    """
    notebook.cells = [cell for cell in notebook.cells if INJECTED not in _tags(cell)]
    if not parameters:
        return
    places = [i for i, cell in enumerate(notebook.cells) if PARAMETERS in _tags(cell)]
    if len(places) != 1:
        raise ConfigError(f"the notebook has {len(places)} cells tagged {PARAMETERS!r}; wanted one")
    known = _assigned(notebook.cells[places[0]].source)
    if wrong := [text for name, value in parameters.items() if (text := _wrong(name, value, known))]:
        raise ConfigError("\n".join(wrong))
    lines = [f"{name} |= {v!r}" if isinstance(v, Mapping) else f"{name} = {v!r}" for name, v in parameters.items()]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": [INJECTED]})
    notebook.cells.insert(places[0] + 1, cell)


def _wrong(name: str, value: Any, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a parameter: an unknown name, or a type other than that of the cell's value."""
    if name not in known:
        meant = did_you_mean(name, known) or "."
        return f"{name}: the parameters cell does not set it{meant} It sets {', '.join(sorted(known))}"
    held = known[name]
    if isinstance(held, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = held is None or type(value) is type(held)
    if fits:
        return None
    wanted = KINDS.get(type(held), type(held).__name__)
    return f"{name}: {value!r}; wanted {wanted}, as in the notebook"


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _assigned(source: str) -> dict[str, Any]:
    """The names that a cell sets, with their values; None for a value that is not a literal.

    :raises ConfigError: the cell is not Python.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"the parameters cell is not Python: {error.msg} in its line {error.lineno}") from error
    found: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            try:
                value = ast.literal_eval(statement.value)
            except ValueError:
                value = None
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _settle_bars(notebook: NotebookNode) -> None:
    """Keep the last state of each text bar that stays, since all updates would be megabytes, and no widgets.

    A widget lives in its kernel, which has ended: in the copy it would be an error, or a bar at 0 %.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _end_bars(cell.outputs)
            cell.outputs = _joined([shown for shown in cell.outputs if WIDGET not in shown.get("data", {})])
            for shown in cell.outputs:
                if shown.output_type == "stream":
                    shown.text = re.sub(r"[^\n]*\r(?!\n)", "", shown.text)
            # bars that were cleared leave nothing
            cell.outputs = [shown for shown in cell.outputs if shown.output_type != "stream" or shown.text.strip()]


def _end_bars(outputs: Sequence[NotebookNode]) -> None:
    """Remove what a stream left on its line where its next piece goes back to the beginning of that line, as a bar does
    that was drawn above a line of the log."""
    open_line: dict[str, NotebookNode] = {}
    for shown in outputs:
        if shown.output_type == "stream":
            last = open_line.get(shown.name)
            if last is not None and shown.text.startswith("\r"):
                last.text = last.text[: last.text.rfind("\n") + 1]
            open_line[shown.name] = shown


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs with consecutive pieces of one stream joined."""
    joined: list[NotebookNode] = []
    for shown in outputs:
        last = joined[-1] if joined else None
        if last is not None and shown.output_type == last.output_type == "stream" and shown.name == last.name:
            last.text += shown.text
        else:
            joined.append(shown)
    return joined
