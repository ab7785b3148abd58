"""Packed rows: their layout, and vectors and gradients equal to those of padded batches.

The kernel for one row needs a GPU; here a loop over the texts replaces it.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, scaled_dot_product_attention

from ebr_lib.model import packing
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.loading import load_model
from ebr_lib.model.packing import PackedForward, one_row, pack, packed_forward
from tests.models import load_tiny

TEXTS = [
    "a",
    "how do i cancel my card payment please",
    "送给妈妈的生日礼物",
    "blankets " * 30,
    "steel pans and 手机壳",
    "x y",
]
KINDS = ("bert", "xlm-r", "qwen2", "kalm")


def columns_of(model, *columns):
    return [model.preprocess(list(texts)) for texts in columns]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_token_has_its_own_place(lengths):
    layout = pack(lengths, 64)
    assert len(set(layout.places)) == sum(lengths)
    assert (layout.starts + layout.lengths <= 64).all()
    assert layout.places.max() < layout.row_count * 64
    assert layout.row_count <= 1 + 2 * sum(lengths) // 64  # no two rows are both half empty


def test_layout_by_hand():
    layout = pack([3, 5, 2], 8)
    assert layout.row_count == 2
    np.testing.assert_array_equal(layout.rows, [0, 0, 1])
    np.testing.assert_array_equal(layout.starts, [5, 0, 0])
    np.testing.assert_array_equal(layout.places, [5, 6, 7, 0, 1, 2, 3, 4, 8, 9])
    np.testing.assert_array_equal(layout.offsets, [0, 1, 2, 0, 1, 2, 3, 4, 0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_padded_batches(tiny_models, kind):
    model = load_tiny(tiny_models, kind).eval()
    packed = packed_forward(model)
    assert packed is not None
    assert packed.causal == (kind == "qwen2")
    columns = columns_of(model, TEXTS, TEXTS[::-1], ["one more"])
    with torch.no_grad():
        for column, found in zip(columns, packed(columns), strict=True):
            wanted = model(dict(column))["sentence_embedding"]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_no_text_sees_its_neighbours(tiny_models, kind):
    packed = packed_forward(load_tiny(tiny_models, kind).eval())
    with torch.no_grad():
        (together,) = packed(columns_of(packed.model, TEXTS))
        for i, text in enumerate(TEXTS):
            (alone,) = packed(columns_of(packed.model, [text]))
            torch.testing.assert_close(together[i], alone[0], atol=1e-6, rtol=0)


@contextmanager
def attention_seen(model):
    """Collect the attention implementations that the model runs with."""
    seen = set()
    config = model[0].model.config
    tokens = model[0].model.get_input_embeddings()
    hook = tokens.register_forward_pre_hook(lambda *_: seen.add(config._attn_implementation))
    try:
        yield seen
    finally:
        hook.remove()


def gradients(model, vectors):
    anchors, positives = (normalize(part, dim=1) for part in vectors)
    loss = torch.nn.functional.cross_entropy(anchors @ positives.T / 0.05, torch.arange(len(anchors)))
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), [w.grad.clone() for w in model.parameters() if w.grad is not None]


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "qwen2"])
@pytest.mark.parametrize("attention_kind", ["sdpa", "eager"])
def test_gradients_of_an_adapter_are_those_of_padded_batches(tiny_models, monkeypatch, kind, attention_kind):
    model = load_tiny(tiny_models, kind).eval()  # no dropout: its draws differ
    torch.manual_seed(1)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            weight.data.normal_(std=0.1)
    columns = columns_of(model, TEXTS, [text + " too" for text in TEXTS])
    padded_loss, wanted = gradients(model, [model(dict(column))["sentence_embedding"] for column in columns])
    monkeypatch.setattr(packing, "EAGER_ROW", 10_000 if attention_kind == "eager" else 0)
    packed = packed_forward(model)
    with attention_seen(model) as seen:
        packed_loss, found = gradients(model, packed(columns))
    assert seen == {attention_kind}
    assert model[0].model.config._attn_implementation == "sdpa"
    assert packed_loss == pytest.approx(padded_loss, abs=1e-5)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_packed_rows_have_dropout_in_training(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu")
    packed = packed_forward(model)
    columns = columns_of(model, TEXTS)
    model.train()
    (one,), (other,) = packed(columns), packed(columns)
    assert not torch.equal(one, other)
    model.eval()
    (one,), (other,) = packed(columns), packed(columns)
    assert torch.equal(one, other)


def test_prompt_tokens_can_be_left_out_of_the_mean(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu").eval()
    model.set_pooling_include_prompt(False)
    packed = PackedForward(model)
    columns = [model.preprocess(TEXTS, prompt="query: "), model.preprocess(TEXTS, prompt="a longer passage: ")]
    with torch.no_grad():
        for column, found in zip(columns, packed(columns), strict=True):
            torch.testing.assert_close(found, model(dict(column))["sentence_embedding"], atol=1e-6, rtol=0)


def test_a_model_with_a_sliding_window_is_padded(tiny_models, caplog):
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        assert packed_forward(load_tiny(tiny_models, "modernbert")) is None
    assert "sliding window" in caplog.text


def test_wrong_vectors_are_noticed_and_texts_padded(tiny_models, caplog, monkeypatch):
    monkeypatch.setattr(packing, "position_padding", lambda model: 7)  # wrong for XLM-R
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        assert packed_forward(load_tiny(tiny_models, "xlm-r")) is None
    assert "padded, not packed" in caplog.text
    assert "differ" in caplog.text


SPECIALS = ["<pad> first", "in <pad> the <pad><pad> middle", "<mask> and <unk> </s> <s>", "plain 南瓜", "<pad>"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in ("bert", "xlm-r", "mpnet", "qwen2", "dense", "layernorm", "last_token")),
        *((kind, torch.bfloat16) for kind in ("xlm-r", "dense", "last_token")),
    ],
)
def test_special_tokens_in_a_text_are_placed_as_in_padded_batches(tiny_models, kind, dtype):
    model = load_model(str(tiny_models(kind)), device="cpu", dtype=dtype).eval()
    packed = packed_forward(model)
    assert packed is not None
    (column,) = columns_of(model, SPECIALS)
    assert (column["input_ids"][:, 1:-1] == model.tokenizer.pad_token_id).any()
    with torch.no_grad():
        (found,) = packed([dict(column)])
        wanted = model(dict(column))["sentence_embedding"]
    torch.testing.assert_close(found.float(), wanted.float(), atol=2 * packing.TOLERANCE[dtype], rtol=0)


def test_the_check_restores_the_mode_of_the_model(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu").train()
    packed_forward(model)
    assert model.training


# --- one row -----------------------------------------------------------------------------------------------------


def attention_by_text(query, key, value, starts, _starts, longest, _longest, *, scale, window_size):
    """The kernel as documented: (tokens, heads, width) in and out, each text by itself."""
    assert starts.dtype == torch.int32
    assert longest == int(starts.diff().max())
    parts = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        one = [states[begin:end].transpose(0, 1)[None] for states in (query, key, value)]
        causal = window_size == (-1, 0)
        parts.append(scaled_dot_product_attention(*one, is_causal=causal, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention_by_text)
    monkeypatch.setattr(packing, "has_varlen", lambda model: True)


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "qwen2"])
def test_one_row_gives_vectors_and_gradients_of_padded_batches(tiny_models, with_kernel, kind):
    model = load_tiny(tiny_models, kind).eval()
    packed = packed_forward(model)
    assert packed is not None
    assert packed.one_row
    weight = next(iter(model[0].model.encoder.layer if kind != "qwen2" else model[0].model.layers)).parameters()
    weight = next(weight)
    columns = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
    gradients = []
    for embed in (lambda: [model(dict(column))["sentence_embedding"] for column in columns], lambda: packed(columns)):
        vectors = torch.cat(embed())
        (gradient,) = torch.autograd.grad((vectors * torch.arange(vectors.shape[1])).sum(), weight)
        gradients.append((vectors.detach(), gradient))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_one_row_gives_vectors_of_a_model_with_its_own_masks(tiny_models, with_kernel):
    model = load_tiny(tiny_models, "kalm").eval()
    packed = packed_forward(model)
    assert packed is not None
    with torch.no_grad():
        features = model.preprocess(TEXTS)
        (found,) = packed([features])
        torch.testing.assert_close(found, model(dict(features))["sentence_embedding"], atol=1e-5, rtol=0)


def test_training_with_attention_dropout_uses_rows_under_a_mask(tiny_models, with_kernel):
    packed = packed_forward(load_tiny(tiny_models, "bert").eval())  # 0.1 in the tiny BERT
    assert packed is not None
    assert packed.layout(np.array([3, 4])).row_count == 1
    assert packed.layout(np.array([3, 4])).row_length == 7
    packed.model.train()
    assert packed.layout(np.array([3, 4])).row_length == packing.MIN_ROW
    qwen2 = packed_forward(load_tiny(tiny_models, "qwen2").train())
    assert qwen2 is not None
    assert qwen2.layout(np.array([3, 4])).row_length == 7


def test_a_wrong_kernel_is_not_used(tiny_models, monkeypatch, with_kernel):
    def wrong(*args, **kwargs):
        return attention_by_text(*args, **kwargs) * 2

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    packed = packed_forward(load_tiny(tiny_models, "qwen2").eval())
    assert packed is not None
    assert not packed.one_row


def test_one_row_by_hand():
    layout = one_row([3, 5, 2])
    assert (layout.row_count, layout.row_length, layout.slots) == (1, 10, 10)
    assert layout.starts.tolist() == [0, 3, 8]
    assert layout.places.tolist() == list(range(10))


def test_one_row_restores_attention_and_signature(tiny_models, with_kernel):
    model = load_tiny(tiny_models, "bert").eval()
    before = model[0].model_forward_params
    PackedForward(model, one_row=True)([model.preprocess(TEXTS)])
    assert model[0].model_forward_params == before
    assert model[0].model.config._attn_implementation == "sdpa"
