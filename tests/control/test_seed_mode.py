"""The original's decision rules, as they were."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.control import (
    Mode,
    ModeReading,
    ModeState,
    ModeVerdict,
    SeedPolicy,
    SeedThresholds,
    seed_decision,
    seed_next_rank,
)

PRESETS = {"conservative": (0.4, 0.6, 0.1, 0.01), "phase1": (0.3, 0.5, 0.15, 0.01)}
SPECTRUM = [float(value) for value in range(40, 0, -1)]


def reading(**changes):
    numbers = {
        "step": 20,
        "size": 40,
        "num_principal": 10,
        "values": SPECTRUM,
        "previous_values": SPECTRUM,
        "subspace_angle": 0.5,
        "principal_alignment": 0.2,
        "minor_alignment": 0.9,
        "reconstruction_error": 0.5,
        "intent_lift": 1.0,
        "intent_erosion": 0.0,
        "effect_lift": 1.0,
        "effect_erosion": 0.0,
    }
    return ModeReading(**numbers | changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_the_originals_numbers(preset):
    limits = SeedPolicy(preset=preset).thresholds
    found = (limits.danger, limits.safe, limits.stable, limits.reconstruction)
    assert found == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("danger", "stable", "safe", "exact"), list(itertools.product((True, False), repeat=4))
)
def test_danger_goes_before_optimal_before_unsafe_before_neutral(
    preset, danger, stable, safe, exact
):
    limits = SeedPolicy(preset=preset).thresholds
    found = seed_decision(
        10,
        limits,
        subspace_angle=limits.stable + (-1e-3 if stable else 0),  # the bound itself does not count
        principal_alignment=limits.danger + (1e-3 if danger else 0),
        minor_alignment=limits.safe + (1e-3 if safe else 0),
        reconstruction_error=limits.reconstruction + (-1e-3 if exact else 0),
    )
    if danger:
        assert found == (True, "gradient_clobbering_risk")
    elif stable and safe and exact:
        assert found == (True, "optimal_lowrank_conditions")
    elif not exact:
        assert found == (False, "reconstruction_unsafe")
    else:
        assert found == (None, "continue_current_mode")


def test_nothing_is_decided_while_warming_up():
    worst = {"subspace_angle": 0.0, "minor_alignment": 1.0, "reconstruction_error": 0.0}
    found = seed_decision(9, SeedThresholds(), principal_alignment=1.0, **worst)
    assert found == (False, "warmup_period")


FLAT, STEEP = [1.0] * 40, [100.0, 90.0, *([1e-4] * 38)]


@pytest.mark.parametrize(
    ("values", "previous", "rank", "expected"),
    [
        (SPECTRUM, SPECTRUM, 30, 24),  # stable: int(0.8 * 30)
        (SPECTRUM, [2 * value for value in SPECTRUM], 30, 36),  # changing: int(1.2 * 30)
        (SPECTRUM, [2 * value for value in SPECTRUM], 39, 39),  # 46 is more than size - 1
        (SPECTRUM, SPECTRUM, 9, 8),  # not below rank_min
        (SPECTRUM, [2 * value for value in SPECTRUM], 4, 8),
        (SPECTRUM, None, 30, 8),  # the last gap, 2 to 1, is the widest: 40 - 38 = 2
        (STEEP, None, 30, 20),  # cutoff 40 - 1 = 39, energy 40 - 2 = 38, half 20
        (FLAT, None, 30, 8),  # energy: 40 - 40 = 0
        (SPECTRUM, SPECTRUM[:20], 30, 8),  # of another size: as without
    ],
)
def test_the_next_rank_is_the_originals(values, previous, rank, expected):
    assert seed_next_rank(values, previous, rank).rank == expected


def test_ten_percent_of_change_is_still_stable():
    def scaled(factor):
        return [value * factor for value in SPECTRUM]

    assert seed_next_rank(scaled(1.0999), SPECTRUM, 30).rationale == "stable, decrease r"
    assert seed_next_rank(scaled(1.1001), SPECTRUM, 30).rank == 36


def test_the_fixed_cutoff_counts_one_less():
    gap = [10.0] * 30 + [1e-6] * 10
    ranks = [seed_next_rank(gap, None, 1, rank_min=1, fixed_cutoff=f).rank for f in (False, True)]
    assert ranks == [10, 10]  # the energy bound, 40 - 30, hides it here
    wide = [10.0] * 30 + [2.0] * 10
    ranks = [seed_next_rank(wide, None, 1, rank_min=1, fixed_cutoff=f).rank for f in (False, True)]
    assert ranks == [1, 1]


@given(
    st.lists(st.floats(0, 1e6), min_size=4, max_size=50),
    st.integers(1, 60),
    st.integers(1, 20),
    st.booleans(),
)
def test_the_next_rank_never_leaves_its_bounds(values, rank, rank_min, has_previous):
    values = sorted(values, reverse=True)
    previous = [value * 1.01 for value in values] if has_previous else None
    found = seed_next_rank(values, previous, rank, rank_min=rank_min).rank
    assert min(rank_min, len(values) - 1) <= found <= len(values) - 1


def test_the_first_reading_only_sets_the_baseline():
    policy = SeedPolicy()
    state, verdict = policy.update(
        ModeState(), reading(previous_values=None, subspace_angle=None, principal_alignment=1.0)
    )
    assert (state, verdict) == (ModeState(), ModeVerdict.INITIAL)


def test_it_switches_with_the_next_rank_and_shrinks_it_while_spectra_are_stable():
    policy, state, ranks = SeedPolicy(), ModeState(), []
    assert policy.num_principal(state, SPECTRUM, 1.0, 40) == 10
    for _ in range(6):
        state, verdict = policy.update(state, reading(principal_alignment=0.5))
        ranks.append(state.rank)
    assert verdict is ModeVerdict.CLOBBERING
    assert ranks == [24, 19, 15, 12, 9, 8]
    assert policy.num_principal(state, SPECTRUM, 1.0, 40) == 32
    assert state.num_switches == 1
    state, verdict = policy.update(state, reading(reconstruction_error=0.5))
    assert (state.mode, verdict) == (Mode.FULL, ModeVerdict.UNSAFE)


def test_the_original_locks_in_on_random_gradients():
    """Why `CalibratedPolicy` exists: noise alone is above `danger` once rank is below 216."""
    policy, state = SeedPolicy(), ModeState(mode=Mode.LOW_RANK, rank=196)
    spectrum = [float(value) for value in range(256, 0, -1)]
    base = reading(size=256, values=spectrum, previous_values=spectrum)
    for _ in range(200):
        k = 256 - state.rank
        numbers = {"principal_alignment": (k / 256) ** 0.5, "minor_alignment": (1 - k / 256) ** 0.5}
        state, _ = policy.update(
            state,
            replace(base, num_principal=k, **numbers),
        )
    assert (state.mode, state.rank) == (Mode.LOW_RANK, 8)


def test_a_number_that_is_not_finite_changes_nothing():
    state = ModeState(mode=Mode.LOW_RANK, rank=20)
    found = SeedPolicy().update(state, reading(principal_alignment=float("nan")))
    assert found == (state, ModeVerdict.CONTINUE)


def test_the_state_survives_json():
    state = SeedPolicy().update(ModeState(), reading(principal_alignment=0.5))[0]
    again = ModeState(**json.loads(json.dumps(asdict(state))))
    assert replace(again, mode=Mode(again.mode)) == state


def test_mistakes_are_refused_at_construction():
    with pytest.raises(ValueError, match="`preset` must be one of conservative, phase1, got 'x'"):
        SeedPolicy(preset="x")
    with pytest.raises(ValueError, match="`rank_min` must be >= 1, got 0"):
        SeedPolicy(rank_min=0)
    with pytest.raises(ValueError, match="`danger` must be >= 0 and finite, got -1"):
        SeedThresholds(danger=-1)
    with pytest.raises(ValueError, match="`size` must be >= 4, got 3"):
        seed_next_rank([3.0, 2.0, 1.0], None, 1)
