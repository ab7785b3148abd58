"""Folders that another program would serve, run as it would: sentence-transformers, OpenVINO and ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ebr_lib.arrays import Encode, Vectors
from ebr_lib.errors import MissingError, ModelError
from ebr_lib.model.bases import one_sided
from ebr_lib.model.contract import read_contract
from ebr_lib.model.loading import LOAD_ERRORS
from ebr_lib.model.openvino import core
from ebr_lib.model.packing import padded_batch
from ebr_lib.model.parity import Served, Trained
from ebr_lib.model.pickles import refuse_pickles
from ebr_lib.model.remote_code import as_mapping, read_json
from ebr_lib.model.shapes import Side
from ebr_lib.model.spec import EncoderSpec

if TYPE_CHECKING:
    from ebr_lib.model.encoder import Encoder

GRAPHS = {"openvino": "openvino/openvino_model.xml", "onnx": "onnx/model.onnx"}
"""Where sentence-transformers looks for the graph of a backend, and TEI for ONNX."""
STATES, VECTOR = "last_hidden_state", "sentence_embedding"
"""Outputs of a graph: the token states, which TEI and sentence-transformers pool themselves, and the text's vector."""
SERVED_BATCH = 8


def trained_sides(spec: EncoderSpec, sides: Sequence[Side]) -> list[Trained]:
    """The trained model, ready to be compared with what a server gives.

    :param spec: the model, in float32 on torch and without normalisation.
    :raises ModelError: it does not load, or its vectors are no longer those that were saved with it.
    """
    queries, documents = spec.encoder_pair()
    encoders: dict[Side, Encoder] = {"query": queries, "document": documents}
    bases = _base_encoders(spec)
    found = []
    for side in sides:
        others = dict(bases)
        if one_sided(spec.model_name):
            others = bases if side == "query" else {"the adapter is on documents too, and is for queries only": queries}
        other = encoders["document" if side == "query" else "query"].prompt
        found.append(Trained(side, encoders[side], other, others))
    return found


def _base_encoders(spec: EncoderSpec) -> dict[str, Encoder]:
    """An encoder of the base model, by the sentence that names this mistake; none if the base is not here."""

    contract = read_contract(spec.model_name)
    if contract is None:
        return {}
    length = spec.max_seq_length or contract.max_seq_length or None
    base = replace(spec, model_name=contract.base_model, max_seq_length=length)
    try:
        encoder = base.encoder("query")
    except (ModelError, MissingError):
        return {}
    same = encoder.dim == contract.dimension
    return {f"base model without the adapter ({contract.base_model} is served)": encoder} if same else {}


# --- folders ------------------------------------------------------------------------------------------------------


def served_folder(folder: Path, kind: str | None = None) -> Encode:
    """Encode texts as a folder's users do, with its own tokenizer, length, pooling and default prompt.

    :param kind: "openvino" or "onnx" for its graph; None takes the weights, or without any the first graph there is.
    :raises ModelError: it does not load.
    """
    graph = folder / GRAPHS[kind] if kind in GRAPHS else _only_graph(folder)
    if graph is not None:
        return _Graph(folder, graph)
    from sentence_transformers import SentenceTransformer

    refuse_pickles(str(folder), folder)
    try:
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"use_safetensors": True})
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder} does not load as a sentence-transformers model: {error}") from error
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)


def _only_graph(folder: Path) -> Path | None:
    """The graph of a folder without weights, which may be beside the tokenizer or in a folder of its own."""
    if any(folder.glob("*.safetensors")) or (folder / "modules.json").is_file():
        return None
    places = [*GRAPHS.values(), *(Path(place).name for place in GRAPHS.values())]
    graph = next((folder / place for place in places if (folder / place).is_file()), None)
    if graph is None and not (folder / "config.json").is_file():
        raise MissingError(f"{folder} holds neither a model nor a graph ({', '.join(places)})")
    return graph


class _Graph:
    """An OpenVINO or ONNX graph with the tokenizer beside it, run by OpenVINO."""

    def __init__(self, folder: Path, graph: Path) -> None:
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has a graph and no tokenizer.json; put the model's tokenizer beside it")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.compiled = core().compile_model(core().read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except Exception as error:  # OpenVINO and tokenizers raise errors of their own classes
            raise ModelError(f"{graph} cannot be run: {str(error).strip().splitlines()[0]}") from error
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(_length_of(folder, graph))
        self.inputs = {port.get_any_name() for port in self.compiled.inputs}
        self.outputs = [port.get_names() for port in self.compiled.outputs]
        self.folder, self.graph = folder, graph

    def __call__(self, texts: Sequence[str]) -> Vectors:
        found = [self._batch(texts[i : i + SERVED_BATCH]) for i in range(0, len(texts), SERVED_BATCH)]
        return np.concatenate(found)

    def _batch(self, texts: Sequence[str]) -> Vectors:
        encoded = [text.ids for text in self.tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        ids, seen = padded_batch(np.concatenate(encoded).astype(np.int32), lengths, 0)
        given = {"input_ids": ids, "attention_mask": seen.astype(np.int64), "token_type_ids": np.zeros_like(ids)}
        result = self.compiled({name: value for name, value in given.items() if name in self.inputs})
        for place, names in enumerate(self.outputs):
            if VECTOR in names:
                return np.array(result[place], np.float32)
        return self._pooled(np.array(result[0], np.float32), seen)

    def _pooled(self, states: NDArray[np.float32], seen: NDArray[np.bool_]) -> Vectors:
        """Pool token states as the folder's own modules say."""
        from sentence_transformers.sentence_transformer.modules import Pooling

        parts = {m["type"].rpartition(".")[2]: m["path"] for m in read_json(self.folder / "modules.json") or ()}
        if states.ndim != 3 or "Pooling" not in parts:
            raise ModelError(
                f"{self.graph} gives token states, and no modules.json beside it says how they become a vector"
            )
        features = {"token_embeddings": torch.from_numpy(states), "attention_mask": torch.from_numpy(seen).long()}
        vectors = Pooling.load(str(self.folder / parts["Pooling"])).forward(features)["sentence_embedding"]
        return np.asarray(torch.nn.functional.normalize(vectors, dim=1) if "Normalize" in parts else vectors)


def _length_of(folder: Path, graph: Path) -> int:
    """Tokens that a graph's users cut texts to."""
    places = ("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")
    for file, name in places:
        length = as_mapping(read_json(folder / file)).get(name)
        if isinstance(length, int) and 0 < length < 10**6:
            return length
    raise ModelError(f"{graph}: neither sentence_bert_config.json nor tokenizer_config.json says where texts are cut")


# --- prompts ------------------------------------------------------------------------------------------------------


def with_prompts(encode: Encode, sides: Sequence[Trained]) -> Served:
    """Put each side's prompt before its texts, as a client does whose server knows nothing of prompts."""
    prompts = {trained.side: trained.encoder.prompt for trained in sides}
    return lambda side, texts: encode([prompts[side] + text for text in texts])
