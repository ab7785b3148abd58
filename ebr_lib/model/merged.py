"""A model as one whole folder: its adapter merged, and its configs as other engines read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ebr_lib.errors import ModelError
from ebr_lib.files import write_json
from ebr_lib.logs import logger
from ebr_lib.model.adapters import merge_adapter
from ebr_lib.model.contract import probe_vectors, read_contract
from ebr_lib.model.loading import load_model
from ebr_lib.model.remote_code import as_mapping, forget_own_code, own_code, read_json
from ebr_lib.names import Choice

MERGED_TOLERANCE = 1e-3  # float32 stays below 1e-6, bfloat16 weights round the product
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""A pooling in the config of sentence-transformers 6, and its switch in that of earlier versions."""


def save_merged(adapter_folder: str, folder: Path, *, trust_remote_code: Choice, device: str) -> float:
    """Merge a saved adapter into its base, save the whole model, reload it and compare.

    The base's own code is saved too if it runs. If it is ignored, the merged model no longer asks for it: its weights
    were trained in the library's class.

    :returns: the largest difference of a vector component between adapter and merged model.
    :raises ModelError: the reloaded model's vectors are not the adapter's, or it lacks the base's code.
    """
    model = load_model(adapter_folder, trust_remote_code=trust_remote_code, device=device)
    before = np.asarray(probe_vectors(model, ""))
    contract = read_contract(adapter_folder)
    assert contract is not None
    merge_adapter(model)
    model.save_pretrained(str(folder), create_model_card=False)
    if trust_remote_code == "ignore":
        forget_own_code(folder)
    make_servable(folder, model.max_seq_length)
    own = trust_remote_code is True
    if own and not own_code(folder):
        raise ModelError(
            f"the merged model {folder.name} would lack the code of {contract.base_model}; it was not kept"
        )
    dataclasses.replace(contract, merged=True, trust_remote_code=own).save(folder)
    reloaded = load_model(str(folder), trust_remote_code=own, device=device)
    difference = float(np.abs(np.asarray(probe_vectors(reloaded, "")) - before).max())
    logger.info("合并后与适配器的最大差异 largest difference merged to adapter: %.2g", difference)
    if difference > MERGED_TOLERANCE:
        raise ModelError(f"the merged model's vectors differ from the adapter's by {difference:.2g}; it was not kept")
    return difference


def make_servable(folder: Path, length: int | None) -> None:
    """Write the length and the pooling of a saved model also where TEI and older libraries look for them.

    Without them TEI does not start, or cuts texts at the model's positions instead; sentence-transformers 6 saves
    neither, and reads both.
    """
    place = folder / "sentence_bert_config.json"
    if place.is_file() and isinstance(length, int):
        write_json(place, as_mapping(read_json(place)) | {"max_seq_length": length})
    for place in folder.glob("*_Pooling/config.json"):
        config = as_mapping(read_json(place))
        mode = config.get("pooling_mode")
        if isinstance(mode, str) and mode in POOLING_KEYS:
            write_json(place, config | {key: name == mode for name, key in POOLING_KEYS.items()})
