"""The laws of ASSR v1.5, as numbers: those of its source and of the paper's runs."""

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.control import ASSRConfig, LayerReading, RegulatorState, calibrated_config
from spectral_lightning.control.assr_v15 import thresholds, tier


def test_settings_have_the_names_and_defaults_of_the_original():
    assert asdict(ASSRConfig()) == {
        "base_lambda": 1e-4,
        "stable_rank_floor": 0.25,
        "condition_ceiling": 500.0,
        "sample_ratio": 0.1,
        "sample_freq": 1,
        "max_severity_multiplier": 10.0,
        "subsample_limit": 1024,
        "log_interventions": False,
    }
    assert ASSRConfig(**json.loads(json.dumps(asdict(ASSRConfig())))) == ASSRConfig()


@pytest.mark.parametrize(
    ("num_parameters", "expected"),
    [
        (0, (0.10, 1, 1024, 1e-4)),
        (99_999_999, (0.10, 1, 1024, 1e-4)),
        (100_000_000, (0.05, 2, 768, 5e-5)),
        (499_999_999, (0.05, 2, 768, 5e-5)),
        (500_000_000, (0.02, 5, 512, 2e-5)),
        (1_100_048_384, (0.02, 5, 512, 2e-5)),  # TinyLlama
        (1_999_999_999, (0.02, 5, 512, 2e-5)),
        (2_000_000_000, (0.01, 10, 384, 1e-5)),
        (70_000_000_000, (0.01, 10, 384, 1e-5)),
    ],
)
def test_the_tier_follows_the_size_of_the_model(num_parameters, expected):
    assert tier(num_parameters) == expected
    config = calibrated_config(num_parameters, [0.2], [10.0])
    found = (config.sample_ratio, config.sample_freq, config.subsample_limit, config.base_lambda)
    assert found == expected


TENTHS = [i / 10 for i in range(11)]


@pytest.mark.parametrize(
    ("ratios", "conditions", "expected"),
    [
        (TENTHS, [100.0 * i for i in range(1, 12)], (0.08, 1500.0)),
        (TENTHS[::-1], [math.inf, 200.0, math.inf], (0.08, 300.0)),
        ([0.2, 0.3], [100.0, 200.0], (0.21 * 0.8, 285.0)),  # between two values: linear
        ([0.001], [4.0], (0.05, 100.0)),  # clamped up
        ([0.9], [1e6], (0.4, 1.5e6)),  # clamped down
        ([1 / 512] * 50, [math.inf] * 50, (0.05, 750.0)),  # a bf16 model under v1.5
    ],
)
def test_thresholds_are_percentiles_within_clamps(ratios, conditions, expected):
    assert thresholds(ratios, conditions) == pytest.approx(expected)


def test_the_percentile_is_taken_from_below_and_from_above():
    floor, ceiling = thresholds(TENTHS, [100.0 * i for i in range(11)], percentile=30.0)
    assert (floor, ceiling) == pytest.approx((0.24, 1050.0))


@pytest.mark.parametrize(
    ("ratio", "condition", "severity", "weight"),
    [
        (0.25, 500.0, None, 0.0),  # at both thresholds
        (0.2, 10.0, 0.2, 3e-4),
        (0.125, 10.0, 0.5, 6e-4),
        (0.0, 10.0, 1.0, 1.1e-3),
        (0.3, 1000.0, 0.1, 2e-4),
        (0.3, 5500.0, 1.0, 1.1e-3),
        (0.3, 1e9, 1.0, 1.1e-3),
        (0.3, math.inf, 1.0, 1.1e-3),
        (0.2, math.inf, 0.2, 3e-4),  # the stable rank wins when both fire
        (math.nan, math.nan, None, 0.0),
    ],
)
def test_severity_and_weight_of_the_penalty(ratio, condition, severity, weight):
    config = ASSRConfig()
    assert config.severity(ratio, condition) == pytest.approx(severity)
    assert config.penalty_weight(ratio, condition) == pytest.approx(weight)


def test_numbers_of_the_papers_runs_come_out():
    # A half-precision TinyLlama: all layers read as collapsed, so every check fired.
    config = calibrated_config(1_100_048_384, [1 / 512] * 155, [math.inf] * 155)
    assert config.severity(1 / 512, math.inf) == pytest.approx(0.961, abs=5e-4)
    assert config.penalty_weight(1 / 512, math.inf) == pytest.approx(2.12e-4, abs=5e-7)
    assert config.num_sampled(155) == 3
    checks = [steps // config.sample_freq * 4 for steps in (200, 150)]  # of 4 micro-batches each
    assert [count * config.num_sampled(155) for count in checks] == [480, 360]


def test_at_least_one_layer_is_sampled():
    assert [ASSRConfig().num_sampled(n) for n in (1, 9, 10, 19, 20)] == [1, 1, 1, 1, 2]


@given(
    low=st.floats(0, 0.999),
    step=st.floats(0, 1),
    condition=st.floats(1, 1e12),
)
def test_the_weight_is_monotone_in_a_falling_stable_rank(low, step, condition):
    config = ASSRConfig(condition_ceiling=1e13)
    high = min(1.0, low + step)
    assert config.penalty_weight(low, condition) >= config.penalty_weight(high, condition)


@pytest.mark.parametrize(
    ("fraction", "weight"), [(0.999999, 2e-5), (0.5, 2e-5 * 6), (1e-9, 2e-5 * 11), (1.001, 0.0)]
)
def test_the_regulator_asks_for_the_weight_at_the_floor_half_of_it_and_rank_one(fraction, weight):
    config = ASSRConfig(base_lambda=2e-5, sample_freq=5)
    ratio = config.stable_rank_floor * fraction
    # A large square layer: a stable rank relative to random is four times its ratio to the side.
    reading = LayerReading(stable_rank=4 * ratio, null=1e6, frobenius_norm=1.0)
    state, verdict = config.regulator().update(RegulatorState(), 0, reading)
    assert verdict is not None
    assert state.rank.strength * config.sample_freq == pytest.approx(weight, rel=1e-4)
    assert config.penalty_weight(ratio, 1.0) == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"base_lambda": -1.0}, "`base_lambda` must be >= 0 and finite, got -1.0"),
        ({"stable_rank_floor": 1.0}, r"`stable_rank_floor` must be in \(0, 1\), got 1.0"),
        ({"condition_ceiling": 1.0}, "`condition_ceiling` must be above 1 and finite, got 1.0"),
        ({"sample_ratio": 0.0}, r"`sample_ratio` must be in \(0, 1\], got 0.0"),
        ({"sample_freq": 0}, "`sample_freq` must be >= 1, got 0"),
        ({"max_severity_multiplier": math.nan}, "`max_severity_multiplier` must be >= 0"),
        ({"subsample_limit": 63}, "`subsample_limit` must be >= 64, or None, got 63"),
    ],
)
def test_a_wrong_setting_is_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        ASSRConfig(**setting)


def test_thresholds_need_readings_and_a_percentile():
    with pytest.raises(ValueError, match="`stable_rank_ratios` must hold at least one value"):
        thresholds([], [])
    with pytest.raises(ValueError, match=r"`percentile` must be in \[0, 100\], got 101"):
        thresholds([0.2], [1.0], percentile=101)
