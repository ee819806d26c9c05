"""The picture of mode switching: when layers were protected, and what the policy looked at."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from spectral_lightning.dashboards.figures import (
    CHARACTER,
    DPI,
    FONT_SIZE,
    ROW,
    WIDTH,
    label_rows,
    new_figure,
    own_style,
    render,
)
from spectral_lightning.dashboards.mode_series import ModeSeries, Series, furthest, watched
from spectral_lightning.dashboards.tensorboard import Writer
from spectral_lightning.dashboards.text import shorten
from spectral_lightning.spectra.mode_events import Condition, ModeEvent

_AFTER_PROTECTION = ("effect_lift", "effect_erosion", "largest_erosion", "update_norm")
_LOSS, _MEASURE, _RANK = 1.2, 2.0, 1.5  # inches, heights of the panels
_BANDS = (2 * ROW, 40 * ROW)  # inches; of more than 40 layers not all are labelled
_TOP, _BOTTOM, _GAP = 0.75, 0.55, 0.5  # inches; the titles of the panels are in the gaps
_MAX_LABEL = 28  # characters
_FEW_STEPS = 40  # analyses that are marked on each line
_MANY_STEPS = 200  # analyses from which on lines are thinner
_FAINTEST = 0.5  # least colour of a low-rank stretch that is narrower than a pixel
_SKIP_WIDTH = 3  # pixels; of the marks that would be closer, one is drawn
_FAR = 10.0  # multiple of the threshold up to which an axis is linear
_BAND, _SKIP, _GREY, _RESUMED = "#8fb0d3", "#b2182b", "#a6a6a6", "#555555"
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b")
_ROLES = {"danger": "#b2182b", "optimal": "#1a7837", "release": "#2166ac"}
_OTHERS = "other layers"

_Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]


@own_style
def mode_figure(events: Iterable[ModeEvent]) -> Figure | None:
    """Draw modes, ranks, loss and what the policy compares with thresholds, over the steps.

    From top to bottom: the training loss at the analyses; one row per layer, coloured while in
    low-rank mode and white while in full mode, with a mark where an analysis was skipped; each
    measure of the policy's danger conditions, or without any of its optimal ones, with one line
    per layer and its thresholds dashed; the rank of each layer over ``min(m, n)``. The six layers
    that went furthest towards a threshold have colours, the same in all panels; without a measure
    those of the lowest rank. Policy, protection and thresholds are those of the latest settings.

    What was not measured is left out. An axis whose values reach beyond ten times the threshold is
    logarithmic from twice the threshold on, so that it still shows what is near the threshold.
    Takes about 0.8 s for 80 layers x 1000 analyses on one CPU core, rendering included.

    Args:
        events: Events of the run, as `spectra.read_mode_events` returns them.

    Returns:
        Figure with an Agg canvas, about 12 inches wide, with one measure at most 14 inches high;
        None if no layer was analysed.
    """
    events = list(events)
    run = ModeSeries.of(events) if events else None
    if run is None or not any(run.layers.values()):
        return None
    shown = watched(run.conditions)
    measured = [run.measure(condition.measure) for condition in shown]
    ranks = run.relative_ranks()
    colours = _colours(shown, measured, ranks)
    figure, (loss, bands, *others, rank) = _page(run, len(shown))
    marker = "o" if max(len(steps) for steps, _ in ranks.values()) <= _FEW_STEPS + 2 else ""
    _draw_loss(loss, run.losses(), marker)
    _draw_bands(bands, run)
    for axes, series, condition in zip(others, measured, shown, strict=True):
        thresholds = [c for c in run.conditions if c.measure == condition.measure]
        _draw_measure(axes, series, thresholds, colours, marker)
    _draw_ranks(rank, ranks, colours)
    for axes in (loss, bands, *others, rank):
        for step in run.begins[1:]:
            axes.axvline(step, color=_RESUMED, lw=0.8, ls=":")
    home = next((axes for axes, series in zip(others, measured, strict=True) if series), rank)
    for axes in others if home in others else [*others, rank]:
        _name_lines(axes, colours if axes is home else {})
    return figure


@own_style
def write_mode_figure(writer: Writer, events: Iterable[ModeEvent], *, step: int) -> None:
    """Write the picture of `mode_figure` under the tag ``svd/modes``.

    Nothing is written before the first analysis.

    Args:
        writer: Where to write.
        events: See `mode_figure`.
        step: Step under which the picture is logged.
    """
    figure = mode_figure(events)
    if figure is not None:
        writer.add_image("svd/modes", render(figure), step, dataformats="HWC")


def _colours(
    shown: Sequence[Condition], measured: Sequence[Mapping[str, Series]], ranks: _Lines
) -> dict[str, str]:
    """Give colours to the layers that went furthest towards a threshold, or lowest in rank."""
    numbers = [
        ({name: found.values for name, found in series.items()}, condition.above)
        for series, condition in zip(measured, shown, strict=True)
    ]
    if not any(measured):
        numbers = [({name: values for name, (_, values) in ranks.items()}, False)]
    return dict(zip(furthest(numbers, len(_COLOURS)), _COLOURS, strict=False))


def _page(run: ModeSeries, num_measures: int) -> tuple[Figure, list[Axes]]:
    """Return a page whose margins fit the labels; adding up sizes here spares a layout pass."""
    longest = max(len(label) for label in _labels(run))
    bands = float(np.clip(ROW * len(run.layers), *_BANDS))
    inner = [_LOSS, bands, *[_MEASURE] * num_measures, _RANK]
    left, right = max(0.3 + CHARACTER * longest, 0.8), 0.6 + CHARACTER * max(longest, 24)
    width, height = left + WIDTH + right, _TOP + sum(inner) + _GAP * (len(inner) - 1) + _BOTTOM
    figure = new_figure(width, height)
    panels: list[Axes] = []
    top = height - _TOP
    for size in inner:
        box = (left / width, (top - size) / height, WIDTH / width, size / height)
        panels.append(figure.add_axes(box, sharex=panels[0] if panels else None))
        panels[-1].tick_params(labelbottom=len(panels) == len(inner), labelsize=FONT_SIZE)
        top -= size + _GAP
    panels[0].set_xlim(run.begins[0], run.end)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("optimizer step")
    title = "Mode switching"
    if run.settings is not None:
        title += f": {run.settings.policy}, protection {run.settings.protection}"
    figure.text(left / width, 1 - 0.15 / height, title, size=12, va="top", parse_math=False)
    return figure, panels


def _labels(run: ModeSeries) -> list[str]:
    return [shorten(name, _MAX_LABEL) for name in run.layers]


def _draw_loss(axes: Axes, losses: Mapping[int, float], marker: str) -> None:
    axes.plot([*losses], [*losses.values()], color="black", lw=1.0, marker=marker, ms=3.0)
    _finish(axes, "Training loss at the analyses", is_empty=not losses)


def _draw_bands(axes: Axes, run: ModeSeries) -> None:
    edges = np.linspace(run.begins[0], run.end, round(WIDTH * DPI) + 1)
    shares = run.shares_low_rank(edges)
    axes.imshow(
        np.where(shares > 1e-6, np.maximum(shares, _FAINTEST), 0.0),  # rounding is no stretch
        LinearSegmentedColormap.from_list("modes", ["white", _BAND]),
        extent=(edges[0], edges[-1], len(shares), 0),
        aspect="auto",
        interpolation="nearest",
        vmin=0.0,
        vmax=1.0,
    )
    axes.hlines(range(1, len(shares)), edges[0], edges[-1], color="#e0e0e0", lw=0.5)
    label_rows(axes, _labels(run))
    axes.set_title("Mode", loc="left", size=10)
    low, full = Patch(fc=_BAND, label="low-rank"), Patch(fc="white", ec=_GREY, label="full")
    handles: list[Patch | Line2D] = [low, full]
    if run.skipped:
        handles += _mark_skipped(axes, run, edges)
    if len(run.begins) > 1:
        handles.append(Line2D([], [], color=_RESUMED, lw=0.8, ls=":", label="resumed"))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 4}
    axes.legend(handles=handles, **place, frameon=False, fontsize=FONT_SIZE, borderaxespad=0.2)


def _mark_skipped(axes: Axes, run: ModeSeries, edges: np.ndarray) -> list[Line2D]:
    width = _SKIP_WIDTH * (edges[1] - edges[0])
    marks: dict[tuple[int, float], int] = {}
    for row, name in enumerate(run.layers):
        for step in run.skipped.get(name, ()):
            marks.setdefault((int((step - edges[0]) / width), row + 0.5), step)
    height = axes.get_window_extent().height / len(run.layers)
    size = float(np.clip(0.6 * height, 3.0, 7.0)) * 72 / DPI
    style: dict[str, Any] = {"ls": "none", "marker": "x", "ms": size, "clip_on": False}
    rows = [row for _, row in marks]
    return axes.plot([*marks.values()], rows, color=_SKIP, label="analysis skipped", **style)


def _draw_measure(
    axes: Axes,
    series: Mapping[str, Series],
    thresholds: Sequence[Condition],
    colours: dict[str, str],
    marker: str,
) -> None:
    note = "pale: in low-rank mode"
    note += ", of the protected update" if thresholds[0].measure in _AFTER_PROTECTION else ""
    nearest = max(abs(condition.threshold) for condition in thresholds)
    largest = max((np.abs(found.values).max() for found in series.values()), default=0.0)
    if 0 < _FAR * nearest < largest:
        _compress(axes, nearest, largest)
        note += f"; logarithmic beyond {2 * nearest:.4g}"
    full, low = {}, {}
    for name, (steps, values, is_low) in series.items():
        # The lines to and from low-rank mode are pale as well, so that there are no gaps.
        padded = np.pad(is_low, 1)
        full[name] = (steps, np.where(is_low, np.nan, values))
        low[name] = (steps, np.where(is_low | padded[:-2] | padded[2:], values, np.nan))
    _draw_lines(axes, low, colours, alpha=0.45, marker=marker, gid="lowrank")
    _draw_lines(axes, full, colours, marker=marker, gid="full")
    for condition in thresholds:
        text = f"{condition.role} {'above' if condition.above else 'below'}"
        style: dict[str, Any] = {
            "color": _ROLES.get(condition.role, "black"),
            "lw": 1.2,
            "ls": "--",
        }
        axes.axhline(condition.threshold, label=f"{text} {condition.threshold:.4g}", **style)
    _finish(axes, f"{thresholds[0].measure} ({note})", is_empty=not series)


def _compress(axes: Axes, threshold: float, largest: float) -> None:
    """Make the axis of values linear up to twice the threshold, and logarithmic beyond."""
    num_decades = int(np.ceil(np.log10(largest / threshold)))
    every = int(np.ceil(num_decades / 4))  # so that labels do not touch
    axes.set_yscale("symlog", linthresh=2 * threshold, linscale=every)
    parts = (1.0, 3.0) if num_decades <= 2 else (1.0,)
    decades = range(0, num_decades, every)
    ticks = [2 * threshold * part * 10.0**decade for decade in decades for part in parts]
    axes.yaxis.set_major_locator(FixedLocator([0.0, *ticks, *(-tick for tick in ticks)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))


def _draw_ranks(axes: Axes, ranks: _Lines, colours: dict[str, str]) -> None:
    _draw_lines(axes, ranks, colours, drawstyle="steps-post")
    values = np.concatenate([found for _, found in ranks.values()])
    low, high = float(values.min()), float(values.max())
    pad = max(0.05 - (high - low) / 2, 0.0) + 0.02  # a rank that hardly changes looks flat
    axes.set_ylim(low - pad, min(high + pad, 1.02))
    _finish(axes, "Rank in low-rank mode, over min(m, n)", is_empty=False)


def _draw_lines(axes: Axes, lines: _Lines, colours: dict[str, str], **style: Any) -> None:
    """Draw all lines without a colour as one, and over them those with one."""
    grey = [line for name, line in lines.items() if name not in colours]
    if grey:
        x, y = (np.concatenate([np.append(line[i], np.nan) for line in grey]) for i in (0, 1))
        axes.plot(x, y, color=_GREY, lw=0.5, ms=2.0, label=_OTHERS, **style)
    for name in reversed(colours):
        if name in lines:
            lw = 1.2 if len(lines[name][0]) <= _MANY_STEPS else 0.8
            axes.plot(*lines[name], color=colours[name], lw=lw, ms=3.0, label=name, **style)


def _finish(axes: Axes, title: str, *, is_empty: bool) -> None:
    axes.set_title(title, loc="left", size=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    if is_empty:
        axes.set_yticks([])
        axes.text(0.5, 0.7, "not measured", transform=axes.transAxes, ha="center", color=_RESUMED)


def _name_lines(axes: Axes, colours: Mapping[str, str]) -> None:
    """Name thresholds beside the panel, and layers if they have colours."""
    named = [
        (shorten(name, _MAX_LABEL), Line2D([], [], color=colour, lw=1.2))
        for name, colour in colours.items()
    ]
    drawn = {str(line.get_label()): line for line in axes.get_lines()}
    if colours and _OTHERS in drawn:
        named.append((_OTHERS, Line2D([], [], color=_GREY, lw=0.8)))
    named += [(text, line) for text, line in drawn.items() if line.get_linestyle() == "--"]
    legend = axes.legend(
        [line for _, line in named],
        [""] * len(named),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.04),
        frameon=False,
        borderaxespad=0.0,
        labelspacing=0.3,
        handlelength=1.6,
        prop={"family": "DejaVu Sans Mono", "size": FONT_SIZE},
    )
    for text, (label, _) in zip(legend.get_texts(), named, strict=True):
        # Handed to the legend itself, a name that begins with `_` would be left out.
        text.set(text=label, parse_math=False)
