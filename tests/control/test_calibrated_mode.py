"""The policy that knows its chance level."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.control import (
    CalibratedPolicy,
    Mode,
    ModeReading,
    ModeState,
    ModeVerdict,
    ScheduledPolicy,
)

POLICY = CalibratedPolicy(dwell=3, energy=0.5, warmup_steps=0)
ERODING = {"effect_lift": 3.0, "effect_erosion": 10.0, "intent_lift": 3.0, "intent_erosion": 10.0}
CALM = {"effect_lift": 1.0, "effect_erosion": 0.0, "intent_lift": 1.0, "intent_erosion": 0.0}


def reading(step=20, num_principal=8, **changes):
    numbers = {
        "subspace_angle": None,
        "principal_alignment": 0.2,
        "minor_alignment": 0.9,
        "reconstruction_error": 0.5,
        **CALM,
    }
    return ModeReading(
        step=step,
        size=64,
        num_principal=num_principal,
        values=[1.0] * num_principal,
        previous_values=None,
        **numbers | changes,
    )


def run(policy, readings, state=None):
    states = [ModeState() if state is None else state]
    verdicts = []
    for found in readings:
        state, verdict = policy.update(states[-1], found)
        states.append(state)
        verdicts.append(verdict)
    return states[1:], verdicts


def test_erosion_is_answered_and_its_end_too():
    readings = [reading(**ERODING)] * 4 + [reading(**CALM)] * 4
    states, verdicts = run(POLICY, readings)
    assert [state.mode for state in states] == ["full"] + ["lowrank"] * 4 + ["full"] * 3
    assert verdicts[:2] == [ModeVerdict.VOTING, ModeVerdict.CLOBBERING]
    assert verdicts[5] is ModeVerdict.RELEASED


def test_growing_principal_values_are_learning_and_not_erosion():
    states, _ = run(
        POLICY, [reading(effect_lift=50.0, effect_erosion=-20.0, intent_erosion=-20.0)] * 10
    )
    assert all(state.mode is Mode.FULL for state in states)


def test_a_single_vote_changes_nothing():
    states, _ = run(POLICY, [reading(**ERODING), reading(**CALM)] * 10)
    assert all(state.mode is Mode.FULL for state in states)


def test_two_switches_lie_at_least_dwell_apart():
    policy = replace(POLICY, patience=1, dwell=4)
    readings = [reading(**(ERODING if i % 2 == 0 else CALM)) for i in range(40)]
    states, verdicts = run(policy, readings)
    switched = [
        i for i, (old, new) in enumerate(pairwise(states)) if old.num_switches < new.num_switches
    ]
    assert len(switched) > 3
    assert all(later - earlier >= 4 for earlier, later in pairwise(switched))
    assert ModeVerdict.DWELLING in verdicts


@given(st.lists(st.tuples(st.floats(0.9, 1.1), st.floats(-3, 0.9)), min_size=1, max_size=200))
def test_noise_never_leaves_full_mode_and_never_stays_in_the_other(noise):
    readings = [
        reading(effect_lift=lift, effect_erosion=e, intent_lift=lift, intent_erosion=e)
        for lift, e in noise
    ]
    assert all(state.mode is Mode.FULL for state in run(POLICY, readings)[0])
    locked = ModeState(mode=Mode.LOW_RANK, rank=56)
    states, _ = run(POLICY, readings, locked)
    assert all(state.mode is Mode.FULL for state in states[1:])


@pytest.mark.parametrize("name", ["effect_lift", "effect_erosion", "intent_erosion"])
def test_a_number_that_is_not_finite_holds_the_mode(name):
    states, verdicts = run(POLICY, [reading(**{**ERODING, name: math.nan})] * 5)
    assert all(state.mode is Mode.FULL for state in states)
    assert set(verdicts) == {ModeVerdict.CONTINUE}


def test_warm_up_decides_nothing():
    policy = replace(POLICY, warmup_steps=100)
    states, verdicts = run(policy, [reading(step=99, **ERODING)] * 5)
    assert states[-1].mode is Mode.FULL
    assert set(verdicts) == {ModeVerdict.WARMUP}


@given(
    st.lists(st.floats(0, 100), min_size=8, max_size=8),
    st.one_of(st.none(), st.integers(1, 63)),
    st.floats(0.1, 100),
)
def test_the_number_of_principal_directions_stays_in_bounds(values, rank, norm):
    values = sorted(values, reverse=True)
    k = POLICY.num_principal(ModeState(rank=rank), values, norm, 64)
    assert 1 <= k <= POLICY.most_principal(64) == 8


def test_principal_directions_hold_the_energy_asked_for():
    values = [3.0, 2.0, 1.0, 1.0, 1.0]
    k = POLICY.num_principal(ModeState(), values, math.sqrt(16.0), 64)
    assert k == 1  # 9 of 16
    k = replace(POLICY, energy=0.75).num_principal(ModeState(), values, math.sqrt(16.0), 64)
    assert k == 2


def test_a_small_change_of_the_spectrum_keeps_their_number():
    policy = replace(POLICY, energy=0.5, max_principal=0.5, deadband=0.2)
    flat = [1.0] * 32
    now = ModeState(rank=64 - 16)
    assert policy.num_principal(now, flat, math.sqrt(36.0), 64) == 16  # 18 would do
    assert policy.num_principal(now, flat, math.sqrt(46.0), 64) == 23


def test_the_state_survives_json():
    state = run(POLICY, [reading(**ERODING)] * 3)[0][-1]
    again = ModeState(**json.loads(json.dumps(asdict(state))))
    assert replace(again, mode=Mode(again.mode)) == state


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"exit_erosion": 5.0}, "`exit_erosion` and `enter_erosion` must satisfy 0 <="),
        ({"exit_erosion": -1.0}, "`exit_erosion` and `enter_erosion` must satisfy 0 <="),
        ({"patience": 0}, "`patience` must be >= 1, got 0"),
        ({"dwell": -1}, "`dwell` must be >= 0, got -1"),
        ({"energy": 1.0}, r"`energy` must be in \(0, 1\), got 1.0"),
        ({"max_principal": 0.6}, r"`max_principal` must be in \(0, 0.5\], got 0.6"),
        ({"deadband": 1.0}, r"`deadband` must be in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_are_refused_at_construction(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CalibratedPolicy(**settings)


def test_a_matrix_too_small_to_split_is_refused():
    with pytest.raises(ValueError, match="`size` must be >= 4, got 3"):
        POLICY.most_principal(3)


def test_a_schedule_is_followed():
    policy = ScheduledPolicy(schedule={20: "lowrank", 60: "full"}, principal=0.25)
    readings = [reading(step=step, num_principal=16) for step in (10, 20, 40, 60)]
    states, _ = run(policy, readings)
    assert [str(state.mode) for state in states] == ["full", "lowrank", "lowrank", "full"]
    assert {state.rank for state in states} == {48}
    assert policy.num_principal(ModeState(), [], 1.0, 64) == 16


def test_mistakes_in_a_schedule_are_refused():
    with pytest.raises(ValueError, match="`schedule` must give full or lowrank, got 'half'"):
        ScheduledPolicy(schedule={0: "half"})
    with pytest.raises(ValueError, match=r"`principal` must be in \(0, 1\), got 1"):
        ScheduledPolicy(schedule={}, principal=1)
