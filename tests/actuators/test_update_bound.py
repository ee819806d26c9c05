"""Changes of factors are scaled down until the weight moves no further than allowed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.actuators import bound_update_, copied_factors
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.testing.host_sync import RefuseHostSync


def make_layer(m=12, n=10, rank=4, capacity=6, dtype=torch.float64, gate=1.0):
    torch.manual_seed(0)
    layer = LowRankLinear(n, m, rank, capacity=capacity).to(dtype)
    layer.gate[rank - 1] = gate
    return layer


@torch.no_grad()
def move_(layer, *sizes, seed=1):
    """Add noise of a spectral norm to each active factor, as an optimizer might have done."""
    generator = torch.Generator().manual_seed(seed)
    for part, size in zip(active(layer), sizes, strict=True):
        noise = torch.randn(part.shape, generator=generator).double()
        part += (size * noise / norm(noise)).to(part.dtype)


def active(layer):
    return layer.left_factor.detach()[:, : layer.rank], layer.right_factor.detach()[: layer.rank]


def weight(layer):
    return torch.mm(*(factor.detach().double() for factor in layer.factors()))


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2).item()


def limit(layer, bound):
    left, right = layer.factors()
    return min(1.0, bound / (norm(left.detach()) + norm(right.detach()) + 1))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 8),
    sizes=st.tuples(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4)),
    bound=st.floats(1e-4, 1e2),
    gate=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_weight_never_moves_further_than_allowed(shape, rank, sizes, bound, gate, seed):
    rank = min(rank, *shape)
    layer = make_layer(*shape, rank, None, gate=gate)
    before, old = copied_factors(layer), weight(layer)
    move_(layer, *sizes, seed=seed)
    bound_update_(layer, before, bound)
    assert norm(weight(layer) - old) <= bound * (1 + 1e-12) + 1e-13


@pytest.mark.parametrize("sizes", [(50.0, 50.0), (50.0, 1e-3), (1e-3, 50.0)])
def test_a_change_keeps_its_direction_and_is_no_smaller_than_it_has_to_be(sizes):
    layer = make_layer(m=300, n=200, rank=64, capacity=64)
    before, allowed = copied_factors(layer), limit(layer, 0.5)
    move_(layer, *sizes)
    moved = [new - old for new, old in zip(active(layer), before, strict=True)]
    scales = bound_update_(layer, before, 0.5)
    for new, old, change, scale, size in zip(
        active(layer), before, moved, scales, sizes, strict=True
    ):
        assert torch.allclose(new - old, scale * change, atol=1e-14)
        assert 0.96 * min(size, allowed) < norm(new - old) <= min(size, allowed) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_step_within_the_bound_stays_to_the_bit(dtype):
    layer = make_layer(dtype=dtype)
    before, allowed = copied_factors(layer), limit(layer, 2.0)
    move_(layer, 0.6 * allowed, 0.9 * allowed)
    smallest = before[0].abs().argmin()
    active(layer)[0][smallest // 4, smallest % 4] = 1e-20  # lost if the change is added once more
    stepped = [part.clone() for part in active(layer)]
    assert bound_update_(layer, before, 2.0).tolist() == [1, 1]
    for part, expected in zip(active(layer), stepped, strict=True):
        assert torch.equal(part, expected)


def test_what_a_gate_shuts_off_does_not_count():
    layer = make_layer(gate=0.0)
    before = copied_factors(layer)
    with torch.no_grad():
        layer.left_factor[:, 3] += 100
    assert bound_update_(layer, before, 0.1).tolist() == [1, 1]


def test_unused_components_are_left_alone():
    layer = make_layer()
    before = copied_factors(layer)
    assert [part.shape for part in before] == [(12, 4), (4, 10)]
    move_(layer, 50.0, 50.0)
    with torch.no_grad():
        layer.right_factor[4:] = 7
    bound_update_(layer, before, 0.1)
    assert layer.right_factor[4:].eq(7).all()
    assert not layer.left_factor[:, 4:].any()


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)]
)
def test_stored_factors_add_one_rounding_and_never_go_further_than_the_step(dtype, unit):
    layer = make_layer(m=80, n=60, rank=16, capacity=16, dtype=dtype)
    before, old = copied_factors(layer), weight(layer)
    (U, V) = (part.double() for part in before)
    move_(layer, 30.0, 30.0)
    stepped = [part.clone() for part in active(layer)]
    bound_update_(layer, before, 0.2)
    rounding = unit * (U.norm() * norm(V) + norm(U) * V.norm()).item()
    assert norm(weight(layer) - old) <= 0.2 + rounding
    for new, first, last in zip(active(layer), before, stepped, strict=True):
        assert (new >= first.minimum(last)).all()
        assert (new <= first.maximum(last)).all()
        assert not torch.equal(new, first)


def test_factors_of_zeros_and_steps_of_nothing_are_no_special_case():
    layer = make_layer()
    assert bound_update_(layer, copied_factors(layer), 0.1).tolist() == [1, 1]
    with torch.no_grad():
        layer.left_factor.zero_()
        layer.right_factor.zero_()
    before = copied_factors(layer)
    move_(layer, 50.0, 50.0)
    bound_update_(layer, before, 0.1)
    assert 0 < norm(weight(layer)) <= 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stays_as_it_is(value):
    layer = make_layer()
    before = copied_factors(layer)
    move_(layer, 50.0, 50.0)
    with torch.no_grad():
        layer.left_factor[0, 0] = value
    stepped = [part.clone() for part in active(layer)]
    assert bound_update_(layer, before, 0.1).tolist() == [1, 1]
    for part, expected in zip(active(layer), stepped, strict=True):
        assert torch.equal(part.nan_to_num(), expected.nan_to_num())


def test_the_host_never_waits():
    layer = make_layer(dtype=torch.float32)
    with RefuseHostSync():
        before = copied_factors(layer)
    move_(layer, 50.0, 50.0)
    with RefuseHostSync():
        scales = bound_update_(layer, before, 0.1)
    assert (scales < 1).all()


def test_factors_of_another_rank_are_refused():
    layer = make_layer()
    before = copied_factors(layer)
    layer.set_rank(5)
    with pytest.raises(ValueError, match="`before` must hold the 5 active components of the layer"):
        bound_update_(layer, before, 0.1)
