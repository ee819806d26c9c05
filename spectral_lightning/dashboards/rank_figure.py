"""The picture of changing ranks: the loss, the ranks of the layers, and what the factors cost."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from spectral_lightning.dashboards.figures import (
    CHARACTER,
    FONT_SIZE,
    WIDTH,
    new_figure,
    own_style,
    render,
)
from spectral_lightning.dashboards.rank_report import projection_type
from spectral_lightning.dashboards.tensorboard import Writer
from spectral_lightning.dashboards.text import shorten
from spectral_lightning.spectra.rank_events import RankEvent
from spectral_lightning.spectra.rank_history import RankHistory

_LOSS, _RANK, _SIZE = 1.2, 3.6, 1.2  # inches, heights of the panels
_TOP, _BOTTOM, _GAP, _LABELLED_GAP = 0.75, 0.55, 0.5, 0.85  # inches; titles are in the gaps
_MAX_LABEL = 32  # characters
_MAX_TITLE = 90  # characters
_FEW_LAYERS = 8  # that have a colour each; with more, types have
_MANY_LAYERS = 16  # beyond which types are drawn instead of layers
_SHIFT = 0.8  # points between lines that coincide: 0.2 components where ranks go to 64
_FEW_TIMES = 40  # losses that are marked on the line
_COLOURS = (  # Okabe and Ito 2008, without yellow, which is faint on white
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c564b", "#444444"),
)
_GREY, _RESUMED, _VALIDATION = "#a6a6a6", "#555555", "#b2182b"
_OTHERS, _ALL = "other types", "all layers"


@own_style
def rank_figure(run: RankHistory | Iterable[RankEvent]) -> Figure | None:
    """Draw the loss, each layer's rank and the size of all factors over the steps.

    From top to bottom: training loss, and validation loss where a log has it; the ranks, with the
    controller's floor dashed; the entries of all factors at their rank and as they are stored, if
    the sizes are known. Up to 8 layers have a colour each; up to 16 have that of their type, as
    `projection_type` tells it; of more, each type's median is drawn, with a band from its smallest
    to its largest rank. Where a log has the ranks of no layer, their mean and band are drawn.

    Args:
        run: Events of the run, as `spectra.read_rank_events` returns them, or its history.

    Returns:
        Figure with an Agg canvas, about 11 inches wide and 9 high; None before the first check.
    """
    history = run if isinstance(run, RankHistory) else RankHistory.of(run)
    lines = _Lines(history)
    if not lines.has_begun:
        return None
    figure, (loss, rank, *others) = _page(history, lines)
    _draw_losses(loss, history)
    _draw_ranks(rank, history, lines)
    for axes in others:
        _draw_sizes(axes, history, lines)
    for axes in (loss, rank, *others) if history.loss_unit == history.unit else (rank, *others):
        for at in history.begins[1:]:
            axes.axvline(at, color=_RESUMED, lw=0.8, ls=":")
    return figure


@own_style
def write_rank_figure(writer: Writer, events: Iterable[RankEvent], *, step: int) -> None:
    """Write the picture of `rank_figure` under the tag ``rank/over_time``.

    Nothing is written before the first check.

    Args:
        writer: Where to write.
        events: Events of the run, in the order of its file.
        step: Step under which the picture is logged.
    """
    figure = rank_figure(events)
    if figure is not None:
        writer.add_image("rank/over_time", render(figure), step, dataformats="HWC")


class _Lines:
    """The ranks of all layers on one axis of time."""

    def __init__(self, history: RankHistory) -> None:
        self.has_begun = any(len(found) > 1 for found in history.ranks.values()) or bool(
            history.spread
        )
        times = {point.at for found in history.ranks.values() for point in found}
        self.times = np.array(sorted(times or history.spread or {0}), dtype=float)
        width = self.times[-1] - self.times[-2] if len(self.times) > 1 else 1.0
        losses = {*history.train_losses, *history.val_losses}
        is_shared = history.loss_unit == history.unit
        self.end = max([float(self.times[-1] + width), *(losses if is_shared else ())])
        """Up to which the last ranks are shown."""
        self.layers = {
            name: self._on_axis([p.at for p in found], [p.rank for p in found])
            for name, found in history.ranks.items()
        }

    @property
    def x(self) -> np.ndarray:
        """Times of all columns, with the end."""
        return np.append(self.times, self.end)

    def groups(self) -> list[tuple[str, str, list[str]]]:
        """Return label, colour and layers of what is named: layers, or types if there are many.

        A label tells the number of its layers, and their smallest and largest rank at the end.
        """
        if len(self.layers) <= _FEW_LAYERS:
            groups = {name: [name] for name in self.layers}
        else:
            groups = {}
            for name in self.layers:
                groups.setdefault(projection_type(name), []).append(name)
        if len(groups) > len(_COLOURS):
            kept = list(groups)[: len(_COLOURS) - 1]
            others = [name for kind in groups if kind not in kept for name in groups[kind]]
            groups = {kind: groups[kind] for kind in kept} | {_OTHERS: others}
        labelled = []
        for (name, layers), colour in zip(groups.items(), _COLOURS, strict=False):
            last = [self.layers[layer][-1] for layer in layers]
            count = f" ({len(layers)})" if len(self.layers) > _FEW_LAYERS else ""
            count += f": {min(last):g}" + (f"-{max(last):g}" if len(layers) > 1 else "")
            labelled.append((shorten(name, _MAX_LABEL - len(count)) + count, colour, layers))
        return labelled

    def _on_axis(self, times: Sequence[int], ranks: Sequence[int]) -> np.ndarray:
        """Return the rank of a layer at each of `x`; before its first point, that of the point."""
        index = np.searchsorted(times, self.x, side="right") - 1
        found: np.ndarray = np.array(ranks, dtype=float)[np.maximum(index, 0)]
        return found


def _page(history: RankHistory, lines: _Lines) -> tuple[Figure, list[Axes]]:
    """Return a page whose margins fit the labels; adding up sizes here spares a layout pass."""
    is_shared = history.loss_unit == history.unit
    inner = [_LOSS, _RANK]
    if lines.layers and history.num_active(0) is not None:
        inner.append(_SIZE)
    gaps = [_GAP if is_shared else _LABELLED_GAP, *[_GAP] * (len(inner) - 2)]
    left, right = 0.8, 0.6 + CHARACTER * (_MAX_LABEL + 2)
    width, height = left + WIDTH + right, _TOP + sum(inner) + sum(gaps) + _BOTTOM
    figure = new_figure(width, height)
    panels: list[Axes] = []
    top = height - _TOP
    for size, gap in zip(inner, [*gaps, 0.0], strict=True):
        box = (left / width, (top - size) / height, WIDTH / width, size / height)
        first = 0 if is_shared else 1
        panels.append(figure.add_axes(box, sharex=panels[first] if panels[first:] else None))
        is_labelled = len(panels) == len(inner) or (len(panels) == 1 and not is_shared)
        panels[-1].tick_params(labelbottom=is_labelled, labelsize=FONT_SIZE)
        top -= size + gap
    for axes in panels if is_shared else panels[1:]:
        axes.set_xlim(lines.times[0], lines.end)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    names = {"step": "optimizer step", "epoch": "epoch"}
    panels[-1].set_xlabel(names[history.unit])
    if not is_shared:
        panels[0].set_xlabel(names[history.loss_unit])
    title = f"Ranks of {len(lines.layers)} layers" if lines.layers else "Ranks"
    if history.settings is not None:
        title += f": {history.settings.controller}, {history.settings.resize}"
    title = textwrap.shorten(title, _MAX_TITLE, placeholder=" ...")
    figure.text(left / width, 1 - 0.15 / height, title, size=12, va="top", parse_math=False)
    return figure, panels


def _draw_losses(axes: Axes, history: RankHistory) -> None:
    for losses, name, colour in (
        (history.train_losses, "training", "black"),
        (history.val_losses, "validation", _VALIDATION),
    ):
        if losses:
            marker = "o" if len(losses) <= _FEW_TIMES else ""
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 3.0, "lw": 1.0}
            axes.plot([*losses], [*losses.values()], label=name, **style)
    handles = [(str(line.get_label()), line) for line in axes.get_lines()]
    is_measured = bool(handles)
    if len(history.begins) > 1:
        handles.append(("resumed", Line2D([], [], color=_RESUMED, lw=0.8, ls=":")))
    _finish(axes, "Loss", handles)
    if not is_measured:
        axes.set_yticks([])
        axes.text(0.5, 0.7, "not measured", transform=axes.transAxes, ha="center", color=_RESUMED)


def _draw_ranks(axes: Axes, history: RankHistory, lines: _Lines) -> None:
    handles: list[tuple[str, Line2D]] = []
    notes = []
    if not lines.layers:
        spreads = np.array([history.spread[int(at)] for at in lines.times])
        low, mean, high = np.vstack([spreads, spreads[-1:]]).T
        handles.append((_ALL, _draw_line(axes, lines.x, mean, _COLOURS[0])))
        _draw_band(axes, lines.x, low, high, _COLOURS[0])
        notes.append("mean, and from the smallest to the largest")
    groups = lines.groups()
    for index, (label, colour, names) in enumerate(groups):
        shift = _SHIFT * ((len(groups) - 1) / 2 - index)
        ranks = np.array([lines.layers[name] for name in names])
        if len(lines.layers) > _MANY_LAYERS:
            _draw_band(axes, lines.x, ranks.min(axis=0), ranks.max(axis=0), colour)
            ranks = np.median(ranks, axis=0, keepdims=True)
        drawn = [_draw_line(axes, lines.x, values, colour, shift) for values in ranks]
        handles.append((label, drawn[-1]))
    if len(lines.layers) > _MANY_LAYERS:
        notes.append("median of each type, and from its smallest to its largest")
    if len(groups) > 1:
        notes.append("lines that coincide are side by side")
    if history.floor is not None:
        floor = axes.axhline(history.floor, color="black", lw=0.9, ls="--")
        handles.append((f"controller's floor: {history.floor:g}", floor))
    tops = [values.max() for values in lines.layers.values()]
    tops += [spread.highest for spread in history.spread.values()]
    axes.set_ylim(0.0, 1.06 * max([*tops, history.floor or 0.0]))  # lines that moved do not count
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "Rank" + (f" ({'; '.join(notes)})" if notes else ""), handles)


def _draw_line(
    axes: Axes, x: np.ndarray, values: np.ndarray, colour: str, shift: float = 0.0
) -> Line2D:
    """Draw ranks over time, moved up and right by some points."""
    moved = ScaledTranslation(shift / 72, shift / 72, axes.figure.dpi_scale_trans)
    style: dict[str, Any] = {"color": colour, "lw": 1.2, "drawstyle": "steps-post"}
    (line,) = axes.plot(x, values, transform=axes.transData + moved, **style)
    return line


def _draw_band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    axes.fill_between(x, low, high, step="post", color=colour, alpha=0.13, lw=0.0)


def _draw_sizes(axes: Axes, history: RankHistory, lines: _Lines) -> None:
    sizes = [history.sizes[name] for name in lines.layers]
    costs = np.array([sum(size.shape) for size in sizes])
    active = costs @ np.array([*lines.layers.values()])
    stored = sum(size.capacity * sum(size.shape) for size in sizes)
    style: dict[str, Any] = {"color": _COLOURS[0], "lw": 1.4, "drawstyle": "steps-post"}
    (line,) = axes.plot(lines.x, active, **style)
    flat = axes.axhline(stored, color=_GREY, lw=1.4)
    axes.set_ylim(0.0, 1.08 * stored)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    handles = [(f"active: {active[-1]:,.0f}", line), (f"stored: {stored:,}", flat)]
    _finish(axes, "Entries of all factors", handles)


def _finish(axes: Axes, title: str, handles: Sequence[tuple[str, Line2D]]) -> None:
    """Give a panel its title, and name what is drawn beside it."""
    axes.set_title(title, loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(
        [line for _, line in handles],
        [""] * len(handles),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.04),
        frameon=False,
        borderaxespad=0.0,
        labelspacing=0.3,
        handlelength=1.6,
        prop={"family": "DejaVu Sans Mono", "size": FONT_SIZE},
    )
    for text, (label, _) in zip(legend.get_texts(), handles, strict=True):
        # Handed to the legend itself, a name that begins with `_` would be left out.
        text.set(text=label, parse_math=False)
