"""The command line as people meet it: help, plans, results that fit, and what to run next."""

from __future__ import annotations

import re

import pytest

from ebr_lib import cli, tables
from ebr_lib.cli import STAGES, main
from ebr_lib.tables import as_text, columns_of, make_table, styled


def said(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"    {name}" in out for name in [*STAGES, "notebook", "knobs"])


@pytest.mark.parametrize("name", STAGES)
def test_help_names_every_knob_with_its_default_and_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = said(capsys, name, "--help")
    body, _, _ = out.partition("examples:")
    flags = re.findall(r"^  --(\w+)", body, re.MULTILINE)
    assert flags[0] == "dry" and set(STAGES[name].config.__dataclass_fields__) <= set(flags)
    assert len(re.findall(r"default\s", body)) >= len(STAGES[name].config.__dataclass_fields__) and " X" not in body
    assert max(map(columns_of, body.splitlines())) <= 80
    _, _, presets = out.partition("presets (--config):")
    assert all(columns_of(line) <= 80 for line in presets.splitlines())


def test_help_is_grouped_as_the_configs_are_with_examples_and_presets(capsys):
    out = said(capsys, "finetune", "--help")
    heads = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert {"model and data", "LoRA", "hard negatives", "noise", "examples", "presets (--config)"} <= set(heads)
    assert out.index("\nLoRA:") < out.index("--lora_r ") < out.index("\nloss:") < out.index("--temperature")
    assert "configs/finetune/hard_negatives.yaml\n      " in out


def test_metavars_say_what_a_flag_takes(capsys):
    out = said(capsys, "visualize", "--help")
    for flag in ("--method both|tsne|umap", "--max_points INT", "--tsne_perplexity NUMBER", "--embedding_path PATH",
                 "--label_column TEXT", "--tsne_learning_rate auto|NUMBER"):  # fmt: skip
        assert flag in out


@pytest.fixture
def ran(monkeypatch) -> list:
    """The configs that stages were run with, instead of running them."""
    seen: list = []

    class Module:
        @staticmethod
        def run_search(config):
            seen.append(config)

        build_faiss_index = run_search

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)
    return seen


def test_a_query_of_several_words_needs_no_quotes(ran):
    assert main(["search", "tea", "bag", "--k", "3"]) == 0
    assert (ran[0].query, ran[0].k) == ("tea bag", 3)
    assert main(["search", "--query", "tea"]) == 0 and ran[1].query == "tea"


def test_a_query_that_is_given_twice_is_refused(ran, capsys):
    assert main(["search", "--query", "tea", "bag"]) == 2 and not ran
    assert "given twice" in capsys.readouterr().err


def test_errors_name_the_command_and_the_knob(capsys):
    assert main(["finetune", "--num_epochs", "-1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: finetune: 1 error\n  - num_epochs: -1 is not allowed") and "Traceback" not in error


def test_after_a_stage_comes_what_to_run_next(ran, capsys):
    assert main(["index", "--output_dir", "my index"]) == 0
    assert "search 'warm blanket' --index_dir 'my index'" in capsys.readouterr().out
    assert main(["index", "-q"]) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.following])
def test_what_to_run_next_can_be_run(name, monkeypatch):
    for text in STAGES[name].following:
        command, *words = re.sub("{.*?}", "x", text).replace("'", "").split()
        arguments, unknown = cli._parser([command]).parse_known_args([command, *words])
        assert arguments.stage == command and not unknown


def test_a_dry_run_shows_the_plan_and_runs_nothing(ran, capsys, tmp_path):
    assert main(["search", "tea", "--k", "3", "--index_dir", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not ran and re.search(r"k +3 +10", out) and re.search(rf"index_dir +{tmp_path} +a folder", out)
    assert "nothing was computed" in out


def test_a_dry_run_finds_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", "--embedding_path", "no.txt", "--dry-run"]) == 2
    assert "no.txt" in capsys.readouterr().err


# --- tables -------------------------------------------------------------------------------------------------------


TABLE = make_table("a title", ("name", "value", "meaning"), [
    ("silhouette", 0.5, "nearer to the own label than to the next one, " * 3), ("热水器" * 9, 1234.5, "")])  # fmt: skip


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_table_fits_the_width_and_loses_nothing(width):
    lines = as_text(TABLE, width).splitlines()
    assert max(map(columns_of, lines)) <= width
    assert "".join("".join(lines).split()).count("热") == 9
    assert as_text(TABLE, width).count("label") == 3 and "…" not in "".join(lines)


def test_without_a_terminal_a_table_has_its_own_width():
    assert max(map(columns_of, as_text(TABLE).splitlines())) > 150


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    assert styled("x", "1") == "x"
    monkeypatch.setattr(tables, "_is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled("x", "1") == "\x1b[1mx\x1b[0m" and as_text(TABLE).startswith("\x1b[1ma title\x1b[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("x", "1") == "x"
