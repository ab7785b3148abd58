"""Encoding on a CPU: a model's transformer as an OpenVINO graph, compiled for this processor.

The graph ends with the token states. Pooling and the modules after it run on torch in float32: they take no time, and a
Dense layer or a prompt outside of the mean needs no special case.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebr_lib.model.attention import attention, evaluating
from ebr_lib.model.packing import Padded, padded_batch
from ebr_lib.model.precision import Dtype

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

# openvino reports each import and conversion to a web analytics service through this package; without it, it does not
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

HINTS = {"float32": "f32", "bfloat16": "bf16"}
PROBE_LENGTHS = (2, 3, 5, 9, 17, 40, 150)
# of a component of a unit vector: rounding was up to 3e-7 in float32 and 2e-3 in bfloat16 (6 to 24 layers)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class ConversionError(Exception):
    """OpenVINO cannot run the model, or gives other vectors; the message says why."""


def compiled_transformer(model: SentenceTransformer, precision: Dtype) -> CompiledTransformer:
    """Compile the transformer of a model in float32, and compare its vectors with torch's.

    :raises ConversionError: OpenVINO cannot run it, or gives other vectors.
    """
    streams = _streams(model, precision)
    # in OpenVINO this attention gives NaN for a window of nothing but padding, plain attention does not
    for plain in (False, True):
        with attention(model, "eager") if plain else nullcontext():
            compiled = CompiledTransformer(model, precision, streams)
        gap = _largest_gap(model, compiled)
        if gap <= TOLERANCE[precision]:
            return compiled
    raise ConversionError(f"its vectors differ from torch's by {gap:.1e}")


def _streams(model: SentenceTransformer, precision: Dtype) -> int:
    """Batches computed in parallel: one per thread, which measured fastest.

    In bfloat16 a gated layer (Qwen, Llama) needs two threads: OpenVINO 2026.4 divides by half of a stream's threads,
    and on a processor with AMX the process ends there (SIGFPE).
    """
    threads = torch.get_num_threads()
    gated = any(name.endswith("gate_proj") for name, _ in model[0].named_modules())
    if precision == "float32" or not gated:
        return threads
    if threads < 2:
        raise ConversionError("in bfloat16 this model needs two threads there, and has one")
    return threads // 2


@functools.cache
def core() -> Any:
    """The one core of this process: a process that made many of them died of a segmentation fault some time later."""
    import openvino

    return openvino.Core()


class CompiledTransformer:
    """Token states of batches, computed in parallel, one batch per stream."""

    def __init__(self, model: SentenceTransformer, precision: Dtype, streams: int) -> None:
        """Convert and compile the first module of a model, adapter included; its weights are shared, not copied.

        :raises ConversionError: OpenVINO cannot run it.
        """
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
        }
        try:
            graph = converted(_States(model[0]), model)
            self._compiled = core().compile_model(graph, "CPU", settings)
        except Exception as error:  # tracing runs the model's own code: anything may come
            raise ConversionError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        # one more than streams: it holds the next batch while the caller pools the last one
        self._requests = [self._compiled.create_infer_request() for _ in range(streams + 1)]

    def states(self, batches: Iterable[Padded]) -> Iterator[tuple[Tensor, NDArray[np.bool_]]]:
        """Yield each batch's token states (texts, length, width), in order, and which places hold a token.

        Batches are padded on the right, whatever the model's side: a causal model padded on the left has places that
        see nothing, whose states are NaN in OpenVINO. A text's vector is the same.

        The states are valid until the next ones are requested.
        """
        free, running = list(self._requests), deque[Any]()
        try:
            for ids, seen in batches:
                if not free:
                    yield self._done(running)
                    free.append(running.popleft()[0])
                request = free.pop()
                request.start_async({"input_ids": ids, "attention_mask": seen.astype(np.int64)})
                running.append((request, seen))
            while running:
                yield self._done(running)
                running.popleft()
        finally:
            for request, _ in running:
                request.wait()

    def _done(self, running: deque[Any]) -> tuple[Tensor, NDArray[np.bool_]]:
        request, seen = running[0]
        request.wait()
        return torch.from_numpy(request.get_output_tensor(0).data), seen


class _States(torch.nn.Module):
    """The transformer with plain tensors in and out, for tracing."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        return self.transformer(features)["token_embeddings"].float()


def converted(module: torch.nn.Module, model: SentenceTransformer) -> Any:
    """The OpenVINO graph of a module that takes the ids and the mask of a model's texts."""
    import openvino

    shape, kind = openvino.PartialShape([-1, -1]), openvino.Type.i64
    example = example_input(model)
    with torch.no_grad(), evaluating(model), quiet_tracing():
        return openvino.convert_model(module, example_input=example, input=[(name, shape, kind) for name in example])


def example_input(model: SentenceTransformer) -> dict[str, Tensor]:
    """Ids and mask of two texts of random tokens, one of them padded, to trace a model with."""
    ids, seen = padded_batch(*_random_tokens(model, (3, 7)), model.tokenizer.pad_token_id or 0)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen.astype(np.int64))}


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Ignore warnings of branches that tracing cannot follow; comparing the vectors shows whether they matter.

    OpenVINO also sets the root logger to errors only, and does not undo that if a conversion fails.
    """
    root = logging.getLogger()
    level, filters, handlers, disabled = root.level, root.filters[:], root.handlers[:], root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _random_tokens(model: SentenceTransformer, lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random ids of texts, one after another, and their lengths, which are cut to the model's."""
    sizes = np.minimum(lengths, model.max_seq_length or max(lengths))
    vocabulary = model[0].model.get_input_embeddings().num_embeddings
    return np.random.default_rng(0).integers(5, vocabulary, sizes.sum()), sizes


def _largest_gap(model: SentenceTransformer, compiled: CompiledTransformer) -> float:
    """Largest difference of a component of a unit vector to torch's, over probe texts of many lengths."""
    tokens, lengths = _random_tokens(model, PROBE_LENGTHS)
    filler = model.tokenizer.pad_token_id or 0
    ((states, seen),) = compiled.states([padded_batch(tokens, lengths, filler)])
    found = _unit(model, states, torch.from_numpy(seen.astype(np.int64)))
    ids, mask = map(torch.from_numpy, padded_batch(tokens, lengths, filler, model.tokenizer.padding_side))
    with torch.inference_mode(), evaluating(model):
        wanted = _unit(model, _States(model[0])(ids, mask.long()), mask.long())
    return float((found - wanted).abs().max())


def _unit(model: SentenceTransformer, states: Tensor, mask: Tensor) -> Tensor:
    features = {"token_embeddings": states, "attention_mask": mask, "modality": "text"}
    with torch.inference_mode(), evaluating(model):
        for module in list(model)[1:]:
            features = module(features)
    return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)
