"""Decay of a product of factors: the gradient of its norm, and what it moves."""

import pytest
import torch

from spectral_lightning.actuators import add_frobenius_decay_
from spectral_lightning.nn import LowRankLinear


def make_layer():
    torch.manual_seed(0)
    return LowRankLinear(10, 8, 3, capacity=6).double()


@pytest.mark.parametrize("fading", [1.0, 0.4])
def test_it_is_the_gradient_of_half_the_squared_norm(fading):
    layer = make_layer()
    with torch.no_grad():
        layer.gate[2] = fading
    (0.5 * 0.3 * layer.frobenius_norm_squared()).backward()
    truth = [p.grad.clone() for p in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_frobenius_decay_(layer, 0.3)
    for parameter, expected in zip(layer.parameters(), truth, strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-12)


def test_it_shrinks_the_product_and_its_stable_rank_does_not_fall():
    layer = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    before = torch.linalg.svdvals(layer.spectral_weight().detach())[:3]
    for _ in range(50):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        add_frobenius_decay_(layer, 1.0)
        optimizer.step()
    after = torch.linalg.svdvals(layer.spectral_weight().detach())[:3]
    ranks = [(v.square().sum() / v[0].square()).item() for v in (before, after)]
    assert after.norm() < 0.95 * before.norm()
    assert ranks[1] >= ranks[0] - 1e-6


def test_a_layer_without_gradients_is_left_alone():
    layer = make_layer()
    add_frobenius_decay_(layer, 1.0)
    assert all(parameter.grad is None for parameter in layer.parameters())
