"""One layer's regulator: when it calibrates, what its bands follow, what settings change."""

import math
from dataclasses import replace

import pytest

from spectral_lightning.control import LayerReading, Regulator, RegulatorState

NULL = 50.0


def run(regulator, readings, state=None, first=0, conditions=None):
    """States after readings of the relative stable rank, one per step."""
    state, states = state or RegulatorState(), []
    for step, value in enumerate(readings, start=first):
        condition = None if conditions is None else conditions[step - first]
        reading = LayerReading(value, NULL, 1.0, condition)
        state, _ = regulator.update(state, step, reading)
        states.append(state)
    return states


def test_a_window_begins_with_the_first_reading_at_or_after_its_step():
    regulator = Regulator(first_step=10, num_steps=5)
    assert run(regulator, [0.5] * 15)[-1].bands is None
    assert run(regulator, [0.5] * 16)[-1].bands is not None
    late = run(regulator, [0.5] * 6, first=1000)
    assert [state.bands is None for state in late] == [True] * 5 + [False]


def test_a_layer_that_fails_in_its_window_is_calibrated_when_it_can_be_read():
    regulator = Regulator(first_step=0, num_steps=5)
    states = run(regulator, [math.nan] * 8 + [0.5] * 2)
    assert states[7].bands is None
    assert states[-1].bands[0].floor == pytest.approx(0.15)


def test_a_slow_collapse_is_followed_only_so_far():
    regulator = Regulator(first_step=0, num_steps=5)
    falling = [0.5 * math.exp(-4 * step / 40_000) for step in range(40_000)]
    states = run(regulator, falling)
    least = states[10].bands[0].floor * regulator.window.ratio
    assert min(state.bands[0].floor for state in states[10:]) == pytest.approx(least, rel=1e-4)
    assert states[-1].rank.side == -1


def test_a_condition_number_that_grows_slowly_is_followed():
    regulator = Regulator(first_step=0, num_steps=5)
    growing = [100 * math.exp(step / 10_000) if step % 100 == 0 else None for step in range(11_000)]
    states = run(regulator, [0.5] * 11_000, conditions=growing)
    assert all(state.condition.side == 0 for state in states)
    assert states[-1].bands[1].ceiling > 2 * states[10].bands[1].ceiling
    sudden = run(regulator, [0.5], states[-1], first=11_000, conditions=[1e7])
    assert sudden[-1].condition.side == 1


def test_a_large_spike_is_more_severe_than_a_small_one_though_both_are_near_rank_one():
    regulator = Regulator(calibration="static", floor=0.1)
    small, large = (run(regulator, [rank / NULL])[-1].rank for rank in (1.5, 1.01))
    assert large.severity > 2 * small.severity > 0


def test_without_its_ceiling_a_calibrated_band_has_a_floor_only():
    regulator = Regulator(first_step=0, num_steps=5, two_sided=False)
    states = run(regulator, [0.1] * 10 + [0.9] * 100)
    assert states[-1].bands[0].ceiling == math.inf
    assert states[-1].rank.side == 0


def test_a_saved_state_takes_on_the_bounds_that_are_given_now():
    window = Regulator(first_step=0, num_steps=5)
    (*_, saved) = run(window, [0.5] * 20)
    kept = window.adopted(saved)
    assert kept == saved
    given = Regulator(first_step=0, num_steps=5, floor=0.4).adopted(saved)
    assert given.bands[0].floor == 0.4
    assert given.bands[0].ceiling == saved.bands[0].ceiling
    static = Regulator(calibration="static", floor=2.0)
    assert static.adopted(saved).bands[0].floor == 2.0
    (*_, fixed) = run(static, [0.5] * 3)
    assert replace(static, floor=0.1).adopted(fixed).bands[0].floor == 0.1
    assert window.adopted(fixed).bands is None  # and is calibrated from here on


def test_a_state_survives_plain_containers():
    (*_, state) = run(Regulator(first_step=0, num_steps=5), [0.5] * 20, conditions=[9.0] * 20)
    assert RegulatorState.from_dict(state.to_dict()) == state
