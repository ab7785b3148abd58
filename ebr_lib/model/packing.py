"""Batches of texts of different lengths: several texts per row, or one per row and padding.

Packed texts share a row under a block-diagonal mask, so that little is padding. Positions restart with every text and
no text sees another, so each gets the vector that it would get alone (Krell et al. 2021, arXiv 2107.02027). On a GPU in
half precision all texts are in one row. Training uses both layouts, with gradients; encoding uses one row on a GPU.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ebr_lib.logs import logger
from ebr_lib.model.attention import Features, attention, evaluating, has_varlen, one_row_attention
from ebr_lib.model.positions import position_padding

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

MIN_ROW = 64  # shorter rows make the matrix products of attention too small; measured on a CPU
EAGER_ROW = 128  # plain attention holds a number for each pair of places in a row
PROBE_LENGTHS = (2, 3, 5, 9, 17, 40, 150)
# of a component of a unit vector; bfloat16's own rounding was up to 1.6e-3 (6 and 12 layers, 384 dimensions)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}

Padded = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (texts, longest), and which of the places hold a token."""


def padded_batch(
    ids: NDArray[np.integer], lengths: NDArray[np.integer], filler: int, side: Literal["left", "right"] = "right"
) -> Padded:
    """One text per row, padded to the longest.

    :param ids: tokens of all texts, one text after another (tokens,).
    :param lengths: tokens of each text (texts,).
    :param filler: id of padding.
    :param side: where a text's padding goes.
    """
    places = np.arange(max(int(lengths.max()), 1))
    seen = (places[::-1] if side == "left" else places)[None] < lengths[:, None]
    padded = np.full(seen.shape, filler, dtype=np.int64)
    padded[seen] = ids
    return padded, seen


@dataclass(frozen=True)
class PackedLayout:
    """Where texts are: text i is tokens `starts[i] : starts[i] + lengths[i]` of row `rows[i]`."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_count: int
    row_length: int

    @property
    def slots(self) -> int:
        """Token places, padding included."""
        return self.row_count * self.row_length

    @property
    def places(self) -> NDArray[np.int64]:
        """Places (tokens,) in the flattened rows of all tokens, text after text."""
        return np.repeat(self.rows * self.row_length + self.starts, self.lengths) + self.offsets

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Distance of each token (tokens,) from the start of its text."""
        ends = np.cumsum(self.lengths)
        return np.arange(int(self.lengths.sum())) - np.repeat(ends - self.lengths, self.lengths)


def pack(lengths: Sequence[int] | NDArray[np.integer], row_length: int) -> PackedLayout:
    """Put texts into rows, longest first, each into the fullest row that still has room (best-fit decreasing).

    :param lengths: tokens of each text, at most `row_length`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rows, starts = np.zeros_like(sizes), np.zeros_like(sizes)
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    row_count = 0
    for text in np.argsort(-sizes, kind="stable"):
        at = bisect_left(open_rows, (int(sizes[text]), -1))
        room, row = open_rows.pop(at) if at < len(open_rows) else (row_length, row_count)
        row_count = max(row_count, row + 1)
        rows[text], starts[text] = row, row_length - room
        insort(open_rows, (room - int(sizes[text]), row))
    return PackedLayout(rows, starts, sizes, row_count, row_length)


def one_row(lengths: Sequence[int] | NDArray[np.integer]) -> PackedLayout:
    """Put texts one after another into a single row, in their order."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return PackedLayout(np.zeros_like(sizes), np.cumsum(sizes) - sizes, sizes, 1, int(sizes.sum()))


class PackedForward:
    """Embeds texts through packed rows; the vectors are those of padded batches.

    Transformer and adapter run on the rows, the model's other modules (pooling, dense, normalise) on each text's
    token states. Gradients flow; dropout works, with other random draws than in padded batches.
    """

    def __init__(self, model: SentenceTransformer, *, causal: bool = False, one_row: bool = False) -> None:
        """Make a packed forward.

        :param causal: texts see only what comes before. (In one row the model's own attention decides.)
        :param one_row: put all texts into one row, for a device with the kernel of `model.attention`.
        """
        self.model = model
        self.causal = causal
        self.one_row = one_row
        self._transformer, *self._after = list(model)
        self._pad = model.tokenizer.pad_token_id or 0
        self._unplaced = position_padding(model)
        self._first_position = 0 if self._unplaced is None else self._unplaced + 1

    def __call__(self, columns: Sequence[Features]) -> list[Tensor]:
        """Sentence embeddings (rows, dim) of each column, from one forward over the texts of all.

        :param columns: from the library's collator: `input_ids` and `attention_mask` (rows, length), padded on the
            right, and maybe `prompt_length`.
        """
        ids, lengths = [], []
        for column in columns:
            seen = column["attention_mask"].bool()
            ids.append(column["input_ids"][seen])
            lengths.append(seen.sum(dim=1))
        counts = torch.cat(lengths).cpu().numpy()
        states = self.states(torch.cat(ids), self.layout(counts))
        parts = states.to(_rest_dtype(self.model)).split([int(part.sum()) for part in lengths])
        prompts = [column.get("prompt_length") for column in columns]
        return [self.pool(*part) for part in zip(parts, lengths, prompts, strict=True)]

    def layout(self, lengths: NDArray[np.integer]) -> PackedLayout:
        """The layout of texts of these lengths."""
        return one_row(lengths) if self._in_one_row() else pack(lengths, _row_length_for(lengths))

    def _in_one_row(self) -> bool:
        """The kernel cannot drop attention weights, which a model may do in training."""
        config = self._transformer.model.config
        rate = getattr(config, "attention_dropout", getattr(config, "attention_probs_dropout_prob", 0.0))
        return self.one_row and not (self.model.training and rate)

    def states(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """Token states (tokens, width) of texts that follow each other in `ids` (tokens,), placed by `layout`."""
        device, lengths = ids.device, layout.lengths
        offsets = torch.from_numpy(layout.offsets).to(device)
        positions = self._positions(ids, offsets)
        if self._in_one_row():
            ends = np.concatenate([layout.starts, [layout.slots]]).astype(np.int32)
            row = {"input_ids": ids.long()[None], "position_ids": positions[None], "max_length_q": int(lengths.max())}
            with one_row_attention(self.model):
                return self._transformer(row | {"cu_seq_lens_q": torch.from_numpy(ends).to(device)})[
                    "token_embeddings"
                ][0]
        places = torch.from_numpy(layout.places).to(device)
        texts = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)

        def spread(values: Tensor, rest: int) -> Tensor:
            rows = torch.full((layout.slots,), rest, device=device).index_put((places,), values)
            return rows.view(layout.row_count, layout.row_length)

        features = {
            "input_ids": spread(ids.long(), self._pad),
            "position_ids": spread(positions, self._first_position),
            "attention_mask": self._mask(spread(texts, -1)),
        }
        # backward under gradient checkpointing runs layers again outside of this context, so the trainer sets it then
        learns = torch.is_grad_enabled() and not self.model.transformers_model.is_activation_checkpointing
        plain = learns and plain_is_faster(self.model, layout.row_length)
        with attention(self.model, "eager") if plain else nullcontext():
            out = self._transformer(features)["token_embeddings"]
        return out.flatten(0, 1).index_select(0, places)

    def _positions(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Positions (tokens,). RoBERTa and similar models do not count padding tokens, which a text may contain.

        :param offsets: of each token from the start of its text.
        """
        if self._unplaced is None:
            return offsets
        placed = (ids != self._unplaced).long()
        counted = placed.cumsum(0)
        starts = torch.arange(len(ids), device=ids.device) - offsets
        before = (counted - placed)[starts]  # tokens counted in earlier texts
        return (counted - before) * placed + self._unplaced

    def _mask(self, texts: Tensor) -> Tensor:
        """Additive mask (rows, 1, length, length) of the text each place holds; padding (−1) sees padding."""
        seen = texts[:, :, None] == texts[:, None, :]
        if self.causal:
            seen = seen.tril()
        dtype = self._transformer.model.dtype
        zero = torch.zeros((), dtype=dtype, device=texts.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]

    def pool(self, states: Tensor, lengths: Tensor, prompt_length: Any = None) -> Tensor:
        """Sentence embeddings (texts, dim) of token states (tokens, width), text after text."""
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        features: Features = {"token_embeddings": states[None], "cu_seq_lens_q": ends, "modality": "text"}
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        for module in self._after:
            features = module(features)
        return features["sentence_embedding"]


def _rest_dtype(model: SentenceTransformer) -> torch.dtype:
    """Number type of the modules after the transformer: that of their weights, else the transformer's."""
    transformer, *rest = model
    weight = next((weight for module in rest for weight in module.parameters()), None)
    return transformer.model.dtype if weight is None else weight.dtype


def plain_is_faster(model: SentenceTransformer, longest: int) -> bool:
    """Whether plain attention beats the fused kernel, whose backward took half of a bfloat16 step on a CPU."""
    return model.device.type == "cpu" and _row_length_for(np.array([longest])) <= EAGER_ROW


def _row_length_for(lengths: NDArray[np.integer]) -> int:
    """The longest text, at least MIN_ROW, up to a multiple of eight."""
    return max(MIN_ROW, -(-int(lengths.max()) // 8) * 8)


def packed_forward(model: SentenceTransformer, *, one_row: bool = True) -> PackedForward | None:
    """A PackedForward whose vectors were compared with padded batches; None if they differ, which is logged.

    :param one_row: use one row where the device has the kernel. Not under gradient checkpointing: backward runs the
        layers again after the kernel was replaced.
    """
    reason = "its first module is not a transformer that takes tokens"
    if hasattr(model[0], "model") and hasattr(model.tokenizer, "pad_token_id"):
        for causal in (False, True):
            packed = PackedForward(model, causal=causal)
            if reason := _difference(packed):
                continue
            if not (one_row and has_varlen(model)):
                return packed
            better = PackedForward(model, causal=causal, one_row=True)
            if reason := _difference(better):
                logger.info("文本按长度合并成行 texts share rows of their own length, not one: %s", reason)
            return packed if reason else better
    logger.info("文本以填充方式编码 texts are padded, not packed: %s", reason)
    return None


def _difference(packed: PackedForward) -> str:
    """Why packed vectors are not those of padded batches; empty if they are."""
    model = packed.model
    transformer, *rest = model
    if "sliding_attention" in (getattr(transformer.model.config, "layer_types", None) or ()):
        return "the model looks through a sliding window"
    try:
        features, allowed = _probe(model), TOLERANCE[transformer.model.dtype]
        with torch.no_grad(), evaluating(model):
            padded = transformer(dict(features))
            padded["token_embeddings"] = padded["token_embeddings"].to(_rest_dtype(model))
            for module in rest:
                padded = module(padded)
            (found,) = packed([features])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    unit = torch.nn.functional.normalize
    gap = float((unit(padded["sentence_embedding"].float(), dim=1) - unit(found.float(), dim=1)).abs().max())
    return "" if gap <= allowed else f"their vectors differ from those of padded batches by {gap:.1e}"


def _probe(model: SentenceTransformer) -> Features:
    """Texts of random tokens, of many lengths; some contain the padding token, as a text may."""
    lengths = torch.tensor([min(length, model.max_seq_length or length) for length in PROBE_LENGTHS])
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), int(lengths.max()))
    ids = torch.randint(5, model[0].model.get_input_embeddings().num_embeddings, shape, generator=generator)
    seen = torch.arange(shape[1])[None] < lengths[:, None]
    padding = model.tokenizer.pad_token_id or 0
    ids[::2, 1] = padding
    ids = ids.where(seen, torch.tensor(padding))
    return {"input_ids": ids.to(model.device), "attention_mask": seen.long().to(model.device), "modality": "text"}
