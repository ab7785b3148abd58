"""The contrastive loss over in-batch negatives: masks, smoothing, weights, teachers, Matryoshka, L1, GradCache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn
from torch.nn.functional import normalize

from ebr_lib.finetune.drift import Drift
from ebr_lib.finetune.signals import ExpectedCounts, teacher_divergence, weighted_mean
from ebr_lib.model.attention import Features, evaluating

PositivesMask = Callable[[Tensor], Tensor]
"""Row numbers of the batch on all devices (n,) to a mask (n, n · columns): true where the training set knows that the
document answers the row's anchor."""


Guided = Callable[[Tensor], Tensor]
"""Row numbers of the batch on all devices (n,) to a frozen model's cosines (n, n · columns)."""


class HeldoutRows(NamedTuple):
    """The rows that the evaluation loss is averaged over: those numbered from `first`.

    Rows with smaller numbers fill a batch, so that it compares as many documents as a training batch; their own loss
    does not count. Each batch's sum is divided by `per_batch`, the mean number of held-out rows per batch, so that the
    mean over all batches is the mean over all held-out rows.
    """

    first: int
    per_batch: float


class _Way(NamedTuple):
    """One direction of the search: vectors (q, dim), their candidates (c, dim), which of these leave the softmax
    (q, c), and how often each is expected in a batch."""

    queries: Tensor
    candidates: Tensor
    out: Tensor | None
    counts: ExpectedCounts | None


@contextmanager
def base_model_only(model: Any) -> Iterator[None]:
    """Run without the adapter: vectors are exactly the base model's."""
    inner = getattr(model, "module", model)
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()


class ContrastiveLoss(CachedLossMixin, nn.Module):
    """InfoNCE over in-batch documents and hard negatives: mean over anchors of −log softmax(cos / temperature).

    With q anchors, d columns of documents (the positive first) and n = q · devices rows in all, the logits are
    (q, n · d). Added to the standard loss (van den Oord et al. 2018, arXiv 1807.03748):

    - Documents known to answer an anchor, other than its own positive, leave the softmax (logit −∞).
    - `guide`: in training, documents whose cosine by a frozen model is above the positive's by more than
      `false_negative_margin` leave it too (GISTEmbed, arXiv 2402.16829).
    - `document_counts`: in training, ln(expected count in a batch) is taken off each logit (logQ); `anchor_counts` is
      the same for anchors.
    - `bidirectional`: the mean with the loss of finding the anchor of each positive among all anchors of the batch.
    - Label smoothing ε: the target is 1 − ε on the positive and ε spread evenly over all documents that remain,
      the positive included (Szegedy et al. 2016, arXiv 1512.00567).
    - Matryoshka dimensions: the mean of the losses of the whole vectors and of those cut to each dimension
      (arXiv 2205.13147), weighted by `matryoshka_weights`; 1 for whole vectors that are not among the dimensions.
    - L1: `l1` · Σ|w| over the trainable weights, in training only. Where there is L1, smoothing or a teacher, the loss
      in training is a dict of components: `contrastive`, comparable with the evaluation loss, and what is added to it.
    - `mini_batch_size`: embed that many rows at a time and replay them backward (GradCache, arXiv 2101.06983), with
      the same loss and gradients; None embeds the batch at once. `eval_mini_batch_size` limits evaluation further.
    - `row_weights`, whose mean is 1: the mean is weighted, mean(loss · w), in training only.
    - `teacher`: the scores of each row's own documents by a teacher. `distill_weight` · KL(teacher ‖ student) over
      these is added in training (Hinton et al. 2015, arXiv 1503.02531); see `teacher_divergence`.
    - `drift`: in training, how far the anchors and positives have moved from their vectors before training is added,
      and the same of random words, the last column of a training batch; see `Drift`.
    - `heldout`: the rows that the evaluation loss is averaged over; None is all rows.
    - `packed`: embeds all columns in one forward of packed rows (`model.packing`), when the batch is embedded at once.

    Labels are row numbers of the dataset; `known_positives` finds the texts by them.

    :ivar row_weights: (training rows,); `teacher`: (training rows, 1 + negatives), NaN where there is no score.
    :ivar autocast: the mixed precision of all embedding; the loss of the vectors is computed in float32.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = 0.05,
        label_smoothing: float = 0.0,
        l1: float = 0.0,
        matryoshka_dims: Sequence[int] = (),
        known_positives: PositivesMask | None = None,
        mini_batch_size: int | None = None,
        eval_mini_batch_size: int | None = None,
        heldout: HeldoutRows | None = None,
        query_only: bool = False,
        packed: Callable[[Sequence[Features]], list[Tensor]] | None = None,
        row_weights: Tensor | None = None,
        teacher: Tensor | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        guide: Guided | None = None,
        false_negative_margin: float = 0.0,
        document_counts: ExpectedCounts | None = None,
        anchor_counts: ExpectedCounts | None = None,
        bidirectional: bool = False,
        matryoshka_weights: Sequence[float] = (),
        drift: Drift | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.l1 = l1
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.dim_weights = dict(zip(matryoshka_dims, matryoshka_weights, strict=True)) if matryoshka_weights else {}
        self.guide, self.false_negative_margin = guide, false_negative_margin
        self.document_counts, self.anchor_counts = document_counts, anchor_counts
        self.bidirectional, self.drift = bidirectional, drift
        self.known_positives = known_positives
        self.mini_batch_size: int | None = mini_batch_size
        self.eval_mini_batch_size = eval_mini_batch_size
        self.heldout = heldout
        self.query_only = query_only
        self.packed = packed
        self.row_weights: Tensor | None
        self.teacher: Tensor | None
        self.register_buffer("row_weights", row_weights, persistent=False)
        self.register_buffer("teacher", teacher if distill_weight else None, persistent=False)
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        self.masked, self.guided, self.negatives = 0, 0, 0  # counted in training, for the log
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._documents: list[Tensor] = []
        self._words = 0  # columns of random words before the others that are embedded
        self._added: dict[str, Tensor] = {}  # what the batch's loss has besides the contrastive part

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor | dict[str, Tensor]:
        """Embed the columns (anchor, positive, negatives …, random words where there is `drift`); return the loss, or
        its components when there are two."""
        columns, words = self._without_words(sentence_features)
        self._documents = self._frozen(columns[1:]) if self.query_only else []
        trained = [*words, *(columns[:1] if self.query_only else columns)]
        self._words = len(words)
        step = self.rows_at_once(len(labels))
        if step == len(labels):
            loss = self.calculate_loss([[vectors] for vectors in self._embed(trained)], labels)
        elif self._in_training:
            loss = self.forward_cached(trained, labels)
        else:
            loss = self.calculate_loss(self._in_parts(trained, step), labels)
        return self._components(loss) if self._in_training else loss

    def vectors_of(self, sentence_features: Iterable[Features], rows: int) -> list[list[Tensor]]:
        """Vectors of the columns of a batch of `rows`, as `calculate_loss` takes them, without gradients."""
        columns, _ = self._without_words(sentence_features)
        trained, self._words = columns[:1] if self.query_only else columns, 0
        step = self.rows_at_once(rows)
        with torch.no_grad():
            vectors = [[column] for column in self._embed(trained)] if step == rows else self._in_parts(trained, step)
        return vectors + ([[column] for column in self._frozen(columns[1:])] if self.query_only else [])

    def _without_words(self, sentence_features: Iterable[Features]) -> tuple[list[Features], list[Features]]:
        """The columns that are compared, and that of random words, which only training rows have."""
        columns = list(sentence_features)
        count = len(columns) if self.drift is None else self.drift.compared
        return columns[:count], columns[count:]

    def rows_at_once(self, rows: int) -> int:
        """Rows of a batch that are embedded at a time."""
        limits = [rows, self.mini_batch_size, None if self._in_training else self.eval_mini_batch_size]
        return min(limit for limit in limits if limit)

    def _components(self, loss: Tensor) -> Tensor | dict[str, Tensor]:
        """The loss, or the parts whose sum it is."""
        parts = {"contrastive": self._contrastive(loss)} | self._added
        if self.l1:
            parts["l1"] = self.l1 * sum_of_absolutes(self.weights)
        return parts if len(parts) > 1 else loss

    def _contrastive(self, loss: Tensor) -> Tensor:
        """The loss without what the batch's has besides."""
        return loss - torch.stack(list(self._added.values())).sum() if self._added else loss

    def contrastive_loss(self, reps: list[list[Tensor]], labels: Tensor) -> Tensor:
        """The contrastive part of `calculate_loss`, in training."""
        return self._contrastive(self.calculate_loss(reps, labels))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embedded columns, each a list of mini-batches of shape (rows, dim)."""
        assert labels is not None
        vectors = [torch.cat(column).float() for column in reps]
        words, (queries, *documents) = vectors[: self._words], vectors[self._words :]
        loss = self._loss(queries, documents or self._documents, labels, words)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    @property
    def _in_training(self) -> bool:
        """As the inner model says: evaluation leaves the wrapper for several processes in training mode."""
        return bool(getattr(self.model, "module", self.model).training)

    def _embed(self, columns: list[Features]) -> list[Tensor]:
        with self.autocast():
            if self.packed is not None:
                return self.packed(columns)
            return [self.model(column)["sentence_embedding"] for column in columns]

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        """Embed in mixed precision, the first time and again in backward."""
        with self.autocast():
            return super().embed_minibatch(*args, **kwargs)

    def _frozen(self, columns: list[Features]) -> list[Tensor]:
        step = self.rows_at_once(len(columns[0]["input_ids"]))
        with torch.no_grad(), base_model_only(self.model), evaluating(self.model):
            return [torch.cat(parts).float() for parts in self._in_parts(columns, step)]

    def _in_parts(self, columns: list[Features], step: int) -> list[list[Tensor]]:
        """Vectors of columns, `step` rows at a time, without gradients."""
        return [
            [part for part, _ in self.embed_minibatch_iter(column, False, False, ranges=ranges_of(column, step))]
            for column in columns
        ]

    def _loss(self, queries: Tensor, documents: list[Tensor], labels: Tensor, words: Sequence[Tensor] = ()) -> Tensor:
        rows, own = labels, torch.arange(len(labels), device=labels.device)
        anchors, columns = queries, documents
        if torch.distributed.is_initialized():
            rows, columns = all_gather(labels), [all_gather_with_grad(column) for column in documents]
            own = own + get_rank() * len(labels)
            anchors = all_gather_with_grad(queries) if self.bidirectional else queries
        out, out_back = self._masks(rows, own)
        ways = [_Way(queries, torch.cat(columns), out, self.document_counts)]
        if self.bidirectional:
            ways.append(_Way(documents[0], anchors, out_back, self.anchor_counts))
        losses = [self._over_dims(way, rows, own) for way in ways]
        plain, smoothed = (torch.stack(one).mean(dim=0) for one in zip(*losses, strict=True))  # each (q,)
        if self._in_training:
            added = {"distill": self._divergence(queries, documents, labels)}
            if self.drift is not None:
                added["drift"] = self.drift.of([queries, documents[0]], next(iter(words), None), labels)
            return self._in_all(plain, smoothed, added, rows, own)
        if self.heldout is None:
            return plain.mean()
        return plain[labels >= self.heldout.first].sum() / self.heldout.per_batch

    def _in_all(
        self, plain: Tensor, smoothed: Tensor, more: dict[str, Tensor | None], rows: Tensor, own: Tensor
    ) -> Tensor:
        """The loss in training, from losses per anchor, each (q,); notes what it has besides the contrastive part."""
        weights = None if self.row_weights is None else self.row_weights[rows[own]]
        loss, self._added = weighted_mean(smoothed, weights), {}
        if self.label_smoothing:
            self._added["smoothing"] = (loss - weighted_mean(plain, weights)).detach()
        for name, values in more.items():
            if values is not None:
                part = weighted_mean(values, weights)
                self._added[name] = part.detach()
                loss = loss + part
        return loss

    def _dims(self, vectors: Tensor) -> list[int]:
        """The dimensions that vectors are cut to, their whole width first."""
        return list(dict.fromkeys((vectors.shape[1], *self.matryoshka_dims)))

    def _mean_over_dims(self, losses: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
        """Losses of the dimensions, each (q,), as one."""
        if not self.dim_weights:
            return torch.stack(list(losses)).mean(dim=0)
        weights = torch.tensor([self.dim_weights.get(d, 1.0) for d in dims], device=losses[0].device)
        return (torch.stack(list(losses)) * weights[:, None]).sum(dim=0) / weights.sum()

    def _over_dims(self, way: _Way, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per anchor without and with label smoothing over all dimensions: (q,) and (q,)."""
        logs = way.counts.of_batch(rows, own) if way.counts is not None and self._in_training else None
        dims = self._dims(way.queries)
        parts = [self._cross_entropy(way.queries[:, :d], way.candidates[:, :d], own, way.out, logs) for d in dims]
        plain, smoothed = (self._mean_over_dims(losses, dims) for losses in zip(*parts, strict=True))
        return plain, smoothed

    def _divergence(self, queries: Tensor, documents: list[Tensor], labels: Tensor) -> Tensor | None:
        """How far each anchor's order of its own documents is from the teacher's, (q,), with the weight in."""
        if self.teacher is None:
            return None
        scores, group = self.teacher[labels], torch.stack(documents, dim=1)
        parts, dims = [], self._dims(queries)
        for d in dims:
            cosines = torch.einsum("qd,qcd->qc", normalize(queries[:, :d], dim=1), normalize(group[..., :d], dim=2))
            parts.append(teacher_divergence(cosines / self.temperature, scores, self.distill_temperature))
        return self.distill_weight * self._mean_over_dims(parts, dims)

    def _masks(self, rows: Tensor, own: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What leaves the softmax, except an anchor's own positive: true in (q, n · d) for a document, and in (q, n)
        for an anchor as a candidate of a positive."""
        guide = self.guide(rows) if self.guide is not None and self._in_training else None
        known = None if self.known_positives is None else self.known_positives(rows).to(rows.device)
        if known is not None:
            known.fill_diagonal_(False)
        out, back = known, None if known is None else known[:, : len(rows)].T
        if guide is not None:
            limits = guide.diagonal()[:, None] + self.false_negative_margin
            forward, backward = (side > limits for side in (guide, guide[:, : len(rows)].T))
            for side in (forward, backward):
                side.fill_diagonal_(False)
            self.guided += int((forward if known is None else forward & ~known).sum())
            out, back = (forward, backward) if known is None or back is None else (known | forward, back | backward)
        if self._in_training and out is not None:  # over all processes, so that each logs the whole batch's share
            self.masked += 0 if known is None else int(known.sum())
            self.negatives += out.numel() - len(rows)
        return (None if out is None else out[own]), (None if back is None else back[own])

    def _cross_entropy(
        self,
        queries: Tensor,
        candidates: Tensor,
        own: Tensor,
        out: Tensor | None,
        log_counts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss per anchor without and with label smoothing: (q,) and (q,)."""
        logits = normalize(queries, dim=1) @ normalize(candidates, dim=1).T / self.temperature
        if log_counts is not None:
            logits = logits - log_counts
        if out is not None:
            logits = logits.masked_fill(out, -torch.inf)
        log_p = logits.log_softmax(dim=1)
        loss = -log_p[torch.arange(len(own)), own]
        if not (self.label_smoothing and self._in_training):
            return loss, loss
        kept = torch.ones_like(log_p, dtype=torch.bool) if out is None else ~out
        spread = -log_p.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1)
        return loss, (1 - self.label_smoothing) * loss + self.label_smoothing * spread

    def take_masked_share(self) -> float | None:
        """Share of the negatives masked since the last call; None if there were none."""
        share = self.masked / self.negatives if self.negatives else None
        self.masked, self.negatives = 0, 0
        return share

    def take_guided_share(self) -> float | None:
        """Share of the negatives that the guide alone left out since the last call; call it before the masked share."""
        share = self.guided / self.negatives if self.guide is not None and self.negatives else None
        self.guided = 0
        return share


def ranges_of(features: Features, step: int) -> list[tuple[int, int]]:
    """(begin, end) of mini-batches of `step` rows."""
    rows = len(features["input_ids"])
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def sum_of_absolutes(weights: Sequence[Tensor]) -> Tensor:
    """Σ|w| over tensors."""
    return torch.stack([weight.abs().sum() for weight in weights]).sum()
