"""Falling readings are told from those that settle, and bad settings are refused."""

import math

import pytest

from spectral_lightning.control.collapse_watch import CollapseState, CollapseVerdict, CollapseWatch
from spectral_lightning.control.explosion_watch import ExplosionState, ExplosionWatch


def verdicts(values, watch=None):
    watch, state, found = watch or CollapseWatch(), CollapseState(), []
    for i, value in enumerate(values):
        state, verdict = watch.update(state, 50 * i, value)
        found.append(verdict.name)
    return found, state


def test_what_settles_on_a_lower_value_is_healthy():
    found, _ = verdicts([0.2 + 0.8 * math.exp(-i / 3) for i in range(40)])
    assert set(found) == {"LEARNING", "HEALTHY"}


def test_what_goes_to_zero_is_foreseen():
    found, _ = verdicts([math.exp(-i / 3) for i in range(20)])
    assert 0 < found.index("FALLING") < found.index("COLLAPSED") - 1


def test_an_alarm_ends_where_the_reading_recovers():
    found, state = verdicts([1.0] * 3 + [1e-3] * 6 + [1.0] * 6)
    assert "COLLAPSED" in found
    assert not state.is_alarmed


def test_a_reading_that_is_not_a_number_changes_nothing():
    state = CollapseState()
    assert CollapseWatch().update(state, 1, math.nan) == (state, CollapseVerdict.NOT_FINITE)


def test_norms_that_drift_and_jitter_are_usual_and_infinite_ones_are_not():
    watch, state = ExplosionWatch(), ExplosionState()
    for i in range(500):
        state = watch.update(state, math.exp(-i / 100 + 0.5 * math.sin(7 * i)))
        assert not state.is_alarmed
    assert watch.update(state, math.inf).is_alarmed


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        (CollapseWatch, {"level": 0.8}, "`level` and `onset` must be in"),
        (CollapseWatch, {"floor": 0.0}, "`floor` must be positive"),
        (CollapseWatch, {"warmup": 0}, "`horizon` must be >= 0 and `warmup` >= 1"),
        (CollapseWatch, {"smoothing": 1.0}, "`smoothing` must be in"),
        (ExplosionWatch, {"num_deviations": 0.0}, "`num_deviations` must be positive"),
        (ExplosionWatch, {"decay": 1.0}, "`decay` must be in"),
        (ExplosionWatch, {"warmup": 0}, "`warmup` must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(kind, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**arguments)
