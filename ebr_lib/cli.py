"""The command line: each stage is a command, each knob a flag."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ebr_lib import config
from ebr_lib.errors import ConfigError, UserError
from ebr_lib.knobs import Config, add_flags, from_flags, unknown_flag


@dataclass(frozen=True)
class Stage:
    """A command: its config, and where its function lives (imported only when it runs: torch is slow to load)."""

    config: type[Config]
    module: str
    function: str


STAGES = {
    "finetune": Stage(config.FinetuneConfig, "ebr_lib.finetune", "train_sentence_transformer"),
    "infer": Stage(config.InferenceConfig, "ebr_lib.inference", "run_batch_inference"),
    "visualize": Stage(config.VisConfig, "ebr_lib.visualize", "visualize_embeddings"),
    "evaluate": Stage(config.EvalConfig, "ebr_lib.evaluate", "evaluate_retrieval"),
}


def _add_stage(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = STAGES[name].config.__doc__
    add_flags(parser, STAGES[name].config)
    parser.set_defaults(stage=name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ebr_lib", allow_abbrev=False, description="Fine-tune, encode, see, evaluate, index, search."
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(STAGES))
    for name, stage in STAGES.items():
        _add_stage(commands.add_parser(name, help=stage.config.__doc__, allow_abbrev=False), name)
    return parser


def _run(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    stage = STAGES[arguments.stage]
    try:
        if unknown:
            raise ConfigError(unknown_flag(unknown[0], stage.config))
        resolved = from_flags(stage.config, vars(arguments))
        from ebr_lib.logs import show_logs

        show_logs()
        getattr(importlib.import_module(stage.module), stage.function)(resolved)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m ebr_lib <stage> …`; returns the exit status: 0, or 2 for a mistake of the user's."""
    return _run(*_parser().parse_known_args(argv))


def main_finetune(argv: Sequence[str] | None = None) -> int:
    """Run `python ebr_finetune.py …`: the first stage alone."""
    parser = argparse.ArgumentParser(prog="ebr_finetune.py", allow_abbrev=False)
    _add_stage(parser, "finetune")
    return _run(*parser.parse_known_args(argv))
