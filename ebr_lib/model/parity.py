"""Whether another program gives a model's vectors, and if it does not, the likely cause.

The causes are found by trying them: the model itself makes vectors with each usual mistake, alone and in pairs, and the
one whose vectors are the other program's is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors, not_finite
from ebr_lib.errors import ModelError
from ebr_lib.metrics import unit
from ebr_lib.model.contract import PROBES, ROUNDING
from ebr_lib.model.encoder import Encoder, Tokens
from ebr_lib.model.positions import position_limit
from ebr_lib.model.shapes import Side

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Served = Callable[[Side, Sequence[str]], Vectors]
"""Vectors (texts × dimensions) that the other program gives for one side's texts."""

SHORT = {"short English": (PROBES[0], PROBES[1], PROBES[5]), "short Chinese": PROBES[2:5]}
LONGEST = 2048  # tokens of a probe: beyond them, a cut is not looked for, since encoding would take minutes
CUTS = (32, 64, 128, 256, 384, 512, 1024, 2048)
WORDS = {
    "long English": "steel pan,warm blanket,phone case,garden hose,water heater,running shoes,travel bag,table lamp",
    "long Chinese": "热水器,手机壳,毛毯,平板电脑,洗发水,跑步鞋,不粘锅,旅行箱,台灯,保温杯",
}
LENGTHS = 1e-2  # difference of a vector's length from 1 that counts as rounding, in half precision too


@dataclass(frozen=True)
class Gap:
    """How far one kind of text is from the model's own vectors: the largest distance of unit vectors, from 0 to 2."""

    side: Side
    kind: str
    distance: float


@dataclass(frozen=True)
class Parity:
    """The comparison: `gaps` by side and kind of text, and the likely causes; none if all vectors are the model's."""

    gaps: tuple[Gap, ...]
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """Where texts are cut: `bare` cuts the ids and their special tokens with them; otherwise these stay."""

    length: int
    side: str
    bare: bool = False


@dataclass(frozen=True)
class Setup:
    """A way to make vectors; the model's own where nothing is given."""

    weights: str | None = None
    prompt: str | None = None
    pooling: str | None = None
    ending: Literal["missing", "bare", "added"] | None = None
    cut: Cut | None = None


@dataclass(frozen=True)
class Change:
    """One mistake: a field of `Setup`, its value, and the sentence that names it."""

    field: str
    value: Any
    cause: str


@dataclass(frozen=True)
class Trained:
    """One side of the trained model, and what a server may take instead of it.

    :param encoder: in float32, without normalisation.
    :param other_prompt: the prompt of the other side.
    :param others: encoders with other weights, by the sentence that names the mistake.
    """

    side: Side
    encoder: Encoder
    other_prompt: str = ""
    others: Mapping[str, Encoder] = field(default_factory=dict)

    def vectors(self, texts: Sequence[str], setup: Setup = Setup()) -> Vectors:
        """Vectors made in a way that may not be the model's own; not normalised unless the model does it."""
        encoder = self.others[setup.weights] if setup.weights else self.encoder
        if setup.prompt is not None or setup.weights:
            encoder = encoder.with_prompt(self.encoder.prompt if setup.prompt is None else setup.prompt)
        model, cut = encoder.model, setup.cut
        if setup.ending and cut is None:
            cut = Cut(model.max_seq_length, model.tokenizer.truncation_side, bare=True)
        with _reading(model, cut):
            tokens = encoder.tokenize(texts)
        if cut and cut.bare and isinstance(tokens, Tokens):
            tokens = _cut_bare(tokens, cut, setup.ending, model.tokenizer)
        with _pooled(model, setup.pooling):
            return encoder.embed(tokens)


def probe_texts(length: int | None) -> dict[str, list[str]]:
    """Texts by kind: the contract's probes, and long ones that a model of this many tokens cuts.

    Their words differ from place to place, so that another cut gives another vector.
    """
    texts = {kind: list(probes) for kind, probes in SHORT.items()}
    count = int(min(length or LONGEST, LONGEST)) * 6 // 10 + 8  # of at least two tokens each
    for kind, line in WORDS.items():
        words = line.split(",")
        places = np.random.default_rng(0).integers(0, len(words), count)
        texts[kind] = [" ".join(f"{i} {words[place]}" for i, place in enumerate(places))]
    return texts


def compare(sides: Sequence[Trained], served: Served, *, half: bool = False, dims: int | None = None) -> Parity:
    """Compare another program's vectors with the model's own, and look for the cause of a difference.

    :param half: allow for the rounding of float16 and bfloat16.
    :param dims: compare only this many first dimensions.
    :raises ModelError: the other program gives vectors of another dimension, or some that are not finite.
    """
    gaps, causes = list[Gap](), dict[str, None]()
    for trained in sides:
        found, why = _compare_side(trained, served, ROUNDING["other" if half else "float32"], dims)
        gaps += found
        causes |= dict.fromkeys(why)
    return Parity(tuple(gaps), tuple(causes))


def _compare_side(
    trained: Trained, served: Served, allowed: float, dims: int | None
) -> tuple[list[Gap], Iterator[str]]:
    texts = probe_texts(trained.encoder.model.max_seq_length)
    given, refused = dict[str, Vectors](), ""
    for kind, probes in texts.items():
        try:
            given[kind] = _checked(served(trained.side, probes), len(probes), dims or trained.encoder.dim)
        except ModelError as error:
            if kind in SHORT:
                raise
            refused = str(error)
    whole = {kind: trained.vectors(texts[kind]) for kind in given}
    own = {kind: vectors[:, :dims] for kind, vectors in whole.items()}
    gaps = [Gap(trained.side, kind, _distance(given[kind], own[kind])) for kind in given]
    search = _Search(trained, texts, given, allowed, dims)
    long_texts = (
        f"truncation (long texts are refused: {refused}; start TEI with --auto-truncate, or let every request to vLLM "
        "say truncate_prompt_tokens)"
    )
    causes = itertools.chain(_wrong_lengths(given, own, whole), search.causes(), [long_texts] if refused else [])
    return gaps, causes


def _checked(vectors: Vectors, count: int, dim: int) -> Vectors:
    if vectors.shape != (count, dim):
        raise ModelError(
            f"wanted {count} vectors of {dim} dimensions, as the trained model makes them, found {len(vectors)} of "
            f"{vectors.shape[-1]}; if they are cut on purpose, give truncate_dim, otherwise another model is served"
        )
    if len(wrong := not_finite(vectors)):
        raise ModelError(f"{len(wrong)} of {count} vectors are not finite (NaN); serve the model in float32")
    return vectors


def _distance(one: Vectors, other: Vectors) -> float:
    """Largest distance of the vectors' directions."""
    return float(np.linalg.norm(unit(one) - unit(other), axis=1).max())


def _wrong_lengths(
    given: Mapping[str, Vectors], own: Mapping[str, Vectors], whole: Mapping[str, Vectors]
) -> Iterator[str]:
    """Vectors of another length than 1, which an index has, also after a cut, and than the model's own.

    :param own: the model's vectors, cut as the given ones are; `whole`: uncut, which shows whether it normalises.
    """
    now, then, uncut = (np.linalg.norm(np.concatenate(list(p.values())), axis=1) for p in (given, own, whole))
    then = np.ones_like(then) if np.abs(uncut - 1).max() <= LENGTHS else then
    if np.abs(now - 1).max() > LENGTHS and np.abs(now / then - 1).max() > LENGTHS:
        yield "normalisation missing (the vectors do not have length 1, as those of an index have)"


# --- trying the usual mistakes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """Find the setup whose vectors are the ones given."""

    trained: Trained
    texts: Mapping[str, Sequence[str]]
    given: Mapping[str, Vectors]
    allowed: float
    dims: int | None

    def causes(self) -> Iterator[str]:
        """Short texts show weights, prompt, pooling and special tokens; long ones, in that setup, the cut."""
        changes, rest = self._fit(list(SHORT), Setup(), list(self._changes()), 2)
        if changes is None:  # a very short length cuts these as well
            changes, rest = self._fit(list(SHORT), Setup(), list(self._cuts()), 1)
        yield from (change.cause for change in changes or ())
        if changes is None:
            yield "unknown (no usual mistake gives these vectors): other weights, another tokenizer, or another model"
            return
        setup = replace(Setup(), **{change.field: change.value for change in changes})
        if long := [kind for kind in self.given if kind not in SHORT]:
            cut, rest_of_long = self._fit(long, setup, list(self._cuts()), 1)
            yield from (change.cause for change in cut or ())
            if cut is None:
                yield "truncation (long texts alone differ, at no usual length or side)"
            rest = max(rest, rest_of_long if cut is not None else 0.0)
        if rest > self.allowed:
            yield "precision (the differences are as small as the rounding of float16 or bfloat16)"

    def _fit(
        self, kinds: Sequence[str], setup: Setup, changes: Sequence[Change], most: int
    ) -> tuple[tuple[Change, ...] | None, float]:
        """The fewest changes that explain the vectors of these kinds of texts, and the distance that is left.

        None: nothing does. A rest like that of half precision is accepted only if no change leaves less.
        """
        texts = [text for kind in kinds for text in self.texts[kind]]
        given = np.concatenate([self.given[kind] for kind in kinds])

        def rest_after(*tried: Change) -> float:
            changed = replace(setup, **{change.field: change.value for change in tried})
            return _distance(given, self.trained.vectors(texts, changed)[:, : self.dims])

        best: tuple[tuple[Change, ...], float] = ((), rest_after())
        start = best[1]
        for count in range(1, most + 1):
            if best[1] <= ROUNDING["float32"]:
                break
            for tried in itertools.combinations(changes, count):
                if len({change.field for change in tried}) == count and (rest := rest_after(*tried)) < best[1] / 2:
                    best = tried, rest
        if best[1] <= ROUNDING["float32"]:
            return best
        if start <= ROUNDING["other"] and best[1] > start / 5:  # half precision explains it, and nothing else does
            return (), start
        return best if best[1] <= ROUNDING["other"] else (None, start)

    def _changes(self) -> Iterator[Change]:
        model, side, prompt = self.trained.encoder.model, self.trained.side, self.trained.encoder.prompt
        yield from (Change("weights", name, name) for name in self.trained.others)
        if prompt:
            yield Change("prompt", "", f"prompt missing (the model was trained with {prompt!r} before every {side})")
            yield Change("prompt", prompt * 2, f"prompt doubled (the server puts its own before {prompt!r})")
            if prompt.rstrip() != prompt:
                yield Change("prompt", prompt.rstrip(), f"prompt without the blank at its end ({prompt!r})")
        if (other := self.trained.other_prompt) not in ("", prompt):
            yield Change("prompt", other, f"prompt of the other side ({other!r}, for a {side} {prompt!r})")
            yield Change("prompt", other + prompt, f"prompt doubled (the server puts {other!r} before it)")
        if (pooling := _pooling(model)) is not None:
            for mode in ("mean", "cls", "lasttoken", "max"):
                if mode != pooling.pooling_mode:
                    yield Change("pooling", mode, f"pooling {mode} (the model was trained with {pooling.pooling_mode})")
        if hasattr(model.tokenizer, "all_special_ids"):
            yield Change("ending", "missing", "end-of-text token missing (the tokenizer closes every text with one)")
            yield Change("ending", "added", "end-of-text token added (the model was trained without this one)")
            yield Change("ending", "bare", "special tokens missing (texts are tokenised without any)")

    def _cuts(self) -> Iterator[Change]:
        model = self.trained.encoder.model
        own, limit = model.max_seq_length, position_limit(model)
        if not isinstance(own, int) or not hasattr(model.tokenizer, "truncation_side"):
            return
        usual = "the end" if model.tokenizer.truncation_side == "right" else "the beginning"
        lengths = dict.fromkeys((own, *CUTS, *([limit] if limit else [])))
        for length, bare in itertools.product(lengths, (False, True)):
            for side in ("right", "left") if length <= (limit or length) else ():
                if (length, side, bare) == (own, model.tokenizer.truncation_side, False):
                    continue
                said = "" if length == own else f"truncation length {length} (the model was trained with {own})"
                if side != model.tokenizer.truncation_side:
                    lost = "the beginning" if side == "left" else "the end"
                    said += f"{'; ' * bool(said)}truncation side ({lost} of long texts is cut off, not {usual})"
                if bare:
                    said += f"{'; ' * bool(said)}end-of-text token missing from texts that are cut"
                yield Change("cut", Cut(length, side, bare), said)


def _pooling(model: SentenceTransformer) -> Any:
    """The pooling module, if it has one known mode."""
    found = next((module for module in model if type(module).__name__ == "Pooling"), None)
    return found if isinstance(getattr(found, "pooling_mode", None), str) else None


@contextmanager
def _pooled(model: SentenceTransformer, mode: str | None) -> Iterator[None]:
    module = _pooling(model) if mode else None
    before = getattr(module, "pooling_mode", None)
    if module is not None:
        module.pooling_mode = mode
    try:
        yield
    finally:
        if module is not None:
            module.pooling_mode = before


@contextmanager
def _reading(model: SentenceTransformer, cut: Cut | None) -> Iterator[None]:
    """Read texts to another length, or from the other side, or whole for a bare cut, which comes later."""
    if cut is None:
        yield
        return
    tokenizer, before = model.tokenizer, (model.max_seq_length, model.tokenizer.truncation_side)
    model.max_seq_length, tokenizer.truncation_side = (LONGEST * 64, "right") if cut.bare else (cut.length, cut.side)
    try:
        yield
    finally:
        model.max_seq_length, tokenizer.truncation_side = before


def _cut_bare(tokens: Tokens, cut: Cut, ending: str | None, tokenizer: Any) -> Tokens:
    """Change the special tokens of texts that were read whole, and cut them."""
    special, ends = set(tokenizer.all_special_ids), np.cumsum(tokens.lengths)
    parts = [tokens.ids[end - length : end] for end, length in zip(ends, tokens.lengths, strict=True)]
    closing = [int(parts[0][-1])] if int(parts[0][-1]) in special else []
    if ending == "added":
        closing.append(tokenizer.eos_token_id or tokenizer.sep_token_id or 0)
    if ending:
        parts = [_without_special(part, special, opening=ending == "bare") for part in parts]
    length = cut.length - (len(closing) if ending == "added" else 0)
    parts = [part[:length] if cut.side == "right" else part[-length:] for part in parts]
    if ending == "added":
        parts = [np.concatenate([part, np.array(closing, part.dtype)]) for part in parts]
    lengths = np.array([len(part) for part in parts], np.int64)
    return Tokens(np.concatenate(parts), lengths, np.zeros(len(parts), np.int64))


def _without_special(ids: NDArray[np.int32], special: set[int], *, opening: bool) -> NDArray[np.int32]:
    """Token ids without the closing special token, and without those at the beginning."""
    while opening and len(ids) > 1 and int(ids[0]) in special:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and int(ids[-1]) in special else ids
