"""The library's log, printed above tqdm's bars and without other libraries' warnings."""

from __future__ import annotations

import functools
import io
import logging
import sys
import warnings

from ebr_lib.live import notebook_shell, watch_failed_cells
from ebr_lib.tables import RED, YELLOW, styled

logger = logging.getLogger("ebr_lib")
RESULT = {"is_result": True}
"""`extra` of a line with a stage's result, which a notebook shows by itself."""


class _BarSafe(logging.Handler):
    """Print lines above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        style = RED if record.levelno >= logging.ERROR else YELLOW if record.levelno >= logging.WARNING else ""
        text = self.format(record)
        tqdm.write(styled(text, style) if style else text, file=sys.stdout)


def _is_news(record: logging.LogRecord) -> bool:
    return not (hasattr(record, "is_result") and notebook_shell())


# transformers: a field of its own configs; and ids of text generation, which no embedding model has
_OF_NO_USE = {"modeling_utils": "`loss_type=", "trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens"}


def _of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(_OF_NO_USE.values()))


@functools.cache
def warn_once(message: str, *values: object) -> None:
    """Log a warning, the first time that it is given in this process."""
    logger.warning(message, *values)


def print_anything() -> None:
    """Let standard output and error escape characters that their encoding lacks (GBK, cp1252, ASCII)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def only_results() -> None:
    """Print nothing but results, warnings and errors, once `show_logs` was called."""
    for handler in logger.handlers:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or hasattr(record, "is_result"))


def show_logs(level: int = logging.INFO) -> None:
    """Print the library's log to standard output; calling it again only sets the level.

    A notebook skips the tables of results, since it displays the results themselves.
    """
    print_anything()
    # without a widget library tqdm warns, and draws text bars
    warnings.filterwarnings("ignore", message="IProgress not found")
    # peft warns about a base whose config.json is in a module's folder; no vocabulary is changed here
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    for name in _OF_NO_USE:
        logging.getLogger(f"transformers.{name}").addFilter(_of_use)
    watch_failed_cells()
    if not any(isinstance(handler, _BarSafe) for handler in logger.handlers):
        handler = _BarSafe()
        handler.addFilter(_is_news)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)
