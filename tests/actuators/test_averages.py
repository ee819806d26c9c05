"""Averages of factors follow the layer's changes, as if all had been taken in the new form."""

import copy

import pytest
import torch

from spectral_lightning.actuators import (
    best_components,
    follow_gates_,
    fresh_rows,
    grow_,
    grow_averages_,
    regauge_,
    regauge_averages_,
)
from spectral_lightning.nn import LowRankLinear

N, M, RANK, CAPACITY, DECAY = 20, 14, 8, 12, 0.9


def history(num_steps=6):
    """A layer that moves, and what it was after each step."""
    torch.manual_seed(0)
    layer = LowRankLinear(N, M, RANK, capacity=CAPACITY).double()
    steps = [copy.deepcopy(layer)]
    for seed in range(num_steps):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for factor in (layer.left_factor[:, :RANK], layer.right_factor[:RANK]):
                move = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor += 0.1 * factor.norm() / move.norm() * move
        steps.append(copy.deepcopy(layer))
    return layer, steps


def average(steps):
    """Exponential average of the factors of some layers of equal rank."""
    found = copy.deepcopy(steps[0])
    with torch.no_grad():
        for step in steps[1:]:
            found.left_factor.mul_(DECAY).add_(step.left_factor, alpha=1 - DECAY)
            found.right_factor.mul_(DECAY).add_(step.right_factor, alpha=1 - DECAY)
    return found


def weight(layer):
    return layer.spectral_weight().detach()


@pytest.mark.parametrize("rank", [RANK, 5])
def test_an_average_is_that_of_factors_in_the_new_form(rank):
    layer, steps = history()
    own, found = average(steps), best_components(layer, rank)
    regauge_averages_([own], layer, found)
    for step in steps:
        regauge_(step, None, found)
    assert own.rank == own.active_rank == rank
    wanted = average(steps)
    assert torch.allclose(own.left_factor, wanted.left_factor, atol=1e-12)
    assert torch.allclose(own.right_factor, wanted.right_factor, atol=1e-12)


def test_a_change_of_form_alone_leaves_the_averaged_weight():
    layer, steps = history()
    own = average(steps)
    before = weight(own)
    assert (before - weight(layer)).norm() > 0.05 * before.norm()
    regauge_averages_([own], layer, best_components(layer, RANK))
    assert torch.allclose(weight(own), before, atol=1e-12)


def test_an_average_of_equal_weights_loses_what_the_layer_loses():
    layer, _ = history()
    own = copy.deepcopy(layer)
    found = best_components(layer, 3)
    regauge_averages_([own], layer, found)
    regauge_(layer, None, found)
    assert torch.allclose(weight(own), weight(layer), atol=1e-12)


def test_growth_leaves_the_averaged_weight_bit_for_bit():
    layer, steps = history()
    own = average(steps)
    before, rows = weight(own), fresh_rows(layer, 3)
    grow_averages_([own], layer, rows)
    grow_(layer, None, rows)
    assert torch.equal(weight(own), before)
    assert own.rank == layer.rank == 11
    assert torch.equal(own.right_factor[RANK:11], layer.right_factor[RANK:11])


def test_what_fades_in_the_layer_fades_in_its_averages():
    layer, steps = history()
    own = average(steps)
    layer.gate[5:RANK] = 0.25
    own.gate.fill_(0.7)  # averaged too, as are all buffers
    own.active_rank.fill_(RANK - 1)  # rounded down
    follow_gates_([own], layer)
    assert torch.equal(own.gate, layer.gate)
    assert own.active_rank == RANK


def test_at_the_end_of_a_fade_the_average_has_lost_the_same():
    layer, _ = history()
    own = copy.deepcopy(layer)
    layer.gate[5:RANK] = 0  # in the average they are still there
    found = best_components(layer, 5)
    regauge_averages_([own], layer, found)
    regauge_(layer, None, found)
    assert torch.allclose(weight(own), weight(layer), atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda averages, layer: regauge_averages_(averages, layer, best_components(layer, 4)),
        lambda averages, layer: grow_averages_(averages, layer, fresh_rows(layer, 1)),
        follow_gates_,
    ],
)
def test_an_average_that_missed_a_change_is_refused(change):
    layer, steps = history()
    own = average(steps)
    grow_(layer, None, fresh_rows(layer, 1))
    with pytest.raises(ValueError, match="`averages` must have the rank of their layer, 9, got 8"):
        change([own], layer)
