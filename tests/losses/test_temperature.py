"""Temperatures on a schedule and learned ones."""

import math

import pytest
import torch

from spectral_lightning.losses import CosineTemperature, LearnableTemperature


def test_temperature_is_held_and_falls_on_a_cosine():
    temperature = CosineTemperature()
    steps = [0, 7_500, 12_500, 18_750, 25_000, 37_500, 40_000]
    found = [temperature(step, 37_500) for step in steps]
    expected = [0.07, 0.07, 0.06866, 0.06383, 0.05741, 0.05, 0.05]
    assert found == pytest.approx(expected, abs=5e-6)
    assert temperature.validation == 0.05


@pytest.mark.parametrize("num_steps", [1, 3])
def test_holding_for_the_whole_run_never_falls(num_steps):
    temperature = CosineTemperature(hold_fraction=1.0)
    assert [temperature(step, num_steps) for step in range(num_steps + 1)] == [0.07] * (
        num_steps + 1
    )


def test_learned_temperature_comes_back_from_its_bounds():
    temperature = LearnableTemperature(start=0.02, lowest=0.01, highest=0.1)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=100.0)
    for sign, bound in ((1, 0.01), (-1, 0.1)):
        for _ in range(2):  # the second step starts on the other bound
            optimizer.zero_grad()
            (sign * temperature()).backward()
            assert temperature.log_temperature.grad.item() != 0
            optimizer.step()
        assert temperature().item() == pytest.approx(bound)
    assert temperature.validation == 0.05


@pytest.mark.parametrize(
    ("make", "settings", "sentence"),
    [
        (CosineTemperature, {"start": 0.0}, "`start` must be finite and > 0, got 0.0"),
        (CosineTemperature, {"end": math.inf}, "`end` must be finite and > 0, got inf"),
        (CosineTemperature, {"hold_fraction": 1.5}, r"`hold_fraction` must be in \[0, 1\], got 1"),
        (LearnableTemperature, {"start": 2.0}, "in this order, got 0.01, 2.0 and 1.0"),
        (LearnableTemperature, {"lowest": 0.0}, "must be > 0 and in this order"),
        (LearnableTemperature, {"validation": 0.0}, "`validation` must be finite and > 0, got 0.0"),
    ],
)
def test_settings_outside_their_range_are_refused(make, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**settings)


def test_a_run_has_steps():
    with pytest.raises(ValueError, match="`num_steps` must be >= 1, got 0"):
        CosineTemperature()(0, 0)
