"""Matrices of a chosen spectrum hold what they promise."""

import pytest
import torch

from spectral_lightning.testing import MATRIX_CASES, matrix_with_spectrum


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_every_case_has_its_spectrum(name):
    case = MATRIX_CASES[name]
    weight, spectrum = case.build(rng()), case.spectrum()
    assert weight.shape == (*case.batch, *case.shape)
    assert spectrum.shape == (*case.batch, min(case.shape))
    assert (spectrum.diff() <= 0).all()
    torch.testing.assert_close(torch.linalg.svdvals(weight), spectrum, rtol=0, atol=1e-13)


def test_the_cases_cover_what_a_kernel_must_survive():
    shapes = {name: case.shape for name, case in MATRIX_CASES.items()}
    assert shapes["tall"] == shapes["wide"][::-1]
    assert shapes["one_row"][0] == 1
    assert shapes["one_column"][1] == 1
    assert not MATRIX_CASES["zero"].build(rng()).any()
    assert MATRIX_CASES["batch"].batch == (2, 3)


def test_values_may_come_in_any_order_and_are_padded_with_zeros():
    weight = matrix_with_spectrum(torch.tensor([1.0, 3.0]), (4, 3), generator=rng())
    expected = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(weight), expected, rtol=0, atol=1e-14)


def test_the_same_generator_gives_the_same_matrix():
    first, second, other = (
        matrix_with_spectrum(torch.ones(2), (4, 3), generator=rng(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_to_the_stored_dtype_moves_values_by_at_most_the_stated_bound(dtype):
    values = torch.linspace(1.0, 0.1, 12, dtype=torch.float64)
    weight = matrix_with_spectrum(values, (20, 12), generator=rng(), dtype=dtype)
    assert weight.dtype == dtype
    error = (torch.linalg.svdvals(weight.double()) - values).abs().max().item()
    assert error <= (20 * 12) ** 0.5 * torch.finfo(dtype).eps / 2 + 1e-14


def test_the_global_random_state_stays_untouched():
    state = torch.get_rng_state()
    MATRIX_CASES["batch"].build(rng())
    assert torch.equal(torch.get_rng_state(), state)


def test_more_values_than_the_shape_holds_are_refused():
    with pytest.raises(ValueError, match=r"at most min\(shape\) = 2 values, got 3"):
        matrix_with_spectrum(torch.ones(3), (5, 2), generator=rng())
