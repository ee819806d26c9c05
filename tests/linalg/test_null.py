"""Gaussian null values against simulated matrices and closed forms."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    effective_rank,
    gaussian_condition_number,
    gaussian_effective_rank,
    gaussian_participation_ratio,
    gaussian_smallest_value,
    gaussian_spectral_norm,
    gaussian_stable_rank,
    marchenko_pastur_density,
    marchenko_pastur_quantile,
    participation_ratio,
    singular_values,
    stable_rank,
)


def simulated(m, n, num_matrices, std=1.0):
    generator = torch.Generator().manual_seed(0)
    weight = std * torch.randn(num_matrices, m, n, dtype=torch.float64, generator=generator)
    return singular_values(weight)


# Ratios of the simulated mean to the null value, as the docstrings quote them.
@pytest.mark.parametrize(
    ("shape", "num_matrices", "ratio", "tolerance"),
    [
        ((16, 16), 300, 0.93, 0.02),
        ((64, 64), 60, 0.97, 0.01),
        ((256, 64), 20, 0.98, 0.01),
        ((512, 512), 2, 0.99, 0.01),
    ],
)
def test_spectral_norm_lies_just_below_its_null(shape, num_matrices, ratio, tolerance):
    norm = simulated(*shape, num_matrices, std=0.3)[:, 0].mean().item()
    assert norm / gaussian_spectral_norm(*shape, std=0.3) == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize(
    ("shape", "num_matrices", "ratio", "tolerance"),
    [((64, 32), 100, 1.10, 0.03), ((68, 64), 100, 1.47, 0.1), ((128, 8), 100, 1.06, 0.03)],
)
def test_smallest_value_lies_above_its_null(shape, num_matrices, ratio, tolerance):
    smallest = simulated(*shape, num_matrices, std=0.3)[:, -1].mean().item()
    null = gaussian_smallest_value(*shape, std=0.3)
    assert smallest / null == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize(
    ("shape", "num_matrices", "ratio", "tolerance"),
    [
        ((64, 32), 100, 0.87, 0.03),
        ((32, 64), 100, 0.87, 0.03),
        ((68, 64), 100, 0.66, 0.1),
        ((1024, 512), 1, 0.97, 0.01),
    ],
)
def test_condition_number_lies_below_its_null(shape, num_matrices, ratio, tolerance):
    values = simulated(*shape, num_matrices)
    kappa = (values[:, 0] / values[:, -1]).median().item()
    assert kappa / gaussian_condition_number(*shape) == pytest.approx(ratio, abs=tolerance)


def test_square_null_is_the_median_of_a_heavy_tail():
    size = 24
    values = simulated(size, size, 4000)
    kappa = values[:, 0] / values[:, -1]
    # The standard error of a sample median is 2 % here; the rest is finite size.
    assert kappa.median().item() == pytest.approx(gaussian_condition_number(size, size), rel=0.06)
    assert gaussian_condition_number(size, size) == pytest.approx(3.67 * size, rel=1e-3)
    smallest = values[:, -1].median().item()
    assert smallest == pytest.approx(gaussian_smallest_value(size, size), rel=0.06)
    # P(kappa > x n) is about 2 / x.
    assert (kappa > 40 * size).double().mean().item() == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("shape", "num_matrices", "ratio", "tolerance"),
    [((16, 16), 300, 1.18, 0.03), ((64, 64), 60, 1.06, 0.02), ((512, 512), 3, 1.015, 0.01)],
)
def test_stable_rank_lies_just_above_its_null(shape, num_matrices, ratio, tolerance):
    rank = stable_rank(simulated(*shape, num_matrices)).mean().item()
    assert rank / gaussian_stable_rank(*shape) == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (64, 16), (16, 200)])
def test_participation_ratio_matches_its_null(shape):
    ratio = participation_ratio(simulated(*shape, 200)).mean().item()
    assert ratio == pytest.approx(gaussian_participation_ratio(*shape), rel=0.01)


@pytest.mark.parametrize(
    ("shape", "tolerance"), [((16, 16), 0.02), ((64, 64), 0.005), ((64, 16), 0.005)]
)
def test_effective_rank_matches_its_null(shape, tolerance):
    rank = effective_rank(simulated(*shape, 200)).mean().item()
    assert rank == pytest.approx(gaussian_effective_rank(*shape), rel=tolerance)


def test_effective_rank_of_a_square_matrix_is_that_of_the_quarter_circle():
    # The singular values of a square matrix follow the quarter circle on [0, 2].
    s = torch.linspace(0, 2, 200001, dtype=torch.float64)
    density = (4 - s.square()).clamp_min(0).sqrt() / math.pi
    mean = torch.trapezoid(density * s, s).item()
    assert mean == pytest.approx(8 / (3 * math.pi), rel=1e-6)
    entropy = torch.trapezoid(density * torch.special.entr(s), s).item()
    expected = 1000 * mean * math.exp(entropy / mean)
    assert gaussian_effective_rank(1000, 1000) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "null",
    [
        gaussian_spectral_norm,
        gaussian_smallest_value,
        gaussian_condition_number,
        gaussian_stable_rank,
        gaussian_participation_ratio,
        gaussian_effective_rank,
    ],
)
def test_null_values_do_not_depend_on_the_orientation(null):
    assert null(96, 40) == pytest.approx(null(40, 96), rel=1e-12)
    with pytest.raises(ValueError, match="`m` and `n` must be >= 1, got 0 and 3"):
        null(0, 3)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_single_row_has_rank_one_and_condition_one(size):
    assert gaussian_condition_number(1, size) == 1.0
    assert gaussian_stable_rank(size, 1) == 1.0
    assert gaussian_participation_ratio(1, size) == 1.0
    assert gaussian_effective_rank(1, size) == 1.0


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_spread_that_is_not_positive_is_refused(std):
    for null in (gaussian_spectral_norm, gaussian_smallest_value):
        with pytest.raises(ValueError, match="`std` must be positive and finite, got"):
            null(4, 3, std=std)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
def test_density_integrates_to_one_with_mean_one(ratio):
    x = torch.linspace(0, 4, 400001, dtype=torch.float64)
    density = marchenko_pastur_density(x, ratio)
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-4)
    assert torch.trapezoid(density * x, x).item() == pytest.approx(1, abs=1e-4)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    assert (density[(x < low) | (x > high)] == 0).all()
    assert (density[(x > low * 1.001) & (x < high * 0.999)] > 0).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_quantiles_invert_the_density(ratio):
    probability = torch.linspace(0, 1, 11, dtype=torch.float64)
    squares = marchenko_pastur_quantile(probability, ratio)
    assert (squares.diff() > 0).all()
    # Integrate over s = sqrt(x), which has no singular edge at ratio 1.
    for share, square in zip(probability.tolist(), squares.sqrt().tolist(), strict=True):
        s = torch.linspace(0, square, 100001, dtype=torch.float64)
        mass = torch.trapezoid(marchenko_pastur_density(s.square(), ratio) * 2 * s, s).item()
        assert mass == pytest.approx(share, abs=2e-5)


def test_quantiles_of_a_square_matrix_are_right_to_1e_5():
    # With x = 4 sin(t / 2)^2 the share below x is (t + sin t) / pi.
    t = torch.linspace(0.001, math.pi - 0.001, 50, dtype=torch.float64)
    found = marchenko_pastur_quantile((t + torch.sin(t)) / math.pi, 1.0)
    torch.testing.assert_close(found, 4 * torch.sin(t / 2).square(), rtol=0, atol=1e-5)


def test_quantiles_are_the_singular_values_of_a_gaussian_matrix():
    values = simulated(200, 100, 30).mean(dim=0)
    shares = (torch.arange(100, dtype=torch.float64).flip(0) + 0.5) / 100
    expected = (200 * marchenko_pastur_quantile(shares, 0.5)).sqrt()
    # Measured 0.8 % in the bulk and 3 % at the lower edge.
    torch.testing.assert_close(values[5:-5], expected[5:-5], rtol=0.01, atol=0)
    torch.testing.assert_close(values, expected, rtol=0.05, atol=0)


def test_quantiles_outside_zero_and_one_have_no_value():
    found = marchenko_pastur_quantile(torch.tensor([-0.1, 0.5, 1.1, math.nan]), 0.5)
    assert found.isnan().tolist() == [True, False, True, True]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_ratio_outside_its_range_is_refused(ratio):
    for law in (marchenko_pastur_density, marchenko_pastur_quantile):
        with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\], got"):
            law(torch.ones(2), ratio)
