"""The projected problem: bases of rows that are fine, nearly dependent, equal, zero or NaN."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    leading_eigenpairs,
    orthonormalize,
    orthonormalize_rows,
    rayleigh_ritz,
)
from spectral_lightning.testing import RefuseHostSync

EPS = torch.finfo(torch.float32).eps


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def ritz(Q, W, k):
    """Ritz values and coefficients of a batch of matrices `W` on the rows of bases `Q`."""
    rows, images = Q.double(), (Q @ W.mT).double()
    return rayleigh_ritz(rows @ rows.mT, images @ images.mT, k, dtype=Q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 9), (3, 40), (8, 8)])
def test_rows_become_orthonormal(k, n, dtype):
    rows = randn(5, k, n, dtype=dtype)
    Q = orthonormalize_rows(rows)
    error = torch.linalg.matrix_norm(Q @ Q.mT - torch.eye(k, dtype=dtype), 2)
    condition = torch.linalg.cond(rows / rows.norm(dim=-1, keepdim=True))
    # The shift of the Cholesky factor, 64 roundings, times the squared condition number.
    assert (error <= 64 * torch.finfo(dtype).eps * condition**2).all()


def test_span_of_the_rows_is_kept():
    rows = randn(1, 3, 20)
    Q, reference = orthonormalize_rows(rows)[0], orthonormalize(rows[0].mT)
    torch.testing.assert_close(Q.mT @ Q, reference @ reference.mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_length_of_a_row_does_not_matter(scale):
    rows = randn(1, 3, 20, dtype=torch.float32)
    scaled = rows * torch.tensor([1.0, scale, 1.0])[:, None]
    torch.testing.assert_close(orthonormalize_rows(scaled), orthonormalize_rows(rows))


@pytest.mark.parametrize("rows", [torch.zeros(1, 2, 5), torch.ones(1, 4, 5)], ids=["zero", "equal"])
def test_dependent_rows_come_out_short_and_finite(rows):
    Q = orthonormalize_rows(rows)
    assert Q.isfinite().all()
    assert (torch.linalg.vector_norm(Q, dim=-1) <= 1 + 4 * EPS).all()


def test_a_zero_row_stays_zero_beside_others():
    Q = orthonormalize_rows(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]]]))
    torch.testing.assert_close(Q, torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.6, 0.8]]]))


@pytest.mark.parametrize("basis", ["orthonormal", "oblique"])
def test_ritz_values_are_those_of_the_projected_matrix(basis):
    W, rows = randn(12, 9), randn(4, 9, seed=1)
    Q = orthonormalize(rows.mT).mT if basis == "orthonormal" else rows
    values, coefficients = ritz(Q[None], W[None], 3)
    truth = torch.linalg.svdvals(W @ orthonormalize(rows.mT))[:3]
    torch.testing.assert_close(values[0], truth, rtol=1e-10, atol=0)
    vectors = coefficients[0] @ Q
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(3).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors @ W.mT, dim=-1), truth)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_nearly_dependent_rows_never_make_a_value_overshoot(noise):
    """Twenty equal rows once gave values a million times too large."""
    for seed in range(5):
        W = randn(1, 30, 20, seed=seed, dtype=torch.float32)
        rows = randn(1, 1, 20, seed=9, dtype=torch.float32)
        rows = rows + noise * randn(1, 20, 20, seed=seed, dtype=torch.float32)
        for Q in (rows / rows.norm(dim=-1, keepdim=True), orthonormalize_rows(rows)):
            values, _ = ritz(Q, W, 2)
            truth = torch.linalg.svdvals(W.double())[0, 0]
            # Measured: at most 2 roundings above.
            assert (values[0, 0] <= truth * (1 + 8 * EPS)).all()
            span = torch.linalg.svdvals(W[0].double() @ Q[0, :1].double().mT)[0]
            assert (values[0, 0] >= span * (1 - 64 * EPS)).all()


def test_orthonormal_rows_lose_nothing_to_the_shift():
    W = randn(1, 7, 5, dtype=torch.float32)
    values, _ = ritz(torch.eye(5)[None], W, 5)
    truth = torch.linalg.svdvals(W.double())
    assert ((values - truth).abs() <= 2 * EPS * truth[:, :1]).all()


def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone():
    gram = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    squares = torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64)).repeat(3, 1, 1)
    gram[0, 0, 0], squares[2, 1, 1] = math.nan, math.inf
    values, _ = rayleigh_ritz(gram, squares, 2, dtype=torch.float32)
    assert values.isnan().all(dim=1).tolist() == [True, False, True]
    torch.testing.assert_close(values[1], torch.tensor([3.0, 2.0], dtype=torch.float64))


def test_a_projection_of_zero_has_values_of_zero():
    values, coefficients = ritz(torch.eye(3)[None], torch.zeros(1, 3, 3), 2)
    assert values.tolist() == [[0.0, 0.0]]
    assert coefficients.isfinite().all()


def clustered(p, gap, num_matrices=20):
    """Matrices whose six largest eigenvalues lie `gap` apart below 1; eigenvalues descending."""
    count = min(p, 6)
    values = 0.9 * torch.rand(num_matrices, p, generator=rng(), dtype=torch.float64)
    values[:, :count] = 1 - gap * torch.arange(count)
    basis = orthonormalize(randn(num_matrices, p, p, seed=1))
    return basis @ torch.diag_embed(values) @ basis.mT, values.sort(descending=True).values


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 1e-3, 0.1])
@pytest.mark.parametrize("p", [2, 12, 48])
def test_eigenpairs_by_products_agree_with_eigh_however_close_the_values(p, gap):
    matrix, truth = clustered(p, gap)
    values, vectors = leading_eigenpairs(matrix, min(p, 4))
    assert (values.diff(dim=-1) <= 0).all()
    # Measured over 3,000 matrices: at most 2.2e-5.
    torch.testing.assert_close(values, truth[:, : min(p, 4)], rtol=0, atol=2.5e-5)
    assert (values[:, 0] <= truth[:, 0] + 1e-14).all()
    torch.testing.assert_close(
        torch.linalg.vector_norm(vectors, dim=-1), torch.ones_like(values), rtol=1e-9, atol=0
    )


def test_eigenvectors_by_products_are_those_of_eigh_where_values_are_apart():
    matrix = torch.diag_embed(torch.tensor([[1.0, 4.0, 2.0], [5.0, 3.0, 0.0]], dtype=torch.float64))
    values, vectors = leading_eigenpairs(matrix, 3)
    assert values[:, :2].tolist() == [[4.0, 2.0], [5.0, 3.0]]
    torch.testing.assert_close(
        vectors[:, :2].abs(),
        torch.tensor([[[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]], dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


def test_eigenpairs_of_zero_are_zero_and_finite():
    values, vectors = leading_eigenpairs(torch.zeros(1, 3, 3, dtype=torch.float64), 2)
    assert values.tolist() == [[0.0, 0.0]]
    assert vectors.isfinite().all()


def test_nothing_waits_for_the_device_but_eigh_on_a_cpu():
    rows, matrix = randn(2, 3, 8), clustered(6, 0.1)[0]
    with RefuseHostSync():
        orthonormalize_rows(rows)
        leading_eigenpairs(matrix, 3)
