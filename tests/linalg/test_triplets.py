"""Triplets with both vectors: matrices with a chosen spectrum, half precision, and bad input."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    leading_eigenpairs,
    leading_singular_triplets,
    smallest_singular_triplets,
)
from spectral_lightning.testing import MATRIX_CASES, RefuseHostSync, matrix_with_spectrum

UNBATCHED = {name: case for name, case in MATRIX_CASES.items() if not case.batch}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def start_for(weight, k=2):
    m, n = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return randn(min(k, m, n), n, seed=7, dtype=dtype)


def leading(weight, k=2, num_passes=40):
    return leading_singular_triplets(weight, start_for(weight, k), num_passes=num_passes)[0]


def assert_triplets_of(weight, found, *, atol):
    """Vectors of values above rounding are orthonormal, and `W v = sigma u`, `W^T u = sigma v`."""
    real = found.values > 1e-6 * torch.linalg.matrix_norm(weight, 2)
    left, values, right = found.left[:, real], found.values[real], found.right[:, real]
    identity = torch.eye(int(real.sum()), dtype=left.dtype)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=atol)
    torch.testing.assert_close(right.mT @ right, identity, rtol=0, atol=atol)
    torch.testing.assert_close(weight @ right, left * values, rtol=0, atol=atol)
    torch.testing.assert_close(weight.mT @ left, right * values, rtol=0, atol=atol)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", UNBATCHED)
def test_leading_triplets_are_those_of_the_chosen_spectrum(name, k):
    weight, truth = UNBATCHED[name].build(rng()), UNBATCHED[name].spectrum()
    found = leading(weight, k)
    k = min(k, len(truth))
    assert [tuple(part.shape) for part in found] == [
        (len(weight), k),
        (k,),
        (weight.shape[1], k),
    ]
    torch.testing.assert_close(found.values, truth[:k], rtol=1e-9, atol=1e-12)
    assert_triplets_of(weight, found, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", UNBATCHED)
def test_smallest_triplets_are_those_of_the_chosen_spectrum(name, k):
    weight, truth = UNBATCHED[name].build(rng()), UNBATCHED[name].spectrum()
    k = min(k, len(truth))
    found = smallest_singular_triplets(weight, k)
    torch.testing.assert_close(found.values, truth[-k:], rtol=1e-9, atol=1e-14)
    identity = torch.eye(k, dtype=torch.float64)
    for vectors in (found.left, found.right):  # those of a value of 0 too
        torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight @ found.right, found.left * found.values, rtol=0, atol=1e-13)
    torch.testing.assert_close(weight.mT @ found.left, found.right * found.values)


def test_all_triplets_together_are_the_matrix():
    weight = UNBATCHED["wide"].build(rng())
    for found in (leading(weight, 5), smallest_singular_triplets(weight, 5)):
        whole = (found.left * found.values) @ found.right.mT
        torch.testing.assert_close(whole, weight, rtol=0, atol=1e-10)


def test_warm_start_follows_a_moving_weight_with_one_pass():
    values = torch.cat([torch.tensor([5.0, 3.0]), torch.linspace(1.0, 0.1, 18)])
    weight = matrix_with_spectrum(values, (30, 20), generator=rng())
    found, start = leading_singular_triplets(weight, start_for(weight), num_passes=10)
    for step in range(5):
        weight = weight + 1e-3 * randn(30, 20, seed=step)
        found, start = leading_singular_triplets(weight, start, num_passes=1)
        truth = torch.linalg.svdvals(weight)[:2]
        # Measured: at most 3.1e-6.
        torch.testing.assert_close(found.values, truth, rtol=1e-5, atol=0)
        assert (found.values <= truth * (1 + 1e-12)).all()


def test_a_zero_value_has_a_left_vector_of_zero():
    found = leading(torch.zeros(4, 6), 2)
    assert found.values.tolist() == [0.0, 0.0]
    assert not found.left.any()
    assert found.right.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    weight = randn(24, 16).to(dtype)
    truth = torch.linalg.svdvals(weight.double())
    first, last = leading(weight, 3), smallest_singular_triplets(weight, 3)
    for found in (first, last):
        assert {part.dtype for part in found} == {torch.float32}
    # Measured: 2e-7 and 8e-8; products in half precision would be wrong by 1e-3.
    torch.testing.assert_close(first.values, truth[:3].float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(last.values, truth[-3:].float(), rtol=1e-6, atol=0)


def test_float64_is_kept():
    weight = randn(9, 6)
    for found in (leading(weight), smallest_singular_triplets(weight, 2)):
        assert {part.dtype for part in found} == {torch.float64}


def test_autocast_of_the_run_changes_nothing():
    weight = randn(24, 16, dtype=torch.float32)
    expected = leading(weight, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = leading(weight, 3)
    for part, whole in zip(found, expected, strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("num_passes", [1, 3])
def test_leading_values_of_a_matrix_that_is_not_finite_are_nan(bad, num_passes):
    weight = randn(8, 6)
    weight[3, 2] = bad
    assert not leading(weight, num_passes=num_passes).values.isfinite().any()


@pytest.mark.parametrize("num_passes", [1, 4])
def test_leading_triplets_never_wait_for_the_device(monkeypatch, num_passes):
    def by_products(matrix):
        values, rows = leading_eigenpairs(matrix, matrix.shape[-1])
        return values.flip(-1), rows.flip(-2).mT

    weight = randn(40, 30, dtype=torch.float32)
    expected = leading(weight, num_passes=num_passes)
    # The route of an accelerator, where `eigh` would wait for its error code.
    monkeypatch.setattr(torch.linalg, "eigh", by_products)
    start = start_for(weight)
    with RefuseHostSync():
        found, _ = leading_singular_triplets(weight, start, num_passes=num_passes)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=0)


def test_global_random_state_and_arguments_stay_untouched():
    weight = torch.nn.Parameter(randn(8, 6))
    start = start_for(weight)
    before = [torch.get_rng_state(), weight.clone(), start.clone()]
    found, _ = leading_singular_triplets(weight, start, num_passes=3)
    last = smallest_singular_triplets(weight, 2)
    assert all(map(torch.equal, [torch.get_rng_state(), weight, start], before))
    assert not any(part.requires_grad for part in (*found, *last))


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (1, 5), (4,), (1, 1, 4)])
def test_a_start_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"`start` must have shape \(k, 4\) with 1 <= k <= 2 to"):
        leading_singular_triplets(torch.ones(2, 4), torch.ones(shape), num_passes=1)


@pytest.mark.parametrize(
    ("weight", "start"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_start_in_another_dtype_is_refused(weight, start):
    needed = torch.promote_types(weight, torch.float32)
    with pytest.raises(ValueError, match=rf"`start` must be {needed} for a weight of {weight}"):
        leading_singular_triplets(
            torch.ones(2, 4, dtype=weight), torch.ones(1, 4, dtype=start), num_passes=1
        )


def test_no_passes_are_refused():
    with pytest.raises(ValueError, match=r"`num_passes` must be >= 1, got 0\."):
        leading_singular_triplets(torch.eye(3), torch.ones(1, 3), num_passes=0)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_number_of_triplets_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, 3\], got {k}\."):
        smallest_singular_triplets(torch.ones(3, 5), k)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"`weight` must have at least two dimensions .* got shape \(3,\)"),
        (torch.ones(2, 3, 3), r"`weight` must be one matrix \(m, n\), got shape \(2, 3, 3\)"),
        (torch.ones(0, 3), r"`weight` must not be empty, got shape \(0, 3\)"),
        (torch.ones(3, 3, dtype=torch.int64), r"`weight` must have a floating-point dtype"),
    ],
)
def test_what_is_not_one_matrix_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        smallest_singular_triplets(weight, 1)
    with pytest.raises(ValueError, match=message):
        leading_singular_triplets(weight, torch.ones(1, 3), num_passes=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_smallest_triplets_of_a_matrix_that_is_not_finite_are_refused(bad):
    weight = torch.eye(3)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"`weight` must be finite, got NaN or infinity"):
        smallest_singular_triplets(weight, 1)
