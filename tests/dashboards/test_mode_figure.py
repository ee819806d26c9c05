"""Measures in the picture of mode switching, and the picture as a whole."""

import io
import math
import sys
import time
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from spectral_lightning.control import CalibratedPolicy, ScheduledPolicy, SeedPolicy
from spectral_lightning.dashboards.figures import render
from spectral_lightning.dashboards.mode_figure import mode_figure, write_mode_figure
from spectral_lightning.spectra import Condition
from spectral_lightning.testing.mode_events import (
    DANGER,
    OPTIMAL,
    layer_analysis,
    mode_settings,
    skipped_analysis,
)

RELEASE = Condition("intent_erosion", "release", above=False, threshold=1.0)


def analysis(step, *args, **changes):
    return layer_analysis(
        step, *args, **{"principal_alignment": 0.2, "subspace_angle": 0.5} | changes
    )


def run(num_layers, num_analyses):
    """A run in which each layer switches now and then, and some are skipped."""
    rng = np.random.default_rng(0)
    modes = {f"model.blocks.{i // 4}.attn.c_{'qkvo'[i % 4]}": "full" for i in range(num_layers)}
    events = [mode_settings()]
    for step in range(20, 20 * num_analyses + 1, 20):
        for (name, mode), value in zip(
            modes.items(), rng.normal(0.3, 0.1, num_layers), strict=True
        ):
            if rng.random() < 0.01:
                events.append(skipped_analysis(step, name))
                continue
            to, to_rank = "lowrank" if value > 0.4 else "full", int(rng.integers(8, 16))
            events.append(
                analysis(step, name, mode, to, to_rank=to_rank, principal_alignment=value)
            )
            modes[name] = to
    return events


def panels(figure):
    """The panels by the first word of their title."""
    return {axes.get_title("left").split()[0]: axes for axes in figure.axes}


def panel(title, *events):
    return panels(mode_figure(events))[title]


def points(line):
    return [tuple(point) for point in line.get_xydata().tolist() if not math.isnan(point[1])]


def lines(axes, mode="full"):
    """The lines of layers in a panel of a measure, by label."""
    return {line.get_label(): line for line in axes.get_lines() if line.get_gid() == mode}


def thresholds(axes):
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    return {line.get_label(): line.get_ydata()[0] for line in dashed}


def legend(axes):
    found = axes.get_legend()
    return None if found is None else [text.get_text() for text in found.get_texts()]


@pytest.mark.parametrize(
    ("conditions", "measures"),
    [
        ((DANGER, OPTIMAL, RELEASE), ["principal_alignment"]),
        ((OPTIMAL, RELEASE, OPTIMAL._replace(measure="x")), ["subspace_angle", "x"]),
        ((RELEASE,), []),
        (tuple(SeedPolicy().conditions), ["principal_alignment"]),
        (tuple(CalibratedPolicy().conditions), ["effect_erosion"]),
        (tuple(ScheduledPolicy(schedule={}).conditions), []),
    ],
)
def test_measures_are_those_of_danger_or_else_of_optimal_conditions(conditions, measures):
    begin = replace(mode_settings(), conditions=conditions)
    assert list(panels(mode_figure([begin, analysis(20)])))[2:-1] == measures


def test_thresholds_are_dashed_and_named_with_their_role():
    upper = DANGER._replace(role="release", above=False, threshold=0.123456)
    axes = panel("principal_alignment", mode_settings(DANGER, upper), analysis(20))
    assert thresholds(axes) == {"danger above 0.4": 0.4, "release below 0.1235": 0.123456}
    assert legend(axes) == ["fc", "danger above 0.4", "release below 0.1235"]


def test_thresholds_of_a_resumed_run_are_those_of_the_latest_settings():
    latest = mode_settings(DANGER._replace(threshold=0.3), step=40)
    axes = panel("principal_alignment", mode_settings(), analysis(20), latest, analysis(40))
    assert thresholds(axes) == {"danger above 0.3": 0.3}


def test_layers_that_go_furthest_have_colours_and_the_others_are_grey():
    spikes = {f"blocks.{i}": 0.1 * i for i in range(10)}
    events = [analysis(20, name) for name in spikes]
    events += [analysis(40, name, principal_alignment=value) for name, value in spikes.items()]
    axes = panel("principal_alignment", mode_settings(), *events)
    largest = [f"blocks.{i}" for i in range(9, 3, -1)]
    assert legend(axes) == [*largest, "other layers", "danger above 0.4"]
    drawn = lines(axes)
    assert set(drawn) == {*largest, "other layers"}
    assert points(drawn["blocks.9"]) == [(20, 0.2), (40, 0.9)]
    assert len(points(drawn["other layers"])) == 2 * 4
    colours = {to_hex(drawn[name].get_color()) for name in drawn}
    assert len(colours) == 7
    assert to_hex(drawn["other layers"].get_color()) == "#a6a6a6"


def test_far_is_below_where_danger_is_below():
    values = {f"blocks.{i}": 0.1 * i for i in range(10)}
    events = [analysis(20, name, principal_alignment=value) for name, value in values.items()]
    axes = panel("principal_alignment", mode_settings(DANGER._replace(above=False)), *events)
    assert legend(axes)[:3] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_layer_has_one_colour_in_all_panels():
    events = [analysis(20, name) for name in "abcd"]
    found = panels(mode_figure([mode_settings(), *events]))
    ranks = {line.get_label(): line.get_color() for line in found["Rank"].get_lines()}
    assert ranks == {n: line.get_color() for n, line in lines(found["principal_alignment"]).items()}


def test_each_of_several_measures_has_some_of_the_colours():
    events = [analysis(20, f"{i}", principal_alignment=i / 20, x=-i / 20) for i in range(20)]
    figure = mode_figure([mode_settings(DANGER, DANGER._replace(measure="x")), *events])
    first, second = (panels(figure)[name] for name in ("principal_alignment", "x"))
    assert legend(first)[:6] == ["19", "0", "18", "1", "17", "2"]
    assert legend(second) == ["danger above 0.4"], "the layers are named once"


def test_what_was_measured_in_low_rank_mode_is_pale():
    events = [
        analysis(20, principal_alignment=0.1),
        analysis(40, principal_alignment=0.5, to="lowrank"),
        analysis(60, mode="lowrank", principal_alignment=0.3),
        analysis(80, mode="lowrank", principal_alignment=0.2, to="full"),
        analysis(100, principal_alignment=0.1),
    ]
    axes = panel("principal_alignment", mode_settings(), *events)
    full, low = lines(axes)["fc"], lines(axes, "lowrank")["fc"]
    assert points(full) == [(20, 0.1), (40, 0.5), (100, 0.1)]
    assert points(low) == [(40, 0.5), (60, 0.3), (80, 0.2), (100, 0.1)], "no gap in between"
    assert low.get_alpha() < 0.5
    assert full.get_alpha() is None
    assert axes.get_title("left") == "principal_alignment (pale: in low-rank mode)"


def test_effects_in_low_rank_mode_are_said_to_be_of_the_protected_update():
    erosion = Condition("effect_erosion", "danger", above=True, threshold=4.0)
    axes = panel("effect_erosion", mode_settings(erosion), analysis(20, effect_erosion=1.0))
    note = "pale: in low-rank mode, of the protected update"
    assert axes.get_title("left") == f"effect_erosion ({note})"


def test_values_that_were_not_measured_are_left_out():
    values = [0.1, None, math.nan, math.inf, 0.3]
    events = [analysis(20 * i, principal_alignment=v) for i, v in enumerate(values, start=1)]
    axes = panel("principal_alignment", mode_settings(), *events)
    assert points(lines(axes)["fc"]) == [(20, 0.1), (100, 0.3)]


def test_run_in_which_nothing_was_measured_says_so_and_still_names_its_layers():
    events = [analysis(20, loss=None, principal_alignment=None)]
    found = panels(mode_figure([mode_settings(), *events]))
    for title in ("Training", "principal_alignment"):
        (text,) = found[title].texts
        assert text.get_text() == "not measured"
    assert legend(found["principal_alignment"]) == ["danger above 0.4"]
    assert legend(found["Rank"]) == ["fc"]


def test_a_spike_among_a_thousand_analyses_reaches_its_height_on_the_page():
    events = [analysis(20 * i) for i in range(1, 1001)]
    without = render(mode_figure([mode_settings(), *events]))
    events[500] = analysis(events[500].step, principal_alignment=0.39)
    figure = mode_figure([mode_settings(), *events])
    axes = panels(figure)["principal_alignment"]
    column, row = axes.transData.transform((events[500].step, 0.37))
    differing = (render(figure) != without).any(axis=2)
    around = differing[round(len(without) - row), round(column) - 2 : round(column) + 3]
    assert around.any()


@pytest.mark.parametrize(("largest", "scale"), [(4.0, "linear"), (4.1, "symlog")])
def test_values_far_beyond_the_threshold_do_not_hide_what_is_near_it(largest, scale):
    axes = panel("principal_alignment", mode_settings(), analysis(20, principal_alignment=-largest))
    assert axes.get_yscale() == scale
    assert ("logarithmic beyond 0.8" in axes.get_title("left")) is (scale == "symlog")
    low, high = axes.get_ylim()
    assert low < -largest < 0.4 < high


@pytest.mark.parametrize("largest", [50.0, 5e3, 5e7, 5e15])
def test_labels_of_a_logarithmic_axis_do_not_overlap(largest):
    events = [analysis(20, principal_alignment=v) for v in (-largest, largest)]
    axes = panel("principal_alignment", mode_settings(), *events)
    render(axes.figure)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    boxes = sorted((box.y0, box.y1) for box in boxes)
    assert len(boxes) >= 5
    assert all(lower[1] <= upper[0] + 1 for lower, upper in pairwise(boxes))


@pytest.mark.parametrize("num_layers", [1, 8, 80, 300])
@pytest.mark.parametrize("num_analyses", [1, 3, 50])
def test_nothing_is_clipped_and_no_panel_overlaps(num_layers, num_analyses):
    figure = mode_figure(run(num_layers, num_analyses))
    render(figure)
    page, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 <= drawn.x0 < drawn.x1 <= page.x1
    assert page.y0 <= drawn.y0 < drawn.y1 <= page.y1
    assert figure.get_figheight() <= 14
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_events_may_come_in_any_order_and_from_an_iterator():
    events = [mode_settings(), *(analysis(step) for step in (20, 40, 60))]
    shuffled = [events[i] for i in (3, 0, 2, 1)]
    assert np.array_equal(render(mode_figure(iter(shuffled))), render(mode_figure(events)))


def test_picture_does_not_depend_on_the_style_of_the_user():
    events = run(8, 3)
    expected = render(mode_figure(events))
    theirs = {"axes.grid": True, "font.size": 20, "text.usetex": True, "figure.autolayout": True}
    with matplotlib.rc_context(theirs):
        assert np.array_equal(render(mode_figure(events)), expected)


def test_80_layers_with_1000_analyses_are_drawn_in_time():
    events = run(80, 1000)
    begin = time.process_time()
    render(mode_figure(events))
    assert time.process_time() - begin < 5, "about 0.8 s, with room for a busy machine"


def test_written_picture_is_the_figure_under_its_tag(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    events = run(8, 3)
    writer = SummaryWriter(str(tmp_path))
    write_mode_figure(writer, events, step=60)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (event,) = accumulator.Images("svd/modes")
    assert event.step == 60
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(picture, render(mode_figure(events)))


def test_nothing_is_written_before_the_first_analysis():
    write_mode_figure(None, [mode_settings(), skipped_analysis(20)], step=20)
