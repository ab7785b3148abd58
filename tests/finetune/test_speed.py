"""Faster training: fused LoRA layers give PEFT's outputs and gradients; cheap dropout follows dropout's law."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ebr_lib.finetune.speed import FusedLinear, fast_training, fused_lora, quick_dropout
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.attention import attention
from ebr_lib.model.loading import load_model

STOCK = functional.dropout


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


def test_layers_are_pefts_after_training(tiny_bert):
    model = _adapted(tiny_bert)
    before = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), fast_training(model):
        raise KeyboardInterrupt
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("change", ["dora", "disabled", "merged", "autocast"])
def test_other_layers_are_left_to_peft(tiny_bert, monkeypatch, change):
    model = _adapted(tiny_bert, dora=change == "dora")
    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        if change == "disabled":
            layer.enable_adapters(False)
        if change == "merged":
            layer.merge()
    monkeypatch.setattr("ebr_lib.finetune.speed.LoraFunction.apply", None)
    features = {"input_ids": torch.arange(5, 29).view(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    with fused_lora(model), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert model(features)["sentence_embedding"].isfinite().all()


# --- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_has_the_rate_and_the_scale(p):
    torch.manual_seed(0)
    with quick_dropout():
        out = torch.nn.Dropout(p)(torch.ones(400_001))
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.003)  # five standard deviations at p = 0.1
    assert float(out.mean()) == pytest.approx(1, abs=0.006)
    torch.testing.assert_close(out[out > 0].unique(), torch.tensor([1 / (1 - p)]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_draws_are_independent(dtype):
    torch.manual_seed(0)
    with quick_dropout():
        kept = (functional.dropout(torch.ones(200_000, dtype=dtype), 0.5) > 0).float()
    for step in (1, 2, 3, 4):
        both = float((kept[:-step] * kept[step:]).mean())
        assert both == pytest.approx(0.25, abs=0.005)


def test_a_seed_gives_the_same_draws_and_its_gradient_is_the_mask():
    x = torch.ones(1000, requires_grad=True)
    with quick_dropout():
        torch.manual_seed(3)
        one = functional.dropout(x, 0.3)
        torch.manual_seed(3)
        other = functional.dropout(x, 0.3)
    assert torch.equal(one, other)
    one.sum().backward()
    assert torch.equal(x.grad, one.detach())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    with quick_dropout():
        assert torch.equal(functional.dropout(torch.ones(5), p), torch.full((5,), 1 - p))
        assert torch.equal(functional.dropout(torch.ones(5), 0.5, training=False), torch.ones(5))


def test_checkpointing_repeats_the_same_draws():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 8))
    x = torch.randn(5, 8)
    gradients = []
    with quick_dropout():
        for again in (False, True):
            torch.manual_seed(1)
            layer.zero_grad()
            out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            out.square().sum().backward()
            gradients.append([weight.grad.clone() for weight in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_attention_and_dropout_are_restored_after_an_interrupt(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu")
    config = model.transformers_model.config
    with pytest.raises(KeyboardInterrupt), fast_training(model), attention(model, "eager"):
        assert config._attn_implementation == "eager"
        assert functional.dropout is not STOCK
        raise KeyboardInterrupt
    assert config._attn_implementation == "sdpa"
    assert functional.dropout is STOCK
