"""Rank by energy follows what a layer needs, upwards as well as downwards."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from spectral_lightning.control import (
    EnergyController,
    RankClock,
    RankReading,
    RankState,
    RankVerdict,
)

FAST = RankClock(warmup_steps=0, cooldown_steps=0, interval=100, interval_max=100)
QUANTUM = FAST.quantum


class Student:
    """A low-rank layer that learns a teacher of rank `needed`: large values, and a noise floor.

    The lift is that of a gradient averaged over 8 steps: near 8 while components are missing, near
    1 otherwise. New components start with no energy and have theirs after `delay` steps.
    """

    def __init__(self, needed, rank=64, *, noise=0.1, delay=0, seed=0):
        self.needed, self.rank, self.noise, self.delay = needed, rank, noise, delay
        self.rng = random.Random(seed)
        self.born = [-delay] * rank

    def read(self, step):
        values = [
            (1.0 if i < self.needed and step - born >= self.delay else 0.02)
            * max(0.1, 1 + self.noise * self.rng.gauss(0, 1))
            for i, born in enumerate(self.born)
        ]
        lift = 8.0 if self.rank < self.needed else 1.0
        return RankReading(
            step=step,
            shape=(512, 512),
            rank=self.rank,
            capacity=256,
            values=sorted(values, reverse=True),
            growth=lift * max(0.0, 1 + 3 * self.noise * self.rng.gauss(0, 1)),
        )

    def follow(self, controller, steps, state=None):
        """Ranks after each check, and the last state."""
        state, ranks = RankState() if state is None else state, []
        for step in steps:
            if not controller.is_due(state, step):
                continue
            decision = controller.update({"": state}, {"": self.read(step)})[""]
            state, self.rank = decision.state, decision.rank
            self.born = (self.born + [step] * self.rank)[: self.rank]
            ranks.append(self.rank)
        return ranks, state


def flips(ranks):
    """Changes of direction."""
    moves = [new - old for old, new in pairwise(ranks) if new != old]
    return sum((a > 0) != (b > 0) for a, b in pairwise(moves))


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_follows_a_falling_a_rising_and_again_a_falling_need(seed):
    controller = EnergyController()
    student, state = Student(24, seed=seed), None
    for needed, start in [(24, 0), (120, 20_000), (41, 50_000), (200, 80_000), (8, 120_000)]:
        student.needed = needed
        _, state = student.follow(controller, range(start, start + 40_000), state)
        assert abs(student.rank - needed) <= QUANTUM


@pytest.mark.parametrize("needed", [8, 24, 41, 60, 73, 100, 133])
@pytest.mark.parametrize("seed", range(5))
def test_noise_at_a_constant_need_flips_the_rank_at_most_once_in_50_updates(needed, seed):
    student = Student(needed, rank=min(needed + 8, 136), noise=0.15, seed=seed)
    ranks, _ = student.follow(EnergyController(clock=FAST), range(100, 5100, 100))
    assert len(ranks) == 50
    assert flips(ranks) <= 1
    assert abs(ranks[-1] - needed) <= QUANTUM


def test_checks_get_rare_while_the_need_is_constant_and_frequent_when_it_moves():
    controller, state = EnergyController(clock=RankClock(warmup_steps=0)), None
    student = Student(48, rank=48, noise=0.02)
    intervals = []
    for needed in (48, 120, 16):
        student.needed = needed
        start = 100 if state is None else state.checked
        found = []
        for step in range(start, start + 30_000, 100):
            _, state = student.follow(controller, [step], state)
            found.append(state.interval)
        intervals.append(found)
    shortest, longest = controller.clock.interval, controller.clock.interval_max
    for found in intervals:
        assert set(found) <= set(range(shortest, longest + 1))
        assert found[-1] == longest
    for found in intervals[1:]:
        assert found[0] == longest
        assert min(found) <= 2 * shortest


def test_new_components_have_the_cool_down_to_prove_themselves():
    patient = EnergyController(clock=replace(FAST, cooldown_steps=400))
    student = Student(64, rank=32, delay=300, noise=0.05)
    ranks, _ = student.follow(patient, range(0, 20_000, 100))
    assert flips(ranks) == 0
    assert ranks[-1] == 64


def test_what_was_taken_back_is_tried_ever_more_seldom():
    # A lift that lies: new components never get any energy.
    student = Student(32, rank=32, noise=0.0)
    student.read = lambda step: replace(Student.read(student, step), growth=50.0)
    ranks, state = student.follow(EnergyController(clock=FAST), range(0, 40_000, 100))
    grown = [i for i, (old, new) in enumerate(pairwise(ranks)) if new > old]
    waits = [later - sooner for sooner, later in pairwise(grown)]
    assert waits == [4 + 16] + [50 + 16] * 5
    assert set(ranks) == {32, 40}
    assert state.num_reversals == state.num_changes - 1


@pytest.mark.parametrize("seed", range(5))
def test_a_need_that_turns_again_and_again_is_followed_every_time(seed):
    # By a quantum each time, which all are reversals; but they stand for 60 updates.
    student, state = Student(32, rank=32, noise=0.05, seed=seed), None
    for turn in range(10):
        student.needed = 40 if turn % 2 else 32
        start = 6000 * turn
        steps = range(start, start + 6000, 100)
        ranks, state = student.follow(EnergyController(clock=FAST), steps, state)
        assert student.rank == student.needed
        assert flips(ranks) == 0


def reading(values, growth=None, step=1000):
    return RankReading(
        step=step,
        shape=(512, 512),
        rank=len(values),
        capacity=256,
        values=values,
        growth=growth,
    )


EAGER = EnergyController(clock=FAST, energy=0.9, hysteresis=0.05, patience=1)


def spectrum(tail_energy, rank=32):
    """`rank` values, of which the last quantum holds a share of the energy."""
    tail = (tail_energy / QUANTUM) ** 0.5
    body = ((1 - tail_energy) / (rank - QUANTUM)) ** 0.5
    return [body] * (rank - QUANTUM) + [tail] * QUANTUM


@pytest.mark.parametrize(
    ("tail_energy", "growth", "rank", "verdict"),
    [
        (0.04, 1.0, 24, RankVerdict.SHRUNK),
        (0.04, 9.0, 24, RankVerdict.SHRUNK),  # what is missing finds room in what is free
        (0.06, 1.0, 32, RankVerdict.SETTLED),
        (0.06, 9.0, 32, RankVerdict.SETTLED),
        (0.12, 1.9, 32, RankVerdict.SETTLED),
        (0.12, 2.1, 40, RankVerdict.GROWN),
        (0.12, None, 32, RankVerdict.SETTLED),
    ],
)
def test_free_tails_shrink_full_ones_grow_and_between_lies_a_band(
    tail_energy, growth, rank, verdict
):
    decision = EAGER.update({}, {"": reading(spectrum(tail_energy), growth)})[""]
    assert (decision.rank, decision.verdict) == (rank, verdict)


def test_changes_take_votes_in_a_row():
    controller = replace(EAGER, patience=3)
    grow, shrink = reading(spectrum(0.2), 5.0), reading(spectrum(0.04), 1.0)
    state, seen = RankState(), []
    for found in (grow, grow, shrink, shrink, grow, grow, grow):
        state, rank, _, verdict = controller.update({"": state}, {"": found})[""]
        seen.append((state.votes, verdict))
    assert [votes for votes, _ in seen] == [1, 2, -1, -2, 1, 2, 0]
    assert {verdict for _, verdict in seen[:6]} == {RankVerdict.VOTING}
    assert (rank, seen[-1][1]) == (40, RankVerdict.GROWN)


def test_votes_of_a_warm_up_or_a_cool_down_do_not_count():
    controller = replace(EAGER, patience=2, clock=replace(FAST, warmup_steps=500))
    state = RankState()
    for step in (300, 400, 500):
        found = reading(spectrum(0.04), step=step)
        state, rank, _, verdict = controller.update({"": state}, {"": found})[""]
        assert rank == 32
        assert state.votes == (-1 if step == 500 else 0)
        assert verdict is (RankVerdict.VOTING if step == 500 else RankVerdict.WARMUP)


def test_a_layer_at_its_floor_or_capacity_says_so():
    sharp = EAGER.update({}, {"": reading([1.0] + [1e-3] * 7)})[""]
    assert (sharp.rank, sharp.verdict) == (8, RankVerdict.AT_BOUND)
    full = EAGER.update({}, {"": replace(reading([1.0] * 32, 9.0), capacity=32)})[""]
    assert (full.rank, full.target, full.verdict) == (32, 40.0, RankVerdict.AT_BOUND)


def test_several_free_quanta_go_at_once_up_to_the_largest_step():
    values = [1.0] * 16 + [1e-3] * 112
    decision = EAGER.update({}, {"": reading(values)})[""]
    assert decision.rank == 128 - FAST.max_step
    assert decision.target == 15.0  # 14.4 of 16 equal components hold 90 %


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0.0}, r"`energy` and `hysteresis` must satisfy .* got 0\.0 and 0\.005\."),
        ({"energy": 0.999}, r"`energy` and `hysteresis` must satisfy .* got 0\.999 and 0\.005\."),
        ({"hysteresis": -0.1}, r"`energy` and `hysteresis` must .* got 0\.98 and -0\.1\."),
        ({"growth_threshold": 0.5}, r"`growth_threshold` must be >= 1 and finite, got 0\.5\."),
        ({"patience": 0}, r"`patience` must be >= 1, got 0\."),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnergyController(**settings)
