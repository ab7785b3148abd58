"""Give loaded models of every shape the same one: one tower per side, prompts by side, a pad token, positions."""

from __future__ import annotations

import functools
import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ebr_lib.errors import ModelError
from ebr_lib.logs import logger, warn_once
from ebr_lib.model.positions import position_limit
from ebr_lib.model.remote_code import as_mapping, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "document"]

# names of each side's prompts and routes, the usual one first
SIDE_NAMES: dict[Side, tuple[str, ...]] = {
    "query": ("query", "search_query", "queries", "question", "retrieval.query", "web_search_query", "s2p_query"),
    "document": ("document", "passage", "corpus", "doc", "search_document", "documents", "retrieval.passage", "answer"),
}
# loggers that report on a model while it is loaded, and the lines of weights that only the model or only its files have
REPORTING = ("transformers.modeling_utils", "transformers.integrations.peft", "sentence_transformers.base.model")
MADE_UP = re.compile(r"^(\S.*?)\s*\|[^|\n]*MISSING", re.MULTILINE)
UNREAD = re.compile(r"^(\S*\.(?:\d|\{).*?)\s*\|[^|\n]*UNEXPECTED", re.MULTILINE)  # of a numbered layer: not a head
OTHER_SHAPE = re.compile(r"^(\S.*?)\s*\|[^|\n]*MISMATCH", re.MULTILINE)
UNUSED = {"pooler", "classifier", "lm_head", "cls", "score"}  # parts that no embedding comes from
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def refuse_no_embedding_model(name: str, folder: Path) -> None:
    """Refuse a folder whose model gives scores, labels, or a vector per token instead of one per text.

    :raises ModelError: names the kind of model.
    """
    config = as_mapping(read_json(folder / "config_sentence_transformers.json"))
    kind = config.get("model_type", "SentenceTransformer")
    modules = read_json(folder / "modules.json")
    if not modules or not any("Pooling" in module["type"] for module in modules):
        architectures = as_mapping(read_json(folder / "config.json")).get("architectures") or ()
        kind = next((found for found in architectures if found.endswith(HEADS)), kind)
    if kind != "SentenceTransformer":
        raise ModelError(
            f"model {name} is a {kind}, not an embedding model: it does not give a text one vector to compare; give a "
            "model that does, such as the one that its card retrieves with"
        )


def refuse_no_vectors(model: SentenceTransformer, name: str) -> None:
    """Refuse a model that does not pool its tokens to a vector, or whose tokenizer knows no words.

    :raises ModelError: says what is missing.
    """
    if [getattr(module, "module_output_name", "") for module in model] == ["token_embeddings"]:
        raise ModelError(f"model {name} has no pooling in its modules.json; fetch the whole model again")
    special = getattr(model.tokenizer, "all_special_ids", None)
    if special is not None and set(model.tokenizer("a 1 的 я ا ก")["input_ids"]) <= set(special):
        raise ModelError(
            f"model {name}: its tokenizer knows no words; fetch the whole model again, tokenizer.json included"
        )


@contextmanager
def whole(name: str, unused: Collection[str] = UNUSED) -> Iterator[None]:
    """Load a model inside, and check that every weight came from its files.

    Transformers fills missing weights with random numbers and only logs it.

    :param unused: names of parts that may be missing, because nothing is computed with them.
    :raises ModelError: names weights that were not in the files.
    """
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if " LOAD REPORT" in message and record.name == REPORTING[0]:  # an adapter's is checked elsewhere
            reports.append(message)
        return " LOAD REPORT" not in message and "Default prompt name is set to" not in message

    sources = [logging.getLogger(source) for source in REPORTING]
    levels = [source.level for source in sources]
    for source in sources:
        source.addFilter(keep)
        if not source.isEnabledFor(logging.WARNING):  # the user silenced the library
            source.setLevel(logging.WARNING)
    try:
        yield
    except RuntimeError as error:
        if not (shapes := [key for report in reports for key in OTHER_SHAPE.findall(report)]):
            raise
        raise ModelError(
            f"model {name}: weights in its files have another shape than config.json says: {', '.join(shapes[:3])}; "
            "fetch the whole model again"
        ) from error
    finally:
        for source, level in zip(sources, levels, strict=True):
            source.removeFilter(keep)
            source.setLevel(level)
    if unread := [key for report in reports for key in UNREAD.findall(report)]:
        logger.warning(
            "模型 %s 的文件中有未用到的权重 %d weights in its files are not used: %s; is config.json theirs?",
            name,
            len(unread),
            ", ".join(unread[:3]),
        )
    made_up = [key for report in reports for key in MADE_UP.findall(report) if not set(unused) & set(key.split("."))]
    if made_up:
        raise ModelError(
            f"model {name}: weights that its config.json asks for are not in its files, and would be random numbers: "
            f"{', '.join(made_up[:3])}{' …' if len(made_up) > 3 else ''}; fetch the whole model again"
        )


def sides_differ(folder: Path) -> bool:
    """Whether a folder's model may encode each side in its own way: with a Router, or a module that takes a task."""
    modules = read_json(folder / "modules.json") or ()
    return any(
        module["type"].endswith((".Router", ".Asym")) or "task" in module.get("kwargs", ()) for module in modules
    )


# --- one side's modules -------------------------------------------------------------------------------------------


def refuse_two_towers(model: SentenceTransformer, name: str) -> None:
    """Refuse to train a model that encodes queries and documents with different modules.

    :raises ModelError: it does.
    """
    if "task" in model.get_model_kwargs() and not _routers(model):
        raise ModelError(
            f"model {name} encodes queries and documents as different tasks, and cannot be fine-tuned here; it can be "
            "encoded with, evaluated and searched"
        )
    for router in _routers(model):
        towers = [list(router.sub_modules[_route(router, side, name)]) for side in SIDE_NAMES]
        if towers[0] != towers[1]:
            raise ModelError(
                f"model {name} has two towers, one for queries and one for documents, and cannot be fine-tuned here: "
                "one adapter would train one of them; it can be encoded with, evaluated and searched. Fine-tune a "
                "model that encodes both sides, or one tower as a model of its own"
            )


def _routers(model: SentenceTransformer) -> list[Any]:
    from sentence_transformers.base.modules import Router

    return [module for module in model if isinstance(module, Router)]


def keep_side(model: SentenceTransformer, side: Side, name: str) -> None:
    """Replace a model's Routers by their modules of one side, which makes it an ordinary model.

    :raises ModelError: no route of the Router is known to be that side's.
    """
    if not (routers := _routers(model)):
        return
    kept: OrderedDict[str, Any] = OrderedDict()
    for place, module in model.named_children():
        if module in routers:
            route = _route(module, side, name)
            kept |= {f"{place}_{route}_{i}": part for i, part in enumerate(module.sub_modules[route])}
        else:
            kept[place] = module
    model._modules.clear()
    model._modules.update(kept)


def _route(router: Any, side: Side, name: str) -> str:
    """The route of a side's texts, in the order of precedence that the library documents."""
    names, mapped = SIDE_NAMES[side], router.route_mappings
    wanted = [(task, kind) for task in names for kind in ("text", None)] + [(None, "text"), (None, None)]
    found = [mapped[key] for key in wanted if key in mapped]
    found += [route for route in (*names, "text") if route in router.sub_modules]
    if len(router.sub_modules) == 1:
        found += router.sub_modules
    if not found:
        raise ModelError(
            f"model {name} encodes texts by routes named {', '.join(router.sub_modules)}, and none of them is known to "
            f"be for {side} texts; rename the routes (the keys of structure, and default_route) in router_config.json "
            "to query and document"
        )
    return str(found[0])


def keep_task(model: SentenceTransformer, side: Side, name: str) -> None:
    """Fix the task of a model whose modules take one (jina-embeddings-v3) to that of a side.

    :raises ModelError: it knows no task of that side.
    """
    if "task" not in model.get_model_kwargs():
        return
    for task in (*SIDE_NAMES[side], "retrieval"):
        try:
            model.encode(["a"], task=task, show_progress_bar=False)
        except (ValueError, KeyError, AssertionError):
            continue
        for part, kwargs in (model.module_kwargs or {}).items():
            if "task" in kwargs:
                module = model.get_submodule(part)
                module.forward = functools.partial(module.forward, task=task)
        return
    raise ModelError(f"model {name} wants a task for each text, and knows none of the usual ones for {side} texts")


def keep_rest_in_float32(model: SentenceTransformer, folder: Path) -> None:
    """Load the modules after the transformer (Dense, LayerNorm) in float32, as they are saved and will be served.

    The library rounds them to the type that the transformer is loaded in.
    """
    from safetensors.torch import load_model

    transformer, *rest = model
    listed = read_json(folder / "modules.json") or [{"path": ""}]
    for part, module in zip(listed[1:], rest, strict=False):
        weights = folder / part["path"] / "model.safetensors"
        if any(True for _ in module.parameters()) and weights.is_file():
            load_model(module.float(), weights)
            transformer.register_forward_hook(_states_in_float32)


def _states_in_float32(module: Any, inputs: Any, features: dict[str, Any]) -> dict[str, Any]:
    return features | {"token_embeddings": features["token_embeddings"].float()}


# --- prompts ------------------------------------------------------------------------------------------------------


def prompts_by_side(prompts: Mapping[str, str | None], default: str | None, name: str) -> dict[str, str]:
    """The prompts of both sides, whatever a model calls them.

    :param default: name of the model's default prompt, which a side without a prompt gets, unless it is the other
        side's.
    """
    known = {key.lower(): text for key, text in prompts.items() if text}
    found = {side: next((known[key] for key in names if key in known), "") for side, names in SIDE_NAMES.items()}
    if default and not any(default.lower() in names for names in SIDE_NAMES.values()):
        found = {side: text or known.get(default.lower(), "") for side, text in found.items()}
    if known and not any(found.values()):
        warn_once(
            "模型 %s 的提示词名称无法对应到查询或文档，未使用 prompts of another name are not used: %s; "
            "if the model's card asks for one, set it by hand",
            name,
            ", ".join(known),
        )
    return {str(side): text for side, text in found.items()}


# --- tokens -------------------------------------------------------------------------------------------------------


def give_pad_token(model: SentenceTransformer) -> None:
    """Give a tokenizer a pad token where it has none, or one that the model has no vector for.

    Any token does: the attention mask hides it.
    """
    tokenizer, transformer = model.tokenizer, model.transformers_model
    if transformer is None or not hasattr(tokenizer, "pad_token_id"):
        return
    known = min(len(tokenizer), token_embeddings(transformer).num_embeddings)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        ids = (transformer.config.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
        usable = next(number for number in ids if isinstance(number, int) and 0 <= number < known)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable)


def token_embeddings(transformer: Any) -> Any:
    """The table of token vectors, which may be inside an adapter's layer; None for a model without one."""
    from torch.nn import Embedding

    parts = transformer.get_input_embeddings().modules() if transformer is not None else ()
    return next((part for part in parts if isinstance(part, Embedding)), None)


def fit_length(model: SentenceTransformer, wanted: int | None, name: str) -> None:
    """Set the length in tokens that a model cuts texts to: `wanted`, or its own, and at most its positions.

    Warns once if that is less than `wanted`.
    """
    limit = position_limit(model)
    asked = model.max_seq_length if wanted is None else wanted
    if limit is not None and (asked is None or asked > limit):
        warn_once(
            "模型 %s 只有 %d 个位置，文本截断到 %d texts are cut at the model's positions; wanted %s",
            name,
            limit,
            limit,
            asked,
        )
        asked = limit
    if asked != model.max_seq_length and hasattr(model[0], "model"):  # static embeddings read texts to their end
        model.max_seq_length = asked


def say_assumed_pooling(model: SentenceTransformer, name: str) -> None:
    """Warn once about the pooling that a folder without modules.json gets."""
    mode = getattr(model[-1], "pooling_mode", "none")
    warn_once(
        "模型 %s 没有 modules.json，假定池化方式为 %s no pooling is given: %s pooling is assumed; "
        "if the model's card says otherwise, save it with sentence-transformers and give that folder",
        name,
        mode,
        mode,
    )
