"""Where bands come from: medians that outliers cannot move, and readings that cannot be used."""

import math
import random
import statistics
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.control import (
    Band,
    CalibrationWindow,
    LayerReading,
    Regulator,
    RegulatorState,
    Thermostat,
    ThermostatState,
    is_calm,
    static_band,
)

UNUSABLE = [0.0, 5e-324, -1.0, math.nan, math.inf, -math.inf]
POSITIVE = st.floats(sys.float_info.min, 1.7e308)


def noise(count, *, scale, seed=0, centre=0.4):
    source = random.Random(seed)
    return [centre * math.exp(source.gauss(0, scale)) for _ in range(count)]


def test_band_of_equal_readings_is_the_ratio_on_either_side():
    band = CalibrationWindow(ratio=0.25, num_deviations=6.0).band([2.0] * 7)
    assert (band.floor, band.ceiling) == pytest.approx((0.5, 8.0))


def test_restless_readings_widen_the_band_by_their_deviation():
    readings = [math.exp(x) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]  # median deviation 1
    band = CalibrationWindow(ratio=0.5, num_deviations=3.0).band(readings)
    assert (band.floor, band.ceiling) == pytest.approx((math.exp(-3), math.exp(3)))


def test_one_reading_is_enough():
    band = CalibrationWindow(ratio=0.5).band([3.0])
    assert (band.floor, band.ceiling) == pytest.approx((1.5, 6.0))


@settings(deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=30), st.floats(0.01, 0.99), st.floats(0, 10))
def test_every_window_gives_a_band_around_its_median(readings, ratio, num_deviations):
    band = CalibrationWindow(ratio=ratio, num_deviations=num_deviations).band(readings)
    median = statistics.median(map(math.log, readings))
    assert band.distance(median) == 0


@settings(deadline=None)
@given(st.lists(POSITIVE, min_size=9, max_size=9), st.permutations(range(200)))
def test_a_few_outliers_hardly_move_the_band(outliers, order):
    healthy = noise(191, scale=0.05)
    mixed = [(healthy + outliers)[i] for i in order]
    window = CalibrationWindow()
    clean, found = window.band(healthy), window.band(mixed)
    assert found.floor == pytest.approx(clean.floor, rel=0.05)
    assert found.ceiling == pytest.approx(clean.ceiling, rel=0.05)


@pytest.mark.parametrize("value", UNUSABLE)
def test_readings_that_cannot_be_used_are_left_out(value):
    healthy = noise(20, scale=0.1)
    mixed = [part for reading in healthy for part in (reading, value, value)]
    assert CalibrationWindow().band(mixed) == CalibrationWindow().band(healthy)


@pytest.mark.parametrize("readings", [[], UNUSABLE])
def test_without_a_usable_reading_there_is_no_band(readings):
    assert CalibrationWindow().band(readings) is None


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_healthy_noise_stays_inside_and_switches_nothing(scale, seed):
    band = CalibrationWindow().band(noise(200, scale=scale, seed=seed))
    thermostat, state = Thermostat(), ThermostatState()
    for value in noise(5000, scale=scale, seed=seed + 100):
        state, _ = thermostat.update(state, band, value)
    assert state.num_switches == 0


def test_a_collapse_is_outside_however_calm_the_window_was():
    band = CalibrationWindow().band(noise(200, scale=0.05))
    thermostat, state = Thermostat(), ThermostatState()
    for value in noise(20, scale=0.05, centre=0.04):
        state, _ = thermostat.update(state, band, value)
    assert state.side == -1


def test_a_static_band_is_a_multiple_of_the_null_value():
    assert static_band(4.0, ratio=0.25) == Band(floor=1.0)
    assert static_band(4.0, ratio=0.25, ceiling=2.0) == Band(floor=1.0, ceiling=8.0)


def test_a_static_band_without_room_is_refused():
    with pytest.raises(ValueError, match=r"`floor` must be below `ceiling`, got 2\.0 and 1\.0\."):
        static_band(1.0, ratio=2.0, ceiling=1.0)


@pytest.mark.parametrize(
    ("sides", "calm"),
    [
        ([], True),
        ([0] * 20, True),
        ([0] * 19 + [1], True),
        ([0] * 18 + [-1, 1], False),
        ([-1], False),
    ],
)
def test_a_model_is_calm_if_few_thermostats_are_on(sides, calm):
    assert is_calm(iter(sides), max_duty=0.05) is calm


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("ratio", 0.0, r"`ratio` must be in \(0, 1\), got 0\.0\."),
        ("ratio", 1.0, r"`ratio` must be in \(0, 1\), got 1\.0\."),
        ("ratio", math.nan, r"`ratio` must be in \(0, 1\), got nan\."),
        ("num_deviations", -1.0, r"`num_deviations` must be >= 0, got -1\.0\."),
        ("num_deviations", math.inf, r"`num_deviations` must be >= 0, got inf\."),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        CalibrationWindow(**{setting: value})


@pytest.mark.parametrize(
    ("given_bound", "expected"),
    [
        ({"floor": 0.9}, Band(floor=0.9)),
        ({"ceiling": 0.01}, Band(ceiling=0.01)),
    ],
)
def test_a_bound_that_is_given_outranks_a_calibrated_one_in_its_way(given_bound, expected):
    regulator = Regulator(first_step=0, num_steps=5, **given_bound)
    state = RegulatorState()
    for step in range(6):
        state, verdict = regulator.update(state, step, LayerReading(0.1, 100.0, 1.0))
    assert verdict is not None
    assert state.bands[0] == expected
