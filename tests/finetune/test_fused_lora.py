"""LoRA in one step of autograd: PEFT's outputs and gradients, and PEFT's own layer where it does not apply."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear

from ebr_lib.finetune.fused_lora import FusedLinear, fused_lora
from ebr_lib.finetune.speed import fast_training
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.loading import load_model


def _adapted(folder, *, dtype=torch.float32, **knobs):
    model = load_model(str(folder), device="cpu", dtype=dtype)
    add_lora(model, **({"r": 4, "alpha": 8, "dropout": 0.0} | knobs))
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # as added it is zero, and A would get no gradient
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return model.train()


def _step(model):
    """Outputs and the adapter's gradients of one forward and backward."""
    torch.manual_seed(3)
    features = {"input_ids": torch.arange(5, 29).view(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    out = model(features)["sentence_embedding"].float()
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return out.detach(), gradients


@pytest.mark.parametrize("kind", ["bert", "xlm-r", "qwen2", "modernbert"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_pefts(tiny_models, kind, dropout):
    model = _adapted(tiny_models(kind), dropout=dropout)
    wanted, wanted_gradients = _step(model)
    with fused_lora(model):
        assert any(type(module) is FusedLinear for module in model.modules())
        found, gradients = _step(model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_over_a_bfloat16_base_it_rounds_no_more_than_the_base_does(tiny_bert):
    exact, exact_gradients = _step(_adapted(tiny_bert))
    model = _adapted(tiny_bert, dtype=torch.bfloat16)
    pefts, pefts_gradients = _step(model)
    with fused_lora(model):
        found, gradients = _step(model)
    assert float((found - exact).norm()) < 1.5 * float((pefts - exact).norm())
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    ours, theirs = (_gap(found, exact_gradients) for found in (gradients, pefts_gradients))
    assert ours < 1.5 * theirs


def _gap(gradients, wanted):
    return sum(float((gradient - wanted[name]).square().sum()) for name, gradient in gradients.items()) ** 0.5


def test_layers_are_pefts_again_afterwards(tiny_bert):
    model = _adapted(tiny_bert)
    before = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), fast_training(model):
        raise KeyboardInterrupt
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("change", ["dora", "disabled", "merged", "autocast"])
def test_what_it_does_not_know_is_left_to_peft(tiny_bert, monkeypatch, change):
    model = _adapted(tiny_bert, dora=change == "dora")
    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        if change == "disabled":
            layer.enable_adapters(False)
        if change == "merged":
            layer.merge()
    monkeypatch.setattr("ebr_lib.finetune.fused_lora.LoraFunction.apply", None)
    features = {"input_ids": torch.arange(5, 29).view(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    with fused_lora(model), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert model(features)["sentence_embedding"].isfinite().all()
