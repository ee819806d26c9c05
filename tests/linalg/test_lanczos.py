"""Leading triplets: matrices with a chosen spectrum, a naive twin, and every way to go wrong."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    leading_eigenpairs,
    leading_triplets,
    orthonormalize,
    spectral_norm_interval,
)
from spectral_lightning.testing import MATRIX_CASES, RefuseHostSync, matrix_with_spectrum

EPS = torch.finfo(torch.float32).eps
UNBATCHED = {name: case for name, case in MATRIX_CASES.items() if not case.batch}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def start_for(weights, k=2, seed=7):
    m, n = weights[0].shape
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    return randn(len(weights), min(k, m, n), n, seed=seed, dtype=dtype)


def block_power_iteration(weight, start, num_passes):
    """Naive twin: subspace iteration with a QR at every step, then Rayleigh-Ritz by an SVD."""
    V = orthonormalize(start.mT)
    for _ in range(num_passes - 1):
        V = orthonormalize(weight.mT @ (weight @ V))
    left, values, rotation = torch.linalg.svd(weight @ V, full_matrices=False)
    return left, values, V @ rotation.mT


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_one_pass_is_a_step_of_block_power_iteration(shape, k):
    weight, start = randn(*shape), randn(1, k, shape[1], seed=1)
    found = leading_triplets([weight], start, num_passes=1)
    U, values, V = block_power_iteration(weight, start[0], 1)
    torch.testing.assert_close(found.values[0], values, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.Vh[0].abs(), V.mT.abs(), rtol=0, atol=1e-9)
    image = (weight.mT @ (weight @ V)).mT
    expected = image / image.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.next_start[0].abs(), expected.abs(), rtol=0, atol=1e-9)
    residual = (weight.mT @ U[:, 0] - values[0] * V[:, 0]).norm()
    torch.testing.assert_close(found.residual[0], residual, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_passes", [1, 2, 5])
@pytest.mark.parametrize("name", UNBATCHED)
def test_values_never_overshoot(name, num_passes):
    weight, truth = UNBATCHED[name].build(rng()), UNBATCHED[name].spectrum()
    found = leading_triplets([weight], start_for([weight]), num_passes=num_passes)
    assert (found.values[0] <= truth[: found.values.shape[1]] + 1e-13 * truth[0]).all()
    assert (found.values[0].diff() <= 0).all()


@pytest.mark.parametrize("name", UNBATCHED)
def test_values_converge_to_the_leading_ones(name):
    weight, truth = UNBATCHED[name].build(rng()), UNBATCHED[name].spectrum()
    found = leading_triplets([weight], start_for([weight]), num_passes=30)
    torch.testing.assert_close(found.values[0, 0], truth[0], rtol=1e-10, atol=0)
    assert found.residual[0] <= 1e-6 * truth[0]


def test_start_that_spans_everything_gives_all_values_in_one_pass():
    case = MATRIX_CASES["tall"]
    weight = case.build(rng())
    found = leading_triplets([weight], torch.eye(5, dtype=torch.float64)[None], num_passes=1)
    torch.testing.assert_close(found.values[0], case.spectrum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.linalg.vector_norm(weight @ found.Vh[0].mT, dim=0), case.spectrum()
    )


@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (12, 60), (60, 12)])
def test_more_passes_never_make_a_value_worse_even_past_the_whole_space(shape):
    weights = [randn(*shape, seed=seed) for seed in range(4)]
    start = start_for(weights, k=5)
    values = torch.stack(
        [leading_triplets(weights, start, num_passes=p).values[:, 0] for p in range(1, 14)]
    )
    assert (values.diff(dim=0) >= -1e-12 * values[1:]).all()


def test_krylov_space_converges_where_power_iteration_still_crawls():
    spectrum = torch.cat([torch.tensor([1.0, 0.99]), torch.linspace(0.98, 0.0, 78)])
    weight = matrix_with_spectrum(spectrum, (100, 80), generator=rng())
    start = randn(1, 2, 80)
    for num_passes, better in [(2, 1), (5, 2), (10, 10), (20, 1000)]:
        krylov = 1 - leading_triplets([weight], start, num_passes=num_passes).values[0, 0]
        power = 1 - block_power_iteration(weight, start[0], num_passes)[1][0]
        assert krylov <= power / better


def test_warm_start_needs_fewer_passes_than_a_random_one():
    weights = [randn(60, 50, seed=seed, dtype=torch.float32) for seed in range(5)]
    cold = leading_triplets(weights, start_for(weights), max_passes=30)
    moved = [weight + 1e-3 * randn(60, 50, seed=9, dtype=torch.float32) for weight in weights]
    warm = leading_triplets(moved, cold.next_start, max_passes=30)
    assert warm.num_passes.tolist() == [1] * 5
    assert cold.num_passes.min() >= 5


def test_passes_follow_each_matrix_and_stop_at_the_limit():
    easy = matrix_with_spectrum(torch.tensor([1.0, 0.1]), (50, 40), generator=rng())
    hard = randn(50, 40)
    found = leading_triplets([easy, hard, easy], start_for([easy] * 3), max_passes=6)
    assert found.num_passes.tolist() == [2, 6, 2]
    for i, weight in enumerate([easy, hard]):
        # The neighbours in the batch change nothing but rounding.
        alone = leading_triplets(
            [weight], start_for([easy] * 3)[i : i + 1], num_passes=found.num_passes[i].item()
        )
        torch.testing.assert_close(alone.values[0], found.values[i], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.residual[0], found.residual[i], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.next_start[0], found.next_start[i], rtol=0, atol=1e-9)


def test_tolerances_are_kept_where_no_limit_is_hit():
    weights = [randn(70, 60, seed=seed) for seed in range(10)]
    truth = torch.stack([torch.linalg.svdvals(weight)[0] for weight in weights])
    loose, tight = (
        leading_triplets(weights, start_for(weights, 6), rtol=rtol, max_passes=20)
        for rtol in (1e-2, 1e-5)
    )
    for found, rtol in [(loose, 1e-2), (tight, 1e-5)]:
        assert (found.values[:, 0] >= truth * (1 - rtol)).all()
        assert (found.residual <= 0.05 * found.values[:, 0]).all()
    assert loose.num_passes.sum() < tight.num_passes.sum()


def test_a_wide_residual_is_not_accepted_whatever_the_gap_promises():
    weights = [randn(70, 60, seed=seed) for seed in range(10)]
    for max_residual in (0.3, 0.03):
        found = leading_triplets(
            weights, start_for(weights, 6), rtol=1.0, max_residual=max_residual, max_passes=20
        )
        assert (found.residual <= max_residual * found.values[:, 0]).all()
        assert found.residual.max() > 0.01 * max_residual * found.values.max()


def test_frobenius_norm_is_measured_on_the_way():
    weights = [randn(9, 6, seed=seed, dtype=torch.float32) for seed in range(3)]
    found = leading_triplets(weights, start_for(weights), num_passes=2)
    truth = torch.stack([weight.double().norm() for weight in weights])
    torch.testing.assert_close(found.frobenius_norm, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_passes", [1, 3, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_does_not_disturb_the_others(bad, num_passes):
    weights = [randn(8, 6, seed=seed) for seed in range(3)]
    expected = leading_triplets(weights, start_for(weights), num_passes=num_passes)
    weights[1][3, 2] = bad
    found = leading_triplets(weights, start_for(weights), num_passes=num_passes)
    assert not found.frobenius_norm[1].isfinite()
    assert found.values[1].isnan().all()
    for i in (0, 2):
        for part, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(part[i], whole[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_passes", [1, 2, 5, None])
def test_a_zero_matrix_measures_zero(num_passes):
    weights = [torch.zeros(7, 5), torch.eye(7, 5)]
    found = leading_triplets(weights, start_for(weights), num_passes=num_passes)
    assert found.values[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert found.residual[0] == found.frobenius_norm[0] == 0
    assert found.next_start.isfinite().all()


@pytest.mark.parametrize("num_passes", [1, 2, 5, None])
def test_equal_start_rows_never_make_a_value_overshoot(num_passes):
    """A warm start of a rank-one weight is such a block."""
    weights = [randn(30, 20, seed=seed, dtype=torch.float32) for seed in range(3)]
    truth = torch.stack([torch.linalg.svdvals(weight.double())[0] for weight in weights])
    start = randn(3, 1, 20, seed=7, dtype=torch.float32).repeat(1, 20, 1)
    found = leading_triplets(weights, start, num_passes=num_passes)
    assert (found.values[:, 0] <= truth * (1 + 8 * EPS)).all()


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_scale_of_the_weight_does_not_matter(scale):
    weight = randn(40, 30, dtype=torch.float32)
    plain, scaled = (
        leading_triplets([factor * weight], start_for([weight]), num_passes=4)
        for factor in (1.0, scale)
    )
    torch.testing.assert_close(scaled.values / scale, plain.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.residual / scale, plain.residual, rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled.next_start.abs(), plain.next_start.abs(), rtol=0, atol=1e-3)


def test_float64_is_kept_and_half_precision_is_computed_in_float32():
    weight = randn(48, 32)
    double = leading_triplets([weight], start_for([weight], 4), num_passes=8)
    assert double.Vh.dtype == double.next_start.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored = weight.to(dtype)
        found = leading_triplets([stored], start_for([stored], 4), num_passes=8)
        truth = leading_triplets([stored.double()], start_for([weight], 4), num_passes=8)
        assert found.Vh.dtype == torch.float32
        assert found.values.dtype == torch.float64
        # Measured: 2e-8; a product in bfloat16 would be wrong by 1e-3.
        torch.testing.assert_close(found.values[:, 0], truth.values[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_rows", [12, 13])
def test_row_blocks_and_strides_change_nothing_but_rounding(monkeypatch, num_rows):
    weight = randn(num_rows, 10)
    expected = leading_triplets([weight], start_for([weight]), num_passes=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for variant in (weight, weight.mT.contiguous().mT):
        found = leading_triplets([variant], start_for([weight]), num_passes=3)
        for part, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_passes", [1, 2, 9])
def test_a_number_of_passes_chosen_beforehand_never_waits_for_the_device(monkeypatch, num_passes):
    def by_products(matrix):
        values, rows = leading_eigenpairs(matrix, matrix.shape[-1])
        return values.flip(-1), rows.flip(-2).mT

    weights = [randn(40, 30, seed=seed) for seed in range(3)]
    expected = leading_triplets(weights, start_for(weights), num_passes=num_passes)
    # The route of an accelerator, where `eigh` would wait for its error code.
    monkeypatch.setattr(torch.linalg, "eigh", by_products)
    with RefuseHostSync():
        found = leading_triplets(weights, start_for(weights), num_passes=num_passes)
    torch.testing.assert_close(found.values[:, 0], expected.values[:, 0], rtol=2e-5, atol=0)
    low, high = spectral_norm_interval(
        found.values[:, 0], found.residual, num_terms=40, dtype=torch.float64
    )
    truth = torch.stack([torch.linalg.svdvals(weight)[0] for weight in weights])
    if num_passes > 2:
        assert ((low <= truth) & (truth <= high)).all()


def test_waiting_for_residuals_is_seen_as_such():
    weights = [randn(40, 30)]
    with RefuseHostSync(), pytest.raises(AssertionError, match="makes the host wait"):
        leading_triplets(weights, start_for(weights))


def test_global_random_state_and_arguments_stay_untouched():
    weights = [torch.nn.Parameter(randn(8, 6)), torch.nn.Parameter(randn(8, 6, seed=1))]
    start = start_for(weights)
    before = [torch.get_rng_state(), start.clone(), *(weight.clone() for weight in weights)]
    found = leading_triplets(weights, start)
    after = [torch.get_rng_state(), start, *weights]
    assert all(map(torch.equal, after, before))
    assert not any(part.requires_grad for part in found)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 2), (2, 3)], r"must be matrices of one shape \(m, n\), got \[\(2, 3\), \(3, 2\)\]"),
        ([(3,)], r"`weights` must be matrices of one shape \(m, n\), got \[\(3,\)\]"),
        ([], r"`weights` must be matrices of one shape \(m, n\), got \[\]"),
    ],
)
def test_weights_of_different_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        leading_triplets([torch.ones(shape) for shape in shapes], torch.ones(len(shapes), 1, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 0, 4), (2, 1, 4), (1, 1, 5), (1, 4)])
def test_a_start_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"`start` must have shape \(1, k, 4\) with 1 <= k <= 2"):
        leading_triplets([torch.ones(2, 4)], torch.ones(shape))


@pytest.mark.parametrize("name", ["num_passes", "max_passes"])
def test_no_passes_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be >= 1, got 0\."):
        leading_triplets([torch.eye(3)], torch.ones(1, 1, 3), **{name: 0})
