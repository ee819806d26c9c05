"""Layers whose weight is a product of thin factors are read without forming it."""

import math

import pytest
import torch
from torch import nn

from spectral_lightning.nn import LowRankLinear
from spectral_lightning.spectra import Need, SpectrumCache, find_targets


def measured(model, spectrum=True):
    targets = find_targets(model).targets
    cache = SpectrumCache()
    names = frozenset(target.name for target in targets)
    cache.declare(Need(names=names, spectrum_every_n_steps=1 if spectrum else None), targets)
    return cache


def make_model(**options):
    torch.manual_seed(0)
    options = {"capacity": 12} | options
    return nn.ModuleDict(
        {"a": LowRankLinear(60, 50, 8, **options), "b": LowRankLinear(40, 90, 5, **options)}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_readings_are_those_of_the_product(dtype):
    model = make_model(dtype=dtype)
    cache = measured(model)
    for step in range(3):
        cache.measure(step)
        cache.flush()
        for name, layer in model.items():
            left, right = (factor.detach().double() for factor in layer.factors())
            values = torch.linalg.svdvals(left @ right)[: layer.rank]
            reading = cache[name]
            assert reading.failure is None
            assert reading.shape == (layer.out_features, layer.in_features)
            assert reading.spectral_norm == pytest.approx(values[0].item(), rel=1e-3)
            low, high = reading.spectral_norm_interval
            assert low <= values[0] <= high
            assert reading.frobenius_norm == pytest.approx(values.norm().item(), rel=1e-3)
            assert reading.values == pytest.approx(values.tolist(), rel=1e-3)
            assert reading.condition_number == pytest.approx(
                (values[0] / values[-1]).item(), rel=1e-3
            )
        with torch.no_grad():  # another rank, and other values
            model["a"].set_rank(3 + step)
            model["b"].left_factor.mul_(1.1)


def test_no_reading_forms_the_product(monkeypatch):
    model = make_model()
    cache = measured(model)

    def refuse(self):
        raise AssertionError("the product was formed")

    monkeypatch.setattr(LowRankLinear, "spectral_weight", refuse)
    cache.measure(0)
    cache.flush()
    assert len(cache) == 2


def test_layers_of_different_shapes_and_one_capacity_are_measured_together():
    assert len(measured(make_model())._trackers) == 1


def test_a_product_that_is_not_finite_is_a_failed_reading():
    model = make_model()
    cache = measured(model)
    with torch.no_grad():
        model["a"].left_factor[0, 0] = math.nan
        model["b"].left_factor.zero_()
    cache.measure(0)
    cache.flush()
    assert "NaN" in cache["a"].failure
    assert "zero" in cache["b"].failure
