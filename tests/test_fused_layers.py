"""BERT's layers for encoding: the vectors of the layers they stand for, or those layers."""

from __future__ import annotations

import pytest
import torch

from ebr_lib.model import fused_layers
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.fused_layers import FusedLayer, fuse
from ebr_lib.model.loading import load_model
from ebr_lib.model.packing import PackedForward

# oneDNN packs bfloat16 weights only for processors of which it has products (AVX512 and later)
needs_products = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="needs a processor for which oneDNN has products in bfloat16",
)
TEXTS = ["one", "two words and some more of them", "书籍 和 热水器", ""]


def _half(folder):
    return load_model(str(folder), device="cpu", dtype=torch.bfloat16).eval()


def _kinds(model):
    return {type(layer).__name__ for layer in model.transformers_model.encoder.layer}


@needs_products
@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
def test_vectors_are_those_of_the_layers_they_stand_for(tiny_models, kind):
    model = _half(tiny_models(kind))
    with torch.inference_mode():
        exact = torch.from_numpy(load_model(str(tiny_models(kind)), device="cpu").encode(TEXTS))
        before = torch.from_numpy(model.encode(TEXTS))
        fuse(model)
        assert _kinds(model) == {"FusedLayer"}
        padded = torch.from_numpy(model.encode(TEXTS))
        (packed,) = PackedForward(model)([model.preprocess(TEXTS)])
    for found in (padded, packed.float()):
        assert float((found - exact).norm()) < 1.5 * float((before - exact).norm())


@pytest.mark.parametrize("kind", ["qwen2", "modernbert"])
def test_models_of_other_parts_are_left_alone(tiny_models, kind):
    model = _half(tiny_models(kind))
    before = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == before


def test_float32_is_left_alone(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu")
    fuse(model)
    assert _kinds(model) == {"BertLayer"}


@pytest.mark.parametrize("wrong", [0.9, float("nan")])
def test_layers_with_wrong_vectors_are_taken_back(tiny_bert, monkeypatch, wrong):
    right = FusedLayer.forward

    def forward(self, x, attention_mask=None, *args, **kwargs):
        return right(self, x, attention_mask, **kwargs) * torch.linspace(wrong, 1, x.shape[-1], dtype=x.dtype)

    monkeypatch.setattr(fused_layers.FusedLayer, "forward", forward)
    model = _half(tiny_bert)
    fuse(model)
    assert _kinds(model) == {"BertLayer"}


def test_a_small_adapter_is_not_left_out(tiny_bert, caplog):
    """Its layers answer for their base's weights too; vectors alone would not tell, so little has it moved them.

    Nor is that worth a line of the log: it is what every evaluation in training finds.
    """
    caplog.set_level("INFO", "ebr_lib")
    model = _half(tiny_bert)
    add_lora(model, r=2, alpha=4, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.transformers_model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=1e-3, generator=generator)
    fuse(model)
    assert _kinds(model) == {"BertLayer"}
    assert not caplog.records


@needs_products
def test_a_model_that_was_used_before_is_fused_all_the_same(minilm):
    """Encoding ends evaluation mode for what was in training mode before, and for nothing else."""
    model = load_model(str(minilm), device="cpu")
    modes = [module.training for module in model.modules()]
    Encoder(model, precision="float32").encode(TEXTS)
    assert [module.training for module in model.modules()] == modes
    model.train()
    assert _kinds(Encoder(model, precision="bfloat16").model) == {"FusedLayer"}


def test_layers_that_only_bear_the_name_are_left_alone(tiny_bert):
    model = _half(tiny_bert)
    layer = model.transformers_model.encoder.layer[0]
    layer.intermediate.dense = torch.nn.Sequential(layer.intermediate.dense)
    before = model.encode(TEXTS)
    fuse(model)
    assert _kinds(model) == {"BertLayer"}
    assert (model.encode(TEXTS) == before).all()
