"""Linear layers with a dense base and two factors."""

import pytest
import torch
from torch import nn

from spectral_lightning.linalg import singular_triplets
from spectral_lightning.nn import FactoredLinear, add_factors

SHAPES = [(24, 24), (40, 16), (16, 40)]


def layer_of(shape, dtype=torch.float32, rank_deficient=False):
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    layer = FactoredLinear(n, m, dtype=dtype)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if rank_deficient:
        weight = weight[:, :4] @ torch.randn(4, n, generator=generator, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    return layer


def split(layer, rank):
    U, S, V = singular_triplets(layer.spectral_weight())
    layer.split_(U[:, -rank:], S[-rank:], V[:, -rank:])
    return U, S, V


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank_deficient", [False, True])
def test_base_and_factors_make_the_weight(shape, rank_deficient):
    layer = layer_of(shape, rank_deficient=rank_deficient)
    before = layer.spectral_weight().detach().clone()
    U, S, V = split(layer, 10)
    assert (layer.spectral_weight() - before).norm() <= 1e-6 * before.norm()
    k = len(S) - 10
    principal = U[:, :k] * S[:k] @ V[:, :k].mT
    assert torch.allclose(layer.weight, principal, atol=1e-4)
    columns, rows = layer.left_factor.norm(dim=0), layer.right_factor.norm(dim=1)
    assert torch.allclose(columns, rows, atol=1e-6)
    assert torch.allclose(columns[:10], S[-10:].sqrt(), atol=1e-5)
    assert not columns[10:].any()


def test_weight_is_the_parameter_and_w_the_whole():
    layer = layer_of((24, 24))
    assert isinstance(layer.weight, nn.Parameter)
    before = layer.W.detach().clone()
    split(layer, 10)
    assert torch.allclose(layer.W, before, atol=1e-5)
    assert not torch.allclose(layer.weight, before, atol=1e-2)


def test_many_round_trips_do_not_drift():
    layer = layer_of((24, 24))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    ranks = torch.randint(1, 23, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    for rank in ranks:
        split(layer, rank)
        assert torch.allclose(layer(x), before, atol=2e-4)
        layer.merge_()
    assert torch.allclose(layer(x), before, atol=2e-4)
    assert (layer(x) - before).norm() < 1e-5 * before.norm()
    assert not layer.left_factor.any()


def test_the_gradient_of_the_base_is_that_of_the_dense_weight():
    layer = layer_of((24, 16), torch.float64)
    split(layer, 6)
    twin = layer.to_linear()
    x = torch.randn(7, 16, dtype=torch.float64)
    for model in (layer, twin):
        for _ in range(3):  # accumulated
            model(x).square().sum().backward()
    G = twin.weight.grad
    assert torch.allclose(layer.weight.grad, G)
    assert torch.allclose(layer.left_factor.grad, G @ layer.right_factor.detach().mT)
    assert torch.allclose(layer.right_factor.grad, layer.left_factor.detach().mT @ G)


def test_the_factors_gradients_cannot_show_the_principal_block():
    """Why the gradient is taken from the base: ``dB A + B dA`` is blind where it matters."""
    layer = layer_of((24, 24), torch.float64)
    U, _, V = split(layer, 14)
    layer(torch.randn(50, 24, dtype=torch.float64)).square().sum().backward()
    B, A = layer.left_factor, layer.right_factor
    direction = B.grad @ A + B @ A.grad
    seen, true = (U[:, :10].mT @ X @ V[:, :10] for X in (direction, layer.weight.grad))
    assert seen.norm() < 1e-10 * true.norm()


def test_factors_of_zero_stay_zero_and_change_nothing():
    linear = nn.Linear(8, 8)
    layer = FactoredLinear.from_linear(linear)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), linear(x))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert not layer.left_factor.any()
    assert not layer.right_factor.any()


def test_autocast_does_not_round_the_product():
    layer = layer_of((24, 24))
    split(layer, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.spectral_weight(), layer.spectral_weight().float())
        assert layer.spectral_weight().dtype == torch.float32


def test_a_model_is_converted_with_its_own_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)).eval()
    weights = [model[0].weight, model[2].weight]
    x = torch.randn(3, 8)
    before = model(x)
    assert add_factors(model, set(model)) == ["0", "2"]
    assert model[0].weight is weights[0]
    assert model[2].weight is weights[1]
    assert torch.equal(model(x), before)
    assert not model[0].training
    split(model[2], 2)
    assert torch.allclose(model[2].to_linear()(x), model[2](x))


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"`max_rank` must be in \[1, 4\], got 5"):
        FactoredLinear(8, 4, max_rank=5)
    layer = layer_of((8, 8))
    U, S, V = singular_triplets(layer.weight)
    with pytest.raises(ValueError, match="`values` must be at most max_rank = 7 values, got 8"):
        layer.split_(U, S, V)
