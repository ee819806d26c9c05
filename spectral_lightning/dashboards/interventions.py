"""What was done to the layers, as a table for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.table import LayerName, plain_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Interventions:
    """What a controller has done to one layer of a run."""

    name: str
    """Name of the layer."""
    relative_stable_rank: float | None
    """Latest reading looked at, relative to a Gaussian matrix; None before the first."""
    floor: float | None
    """Smallest healthy relative stable rank; None while calibrating."""
    side: int
    """-1 while a reading below its band is acted on, 1 for one above, 0 while nothing is."""
    severity: float
    """Distance to the band, in [0, 1]."""
    strength: float
    """Strength of the present steps, per unit of learning rate."""
    num_interventions: int
    """Steps taken."""
    num_skipped: int
    """Readings that failed, at which nothing was done."""
    applied: float
    """Sum of ``||step||_F / ||W||_F`` of all steps taken, dimensionless."""


def interventions_table(layers: Sequence[Interventions], num_rows: int = 10) -> Table:
    """Return the layers that were acted on most, and those that could not be measured.

    Print it with ``rich.console.Console().print(table)``; into a file that is plain text.

    Args:
        layers: What was done to each layer.
        num_rows: Largest number of layers shown.

    Returns:
        Table with a caption that counts the layers that were acted on and left alone.

    Raises:
        ValueError: If `num_rows` is below 1.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be >= 1, got {num_rows}.")
    touched = sorted(
        (layer for layer in layers if layer.num_interventions or layer.num_skipped),
        key=lambda layer: (-layer.applied, -layer.num_skipped),
    )
    headers = ("rel. stable\nrank", "floor", "steps\ntaken", "total step\n/ norm", "state")
    table = plain_table("What ASSR did", headers)
    for layer in touched[:num_rows]:
        table.add_row(
            LayerName(layer.name),
            _number(layer.relative_stable_rank),
            _number(layer.floor),
            str(layer.num_interventions),
            f"{layer.applied:.3g}",
            _state(layer),
        )
    acted_on = sum(layer.num_interventions > 0 for layer in layers)
    failed = sum(layer.num_skipped > 0 for layer in layers)
    more = f" {len(touched) - num_rows} more are not shown." if len(touched) > num_rows else ""
    table.caption = Text(
        f"{acted_on} of {len(layers)} layers were acted on, {len(layers) - len(touched)} left"
        f" alone; {failed} could not be measured at times.{more}"
    )
    return table


def interventions_scalars(layers: Iterable[Interventions]) -> dict[str, float]:
    """Return what loggers show of each layer, as ``assr/<measure>/<layer>``."""
    measures = ("severity", "strength", "side", "num_interventions", "applied")
    return {f"assr/{m}/{layer.name}": getattr(layer, m) for layer in layers for m in measures}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _state(layer: Interventions) -> str:
    if layer.num_skipped:
        return f"{layer.num_skipped} failed"
    return {-1: "raising", 0: "inside", 1: "lowering"}[layer.side]
