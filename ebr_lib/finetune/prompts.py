"""Prompts that rows bring along: which anchors get them, and which one is saved with the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.errors import ModelError
from ebr_lib.logs import logger
from ebr_lib.model.loading import prompt_of
from ebr_lib.tables import shortened

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_SHOWN = 5


def own_prompts(rows: Iterable[TrainingRow]) -> dict[str, str]:
    """Anchor to its own prompt, for anchors that have one; of several prompts for one text the first counts."""
    found: dict[str, str] = {}
    for row in rows:
        if row.prompt is not None:
            found.setdefault(row.anchor, row.prompt)
    return found


def use_own_prompts(
    model: SentenceTransformer,
    train: Sequence[TrainingRow],
    others: Sequence[TrainingRow],
    prompt: str | Mapping[str, str] | None,
) -> None:
    """Make the rows' own prompt the model's, where they have one, or the most frequent of several.

    :param others: replayed and held-out rows.
    :param prompt: what the user gave.
    :raises ModelError: the model's pooling leaves a batch's one prompt out, and the rows have several.
    """
    given = isinstance(prompt, str) or "anchor" in (prompt or ())
    chosen = query_prompt(train, prompt_of(model, "query"), given=given)
    if chosen != prompt_of(model, "query"):
        model.prompts["query"] = chosen
    several = {row.prompt for row in (*train, *others)} - {None, chosen}
    if several and not all(getattr(module, "include_prompt", True) for module in model):
        raise ModelError(
            f"rows have several prompts, such as {sorted(map(str, several))[0]!r}, and this model's pooling leaves the "
            "prompt's tokens out, for which a batch needs one; train on one prompt"
        )


def query_prompt(rows: Sequence[TrainingRow], prompt: str, *, given: bool) -> str:
    """The prompt that queries get once the model is saved; logged where rows have their own.

    Where all rows have the same one, it is that one: the model is trained on no other. Of several, it is `prompt` if
    the user gave it, otherwise the most frequent. Where some rows have none, these are trained with `prompt`, which
    then stays.

    :param prompt: what rows without their own get.
    :param given: whether the user gave `prompt`.
    """
    counts = Counter(row.prompt for row in rows)
    own = [(text, count) for text, count in counts.most_common() if text is not None]
    if not own:
        return prompt
    chosen = own[0][0] if counts[None] == 0 and (len(own) == 1 or not given) else prompt
    named = ", ".join(f"{shortened(text, 60)!r} ({count} rows)" for text, count in own[:_SHOWN])
    more = f" … and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
    logger.info("样本自带提示词，已用于其 anchor prompts of rows, before their anchors: %s%s", named, more)
    if given and chosen != prompt:
        logger.warning("样本的提示词替换了 prompt the rows' own prompt replaces prompt %r", prompt)
    if len(own) > 1 or counts[None]:
        logger.warning(
            "提示词不止一种，查询默认使用 rows have several prompts; later stages put one before queries, %r; "
            "to choose another, set prompt for the anchor",
            chosen,
        )
    return chosen
