"""What a person sees while a stage runs: the library's log, through tqdm's bars, without other libraries' noise."""

from __future__ import annotations

import io
import logging
import sys
import warnings

logger = logging.getLogger("ebr_lib")
RESULT = {"is_result": True}
"""`extra` of a line that tells what the stage returns, which a notebook shows by itself."""


class _BarSafe(logging.Handler):
    """Writes a line above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _is_news(record: logging.LogRecord) -> bool:
    return not (hasattr(record, "is_result") and _in_notebook())


def print_anything() -> None:
    """Let standard output and error write characters that their encoding lacks (GBK, cp1252, ASCII) as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_logs(level: int = logging.INFO) -> None:
    """Show the library's log lines on standard output; calling it twice changes nothing.

    In a notebook without the tables of results, for a result is shown there as it is returned.
    """
    print_anything()
    # text bars are the same in a notebook and headless; tqdm would ask for a widget library
    warnings.filterwarnings("ignore", message="IProgress not found")
    # of a base whose config.json lies in a module's folder; no vocabulary is changed here
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    if not any(isinstance(handler, _BarSafe) for handler in logger.handlers):
        handler = _BarSafe()
        handler.addFilter(_is_news)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)
