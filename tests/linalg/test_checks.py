"""Input rules shared by the kernels; their sentences are tested with each kernel as well."""

import math

import pytest
import torch

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32_and_float64_is_kept(stored, computed):
    assert compute_dtype(torch.zeros(1, dtype=stored)) == computed


def test_largest_magnitude_is_that_of_each_matrix():
    weight = torch.tensor([[[1.0, -5.0]], [[2.0, 3.0]]])
    assert require_finite(weight).tolist() == [[[5.0]], [[3.0]]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_bad_entry_is_refused_with_the_name_of_the_argument(bad, dtype):
    weight = torch.ones(3, 2, 2, dtype=dtype)
    weight[2, 1, 0] = bad
    with pytest.raises(ValueError, match=r"`basis` must be finite, got NaN or infinity .*\(3, 2"):
        require_finite(weight, "basis")


def test_what_is_no_matrix_is_refused_with_the_name_of_the_argument():
    with pytest.raises(ValueError, match=r"`basis` must have at least two dimensions .* \(3,\)"):
        require_matrix(torch.ones(3), "basis")
    with pytest.raises(ValueError, match=r"`basis` must not be empty, got shape \(3, 0\)"):
        require_matrix(torch.ones(3, 0), "basis")
    with pytest.raises(
        ValueError, match=r"`basis` must have a floating-point dtype, got torch\.bool"
    ):
        require_matrix(torch.ones(3, 2, dtype=torch.bool), "basis")
