import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.timeline import HeatMapTimeline


def make_reading(name, step, ratio=0.7):
    return Reading(
        name=name,
        step=step,
        shape=(4, 3),
        spectral_norm=ratio,
        spectral_norm_interval=(ratio, ratio),
        frobenius_norm=ratio,
        stable_rank=ratio,
        relative_stable_rank=ratio,
        failure="The weight holds a NaN." if math.isnan(ratio) else None,
    )


def fill(timeline, num_steps, failed=()):
    for step in range(num_steps):
        ratio = math.nan if step in failed else float(step)
        timeline.append(step, [make_reading("a", step, ratio)])
    return timeline.grid()


@pytest.mark.parametrize("max_columns", [2, 3, 8, 9])
def test_timeline_never_exceeds_its_columns_and_covers_every_step(max_columns):
    for num_steps in range(1, 70):
        grid = fill(HeatMapTimeline(max_columns), num_steps)
        assert len(grid.steps) == len(grid.rows[0]) <= max_columns
        assert len(grid.steps) > (max_columns // 2 if num_steps > max_columns else num_steps - 1)
        assert grid.steps[0] == 0
        widths = {b - a for a, b in zip(grid.steps, grid.steps[1:], strict=False)}
        assert len(widths) <= 1, "columns are equally wide"
        assert grid.rows[0][-1] == num_steps - 1, "the last column shows the latest reading"
        assert num_steps - grid.steps[-1] <= max(widths, default=1)


@settings(max_examples=30, deadline=None)
@given(failed=st.sets(st.integers(0, 99), max_size=4))
def test_merging_columns_never_hides_a_failure(failed):
    grid = fill(HeatMapTimeline(8), 100, failed)
    shown = {column for column, value in enumerate(grid.rows[0]) if math.isnan(value)}
    bounds = [*grid.steps, 100]
    assert shown == {
        column
        for column in range(len(grid.steps))
        if failed & set(range(bounds[column], bounds[column + 1]))
    }


def test_layer_that_was_not_measured_differs_from_one_that_failed():
    timeline = HeatMapTimeline()
    timeline.append(0, [make_reading("a", 0)])
    timeline.append(1, [make_reading("a", 1, math.nan), make_reading("b", 1)])
    grid = timeline.grid()
    assert grid.names == ("a", "b")
    assert grid.rows[0][0] == 0.7
    assert math.isnan(grid.rows[0][1])
    assert grid.rows[1] == (None, 0.7)


def test_timeline_keeps_the_measure_it_was_asked_for():
    timeline = HeatMapTimeline(measure="frobenius_norm")
    timeline.append(0, [replace(make_reading("a", 0), frobenius_norm=3.0)])
    assert timeline.grid().rows == ((3.0,),)


def test_timeline_of_one_column_is_refused():
    with pytest.raises(ValueError, match=r"`max_columns` must be >= 2, got 1\."):
        HeatMapTimeline(1)
