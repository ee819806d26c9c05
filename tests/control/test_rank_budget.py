"""Ranks of all layers out of one budget: single decisions."""

from dataclasses import replace

import pytest

from spectral_lightning.control import (
    BudgetAllocator,
    RankClock,
    RankReading,
    RankState,
    RankVerdict,
)

FAST = RankClock(warmup_steps=0, cooldown_steps=0, interval=100, interval_max=100)


def readings_of(**spectra):
    return {
        name: RankReading(
            step=1000,
            shape=shape,
            rank=len(values),
            capacity=128,
            values=values,
            growth=growth,
        )
        for name, (shape, values, growth) in spectra.items()
    }


def ranks_of(decisions):
    return {name: decision.rank for name, decision in decisions.items()}


def test_of_two_layers_with_one_spectrum_the_expensive_one_pays():
    values = [0.9**i for i in range(32)]
    readings = readings_of(wide=((512, 2048), values, None), narrow=((512, 512), values, None))
    allocator = BudgetAllocator(budget=24 * 2560 + 32 * 1024, clock=FAST)
    decisions = allocator.update({}, readings)
    assert ranks_of(decisions) == {"wide": 24, "narrow": 32}
    assert decisions["wide"].verdict is RankVerdict.OVER_BUDGET


def test_free_budget_goes_to_the_layer_whose_gradient_asks_for_it():
    flat = [1.0] * 16
    asking = readings_of(
        calm=((512, 512), flat, 1.0), eager=((512, 512), flat, 8.0), noisy=((512, 512), flat, 1.9)
    )
    decisions = BudgetAllocator(budget=64 * 1024, clock=FAST).update({}, asking)
    assert ranks_of(decisions) == {"calm": 16, "eager": 32, "noisy": 16}
    assert decisions["eager"].verdict is RankVerdict.GROWN
    assert decisions["calm"].verdict is RankVerdict.SETTLED


def test_without_a_lift_ranks_are_only_cut():
    readings = readings_of(a=((512, 512), [1.0] * 16, None), b=((512, 512), [1.0] * 16, None))
    for components, ranks in [(64, {"a": 16, "b": 16}), (24, {"a": 8, "b": 16})]:
        allocator = BudgetAllocator(budget=components * 1024, clock=FAST)
        assert ranks_of(allocator.update({}, readings)) == ranks


@pytest.mark.parametrize(("share", "rank"), [(0.25, 64), (0.5, 128), (1.0, 128)])
def test_a_share_is_one_of_the_dense_matrices(share, rank):
    readings = readings_of(layer=((512, 512), [1.0] * 16, 8.0))
    allocator = BudgetAllocator(budget=share, clock=FAST)
    assert allocator.allowance(readings) == share * 512 * 512
    assert allocator.target(readings["layer"]) == rank  # of 128 in its storage


def test_a_swap_has_to_be_worth_its_hysteresis():
    rich, poor = [1.0] * 16, [1.0] * 8 + [0.8] * 8  # the poor one's quantum: 0.64 / 0.78 of it
    readings = readings_of(rich=((512, 512), rich, 1000.0), poor=((512, 512), poor, 1.0))
    swap = {"rich": 24, "poor": 8}
    keep = {"rich": 16, "poor": 16}
    # It offers 0.4995 of its energy, the other one holds 0.3902: 1.28 times.
    for hysteresis, ranks in [(0.2, swap), (0.4, keep)]:
        allocator = BudgetAllocator(budget=32 * 1024, clock=FAST, hysteresis=hysteresis)
        assert ranks_of(allocator.update({}, readings)) == ranks
    decisions = allocator.update({}, readings)
    assert decisions["rich"].verdict is RankVerdict.NO_ROOM
    assert decisions["poor"].verdict is RankVerdict.IN_DEADBAND
    assert allocator.targets(readings) == {"rich": 24.0, "poor": 8.0}


@pytest.mark.parametrize(
    ("direction", "turned", "rank"),
    [
        (-1, None, 48),  # sold so far, and never turned
        (-1, 500, 48),  # turned 50 intervals ago
        (-1, 510, 16),
        (1, 510, 48),  # goes on in the same direction
    ],
)
def test_a_layer_turns_at_most_once_in_50_intervals(direction, turned, rank):
    readings = readings_of(layer=((512, 512), [1.0] * 16, 8.0))
    allocator = BudgetAllocator(budget=0.5, clock=replace(FAST, interval=10))
    state = RankState(changed=700, direction=direction, turned=turned)
    assert ranks_of(allocator.update({"layer": state}, readings)) == {"layer": rank}


def test_a_failed_layer_keeps_its_rank_and_its_part_of_the_budget():
    readings = readings_of(
        broken=((512, 512), [float("nan")] * 40, None), good=((512, 512), [1.0] * 16, 8.0)
    )
    decisions = BudgetAllocator(budget=64 * 1024, clock=FAST).update({}, readings)
    assert ranks_of(decisions) == {"broken": 40, "good": 24}
    assert decisions["broken"].verdict is RankVerdict.NOT_FINITE
    assert decisions["good"].target == 24.0
    # Nothing can be done to it, also if the budget does not even hold both.
    cut = BudgetAllocator(budget=40 * 1024, clock=FAST).update({}, readings)
    assert ranks_of(cut) == {"broken": 40, "good": 8}
    assert cut["broken"].verdict is RankVerdict.NOT_FINITE


def test_all_layers_are_checked_as_often_as_the_most_restless_one():
    readings = readings_of(a=((512, 512), [1.0] * 16, 8.0), b=((512, 512), [1.0] * 16, 1.0))
    allocator = BudgetAllocator(budget=32 * 1024, clock=replace(FAST, interval_max=1000))
    targets = allocator.targets(readings)
    for change, interval in [(1.0, 300), (2.0, 140)]:
        states = {
            "a": RankState(checked=900, interval=200, target=targets["a"]),
            "b": RankState(checked=900, interval=200, target=change * targets["b"]),
        }
        decisions = allocator.update(states, readings)
        assert {decision.state.interval for decision in decisions.values()} == {interval}


def test_a_layer_that_has_to_wait_says_what_for():
    readings = readings_of(a=((512, 512), [1.0] * 16, 8.0), b=((512, 512), [1.0] * 16, 1.0))
    for settings, verdict in [
        ({"warmup_steps": 1001}, RankVerdict.WARMUP),
        ({"freeze_after": 1000}, RankVerdict.FROZEN),
    ]:
        allocator = BudgetAllocator(budget=64 * 1024, clock=replace(FAST, **settings))
        decisions = allocator.update({}, readings)
        assert ranks_of(decisions) == {"a": 16, "b": 16}
        assert decisions["a"].verdict is verdict
        assert decisions["b"].verdict is RankVerdict.SETTLED


def test_a_layer_outside_the_bounds_is_led_back():
    clock = replace(FAST, rank_max=24)
    readings = readings_of(layer=((512, 512), [1.0] * 64, 1.0))
    decisions = BudgetAllocator(budget=0.5, clock=clock).update({}, readings)
    assert (decisions["layer"].rank, decisions["layer"].verdict) == (32, RankVerdict.SHRUNK)


def test_a_layer_that_is_left_out_is_refused():
    readings = readings_of(a=((512, 512), [1.0] * 16, 1.0))
    message = r"`readings` must cover all layers that share the budget, got none of \['b', 'c'\]\."
    with pytest.raises(ValueError, match=message):
        BudgetAllocator(budget=0.5).update({"c": RankState(), "b": RankState()}, readings)


def test_a_budget_below_the_smallest_ranks_is_refused():
    readings = readings_of(a=((512, 512), [1.0] * 16, 1.0), b=((8, 8), [1.0] * 8, 1.0))
    message = (
        r"`budget` must leave room for rank_min=8 in all layers, which takes 8320 parameters, got"
        r" 0\.01, which is 2622\."
    )
    with pytest.raises(ValueError, match=message):
        BudgetAllocator(budget=0.01).update({}, readings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, r"`budget` must be positive and finite, got 0\.0\."),
        ({"budget": float("nan")}, r"`budget` must be positive and finite, got nan\."),
        ({"hysteresis": -0.1}, r"`hysteresis` must be >= 0 and finite, got -0\.1\."),
        ({"growth_threshold": 0.9}, r"`growth_threshold` must be >= 1 and finite, got 0\.9\."),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BudgetAllocator(**{"budget": 0.5} | settings)
