"""Page, loss, mode and rank in the picture of mode switching; the rest: `test_mode_figure`."""

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex

from spectral_lightning.dashboards.figures import render
from spectral_lightning.dashboards.mode_figure import mode_figure
from spectral_lightning.spectra import Condition
from spectral_lightning.testing.mode_events import (
    layer_analysis,
    mode_settings,
    skipped_analysis,
)

RELEASE = Condition("intent_erosion", "release", above=False, threshold=1.0)


def analysis(step, *args, **changes):
    return layer_analysis(
        step, *args, **{"principal_alignment": 0.2, "subspace_angle": 0.5} | changes
    )


def panels(figure):
    """The panels by the first word of their title."""
    return {axes.get_title("left").split()[0]: axes for axes in figure.axes}


def panel(title, *events):
    return panels(mode_figure(events))[title]


def points(line):
    return [tuple(point) for point in line.get_xydata().tolist() if not math.isnan(point[1])]


def legend(axes):
    found = axes.get_legend()
    return None if found is None else [text.get_text() for text in found.get_texts()]


def band(axes, row, step):
    """How much of the colour of low-rank mode a row has at a step, in [0, 1]."""
    (image,) = axes.images
    begin, end, *_ = image.get_extent()
    cells = np.asarray(image.get_array())
    return cells[row, int((step - begin) / (end - begin) * cells.shape[1])]


@pytest.mark.parametrize("events", [[], [mode_settings()], [mode_settings(), skipped_analysis(20)]])
def test_there_is_no_picture_before_the_first_analysis(events):
    assert mode_figure(events) is None


def test_panels_stand_below_each_other_on_one_step_axis():
    figure = mode_figure([mode_settings(), analysis(20), analysis(40)])
    assert list(panels(figure)) == ["Training", "Mode", "principal_alignment", "Rank"]
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
    assert len({(box.x0, box.x1) for box in boxes}) == 1
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 60)}
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "", "optimizer step"]


def test_title_names_policy_and_protection_of_the_latest_settings():
    events = [mode_settings(), analysis(20), mode_settings(step=20, policy="CalibratedPolicy")]
    (title,) = mode_figure(events).texts
    assert title.get_text() == "Mode switching: CalibratedPolicy, protection block"


def test_loss_is_drawn_once_per_step_and_left_out_where_there_is_none():
    losses = {20: 3.0, 40: None, 60: math.nan, 80: 2.0}
    events = [analysis(s, layer, loss=loss) for s, loss in losses.items() for layer in ("a", "b")]
    (line,) = panel("Training", mode_settings(), *events).get_lines()
    assert points(line) == [(20, 3.0), (80, 2.0)]


def test_row_is_coloured_from_the_switch_to_low_rank_mode_until_the_release():
    events = [
        analysis(20, to="lowrank"),
        analysis(40, mode="lowrank"),
        analysis(60, mode="lowrank", to="full"),
        analysis(80),
    ]
    axes = panel("Mode", mode_settings(), *events)
    assert [band(axes, 0, step) for step in (5, 19, 21, 59, 61, 99)] == [0, 0, 1, 1, 0, 0]
    colour = axes.images[0].cmap
    assert to_hex(colour(0.0)) == "#ffffff"
    assert to_hex(colour(1.0)) == "#8fb0d3"


def test_mode_before_the_first_analysis_is_the_one_it_found():
    axes = panel("Mode", mode_settings(step=10), analysis(20, mode="lowrank", to="full"))
    assert [band(axes, 0, step) for step in (11, 19, 21)] == [1, 1, 0]


def test_resumed_run_goes_on_in_the_mode_that_its_next_analysis_found():
    events = [mode_settings(), analysis(20, to="lowrank"), mode_settings(step=30), analysis(40)]
    axes = panel("Mode", *events)
    assert [band(axes, 0, step) for step in (25, 29, 31, 45)] == [1, 1, 0, 0]
    assert legend(axes) == ["low-rank", "full", "resumed"]
    for other in axes.figure.axes:
        assert [30, 30] in [list(line.get_xdata()) for line in other.get_lines()]


def test_each_layer_has_its_row_in_the_order_of_appearance():
    events = [skipped_analysis(20, "c"), analysis(20, "a", to="lowrank"), analysis(20, "b")]
    axes = panel("Mode", mode_settings(), *events)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]
    assert list(axes.get_yticks()) == [0.5, 1.5, 2.5]
    assert axes.get_ylim() == (3, 0), "the first layer is on top"
    assert [band(axes, row, 30) for row in range(3)] == [0, 1, 0]


def test_skipped_analyses_are_marked_on_the_row_of_their_layer():
    events = [
        analysis(20, "a"),
        analysis(20, "b"),
        skipped_analysis(40, "b"),
        skipped_analysis(60, "a"),
    ]
    axes = panel("Mode", mode_settings(), *events)
    (marks,) = axes.get_lines()
    assert marks.get_marker() == "x"
    assert sorted(points(marks)) == [(40, 1.5), (60, 0.5)]
    assert legend(axes) == ["low-rank", "full", "analysis skipped"]


def test_marks_of_skipped_analyses_are_thinned_out_where_they_would_overlap():
    events = [skipped_analysis(step) for step in range(20, 40_000, 20)]
    (marks,) = panel("Mode", mode_settings(), analysis(40_000), *events).get_lines()
    assert 200 <= len(points(marks)) <= 250


def test_low_rank_stretch_narrower_than_a_pixel_is_seen():
    events = [analysis(step) for step in range(20, 100_000, 20)]
    events[2500] = analysis(events[2500].step, to="lowrank")
    events[2501] = analysis(events[2501].step, mode="lowrank", to="full")
    axes = panel("Mode", mode_settings(), *events)
    cells = np.asarray(axes.images[0].get_array())
    assert cells.shape == (1, 750)
    assert np.count_nonzero(cells >= 0.5) == np.count_nonzero(cells) in (1, 2)


def test_run_without_settings_is_drawn_without_thresholds():
    figure = mode_figure([analysis(20), analysis(40)])
    assert list(panels(figure)) == ["Training", "Mode", "Rank"]
    assert figure.texts[0].get_text() == "Mode switching"
    assert figure.axes[0].get_xlim() == (20, 60)


def test_rank_is_drawn_over_the_size_of_the_layer_as_steps():
    events = [analysis(20), analysis(40, to_rank=8), analysis(60, rank=8)]
    (line,) = panel("Rank", mode_settings(), *events).get_lines()
    assert line.get_drawstyle() == "steps-post"
    assert points(line) == [(20, 0.75), (20, 0.75), (40, 0.5), (60, 0.5), (80, 0.5)]


def test_constant_rank_does_not_look_like_change():
    low, high = panel("Rank", mode_settings(), analysis(20), analysis(40)).get_ylim()
    assert high - low > 0.1
    assert low < 0.75 < high


def test_without_a_measure_the_layers_of_lowest_rank_are_named():
    events = [analysis(20, f"{rank}", rank=rank) for rank in range(1, 16)]
    axes = panel("Rank", mode_settings(RELEASE), *events)
    assert legend(axes) == ["1", "2", "3", "4", "5", "6", "other layers"]


@pytest.mark.parametrize(("num_layers", "num_labels"), [(1, 1), (40, 40), (41, 21), (80, 40)])
def test_rows_are_all_labelled_up_to_40_and_no_labels_overlap(num_layers, num_labels):
    names = (f"model.blocks.{i}.attn.c_proj" for i in range(num_layers))
    figure = mode_figure([mode_settings(), *(analysis(20, name) for name in names)])
    render(figure)
    boxes = [label.get_window_extent() for label in panels(figure)["Mode"].get_yticklabels()]
    assert len(boxes) == num_labels
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_any_layer_name_can_be_drawn_and_named():
    names = ["_orig_mod.fc", "a$b$", "sch\u00f6n", "x" * 300, "a_b^c"]
    figure = mode_figure([mode_settings(), *(analysis(20, name) for name in names)])
    render(figure)
    found = panels(figure)
    rows = [label.get_text() for label in found["Mode"].get_yticklabels()]
    assert rows[:3] == ["_orig_mod.fc", "a$b$", r"sch\xf6n"]
    assert max(map(len, rows)) == 28
    assert legend(found["principal_alignment"]) == [*rows, "danger above 0.4"]
