"""What holds for all rank controllers, in closed loop with layers of a known spectrum."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.control import (
    BudgetAllocator,
    EnergyController,
    RankClock,
    RankReading,
    RankState,
    RankVerdict,
    ScheduledController,
    StableRankController,
)

KINDS = ("stable", "truncating", "energy", "scheduled", "budget")


def make(kind, clock, budget=1e9):
    if kind == "energy":
        return EnergyController(clock=clock, energy=0.9)
    if kind == "scheduled":
        return ScheduledController(
            clock=clock, initial_rank=64, target_rank=clock.rank_min, total_steps=1500
        )
    if kind == "budget":
        return BudgetAllocator(clock=clock, budget=budget)
    return StableRankController(
        clock=clock, rounding="truncate" if kind == "truncating" else "nearest"
    )


class Layer:
    """A layer with a fixed spectrum; each reading is of its leading components, with noise."""

    def __init__(self, rng, clock, *, noise=0.1):
        self.rng, self.noise = rng, noise
        self.capacity = rng.randint(1, 64)
        self.shape = (self.capacity + rng.randint(0, 64), self.capacity + rng.randint(0, 64))
        low, high = clock.bounds(self.capacity)
        self.rank = rng.randint(low, high)
        decay, needed = rng.uniform(0.7, 1.0), rng.randint(1, 64)
        self.spectrum = [decay**i if i < needed else 1e-3 for i in range(self.capacity)]
        self.lift = rng.choice([None, 0.0, 1.0, 3.0, 50.0])

    def read(self, step):
        noisy = [
            value * math.exp(self.noise * self.rng.gauss(0, 1))
            for value in self.spectrum[: self.rank]
        ]
        return RankReading(
            step=step,
            shape=self.shape,
            rank=self.rank,
            capacity=self.capacity,
            values=sorted(noisy, reverse=True),
            growth=self.lift,
        )


@st.composite
def clocks(draw):
    quantum, interval = draw(st.integers(1, 12)), draw(st.integers(1, 60))
    rank_min = draw(st.integers(1, 12))
    return RankClock(
        warmup_steps=draw(st.sampled_from([0, 200])),
        cooldown_steps=draw(st.sampled_from([0, 100, 300])),
        freeze_after=draw(st.sampled_from([None, 900])),
        quantum=quantum,
        max_step=quantum + draw(st.integers(0, 20)),
        rank_min=rank_min,
        rank_max=draw(st.none() | st.integers(rank_min, 70)),
        interval=interval,
        interval_max=interval + draw(st.integers(0, 200)),
    )


def layers_of(seed, clock, count=3, **settings):
    rng = random.Random(seed)
    return {f"layer{i}": Layer(rng, clock, **settings) for i in range(count)}


def cost(layers):
    return sum(layer.rank * sum(layer.shape) for layer in layers.values())


def drive(controller, layers, steps, states=None):
    """Follow a controller; yields what it was told and what it decided, at each check."""
    states = dict(states or {})
    for step in steps:
        due = {n for n in layers if controller.is_due(states.get(n, RankState()), step)}
        if not due:
            continue
        readings = {name: layer.read(step) for name, layer in layers.items() if name in due}
        decisions = controller.update(states, readings)
        assert decisions.keys() == readings.keys()
        yield readings, decisions
        for name, decision in decisions.items():
            states[name], layers[name].rank = decision.state, decision.rank


SEEDS = st.integers(0, 10**6)
KIND = st.sampled_from(KINDS)


@settings(deadline=None, max_examples=150)
@given(KIND, clocks(), SEEDS)
def test_bounds_quantum_largest_step_and_clock_always_hold(kind, clock, seed):
    layers = layers_of(seed, clock)
    changed = {}
    for readings, decisions in drive(make(kind, clock), layers, range(0, 1500, 7)):
        for name, (state, rank, _, verdict) in decisions.items():
            reading = readings[name]
            low, high = clock.bounds(reading.capacity)
            assert low <= rank <= high
            assert clock.interval <= state.interval <= clock.interval_max
            assert state.checked == reading.step
            if rank == reading.rank:
                assert verdict not in {RankVerdict.GROWN, RankVerdict.SHRUNK}
                continue
            assert verdict is (RankVerdict.GROWN if rank > reading.rank else RankVerdict.SHRUNK)
            assert rank % clock.quantum == 0 or rank in {low, high}
            assert abs(rank - reading.rank) <= clock.max_step
            assert reading.step >= clock.warmup_steps
            assert clock.freeze_after is None or reading.step < clock.freeze_after
            assert reading.step - changed.get(name, -math.inf) >= clock.cooldown_steps
            changed[name] = state.changed
            assert state.changed == reading.step


@settings(deadline=None, max_examples=50)
@given(KIND, clocks(), SEEDS)
def test_state_survives_a_json_round_trip_in_the_middle_of_a_run(kind, clock, seed):
    layers = layers_of(seed, clock)
    controller, states = make(kind, clock), {}
    for _, decisions in drive(controller, layers, range(0, 500, 20)):
        states |= {name: decision.state for name, decision in decisions.items()}
    text = json.dumps({name: asdict(state) for name, state in states.items()}, allow_nan=False)
    restored = {name: RankState(**numbers) for name, numbers in json.loads(text).items()}
    assert restored == states
    readings = {name: layer.read(600) for name, layer in layers.items()}
    assert controller.update(restored, readings) == controller.update(states, readings)


@settings(deadline=None, max_examples=50)
@given(KIND, clocks(), SEEDS)
def test_decisions_do_not_depend_on_the_order_of_layers_or_on_what_was_asked_before(
    kind, clock, seed
):
    layers = layers_of(seed, clock, count=5)
    controller = make(kind, clock, budget=cost(layers) + 100)
    for readings, decisions in drive(controller, layers, range(0, 600, 50)):
        turned = dict(reversed(readings.items()))
        state = {name: decision.state for name, decision in decisions.items()}
        assert controller.update(state, turned) == controller.update(state, readings)


@settings(deadline=None, max_examples=100)
@given(
    KIND,
    clocks(),
    SEEDS,
    st.sampled_from([math.nan, math.inf, 0.0, None]),
    st.sampled_from([None, 1.0, math.nan]),
)
def test_a_broken_reading_holds_and_says_so(kind, clock, seed, broken, lift):
    layers = layers_of(seed, clock)
    controller, states = make(kind, clock), {}
    for _, decisions in drive(controller, layers, range(0, 500, 20)):
        states |= {name: decision.state for name, decision in decisions.items()}
    readings = {name: layer.read(5000) for name, layer in layers.items()}
    values = [] if broken is None else [broken] * layers["layer0"].rank
    readings["layer0"] = replace(readings["layer0"], values=values, growth=lift)
    before = states.get("layer0", RankState())
    state, rank, target, verdict = controller.update(states, readings)["layer0"]
    assert rank == layers["layer0"].rank
    assert verdict is readings["layer0"].failure
    assert math.isfinite(target)
    interval = state.interval  # which layers with one budget share
    assert state == replace(before, checked=5000, interval=interval)
    assert clock.interval <= interval <= clock.interval_max


@settings(deadline=None, max_examples=60)
@given(KIND, clocks(), SEEDS)
def test_a_constant_input_settles(kind, clock, seed):
    clock = replace(clock, freeze_after=None, cooldown_steps=0)
    layers = layers_of(seed, clock, noise=0.0)
    for layer in layers.values():  # the lift is honest: it tells of components that are missing
        layer.lift = None if layer.lift is None else min(layer.lift, 1.0)
    ranks = []
    states = {}
    controller = make(kind, clock, budget=2.0 * cost(layers))
    for step in range(2000, 2000 + 200 * clock.interval_max, clock.interval_max):
        for _, decisions in drive(controller, layers, [step], states):
            states |= {name: decision.state for name, decision in decisions.items()}
        ranks.append({name: layer.rank for name, layer in layers.items()})
    assert all(found == ranks[-1] for found in ranks[-20:])
    assert {states[name].interval for name in layers} == {clock.interval_max}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_can_be_printed_and_name_the_controller(kind):
    clock = RankClock(rank_min=16)
    controller = make(kind, clock)
    found = json.loads(json.dumps(controller.settings))
    assert found["controller"] == type(controller).__name__
    assert found["clock"]["rank_min"] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_a_null_model_stands_beside_the_real_one(kind):
    clock = RankClock(warmup_steps=0)
    controller = make(kind, clock, budget=32 * 1024)
    learned = [1.0] * 16 + [0.01] * 48
    null = [1.0 - i / 128 for i in range(64)]
    readings = {
        name: RankReading(step=0, shape=(512, 512), rank=64, capacity=64, values=values)
        for name, values in {"learned": learned, "null": null}.items()
    }
    targets = controller.targets(readings)
    for name, reading in readings.items():
        alone = controller.target(reading)
        assert math.isfinite(alone)
        if kind != "budget":
            assert targets[name] == alone == controller.update({}, readings)[name].target
    if kind in {"stable", "truncating", "energy"}:
        assert targets["learned"] < targets["null"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_target_is_made_up_for_a_failed_reading(kind):
    reading = RankReading(step=0, shape=(512, 512), rank=64, capacity=64, values=[])
    assert make(kind, RankClock()).targets({"layer": reading}) == {}
