"""A model as an OpenVINO or ONNX graph: token ids and mask in, token states and the text's vector out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ebr_lib.errors import ModelError
from ebr_lib.extras import require
from ebr_lib.model.attention import attention, evaluating
from ebr_lib.model.openvino import converted, example_input, quiet_tracing
from ebr_lib.model.served import GRAPHS, STATES, VECTOR

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor


class _WholeModel(torch.nn.Module):
    """All modules of a model, with plain tensors in and out."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        first, *rest = self.parts
        features = first({"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"})
        states = features["token_embeddings"]
        for part in rest:
            features = part(features)
        return states, features["sentence_embedding"]


def write_graph(model: SentenceTransformer, kind: str, folder: Path) -> Path:
    """Write the graph of a model in float32 where sentence-transformers and TEI look for it.

    :param kind: "openvino" or "onnx".
    :raises ModelError: the model is not a transformer that takes tokens, or cannot be converted.
    :raises NotInstalledError: the packages that write ONNX are missing.
    """
    if not hasattr(model[0], "model"):
        raise ModelError(f"a {type(model[0]).__name__} is not a transformer that takes tokens, and has no graph")
    if any(not getattr(module, "include_prompt", True) for module in model):
        raise ModelError("its pooling leaves the prompt out, which a graph of token ids cannot know")
    place = folder / GRAPHS[kind]
    place.parent.mkdir(parents=True)
    write = {"openvino": _write_openvino, "onnx": _write_onnx}[kind]
    # window attention becomes NaN where a window holds nothing but padding; plain attention does not
    with torch.no_grad(), evaluating(model), attention(model, "eager") if kind == "openvino" else nullcontext():
        try:
            write(model, place)
        except Exception as error:  # tracing runs the model's own code: anything may come
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"the model cannot be written as {kind}: {reason}") from error
    return place


def _write_openvino(model: SentenceTransformer, place: Path) -> None:
    import openvino

    graph = converted(_WholeModel(model), model)
    for port, name in zip(graph.outputs, (STATES, VECTOR), strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(graph, place, compress_to_fp16=False)


def _write_onnx(model: SentenceTransformer, place: Path) -> None:
    require("onnx")
    example = example_input(model)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    with quiet_tracing():
        torch.onnx.export(
            _WholeModel(model),
            tuple(example.values()),
            str(place),
            input_names=list(example),
            output_names=[STATES, VECTOR],
            dynamic_shapes=tuple({0: batch, 1: length} for _ in example),
            dynamo=True,
            external_data=sum(weight.nbytes for weight in model.parameters()) > 1 << 30,
            verbose=False,
        )
