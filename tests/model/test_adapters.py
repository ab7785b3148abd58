"""The LoRA adapter against its formula: where it is put, how it is scaled, where dropout acts."""

from __future__ import annotations

import pytest
import torch

from ebr_lib.model.adapters import add_lora, trainable_counts
from ebr_lib.model.loading import load_model

LINEAR_LAYERS = {"bert": 2 * 6, "xlm-r": 2 * 6, "modernbert": 2 * 4, "qwen2": 2 * 7}


def adapted_layers(model) -> dict[str, torch.nn.Module]:
    return {name: layer for name, layer in model.transformers_model.named_modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize("kind", LINEAR_LAYERS)
def test_every_linear_layer_gets_an_adapter_of_the_rank(tiny_models, kind):
    model = load_model(str(tiny_models(kind)), device="cpu")
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.transformers_model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.startswith("pooler")
    }
    assert len(linear) == LINEAR_LAYERS[kind]
    add_lora(model, r=3, alpha=6, dropout=0.25)
    layers = adapted_layers(model)
    assert set(layers) == set(linear)
    assert trainable_counts(model)[0] == sum(3 * (into + out) for into, out in linear.values())
    assert {layer.lora_dropout["default"].p for layer in layers.values()} == {0.25}


def one_layer(tiny_bert, **options):
    """An adapted layer with random weights, and what it is made of: W, bias, A, B."""
    torch.manual_seed(1)
    model = load_model(str(tiny_bert), device="cpu").eval()
    add_lora(model, r=4, alpha=8, **{"dropout": 0.0, **options})
    layer = next(iter(adapted_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    base = layer.get_base_layer()
    weights = (base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return layer, *(weight.detach() for weight in weights)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_adapter_is_scaled_by_alpha_over_rank_or_its_root(tiny_bert, rslora, scale):
    layer, w, bias, a, b = one_layer(tiny_bert, rslora=rslora)
    x = torch.randn(5, w.shape[1])
    torch.testing.assert_close(layer(x), x @ w.T + bias + scale * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)


def test_dora_keeps_the_length_of_every_row_of_the_weight(tiny_bert):
    layer, w, bias, a, b = one_layer(tiny_bert, dora=True)
    x = torch.randn(5, w.shape[1])
    moved = w + 2 * b @ a
    scaled = moved * (w.norm(dim=1) / moved.norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ scaled.T + bias, atol=1e-4, rtol=1e-4)


def test_dropout_is_on_the_adapter_s_input_in_training(tiny_bert):
    layer, w, bias, a, b = one_layer(tiny_bert, dropout=0.5)
    x = torch.randn(1, w.shape[1])
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, x @ w.T + bias + 2 * kept @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ w.T + bias + 2 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)


def test_the_adapter_is_float32_on_a_bfloat16_base(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu", dtype=torch.bfloat16)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
    assert {w.dtype for w in model.parameters() if not w.requires_grad} == {torch.bfloat16}
