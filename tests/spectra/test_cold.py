"""Readings without a warm start, judged by a float64 decomposition of the stored matrix."""

import math

import pytest
import torch

from spectral_lightning.linalg import (
    gaussian_condition_number,
    gaussian_stable_rank,
    leading_triplets,
)
from spectral_lightning.spectra import cold
from spectral_lightning.spectra.cold import cold_readings
from spectral_lightning.testing import matrix_with_spectrum

SHAPES = [(40, 30), (160, 160), (300, 150), (150, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def spectra(k):
    """Chosen spectra of `k` values; several lead many a method to a value that is not the first."""
    i = torch.arange(k, dtype=torch.float64)
    return {
        "one_strong": torch.cat([torch.tensor([9.0]), torch.ones(k - 1)]).double(),
        "power_law": (i + 1) ** -0.5,
        "geometric": 0.9**i,
        "flat": torch.ones(k, dtype=torch.float64),
        "nearly_flat": 1 - 1e-4 * i / k,
        "repeated": torch.where(i < 5, 2.0, 1.0),
        "cluster": torch.where(i < 8, 1 - 1e-3 * i, 0.5),
        "close_pair": torch.cat([torch.tensor([1.0, 0.999]), 0.7 * torch.ones(k - 2)]).double(),
        "rank_two": torch.where(i < 2, 1.0, 0.0),
    }


def truth(weight):
    values = torch.linalg.svdvals(weight.double())
    return values[0].item(), (values.square().sum() / values[0] ** 2).item(), values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_and_stable_rank_equal_a_float64_decomposition(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: matrix_with_spectrum(values, shape, generator=generator, dtype=dtype)
        for name, values in spectra(min(shape)).items()
    }
    weights["gaussian"] = torch.randn(shape, generator=generator).to(dtype)
    readings = {reading.name: reading for reading in cold_readings(weights.items())}
    assert readings.keys() == weights.keys()
    for name, weight in weights.items():
        norm, stable_rank, values = truth(weight)
        reading = readings[name]
        assert reading.spectral_norm == pytest.approx(norm, rel=5e-6), name
        assert reading.stable_rank == pytest.approx(stable_rank, rel=1e-5), name
        assert reading.frobenius_norm == pytest.approx(values.square().sum().sqrt().item(), 1e-6)
        assert reading.relative_stable_rank == pytest.approx(
            stable_rank / gaussian_stable_rank(*shape), rel=1e-5
        )
        low, high = reading.spectral_norm_interval
        assert low <= norm * (1 + 1e-12)
        assert high >= norm * (1 - 1e-12)


def test_many_random_matrices_are_all_measured_right():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(150, 130, 140, generator=generator)
    readings = cold_readings((str(i), weight) for i, weight in enumerate(weights))
    norms = torch.linalg.matrix_norm(weights.double(), 2)
    for reading in readings:
        assert reading.spectral_norm == pytest.approx(norms[int(reading.name)].item(), rel=5e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e8, 1e18])
def test_the_scale_of_a_weight_changes_no_rank(scale):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 140, generator=generator)
    (plain,) = cold_readings([("w", weight)])
    (scaled,) = cold_readings([("w", weight * scale)])
    assert scaled.failure is None
    assert scaled.spectral_norm == pytest.approx(plain.spectral_norm * scale, rel=5e-6)
    assert scaled.stable_rank == pytest.approx(plain.stable_rank, rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (200, 150)], ids=str)
def test_full_reads_the_exact_spectrum(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -4, min(shape), dtype=torch.float64)
    weight = matrix_with_spectrum(values, shape, generator=generator, dtype=torch.float64)
    (reading,) = cold_readings([("w", weight)], full=True)
    assert reading.condition_number == pytest.approx(1e4, rel=1e-3)
    assert reading.relative_condition_number == pytest.approx(
        1e4 / gaussian_condition_number(*shape), rel=1e-3
    )
    p = values / values.sum()
    assert reading.effective_rank == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-6)
    assert reading.spectral_norm == pytest.approx(1.0, rel=1e-6)
    assert reading.spectrum_step == 0


def test_without_full_nothing_comes_from_the_whole_spectrum():
    (reading,) = cold_readings([("w", torch.eye(3))])
    assert reading.condition_number is None
    assert reading.effective_rank is None
    assert reading.spectrum_step is None


def test_a_singular_matrix_has_an_infinite_condition_number():
    (reading,) = cold_readings([("w", torch.ones(4, 4))], full=True)
    assert reading.condition_number == math.inf
    assert reading.relative_condition_number == math.inf


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [4, 200])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_fails_and_leaves_the_others_alone(bad, size, full):
    good = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    broken = good.clone()
    broken[1, 2] = bad
    first, second = cold_readings([("broken", broken), ("good", good)], full=full)
    assert first.failure == "the weight has a NaN or infinite entry"
    assert math.isnan(first.spectral_norm)
    assert math.isnan(first.stable_rank)
    assert second.failure is None
    assert second.spectral_norm == pytest.approx(truth(good)[0], rel=5e-6)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [4, 200])
def test_a_zero_weight_has_norms_but_no_stable_rank(size, full):
    (reading,) = cold_readings([("w", torch.zeros(size, size))], full=full)
    assert reading.failure == "the weight is zero, which has no stable rank"
    assert reading.spectral_norm == reading.frobenius_norm == 0
    assert math.isnan(reading.stable_rank)
    assert math.isnan(reading.relative_stable_rank)


def test_a_matrix_that_does_not_converge_gets_all_its_values(monkeypatch):
    monkeypatch.setattr(cold, "MOST_PASSES", 2)
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    (reading,) = cold_readings([("w", weight)])
    assert reading.spectral_norm == pytest.approx(truth(weight)[0], rel=1e-6)


@pytest.mark.parametrize("alone", [0, 2**30])
def test_what_is_measured_together_changes_no_reading(monkeypatch, alone):
    generator = torch.Generator().manual_seed(0)
    sizes = [(150, 140), (140, 150), (150, 140), (20, 30), (150, 140)]
    weights = [(str(i), torch.randn(s, generator=generator)) for i, s in enumerate(sizes)]
    usual = {reading.name: reading for reading in cold_readings(weights)}
    monkeypatch.setattr(cold, "ALONE_BYTES", alone)
    monkeypatch.setattr(cold, "TOGETHER_BYTES", alone)
    for reading in cold_readings(weights):
        assert reading.shape == usual[reading.name].shape
        assert reading.stable_rank == pytest.approx(usual[reading.name].stable_rank, rel=1e-5)


def test_waiting_matrices_never_exceed_their_share(monkeypatch):
    monkeypatch.setattr(cold, "ALONE_BYTES", 4 * 140 * 150)
    monkeypatch.setattr(cold, "TOGETHER_BYTES", 4 * 4 * 140 * 150)
    together = []

    def counted(weights, *args, **settings):
        together.append(len(weights))
        return leading_triplets(weights, *args, **settings)

    monkeypatch.setattr(cold, "leading_triplets", counted)
    generator = torch.Generator().manual_seed(0)
    weights = (("w", torch.randn(140, 150, generator=generator)) for _ in range(9))
    assert len(list(cold_readings(weights))) == 9
    assert together == [4, 4, 1]


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(cold_readings([("w", torch.ones(200, 200))]))
    assert torch.equal(torch.get_rng_state(), before)
