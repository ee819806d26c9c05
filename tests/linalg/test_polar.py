"""Newton-Schulz: the truth is known because every matrix is built from its singular values."""

import itertools

import pytest
import torch

from spectral_lightning.linalg.polar import newton_schulz

CONVERGENT = (1.875, -1.25, 0.375)  # p(1) = 1 and p'(1) = p''(1) = 0: third order


def orthonormal(num_rows, num_cols, seed):
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(num_rows, num_cols, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def matrix_and_factors(shape, values):
    values = torch.tensor(values, dtype=torch.float64)
    left = orthonormal(shape[0], len(values), seed=1)
    right = orthonormal(shape[1], len(values), seed=2)
    return left * values @ right.mT, left, values, right


def iterate(values, num_steps, coefficients):
    """The polynomial on scalars: what the iteration does to the singular values."""
    a, b, c = coefficients
    values = values / values.norm()
    for _ in range(num_steps):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((8, 3), [5.0, 2.0, 0.1]),
        ((3, 8), [5.0, 2.0, 0.1]),
        ((4, 4), [3.0, 3.0, 3.0, 1.0]),
        ((6, 5), [2.0, 1.0]),  # rank-deficient
        ((1, 7), [4.0]),
        ((7, 1), [4.0]),
    ],
    ids=["tall", "wide", "repeated", "rank-deficient", "row", "column"],
)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_only_the_singular_values_change_and_by_the_polynomial(shape, values, num_steps):
    matrix, left, values, right = matrix_and_factors(shape, values)
    result = newton_schulz(matrix, num_steps=num_steps)
    expected = iterate(values, num_steps, (3.4445, -4.7750, 2.0315))
    torch.testing.assert_close(result, left * expected @ right.mT, atol=1e-12, rtol=0)


def test_default_brings_values_above_2e_3_of_the_norm_close_to_one():
    matrix, left, _, right = matrix_and_factors((12, 12), torch.logspace(0, -2.6, 12).tolist())
    diagonal = (left.mT @ newton_schulz(matrix) @ right).diagonal()
    assert 0.68 < diagonal.min() < diagonal.max() < 1.21


def test_convergent_coefficients_reach_the_polar_factor_with_third_order():
    matrix, left, _, right = matrix_and_factors((6, 4), [4.0, 3.0, 2.0, 1.0])
    errors = [
        (newton_schulz(matrix, num_steps=n, coefficients=CONVERGENT) - left @ right.mT).norm()
        for n in range(3, 7)
    ]
    for before, after in itertools.pairwise(errors):
        # p(1 - x) = 1 - 2.5 x^3 + ..., so each error is about 2.5 times the cube of the last.
        assert after < max(3 * before**3, 1e-14)
    assert errors[-1] < 1e-14


def test_scale_of_the_matrix_does_not_matter():
    matrix, *_ = matrix_and_factors((5, 3), [3.0, 2.0, 1.0])
    torch.testing.assert_close(newton_schulz(1e6 * matrix), newton_schulz(matrix))


def test_transpose_commutes_with_the_iteration():
    matrix, *_ = matrix_and_factors((5, 3), [3.0, 2.0, 1.0])
    torch.testing.assert_close(newton_schulz(matrix.mT), newton_schulz(matrix).mT)


def test_batch_equals_matrices_one_by_one():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64)
    result = newton_schulz(batch)
    assert result.shape == batch.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(result[i, j], newton_schulz(batch[i, j]))


def test_zero_matrix_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_non_finite_entry_spoils_only_its_own_matrix():
    batch = torch.eye(3).repeat(2, 1, 1)
    batch[0, 0, 0] = float("nan")
    result = newton_schulz(batch)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_input_is_not_changed():
    matrix = torch.eye(3)
    newton_schulz(matrix)
    assert torch.equal(matrix, torch.eye(3))


def test_gradient_is_that_of_finite_differences():
    matrix, *_ = matrix_and_factors((3, 2), [2.0, 1.0])
    assert torch.autograd.gradcheck(newton_schulz, matrix.requires_grad_())


@pytest.mark.parametrize(
    ("dtype", "result_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(dtype, result_dtype):
    assert newton_schulz(torch.eye(2, dtype=dtype)).dtype == result_dtype


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Largest errors measured over seeds 0 to 19 were 1.2e-6 and 1.8e-2; allowed is twice that.
    [(torch.float32, 2.4e-6), (torch.bfloat16, 3.6e-2)],
)
def test_error_of_low_precision_against_float64_is_bounded(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    result = newton_schulz(matrix.float(), dtype=dtype)
    assert result.dtype == dtype
    error = (result.double() - newton_schulz(matrix)).norm() / newton_schulz(matrix).norm()
    assert error < tolerance


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), "`matrix` must have at least two dimensions"),
        (torch.zeros(0, 3), "`matrix` must not be empty"),
        (torch.zeros(3, 3, dtype=torch.int64), "`matrix` must have a floating-point dtype"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(matrix)


@pytest.mark.bad_input
def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match=r"`num_steps` must be >= 1, got 0\."):
        newton_schulz(torch.eye(2), num_steps=0)
