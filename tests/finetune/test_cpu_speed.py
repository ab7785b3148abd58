"""Faster training on a CPU: dropout's law, and that all is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ebr_lib.finetune.speed import fast_training, quick_dropout
from ebr_lib.model.attention import attention
from ebr_lib.model.loading import load_model

STOCK = functional.dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rate_and_scale(p):
    torch.manual_seed(0)
    with quick_dropout():
        out = torch.nn.Dropout(p)(torch.ones(400_001))
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.003)  # five standard deviations at p = 0.1
    assert float(out.mean()) == pytest.approx(1, abs=0.006)
    torch.testing.assert_close(out[out > 0].unique(), torch.tensor([1 / (1 - p)]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_are_independent(dtype):
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
def test_ends_of_the_range(p):
    with quick_dropout():
        assert torch.equal(functional.dropout(torch.ones(5), p), torch.full((5,), 1 - p))
        assert torch.equal(functional.dropout(torch.ones(5), 0.5, training=False), torch.ones(5))


def test_checkpointing_finds_the_same_draws():
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


def test_all_is_as_before_afterwards(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu")
    config = model.transformers_model.config
    with pytest.raises(KeyboardInterrupt), fast_training(model), attention(model, "eager"):
        assert config._attn_implementation == "eager"
        assert functional.dropout is not STOCK
        raise KeyboardInterrupt
    assert config._attn_implementation == "sdpa"
    assert functional.dropout is STOCK
