"""Load an embedding model: the packaged one, a folder, a fine-tuned folder, or a hub name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.model.adapters import ADAPTER_FILE, is_adapted, load_adapter, merge_adapter, restore_adapter
from ebr_lib.model.bases import adapter_base, base_place
from ebr_lib.model.contract import check_probes, read_contract
from ebr_lib.model.hubs import MODELSCOPE, HubError, fetch_weights, hub_of
from ebr_lib.model.hubs import fetch_configs as fetch_configs_of_hub
from ebr_lib.model.packaged import PACKAGED_NAME, find_model, local_folder
from ebr_lib.model.pickles import pickle_error, refuse_pickles
from ebr_lib.model.remote_code import OwnCode, check_loaded, decide, module_folders, own_code
from ebr_lib.model.shapes import (
    Side,
    fit_length,
    give_pad_token,
    keep_rest_in_float32,
    keep_side,
    keep_task,
    prompts_by_side,
    refuse_no_embedding_model,
    refuse_no_vectors,
    refuse_two_towers,
    say_assumed_pooling,
    whole,
)
from ebr_lib.names import Choice, OnChangedVectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    HubError,
)


def check_remote_code(name: str, choice: Choice, made_with: Choice | None = None) -> Choice:
    """Check the choice about a model's own code against the files on this machine; imports no torch.

    :param choice: True runs it, "ignore" loads the library's classes instead, False chooses neither.
    :param made_with: the choice under which vectors were made that this model's are to be compared with, if known.
    :returns: False for a model without code of its own, else the choice.
    :raises ModelError: the model, or the base of its adapter, brings code and nothing was chosen; or the model's
        adapter or vectors were made under another choice.
    """
    base, via = find_model(name), ""
    contract = read_contract(base)
    if contract is not None and not contract.merged:
        base, via = base_place(name, base, contract), f"is an adapter on {contract.base_model}, which "
    folder = local_folder(base)
    found = _own_code_of(folder) if folder else ()
    if not found and folder is not None:
        made_with = None
    elif contract is not None:
        made_with = contract.trust_remote_code
    return decide(name, found, choice, made_with=made_with, via=via)


def _own_code_of(folder: Path) -> tuple[OwnCode, ...]:
    """Own code of a folder, and of the base of an adapter there that this library did not save."""
    found = list(own_code(folder))
    for part, _ in module_folders(folder):
        base = adapter_base(part)
        if base and not (part / "config.json").is_file():
            with contextlib.suppress(MissingError):  # loading the model reports it
                place = local_folder(base)
                found += own_code(place) if place else ()
    return tuple(found)


def prompt_of(model: SentenceTransformer, side: Side, prompt: str | None = None) -> str:
    """The text before every query or document: `prompt`, or if that is None the one the model was trained with."""
    return (model.prompts.get(side) or "") if prompt is None else prompt


def load_model(
    name: str,
    *,
    trust_remote_code: Choice = False,
    max_seq_length: int | None = None,
    device: str | None = None,
    side: Side = "query",
    trainable: bool = False,
    merged: bool = False,
    on_changed_vectors: OnChangedVectors = "error",
    **model_kwargs: Any,
) -> SentenceTransformer:
    """Load a model for texts, in float32 unless `model_kwargs` has `dtype`; only safetensors are read.

    A folder that fine-tuning saved loads as its base model plus the adapter, and its probe texts are compared with the
    vectors that were saved. Documents of an adapter for queries only are the base model's, its length included. Of a
    model with two towers only that of `side` is loaded. The prompts are named `query` and `document`, whatever the
    model calls them; there is no default prompt.

    :param name: the packaged name, a folder, or a hub name.
    :param trust_remote_code: run the code that the model brings along; "ignore" loads the library's classes instead.
    :param max_seq_length: tokens to cut texts to, at most the model's positions; None keeps the model's own limit.
    :param device: torch device; None takes the best there is.
    :param side: what will be encoded.
    :param trainable: let the saved adapter's weights be trained further.
    :param merged: fold the adapter into the base weights: a quarter faster, the vectors are equal up to rounding.
    :param on_changed_vectors: raise an error when the probe vectors are not the saved ones, or only warn.
    :raises MissingError: the folder is not there.
    :raises ModelError: the hub cannot be reached, the folder holds no embedding model, its weights are pickled, the
        model needs `trust_remote_code`, a saved tensor is not in the model, or the vectors have changed.
    """
    where = find_model(name)
    contract = read_contract(where)
    if contract is None:
        base = _base_of_adapter_alone(where) or where
    else:
        base = where if contract.merged else base_place(name, where, contract)
    adapted = base != where
    base = fetch_configs(base)
    check_remote_code(name, trust_remote_code)
    model = _load(
        base if adapted else name,
        base,
        side=side,
        trainable=trainable,
        choice=trust_remote_code,
        device=device,
        model_kwargs=model_kwargs,
    )
    if adapted and contract is not None:
        base_place(name, where, contract)  # again: these weights may have come from the hub just now
    if adapted and (contract is None or contract.adapter_side == "both" or side == "query"):
        refuse_pickles(name, Path(where))
        try:
            load_adapter(model, Path(where), trainable=trainable)
        except ModelError as error:
            raise ModelError(f"model {name}: {error}") from error
        except LOAD_ERRORS as error:
            raise load_error(name, where, error) from error
        if contract is not None:
            model.max_seq_length = contract.max_seq_length
            fit_length(model, None, name)
    if contract is not None:
        model.prompts = dict(contract.prompts)
        folder, its_base = Path(where), local_folder(base)
        check_probes(model, contract, side, on_changed_vectors, name=name, folder=folder, base=its_base)
    if merged and is_adapted(model):
        merge_adapter(model)
    if max_seq_length is not None:
        fit_length(model, max_seq_length, name)
    return model


def _base_of_adapter_alone(where: str) -> str | None:
    """Where the base is of an adapter that another library saved without the base's pooling; else None."""
    folder = local_folder(where)
    if folder is None or (folder / "modules.json").is_file() or (folder / "config.json").is_file():
        return None
    base = adapter_base(folder)
    return find_model(base) if base else None


def fetch_configs(where: str) -> str:
    """Download the configs and .py files of a model that is not on this machine, to read them before its weights.

    :returns: the name under which the model is known from now on, which may be another hub's.
    :raises ModelError: its hub cannot be reached, or does not have it.
    """
    if local_folder(where) is not None:
        return where
    try:
        return fetch_configs_of_hub(where)
    except HubError as error:
        raise load_error(where, where, error) from error


def _load(
    name: str,
    where: str,
    *,
    side: Side,
    trainable: bool,
    choice: Choice,
    device: str | None,
    model_kwargs: dict[str, Any],
) -> SentenceTransformer:
    """Load a model as the library does, check that nothing is missing, and give it the shape that the stages know."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()  # one bar per weight file says nothing
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_kwargs}
    try:
        if folder := local_folder(where):
            refuse_no_embedding_model(name, folder)
            refuse_pickles(name, folder)
        where = fetch_weights(where)
        with whole(name):
            model = SentenceTransformer(where, trust_remote_code=choice is True, device=device, model_kwargs=kwargs)
    except ModelError:
        raise
    except LOAD_ERRORS as error:
        raise load_error(name, where, error, choice) from error
    check_loaded(name, model, choice)
    if trainable:
        refuse_two_towers(model, name)
    if folder:
        if kwargs["dtype"] != torch.float32:
            keep_rest_in_float32(model, folder)
        if not (folder / "modules.json").is_file():
            say_assumed_pooling(model, name)
    refuse_no_vectors(model, name)
    keep_side(model, side, name)
    keep_task(model, side, name)
    parts = [part for part, _ in module_folders(folder)] if folder and is_adapted(model) else []
    if saved := next((part for part in parts if (part / ADAPTER_FILE).is_file()), None):
        restore_adapter(model, saved)
    model.prompts = prompts_by_side(model.prompts, model.default_prompt_name, name)
    model.default_prompt_name = None
    give_pad_token(model)
    fit_length(model, None, name)
    _read_texts_only(model)
    return model


def _read_texts_only(model: SentenceTransformer) -> None:
    """Keep a model that also takes pictures or sound from opening a text that looks like a path or an address."""
    for module in model.modules():
        if hasattr(module, "modality_config") and hasattr(module, "input_formatter"):
            kept = {kind: how for kind, how in module.modality_config.items() if kind in ("text", "message")}
            module.modality_config, module.input_formatter.supported_modalities = kept, list(kept)


def load_error(name: str, where: str, error: Exception, choice: Choice = False) -> ModelError:
    """What to do about an error that the libraries raised while they loaded a model."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    is_folder = Path(where).is_dir()
    if choice == "ignore" and ("trust_remote_code" in str(error) or "does not recognize" in str(error)):
        return ModelError(
            f"trust_remote_code: ignore: the library has no class of its own for model {name}; "
            "read the .py files, then set trust_remote_code: true"
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model {name} brings its own code, and is another model without it; read the .py files, then set "
            "trust_remote_code: true"
        )
    if choice is True and is_folder:
        remedy = "install what it asks for, or the transformers version that its card names"
        if "does not appear to have a file named" in reason:  # they are searched at the root, not beside the weights
            remedy = "put its .py files beside its modules.json"
        elif "connect" in reason:
            remedy = "its auto_map names the code of another repository: fetch that one too, where there is a network"
        return ModelError(f"model {name}: its own code (trust_remote_code: true) fails to load it: {reason}; {remedy}")
    if is_folder:
        return ModelError(f"model {name}: the folder {where} does not load as a sentence-transformers model: {reason}")
    if "safetensors" in reason:
        return pickle_error(name, f"what {hub_of(where)} holds")
    others = f"HF_ENDPOINT names a mirror, `{MODELSCOPE}` before the name asks ModelScope"
    return ModelError(
        f"model {name} is not a folder here, and {hub_of(where)} did not provide it ({reason}); check the name and the "
        f"network{'' if where.startswith(MODELSCOPE) else f' ({others})'}, or download it elsewhere and give its "
        f"folder, or use the packaged {PACKAGED_NAME}"
    )
