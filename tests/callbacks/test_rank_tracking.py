"""Ranks follow teachers whose ranks rise and fall during one run."""

from dataclasses import replace
from itertools import pairwise

import pytest

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.control import BudgetAllocator, EnergyController, RankClock
from spectral_lightning.testing.teachers import TeacherTask

# The floor lies below all teachers: a rank there would be no finding.
CLOCK = RankClock(
    warmup_steps=100, cooldown_steps=100, quantum=4, rank_min=4, interval=20, interval_max=100
)
STEPS = 1000
"""Of a phase: 50 shortest intervals."""
DIM = 40


def follow(fit, controller, phases, rank=12, **settings):
    """Ranks after each optimizer step, phase by phase."""
    task = TeacherTask(phases, STEPS, rank=rank, capacity=28, dim=DIM, **settings)
    callback = RankAdaptation(controller=controller, every_n_steps=20, fade_steps=20)
    fit(callback, task=task, max_steps=STEPS * len(phases))
    return [task.ranks[i * STEPS : (i + 1) * STEPS] for i in range(len(phases))]


def flips(ranks):
    moves = [new - old for old, new in pairwise(ranks) if new != old]
    return sum((a > 0) != (b > 0) for a, b in pairwise(moves))


@pytest.mark.parametrize("start", [20, 4])
def test_the_rank_that_a_teacher_needs_is_found_from_above_and_from_below(fit, start):
    (found,) = follow(fit, EnergyController(clock=CLOCK), [[8]], rank=start)
    assert all(abs(rank - 8) <= CLOCK.quantum for (rank,) in found[-200:])


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_the_rank_follows_a_teacher_up_and_down(fit, decay):
    teachers = [[8], [20], [8]]
    ranks = follow(fit, EnergyController(clock=CLOCK), teachers, decay=decay)
    for found, (teacher,) in zip(ranks, teachers, strict=True):
        assert all(abs(rank - teacher) <= CLOCK.quantum for (rank,) in found[-200:])
        assert flips([rank for (rank,) in found]) <= 1


def test_a_need_that_turns_again_is_followed_again(fit):
    """By a quantum each time: what a controller that distrusts reversals takes for noise."""
    teachers = [[12], [16], [12]]
    ranks = follow(fit, EnergyController(clock=CLOCK), teachers, rank=16)
    assert [set(found[-200:]) for found in ranks] == [{tuple(needed)} for needed in teachers]


def test_a_budget_moves_to_the_layer_that_needs_it_and_back(fit):
    teachers = [[8, 20], [20, 8], [8, 20]]
    components = sum(teachers[0])  # no more than both need
    controller = BudgetAllocator(clock=CLOCK, budget=float(components * 2 * DIM))
    ranks = follow(fit, controller, teachers)
    for found, needed in zip(ranks, teachers, strict=True):
        assert set(found[-200:]) == {tuple(needed)}
        assert all(sum(both) <= components for both in found)
        assert all(flips(layer) <= 1 for layer in zip(*found, strict=True))


def test_what_was_sold_is_bought_right_after_it_has_faded(fit):
    """The buyer need not wait for an interval that had become long."""
    clock = replace(CLOCK, interval_max=1000)
    controller = BudgetAllocator(clock=clock, budget=float(28 * 2 * DIM))
    (before, after) = follow(fit, controller, [[8, 20], [20, 8]])
    ranks = [*before[-1:], *after]
    sold = next(step for step, (old, new) in enumerate(pairwise(ranks)) if new[1] < old[1])
    bought = next(step for step, (old, new) in enumerate(pairwise(ranks)) if new[0] > old[0])
    assert 0 <= bought - sold <= 2 * clock.interval
