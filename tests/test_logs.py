"""What a person sees in a terminal and in a notebook while a stage runs."""

from __future__ import annotations

import ast
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ebr_lib.logs import RESULT, logger, show_logs

EVENTS = SimpleNamespace(callbacks={"post_run_cell": []}, register=lambda *_: None)


@pytest.fixture
def place(monkeypatch, request):
    """Where the library runs: "terminal", "IPython" (a terminal, too), or "notebook"."""
    shells = {
        "terminal": None,
        "IPython": SimpleNamespace(),
        "notebook": SimpleNamespace(kernel=object(), events=EVENTS),
    }
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shells[request.param]))
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers.clear()
    yield request.param
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.parametrize("place", ["terminal", "IPython", "notebook"], indirect=True)
def test_a_notebook_shows_a_result_once(place, capsys):
    show_logs()
    show_logs()
    logger.info("saved: here")
    logger.info("recall 0.5", extra=RESULT)
    shown = capsys.readouterr().out
    assert shown.count("saved: here") == 1
    assert shown.count("recall 0.5") == (place != "notebook")


@pytest.mark.parametrize("place", ["terminal"], indirect=True)
def test_lines_below_the_level_are_not_shown(place, capsys):
    show_logs(logging.WARNING)
    logger.info("news")
    logger.warning("trouble")
    assert "trouble" in (shown := capsys.readouterr().out) and "news" not in shown


def log_texts(file: Path):
    """The constant texts that a file logs for users, each with its line."""
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match call:
            case ast.Call(func=ast.Attribute(ast.Name("logger"), "info" | "warning" | "error"), args=[first, *_]):
                parts = [part.value for part in ast.walk(first) if isinstance(part, ast.Constant)]
                yield call.lineno, "".join(map(str, parts))


def test_every_line_of_the_log_is_chinese_then_english():
    """Formats alone (`%s`) aside; lines that the Chinese guide names may have short English after them."""
    broken = []
    for file in (Path(__file__).parent.parent / "ebr_lib").rglob("*.py"):
        for line, text in log_texts(file):
            words = re.sub(r"%[-.\d]*[a-z]|\\\d+", "", text)
            chinese, english = re.search("[一-鿿]", words), re.search("[A-Za-z]+ [A-Za-z]|[A-Za-z]{3,}", words)
            if (chinese or english) and not (chinese and english):
                broken.append(f"{file.name}:{line}: {text[:60]}")
    assert broken == []


def test_transformers_does_not_warn_of_ids_for_generating_text(monkeypatch):
    from transformers.trainer_utils import align_special_tokens

    show_logs()
    said, source = [], logging.getLogger("transformers.trainer_utils")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(source, "handlers", [handler])
    config = SimpleNamespace(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    config.get_text_config = lambda: config
    tokenizer = SimpleNamespace(eos_token_id=2, bos_token_id=0, pad_token_id=0)
    align_special_tokens(SimpleNamespace(config=config), tokenizer)
    source.warning("something else")
    assert config.eos_token_id == 2 and said == ["something else"]
