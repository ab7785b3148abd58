"""What training anchors are searched in before training: the documents of the rows and of a catalogue, with vectors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ebr_lib.arrays import Encode, Floats, Ints, Vectors
from ebr_lib.data.catalogue import Catalogue
from ebr_lib.data.pairs import TrainingRow
from ebr_lib.errors import ModelError
from ebr_lib.finetune.batches import KnownPositives
from ebr_lib.logs import logger
from ebr_lib.model.loading import prompt_of
from ebr_lib.model.provenance import Provenance, say_changed_files, weights_of
from ebr_lib.names import OnChangedVectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result", Vectors, Floats)


class Pairs(NamedTuple):
    """Pairs of anchor and document, as rows of their vectors; shapes (pairs,), sorted by anchor."""

    anchor: Ints
    document: Ints


class Pool:
    """The different anchors of rows, and the different documents of rows and catalogue; equal texts are one.

    A catalogue's own vectors are used where it has them.

    :ivar anchors: their numbers in `known`, ascending, shape (anchors,); `documents` likewise, (documents,).
    :ivar texts: the documents' texts: as the rows spell them, or else the catalogue.
    :ivar queries: the anchors' vectors, of length one, (anchors, dim); `vectors`: the documents', (documents, dim).
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        encode_queries: Encode,
        encode_documents: Encode,
        catalogue: Catalogue | None = None,
    ) -> None:
        self.known = KnownPositives(rows)
        self.anchors, first_row = np.unique(self.known.anchors, return_index=True)
        self.queries = encode_queries([rows[i].anchor for i in first_row])
        self.documents, self.texts = _documents_of(rows, self.known)
        if catalogue is None:
            self.vectors = encode_documents(self.texts)
            return
        numbers = self.known.numbers_of(catalogue.keys)
        new = np.flatnonzero(~np.isin(numbers, self.documents))
        documents, texts = (
            np.concatenate([self.documents, numbers[new]]),
            [*self.texts, *(catalogue.texts[i] for i in new)],
        )
        order = np.argsort(documents)
        self.documents, self.texts = documents[order], [texts[place] for place in order]
        self.vectors = _vectors(self.documents, self.texts, numbers, catalogue, encode_documents)

    def pairs(self) -> Pairs:
        """Every known positive pair of these anchors and documents; each anchor has at least one."""
        one, other = self.known.pairs()
        here = np.isin(one, self.anchors) & np.isin(other, self.documents)
        return Pairs(np.searchsorted(self.anchors, one[here]), np.searchsorted(self.documents, other[here]))


def remembered(compute: Callable[[Sequence[Item]], Result]) -> Callable[[Sequence[Item]], Result]:
    """The same function, such as vectors of texts, which computes each item's once, however often it is asked."""
    known: dict[Item, Any] = {}

    def compute_new(items: Sequence[Item]) -> Result:
        if new := [item for item in dict.fromkeys(items) if item not in known]:
            known.update(zip(new, compute(new), strict=True))
        found: Any = np.array([known[item] for item in items])
        return found

    return compute_new


def _documents_of(rows: Sequence[TrainingRow], known: KnownPositives) -> tuple[Ints, list[str]]:
    """The numbers of all different documents, ascending, and each one's text where it first occurs."""
    numbers, first = np.unique(known.columns, return_index=True)
    numbers, first = numbers[numbers > 0], first[numbers > 0]
    places = zip(*np.divmod(first, known.columns.shape[1]), strict=True)
    return numbers, [(rows[row].positive, *rows[row].negatives)[column] for row, column in places]


def _vectors(
    documents: Ints, texts: Sequence[str], numbers: Ints, catalogue: Catalogue, encode_documents: Encode
) -> Vectors:
    """Vectors of all documents: the catalogue's, whose `numbers` these are, and new ones for the others."""
    if catalogue.vectors is None:
        return encode_documents(texts)
    vectors = np.empty((len(documents), catalogue.vectors.shape[1]), np.float32)
    vectors[np.searchsorted(documents, numbers)] = catalogue.vectors
    lacking = np.flatnonzero(~np.isin(documents, numbers))
    if len(lacking):
        vectors[lacking] = encode_documents([texts[place] for place in lacking.tolist()])
    return vectors


def check_vectors(
    catalogue: Catalogue, model: SentenceTransformer, model_name: str, on_changed: OnChangedVectors
) -> None:
    """Check that a catalogue's vectors, if it has any, are this model's.

    :raises ModelError: another model made them, or with another prompt or dimension.
    """
    if catalogue.vectors is None:
        return
    made, where = Provenance.of(catalogue.manifest), f"mining_corpus_path {catalogue.path}"
    advice = f"encode it again with {model_name}, or give its texts without vectors"
    if made.sha256 is not None and not made.weights & weights_of(model_name):
        raise ModelError(f"{where} holds vectors of {made.said}, not of {model_name}; {advice}")
    dimension = catalogue.vectors.shape[1]
    wrong = made.differences({"prompt": prompt_of(model, "document")}) if made.sha256 is not None else []
    if (width := model.get_embedding_dimension()) != dimension:
        wrong.append(f"dimension {dimension}, not {width}")
    if wrong:
        raise ModelError(f"{where} was encoded with {', '.join(wrong)}; {advice}")
    if made.sha256 is None:
        logger.warning(
            "%s: 未知由哪个模型生成 no manifest says which model made its vectors; assumed: %s",
            where,
            model_name,
        )
    else:
        say_changed_files(made, model_name, where, on_changed)
    if made.max_seq_length not in (None, model.max_seq_length):
        logger.warning(
            "截断长度不同 %s was encoded with max_seq_length %s, training cuts at %s",
            where, made.max_seq_length, model.max_seq_length,
        )  # fmt: skip
