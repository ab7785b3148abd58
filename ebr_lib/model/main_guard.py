"""Refuse scripts without a main guard: a process that starts Python again runs the caller's script once more."""

from __future__ import annotations

import ast
import multiprocessing
import sys
import traceback
from pathlib import Path

from ebr_lib.errors import ConfigError


def refuse_script_without_guard(what: str, instead: str) -> None:
    """Check that the calling script can start processes.

    A spawned process imports the main script under another name, and so runs all of it except what is below
    `if __name__ == "__main__":`. A notebook, a shell and `python -m package` are not run again.

    :param what: what needs the processes, for the error.
    :param instead: the setting that needs none, for the error.
    :raises ConfigError: the main script calls this from its top level, without a guard.
    """
    main = sys.modules["__main__"]
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # this is already the second run
        script = "the main script"
    else:
        if path is None or not Path(path).is_file() or (spec is not None and spec.name.endswith(".__main__")):
            return
        if (line := _line_at_top_level(path)) is None or _is_guarded(path, line):
            return
        script = f"{path}, line {line}"
    raise ConfigError(
        f"{script}: {what} starts Python again, and each process would run this script from the top. "
        f'Put the call below `if __name__ == "__main__":`, or set {instead}'
    )


def _line_at_top_level(path: str) -> int | None:
    """The line that the script is running; None if the caller is not on its stack, as in a thread."""
    script = Path(path).resolve()
    modules = ((frame.f_code, line) for frame, line in traceback.walk_stack(None) if frame.f_code.co_name == "<module>")
    return next((line for code, line in modules if Path(code.co_filename).resolve() == script), None)


def _is_guarded(path: str, line: int) -> bool:
    """Whether the text of a script compares `__name__` at or before a line."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # not a script that can be read
    asking = (node for node in ast.walk(tree) if isinstance(node, ast.Compare) and node.lineno <= line)
    return any(isinstance(name, ast.Name) and name.id == "__name__" for node in asking for name in ast.walk(node))
