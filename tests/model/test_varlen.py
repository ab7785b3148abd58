"""All texts in one row. The kernel needs a GPU; here a plain loop over the texts takes its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ebr_lib.model import packing
from ebr_lib.model.loading import load_model
from ebr_lib.model.packing import PackedForward, one_row, packed_forward

TEXTS = ["a", "how do i cancel my card payment", "送给妈妈的生日礼物", "blankets " * 30]


def attention_by_text(query, key, value, starts, _starts, longest, _longest, *, scale, window_size):
    """What the kernel is documented to do: (tokens, heads, width) in and out, each text by itself."""
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


def load(tiny_models, kind):
    return load_model(str(tiny_models(kind)), trust_remote_code=kind == "kalm", device="cpu")


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "qwen2"])
def test_vectors_and_gradients_are_those_of_padded_batches(tiny_models, with_kernel, kind):
    model = load(tiny_models, kind).eval()
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


def test_a_model_that_brings_its_own_masks_is_checked_too(tiny_models, with_kernel):
    model = load(tiny_models, "kalm").eval()
    packed = packed_forward(model)
    assert packed is not None
    with torch.no_grad():
        features = model.preprocess(TEXTS)
        (found,) = packed([features])
        torch.testing.assert_close(found, model(dict(features))["sentence_embedding"], atol=1e-5, rtol=0)


def test_dropout_of_attention_weights_keeps_rows_under_a_mask_in_training(tiny_models, with_kernel):
    packed = packed_forward(load(tiny_models, "bert").eval())  # 0.1 in the tiny BERT
    assert packed is not None
    assert packed.layout(np.array([3, 4])).row_count == 1
    assert packed.layout(np.array([3, 4])).row_length == 7
    packed.model.train()
    assert packed.layout(np.array([3, 4])).row_length == packing.MIN_ROW
    qwen2 = packed_forward(load(tiny_models, "qwen2").train())
    assert qwen2 is not None
    assert qwen2.layout(np.array([3, 4])).row_length == 7


def test_a_wrong_kernel_is_not_used(tiny_models, monkeypatch, with_kernel):
    def wrong(*args, **kwargs):
        return attention_by_text(*args, **kwargs) * 2

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    packed = packed_forward(load(tiny_models, "qwen2").eval())
    assert packed is not None
    assert not packed.one_row


def test_one_row_by_hand():
    layout = one_row([3, 5, 2])
    assert (layout.row_count, layout.row_length, layout.slots) == (1, 10, 10)
    assert layout.starts.tolist() == [0, 3, 8]
    assert layout.places.tolist() == list(range(10))


def test_the_signature_is_left_as_it_was(tiny_models, with_kernel):
    model = load(tiny_models, "bert").eval()
    before = model[0].model_forward_params
    PackedForward(model, one_row=True)([model.preprocess(TEXTS)])
    assert model[0].model_forward_params == before
    assert model[0].model.config._attn_implementation == "sdpa"
