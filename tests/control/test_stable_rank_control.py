"""The rule that adaptive low-rank training began with."""

import math
from dataclasses import replace

import pytest

from spectral_lightning.control import (
    RankReading,
    RankState,
    RankVerdict,
    StableRankController,
    layers_at_floor,
)


def with_stable_rank(stable_rank, rank, step=0, capacity=512):
    """Reading whose values have this stable rank: one 1, and the rest alike."""
    rest = math.sqrt((stable_rank - 1) / (rank - 1)) if rank > 1 else 0.0
    values = [1.0] + [rest] * (rank - 1)
    return RankReading(step=step, shape=(512, 512), rank=rank, capacity=capacity, values=values)


def run(controller, stable_ranks, rank):
    """Decisions in a loop in which every decision is followed."""
    state, decisions = RankState(), []
    for i, stable_rank in enumerate(stable_ranks):
        reading = with_stable_rank(stable_rank, rank, step=200 * (i + 1))
        decision = controller.update({"layer": state}, {"layer": reading})["layer"]
        state, rank = decision.state, decision.rank
        decisions.append(decision)
    return decisions


def test_v10_step_by_step():
    """Target 1.5 * 10 = 15 from rank 64, by hand: the mean is 15 + 49 * 0.8^i.

    Steps of 4 down to 20 at update 11, where the mean is 19.21. Then 18.37 is inside the dead band,
    17.69 is not (-2.31 -> -2), and from 18 the mean needs until update 18 to be 2 below (15.88).
    """
    decisions = run(StableRankController(), [10.0] * 30, rank=64)
    means = [15 + 49 * 0.8**i for i in range(1, 31)]
    assert [decision.state.smoothed for decision in decisions] == pytest.approx(means)
    assert [decision.rank for decision in decisions] == [
        *(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20),
        *[20] + [18] * 5 + [16] * 13,
    ]
    assert decisions[0].verdict is RankVerdict.SHRUNK
    assert decisions[11].verdict is RankVerdict.IN_DEADBAND
    assert all(decision.target == pytest.approx(15.0) for decision in decisions)


def trace(stable_ranks, rank, *, truncate=False, low=8, high=512):
    """An independent transcript of the two rules."""
    mean, ranks = float(rank), []
    for stable_rank in stable_ranks:
        mean = 0.8 * mean + (1.0 - 0.8) * max(low, min(1.5 * stable_rank, high))
        delta = mean - rank
        if abs(delta) >= 2.0:
            step = round(delta)
            if truncate:
                step = int(math.copysign(max(1, min(4, abs(delta))), delta))
            rank = max(low, min(rank + max(-4, min(4, step)), high))
        ranks.append(rank)
    return ranks


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("start", [12, 33, 64])
def test_both_roundings_follow_a_changing_stable_rank_exactly(rounding, start):
    stable_ranks = [1.0 + 9.0 * (1 + math.sin(0.7 * i)) / 2 for i in range(60)]
    found = run(StableRankController(rounding=rounding), stable_ranks, start)
    wanted = trace(stable_ranks, start, truncate=rounding == "truncate")
    assert [decision.rank for decision in found] == wanted


def test_halves_are_rounded_to_even():
    # ema = 0.5 * 16 + 0.5 * 1.5 * 14 / 1.5 ... with decay 0.5: 16 -> 13.5, a difference of -2.5.
    controller = StableRankController(ema_decay=0.5, safety_factor=1.0)
    assert run(controller, [11.0], rank=16)[0].rank == 14  # -2, and not -3
    assert run(controller, [9.0], rank=16)[0].rank == 12  # -3.5 -> -4


def test_truncation_steps_less_than_rounding():
    settings = {"ema_decay": 0.5, "safety_factor": 1.0}
    # A difference of -2.75: three by rounding, two by truncation.
    assert run(StableRankController(**settings), [10.5], 16)[0].rank == 13
    assert run(StableRankController(rounding="truncate", **settings), [10.5], 16)[0].rank == 14


def test_truncation_moves_by_one_at_least():
    controller = StableRankController(
        rounding="truncate", ema_decay=0.5, safety_factor=1.0, change_threshold=0.25
    )
    assert run(controller, [15.0], 16)[0].rank == 15  # a difference of -0.5


@pytest.mark.parametrize("start", [64, 63, 62, 61])
def test_the_dead_band_ends_a_long_fall_at_9_or_10_instead_of_the_floor(start):
    decisions = run(StableRankController(), [1.5] * 200, start)
    last = decisions[-1]
    assert last.rank in {9, 10}
    assert last.verdict is RankVerdict.IN_DEADBAND
    assert last.state.smoothed == pytest.approx(8.0)
    assert layers_at_floor({"layer": last.rank}, 8) == ()
    assert layers_at_floor({"layer": last.rank}, 8, slack=2.0) == ("layer",)


def test_random_factors_are_compressed_before_they_have_learned_anything():
    # Random 512 x 512 factors of rank 64 have stable rank 27.6: a target of 41.
    controller = StableRankController()
    assert controller.target(with_stable_rank(27.6, 64)) == pytest.approx(41.4)
    assert run(controller, [27.6] * 30, 64)[-1].rank < 45


def test_growth_takes_a_stable_rank_of_two_thirds_of_the_rank():
    controller = StableRankController(ema_decay=0.0)
    assert run(controller, [20.0], 30)[0].rank == 30
    assert run(controller, [22.0], 30)[0].rank == 33
    assert run(controller, [22.0], 30)[0].verdict is RankVerdict.GROWN


def test_defaults_neither_warm_up_nor_wait_nor_round():
    clock = StableRankController().clock
    assert (clock.warmup_steps, clock.cooldown_steps, clock.quantum) == (0, 0, 1)
    assert (clock.rank_min, clock.max_step, clock.freeze_after) == (8, 4, None)
    assert clock.interval == clock.interval_max == 200


def test_a_clock_is_kept_if_one_is_asked_for():
    clock = replace(StableRankController().clock, warmup_steps=600, quantum=8, max_step=8)
    decisions = run(StableRankController(clock=clock), [10.0] * 20, rank=64)
    assert [decision.rank for decision in decisions[:2]] == [64, 64]
    assert decisions[0].verdict is RankVerdict.WARMUP
    assert all(decision.rank % 8 == 0 for decision in decisions)
    assert decisions[-1].rank == 16


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("safety_factor", 0.0, r"`safety_factor` must be positive and finite, got 0\.0\."),
        ("safety_factor", math.inf, r"`safety_factor` must be positive and finite, got inf\."),
        ("ema_decay", 1.0, r"`ema_decay` must be in \[0, 1\), got 1\.0\."),
        ("change_threshold", -1.0, r"`change_threshold` must be >= 0 and finite, got -1\.0\."),
        ("rounding", "up", r"`rounding` must be one of nearest, truncate, got 'up'\."),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        StableRankController(**{setting: value})
