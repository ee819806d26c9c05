"""Rank by a schedule."""

import pytest

from spectral_lightning.control import (
    RankClock,
    RankReading,
    RankState,
    RankVerdict,
    ScheduledController,
)

SCHEDULE = ScheduledController(
    initial_rank=64, target_rank=16, total_steps=2000, initial_steps=500, final_steps=500
)


def run(controller, rank, steps, capacity=64):
    state, ranks = RankState(), []
    for step in steps:
        reading = RankReading(
            step=step, shape=(64, 64), rank=rank, capacity=capacity, values=[1.0] * rank
        )
        decision = controller.update({"layer": state}, {"layer": reading})["layer"]
        state, rank = decision.state, decision.rank
        ranks.append(rank)
    return ranks


def test_the_cubic_by_hand():
    # 16 + 48 (1 - t)^3 at t = 0, 0.25, 0.5, 0.75, 1.
    steps = (0, 500, 750, 1000, 1250, 1500, 2000, 10**6)
    assert [SCHEDULE.rank_at(step) for step in steps] == [64, 64, 36.25, 22, 16.75, 16, 16, 16]


def test_ranks_follow_the_cubic_rounded_up_to_quanta():
    steps = range(0, 2001, 125)
    ranks = run(SCHEDULE, 64, steps)
    assert ranks == [64] * 5 + [56, 40, 32, 24, 24, 24, 24] + [16] * 5
    for step, rank in zip(steps, ranks, strict=True):
        assert SCHEDULE.rank_at(step) <= rank < SCHEDULE.rank_at(step) + 8


def test_a_schedule_can_also_grow():
    growing = ScheduledController(initial_rank=8, target_rank=64, total_steps=1000)
    ranks = run(growing, 8, range(100, 1101, 100))
    assert ranks == sorted(ranks)
    assert ranks[-1] == 64


def test_a_layer_with_less_capacity_follows_within_its_bounds():
    assert run(SCHEDULE, 20, (0, 750, 1000, 1500), capacity=20) == [20, 20, 20, 16]


def test_a_target_off_the_quantum_is_allowed_at_a_bound():
    clock = RankClock(warmup_steps=0, cooldown_steps=0, rank_min=12)
    low = ScheduledController(initial_rank=64, target_rank=12, total_steps=1000, clock=clock)
    assert run(low, 64, range(100, 1201, 100))[-1] == 12


def test_what_is_measured_does_not_matter_unless_it_is_broken():
    broken = RankReading(step=1000, shape=(64, 64), rank=64, capacity=64, values=[])
    decision = SCHEDULE.update({}, {"layer": broken})["layer"]
    assert (decision.rank, decision.verdict) == (64, RankVerdict.NO_ENERGY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_rank": 0}, r"`initial_rank` must be >= 1, got 0\."),
        ({"initial_steps": -1}, r"`initial_steps` must be >= 0, got -1\."),
        ({"final_steps": -1}, r"`final_steps` must be >= 0, got -1\."),
        (
            {"initial_steps": 60, "final_steps": 40},
            r"`total_steps` must be above initial_steps \+ final_steps = 100, got 100\.",
        ),
        (
            {"target_rank": 4},
            r"`target_rank` must be in the clock's bounds \[8, capacity\], got 4\.",
        ),
        (
            {"target_rank": 40, "clock": RankClock(rank_max=32)},
            r"`target_rank` must be in the clock's bounds \[8, 32\], got 40\.",
        ),
        (
            {"target_rank": 12},
            r"`target_rank` must be a multiple of clock.quantum=8, got 12; a quantum of 1 allows",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduledController(
            **{"initial_rank": 64, "target_rank": 16, "total_steps": 100} | settings
        )
