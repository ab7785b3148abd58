"""A live notebook: whether this is one, and configs whose cell failed are not used by the cells below it."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

from ebr_lib.errors import ConfigError

_CONFIG = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=(?!=)", re.MULTILINE)


def notebook_shell() -> Any:
    """IPython's shell in a notebook; None in a terminal and in scripts."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell if hasattr(shell, "kernel") else None


class Stale:
    """In the place of a config or toggle whose cell failed, and refuses to be used: the value would be an old one."""

    def __init__(self, name: str, error: BaseException) -> None:
        at = f" in its line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        self._reason = (
            f"{name}: 设置它的单元格没有运行成功，请改正后重新运行 the cell that sets it failed "
            f"({type(error).__name__}{at}); correct it and run it again"
        )

    def _refuse(self, *given: Any, **named: Any) -> NoReturn:
        raise ConfigError(self._reason)

    __bool__ = __iter__ = __len__ = __getitem__ = __setitem__ = __or__ = __ior__ = __contains__ = keys = _refuse

    def __repr__(self) -> str:
        return self._reason


def watch_failed_cells() -> None:
    """In a notebook, replace the configs of a cell that fails by `Stale`, from now on."""
    if (shell := notebook_shell()) is None:
        return
    callbacks = shell.events.callbacks["post_run_cell"]
    if not any(callback.__name__ == _after_cell.__name__ for callback in callbacks):
        shell.events.register("post_run_cell", _after_cell)


def _after_cell(result: Any) -> None:
    error = result.error_before_exec or result.error_in_exec
    shell = notebook_shell()
    if error is None or shell is None or isinstance(error, KeyboardInterrupt):
        return
    for name in _CONFIG.findall(result.info.raw_cell or ""):
        if isinstance(shell.user_ns.get(name), dict | bool | Stale):
            shell.user_ns[name] = Stale(name, error)
