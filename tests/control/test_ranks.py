"""Readings of low-rank layers, and what they say of energy and floors."""

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.control import (
    RankReading,
    RankState,
    RankVerdict,
    StableRankController,
    energy_rank,
    energy_shares,
    layers_at_floor,
)

SPECTRA = st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=30).map(
    lambda values: sorted(values, reverse=True)
)


def reading(values, growth=None, rank=2):
    return RankReading(step=0, shape=(16, 8), rank=rank, capacity=8, values=values, growth=growth)


def test_a_component_costs_a_row_and_a_column():
    assert reading([2.0, 1.0]).unit_cost == 24


@pytest.mark.parametrize(
    ("values", "growth", "failure"),
    [
        ([2.0, 1.0], None, None),
        ([2.0, 0.0], 0.0, None),
        ([math.nan, 1.0], None, RankVerdict.NOT_FINITE),
        ([math.inf, 1.0], 1.0, RankVerdict.NOT_FINITE),
        ([2.0, 1.0], math.nan, RankVerdict.NOT_FINITE),
        ([2.0, 1.0], math.inf, RankVerdict.NOT_FINITE),
        ([], None, RankVerdict.NO_ENERGY),
        ([0.0, 0.0], 5.0, RankVerdict.NO_ENERGY),
    ],
)
def test_a_reading_says_why_nothing_can_be_decided_from_it(values, growth, failure):
    assert reading(values, growth).failure is failure


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_the_layer_cannot_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"`rank` must be in \[1, capacity=8\], got {rank}\."):
        reading([], rank=rank)


def test_values_of_another_rank_are_refused():
    message = r"`values` must hold one value for each of 2 components, or none, got 3\."
    with pytest.raises(ValueError, match=message):
        reading([3.0, 2.0, 1.0])


@given(SPECTRA, st.floats(0.01, 0.99))
def test_fewest_components_hold_the_energy(values, energy):
    shares = energy_shares(values)
    assert sum(shares) == pytest.approx(1.0)
    rank = energy_rank(values, energy)
    assert 1 <= rank <= len(values)
    assert sum(shares[:rank]) >= energy - 1e-9
    assert sum(shares[: rank - 1]) <= energy + 1e-9


@given(SPECTRA, st.floats(1e-3, 1e3))
def test_energy_rank_does_not_depend_on_the_scale(values, scale):
    assert energy_rank([scale * value for value in values], 0.98) == energy_rank(values, 0.98)


def test_energy_rank_by_hand():
    # Energies 16, 9, 4, 1 of 30: 0.533, 0.833, 0.967, 1.
    values = [4.0, 3.0, 2.0, 1.0]
    assert [energy_rank(values, energy) for energy in (0.5, 0.6, 0.9, 0.97)] == [1, 2, 3, 4]


@pytest.mark.parametrize("spike", [10.0, 5.0, 3.0])
def test_one_outlier_hides_the_rest_from_the_stable_rank_but_not_from_the_energy_rank(spike):
    found = RankReading(step=0, shape=(64, 64), rank=64, capacity=64, values=[spike] + [1.0] * 63)
    stable = StableRankController().target(found)
    assert stable == pytest.approx(1.5 * (spike**2 + 63) / spike**2)
    assert stable <= 12
    assert energy_rank(found.values, 0.98) >= 60


def test_floors_and_the_dead_band_above_them_are_listed_in_order():
    ranks = {"v": 14, "q": 8, "k": 10, "o": 11, "tiny": 4}
    assert layers_at_floor(ranks, 8) == ("q", "tiny")
    assert layers_at_floor(ranks, 8, slack=2.0) == ("q", "k", "tiny")


def test_state_survives_a_json_round_trip():
    state = RankState(smoothed=0.1 + 0.2, target=3.0, checked=7, changed=5, interval=9, votes=-2)
    assert RankState(**json.loads(json.dumps(asdict(state)))) == state
