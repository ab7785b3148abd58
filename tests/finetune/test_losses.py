"""The contrastive loss against numbers worked out by hand, numpy, and the library's own losses."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.finetune.batches import BalancedBatchSampler, KnownPositives
from ebr_lib.finetune.losses import ContrastiveLoss
from ebr_lib.finetune.signals import ExpectedCounts
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.loading import load_model

ANCHORS = ["a warm blanket", "steel pan for eggs", "热水器 不出热水", "cancel my card payment"]
POSITIVES = ["wool throw for the sofa", "frying pan that never sticks", "燃气热水器 维修", "how to stop a transfer"]


class Still(nn.Module):
    """Stands in for a model where only its mode and its weights matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))


def random_vectors(rows: int, columns: int, dim: int = 8) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows + columns)
    return [[torch.randn(rows, dim, generator=generator, dtype=torch.float64)] for _ in range(columns)]


def by_numpy(reps, temperature, masked=(), smoothing=0.0, dims=None) -> float:
    q, *d = [column[0].numpy()[:, :dims] for column in reps]
    d = np.concatenate(d)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d)]
    logits = unit[0] @ unit[1].T / temperature
    losses = []
    for i, row in enumerate(logits):
        kept = [j for j in range(len(row)) if (i, j) not in masked]
        log_p = {j: row[j] - np.log(np.exp(row[kept]).sum()) for j in kept}
        losses.append(-(1 - smoothing) * log_p[i] - smoothing * np.mean(list(log_p.values())))
    return float(np.mean(losses))


def test_two_pairs_by_hand():
    # cosines 1 on the diagonal and 0 beside it, temperature 1: −log(e / (e + 1)) for both anchors
    eye = torch.eye(2)
    loss = ContrastiveLoss(Still(), temperature=1.0).calculate_loss([[eye], [eye]], torch.arange(2))
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("columns", [2, 4])
def test_with_hard_negatives_it_equals_numpy(columns):
    reps = random_vectors(5, columns)
    loss = ContrastiveLoss(Still(), temperature=0.05).calculate_loss(reps, torch.arange(5))
    assert loss.item() == pytest.approx(by_numpy(reps, 0.05), rel=1e-5)


def test_temperature_divides_the_cosines():
    reps = random_vectors(5, 2)
    for temperature in (0.02, 0.5):
        loss = ContrastiveLoss(Still(), temperature=temperature).calculate_loss(reps, torch.arange(5))
        assert loss.item() == pytest.approx(by_numpy(reps, temperature), rel=1e-5)


def test_label_smoothing_is_torch_cross_entropy_and_only_in_training():
    reps, model = random_vectors(6, 3), Still()
    loss = ContrastiveLoss(model, temperature=0.5, label_smoothing=0.2)
    q, *d = [column[0].float() for column in reps]
    unit = nn.functional.normalize
    logits = unit(q, dim=1) @ unit(torch.cat(d), dim=1).T / 0.5
    smoothed = nn.functional.cross_entropy(logits, torch.arange(6), label_smoothing=0.2)
    assert loss.calculate_loss(reps, torch.arange(6)).item() == pytest.approx(smoothed.item(), rel=1e-5)
    model.eval()
    assert loss.calculate_loss(reps, torch.arange(6)).item() == pytest.approx(by_numpy(reps, 0.5), rel=1e-5)


def test_known_positives_leave_the_softmax():
    rows = [
        TrainingRow("q1", "shared document"),
        TrainingRow("q2", "Shared  DOCUMENT"),  # the same text, normalised
        TrainingRow("q1", "another answer"),
        TrainingRow("q3", "third"),
    ]
    known = KnownPositives(rows)
    reps = random_vectors(4, 2)
    loss = ContrastiveLoss(Still(), temperature=0.5, known_positives=known.mask)
    masked = {(0, 1), (1, 0), (0, 2), (2, 0), (2, 1)}
    for _ in range(2):  # the share is of the batches since it was last asked for
        found = loss.calculate_loss(reps, torch.arange(4)).item()
        assert found == pytest.approx(by_numpy(reps, 0.5, masked), rel=1e-5)
        assert loss.take_masked_share() == pytest.approx(5 / 12)
        assert loss.take_masked_share() is None


def test_smoothing_spreads_over_unmasked_documents():
    rows = [TrainingRow("q1", "one"), TrainingRow("q1", "two"), TrainingRow("q2", "three")]
    reps = random_vectors(3, 2)
    known = KnownPositives(rows).mask
    loss = ContrastiveLoss(Still(), temperature=0.5, label_smoothing=0.3, known_positives=known)
    wanted = by_numpy(reps, 0.5, masked={(0, 1), (1, 0)}, smoothing=0.3)
    assert loss.calculate_loss(reps, torch.arange(3)).item() == pytest.approx(wanted, rel=1e-5)


def test_a_mask_that_finds_nothing_changes_no_bit():
    rows = [TrainingRow(a, p) for a, p in zip(ANCHORS, POSITIVES, strict=True)]
    reps = random_vectors(4, 2)
    plain = ContrastiveLoss(Still()).calculate_loss(reps, torch.arange(4))
    masked = ContrastiveLoss(Still(), known_positives=KnownPositives(rows).mask)
    assert torch.equal(masked.calculate_loss(reps, torch.arange(4)), plain)


@pytest.mark.parametrize("dims", [(4, 2), (8, 4, 2)])
def test_matryoshka_is_the_mean_over_whole_and_cut_vectors(dims):
    reps = random_vectors(5, 2)
    loss = ContrastiveLoss(Still(), temperature=0.5, matryoshka_dims=dims)
    wanted = np.mean([by_numpy(reps, 0.5, dims=d) for d in (8, 4, 2)])
    assert loss.calculate_loss(reps, torch.arange(5)).item() == pytest.approx(wanted, rel=1e-5)


def test_matryoshka_weights_by_hand():
    """Whole vectors, which are not listed, weigh 1."""
    reps = random_vectors(5, 2)
    loss = ContrastiveLoss(Still(), temperature=0.5, matryoshka_dims=(4, 2), matryoshka_weights=(0.3, 0.1))
    losses = [by_numpy(reps, 0.5, dims=d) for d in (8, 4, 2)]
    wanted = (losses[0] + 0.3 * losses[1] + 0.1 * losses[2]) / 1.4
    assert loss.calculate_loss(reps, torch.arange(5)).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_both_directions_are_the_mean_of_two_searches(masks):
    rows = [TrainingRow("q1", "one", ("x",)), TrainingRow("q1", "two", ("y",)), TrainingRow("two", "three", ("z",))]
    known = KnownPositives(rows).mask if masks else None
    reps = random_vectors(3, 3)
    loss = ContrastiveLoss(Still(), temperature=0.5, bidirectional=True, known_positives=known)
    there = {(0, 1), (1, 0), (2, 1)} if masks else set()
    back = {(j, i) for i, j in there}
    wanted = (by_numpy(reps, 0.5, there) + by_numpy([reps[1], reps[0]], 0.5, back)) / 2
    assert loss.calculate_loss(reps, torch.arange(3)).item() == pytest.approx(wanted, rel=1e-5)
    loss.model.eval()  # the held-out loss has both directions too
    assert loss.calculate_loss(reps, torch.arange(3)).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_that_the_guide_prefers_leave_the_softmax(bidirectional):
    # anchor 0: document 1 is .25 above its own. Document 1: anchor 0 is .15 above its own. Document 0 keeps anchor 1
    cosines = torch.tensor([[0.5, 0.75, 0.1], [0.4, 0.6, 0.55], [0.0, 0.2, 0.9]])
    model, reps = Still(), random_vectors(3, 2)
    loss = ContrastiveLoss(
        model, temperature=0.5, guide=lambda rows: cosines[rows][:, rows], false_negative_margin=0.1,
        bidirectional=bidirectional,
    )  # fmt: skip
    wanted = by_numpy(reps, 0.5, {(0, 1)})
    if bidirectional:
        wanted = (wanted + by_numpy([reps[1], reps[0]], 0.5, {(1, 0)})) / 2
    assert loss.calculate_loss(reps, torch.arange(3)).item() == pytest.approx(wanted, rel=1e-5)
    assert (loss.take_guided_share(), loss.take_masked_share()) == (pytest.approx(1 / 6), 0)
    model.eval()
    plain = ContrastiveLoss(model, temperature=0.5, bidirectional=bidirectional)
    assert torch.equal(loss.calculate_loss(reps, torch.arange(3)), plain.calculate_loss(reps, torch.arange(3)))


def test_a_positive_never_leaves_and_known_ones_are_counted_once():
    rows = [TrainingRow("q1", "one"), TrainingRow("q1", "two"), TrainingRow("q2", "three")]
    loss = ContrastiveLoss(
        Still(), temperature=0.5, known_positives=KnownPositives(rows).mask,
        guide=lambda rows: torch.tensor([[0.1, 0.9, 0.9], [0.9, 0.1, 0.0], [0.9, 0.9, 0.1]]), false_negative_margin=-1,
    )  # fmt: skip
    assert loss.calculate_loss(random_vectors(3, 2), torch.arange(3)).item() == 0  # no negative is left
    assert (loss.take_guided_share(), loss.take_masked_share()) == (4 / 6, 2 / 6)


# --- logQ: one document has eight of ten rows ---------------------------------------------------------------------


POPULAR = [TrainingRow(f"q{i}", "popular") for i in range(8)] + [TrainingRow("q8", "rare"), TrainingRow("q9", "other")]


@pytest.mark.parametrize("masked", [False, True])
def test_logq_by_hand(masked):
    """In batches of 5 the popular document has 4 places, the rare one half of one; all cosines are 0.

    The rare one's anchor: e^0 / .5 against four times e^0 / 4, so 2 / (2 + 1): together the copies count as one
    document. A popular one's anchor: 1/4 / (4 · 1/4 + 2), or with its copies masked 1 / (1 + 2).
    """
    known = KnownPositives(POPULAR)
    counts = ExpectedCounts(known.columns, 5, masked=masked, balanced=True)
    reps = [[torch.tensor([[1.0, 0.0]] * 5)], [torch.tensor([[0.0, 1.0]] * 5)]]
    model = Still()
    loss = ContrastiveLoss(
        model, temperature=0.05, document_counts=counts, known_positives=known.mask if masked else None
    )
    found = loss.calculate_loss(reps, torch.tensor([8, 0, 1, 2, 3])).item()
    of_popular = np.log(3) if masked else np.log(12)
    assert found == pytest.approx((np.log(1.5) + 4 * of_popular) / 5, rel=1e-5)
    model.eval()
    plain = ContrastiveLoss(model, temperature=0.05, known_positives=known.mask if masked else None)
    rows = torch.tensor([8, 0, 1, 2, 3])
    assert torch.equal(loss.calculate_loss(reps, rows), plain.calculate_loss(reps, rows))


@pytest.mark.parametrize("balanced", [True, False])
def test_corrected_batches_sum_to_the_catalogue(balanced):
    """Over an epoch, the mean of a batch's sum of e^score / count is the sum of e^score over the documents."""
    rng = np.random.default_rng(0)
    rows = [TrainingRow(f"q{i}", f"d{min(rng.zipf(1.5), 20)}", (f"n{rng.integers(6)}",)) for i in range(60)]
    known = KnownPositives(rows)
    counts = ExpectedCounts(known.columns, 12, masked=False, balanced=balanced)
    scores = rng.normal(size=known.columns.max() + 1)
    batches = BalancedBatchSampler(known.documents, known.anchors, batch_size=12)
    batches = batches if balanced else rng.permutation(60).reshape(5, 12).tolist()
    logs = counts.log_counts.numpy().astype(np.float64)
    sums = [np.exp(scores[known.columns[batch]] - logs[batch]).sum() for batch in batches]
    assert np.mean(sums) == pytest.approx(np.exp(scores[np.unique(known.columns)]).sum(), rel=1e-5)


def test_how_often_a_batch_has_an_anchor_s_own_document():
    known = KnownPositives([*POPULAR[:3], *(TrainingRow(f"a{i}", f"b{i}") for i in range(7))])

    def own(balanced, batch_size=4):
        return np.exp(ExpectedCounts(known.columns, batch_size, masked=True, balanced=balanced).log_own.numpy())

    # three of ten rows, batches of four: dealt to different batches 3 · 4 / 10 > 1; at random 1 − C(7, 4) / C(10, 4)
    assert own(True)[[0, 9]].tolist() == pytest.approx([1.0, 0.4])
    assert own(False)[[0, 9]].tolist() == pytest.approx([1 - 35 / 210, 0.4])
    assert own(False, 64).tolist() == pytest.approx([1.0] * 10)


def test_packed_embeds_all_columns_in_one_call():
    reps, columns, given = random_vectors(4, 3), ["anchors", "positives", "negatives"], []

    def packed(columns):
        given.append(columns)
        return [column[0] for column in reps]

    loss = ContrastiveLoss(Still(), temperature=0.5, packed=packed)(columns, torch.arange(4))
    assert given == [columns]
    assert loss.item() == pytest.approx(by_numpy(reps, 0.5), rel=1e-5)


# --- with a model -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_bert):
    """A tiny model with a random adapter, without dropout, so that two ways to the same loss can be compared."""
    torch.manual_seed(0)
    model = load_model(str(tiny_bert), device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    add_lora(model, r=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model.train()


def columns_of(model):
    return [model.preprocess(ANCHORS), model.preprocess(POSITIVES)]


def gradients(model, loss) -> torch.Tensor:
    model.zero_grad()
    value = loss(columns_of(model), torch.arange(4))
    value.backward()
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])


def test_without_extras_it_is_the_library_loss_bit_for_bit_in_value(adapted):
    ours = ContrastiveLoss(adapted, temperature=0.05)(columns_of(adapted), torch.arange(4))
    theirs = MultipleNegativesRankingLoss(adapted, scale=20.0)(columns_of(adapted), torch.arange(4))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_same_gradients(adapted, size):
    whole = gradients(adapted, ContrastiveLoss(adapted))
    split = gradients(adapted, ContrastiveLoss(adapted, mini_batch_size=size))
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "rows"), [(None, [4, 4]), (4, [4, 4]), (3, [3, 1, 3, 1] * 2)], ids=["whole", "just whole", "cut"]
)
def test_rows_are_embedded_in_micro_batches_and_never_twice_without_need(adapted, size, rows):
    """Each row is embedded once; in micro batches twice, forward and again for backward."""
    embedded = []
    adapted.register_forward_pre_hook(lambda module, inputs: embedded.append(len(inputs[0]["input_ids"])))
    gradients(adapted, ContrastiveLoss(adapted, mini_batch_size=size))
    assert embedded == rows


def test_l1_is_a_separate_part_of_the_loss(adapted):
    loss = ContrastiveLoss(adapted, l1=0.01)
    found = loss(columns_of(adapted), torch.arange(4))
    total = sum(w.abs().sum().item() for w in adapted.parameters() if w.requires_grad)
    assert found["l1"].item() == pytest.approx(0.01 * total, rel=1e-5)
    plain = ContrastiveLoss(adapted)(columns_of(adapted), torch.arange(4))
    assert torch.equal(found["contrastive"], plain)
    adapted.eval()
    assert torch.is_tensor(loss(columns_of(adapted), torch.arange(4)))


def test_l1_adds_its_sign_to_the_gradient(adapted):
    plain = gradients(adapted, ContrastiveLoss(adapted))
    adapted.zero_grad()
    sum(ContrastiveLoss(adapted, l1=0.01)(columns_of(adapted), torch.arange(4)).values()).backward()
    weights = [w for w in adapted.parameters() if w.requires_grad]
    with_l1 = torch.cat([w.grad.flatten() for w in weights])
    signs = torch.cat([w.sign().flatten() for w in weights])
    torch.testing.assert_close(with_l1, plain + 0.01 * signs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [None, 2])
def test_query_only_leaves_documents_to_the_base_model(adapted, size):
    base = load_model(adapted.transformers_model.name_or_path.removesuffix("/"), device="cpu").eval()
    with torch.no_grad():
        documents = base(base.preprocess(POSITIVES))["sentence_embedding"]
        queries = adapted(adapted.preprocess(ANCHORS))["sentence_embedding"]
    wanted = by_numpy([[queries.double()], [documents.double()]], 0.05)
    loss = ContrastiveLoss(adapted, query_only=True, mini_batch_size=size)
    value = loss(columns_of(adapted), torch.arange(4))
    assert value.item() == pytest.approx(wanted, rel=1e-4)
    value.backward()
    assert any(w.grad.abs().sum() > 0 for w in adapted.parameters() if w.requires_grad)
    with torch.no_grad():  # the adapter is on again
        assert torch.equal(adapted(adapted.preprocess(ANCHORS))["sentence_embedding"], queries)
