"""Rerankers: cross-encoders, which read a query and a document together and score the pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.arrays import Floats, not_finite
from ebr_lib.errors import ModelError, NotFiniteError
from ebr_lib.model.hubs import fetch_weights, has_weights
from ebr_lib.model.loading import LOAD_ERRORS, fetch_configs, load_error
from ebr_lib.model.packaged import find_model, local_folder
from ebr_lib.model.pickles import refuse_pickles
from ebr_lib.model.remote_code import ENTRIES, HEAD, as_mapping, decide, own_code, read_json
from ebr_lib.model.shapes import fit_length, whole
from ebr_lib.names import Choice

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

Scores = Callable[[Sequence[tuple[str, str]]], Floats]
"""Pairs of query and document to one raw logit each, shape (pairs,): the higher, the better the document answers."""

_HEAD_CLASS = "ForSequenceClassification"
_PROBES = [("a", "b"), ("where is the kettle", "热水器 the kettle is on the second shelf")]


def is_here(name: str) -> bool:
    """Whether a reranker is on this machine with its weights, so that nothing has to be downloaded.

    :raises MissingError: the name is a path, and no such folder exists.
    """
    folder = local_folder(name)
    return folder is not None and has_weights(folder)


def load_reranker(
    name: str,
    *,
    trust_remote_code: Choice = False,
    device: str | None = None,
    batch_size: int = 32,
    show_bar: bool = False,
) -> Scores:
    """Load any CrossEncoder of sentence-transformers with one score per pair, as a function that scores pairs.

    The scores are raw logits: the activation that the model is published with (mostly a sigmoid) is left out, because
    it rounds clear answers to 1. Texts are cut at the model's own length; weights are float32, from safetensors only.

    :param name: a folder, or a hub name.
    :param trust_remote_code: run the code that the model brings along.
    :param device: torch device; None takes the best there is.
    :param batch_size: pairs per forward.
    :raises MissingError: the folder is not there.
    :raises ModelError: it is not a cross-encoder with one score per pair, it does not load, or it needs
        `trust_remote_code`.
    """
    where = fetch_configs(find_model(name))
    folder = local_folder(where)
    if folder is not None:
        _refuse_no_reranker(name, folder)
        refuse_pickles(name, folder)
    found = own_code(folder, (*ENTRIES, HEAD)) if folder is not None else ()
    choice = decide(name, found, trust_remote_code)
    model = _load(name, where, choice, device)

    def scores(pairs: Sequence[tuple[str, str]]) -> Floats:
        if not len(pairs):
            return np.empty(0)
        found = model.predict(list(pairs), batch_size=batch_size, show_progress_bar=show_bar)
        if len(wrong := not_finite(found[:, None])):
            raise NotFiniteError(
                f"reranker {name} gives {len(wrong)} of {len(pairs)} pairs a score that is not a finite number (NaN), "
                f"such as {pairs[wrong[0]]!r}"
            )
        return found.astype(np.float64)

    return scores


def _refuse_no_reranker(name: str, folder: Path) -> None:
    """Refuse a folder that is not a cross-encoder; without its head, the library would add one of random weights."""
    kind = as_mapping(read_json(folder / "config_sentence_transformers.json")).get("model_type")
    architectures = as_mapping(read_json(folder / "config.json")).get("architectures") or ()
    modules = read_json(folder / "modules.json")
    is_head = kind is None and not modules and any(found.endswith(_HEAD_CLASS) for found in architectures)
    if kind == "CrossEncoder" or is_head:
        return
    what = kind or ("SentenceTransformer" if modules else next(iter(architectures), "model without architectures"))
    raise ModelError(
        f"reranker {name} is a {what}, not a cross-encoder: wanted a model that reads query and document together and "
        "scores the pair, such as BAAI/bge-reranker-v2-m3"
    )


def _load(name: str, where: str, choice: Choice, device: str | None) -> CrossEncoder:
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    transformers.utils.logging.disable_progress_bar()
    try:
        with whole(name, unused=()):
            model = CrossEncoder(
                fetch_weights(where),
                trust_remote_code=choice is True,
                device=device,
                activation_fn=torch.nn.Identity(),
                model_kwargs={"dtype": torch.float32, "use_safetensors": True},
            )
        fit_length(model, None, name)
        found = model.predict(_PROBES, show_progress_bar=False)
    except ModelError:
        raise
    except LOAD_ERRORS as error:
        raise load_error(name, where, error, choice) from error
    if found.ndim != 1:
        raise ModelError(
            f"reranker {name} gives a pair {found.shape[1]} scores, one per label; wanted one score per pair"
        )
    return model
