"""The layers that need attention, as a table for the terminal."""

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.text import shorten
from spectral_lightning.spectra.reading import Reading

_NUMBERS = ("shape", "spectral\nnorm", "stable\nrank", "rel.", "cond.", "eff.\nrank", "step")


def worst_layers_table(readings: Iterable[Reading], num_rows: int = 10) -> Table:
    """Return the layers whose stable rank is farthest from that of a random matrix.

    Layers that could not be measured come first; then the ratio of the stable rank to that of a
    random matrix decides, and a ratio of 1/2 is as far from 1 as one of 2. The table fits a
    terminal of 80 columns: names are shortened, numbers never wrap. Print it with
    ``rich.console.Console().print(table)``; into a pipe or a file that is plain text.

    Args:
        readings: Latest reading of each layer.
        num_rows: Largest number of layers shown.

    Returns:
        Table with a caption that says how many layers there are and why measurements failed.

    Raises:
        ValueError: If `num_rows` is below 1.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be >= 1, got {num_rows}.")
    ordered = sorted(readings, key=_distance, reverse=True)
    shown = ordered[:num_rows]
    failed = [reading for reading in shown if reading.failure is not None]
    num_failed = sum(reading.failure is not None for reading in ordered)

    table = plain_table("Layers whose stable rank is farthest from random", _NUMBERS)
    for reading in shown:
        style = "red" if reading.failure is not None else None
        table.add_row(LayerName(reading.name), *_cells(reading), style=style)

    lines = [f"{len(shown)} of {len(ordered)} layers; {num_failed} could not be measured."]
    lines += [f"{reading.name}: {reading.failure}" for reading in failed]
    table.caption = Text("\n".join(lines))
    return table


def plain_table(title: str, headers: Sequence[str]) -> Table:
    """Table of layers: their names, then numbers that never wrap."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    table.add_column("layer")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


class LayerName:
    """A layer's name that takes the room it is given."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(shorten(self._name, options.max_width), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = len(shorten(self._name, options.max_width))
        return Measurement(min(12, longest), longest)


def _distance(reading: Reading) -> float:
    ratio = reading.relative_stable_rank
    if reading.failure is not None or not math.isfinite(ratio) or ratio <= 0:
        return math.inf
    return abs(math.log(ratio))


def _cells(reading: Reading) -> list[str]:
    shape = f"{reading.shape[0]}x{reading.shape[1]}"
    if reading.failure is not None:
        return [shape, "failed", "-", "-", "-", "-", str(reading.step)]
    return [
        shape,
        _with_interval(reading.spectral_norm, *reading.spectral_norm_interval),
        f"{reading.stable_rank:.4g}",
        f"{reading.relative_stable_rank:.3g}",
        compact(reading.condition_number),
        compact(reading.effective_rank),
        str(reading.step),
    ]


def _with_interval(value: float, low: float, high: float) -> str:
    """Return ``value +-radius``; what is printed holds the interval, rounding included."""
    shown = f"{value:.4g}"
    radius = max(float(shown) - low, high - float(shown))
    if not (math.isfinite(radius) and radius > 0):
        return f"{shown} +-{radius:g}"
    unit = 10.0 ** math.floor(math.log10(radius))
    # The small slack keeps rounding noise of the subtraction from adding a unit.
    return f"{shown} +-{math.ceil(radius / unit - 1e-6) * unit:.1g}"


def compact(value: float | None) -> str:
    """Return a number in at most seven characters, and a dash for one that was not measured."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
