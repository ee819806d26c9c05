"""Pictures of readings, drawn without pyplot: no global state, no display, nothing to close."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from spectral_lightning.dashboards.text import shorten
from spectral_lightning.spectra.timeline import HeatMapMeasure

DPI = 100
WIDTH = 7.5  # inches, of the coloured area: 750 pixels for at most a few hundred columns
ROW = 0.15  # inches, the least height at which the labels of neighbouring rows do not touch
_HEIGHTS = (2.0, 15.0)  # inches, of the coloured area
FONT_SIZE = 8.0  # points, of the row labels
CHARACTER = 0.602 * FONT_SIZE / 72  # inches; a glyph of DejaVu Sans Mono is 0.602 em wide
_MAX_LABEL = 40  # characters
_HATCH = (205, 70)  # grey levels
_HATCH_PERIOD = 6  # pixels
_HATCH_MIN = 3  # pixels, the least width of a failed cell
_TITLES: dict[HeatMapMeasure, tuple[str, str]] = {  # of a heat map and of its colour bar
    "relative_stable_rank": ("Stable rank relative to a random matrix", "ratio (1 = random)"),
    "stable_rank": ("Stable rank", "dimensionless"),
    "spectral_norm": ("Spectral norm", "in the weight's own units"),
    "frobenius_norm": ("Frobenius norm", "in the weight's own units"),
}

# Margins are counted for our own fonts, and a style with a grid or TeX would spoil the picture.
own_style = style.context("default")


@own_style
def heat_map(
    names: Sequence[str],
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    measure: HeatMapMeasure = "relative_stable_rank",
) -> Figure:
    """Draw layers x steps of one measure, by default stable rank relative to a random matrix.

    The colour scale is logarithmic and spans the 2nd to the 98th percentile of the values, so a
    single outlier does not flatten the rest; what lies outside takes the colours of the ends.
    Cells whose measurement failed are hatched grey; cells that were not measured stay white.

    Args:
        names: Names of the layers, one per row, top first; at least one.
        steps: Optimizer step at which each column begins, ascending; at least one.
        rows: Value (positive) per layer and step, shape ``(len(names), len(steps))``. NaN where
            the measurement failed, None where there was none.
        measure: What the values are, for the title and the colour bar.

    Returns:
        Figure with an Agg canvas, as high as its labels need, at most about 16 inches.

    Raises:
        ValueError: If `rows` is empty or does not fit `names` and `steps`, or `measure` is
            unknown.
    """
    figure, axes, labels = _unlabelled_heat_map(names, steps, rows, measure)
    label_rows(axes, labels)
    return figure


@own_style
def heat_map_pixels(
    names: Sequence[str],
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    measure: HeatMapMeasure = "relative_stable_rank",
) -> np.ndarray:
    """Return the pixels of `heat_map`, made for drawing the same layers again and again.

    The labels are most of the cost of the picture; they are drawn once per set of names. Takes
    the arguments of `heat_map` and raises its errors.

    Returns:
        Array of shape ``(height, width, 3)``, uint8.
    """
    figure, _, labels = _unlabelled_heat_map(names, steps, rows, measure)
    pixels: np.ndarray = np.minimum(render(figure), _label_page(labels))
    return pixels


@own_style
def spectrum_figure(
    values: Sequence[float],
    shape: tuple[int, int],
    *,
    null: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Figure:
    """Draw the histogram of a matrix's singular values, and the curve of a random matrix.

    Args:
        values: Singular values, finite, in the weight's own units; at least one.
        shape: Shape ``(m, n)`` of the matrix, for the title.
        null: Singular values and density of the random matrix to compare with, two sequences of
            one length; for example the Marchenko-Pastur density. The density is per unit of
            singular value and integrates to 1, as the histogram does.

    Returns:
        Figure with an Agg canvas, 7 x 4.5 inches.

    Raises:
        ValueError: If `values` is empty or holds a number that is not finite.
    """
    data = np.asarray(values, dtype=float)
    num_bad = int(np.count_nonzero(~np.isfinite(data)))
    if data.size == 0 or num_bad:
        raise ValueError(
            f"`values` must be one or more finite singular values, got {data.size} of which"
            f" {num_bad} are not finite."
        )
    figure = new_figure(7.0, 4.5)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.77))
    num_bins = int(np.clip(2 * np.sqrt(data.size), 5, 80))
    density, edges = np.histogram(data, num_bins, (0.0, float(data.max()) or 1.0), density=True)
    axes.stairs(density, edges, fill=True, color="#5b7fa6", label="this matrix")
    if null is not None:
        axes.plot(*null, color="#c4501b", linewidth=1.8, label="random matrix")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("singular value (in the weight's own units)")
    axes.set_ylabel("density (per unit of singular value)")
    axes.set_title(f"{data.size} singular values of a {shape[0]} x {shape[1]} matrix", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def render(figure: Figure) -> np.ndarray:
    """Return the pixels of a figure, shape ``(height, width, 3)``, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def new_figure(width: float, height: float) -> Figure:
    """An empty white page of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _unlabelled_heat_map(
    names: Sequence[str],
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    measure: HeatMapMeasure,
) -> tuple[Figure, Axes, tuple[str, ...]]:
    if measure not in _TITLES:
        raise ValueError(f"`measure` must be one of {', '.join(_TITLES)}, got {measure!r}.")
    title, unit = _TITLES[measure]
    lengths = sorted({len(row) for row in rows})
    if not names or not steps or len(rows) != len(names) or lengths != [len(steps)]:
        raise ValueError(
            f"`rows` must have shape (len(names), len(steps)) of at least (1, 1), got"
            f" {len(rows)} rows of lengths {lengths} for {len(names)} names and {len(steps)} steps."
        )
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in rows])
    missing = np.array([[cell is None for cell in row] for row in rows])
    good = np.isfinite(values) & (values > 0)
    labels = tuple(shorten(name, _MAX_LABEL) for name in names)

    colours = ScalarMappable(_robust_norm(values[good]), "viridis")
    figure, axes = _heat_map_page(labels)
    edges = _edges(steps)
    failed = ~good & ~missing
    cells = colours.to_rgba(np.where(good, values, 1.0), bytes=True)[:, :, :3]
    cells[missing] = 255
    axes.imshow(
        _pixels(cells, failed, edges, axes),
        extent=(edges[0], edges[-1], len(names), 0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("optimizer step")
    axes.set_title(title, loc="left")
    if failed.any():
        light, dark = (str(level / 255) for level in _HATCH)
        patch = Patch(fc=light, ec=dark, hatch="//////", lw=0.0, label="measurement failed")
        axes.legend(handles=[patch], loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _colour_bar(figure, axes, colours, unit)
    return figure, axes, labels


def _heat_map_page(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """Return a page whose margins fit the labels; adding up widths here spares a layout pass."""
    left = 0.3 + CHARACTER * max(len(label) for label in labels)
    right, top, bottom = 1.15, 0.5, 0.6
    inner = float(np.clip(ROW * len(labels), *_HEIGHTS))
    width, height = left + WIDTH + right, top + inner + bottom
    figure = new_figure(width, height)
    return figure, figure.add_axes(
        (left / width, bottom / height, WIDTH / width, inner / height), facecolor="white"
    )


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Return the edges of the columns; the last is as wide as the one before it."""
    starts = np.asarray(steps, dtype=float)
    last = starts[-1] - starts[-2] if len(starts) > 1 else 1.0
    return np.append(starts, starts[-1] + last)


def _robust_norm(values: np.ndarray) -> LogNorm:
    low, high = np.quantile(values, [0.02, 0.98]) if values.size else (1.0, 1.0)
    # A span of at least 1.25 keeps the rounding noise of a flat picture from looking like change.
    middle, half = np.sqrt(low * high), np.sqrt(max(high / low, 1.25))
    return LogNorm(middle / half, middle * half)


def _pixels(cells: np.ndarray, failed: np.ndarray, edges: np.ndarray, axes: Axes) -> np.ndarray:
    """Blow the coloured cells up to the pixels of the axes and hatch the failed ones.

    Meshes and hatched patches of matplotlib take a second for such a picture, this takes
    milliseconds, however many cells failed.
    """
    box = axes.get_window_extent()
    width, height = round(box.width), round(box.height)
    scale = width / (edges[-1] - edges[0])
    x = edges[0] + (np.arange(width) + 0.5) / scale
    column = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    row = np.arange(height) * len(cells) // height
    picture: np.ndarray = cells[row][:, column]

    # One failed column of many may be narrower than a pixel, but it has to be seen.
    r, c = np.nonzero(failed)
    left = np.minimum(((edges[c] - edges[0]) * scale).astype(int), width - _HATCH_MIN)
    right = np.maximum(np.ceil((edges[c + 1] - edges[0]) * scale).astype(int), left + _HATCH_MIN)
    starts_minus_ends = np.zeros((len(cells), width + 1), dtype=int)
    np.add.at(starts_minus_ends, (r, left), 1)
    np.add.at(starts_minus_ends, (r, np.minimum(right, width)), -1)
    hatched = (starts_minus_ends.cumsum(axis=1)[:, :width] > 0)[row]
    stripes = (np.arange(height)[:, None] + np.arange(width)) % _HATCH_PERIOD < 2
    picture[hatched & ~stripes] = _HATCH[0]
    picture[hatched & stripes] = _HATCH[1]
    return picture


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows, top first; where there are too many, every second, third, ..."""
    height = axes.get_window_extent().height / DPI
    every = int(np.ceil(len(labels) * ROW / height - 1e-6))
    axes.set_yticks(np.arange(0, len(labels), every) + 0.5, labels[::every])
    axes.tick_params(axis="y", length=0)
    for tick in axes.get_yticklabels():
        # A `$` in a name is no formula.
        tick.set(family="DejaVu Sans Mono", size=FONT_SIZE, parse_math=False)


@lru_cache(maxsize=4)
def _label_page(labels: tuple[str, ...]) -> np.ndarray:
    """Return a white page of `_heat_map_page` with nothing but the row labels."""
    figure, axes = _heat_map_page(labels)
    axes.set_ylim(len(labels), 0)
    label_rows(axes, labels)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return render(figure)


def _colour_bar(figure: Figure, axes: Axes, colours: ScalarMappable, unit: str) -> None:
    box = axes.get_position()
    width = 0.16 / figure.get_figwidth()
    bar = figure.colorbar(
        colours,
        cax=figure.add_axes((box.x1 + width, box.y0, width, box.height)),
        extend="both",
        extendfrac=0.1 / (box.height * figure.get_figheight()),
    )
    ticks = np.geomspace(*colours.get_clim(), 5)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label(unit)
