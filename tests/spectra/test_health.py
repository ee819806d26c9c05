"""Distance of a relative stable rank to the range it should stay in."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.spectra import HealthyRange

POSITIVE = st.floats(1e-6, 1e6)


@given(POSITIVE)
def test_offset_is_negative_exactly_inside_the_range(x):
    healthy = HealthyRange()
    assert (healthy.offset(x) <= 0) == (healthy.floor <= x <= healthy.ceiling) or math.isclose(
        abs(healthy.offset(x)), 0, abs_tol=1e-12
    )


@pytest.mark.parametrize("factor", [1.5, 10.0, 1e4])
def test_a_factor_below_is_as_far_as_the_same_factor_above(factor):
    healthy = HealthyRange(floor=0.25, ceiling=0.5)
    assert healthy.offset(0.25 / factor) == pytest.approx(math.log(factor))
    assert healthy.offset(0.5 * factor) == pytest.approx(math.log(factor))


def test_a_number_that_could_not_be_computed_has_no_distance():
    assert math.isnan(HealthyRange().offset(math.nan))


@pytest.mark.parametrize(
    ("floor", "ceiling"),
    [(0, 1), (-1, 1), (1, 1), (2, 1), (0.1, math.inf), (math.nan, 1), (0.1, math.nan)],
)
def test_a_range_of_wrong_bounds_is_refused(floor, ceiling):
    with pytest.raises(ValueError, match=r"`floor` and `ceiling` must be finite, with 0 < floor"):
        HealthyRange(floor=floor, ceiling=ceiling)


def test_random_layers_are_inside_and_square_orthogonal_ones_above():
    assert HealthyRange().offset(1.0) < 0 < HealthyRange().offset(4.0)
