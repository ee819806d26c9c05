"""The thermostat on plain numbers: bounds, monotony, hysteresis, dwell, and readings gone wrong."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.control import Band, Thermostat, ThermostatState, ThermostatVerdict

POSITIVE = st.floats(1e-6, 1e6)
READINGS = st.one_of(POSITIVE, st.floats(0, math.inf), st.sampled_from([0.0, math.inf, math.nan]))
SEQUENCES = st.lists(READINGS, max_size=60)


@st.composite
def bands(draw):
    floor = draw(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)))
    least = max(floor, 1e-3)
    ceiling = draw(st.one_of(st.just(math.inf), st.floats(1.01, 1e3).map(lambda x: x * least)))
    return Band(floor=floor, ceiling=ceiling)


THERMOSTATS = st.builds(
    Thermostat,
    strength=st.floats(0, 100),
    multiplier=st.floats(0, 100),
    saturation=st.floats(0.01, 5),
    hysteresis=st.floats(0, 2),
    dwell=st.integers(0, 10),
    smoothing=st.floats(0, 0.9),
)
SHARP = Thermostat(smoothing=0.0, dwell=0)


def run(thermostat, band, readings, state=None):
    """States and verdicts after each reading."""
    state, states, verdicts = state or ThermostatState(), [], []
    for value in readings:
        state, verdict = thermostat.update(state, band, value)
        states.append(state)
        verdicts.append(verdict)
    return states, verdicts


def switches(states):
    """Indices of the readings at which the side changed."""
    sides = [0, *(state.side for state in states)]
    return [i for i in range(len(states)) if sides[i + 1] != sides[i]]


@settings(deadline=None)
@given(THERMOSTATS, bands(), SEQUENCES)
def test_strength_and_severity_never_leave_their_bounds(thermostat, band, readings):
    for state in run(thermostat, band, readings)[0]:
        assert 0 <= state.severity <= 1
        most = thermostat.strength * (1 + thermostat.multiplier)
        assert 0 <= state.strength <= most
        if state.side == 0:
            assert state.strength == state.severity == 0
        else:
            assert state.strength >= thermostat.strength
        assert state.smoothed is None or math.isfinite(state.smoothed)


@settings(deadline=None)
@given(THERMOSTATS, bands(), SEQUENCES)
def test_no_two_switches_within_dwell_readings(thermostat, band, readings):
    counted = [value for value in readings if not math.isnan(value)]
    found = switches(run(thermostat, band, counted)[0])
    assert all(b - a >= thermostat.dwell for a, b in pairwise(found))


@settings(deadline=None)
@given(THERMOSTATS, bands(), SEQUENCES)
def test_sides_and_verdicts_agree_and_only_switches_on_are_counted(thermostat, band, readings):
    states, verdicts = run(thermostat, band, readings)
    sides = {
        ThermostatVerdict.INSIDE: 0,
        ThermostatVerdict.BELOW: -1,
        ThermostatVerdict.ABOVE: 1,
    }
    for state, verdict in zip(states, verdicts, strict=True):
        assert state.side == sides.get(verdict, state.side)
    on = [i for i in switches(states) if states[i].side]
    assert (states[-1].num_switches if states else 0) == len(on)


@settings(deadline=None)
@given(st.floats(0.1, 5), st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=20))
def test_severity_is_monotone_and_continuous_in_the_distance(saturation, values):
    thermostat = Thermostat(smoothing=0.0, dwell=0, saturation=saturation)
    band = Band(floor=0.5, ceiling=2.0)
    for side in (-1, 1):
        found = []
        for value in values:
            state, _ = thermostat.update(ThermostatState(), band, value)
            if state.side == side:
                found.append((abs(band.distance(math.log(value))), state))
        found.sort(key=lambda pair: pair[0])
        for (near, low), (far, high) in pairwise(found):
            assert low.severity <= high.severity
            assert low.strength <= high.strength
            assert high.severity - low.severity <= 2 * (far - near) / saturation + 1e-9


@pytest.mark.parametrize(
    ("value", "side", "severity"),
    [
        (1.0, 0, 0.0),
        (0.5, 0, 0.0),
        (0.5 * math.exp(-0.5), -1, 0.0625),
        (0.5 * math.exp(-2.0), -1, 1.0),
        (1e-9, -1, 1.0),
        (2.0, 0, 0.0),
        (2.0 * math.exp(0.5), 1, 0.0625),
        (2.0 * math.exp(2.0), 1, 1.0),
        (1e9, 1, 1.0),
    ],
)
def test_severity_law_by_hand(value, side, severity):
    thermostat = Thermostat(smoothing=0.0, dwell=0, strength=3.0, multiplier=4.0, saturation=2.0)
    state, _ = thermostat.update(ThermostatState(), Band(floor=0.5, ceiling=2.0), value)
    assert state.side == side
    assert state.severity == pytest.approx(severity, abs=1e-12)
    assert state.strength == pytest.approx(3.0 * (1 + 4.0 * severity) if side else 0.0, abs=1e-11)


def test_strength_starts_at_the_edge_of_the_band():
    state, _ = SHARP.update(ThermostatState(), Band(floor=1.0), 1 - 1e-12)
    assert state.side == -1
    assert state.strength == pytest.approx(SHARP.strength)


@settings(deadline=None, max_examples=50)
@given(THERMOSTATS, bands(), SEQUENCES, st.one_of(POSITIVE, st.sampled_from([0.0, math.inf])))
def test_a_constant_input_settles(thermostat, band, readings, value):
    state = ([ThermostatState()] + run(thermostat, band, readings)[0])[-1]
    settled = run(thermostat, band, [value] * 700, state)[0][-50:]
    # The mean itself may creep towards its limit for ever, below any digit that matters.
    assert settled[0].smoothed == pytest.approx(settled[-1].smoothed, abs=1e-9)
    assert len({(state.side, state.num_switches) for state in settled}) == 1
    assert settled[0].strength == pytest.approx(settled[-1].strength, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("bound", "side"), [("floor", -1), ("ceiling", 1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_sensor_oscillating_around_a_bound_switches_once(bound, side, smoothing):
    thermostat = Thermostat(hysteresis=0.1, dwell=0, smoothing=smoothing)
    readings = [1.0 * (1.05 if i % 2 else 1 / 1.05) ** -side for i in range(200)]
    states, _ = run(thermostat, Band(**{bound: 1.0}), readings)
    assert len(switches(states)) == 1
    assert states[-1].side == side
    # Without hysteresis it would switch at every reading.
    restless = Thermostat(hysteresis=0.0, dwell=0, smoothing=0.0)
    assert len(switches(run(restless, Band(**{bound: 1.0}), readings)[0])) > 150


@pytest.mark.parametrize(("bound", "side"), [("floor", -1), ("ceiling", 1)])
def test_it_switches_off_only_when_inside_by_the_hysteresis(bound, side):
    thermostat = Thermostat(hysteresis=0.2, dwell=0, smoothing=0.0)
    inside = [factor**-side for factor in (0.5, 1.0, 1.19, 1.21, 1.0)]
    states, verdicts = run(thermostat, Band(**{bound: 1.0}), inside)
    assert [state.side for state in states] == [side, side, side, 0, 0]
    assert states[2].strength == thermostat.strength  # held, and no worse than at the edge
    assert verdicts[3:] == [ThermostatVerdict.INSIDE] * 2


def test_a_switch_that_comes_too_early_waits_and_says_so():
    thermostat = Thermostat(dwell=3, smoothing=0.0)
    states, verdicts = run(thermostat, Band(floor=1.0), [0.5, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5])
    assert [state.side for state in states] == [-1, -1, -1, 0, 0, 0, -1]
    assert [verdict is ThermostatVerdict.DWELLING for verdict in verdicts] == [
        *(False, True, True, False),
        *(True, True, False),
    ]
    assert [state.strength for state in states[1:3]] == [thermostat.strength] * 2
    assert states[4].strength == states[4].severity == 0
    assert states[-1].num_switches == 2


def test_from_one_side_it_can_go_straight_to_the_other():
    thermostat = Thermostat(dwell=2, smoothing=0.0)
    states, _ = run(thermostat, Band(floor=0.5, ceiling=2.0), [0.1, 10.0, 10.0])
    assert [state.side for state in states] == [-1, -1, 1]
    assert states[1].severity == 0  # it is not as far below as it is above
    assert states[-1].num_switches == 2


@settings(deadline=None)
@given(THERMOSTATS, bands(), SEQUENCES)
def test_nan_holds(thermostat, band, readings):
    state = ([ThermostatState()] + run(thermostat, band, readings)[0])[-1]
    after, verdict = thermostat.update(state, band, math.nan)
    assert after == state
    assert verdict is ThermostatVerdict.NOT_FINITE


@pytest.mark.parametrize(
    "band", [Band(floor=0.5), Band(ceiling=2.0), Band(floor=0.5, ceiling=2.0), Band()]
)
@pytest.mark.parametrize("value", [0.0, math.inf, 5e-324, 1.7e308])
def test_extreme_readings_are_handled_and_soon_forgotten(band, value):
    thermostat = Thermostat(dwell=0, hysteresis=0.1, smoothing=0.5)
    first = thermostat.update(ThermostatState(), band, value)[0]
    wanted = (value > 1 and band.ceiling < math.inf) - (value < 1 and band.floor > 0)
    assert first.side == wanted
    assert first.severity == abs(wanted)
    # Whatever it was, six ordinary readings later only those count.
    for usual, side in [(1.0, 0), (0.25, -1 if band.floor else 0), (4.0, int(band.ceiling == 2))]:
        states, _ = run(thermostat, band, [usual] * 6, first)
        assert states[-1].side == side


def test_a_smoothed_reading_is_the_exponential_mean_of_logarithms():
    thermostat = Thermostat(smoothing=0.75)
    states, _ = run(thermostat, Band(floor=0.5, ceiling=2.0), [1.0, math.e, 1 / math.e])
    assert [state.smoothed for state in states] == pytest.approx([0.0, 0.25, -0.0625])


@settings(deadline=None)
@given(THERMOSTATS, bands(), SEQUENCES, SEQUENCES)
def test_state_survives_a_json_round_trip(thermostat, band, before, after):
    state = ([ThermostatState()] + run(thermostat, band, before)[0])[-1]
    text = json.dumps(asdict(state), allow_nan=False)
    restored = ThermostatState(**json.loads(text))
    assert restored == state
    assert run(thermostat, band, after, restored) == run(thermostat, band, after, state)


@pytest.mark.parametrize(
    ("log_value", "distance"),
    [(0.0, 0.0), (-1.0, math.log(2) - 1), (1.0, 1 - math.log(2)), (math.inf, math.inf)],
)
def test_distance_to_a_band_is_signed(log_value, distance):
    assert Band(floor=0.5, ceiling=2.0).distance(log_value) == pytest.approx(distance)


@pytest.mark.parametrize("log_value", [-math.inf, -1e300, 0.0, 1e300, math.inf])
def test_nothing_is_outside_a_band_without_bounds(log_value):
    assert Band().distance(log_value) == 0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"floor": -1.0}, r"`floor` must be >= 0 and finite, got -1\.0\."),
        ({"floor": math.nan}, r"`floor` must be >= 0 and finite, got nan\."),
        ({"floor": math.inf}, r"`floor` must be >= 0 and finite, got inf\."),
        ({"floor": 2.0, "ceiling": 1.0}, r"`floor` must be below `ceiling`, got 2\.0 and 1\.0\."),
        ({"floor": 1.0, "ceiling": 1.0}, r"`floor` must be below `ceiling`, got 1\.0 and 1\.0\."),
        ({"ceiling": math.nan}, r"`floor` must be below `ceiling`, got 0\.0 and nan\."),
    ],
)
def test_a_band_without_room_is_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        Band(**bounds)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("strength", -1.0, r"`strength` must be >= 0 and finite, got -1\.0\."),
        ("strength", math.inf, r"`strength` must be >= 0 and finite, got inf\."),
        ("multiplier", -0.5, r"`multiplier` must be >= 0 and finite, got -0\.5\."),
        ("hysteresis", math.nan, r"`hysteresis` must be >= 0 and finite, got nan\."),
        ("saturation", 0.0, r"`saturation` must be positive and finite, got 0\.0\."),
        ("saturation", math.inf, r"`saturation` must be positive and finite, got inf\."),
        ("dwell", -1, r"`dwell` must be >= 0, got -1\."),
        ("smoothing", 1.0, r"`smoothing` must be in \[0, 1\), got 1\.0\."),
        ("smoothing", -0.1, r"`smoothing` must be in \[0, 1\), got -0\.1\."),
        ("smoothing", math.nan, r"`smoothing` must be in \[0, 1\), got nan\."),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        Thermostat(**{setting: value})
