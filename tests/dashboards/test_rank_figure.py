"""The picture of changing ranks."""

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

from spectral_lightning.dashboards.figures import render
from spectral_lightning.dashboards.rank_figure import rank_figure, write_rank_figure
from spectral_lightning.spectra import (
    LayerSize,
    RankCheck,
    RankHistory,
    RankPoint,
    RankSettings,
    RankSpread,
    SkippedCheck,
)

TYPES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def names(num_layers):
    return [f"model.blocks.{i // 6}.{TYPES[i % 6]}" for i in range(num_layers)]


def settings(layers, **changes):
    begin = RankSettings(
        step=0,
        every_n_steps=20,
        controller="StableRankController",
        settings={"change_threshold": 2.0, "clock": {"rank_min": 8}},
        resize="svd",
        layers={name: LayerSize((128, 64), 64, 64) for name in layers},
    )
    return replace(begin, **changes)


def check(step, layer, rank, next_rank, loss=1.0):
    return RankCheck(
        step=step, layer=layer, rank=rank, next_rank=next_rank, verdict="settled", loss=loss
    )


def run(num_layers, num_checks):
    """A run whose ranks fall, each layer's at its own pace, and now and then rise."""
    rng = np.random.default_rng(0)
    ranks = dict.fromkeys(names(num_layers), 64)
    events = [settings(ranks)]
    for step in range(20, 20 * num_checks + 1, 20):
        changes = rng.integers(-4, 4, num_layers)
        for (name, rank), change in zip(ranks.items(), changes, strict=True):
            ranks[name] = int(np.clip(rank + change, 8, 64))
            events.append(check(step, name, rank, ranks[name], 1 + 1 / step))
    return events


def panels(figure):
    """The panels by the first word of their title."""
    return {axes.get_title("left").split()[0]: axes for axes in figure.axes}


def panel(title, *events):
    return panels(rank_figure(events))[title]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def lines(axes):
    """Lines of ranks, as colour, times and values."""
    found = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    return [(to_hex(line.get_color()), *line.get_data()) for line in found]


@pytest.mark.parametrize(
    "events",
    [[], [settings(names(2))], [settings(names(2)), SkippedCheck(step=20, layer="x", reason="")]],
)
def test_there_is_no_picture_before_the_first_check(events):
    assert rank_figure(events) is None


def test_panels_stand_below_each_other_on_one_step_axis():
    figure = rank_figure(run(2, 3))
    assert list(panels(figure)) == ["Loss", "Rank", "Entries"]
    assert {axes.get_xlim() for axes in figure.axes} == {(0.0, 80.0)}
    assert figure.axes[-1].get_xlabel() == "optimizer step"


def test_ranks_are_steps_from_the_first_to_one_interval_behind_the_last_check():
    layer = "blocks.0.q"
    events = [check(20, layer, 64, 60), check(40, layer, 60, 56)]
    ((_, times, ranks),) = lines(panel("Rank", settings([layer]), *events))
    assert times.tolist() == [0, 20, 40, 60]
    assert ranks.tolist() == [64, 60, 56, 56]


def test_a_few_layers_are_named_with_their_last_rank_and_have_a_colour_each():
    layers = names(8)
    events = [check(20, name, 64, 60 - i) for i, name in enumerate(layers)]
    axes = panel("Rank", settings(layers), *events)
    assert legend(axes)[:2] == ["model.blocks.0.attn.q: 60", "model.blocks.0.attn.k: 59"]
    assert legend(axes)[-1] == "controller's floor: 10"
    assert len({colour for colour, *_ in lines(axes)}) == 8


def test_layers_whose_names_look_alike_when_short_are_all_drawn():
    layers = [f"{i}{'x' * 60}{i}{'y' * 60}" for i in range(3)]
    axes = panel("Rank", settings(layers), *(check(20, name, 64, 60) for name in layers))
    assert len(lines(axes)) == 3
    assert len(legend(axes)) == 4


def test_more_layers_have_the_colour_of_their_type():
    layers = names(12)
    events = [check(20, name, 64, 60 - i) for i, name in enumerate(layers)]
    axes = panel("Rank", settings(layers), *events)
    assert legend(axes)[:3] == ["q (2): 54-60", "k (2): 53-59", "v (2): 52-58"]
    found = {}
    for colour, _, ranks in lines(axes):
        found.setdefault(colour, []).append(ranks[-1])
    assert sorted(found.values()) == [[60 - i, 54 - i] for i in reversed(range(6))]


def test_of_many_layers_each_type_has_its_median_and_band():
    layers = names(24)
    events = [check(20, name, 64, 60 - i) for i, name in enumerate(layers)]
    axes = panel("Rank", settings(layers), *events)
    assert [ranks[-1] for _, _, ranks in lines(axes)] == [51 - i for i in range(6)]
    bands = [band.get_datalim(axes.transData) for band in axes.collections]
    assert [(band.y0, band.y1) for band in bands] == [(42 - i, 64) for i in range(6)]
    assert legend(axes)[0] == "q (4): 42-60"
    assert axes.get_title("left").startswith("Rank (median of each type")


def test_types_without_a_colour_left_are_drawn_together():
    layers = [f"{block}.kind_{i}" for i in range(10) for block in range(2)]
    axes = panel("Rank", settings(layers), *(check(20, name, 64, 60) for name in layers))
    assert legend(axes)[6:] == ["kind_6 (2): 60-60", "other types (6): 60-60", legend(axes)[-1]]


def test_lines_that_coincide_are_side_by_side_on_the_page():
    layers = names(2)
    axes = panel("Rank", settings(layers), *(check(20, name, 64, 60) for name in layers))
    first, second = (line for line in axes.get_lines() if line.get_drawstyle() == "steps-post")
    points = [line.get_transform().transform((20, 60)) for line in (first, second)]
    apart = np.subtract(*points)
    assert 0.5 < apart[0] < 3
    assert 0.5 < apart[1] < 3
    assert lines(axes)[0][2].tolist() == lines(axes)[1][2].tolist()


def test_axis_of_ranks_holds_all_of_them_and_begins_at_zero():
    low, high = panel("Rank", *run(24, 5)).get_ylim()
    assert low == 0
    assert 64 < high < 70


def test_sizes_are_those_of_factors_at_their_rank_and_stored():
    layers = names(2)
    axes = panel("Entries", settings(layers), check(20, layers[0], 64, 32))
    ((_, _, active),) = lines(axes)
    assert active.tolist() == [2 * 64 * 192, 96 * 192, 96 * 192]
    assert legend(axes) == ["active: 18,432", "stored: 24,576"]


def test_without_sizes_there_is_no_panel_of_them():
    events = [check(20, "q", 64, 60), check(40, "q", 60, 56)]
    assert list(panels(rank_figure(events))) == ["Loss", "Rank"]


def test_a_resumed_run_is_marked_in_all_panels():
    layers = names(2)
    events = [check(20, layers[0], 64, 60), settings(layers, step=20), check(40, layers[0], 60, 56)]
    figure = rank_figure([settings(layers), *events])
    for axes in figure.axes:
        assert [20, 20] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert legend(panels(figure)["Loss"]) == ["training", "resumed"]


def test_loss_that_was_not_measured_is_said():
    events = [check(20, "q", 64, 60, loss=None), check(40, "q", 60, 56, loss=math.nan)]
    (text,) = panel("Loss", *events).texts
    assert text.get_text() == "not measured"


def test_logs_of_other_scripts_are_drawn_with_validation_losses():
    history = RankHistory(
        source="v15",
        unit="step",
        loss_unit="epoch",
        ranks={"block0.q_proj": [RankPoint(0, 64), RankPoint(500, 56)]},
        train_losses={1: 2.0, 2: 1.0},
        val_losses={1: 2.5, 2: 2.0},
    )
    found = panels(rank_figure(history))
    assert legend(found["Loss"]) == ["training", "validation"]
    assert found["Loss"].get_xlabel() == "epoch"
    assert found["Rank"].get_xlabel() == "optimizer step"
    assert found["Rank"].get_xlim() == (0, 1000)
    assert found["Loss"].get_xlim()[1] < 10


def test_logs_without_layers_are_drawn_as_mean_and_band():
    spread = {200: RankSpread(60, 62.0, 64), 400: RankSpread(32, 33.5, 39)}
    history = RankHistory(source="v13", spread=spread, val_losses={200: 2.0, 900: 1.5})
    axes = panels(rank_figure(history))["Rank"]
    ((_, times, means),) = lines(axes)
    assert times.tolist()[:2] == [200, 400]
    assert means.tolist() == [62.0, 33.5, 33.5]
    (band,) = axes.collections
    assert (band.get_datalim(axes.transData).y0, band.get_datalim(axes.transData).y1) == (32, 64)
    assert axes.get_xlim() == (200, 900), "losses behind the last rank are shown"


@pytest.mark.parametrize("num_layers", [1, 2, 8, 12, 24, 96])
@pytest.mark.parametrize("num_checks", [1, 3, 50])
def test_nothing_is_clipped_and_no_panel_overlaps(num_layers, num_checks):
    events = run(num_layers, num_checks)
    events[0] = replace(events[0], resize="words that go on " * 20)
    figure = rank_figure(events)
    render(figure)
    page, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 <= drawn.x0 < drawn.x1 <= page.x1
    assert page.y0 <= drawn.y0 < drawn.y1 <= page.y1
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    for axes in figure.axes:
        title, names = axes.title.get_window_extent(), axes.get_legend().get_window_extent()
        assert not names.overlaps(axes.get_window_extent())
        assert not title.overlaps(names)


def test_picture_does_not_depend_on_the_style_of_the_user():
    events = run(8, 3)
    expected = render(rank_figure(events))
    theirs = {"axes.grid": True, "font.size": 20, "text.usetex": True, "figure.autolayout": True}
    with matplotlib.rc_context(theirs):
        assert np.array_equal(render(rank_figure(events)), expected)


def test_96_layers_with_1000_checks_are_drawn_in_time():
    events = run(96, 1000)
    begin = time.process_time()
    render(rank_figure(events))
    assert time.process_time() - begin < 5, "about 0.5 s, with room for a busy machine"


def test_written_picture_is_the_figure_under_its_tag(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    events = run(8, 3)
    writer = SummaryWriter(str(tmp_path))
    write_rank_figure(writer, iter(events), step=60)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (event,) = accumulator.Images("rank/over_time")
    assert event.step == 60
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(picture, render(rank_figure(events)))


def test_nothing_is_written_before_the_first_check():
    write_rank_figure(None, [settings(names(2))], step=20)
