"""The sensors of ASSR on random matrices, whose spectra are known."""

import math

import pytest
import torch
from torch import nn

from spectral_lightning.spectra import Need, SpectrumCache, find_targets


def read(weight, *, spectrum=False):
    """Reading of one weight."""
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    found = find_targets(nn.Sequential(layer))
    cache = SpectrumCache()
    every = {"spectrum_every_n_steps": 1} if spectrum else {}
    cache.declare(Need(names=frozenset("0"), **every), found.targets)
    cache.measure(0)
    cache.flush()
    return cache["0"]


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def spiked(m, n, size):
    """A Gaussian matrix with a rank-one spike of `size` times the edge of its bulk."""
    weight = gaussian(m, n)
    u, v = gaussian(m, 1, seed=1), gaussian(1, n, seed=2)
    return weight + size * (math.sqrt(m) + math.sqrt(n)) * (u / u.norm()) @ (v / v.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256), (256, 688), (512, 64)])
@pytest.mark.parametrize("size", [0, 3, 10])
def test_stable_rank_is_that_of_the_float64_spectrum(shape, size, dtype):
    weight = spiked(*shape, size).to(dtype)
    values = torch.linalg.svdvals(weight.double())
    truth = (values.square().sum() / values[0] ** 2).item()
    reading = read(weight)
    # The edge of a bulk without a spike is crowded, so that the first reading is less exact.
    assert reading.stable_rank == pytest.approx(truth, rel=1e-4 if size else 2e-3)
    low, high = reading.spectral_norm_interval
    assert low <= values[0] <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_as_the_same_numbers_in_float32(dtype):
    weight = spiked(96, 160, 3).to(dtype)
    half, full = read(weight, spectrum=True), read(weight.float(), spectrum=True)
    for measure in ("spectral_norm", "stable_rank", "frobenius_norm", "condition_number"):
        assert getattr(half, measure) == pytest.approx(getattr(full, measure), rel=1e-6)


@pytest.mark.parametrize("shape", [(256, 256), (256, 711), (711, 256), (64, 640)])
def test_relative_stable_rank_of_any_gaussian_shape_is_one(shape):
    found = [read(gaussian(*shape, seed=seed)).relative_stable_rank for seed in range(3)]
    assert sum(found) / len(found) == pytest.approx(1, rel=0.03)


def test_condition_number_of_a_rectangular_gaussian_is_that_of_its_shape():
    weight = gaussian(256, 704)
    ratio = math.sqrt(256 / 704)
    reading = read(weight, spectrum=True)
    assert reading.condition_number == pytest.approx((1 + ratio) / (1 - ratio), rel=0.1)
    assert reading.relative_condition_number == pytest.approx(1, rel=0.1)
    truth = torch.linalg.svdvals(weight.double())
    assert reading.condition_number == pytest.approx((truth[0] / truth[-1]).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("broken", "failure"),
    [
        (math.nan, "the weight has a NaN"),
        (math.inf, "the weight has a"),
        (0.0, "the weight is zero"),
    ],
)
def test_a_failed_measurement_says_so_and_is_never_a_default_value(broken, failure):
    reading = read(torch.full((8, 8), broken), spectrum=True)
    assert failure in reading.failure
    assert math.isnan(reading.stable_rank)
    assert reading.stable_rank != 1.0
