"""When ranks may change, how far, and how often layers are looked at."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.control import RankClock, RankReading, RankState, RankVerdict


@st.composite
def clocks(draw):
    quantum = draw(st.integers(1, 16))
    rank_min = draw(st.integers(1, 20))
    return RankClock(
        quantum=quantum,
        max_step=quantum + draw(st.integers(0, 40)),
        rank_min=rank_min,
        rank_max=draw(st.none() | st.integers(rank_min, 100)),
    )


RANKS = st.integers(1, 120)
WANTED = st.floats(allow_nan=False)


@given(clocks(), RANKS, WANTED, RANKS)
def test_a_move_ends_on_a_quantum_or_a_bound_within_reach(clock, capacity, wanted, rank):
    rank = min(rank, capacity)
    low, high = clock.bounds(capacity)
    new = clock.move(rank, wanted, capacity)
    assert abs(new - rank) <= max(clock.max_step, low - rank, rank - high)
    if new != rank:
        assert new % clock.quantum == 0 or new in {low, high}
        assert (new > rank) == (min(max(wanted, low), high) > rank)
    if low <= rank <= high:
        assert low <= new <= high
        assert abs(new - rank) <= clock.max_step


@given(clocks(), RANKS, WANTED, RANKS)
def test_moves_reach_what_is_wanted_and_never_cut_below_it(clock, capacity, wanted, rank):
    rank = min(rank, capacity)
    low, high = clock.bounds(capacity)
    goal = min(max(wanted, low), high)
    for _ in range(200):
        new = clock.move(rank, wanted, capacity)
        assert new >= min(goal, rank)
        if new == rank:
            break
        rank = new
    assert new == rank
    assert goal <= rank < goal + clock.quantum or rank == high


@given(clocks(), RANKS, RANKS, st.sampled_from([1, -1]))
def test_a_neighbour_is_the_next_allowed_rank(clock, capacity, rank, direction):
    low, high = clock.bounds(capacity)
    rank = min(max(rank, low), high)
    new = clock.neighbour(rank, direction, capacity)
    if new == rank:
        assert rank == (high if direction > 0 else low)
    else:
        assert (new > rank) == (direction > 0)
        assert 0 < abs(new - rank) <= clock.quantum
        assert new % clock.quantum == 0 or new in {low, high}


def test_a_layer_smaller_than_the_smallest_rank_keeps_what_it_has():
    clock = RankClock(rank_min=8)
    assert clock.bounds(5) == (5, 5)
    assert clock.move(5, 1.0, 5) == clock.move(5, 100.0, 5) == 5


def test_bounds_need_not_be_multiples_of_the_quantum():
    clock = RankClock(quantum=8, max_step=8, rank_min=10, rank_max=30)
    down, up = [30], [10]
    for _ in range(4):
        down.append(clock.move(down[-1], 1.0, 64))
        up.append(clock.move(up[-1], 64.0, 64))
    assert down == [30, 24, 16, 10, 10]
    assert up == [10, 16, 24, 30, 30]


def test_warm_up_cool_down_and_freeze_hold_in_optimizer_steps():
    clock = RankClock(warmup_steps=100, cooldown_steps=50, freeze_after=1000)
    changed = RankState(changed=200)
    assert clock.hold(RankState(), 99) is RankVerdict.WARMUP
    assert clock.hold(RankState(), 100) is None
    assert clock.hold(changed, 249) is RankVerdict.COOLING
    assert clock.hold(changed, 250) is None
    assert clock.hold(changed, 999) is None
    assert clock.hold(changed, 1000) is RankVerdict.FROZEN


def test_a_layer_is_due_after_its_interval_and_never_when_frozen():
    clock = RankClock(interval=50, freeze_after=1000)
    assert [clock.is_due(RankState(), step) for step in (49, 50)] == [False, True]
    state = RankState(checked=400, interval=75)
    assert [clock.is_due(state, step) for step in (474, 475, 999, 1000)] == [
        *(False, True),
        *(True, False),
    ]


def checks(clock, targets, verdict=RankVerdict.SETTLED, step=0):
    """Intervals after checks with these targets, each as soon as it is due."""
    state, intervals = RankState(), []
    for target in targets:
        step += clock.interval if state.interval is None else state.interval
        reading = RankReading(step=step, shape=(64, 64), rank=32, capacity=64, values=[])
        state = clock.tick(state, reading, target, 32, verdict)
        intervals.append(state.interval)
    return intervals


LAZY = RankClock(warmup_steps=0, interval=20, interval_max=200)


def test_the_interval_lengthens_while_a_layer_is_calm_and_shortens_when_it_moves():
    calm = checks(LAZY, [30.0] * 9)
    assert calm == [20, 30, 45, 68, 102, 153, 200, 200, 200]
    drift = checks(LAZY, [30.0] * 9 + [30.0 * 0.8**i for i in range(1, 10)])
    assert drift[9:] == [140, 98, 68, 47, 32, 22, 20, 20, 20]
    again = checks(LAZY, [30.0] * 9 + [20.0] * 4)
    assert again[9:] == [140, 200, 200, 200]


@pytest.mark.parametrize("verdict", [RankVerdict.GROWN, RankVerdict.SHRUNK, RankVerdict.VOTING])
def test_a_layer_that_has_to_change_is_not_calm_whatever_its_target(verdict):
    assert checks(LAZY, [1000.0, 1001.0] * 4, verdict) == [20] * 8


def test_the_interval_waits_in_between_and_in_cool_down_and_warm_up():
    between = [30.0, 33.0] * 4  # 9 and 10 % are neither calm nor moving
    assert checks(LAZY, between) == [20] * 8
    assert checks(LAZY, [30.0] * 4, RankVerdict.COOLING) == [20] * 4
    slow = RankClock(warmup_steps=100, interval=20, interval_max=200)
    assert checks(slow, [30.0] * 6) == [20, 20, 20, 20, 30, 45]


@given(
    st.integers(1, 50),
    st.integers(0, 100),
    st.floats(1, 1e300),
    st.floats(1e-6, 1),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=40),
)
def test_the_interval_never_leaves_its_bounds(shortest, reach, growth, decay, targets):
    clock = RankClock(
        warmup_steps=0,
        interval=shortest,
        interval_max=shortest + reach,
        interval_growth=growth,
        interval_decay=decay,
    )
    assert all(shortest <= found <= shortest + reach for found in checks(clock, targets))


def test_equal_bounds_make_the_interval_constant():
    clock = RankClock(warmup_steps=0, interval=20, interval_max=20)
    assert checks(clock, [1.0, 1.0, 9.0, 9.0]) == [20] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, r"`warmup_steps` must be >= 0, got -1\."),
        ({"cooldown_steps": -1}, r"`cooldown_steps` must be >= 0, got -1\."),
        ({"freeze_after": -1}, r"`freeze_after` must be >= 0 or None, got -1\."),
        ({"quantum": 0}, r"`quantum` must be >= 1, got 0\."),
        ({"max_step": 4}, r"`max_step` must be >= quantum=8, got 4\."),
        ({"rank_min": 0}, r"`rank_min` must be >= 1, got 0\."),
        ({"rank_max": 7}, r"`rank_max` must be >= rank_min=8 or None, got 7\."),
        ({"interval": 0}, r"`interval` must be >= 1, got 0\."),
        ({"interval_max": 99}, r"`interval_max` must be >= interval=100, got 99\."),
        ({"interval_growth": 0.9}, r"`interval_growth` must be >= 1 and finite, got 0\.9\."),
        ({"interval_growth": math.inf}, r"`interval_growth` must be >= 1 and finite, got inf\."),
        ({"interval_decay": 0.0}, r"`interval_decay` must be in \(0, 1\], got 0\.0\."),
        ({"interval_decay": 1.1}, r"`interval_decay` must be in \(0, 1\], got 1\.1\."),
        (
            {"calm": 0.2, "moving": 0.1},
            r"`calm` and `moving` must satisfy 0 <= calm <= moving, got 0\.2 and 0\.1\.",
        ),
        ({"calm": math.nan}, r"`calm` and `moving` must satisfy .* got nan and 0\.15\."),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RankClock(**settings)
