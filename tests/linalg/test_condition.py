"""Condition numbers, judged by chosen spectra and by float64 values of what is stored."""

import math

import pytest
import torch

from spectral_lightning.linalg import condition, condition_number, singular_values
from spectral_lightning.testing import MATRIX_CASES, matrix_with_spectrum

ROUTES = ["auto", "gram", "inverse"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def graded(kappa, size):
    return torch.logspace(0, -math.log10(kappa), size, dtype=torch.float64)


def one_small(kappa, size):
    values = torch.ones(size, dtype=torch.float64)
    values[-1] = 1 / kappa
    return values


def clustered(kappa, size):
    """Both ends crowded: half the values within 10 % of each end."""
    low = torch.linspace(1.1, 1.0, size - size // 2, dtype=torch.float64) / kappa
    return torch.cat([torch.linspace(1.0, 0.9, size // 2, dtype=torch.float64), low])


def evenly_spaced(kappa, size):
    return torch.linspace(1.0, 1 / kappa, size, dtype=torch.float64)


SPECTRA = [graded, one_small, clustered, evenly_spaced]


def stored_condition(weight):
    values = singular_values(weight.double(), method="svd")
    return values[..., 0] / values[..., -1]


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", MATRIX_CASES)
def test_every_route_finds_the_chosen_condition(name, method):
    case = MATRIX_CASES[name]
    spectrum = case.spectrum()
    truth = spectrum[..., 0] / spectrum[..., -1]
    truth = truth.nan_to_num(math.inf, posinf=math.inf)  # 0 / 0 of the zero matrix
    found = condition_number(case.build(rng()), method=method)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kappa", [3.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(48, 48), (96, 40), (40, 96)])
def test_within_one_per_cent_of_a_stored_float32_weight(shape, kappa, spectrum, method):
    values = spectrum(kappa, min(shape))
    weight = matrix_with_spectrum(values, shape, generator=rng(), dtype=torch.float32)
    found = condition_number(weight, method=method)
    # Promised 1e-2; measured at most 7e-4 (Gram at 1e6).
    torch.testing.assert_close(found.double(), stored_condition(weight), rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kappa", [3e6, 1e8, 1e10, 1e12])
def test_float64_weights_are_right_far_beyond_the_reach_of_a_gram_matrix(kappa, spectrum, method):
    weight = matrix_with_spectrum(spectrum(kappa, 40), (60, 40), generator=rng())
    found = condition_number(weight, method=method)
    # Measured at most 4e-4; rounding of the weight itself gives 1e-4 at 1e12.
    torch.testing.assert_close(found, stored_condition(weight), rtol=2e-3, atol=0)


@pytest.mark.parametrize("spectrum", [clustered, evenly_spaced])
def test_no_random_start_is_certified_wrongly(spectrum):
    weight = matrix_with_spectrum(spectrum(50.0, 64), (64, 64), generator=rng())
    for seed in range(60):
        found = condition_number(weight, method="inverse", generator=rng(seed)).item()
        assert 50.0 / 1.01 <= found <= 50.0 * (1 + 1e-12)


def test_gaussian_matrices_with_a_closed_gap_are_read_right():
    for seed in range(20):
        weight = torch.randn(80, 64, generator=rng(seed))
        found = condition_number(weight, method="inverse")
        assert found.item() == pytest.approx(stored_condition(weight).item(), rel=1e-4)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_singular_matrix_is_infinitely_ill_conditioned(dtype, method):
    weight = torch.randn(3, 20, 12, dtype=torch.float64, generator=rng()).to(dtype)
    weight[0, :, 4] = weight[0, :, 9]
    weight[1, :, 4] = 0
    weight[2] = 0
    found = condition_number(weight, method=method)
    assert found.tolist() == [math.inf] * 3


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("scale", [1e-150, 1e150, 1e300])
def test_condition_does_not_depend_on_scale(scale, method):
    weight = matrix_with_spectrum(graded(1e3, 10), (15, 10), generator=rng())
    found = condition_number(weight * scale, method=method).item()
    assert found == pytest.approx(1e3, rel=1e-6)


def test_a_given_norm_takes_the_place_of_the_computed_one():
    weight = torch.randn(2, 9, 6, dtype=torch.float64, generator=rng())
    norm = singular_values(weight)[..., 0]
    given = condition_number(weight, spectral_norm=norm, method="inverse")
    torch.testing.assert_close(given, stored_condition(weight), rtol=1e-9, atol=0)
    doubled = condition_number(weight, spectral_norm=2 * norm, method="inverse")
    torch.testing.assert_close(doubled, 2 * given)


def test_a_batch_is_read_matrix_by_matrix():
    weight = torch.randn(2, 3, 10, 8, generator=rng())
    found = condition_number(weight)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert found[i, j] == condition_number(weight[i, j])


def test_the_same_weight_gives_the_same_bits():
    weight = torch.randn(50, 50, generator=rng())
    first, second = (condition_number(weight, method="inverse") for _ in range(2))
    assert torch.equal(first, second)


def test_a_given_generator_is_the_one_that_is_used():
    generator = rng()
    before = generator.get_state()
    condition_number(torch.eye(3), method="inverse", generator=generator)
    assert not torch.equal(generator.get_state(), before)


def test_a_parameter_is_read_without_a_graph():
    weight = torch.nn.Parameter(torch.eye(3))
    assert not condition_number(weight, method="inverse").requires_grad


def test_auto_takes_the_qr_only_where_it_pays():
    assert condition.cheapest_condition_route(512, 512) == "inverse"
    assert condition.cheapest_condition_route(640, 512) == "gram"
    assert condition.cheapest_condition_route(256, 256) == "gram"


def test_a_looser_tolerance_needs_fewer_steps():
    weight = torch.randn(256, 256, generator=rng())
    condition_number(weight, method="inverse", rtol=0.2, max_iters=20)
    with pytest.raises(torch.linalg.LinAlgError):
        condition_number(weight, method="inverse", rtol=0.01, max_iters=20)


def test_too_few_steps_are_reported_rather_than_read():
    weight = torch.randn(30, 30, generator=rng())
    sentence = r"were not certified to rtol=0\.01 within max_iters=3 steps; raise either"
    with pytest.raises(torch.linalg.LinAlgError, match=sentence):
        condition_number(weight, method="inverse", max_iters=3)


@pytest.mark.parametrize("method", ROUTES)
def test_a_weight_that_is_not_finite_is_refused(method):
    with pytest.raises(ValueError, match="`weight` must be finite"):
        condition_number(torch.tensor([[1.0, math.nan]]), method=method)


def test_options_outside_their_range_are_refused():
    weight = torch.eye(2)
    with pytest.raises(ValueError, match=r"`rtol` must be in \(0, 1\), got 1\.0\."):
        condition_number(weight, rtol=1.0)
    with pytest.raises(ValueError, match=r"`max_iters` must be >= 1, got 0\."):
        condition_number(weight, max_iters=0)
    with pytest.raises(ValueError, match="`weight` must not be empty"):
        condition_number(torch.ones(0, 2))


@pytest.mark.bad_input
def test_arguments_that_do_not_fit_are_refused():
    weight = torch.ones(2, 3, 3)
    with pytest.raises(ValueError, match=r"`spectral_norm` must have shape \(2,\), one value per"):
        condition_number(weight, spectral_norm=torch.ones(3))
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'gram', 'inverse', got"):
        condition_number(weight, method="svd")
    with pytest.raises(ValueError, match="`weight` must have at least two dimensions"):
        condition_number(torch.ones(3))
