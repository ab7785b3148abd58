"""Extension stage: write a trained model as one folder for other engines, and check each part's vectors."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.export.config import ExportConfig
from ebr_lib.extras import require
from ebr_lib.files import check_apart, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.bases import look_for_models, one_sided, sides_have_own_weights
from ebr_lib.model.contract import read_contract
from ebr_lib.model.loading import load_model
from ebr_lib.model.merged import make_servable, save_merged
from ebr_lib.model.packaged import find_model
from ebr_lib.model.parity import Trained, compare
from ebr_lib.model.remote_code import forget_own_code, own_code
from ebr_lib.model.served import served_folder, trained_sides, with_prompts
from ebr_lib.model.shapes import Side
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, make_table

if TYPE_CHECKING:
    from pandas import DataFrame
    from sentence_transformers import SentenceTransformer

CONFIG_FILE = "export_config.yaml"
TEI_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last-token"}


@dataclass(frozen=True, repr=False)
class ExportResult(TableRepr):
    """What was written, how far each part's vectors are from the model's, and commands that serve it."""

    folder: Path
    distances: dict[str, float]
    commands: dict[str, str]
    tables: dict[str, DataFrame] = field(compare=False)


def export_model(config: ExportConfig | Mapping[str, Any] | None = None) -> ExportResult:
    """Write a model as a whole sentence-transformers folder, with graphs if asked for; nothing is kept that gives other
    vectors than the model.

    :param config: an ExportConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed), or `output_dir` holds something else.
    :raises ModelError: the model does not load, cannot be written as a graph, or a part gives other vectors.
    :raises MissingError: the model is not there.
    :raises NotInstalledError: the packages that write ONNX are missing.
    """
    config = ExportConfig.resolve(config)
    look_for_models(config.base_model_path, config.hub)
    if "onnx" in config.graphs:
        require("onnx")
    folder = Path(config.output_dir)
    _check_output(folder, find_model(config.model_name), config.presets)
    with written_whole(folder) as new:
        _write_folder(config, new)
        model = load_model(str(new), trust_remote_code=_own_code_runs(config, new), device="cpu")
        if config.graphs:
            from ebr_lib.export.graphs import write_graph

            for kind in config.graphs:
                write_graph(model, kind, new)
        sides = _sides(config)
        distances = {part: _distance(new, part, sides) for part in ("sentence-transformers", *config.graphs)}
        config.save(new / CONFIG_FILE)
    commands = dict(serving_commands(model, folder))
    rows = [(part, f"{distance:.1e}") for part, distance in distances.items()]
    tables = {"distances": make_table(f"导出 export: {folder}", ("part", "largest distance"), rows)}
    result = ExportResult(folder, distances, commands, tables)
    logger.info("%s", result, extra=RESULT)
    for engine, command in commands.items():
        logger.info("%s: %s", engine, command)
    _say_other_side(config)
    return result


def _check_output(folder: Path, model: str, presets: list[str]) -> None:
    """Make sure that the folder is free, or an earlier export, and not the model itself.

    :raises ConfigError: it is not.
    """
    check_apart([folder], [model, presets])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"output_dir {folder} holds something else than an export; give another folder")


def _write_folder(config: ExportConfig, new: Path) -> None:
    """Write the model as one sentence-transformers folder, with its contract if it has one."""
    name, contract = config.model_name, read_contract(find_model(config.model_name))
    is_base = config.side == "document" and one_sided(name)
    if contract is not None and not contract.merged and not is_base:
        save_merged(name, new, trust_remote_code=config.trust_remote_code, device="cpu")
        return
    model = load_model(name, trust_remote_code=config.trust_remote_code, side=config.side, device="cpu", merged=True)
    model.save_pretrained(str(new), create_model_card=False)
    if config.trust_remote_code == "ignore":
        forget_own_code(new)
    if config.trust_remote_code is True and not own_code(new):
        raise ModelError(f"the exported model would lack the code of {name}; it was not kept")
    make_servable(new, model.max_seq_length)
    if contract is not None and not is_base:
        replace(contract, trust_remote_code=_own_code_runs(config, new)).save(new)


def _own_code_runs(config: ExportConfig, new: Path) -> bool:
    return config.trust_remote_code is True and bool(own_code(new))


def _sides(config: ExportConfig) -> list[Trained]:
    """The sides that the exported folder encodes."""
    spec = EncoderSpec(
        config.model_name,
        normalize=False,
        precision="float32",
        backend="torch",
        device="cpu",
        trust_remote_code=config.trust_remote_code,
    )
    other: Side = "document" if config.side == "query" else "query"
    return trained_sides(spec, [config.side] if sides_have_own_weights(config.model_name) else [config.side, other])


def _distance(new: Path, part: str, sides: list[Trained]) -> float:
    """Largest distance of a part's vectors from the model's.

    :raises ModelError: it is more than rounding.
    """
    encode = served_folder(new, part)
    parity = compare(sides, with_prompts(encode, sides))
    if parity.causes:
        raise ModelError(
            f"the export as {part} gives other vectors than the model, and was not kept; likely cause: "
            f"{'; '.join(parity.causes)}"
        )
    return max(gap.distance for gap in parity.gaps)


def _say_other_side(config: ExportConfig) -> None:
    if sides_have_own_weights(config.model_name):
        other = "document" if config.side == "query" else "query"
        logger.warning(
            "只导出了 %s 一侧 only the %s side was exported: the model encodes %s texts with other weights; export "
            "them into another folder with side: %s",
            config.side, config.side, other, other,
        )  # fmt: skip


# --- how to serve it ----------------------------------------------------------------------------------------------


def serving_commands(model: SentenceTransformer, folder: Path) -> Iterator[tuple[str, str]]:
    """Commands that serve an exported folder by TEI and vLLM, and one that checks them; none for an engine that lacks
    one of the model's modules."""
    kinds = [type(module).__name__ for module in model]
    place, length = shlex.quote(str(folder.absolute())), model.max_seq_length
    pooling = next((module.pooling_mode for module in model if type(module).__name__ == "Pooling"), None)
    if kinds[0] != "Transformer" or not set(kinds) <= {"Transformer", "Pooling", "Dense", "Normalize"}:
        logger.warning(
            "TEI 与 vLLM 不支持该模型的模块 neither TEI nor vLLM has these modules: %s; serve it with "
            "sentence-transformers, or from a graph",
            ", ".join(kinds),
        )
        return
    if pooling in TEI_POOLING:
        yield (
            "TEI",
            (
                f"text-embeddings-router --model-id {place} --dtype float32 --pooling {TEI_POOLING[pooling]} "
                "--auto-truncate --port 8080"
            ),
        )
    yield "vLLM", f"vllm serve {place} --runner pooling --dtype float32 --max-model-len {length} --port 8080"
    yield "verify", f"python -m ebr_lib verify http://127.0.0.1:8080 --model_name {place}"
    yield (
        "vLLM, verify",
        (
            f"python -m ebr_lib verify http://127.0.0.1:8080 --model_name {place} "
            f"--request '{{truncate_prompt_tokens: {length}}}'"
        ),
    )
