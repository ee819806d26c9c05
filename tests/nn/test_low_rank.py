"""A layer of two thin factors: its function, its initial values, its storage."""

import pytest
import torch
from torch import nn

from spectral_lightning.nn import LowRankLinear, with_capacity


def filled(*args, **options):
    torch.manual_seed(0)
    layer = LowRankLinear(*args, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("mode", ["sliced", "masked"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "capacity", "quantum"), [(3, 9, 2), (9, 9, 4), (1, 5, 8)])
def test_it_is_the_linear_layer_of_its_product(mode, bias, rank, capacity, quantum):
    options = {"bias": bias, "capacity": capacity, "mode": mode, "quantum": quantum}
    layer = filled(12, 10, rank, **options).double()
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    dense = layer.to_linear()
    assert isinstance(dense, nn.Linear)
    assert torch.allclose(layer(x), dense(x), atol=1e-12)
    assert torch.linalg.matrix_rank(dense.weight) == rank
    assert torch.equal(dense.weight, layer.spectral_weight())


def test_gradients_are_those_of_the_product():
    layer = filled(6, 5, 3, bias=True, capacity=4).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(x, left, right, bias):
        parameters = {"left_factor": left, "right_factor": right, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    parameters = (layer.left_factor, layer.right_factor, layer.bias)
    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_inactive_components_get_no_gradient():
    layer = filled(8, 8, 3, capacity=8, mode="masked")
    layer(torch.randn(4, 8)).square().sum().backward()
    assert not layer.left_factor.grad[:, 3:].any()
    assert not layer.right_factor.grad[3:].any()
    assert layer.left_factor.grad[:, :3].any()


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
@pytest.mark.parametrize("init", ["balanced", "spectral"])
def test_outputs_are_as_large_as_inputs_at_every_rank(rank, shape, init):
    m, n = shape
    layer = filled(n, m, rank, init=init)
    x = torch.randn(2000, n, generator=torch.Generator().manual_seed(1))
    assert layer(x).var().item() == pytest.approx(1, abs=0.25 if rank == 8 else 0.1)


def test_the_balanced_gain_is_one_on_average():
    torch.manual_seed(0)
    x = torch.randn(500, 256)
    for rank in (8, 64):
        found = [LowRankLinear(256, 256, rank)(x).var().item() for _ in range(20)]
        assert sum(found) / 20 == pytest.approx(1, abs=0.1)


def test_v10_outputs_have_variance_rank_over_out_features():
    torch.manual_seed(0)
    x = torch.randn(500, 512)
    for m in (512, 2048):
        found = LowRankLinear(512, m, 64, init="v10")(x).var().item()
        assert found == pytest.approx(64 / m, rel=0.15)


def test_the_gain_multiplies_the_weight():
    for init in ("balanced", "spectral", "v10"):
        weights = [filled(16, 12, 4, init=init, gain=g).spectral_weight() for g in (1.0, 0.5)]
        assert torch.allclose(0.5 * weights[0], weights[1], atol=1e-6)


def test_a_generator_alone_decides_the_values():
    layers = [filled(16, 12, 4, init=init) for init in ("balanced", "spectral", "v10")]
    for layer in layers:
        state, found = torch.get_rng_state(), []
        for _ in range(2):
            layer.reset_parameters(torch.Generator().manual_seed(3))
            found.append(layer.left_factor.detach().clone())
        assert torch.equal(*found)
        assert torch.equal(state, torch.get_rng_state())


def test_a_smaller_rank_multiplies_fewer_numbers():
    from torch.utils.flop_counter import FlopCounterMode

    x, flops = torch.randn(4, 64), {}
    for mode in ("sliced", "masked"):
        layer = filled(64, 64, 16, capacity=64, mode=mode)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops[mode] = counter.get_total_flops()
    assert flops == {"sliced": 2 * 4 * 16 * 128, "masked": 2 * 4 * 64 * 128}


def test_the_rank_is_part_of_the_checkpoint():
    layer, other = filled(12, 10, 3, capacity=8), filled(12, 10, 8, capacity=8)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 12)
    assert other.rank == 3
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("capacity", [3, 5, 10])
def test_checkpoints_load_into_another_capacity(capacity):
    layer, x = filled(12, 10, 3, bias=True, capacity=8), torch.randn(4, 12)
    with torch.no_grad():
        layer.right_factor[3:] = 7.0  # what probes may leave
    other = filled(12, 10, 2, bias=True, capacity=capacity)
    other.load_state_dict(layer.state_dict())
    assert (other.rank, other.capacity) == (3, capacity)
    assert torch.allclose(other(x), layer(x), atol=1e-6)
    assert torch.allclose(with_capacity(layer, capacity)(x), layer(x), atol=1e-6)


def test_a_checkpoint_of_a_rank_above_the_capacity_is_refused():
    layer = filled(12, 10, 5)
    with pytest.raises(
        ValueError, match="`capacity` must be at least the rank of the checkpoint, 5"
    ):
        nn.ModuleDict({"fc": filled(12, 10, 3)}).load_state_dict(
            nn.ModuleDict({"fc": layer}).state_dict()
        )


def test_the_squared_norm_needs_no_product_and_has_its_gradient():
    layer = filled(12, 10, 3, capacity=5).double()
    layer.frobenius_norm_squared().backward()
    U, V = layer.left_factor.detach()[:, :3], layer.right_factor.detach()[:3]
    assert layer.frobenius_norm_squared().item() == pytest.approx((U @ V).square().sum().item())
    assert torch.allclose(layer.left_factor.grad[:, :3], 2 * U @ (V @ V.mT))
    assert torch.allclose(layer.right_factor.grad[:3], 2 * (U.mT @ U) @ V)


def test_half_precision_and_autocast_run():
    x = torch.randn(4, 12)
    layer = filled(12, 10, 3, capacity=8, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.spectral_weight().dtype == torch.float32
    half = filled(12, 10, 3, capacity=8, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"`rank` must be in \[1, capacity = 4\], got 0"),
        ({"rank": 5}, r"`rank` must be in \[1, capacity = 4\], got 5"),
        ({"capacity": 11}, r"`capacity` must be in \[1, 10\], as the weight is \(10, 12\), got 11"),
        ({"capacity": 0}, r"`capacity` must be in \[1, 10\]"),
        ({"mode": "packed"}, "`mode` must be one of sliced, masked, got 'packed'"),
        ({"init": "zero"}, "`init` must be one of balanced, spectral, v10, got 'zero'"),
        ({"quantum": 0}, "`quantum` must be >= 1, got 0"),
        ({"gain": 0.0}, r"`gain` must be finite and > 0, got 0\.0"),
        ({"in_features": 0}, "`in_features` must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRankLinear(
            **({"in_features": 12, "out_features": 10, "rank": 2, "capacity": 4} | arguments)
        )


def test_a_rank_outside_the_capacity_cannot_be_set():
    with pytest.raises(ValueError, match=r"`rank` must be in \[1, capacity = 4\], got 5"):
        filled(12, 10, 2, capacity=4).set_rank(5)
