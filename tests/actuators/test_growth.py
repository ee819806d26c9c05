"""Probes measure what a layer cannot follow, and leave no trace."""

import copy

import pytest
import torch

from spectral_lightning.actuators import GrowthProbe, fresh_rows, grow_
from spectral_lightning.nn import LowRankLinear

N, M, RANK = 24, 18, 4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(mode="sliced", capacity=16):
    torch.manual_seed(0)
    return LowRankLinear(N, M, RANK, capacity=capacity, mode=mode).double()


def backward(layer, gradient):
    """Backpropagate so that the gradient of the weight is the one given."""
    layer.zero_grad()
    out = layer(torch.eye(N, dtype=torch.float64))
    (out * gradient.mT).sum().backward()


def unreachable(layer, gradient):
    left, right = (f.detach() for f in layer.factors())
    U, V = torch.linalg.qr(left).Q, torch.linalg.qr(right.mT).Q
    return gradient - U @ (U.mT @ gradient) - (gradient - U @ (U.mT @ gradient)) @ V @ V.mT


@pytest.mark.parametrize("mode", ["sliced", "masked"])
def test_probes_change_neither_the_function_nor_the_other_gradients(mode):
    layer, twin, x = make_layer(mode), make_layer(mode), randn(7, N)
    probe = GrowthProbe(layer, 6)
    assert torch.allclose(layer(x), twin(x), atol=1e-14)
    for each in (layer, twin):
        backward(each, randn(M, N, seed=3))
    assert layer.left_factor.grad[:, RANK : RANK + 6].any()
    probe.take_(layer)
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-13)
    probe.end_(layer)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in twin.state_dict().items())


def test_the_energy_seen_is_that_of_the_unreachable_gradient():
    """Unbiased: times ``(n - rank) / probes`` it is the energy on average."""
    layer, gradient = make_layer(), randn(M, N, seed=3)
    truth = unreachable(layer, gradient).square().sum().item()
    found = []
    for seed in range(500):
        probe = GrowthProbe(layer, 4, seed=seed)
        lengths = probe.rows.norm(dim=1).mean()
        backward(layer, gradient)
        probe.take_(layer)
        found.append(probe.energy.item() / lengths.item() ** 2 * (N - RANK) / 4)
        probe.end_(layer)
    assert sum(found) / 500 == pytest.approx(truth, rel=0.05)


def test_the_lift_is_one_for_noise_and_the_number_of_steps_for_what_stays():
    lifts = []
    for seed in range(60):
        layer = make_layer()
        probe = GrowthProbe(layer, 8, seed=seed)
        for step in range(16):
            backward(layer, randn(M, N, seed=1000 * seed + step))
            probe.take_(layer)
        lifts.append(probe.lift().item())
    assert sum(lifts) / 60 == pytest.approx(1, abs=0.05)
    layer = make_layer()
    probe = GrowthProbe(layer, 8)
    for _ in range(16):
        backward(layer, randn(M, N, seed=1))
        probe.take_(layer)
    assert probe.lift().item() == pytest.approx(16)


def test_what_the_factors_can_follow_does_not_count():
    layer = make_layer()
    probe = GrowthProbe(layer, 8)
    left, right = (f.detach() for f in layer.factors())
    backward(layer, randn(M, RANK, seed=1) @ right + left @ randn(RANK, N, seed=2))
    probe.take_(layer)
    assert probe.energy.item() < 1e-20


def test_the_first_direction_is_what_the_mean_gradient_asks_for():
    layer = make_layer()
    wanted = fresh_rows(layer, 1, generator=torch.Generator().manual_seed(9))
    probe = GrowthProbe(layer, 12)
    for step in range(8):
        backward(layer, randn(M, 1, seed=5) @ wanted + 0.05 * randn(M, N, seed=step))
        probe.take_(layer)
    rows = probe.directions()
    probe.end_(layer)
    share = (probe.rows @ wanted.mT).norm() / probe.rows[0].norm() / wanted.norm()
    cosine = (rows[0] @ wanted[0]).abs() / rows[0].norm() / wanted.norm()
    assert cosine > 0.95 * share  # all of it that the probes can see
    grow_(layer, None, fresh_rows(layer, 2, directions=rows))
    assert layer.rank == RANK + 2


def test_a_window_goes_on_from_a_checkpoint():
    layer = make_layer()
    probe = GrowthProbe(layer, 8)
    for step in range(5):
        backward(layer, randn(M, N, seed=step))
        probe.take_(layer)
    twin = make_layer()
    twin.load_state_dict(layer.state_dict())
    other = GrowthProbe.from_state_dict(twin, copy.deepcopy(probe.state_dict()))
    for step in range(5, 9):
        for each, own in ((layer, probe), (twin, other)):
            backward(each, randn(M, N, seed=step))
            own.take_(each)
    assert torch.equal(probe.lift(), other.lift())
    assert torch.equal(probe.directions(), other.directions())


def test_a_window_ends_where_a_smaller_capacity_has_no_room_for_it():
    layer, twin = make_layer(), make_layer(capacity=8)
    probe = GrowthProbe(layer, 8)
    twin.load_state_dict(layer.state_dict())
    assert twin.right_factor[RANK:].any()
    assert GrowthProbe.from_state_dict(twin, probe.state_dict()) is None
    assert not twin.right_factor[RANK:].any()
    assert not twin.gate[RANK:].any()


def test_a_full_layer_has_no_room_for_probes():
    with pytest.raises(
        ValueError, match="`layer` must have a capacity above its rank, got 4 and 4"
    ):
        GrowthProbe(make_layer(capacity=4), 2)


def test_more_probes_than_room_are_refused_by_the_layer():
    with pytest.raises(ValueError, match=r"`num` must be in \[0, capacity - rank = 12\], got 13"):
        make_layer().set_probes(13)


def test_gradients_that_are_not_finite_are_told():
    layer = make_layer()
    probe = GrowthProbe(layer, 3)
    backward(layer, torch.full((M, N), torch.nan, dtype=torch.float64))
    probe.take_(layer)
    assert probe.lift().isnan()
    assert not layer.left_factor.grad[:, RANK : RANK + 3].any()
