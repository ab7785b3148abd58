"""Several texts in one row: short texts share a row under a block-diagonal mask, so that little is padding.

Positions restart with every text and no text sees another, so each gets the vector it would get alone
(Krell et al. 2021, arXiv 2107.02027). On a GPU in half precision all texts lie in one row, and nothing is padding.
Used by training (differentiable) and by encoding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebr_lib.logs import logger
from ebr_lib.model.attention import Features, attention, evaluating
from ebr_lib.model.positions import first_position, position_padding
from ebr_lib.model.varlen import VARLEN, attention_dropout, has_varlen, register

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Ids = NDArray[np.int32]

MIN_ROW = 64  # shorter rows make the matrix products of attention too small; measured on a CPU
EAGER_ROW = 128  # plain attention keeps a number for each pair of places in a row
PROBE_LENGTHS = (2, 3, 5, 9, 17, 40, 150)
# of a component of a unit vector; bfloat16's own rounding was up to 1.6e-3 (6 and 12 layers, 384 dimensions)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class PackedLayout:
    """Where texts lie: text i is tokens `starts[i] : starts[i] + lengths[i]` of row `rows[i]`."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_count: int
    row_length: int

    @property
    def slots(self) -> int:
        """Token places, those of padding included."""
        return self.row_count * self.row_length

    @property
    def places(self) -> NDArray[np.int64]:
        """Places (tokens,) in the flattened rows of all tokens, text after text."""
        return np.repeat(self.rows * self.row_length + self.starts, self.lengths) + self.offsets

    @property
    def offsets(self) -> NDArray[np.int64]:
        """How far each token (tokens,) is from the start of its text."""
        ends = np.cumsum(self.lengths)
        return np.arange(int(self.lengths.sum())) - np.repeat(ends - self.lengths, self.lengths)


def pack(lengths: Sequence[int] | NDArray[np.integer], row_length: int) -> PackedLayout:
    """Put texts into rows, longest first, each into the fullest row that still has room (best-fit decreasing).

    :param lengths: tokens of each text, none over `row_length`.
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


def one_row(lengths: NDArray[np.integer]) -> PackedLayout:
    """Texts one after another in a single row, in their order."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return PackedLayout(np.zeros_like(sizes), np.cumsum(sizes) - sizes, sizes, 1, int(sizes.sum()))


class PackedForward:
    """Embeds texts through packed rows; the vectors are those of padded batches.

    Transformer and adapter run on the rows, the model's other modules (pooling, dense, normalise) on each text's
    token states. Gradients flow; dropout works, with other random draws than in padded batches.
    """

    def __init__(self, model: SentenceTransformer, *, causal: bool = False, one_row: bool = False) -> None:
        """Make a packed forward.

        :param causal: texts see what comes before only. (In one row the model's own attention decides.)
        :param one_row: lay all texts in one row where the device has a kernel for it; see `model.varlen`.
        """
        self.model = model
        self.causal = causal
        self.one_row = one_row
        if one_row:
            register()
        self._transformer, *self._after = list(model)
        self._pad = model.tokenizer.pad_token_id or 0
        self._first_position = first_position(model)
        self._unplaced = position_padding(model)

    def __call__(self, columns: Sequence[Features]) -> list[Tensor]:
        """Sentence embeddings (rows, dim) of each column, from one forward over the texts of all.

        :param columns: what the library's collator makes: `input_ids` and `attention_mask` (rows, length), padded on
            the right, and maybe `prompt_length`.
        """
        ids, lengths = [], []
        for column in columns:
            seen = column["attention_mask"].bool()
            ids.append(column["input_ids"][seen])
            lengths.append(seen.sum(dim=1))
        counts = torch.cat(lengths).cpu().numpy()
        states = self.states(torch.cat(ids), self.layout(counts))
        parts = states.to(rest_dtype(self.model)).split([int(part.sum()) for part in lengths])
        prompts = [column.get("prompt_length") for column in columns]
        return [self.pool(*part) for part in zip(parts, lengths, prompts, strict=True)]

    def layout(self, lengths: NDArray[np.integer]) -> PackedLayout:
        """Where texts of these lengths shall lie."""
        return one_row(lengths) if self._in_one_row() else pack(lengths, row_length_for(lengths))

    def _in_one_row(self) -> bool:
        drops = self.model.training and attention_dropout(self.model) > 0
        return self.one_row and not drops

    def states(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """Token states (tokens, width) of texts that follow each other in `ids` (tokens,), laid out by `layout`."""
        if self._in_one_row():
            return self._states_in_one_row(ids, layout)
        shape = (layout.row_count, layout.row_length)
        device = ids.device
        places = torch.from_numpy(layout.places).to(device)

        def spread(values: Tensor, rest: int) -> Tensor:
            return torch.full((layout.slots,), rest, device=device).index_put((places,), values).view(shape)

        offsets = torch.from_numpy(layout.offsets).to(device)
        texts = torch.from_numpy(np.repeat(np.arange(len(layout.lengths)), layout.lengths)).to(device)
        features = {
            "input_ids": spread(ids.long(), self._pad),
            "position_ids": spread(self._positions(ids, layout, offsets), self._first_position),
            "attention_mask": self._mask(spread(texts, -1)),
        }
        with self._attention(layout.row_length, device):
            out = self._transformer(features)["token_embeddings"]
        return out.flatten(0, 1).index_select(0, places)

    def _positions(self, ids: Tensor, layout: PackedLayout, offsets: Tensor) -> Tensor:
        """Positions (tokens,): RoBERTa and its kin count the tokens that are not padding, though a text may hold some.

        :param offsets: of each token from the start of its text.
        """
        if self._unplaced is None:
            return offsets + self._first_position
        placed = (ids != self._unplaced).long()
        counted = placed.cumsum(0)
        starts = torch.arange(len(ids), device=ids.device) - offsets
        before = (counted - placed)[starts]  # tokens counted in earlier texts
        return (counted - before) * placed + self._unplaced

    def _states_in_one_row(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        ends = np.concatenate([layout.starts, [layout.slots]]).astype(np.int32)
        offsets = torch.from_numpy(layout.offsets).to(ids.device)
        features = {
            "input_ids": ids.long()[None],
            "position_ids": self._positions(ids, layout, offsets)[None],
            "cu_seq_lens_q": torch.from_numpy(ends).to(ids.device),
            "max_length_q": int(layout.lengths.max()),
        }
        with passing_all(self._transformer), attention(self.model, VARLEN):
            return self._transformer(features)["token_embeddings"][0]

    def _attention(self, row_length: int, device: torch.device) -> AbstractContextManager[None]:
        # Backward under gradient checkpointing runs layers again, outside of this context: the trainer sets it then.
        learns = torch.is_grad_enabled() and not self.model.transformers_model.is_activation_checkpointing
        return attention(self.model, "eager") if learns and plain_is_faster(self.model, row_length) else nullcontext()

    def _mask(self, texts: Tensor) -> Tensor:
        """Additive mask (rows, 1, length, length) of the text each place holds; padding (−1) sees padding."""
        seen = texts[:, :, None] == texts[:, None, :]
        if self.causal:
            seen = seen.tril()
        dtype = self._transformer.model.dtype
        zero = torch.zeros((), dtype=dtype, device=texts.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]

    def pool(self, states: Tensor, lengths: Tensor, prompt_length: Any = None) -> Tensor:
        """Sentence embeddings (texts, dim) of token states (tokens, width) that follow each other."""
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        features: Features = {"token_embeddings": states[None], "cu_seq_lens_q": ends, "modality": "text"}
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        for module in self._after:
            features = module(features)
        return features["sentence_embedding"]


def embed_padded(model: SentenceTransformer, features: Features) -> Tensor:
    """Sentence embeddings (texts, dim) of a padded batch; what follows the transformer computes in its own type."""
    transformer, *rest = model
    features = transformer(features)
    features["token_embeddings"] = features["token_embeddings"].to(rest_dtype(model))
    for module in rest:
        features = module(features)
    return features["sentence_embedding"]


def rest_dtype(model: SentenceTransformer) -> torch.dtype:
    """The type that what follows the transformer computes in: that of its weights, else the transformer's."""
    transformer, *rest = model
    weight = next((weight for module in rest for weight in module.parameters()), None)
    return transformer.model.dtype if weight is None else weight.dtype


@contextmanager
def passing_all(transformer: Any) -> Iterator[None]:
    """Let the module hand on what its model's signature does not name: where texts start is for the attention."""
    before = transformer.model_forward_params
    if before is not None:
        transformer.model_forward_params = before | {"cu_seq_lens_q", "max_length_q"}
    try:
        yield
    finally:
        transformer.model_forward_params = before


def plain_is_faster(model: SentenceTransformer, longest: int) -> bool:
    """Whether plain attention beats the fused kernel, whose backward took half of a bfloat16 step on a CPU."""
    return model.device.type == "cpu" and row_length_for(np.array([longest])) <= EAGER_ROW


def row_length_for(lengths: NDArray[np.integer]) -> int:
    """The longest text, at least MIN_ROW, up to a multiple of eight."""
    return max(MIN_ROW, -(-int(lengths.max()) // 8) * 8)


def packed_forward(model: SentenceTransformer, *, one_row: bool = True) -> PackedForward | None:
    """A PackedForward whose vectors were just compared with padded batches, or None, and the log says why.

    :param one_row: take one row where the device has the kernel. Not under gradient checkpointing: backward runs the
        layers again when their attention is no longer the kernel's.
    """
    reason = "its first module is no transformer that reads tokens"
    if hasattr(model[0], "model") and hasattr(model.tokenizer, "pad_token_id"):
        for causal in (False, True):
            packed = PackedForward(model, causal=causal)
            if not (reason := _difference(packed)):
                return _one_row_if_right(packed) if one_row else packed
    logger.info("texts are padded, not packed: %s", reason)
    return None


def _one_row_if_right(packed: PackedForward) -> PackedForward:
    """In one row where the device has the kernel and its vectors are right; else rows under a mask, as given."""
    if not has_varlen(packed.model):
        return packed
    better = PackedForward(packed.model, causal=packed.causal, one_row=True)
    reason = _difference(better)
    if reason:
        logger.info("texts share rows of their own length, not one: %s", reason)
    return packed if reason else better


def _difference(packed: PackedForward) -> str:
    """Why packed vectors are not those of padded batches; empty when they are."""
    try:
        return _gap(packed)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def _gap(packed: PackedForward) -> str:
    """Why packed vectors are not those of padded batches; empty when they are."""
    model = packed.model
    if "sliding_attention" in (getattr(model[0].model.config, "layer_types", None) or ()):
        return "the model looks through a sliding window"
    with torch.no_grad(), evaluating(model):
        features = _probe(model)
        wanted = embed_padded(model, dict(features)).float()
        (found,) = packed([features])
    unit = torch.nn.functional.normalize
    gap = float((unit(wanted, dim=1) - unit(found.float(), dim=1)).abs().max())
    allowed = TOLERANCE[model[0].model.dtype]
    return "" if gap <= allowed else f"their vectors differ from those of padded batches by {gap:.1e}"


def _probe(model: SentenceTransformer) -> Features:
    """Texts of random tokens, of many lengths; some hold the padding token, which a text may be made of."""
    lengths = torch.tensor([min(length, model.max_seq_length or length) for length in PROBE_LENGTHS])
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), int(lengths.max()))
    ids = torch.randint(5, model[0].model.get_input_embeddings().num_embeddings, shape, generator=generator)
    seen = torch.arange(shape[1])[None] < lengths[:, None]
    padding = model.tokenizer.pad_token_id or 0
    ids[::2, 1] = padding
    ids = ids.where(seen, torch.tensor(padding))
    return {"input_ids": ids.to(model.device), "attention_mask": seen.long().to(model.device), "modality": "text"}
