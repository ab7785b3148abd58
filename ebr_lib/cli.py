"""The command line: each stage is a command, each knob a flag."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebr_lib import __version__
from ebr_lib.config import plan_of
from ebr_lib.errors import ConfigError, UserError
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.export.config import ExportConfig
from ebr_lib.extras import require
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.index.config import IndexConfig, SearchConfig
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.knobs.checks import Config
from ebr_lib.knobs.flags import add_flags, from_flags, unknown_flag
from ebr_lib.knobs.presets import shipped_presets
from ebr_lib.knobs.tables import knob_table
from ebr_lib.logs import only_results, print_anything, show_logs
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.serve.config import ServeConfig
from ebr_lib.tables import RED, styled, wrapped
from ebr_lib.verify.config import VerifyConfig
from ebr_lib.visualize.config import VisConfig


@dataclass(frozen=True)
class Stage:
    """A command: its config and its function, imported only when it runs, because torch is slow to load."""

    config: type[Config]
    module: str
    function: str
    examples: Sequence[str] = ()  # arguments
    following: Sequence[str] = ()  # what to run next; `{…}` is an attribute of the result or a knob
    positional: str | None = None  # a knob that may be given without its flag
    sweep: tuple[str, str] | None = None  # module and function that try several values of knobs

    @property
    def folder(self) -> str:
        """The stage's folder, in the library and in `configs/`."""
        return self.module.split(".")[1]


STAGES = {
    "pairs": Stage(
        PairsConfig, "ebr_lib.pairs.run", "make_training_pairs",
        examples=("--log_path ./log --catalogue_path ./items.parquet", "--config configs/pairs/large_log.yaml"),
    ),
    "finetune": Stage(
        FinetuneConfig, "ebr_lib.finetune.run", "train_sentence_transformer",
        examples=("--num_epochs 3", "--config configs/finetune/hard_negatives.yaml --output_dir ./saved_model"),
        following=("infer --model_name {model_path}", "evaluate --models {model_name} {model_path}"),
        sweep=("ebr_lib.finetune.sweep", "run_sweep"),
    ),
    "infer": Stage(
        InferenceConfig, "ebr_lib.inference.run", "run_batch_inference",
        examples=("--model_name ./saved_model/all-MiniLM-L6-v2-peft-lora", "--output_path ./faiss/embeds_base.txt"),
        following=("visualize --embedding_path {output_path}", "index --embedding_path {output_path}"),
    ),
    "visualize": Stage(
        VisConfig, "ebr_lib.visualize.run", "visualize_embeddings",
        examples=("--label_column category_zh", "--config configs/visualize/quick.yaml"),
        following=("index --embedding_path {embedding_path}",),
    ),
    "evaluate": Stage(
        EvalConfig, "ebr_lib.evaluate.run", "evaluate_retrieval",
        examples=("--config configs/evaluate/catalogue.yaml",),
    ),
    "index": Stage(
        IndexConfig, "ebr_lib.index.run", "build_faiss_index",
        examples=("--config configs/index/hnsw.yaml",),
        following=("search 'warm blanket' --index_dir {output_dir}",),
    ),
    "search": Stage(
        SearchConfig, "ebr_lib.index.search", "run_search",
        examples=("tea bag", "'warm blanket' --k 3"), positional="query",
    ),
    "serve": Stage(ServeConfig, "ebr_lib.serve.run", "serve_index"),
    "export": Stage(ExportConfig, "ebr_lib.export.run", "export_model"),
    "verify": Stage(VerifyConfig, "ebr_lib.verify.run", "run_verify", positional="target"),
}  # fmt: skip


def _add_stage(parser: argparse.ArgumentParser, name: str) -> None:
    stage = STAGES[name]
    parser.description = textwrap.fill(stage.config.__doc__ or "", 78)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _epilog(parser.prog, stage)
    parser.usage = (
        f"%(prog)s {f'[{stage.positional} ...] ' if stage.positional else ''}[--config YAML] [--KNOB VALUE ...]"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and show the plan, without computing anything")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only results and warnings")
    parser.add_argument("-v", "--verbose", action="store_true", help="print more, and the stack of an error")
    add_flags(parser, stage.config)
    if stage.positional is not None:
        parser.add_argument(
            "words", metavar=stage.positional, nargs="*", help=f"the same as --{stage.positional}; words are joined"
        )
    if stage.sweep is not None:
        parser.add_argument("--sweep", metavar="YAML", help="try several values of the knobs that this file names")
    parser.set_defaults(stage=name, stage_config=stage.config, run=_run_stage)


def _epilog(program: str, stage: Stage) -> str:
    """Examples, and the presets with what they are for."""
    blocks = []
    if stage.examples:
        blocks.append("\n".join(["examples:", *(f"  {program} {example}" for example in stage.examples)]))
    if presets := shipped_presets(stage.folder) if stage.examples else {}:
        lines = (f"  {path}\n{textwrap.indent(wrapped(about, 72), 6 * ' ')}" for path, about in presets.items())
        blocks.append("\n".join(["presets (--config):", *lines]))
    return "\n\n".join(blocks)


def _program() -> str:
    """Return the command that started this, as usage lines show it."""
    name = Path(sys.argv[0]).stem
    return name if name == "ebr" else "python -m ebr_lib"


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line; only the stage that it names has flags, since those of all take longest."""
    parser = argparse.ArgumentParser(
        prog=_program(), allow_abbrev=False, description="Fine-tune, encode, see, evaluate, index, search."
    )
    parser.add_argument("--version", action="version", version=f"ebr-workflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.epilog = f"`{parser.prog} COMMAND --help` shows the knobs of a stage, with examples and presets."
    parser.set_defaults(run=lambda _: parser.print_help())
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=stage.config.__doc__, allow_abbrev=False)
        if name == next(iter(words), None):
            _add_stage(command, name)
    _add_notebook(commands.add_parser("notebook", help="Execute the notebook headlessly.", allow_abbrev=False))
    _add_knobs(commands.add_parser("knobs", help="Print the knob tables, or write them into documents."))
    return parser


def _add_notebook(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Execute a copy of the notebook in the notebook's folder and print where its results are. Paths among its "
        "parameters are relative to that folder."
    )
    parser.add_argument("--notebook", default="EBR_workflow.ipynb", metavar="IPYNB", help="default %(default)s")
    parser.add_argument("--output", default="EBR_workflow.executed.ipynb", metavar="IPYNB", help="default %(default)s")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="parameters to change, e.g. RUN_FINETUNE=false FINETUNE_CONFIG.num_epochs=1",
    )
    parser.set_defaults(run=_run_notebook)


def _run_notebook(arguments: argparse.Namespace) -> int:
    require("notebook")
    from ebr_lib.notebook import NotebookError, headline, parse_parameters, run_notebook

    try:
        executed = run_notebook(arguments.notebook, arguments.output, parse_parameters(arguments.set))
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(headline(executed))
    return 0


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the knob table of every stage, or write the tables between the marks of documents."
    parser.add_argument("--write", nargs="+", default=[], metavar="MD", help="documents to update")
    parser.set_defaults(run=_run_knobs)


def _run_knobs(arguments: argparse.Namespace) -> None:
    from ebr_lib.knobs.tables import with_tables

    classes = {name: stage.config for name, stage in STAGES.items()}
    for name in arguments.write:
        place = Path(name)
        place.write_text(with_tables(place.read_text(encoding="utf-8"), classes), encoding="utf-8")
    if not arguments.write:
        print("\n\n".join(f"{name}\n\n{knob_table(kind)}" for name, kind in classes.items()))


def _run_stage(arguments: argparse.Namespace) -> None:
    stage = STAGES[arguments.stage]
    given = vars(arguments)
    if words := given.get("words"):
        if stage.positional in given:
            raise ConfigError(f"--{stage.positional}: given twice, also as {' '.join(words)!r}; leave one out")
        given[str(stage.positional)] = " ".join(words)
    resolved = from_flags(stage.config, given)
    if arguments.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    show_logs(logging.DEBUG if arguments.verbose else logging.INFO)
    if arguments.quiet:
        only_results()
    if arguments.dry_run:
        print(plan_of(arguments.stage, stage.folder, resolved))
        return
    if stage.sweep is not None and arguments.sweep is not None:
        module, function = stage.sweep
        getattr(importlib.import_module(module), function)(resolved, arguments.sweep)
        return
    result = getattr(importlib.import_module(stage.module), stage.function)(resolved)
    if stage.following and not arguments.quiet:
        lines = (f"  {_program()} {_filled(text, result, resolved)}" for text in stage.following)
        print("\n".join(["下一步 next:", *lines]))


def _filled(command: str, result: Any, config: Config) -> str:
    """A command with values from the result, or else the config."""
    names = re.findall(r"{(\w+)}", command)
    values = {name: getattr(result, name, getattr(config, name, "")) for name in names}
    return command.format(**{name: shlex.quote(str(value)) for name, value in values.items()})


def _run(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    try:
        if unknown:
            raise ConfigError(unknown_flag(unknown[0], getattr(arguments, "stage_config", None)))
        return arguments.run(arguments) or 0
    except UserError as error:
        if getattr(arguments, "verbose", False):
            traceback.print_exc()
        print(f"{styled('error:', RED)} {_as_written(str(error), arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _as_written(text: str, arguments: argparse.Namespace) -> str:
    """An error with the names that the user wrote: the command instead of its class."""
    if (config := getattr(arguments, "stage_config", None)) is None:
        return text
    return re.sub(rf"^{config.__name__}: ", f"{arguments.stage}: ", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m ebr_lib <stage> …`, and return the exit status: 0, or 2 after a user's mistake."""
    print_anything()
    words = sys.argv[1:] if argv is None else argv
    return _run(*_parser(words).parse_known_args(words))


def main_finetune(argv: Sequence[str] | None = None) -> int:
    """Run `python ebr_finetune.py …`: the first stage alone."""
    print_anything()
    parser = argparse.ArgumentParser(prog="ebr_finetune.py", allow_abbrev=False)
    _add_stage(parser, "finetune")
    return _run(*parser.parse_known_args(argv))
