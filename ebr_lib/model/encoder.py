"""Texts to vectors, fast: each text is tokenised once, batches have about equal token counts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebr_lib.arrays import Vectors, broken_alone, not_finite
from ebr_lib.data.text import HALF_CHARACTER, half_character
from ebr_lib.errors import ConfigError, DataError, ModelError, NotFiniteError
from ebr_lib.logs import logger
from ebr_lib.model.adapters import is_adapted, merge_adapter
from ebr_lib.model.attention import evaluating
from ebr_lib.model.memory import keep_freed_memory
from ebr_lib.model.packing import PackedForward, packed_forward, padded_batch
from ebr_lib.model.precision import Dtype, choose_precision
from ebr_lib.model.shapes import token_embeddings
from ebr_lib.names import Asked, Backend
from ebr_lib.tables import shortened

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ebr_lib.model.openvino import CompiledTransformer

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768
SIMILAR = 0.75  # share of the longest text that others in its batch have at least
FAIR_TOKENS = 512
# texts and characters per call of the tokenizer, whose results are Python objects, tokens that are cut off included
TOKENIZER_CHUNK, TOKENIZER_CHARACTERS = 1024, 1 << 22
FLUSH_ROWS = 16384  # vectors on the device before they are copied to memory
NO_LIMIT = 10**6  # a tokenizer that has no limit says 1e30
TOKENIZER_PROBES = ("", "a", "  Two  words ", "你好，世界", "<s> [CLS] </s> <|endoftext|>\n\tÀé😀", "long " * 600)


@dataclass
class EncodeStats:
    """Counts of an encoder's work.

    `slots` are token places in its batches, padding included; `tokens_fixed` those of prompts and special tokens;
    `tokens_unknown` those of words and characters that the tokenizer does not know.
    """

    texts: int = 0
    tokens: int = 0
    slots: int = 0
    truncated: int = 0
    tokens_lost: int = 0
    tokens_fixed: int = 0
    tokens_unknown: int = 0

    @property
    def padding_share(self) -> float:
        """Share of the token places that held padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    @property
    def lost_share(self) -> float:
        """Share of tokens that were cut off."""
        return self.tokens_lost / max(self.tokens + self.tokens_lost, 1)

    @property
    def unknown_share(self) -> float:
        """Share of the texts' own tokens that the tokenizer does not know."""
        return self.tokens_unknown / max(self.tokens - self.tokens_fixed, 1)


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, one after another: `lengths[i]` of text i, after `lost[i]` were cut off."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    lost: NDArray[np.int64]

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place in `ids` of each text's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, texts: NDArray[np.intp]) -> NDArray[np.int32]:
        """The ids of some texts, one after another."""
        lengths = self.lengths[texts]
        ends = np.cumsum(lengths)
        return self.ids[np.repeat(self.starts[texts] - (ends - lengths), lengths) + np.arange(lengths.sum())]


class Tokenizer:
    """Tokenises as the model does, without padding, and counts tokens cut off at `model.max_seq_length`."""

    def __init__(self, model: SentenceTransformer, prompt: str) -> None:
        self.tokenizer = model.tokenizer
        self.prompt = prompt
        self.prompt_length: int | None = model.preprocess(["a"], prompt=prompt or None).get("prompt_length")
        self.around_text = self([""]).ids  # the prompt's and special tokens

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Token ids of the texts, each with the prompt before it."""
        backend, limit = self.tokenizer.backend_tokenizer, self.tokenizer.model_max_length
        backend.no_padding()  # set each time, since `model.encode` sets it too
        if limit < NO_LIMIT:
            backend.enable_truncation(limit, direction=self.tokenizer.truncation_side)
        else:
            backend.no_truncation()
        special = backend.num_special_tokens_to_add(False)
        ids, lengths, lost = [np.empty(0, np.int32)], list[int](), list[int]()
        for chunk in _chunks(texts):
            found = backend.encode_batch_fast([self.prompt + text for text in chunk])
            ids += [np.asarray(text.ids, dtype=np.int32) for text in found]
            lengths += [len(text) for text in found]
            lost += [sum(len(rest) - special for rest in text.overflowing) for text in found]
        return Tokens(np.concatenate(ids), np.asarray(lengths, np.int64), np.asarray(lost, np.int64))

    def agrees_with(self, model: SentenceTransformer) -> bool:
        """Whether the model's own preprocessing of the probe texts gives the same tokens and nothing else."""
        wanted = model.preprocess(list(TOKENIZER_PROBES), prompt=self.prompt or None)
        more = wanted.keys() - {"input_ids", "attention_mask", "token_type_ids", "modality", "prompt_length"}
        if more or bool(wanted.get("token_type_ids", torch.zeros(1)).any()):
            return False
        ids = wanted["input_ids"][wanted["attention_mask"].bool()].numpy()
        return np.array_equal(ids, self(TOKENIZER_PROBES).ids)


class Encoder:
    """Encode texts with the modules of a SentenceTransformer, on batches of about equal token counts.

    In float32 the vectors are those of `model.encode` within 1e-5. The same texts give the same bits: batches depend
    only on the texts of one call.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        prompt: str = "",
        normalize: bool = True,
        truncate_dim: int | None = None,
        precision: Asked = "auto",
        batch_tokens: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        """Make an encoder. A model of another precision than the chosen one is copied, never changed.

        The model's weights must not change afterwards: OpenVINO keeps its own.

        :param prompt: text before every text.
        :param normalize: scale vectors to length one, after the cut to `truncate_dim`.
        :param truncate_dim: keep only the first dimensions (Matryoshka); None keeps the model's own setting.
        :param precision: number type of the transformer; "auto" takes bfloat16 where the device has it. The modules
            after the transformer (pooling, dense, normalise) compute in float32.
        :param batch_tokens: token places per batch, padding included; None takes the fastest measured.
        :param backend: "auto" takes OpenVINO on a CPU if it gives the model's vectors, else torch.
        :raises ModelError: `backend` is "openvino", and OpenVINO cannot run the model on its device.
        """
        if half_character([prompt]) is not None:
            raise ConfigError(
                f"prompt {prompt!a} holds {HALF_CHARACTER}; was it typed in a terminal that is not UTF-8?"
            )
        # static embeddings only add vectors up: another type would gain nothing and lose digits
        chosen = choose_precision(precision if hasattr(model[0], "model") else "float32", model.device.type)
        if chosen.why:
            logger.info("精度 precision: %s", chosen.why)
        if model.device.type == "cpu":
            keep_freed_memory()
        self.precision: str = chosen.dtype
        self.prompt = prompt
        self.normalize = normalize
        self.truncate_dim = truncate_dim or model.truncate_dim
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS)
        self._most_tokens: int | None = None  # per batch, after memory has run out
        self.stats = EncodeStats()
        self._tokenizer = _tokenizer_of(model, prompt)
        self._prompt_length = self._tokenizer and self._tokenizer.prompt_length
        self._compiled: CompiledTransformer | None = None
        self._packed: PackedForward | None = None
        if backend != "torch":
            model = self._compile(model, chosen.dtype, must=backend == "openvino")
        self.model = model if self._compiled else _in_precision(model, getattr(torch, chosen.dtype))
        if self._tokenizer and self.precision != "float32" and model.device.type == "cuda":
            packed = packed_forward(self.model)
            self._packed = packed if packed and packed.one_row else None

    def _compile(self, model: SentenceTransformer, dtype: Dtype, *, must: bool) -> SentenceTransformer:
        """Compile the transformer if possible; returns the model, in float32, whose other modules follow it."""
        if model.device.type == "cpu" and self._tokenizer is not None and hasattr(model[0], "model"):
            from ebr_lib.model.openvino import ConversionError, compiled_transformer

            exact = _in_precision(model, torch.float32, merged=True)
            try:
                self._compiled = compiled_transformer(exact, dtype)
                return exact
            except ConversionError as error:
                reason = str(error)
        elif model.device.type != "cpu":
            reason = f"OpenVINO runs on the CPU here, and the model is on {model.device}"
        else:
            reason = "the model is not a transformer that takes tokens"
        if must:
            raise ModelError(f"backend openvino cannot encode with this model: {reason}; set backend: auto")
        if model.device.type == "cpu":
            logger.info("用 torch 编码 encoding runs on torch, not on OpenVINO: %s", reason)
        return model

    @property
    def backend(self) -> str:
        """Library that runs the transformer: "openvino" or "torch"."""
        return "openvino" if self._compiled else "torch"

    def with_prompt(self, prompt: str) -> Encoder:
        """An encoder of the same model for texts with another prompt, with its own counts."""
        twin = copy.copy(self)
        twin.prompt, twin.stats = prompt, EncodeStats()
        twin._tokenizer = _tokenizer_of(self.model, prompt)
        twin._prompt_length = twin._tokenizer and twin._tokenizer.prompt_length
        return twin

    @property
    def dim(self) -> int:
        """Dimensions of the vectors, after the cut to `truncate_dim`."""
        full = int(self.model.get_embedding_dimension())
        return min(full, self.truncate_dim or full)

    def encode(self, texts: Sequence[str], show_bar: bool = False) -> Vectors:
        """Vectors (texts, dim) in the order of the texts.

        :raises NotFiniteError: some vectors are not finite, and would match nothing.
        """
        vectors = self.embed(self.tokenize(texts), show_bar)
        if len(wrong := not_finite(vectors)):
            raise NotFiniteError(self._not_finite_message([texts[i] for i in wrong], len(texts)))
        return vectors

    def encode_each(self, texts: Sequence[str], prompts: Sequence[str | None], show_bar: bool = False) -> Vectors:
        """Like `encode`, with a prompt for each text; None is the encoder's own."""
        given = np.array([self.prompt if prompt is None else prompt for prompt in prompts], dtype=object)
        groups = dict.fromkeys(given.tolist())
        if groups.keys() <= {self.prompt}:
            return self.encode(texts, show_bar)
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for prompt in groups:
            places = np.flatnonzero(given == prompt).tolist()
            vectors[places] = self.with_prompt(prompt).encode([texts[place] for place in places], show_bar)
        return vectors

    def _not_finite_message(self, wrong: Sequence[str], total: int) -> str:
        """Name texts whose vectors are not finite when encoded alone: in a batch, texts beside them may be hit too."""
        found, count = broken_alone(
            range(len(wrong)), lambda i: len(not_finite(self.embed(self.tokenize([wrong[i]])))) > 0
        )
        named = ", ".join(repr(shortened(wrong[i], 60)) for i in found)
        advice = "" if self.precision == "float32" else f"set precision to float32 (it is {self.precision}), or "
        return (
            f"the model gives vectors that are not finite (NaN) for {count} of {total} texts, such as {named}; "
            f"{advice}check the model's weights, such as the embeddings of these texts' tokens"
        )

    def tokenize(self, texts: Sequence[str]) -> Tokens | list[str]:
        """First half of `encode`, which a thread may do for the next texts while these are embedded.

        Returns the texts themselves for a model that does not take tokens.

        :raises DataError: a text holds half a character, which no tokenizer takes.
        :raises ModelError: a text has a token that the model has no vector for.
        """
        if (broken := half_character(texts)) is not None:
            raise DataError(f"text {broken + 1} of {len(texts)} holds {HALF_CHARACTER}: {texts[broken]!a}")
        if self._tokenizer is None:
            return list(texts)
        tokens = self._tokenizer(texts)
        table = token_embeddings(self.model.transformers_model)
        if table is not None and tokens.ids.size and (token := int(tokens.ids.max())) >= table.num_embeddings:
            text = int(np.searchsorted(np.cumsum(tokens.lengths), int(tokens.ids.argmax()), side="right"))
            raise ModelError(
                f"text {text + 1} of {len(texts)} ({shortened(texts[text], 60)!r}) has the token "
                f"{self.model.tokenizer.convert_ids_to_tokens(token)!r} of number {token}, and the model has vectors "
                f"for {table.num_embeddings}: its tokenizer is of another model, or knows more; remove that token from "
                "the texts"
            )
        return tokens

    def embed(
        self, tokens: Tokens | list[str], show_bar: bool = False, on_progress: Callable[[int], None] | None = None
    ) -> Vectors:
        """Second half of `encode`: vectors (texts, dim).

        :param on_progress: called after each batch with the number of texts done.
        """
        if isinstance(tokens, list):
            return self._embed_texts(tokens, show_bar)
        from tqdm.auto import tqdm

        vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
        waiting, done, written = list[tuple[NDArray[np.intp], Tensor]](), 0, 0
        bar = tqdm(total=len(tokens), desc="编码 encode", unit="text", disable=not show_bar, leave=False)
        with bar, torch.inference_mode(), evaluating(self.model):
            for batch, found in self._embedded_batches(tokens):
                waiting.append((batch, found))
                done += len(batch)
                bar.update(len(batch))
                if on_progress is not None:
                    on_progress(done)
                if done - written >= FLUSH_ROWS or done == len(tokens):
                    places, parts = zip(*waiting, strict=True)
                    vectors[np.concatenate(places)] = torch.cat(parts).cpu().numpy()
                    waiting, written = [], done
        self.stats.texts += len(tokens)
        self.stats.tokens += len(tokens.ids)
        self.stats.truncated += int((tokens.lost > 0).sum())
        self.stats.tokens_lost += int(tokens.lost.sum())
        assert self._tokenizer is not None  # it made the tokens
        unknown, around = self._tokenizer.tokenizer.unk_token_id, self._tokenizer.around_text
        self.stats.tokens_fixed += len(around) * len(tokens)
        # some models' unknown token is also the one that ends each text
        self.stats.tokens_unknown += int((tokens.ids == unknown).sum() - (around == unknown).sum() * len(tokens))
        return vectors

    def _embedded_batches(self, tokens: Tokens) -> Iterator[tuple[NDArray[np.intp], Tensor]]:
        """Batches of texts and their vectors, longest texts first: if memory runs out, it does so at once."""
        order = np.argsort(-tokens.lengths, kind="stable")
        cuts = [order[batch] for batch in batches(tokens.lengths[order], self.batch_tokens)]
        if self._compiled is None:
            yield from ((cut, self._embedded(tokens, cut)) for cut in cuts)
            return
        filler = self.model.tokenizer.pad_token_id or 0
        padded = (padded_batch(tokens.of(cut), tokens.lengths[cut], filler) for cut in cuts)
        for cut, (states, seen) in zip(cuts, self._compiled.states(padded), strict=True):
            self.stats.slots += seen.size
            features = {"token_embeddings": states, "attention_mask": torch.from_numpy(seen.astype(np.int64))}
            yield cut, self._finished(self._after_transformer(features)).clone()  # OpenVINO reuses the states' memory

    def _embedded(self, tokens: Tokens, texts: NDArray[np.intp]) -> Tensor:
        """Vectors of one batch, on the device; where memory runs out, this and later batches are halved."""
        count = int(tokens.lengths[texts].sum())
        if self._most_tokens is None or count <= self._most_tokens or len(texts) == 1:
            try:
                return self._forward(tokens.of(texts), tokens.lengths[texts])
            except (torch.OutOfMemoryError, MemoryError) as error:
                if len(texts) == 1:
                    raise ModelError(
                        f"out of memory with a single text of {count} tokens ({error}); lower max_seq_length"
                    ) from error
            self._most_tokens = count // 2
            logger.warning(
                "内存不足 out of memory: batches of %d tokens → %d, the vectors stay the same; "
                "set batch_tokens to avoid this",
                count,
                self._most_tokens,
            )
            torch.cuda.empty_cache()  # not earlier: the error held the batch's tensors
        half = len(texts) // 2
        return torch.cat([self._embedded(tokens, texts[:half]), self._embedded(tokens, texts[half:])])

    def _forward(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> Tensor:
        """Vectors of texts whose tokens follow each other in `ids`, on the device."""
        if self._packed is not None:
            layout = self._packed.layout(lengths)
            self.stats.slots += layout.slots
            states = self._packed.states(self._sent(ids), layout)
            return self._finished(self._packed.pool(states.float(), self._sent(lengths), self._prompt_length))
        tokenizer = self.model.tokenizer
        padded, seen = padded_batch(ids, lengths, tokenizer.pad_token_id or 0, tokenizer.padding_side)
        self.stats.slots += padded.size
        features: dict[str, Any] = {
            "input_ids": self._sent(padded),
            "attention_mask": self._sent(seen.astype(np.int64)),
        }
        if "token_type_ids" in tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        return self._finished(self._after_transformer(self.model[0](features)))

    def _after_transformer(self, features: dict[str, Any]) -> Tensor:
        """Sentence embeddings, in float32, of token states."""
        features |= {"token_embeddings": features["token_embeddings"].float(), "modality": "text"}
        if self._prompt_length is not None:
            features["prompt_length"] = self._prompt_length
        for module in list(self.model)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def _finished(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()[:, : self.truncate_dim]
        return torch.nn.functional.normalize(vectors, dim=1) if self.normalize else vectors

    def _sent(self, values: NDArray[np.integer]) -> Tensor:
        tensor, device = torch.from_numpy(values), self.model.device
        # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _embed_texts(self, texts: list[str], show_bar: bool) -> Vectors:
        """Vectors of a model that does not take tokens, by the library's `encode`."""
        self.stats.texts += len(texts)
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = self.model.encode(
            texts,
            prompt=self.prompt,  # not None where it is empty: that would be the model's default
            truncate_dim=self.truncate_dim,
            normalize_embeddings=self.normalize,
            show_progress_bar=show_bar,
        )
        return np.asarray(vectors, dtype=np.float32)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into chunks of at most TOKENIZER_CHUNK texts and TOKENIZER_CHARACTERS; a longer text is one chunk."""
    start = characters = 0
    for place, text in enumerate(texts):
        if place - start == TOKENIZER_CHUNK or (place > start and characters + len(text) > TOKENIZER_CHARACTERS):
            yield texts[start:place]
            start, characters = place, 0
        characters += len(text)
    yield texts[start:]


def batches(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Cut texts, longest first, into batches of at most `budget` token places; a longer text is a batch of its own.

    A batch of at least FAIR_TOKENS ends early where texts get much shorter, which would be mostly padding.
    """
    start = 0
    while start < len(lengths):
        longest = max(int(lengths[start]), 1)
        similar = int(np.searchsorted(-lengths, -SIMILAR * longest, side="right"))
        fair = start + FAIR_TOKENS // longest
        stop = min(len(lengths), start + max(1, budget // longest), max(similar, fair, start + 1))
        yield slice(start, stop)
        start = stop


def _in_precision(model: SentenceTransformer, dtype: torch.dtype, *, merged: bool = False) -> SentenceTransformer:
    """The model with its transformer in `dtype` and the rest in float32: itself, or a copy.

    A copy's adapter is merged, as in a saved model that is served, so that both give the same vectors. A model that has
    the right types is the caller's, and is not changed.

    :param merged: copy a model with an adapter even if it has the right types.
    """
    transformer, *rest = model
    right = {weight.dtype for weight in transformer.parameters()} <= {dtype}
    right = right and all(weight.dtype == torch.float32 for module in rest for weight in module.parameters())
    if right and not (merged and is_adapted(model)):
        return model
    twin = copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})  # copying a vocabulary took half a second
    twin.float()
    if is_adapted(twin):
        merge_adapter(twin)
    twin[0].to(dtype)
    return twin


def _tokenizer_of(model: SentenceTransformer, prompt: str) -> Tokenizer | None:
    """A tokenizer that gives the model's own tokens on probe texts; None if there is none."""
    if hasattr(model.tokenizer, "backend_tokenizer"):
        tokenizer = Tokenizer(model, prompt)
        if tokenizer.agrees_with(model):
            return tokenizer
    logger.info("由 sentence-transformers 编码 sentence-transformers encodes: the model prepares texts in its own way")
    return None
