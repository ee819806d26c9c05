"""Bounds against truth that is known from the construction, in float64."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    leading_triplets,
    orthonormalize,
    singular_values,
    spectral_norm_interval,
    vector_angle_bound,
)
from spectral_lightning.testing import matrix_with_spectrum


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def measured(weight, k=2, num_passes=12):
    """Interval of a weight that has been measured until only rounding is left."""
    m, n = weight.shape
    start = torch.randn(1, min(k, m, n), n, generator=rng(), dtype=weight.dtype)
    found = leading_triplets([weight], start, num_passes=num_passes)
    low, high = spectral_norm_interval(
        found.values[:, 0], found.residual, num_terms=max(m, n), dtype=weight.dtype
    )
    return low.item(), found.values[0, 0].item(), high.item()


SHAPES = [(1, 1), (1, 300), (300, 1), (4, 4), (33, 40), (512, 64), (64, 4096), (8192, 48)]
KINDS = {
    # Sums of equal terms round in one direction: the worst case that was found.
    "constant": lambda m, n: torch.full((m, n), 0.1),
    "positive": lambda m, n: torch.rand(m, n, generator=rng()),
    "identity": lambda m, n: torch.eye(m, n) * math.pi,
    "rank_one": lambda m, n: matrix_with_spectrum(
        torch.tensor([3.0]), (m, n), generator=rng(), dtype=torch.float32
    ),
    "spike": lambda m, n: torch.randn(m, n, generator=rng()) + 9.0,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_never_takes_the_truth_out_of_the_interval(kind, shape):
    weight = KINDS[kind](*shape)
    truth = singular_values(weight.double())[0].item()
    low, _, high = measured(weight)
    assert low <= truth <= high


def test_rounding_is_at_least_ten_times_what_is_measured():
    eps = torch.finfo(torch.float32).eps
    for kind, shape in [("constant", (8192, 48)), ("constant", (64, 4096)), ("spike", (512, 64))]:
        weight = KINDS[kind](*shape)
        truth = singular_values(weight.double())[0].item()
        error = abs(measured(weight)[1] - truth) / truth
        assert error <= 2 / 10 * math.sqrt(max(shape)) * eps


@pytest.mark.parametrize("seed", range(20))
def test_a_singular_value_lies_within_the_residual_of_any_unit_vector(seed):
    weight = torch.randn(7, 5, generator=rng(seed), dtype=torch.float64)
    found = leading_triplets(
        [weight], torch.randn(1, 1, 5, generator=rng(seed), dtype=torch.float64), num_passes=1
    )
    distance = (torch.linalg.svdvals(weight) - found.values[0, 0]).abs().min()
    assert distance <= found.residual[0]


def test_width_is_the_residual_plus_rounding_on_both_sides():
    low, high = spectral_norm_interval(
        torch.tensor([2.0]), torch.tensor([0.5]), num_terms=100, dtype=torch.float32
    )
    rounding = 2 * 2 * 10 * torch.finfo(torch.float32).eps  # of a value of 2
    assert low.item() == pytest.approx(2 - rounding, abs=1e-12, rel=1e-6)
    assert high.item() == pytest.approx(2.5 + rounding, rel=1e-6)


def test_zero_stays_zero_and_nan_stays_nan():
    low, high = spectral_norm_interval(
        torch.tensor([0.0, math.nan]), torch.tensor([0.0, math.nan]), num_terms=4, dtype=torch.half
    )
    assert low[0] == high[0] == 0
    assert low[1].isnan()
    assert high[1].isnan()


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.01, 0.1])
@pytest.mark.parametrize("second", [0.1, 0.5, 0.9])
def test_a_vector_is_never_further_away_than_the_bound(angle, second):
    values = torch.tensor([1.0, second, 0.05], dtype=torch.float64)
    for seed in range(5):
        right = orthonormalize(torch.randn(6, 3, generator=rng(seed), dtype=torch.float64))
        left = orthonormalize(torch.randn(8, 3, generator=rng(seed + 9), dtype=torch.float64))
        weight = left * values @ right.mT
        v = math.cos(angle) * right[:, 0] + math.sin(angle) * right[:, 1]
        value = (weight @ v).norm()
        residual = (weight.mT @ (weight @ v) / value - value * v).norm()
        bound = vector_angle_bound(residual[None], (value - second).abs()[None])
        assert bound >= angle - 1e-12


def test_nothing_is_known_of_a_vector_whose_gap_is_closed_or_not_a_number():
    bound = vector_angle_bound(
        torch.tensor([0.5, 0.5, math.nan, 0.5]), torch.tensor([0.5, 0.1, 1.0, math.nan])
    )
    torch.testing.assert_close(bound, torch.full((4,), math.pi / 2))
