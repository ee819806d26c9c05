"""Numbers of a spectrum: hand values, bounds, and what a zero or broken spectrum gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.linalg import (
    effective_rank,
    energy_rank,
    frobenius_norm,
    nuclear_norm,
    numerical_rank,
    participation_ratio,
    stable_rank,
)

RANKS = [stable_rank, effective_rank, participation_ratio]
NORMS = [frobenius_norm, nuclear_norm]
COUNTS = [lambda v: numerical_rank(v, rtol=0.01), energy_rank]

spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_hand_values():
    values = tensor([4.0, 2.0, 2.0, 0.0])
    assert frobenius_norm(values).item() == pytest.approx(math.sqrt(24))
    assert nuclear_norm(values).item() == 8.0
    assert stable_rank(values).item() == 1.5
    assert participation_ratio(values).item() == pytest.approx(24**2 / (256 + 16 + 16))
    # p = (1/2, 1/4, 1/4): entropy 1.5 log 2.
    assert effective_rank(values).item() == pytest.approx(2**1.5)
    assert numerical_rank(values, rtol=0.5).item() == 1
    assert numerical_rank(values, rtol=0.49).item() == 3
    assert numerical_rank(values, rtol=0.0).item() == 3


@pytest.mark.parametrize(
    ("values", "energy", "expected"),
    [
        ([1.0] * 10, 0.95, 10),
        ([1.0] * 10, 0.9, 9),
        ([1.0] * 10, 0.05, 1),
        ([3.0, 1.0, 0.0], 0.9, 1),
        ([3.0, 1.0, 0.0], 0.91, 2),
        ([3.0, 1.0, 0.0], 1.0, 2),
        ([1.0, 3.0, 0.0], 0.9, 1),
        ([5.0], 0.5, 1),
        ([0.0, 0.0], 0.95, 0),
    ],
)
def test_energy_rank_is_the_smallest_that_holds_the_share(values, energy, expected):
    assert energy_rank(tensor(values), energy).item() == expected


@given(spectra)
@settings(deadline=None, max_examples=50)
def test_energy_rank_grows_with_the_share_and_bounds_the_cut(values):
    values = tensor(sorted(values, reverse=True))
    shares = [0.1, 0.5, 0.9, 0.99, 1.0]
    counts = [energy_rank(values, share).item() for share in shares]
    assert counts == sorted(counts)
    for share, count in zip(shares, counts, strict=True):
        error = frobenius_norm(torch.cat([values[count:], tensor([0.0])])) / frobenius_norm(values)
        assert error <= math.sqrt(1 - share) + 1e-7


@pytest.mark.parametrize("rank", RANKS)
@given(values=spectra, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=50)
def test_ranks_lie_between_one_and_the_size_at_every_scale(rank, values, scale):
    found = rank(tensor(values)).item()
    assert 1 - 1e-12 <= found <= len(values) + 1e-9
    assert rank(scale * tensor(values)).item() == pytest.approx(found, rel=1e-9)
    assert rank(tensor(values[::-1])).item() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("rank", [*RANKS, *COUNTS])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_equal_values_have_full_rank_and_one_value_has_rank_one(rank, size):
    assert rank(torch.full((size,), 3.0)).item() == pytest.approx(size, rel=1e-6)
    assert rank(torch.eye(size)[0]).item() == pytest.approx(1, rel=1e-6)


@given(spectra)
@settings(deadline=None, max_examples=50)
def test_stable_rank_never_exceeds_the_participation_ratio(values):
    # sum s^4 <= max(s)^2 sum s^2.
    assert stable_rank(tensor(values)) <= participation_ratio(tensor(values)) * (1 + 1e-9)


@pytest.mark.parametrize("rank", RANKS)
def test_a_zero_or_broken_spectrum_has_no_rank(rank):
    for values in ([0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]):
        assert rank(tensor(values)).isnan()


@pytest.mark.parametrize("measure", [*NORMS, *COUNTS])
def test_a_zero_spectrum_has_no_size_and_counts_nothing(measure):
    assert measure(torch.zeros(3)).item() == 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_counts_refuse_what_is_not_finite(count, bad):
    with pytest.raises(ValueError, match="`values` must be finite, got NaN or infinity"):
        count(torch.tensor([[1.0, 2.0], [bad, 1.0]]))


@pytest.mark.parametrize("measure", [*RANKS, *NORMS, *COUNTS])
def test_batches_are_measured_row_by_row(measure):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 5, dtype=torch.float64, generator=generator)
    values[0, 1] *= 100
    found = measure(values)
    rows = torch.stack([measure(row) for row in values.reshape(6, 5)])
    torch.testing.assert_close(found, rows.reshape(2, 3))


@pytest.mark.parametrize("measure", [*RANKS, *NORMS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(measure, dtype):
    # 4096 equal values: a float16 sum would overflow and a bfloat16 sum would stall at 256.
    values = torch.full((4096,), 32.0, dtype=dtype)
    found = measure(values)
    assert found.dtype == torch.float32
    # Rounding of a float32 sum of 4096 terms; measured 3e-7 at most.
    assert found.item() == pytest.approx(measure(values.double()).item(), rel=1e-6)


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_do_not_overflow_in_float32(rank):
    values = torch.tensor([3e38, 3e38, 3e38])
    assert rank(values).item() == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("measure", [*RANKS, *NORMS])
def test_measures_are_differentiable(measure):
    values = tensor([3.0, 2.0, 0.5]).requires_grad_()
    assert torch.autograd.gradcheck(measure, (values,))


@pytest.mark.parametrize("measure", [*RANKS, *NORMS, *COUNTS])
def test_no_values_are_refused(measure):
    with pytest.raises(ValueError, match=r"`values` must have shape \(\*batch, k\) with k >= 1"):
        measure(torch.ones(2, 0))


def test_thresholds_outside_their_range_are_refused():
    values = torch.ones(3)
    with pytest.raises(ValueError, match=r"`rtol` must be in \[0, 1\), got 1\.0\."):
        numerical_rank(values, rtol=1.0)
    with pytest.raises(ValueError, match=r"`energy` must be in \(0, 1\], got 0\."):
        energy_rank(values, energy=0.0)


@pytest.mark.bad_input
@pytest.mark.parametrize("measure", [*RANKS, *NORMS, *COUNTS])
def test_values_of_the_wrong_kind_are_refused(measure):
    with pytest.raises(ValueError, match=r"`values` must have a floating-point dtype, got torch"):
        measure(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`values` must have shape .* got \(\)"):
        measure(torch.tensor(1.0))
