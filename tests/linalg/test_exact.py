"""Exact singular values: matrices of a chosen spectrum, so that no SVD judges an SVD."""

import math

import pytest
import torch

from spectral_lightning.linalg import exact, singular_values
from spectral_lightning.testing import MATRIX_CASES, matrix_with_spectrum

ROUTES = ["auto", "gram", "qr", "svd"]
EPS = torch.finfo(torch.float64).eps
# Factor c of the Gram route's docstring: squares are off by up to c * eps * sigma_max^2. Measured
# 1 to 69 over graded and clustered spectra up to 1376 x 512.
GRAM_FACTOR = 70


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def graded(condition, num_values):
    return torch.logspace(0, -math.log10(condition), num_values, dtype=torch.float64)


def one_small(condition, num_values):
    values = torch.ones(num_values, dtype=torch.float64)
    values[-1] = 1 / condition
    return values


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", MATRIX_CASES)
def test_every_route_finds_the_chosen_values(name, method):
    case = MATRIX_CASES[name]
    found = singular_values(case.build(rng()), method=method)
    truth = case.spectrum()
    # The Gram route's floor, sqrt(c * eps) = 1e-7 of the largest value, holds for all of them.
    atol = math.sqrt(GRAM_FACTOR * EPS) if method == "gram" else 1e-13
    assert found.shape == truth.shape
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=0, atol=atol * max(truth.max().item(), 1.0))


@pytest.mark.parametrize("method", ROUTES)
def test_values_descend_and_are_never_negative(method):
    weight = matrix_with_spectrum(graded(1e12, 20), (40, 20), generator=rng())
    found = singular_values(weight, method=method)
    assert (found >= 0).all()
    assert (found.diff() <= 0).all()


@pytest.mark.parametrize("spectrum", [graded, one_small])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(32, 32), (96, 40), (40, 96)])
def test_gram_loses_half_of_the_condition_squared(shape, condition, spectrum):
    truth = spectrum(condition, min(shape))
    found = singular_values(matrix_with_spectrum(truth, shape, generator=rng()), method="gram")
    limit = GRAM_FACTOR * EPS / 2 * (truth[0] / truth).square()
    assert ((found / truth - 1).abs() <= limit + 1e-14).all()


def test_gram_says_nothing_about_values_below_its_floor():
    truth = one_small(1e9, 40)
    found = singular_values(matrix_with_spectrum(truth, (60, 40), generator=rng()), method="gram")
    assert abs(found[-1] / truth[-1] - 1) > 0.5
    assert found[-1] <= math.sqrt(GRAM_FACTOR * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_stored_values_are_read_to_float32_rounding(shape, dtype):
    stored = matrix_with_spectrum(graded(1e3, min(shape)), shape, generator=rng(), dtype=dtype)
    truth = singular_values(stored.double(), method="svd")
    found = singular_values(stored)
    assert found.dtype == torch.float32
    # Half a unit in the last place of float32 is 6e-8; the float64 Gram matrix adds nothing.
    torch.testing.assert_close(found.double(), truth, rtol=7e-8, atol=1e-9)


def test_auto_is_more_accurate_than_a_float32_svd():
    stored = matrix_with_spectrum(graded(1e4, 96), (96, 96), generator=rng(), dtype=torch.float32)
    truth = singular_values(stored.double(), method="svd")
    auto = (singular_values(stored).double() - truth).abs().max()
    svd = (singular_values(stored, method="svd").double() - truth).abs().max()
    # Measured: 3e-8 against 3e-7, for a largest value of 1.
    assert auto <= 4e-8
    assert auto < svd / 3


def test_float64_keeps_float64_accuracy_where_gram_would_not():
    truth = graded(1e10, 30)
    for shape in [(30, 30), (200, 30)]:
        found = singular_values(matrix_with_spectrum(truth, shape, generator=rng()))
        torch.testing.assert_close(found, truth, rtol=0, atol=30 * EPS)


def test_auto_chooses_by_dtype_and_shape():
    assert exact.cheapest_route(64, 64, torch.float32) == "gram"
    assert exact.cheapest_route(4096, 64, torch.float32) == "gram"
    assert exact.cheapest_route(255, 64, torch.float64) == "svd"
    assert exact.cheapest_route(256, 64, torch.float64) == "qr"


def test_auto_makes_no_svd_of_a_float32_weight(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("svdvals was called")

    monkeypatch.setattr(torch.linalg, "svdvals", refuse)
    assert singular_values(torch.eye(3)).tolist() == [1.0, 1.0, 1.0]


def test_gram_is_summed_over_blocks_of_rows_without_a_seam():
    truth = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    weight = matrix_with_spectrum(truth, (2500, 3), generator=rng())
    torch.testing.assert_close(singular_values(weight, method="gram"), truth, rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150, 1e300])
def test_squares_never_overflow_or_vanish(scale, method):
    truth = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    weight = matrix_with_spectrum(truth, (5, 3), generator=rng()) * scale
    found = singular_values(weight, method=method)
    torch.testing.assert_close(found / scale, truth, rtol=1e-12, atol=0)


def test_values_of_a_transpose_are_the_same_bits():
    weight = torch.randn(12, 7, generator=rng())
    assert torch.equal(singular_values(weight), singular_values(weight.mT))


@pytest.mark.parametrize("method", ROUTES)
def test_a_parameter_is_read_without_a_graph(method):
    weight = torch.nn.Parameter(torch.eye(3))
    assert not singular_values(weight, method=method).requires_grad


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad, method):
    weight = torch.ones(2, 4, 3)
    weight[1, 2, 1] = bad
    with pytest.raises(ValueError, match=r"`weight` must be finite, got NaN or infinity"):
        singular_values(weight, method=method)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 3)])
def test_an_empty_weight_is_refused(shape):
    with pytest.raises(ValueError, match="`weight` must not be empty, got shape"):
        singular_values(torch.ones(shape))


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_weight_that_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="`weight` must have at least two dimensions"):
        singular_values(torch.ones(shape))


@pytest.mark.bad_input
def test_an_integer_weight_is_refused():
    with pytest.raises(ValueError, match=r"must have a floating-point dtype, got torch\.int64"):
        singular_values(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.bad_input
def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'gram', 'qr', 'svd'"):
        singular_values(torch.ones(2, 2), method="lu")
