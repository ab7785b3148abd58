"""The base model of a saved adapter: found by the sha256 of its weights, also after it was moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ebr_lib.errors import MissingError, ModelError, NotInstalledError
from ebr_lib.model.contract import Contract, read_contract, weights_sha256
from ebr_lib.model.hubs import MODELSCOPE, ask_hub, cached
from ebr_lib.model.packaged import find_model, local_folder
from ebr_lib.model.remote_code import as_mapping, read_json
from ebr_lib.model.shapes import sides_differ
from ebr_lib.names import Hub

given_bases: dict[str, None] = {}
"""Folders that the user gave, in their order."""


def look_for_models(places: str | Iterable[str] | None, hub: Hub) -> None:
    """From now on, look for the bases of saved adapters in these folders first, and for names on this hub.

    A folder is used only for adapters that were trained on its weights.

    :raises MissingError: a folder does not exist.
    """
    ask_hub(hub)
    for place in [places] if isinstance(places, str) else places or ():
        folder = None
        with contextlib.suppress(MissingError):
            folder = local_folder(place)
        if folder is None:
            raise MissingError(f"base_model_path {place}: no such folder (looked at {Path(place).absolute()})")
        given_bases[str(folder)] = None


def one_sided(model_name: str) -> bool:
    """Whether a model's adapter is for queries only, so that its documents are the base model's."""
    folder = local_folder(model_name)
    contract = read_contract(folder) if folder else None
    return contract is not None and contract.adapter_side == "query"


def sides_have_own_weights(model_name: str) -> bool:
    """Whether documents are encoded with other weights than queries."""
    folder = local_folder(model_name)
    return one_sided(model_name) or (folder is not None and sides_differ(folder))


def adapter_base(folder: Path) -> str | None:
    """Name of the base model in an adapter's own config."""
    base = as_mapping(read_json(folder / "adapter_config.json")).get("base_model_name_or_path")
    return str(base) if base else None


def base_place(name: str, where: str, contract: Contract) -> str:
    """Where the base of a saved adapter is: the first place with the weights that the adapter was trained on.

    :raises ModelError: every place found has other weights.
    :raises MissingError: no place was found.
    """
    wanted, others = contract.base_sha256, []
    for place in dict.fromkeys(_possible_bases(Path(where), contract)):
        folder = local_folder(place)
        found = weights_sha256(folder) if folder else None
        not_here_yet = folder is None or (found is None and place.startswith(MODELSCOPE))
        if not_here_yet or wanted in (None, found):
            return place
        others.append(f"found {found or 'none'} at {folder}")
    moved = "or set base_model_path to the folder where it is now"
    if others:
        raise ModelError(
            f"model {name} was trained on {contract.base_model} with weights of sha256 {wanted}, {', '.join(others)}; "
            f"put the original base model there, {moved}"
        )
    raise MissingError(f"model {name} is an adapter on {contract.base_model}, which is not here; put it there, {moved}")


def _possible_bases(adapter: Path, contract: Contract) -> Iterator[str]:
    """Places of an adapter's base, most likely first: those given by the user, its name, its folder when the adapter
    was saved, and that folder if both were moved together. A hub name comes after all folders.

    Without a sha256 to recognise the base by, the user's folders come last.
    """
    if contract.base_sha256:
        yield from given_bases
    named = ""
    with contextlib.suppress(MissingError, NotInstalledError):
        named = find_model(contract.base_model)
    if named and (Path(named).is_dir() or (named.startswith(MODELSCOPE) and cached(named))):
        yield named
    saved_from = Path(adapter_base(adapter) or "")
    if saved_from.is_absolute():
        if saved_from.is_dir():
            yield str(saved_from)
        if contract.base_sha256:
            yield from _moved_along(adapter, saved_from)
    elif named:
        yield named
    yield from given_bases
    if contract.base_model.startswith(MODELSCOPE):  # it was in the cache of another machine then
        yield contract.base_model


def _moved_along(adapter: Path, base: Path) -> Iterator[str]:
    """Folders with the end of the base's old path, beside or above the adapter."""
    for above in adapter.parents:
        for depth in range(1, len(base.parts)):
            place = above.joinpath(*base.parts[-depth:])
            if place != adapter and place.is_dir():
                yield str(place)
