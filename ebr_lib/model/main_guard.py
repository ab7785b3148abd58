"""Processes that start Python again run the caller's script once more: refuse scripts that have no main guard."""

from __future__ import annotations

import ast
import multiprocessing
import sys
from pathlib import Path
from types import FrameType

from ebr_lib.errors import ConfigError


def refuse_script_without_guard(what: str, instead: str) -> None:
    """Make sure that processes can be started from where we are called.

    A process that is spawned runs the main script as a module of another name: what stands below
    `if __name__ == "__main__":` is left out, all else is done again. A notebook, a shell and `python -m package` are
    not run again.

    :param what: what needs the processes, for the error.
    :param instead: the knob that does without them.
    :raises ConfigError: the main script calls us from its top level, without a guard.
    """
    if script := _script_that_would_run_again():
        raise ConfigError(
            f"{script}: {what} starts Python again, and each process would run this script from the top. "
            f'Put the call below `if __name__ == "__main__":`, or set {instead}'
        )


def _script_that_would_run_again() -> str | None:
    """The script and line that would start processes from processes; None where there is a guard, or no script."""
    main = sys.modules["__main__"]
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # this is the second run already
        return "the main script"
    if path is None or not Path(path).is_file() or (spec is not None and spec.name.endswith(".__main__")):
        return None
    line = _line_at_top_level(path)
    return None if line is None or _is_guarded(path, line) else f"{path}, line {line}"


def _line_at_top_level(path: str) -> int | None:
    """The line of the script that is running; None where we are called from elsewhere, from a thread say."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and Path(code.co_filename).resolve() == Path(path).resolve():
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_guarded(path: str, line: int) -> bool:
    """Whether a script asks for its `__name__` at or before a line, as far as its text says."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True  # not a script that we can judge
    asking = (node for node in ast.walk(tree) if isinstance(node, ast.Compare) and node.lineno <= line)
    return any(isinstance(name, ast.Name) and name.id == "__name__" for node in asking for name in ast.walk(node))
