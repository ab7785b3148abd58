"""Headless runs: execute a copy of the notebook, with other parameters where wanted, and show its log meanwhile."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.files import written_whole
from ebr_lib.knobs import read_yaml

PARAMETERS, INJECTED = "parameters", "injected-parameters"


class NotebookError(RuntimeError):
    """A cell failed; the executed copy is kept, up to and with that cell."""


class _Live(NotebookClient):
    """Passes on what the cells print while they run."""

    def output(self, outs: Any, msg: Any, display_id: str | None, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            sys.stderr.write(msg["content"]["text"])
            sys.stderr.flush()
        return super().output(outs, msg, display_id, cell_index)


def run_notebook(path: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a copy of a notebook, in its own folder, and write it with its outputs.

    :param parameters: names of the cell tagged `parameters` to new values; a dict updates the cell's dict.
    :returns: where the executed copy is; it is written when a cell fails, too.
    :raises MissingError: there is no such notebook.
    :raises ConfigError: a name that the cell does not set, or no such cell.
    :raises NotebookError: a cell raised; says which and what.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise MissingError(f"notebook {path}: there is no such file")
    notebook = nbformat.read(path, as_version=4)
    inject(notebook, parameters or {})
    client = _Live(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookError(f"{path.name}: {error.ename}: {error.evalue}; see {output}") from error
    finally:
        _settle_bars(notebook)
        with written_whole(output) as new:
            nbformat.write(notebook, new)
    return output


def parse_parameters(settings: Sequence[str]) -> dict[str, Any]:
    """`RUN_X=false` and `FINETUNE_CONFIG.num_epochs=1` as the names and values to inject; values are YAML.

    :raises ConfigError: a setting without `=`, or whose value is no YAML.
    """
    parameters: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting}: wanted NAME=VALUE")
        config, dot, knob = name.partition(".")
        if dot:
            parameters.setdefault(config, {})[knob] = read_yaml(value)
        else:
            parameters[name] = read_yaml(value)
    return parameters


def headline(executed: str | Path) -> str:
    """What an executed notebook's cells returned, as text, and where the notebook is."""
    notebook = nbformat.read(executed, as_version=4)
    shown = [
        shown.data["text/plain"]
        for cell in notebook.cells
        for shown in cell.get("outputs", [])
        if shown.output_type == "display_data" and not shown.data.get("text/plain", "<").startswith("<")
    ]
    return "\n\n".join([*shown, f"executed notebook: {executed}"])


def inject(notebook: NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Put a cell tagged `injected-parameters` behind the parameters cell, in the stead of an earlier one.

    :raises ConfigError: there is not one parameters cell, or it does not set a name.
    """
    notebook.cells = [cell for cell in notebook.cells if INJECTED not in _tags(cell)]
    if not parameters:
        return
    places = [i for i, cell in enumerate(notebook.cells) if PARAMETERS in _tags(cell)]
    if len(places) != 1:
        raise ConfigError(f"the notebook has {len(places)} cells tagged {PARAMETERS!r}; wanted one")
    known = _assigned(notebook.cells[places[0]].source)
    if unknown := sorted(set(parameters) - known):
        raise ConfigError(f"the parameters cell sets no {', '.join(unknown)}; it sets {', '.join(sorted(known))}")
    lines = [f"{name} |= {v!r}" if isinstance(v, Mapping) else f"{name} = {v!r}" for name, v in parameters.items()]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": [INJECTED]})
    notebook.cells.insert(places[0] + 1, cell)


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _assigned(source: str) -> set[str]:
    statements = ast.parse(source).body
    return {t.id for s in statements if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}


def _settle_bars(notebook: NotebookNode) -> None:
    """Of a progress bar, keep what it showed last: a copy with every update of every bar would be megabytes."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for shown in cell.outputs:
                if shown.output_type == "stream":
                    shown.text = re.sub(r"[^\n]*\r(?!\n)", "", shown.text)


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Pieces of one stream that follow each other, as one."""
    joined: list[NotebookNode] = []
    for shown in outputs:
        last = joined[-1] if joined else None
        if last is not None and shown.output_type == last.output_type == "stream" and shown.name == last.name:
            last.text += shown.text
        else:
            joined.append(shown)
    return joined
