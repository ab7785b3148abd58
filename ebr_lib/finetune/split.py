"""Split pairs so that no text, nor a near copy of one, is on both sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.pairs import Pair
from ebr_lib.data.text import normalised
from ebr_lib.logs import logger

_LETTERS = re.compile(r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u1cff]+")  # the ranges: vowel signs
_TYPO_LETTERS = 5  # one typo is at most a fifth of a text
_TYPO_LONGEST = 64  # longer texts are compared by overlap: one key per letter would fill the memory
_OVERLAP_LETTERS = 25
_GRAM = 4
_OVERLAP = 0.8
_BANDS, _BAND_ROWS = 8, 3  # finds a pair of overlap 0.8 with probability 0.997, of 0.88 with 0.9999
_BLOCK_LETTERS = 1 << 22
_MANY_TEXTS = 200_000


def split_pairs(pairs: Sequence[Pair], eval_ratio: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split into training and held-out pairs, each in the order given, so that no text is on both sides.

    Texts are tied if they are a pair, equal (`normalised`) or near-duplicates (`near_duplicate_groups`), and tied texts
    stay together: a text that is an anchor here and a document there, and all anchors of a document. If near-duplicate
    documents tie too many anchors, only equal ones tie; if these do too (popular documents), only anchors tie, and the
    log says what that means. Which anchors are held out depends on the seed and the texts, not on the order of rows.
    About `eval_ratio` of the anchors are held out: at least one of two, and never all.
    """
    keys = [normalised(pair.anchor) for pair in pairs]
    anchors = sorted(set(keys))
    if eval_ratio <= 0 or len(anchors) < 2:
        if eval_ratio > 0:
            logger.warning("只有一种 anchor，无法划分验证集 there is only one anchor: nothing can be held out")
        return list(pairs), []
    wanted = min(max(1, round(eval_ratio * len(anchors))), len(anchors) - 1)
    held_out = _held_out_anchors(anchors, _tied(pairs, keys, anchors, wanted), wanted, eval_ratio, seed)
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held_out]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held_out]


def _tied(pairs: Sequence[Pair], keys: Sequence[str], anchors: Sequence[str], wanted: int) -> NDArray[np.int64]:
    """Number the groups of anchors that stay together, shape (anchors,): by the strictest rule that leaves enough."""
    documents = sorted({normalised(text) for pair in pairs for text in pair.positives} - set(anchors))
    near = near_duplicate_groups(anchors)
    if near.max() == 0:
        logger.warning(
            "所有 anchor 彼此近似，仅按相同文本划分 all anchors are near-duplicates: split by equal text only"
        )
        near = np.arange(len(anchors))
    texts, apart = [*anchors, *documents], near.max() + 1 + np.arange(len(documents))
    for alike in (near_duplicate_groups(texts), np.concatenate([near, apart])):
        tied = _parts(pairs, keys, texts, alike)[: len(anchors)]
        sizes = np.bincount(tied)
        sizes = sizes[sizes > 0]  # a part may have documents only
        share = 100 * sizes.max() / len(anchors)
        # one part has nearly everything, or even the smallest is too large to hold out
        if len(anchors) - sizes.max() < wanted or sizes.min() > max(2 * wanted, len(anchors) // 3):
            continue
        if sizes.max() > max(len(anchors) // 2, np.bincount(near).max()):
            logger.info(
                "共享文本把 %.0f %% 的 anchor 连成一片，整片用于训练 shared texts tie %.0f %% of the anchors into one "
                "part, which is trained on whole; others are held out",
                share,
                share,
            )
        return tied
    if tied.max() < near.max():
        logger.warning(
            "共享文本把多达 %.0f %% 的 anchor 连在一起，改为按 anchor 划分：验证集的文档可能在训练中出现过"
            "（seen；unseen 从未出现），验证 anchor 也可能是训练中的文档 "
            "shared texts tie up to %.0f %% of the anchors together, so the split is by anchor: held-out documents may "
            "be in the training data (seen; unseen ones are not), and a held-out anchor may be a document there",
            share,
            share,
        )
    return near


def _parts(
    pairs: Sequence[Pair], keys: Sequence[str], texts: Sequence[str], alike: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number the connected parts of the texts, shape (texts,): pairs are edges, a group of texts is one node."""
    number = dict(zip(texts, alike.tolist(), strict=True))
    one = [number[key] for pair, key in zip(pairs, keys, strict=True) for _ in pair.positives]
    other = [number[normalised(text)] for pair in pairs for text in pair.positives]
    return _connected(np.array([one, other]), int(alike.max()) + 1)[alike]


def _held_out_anchors(
    anchors: Sequence[str], groups: NDArray[np.int64], wanted: int, eval_ratio: float, seed: int
) -> set[str]:
    """Anchors of whole groups, taken in a seeded order while they fit."""
    numbers, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = sorted(range(len(first)), key=lambda group: seeded(seed, anchors[int(first[group])]))
    taken, count = set[int](), 0
    for group in order:
        if count + sizes[group] <= wanted:
            taken.add(group)
            count += int(sizes[group])
    taken = taken or {min(order, key=lambda group: int(sizes[group]))}
    if (share := sizes[list(taken)].sum() / len(anchors)) > 2 * eval_ratio and len(anchors) * eval_ratio >= 1:
        logger.warning(
            "相连的 anchor 不可拆分 anchors that share texts stay together: %.0f %% are held out, eval_ratio is %g",
            100 * share,
            eval_ratio,
        )
    held_out = set(numbers[list(taken)].tolist())
    return {anchor for anchor, group in zip(anchors, groups.tolist(), strict=True) if group in held_out}


def seeded(seed: int, text: str) -> bytes:
    """Where a text is in an order that the seed and the texts alone decide."""
    text_bytes = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text_bytes, digest_size=8, salt=str(seed).encode()[:16]).digest()


def near_duplicate_groups(texts: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of near-duplicates among normalised texts; equal numbers, same group.

    Only letters and digits count. Two texts are near-duplicates if they are then equal, have the same words in another
    order, or become equal by dropping at most one letter from each: one letter changed, added, lost, moved, or two
    swapped. That needs five letters, and digits are not dropped: "iphone 13" is not "iphone 14". Texts of 25 letters or
    more are also near-duplicates if they share 0.8 of their 4-grams, and texts of more than 64 letters only then
    (Jaccard; candidates by MinHash, Broder 1997, each then checked). A near-duplicate of a near-duplicate is in the
    group too.

    :return: shape (texts,), numbered from 0 in order of first appearance.
    """
    if len(texts) >= _MANY_TEXTS:
        logger.info("查找近似文本 looking for near-duplicates: %d texts, some minutes", len(texts))
    words = [_LETTERS.findall(text.replace("_", " ")) for text in texts]
    letters = ["".join(found) or text for found, text in zip(words, texts, strict=True)]
    edges = [
        _equal(letters),
        _equal([" ".join(sorted(found)) or text for found, text in zip(words, texts, strict=True)]),
    ]
    edges += [_one_letter_apart(letters), _overlapping(letters)]
    return _connected(np.concatenate(edges, axis=1), len(texts))


def _connected(edges: NDArray[np.int64], nodes: int) -> NDArray[np.int64]:
    """Number the connected components, shape (nodes,), in order of their first node; `edges`: shape (2, edges)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), tuple(edges)), shape=(nodes, nodes))
    _, labels = connected_components(graph, directed=False)
    _, first, groups = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups]


def _equal(texts: Sequence[str]) -> NDArray[np.int64]:
    """Edges, shape (2, edges), from every text to the first equal one."""
    first: dict[str, int] = {}
    return np.array([(first.setdefault(text, i), i) for i, text in enumerate(texts)], dtype=np.int64).reshape(-1, 2).T


def _sharing(keys: NDArray[np.uint64], owners: NDArray[np.int64], gap: int = 1) -> NDArray[np.int64]:
    """Edges between the owners of equal keys that are `gap` apart in sorted order."""
    order = np.argsort(keys)
    keys, owners = keys[order], owners[order]
    same = (keys[gap:] == keys[:-gap]) & (owners[gap:] != owners[:-gap])
    return np.stack([owners[:-gap][same], owners[gap:][same]])


class _Block(NamedTuple):
    """Some texts end to end: letters as 64-bit hashes, and the text that each letter belongs to."""

    letters: NDArray[np.uint64]
    is_digit: NDArray[np.bool_]
    text: NDArray[np.int64]  # per letter, the index of its text in the block
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    owners: NDArray[np.int64]


def _blocks(texts: Sequence[str], chosen: Sequence[int]) -> Iterator[_Block]:
    at = 0
    while at < len(chosen):
        end, size = at, 0
        while end < len(chosen) and size < _BLOCK_LETTERS:
            size += len(texts[chosen[end]])
            end += 1
        codes = np.frombuffer("".join(texts[i] for i in chosen[at:end]).encode("utf-32-le"), dtype="<u4")
        lengths = np.array([len(texts[i]) for i in chosen[at:end]])
        starts = np.cumsum(lengths) - lengths
        text = np.repeat(np.arange(end - at), lengths)
        letters = _mixed(codes.astype(np.uint64))
        yield _Block(letters, (codes >= 48) & (codes <= 57), text, starts, lengths, np.array(chosen[at:end]))
        at = end


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _one_letter_apart(letters: Sequence[str]) -> NDArray[np.int64]:
    """Edges between texts that become equal by dropping at most one letter each.

    A text's keys are the hashes of the text and of the text without each letter. The hash is sum(letter_i * base^i),
    so that prefix sums give each key in constant time: what follows the dropped letter moves down by one power.
    """
    chosen = [i for i, text in enumerate(letters) if len(text) <= _TYPO_LONGEST]
    parts = [_dropping_keys(block) for block in _blocks(letters, chosen)]
    if not parts:
        return np.empty((2, 0), dtype=np.int64)
    return _sharing(np.concatenate([keys for keys, _ in parts]), np.concatenate([owners for _, owners in parts]))


def _dropping_keys(block: _Block) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    base = 0x9E3779B97F4A7C15  # odd, so it has an inverse
    inverse = np.uint64(pow(base, -1, 1 << 64))
    powers = np.array([pow(base, i, 1 << 64) for i in range(_TYPO_LONGEST)], dtype=np.uint64)
    place = np.arange(len(block.text)) - block.starts[block.text]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(block.letters * powers[place], dtype=np.uint64)])
    begin, end = sums[block.starts], sums[block.starts + block.lengths]
    dropped = (sums[:-1] - begin[block.text]) + (end[block.text] - sums[1:]) * inverse
    may_drop = ~block.is_digit & (block.lengths[block.text] >= _TYPO_LETTERS)
    keys = np.concatenate([end - begin, dropped[may_drop]])
    return keys, np.concatenate([block.owners, block.owners[block.text[may_drop]]])


def _overlapping(letters: Sequence[str]) -> NDArray[np.int64]:
    """Edges between texts of 25 letters or more that share most of their 4-grams."""
    chosen = np.array([i for i, text in enumerate(letters) if len(text) >= _OVERLAP_LETTERS], dtype=np.int64)
    if not len(chosen):
        return np.empty((2, 0), dtype=np.int64)
    hashes = np.concatenate([_min_hashes(block) for block in _blocks(letters, chosen.tolist())], axis=1)
    edges = [_sharing(key, np.arange(len(chosen)), gap) for key in _band_keys(hashes) for gap in (1, 2)]
    candidates = np.unique(np.concatenate(edges, axis=1), axis=1)
    # the share of equal hashes estimates the overlap: most candidates need no exact check
    likely = (hashes[:, candidates[0]] == hashes[:, candidates[1]]).mean(axis=0) >= _OVERLAP - 0.3
    candidates = chosen[candidates[:, likely]]
    near = [_overlap(letters[a], letters[b]) >= _OVERLAP for a, b in candidates.T.tolist()]
    return candidates[:, np.array(near, dtype=bool)]


def _min_hashes(block: _Block) -> NDArray[np.uint32]:
    """MinHash of every text's 4-grams, shape (hash functions, texts)."""
    begins = np.delete(np.arange(len(block.letters)), (block.starts + block.lengths)[:, None] - np.arange(1, _GRAM))
    gram = block.letters[begins]
    for step in range(1, _GRAM):
        gram = _mixed(gram + block.letters[begins + step])
    counts = block.lengths - (_GRAM - 1)
    starts = np.cumsum(counts) - counts
    hashes = np.empty((_BANDS * _BAND_ROWS, len(block.lengths)), dtype=np.uint32)
    for function in range(len(hashes)):
        flip, factor = _mixed(np.array([2 * function, 2 * function + 1], dtype=np.uint64)) | np.uint64(1)
        hashes[function] = np.minimum.reduceat((gram ^ flip) * factor, starts) >> np.uint64(32)
    return hashes


def _band_keys(hashes: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """One key per text (texts,) for each band, equal if all hashes of the band are."""
    for band in hashes.reshape(_BANDS, _BAND_ROWS, -1):
        key = np.zeros(band.shape[1], dtype=np.uint64)
        for row in band:
            key = _mixed(key + row)
        yield key


def _overlap(one: str, other: str) -> float:
    a, b = ({text[i : i + _GRAM] for i in range(len(text) - _GRAM + 1)} for text in (one, other))
    return len(a & b) / len(a | b)
