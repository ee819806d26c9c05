"""What the heat map shows, kept in memory of bounded size while a run goes on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from spectral_lightning.spectra.reading import Reading

HeatMapMeasure = Literal["relative_stable_rank", "stable_rank", "spectral_norm", "frobenius_norm"]
"""Fields of `Reading` that a heat map can show: those measured anew in every reading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMapGrid:
    """One measure of every layer over the steps of a run, as the heat map shows it."""

    names: tuple[str, ...]
    """Names of the layers, one per row, in the order in which they were first read."""
    steps: tuple[int, ...]
    """First optimizer step of each column, ascending."""
    rows: tuple[tuple[float | None, ...], ...]
    """The measure, in its own units, per layer and column. NaN where a measurement of the column
    failed, None where the layer was not measured."""


class HeatMapTimeline:
    """Keep one measure of every layer in bounded memory while a run goes on.

    Once there are more than `max_columns` columns, neighbours are merged pairwise and every new
    column spans twice as many steps as before. A merged cell shows the latest value, and shows
    a failure if any of its measurements failed: no failure is lost from sight.

    Args:
        max_columns: Largest number of columns ever kept, at least 2. The default is about what
            a picture of usual width can resolve.
        measure: What is kept of each reading.

    Raises:
        ValueError: If `max_columns` is below 2.
    """

    def __init__(
        self, max_columns: int = 512, measure: HeatMapMeasure = "relative_stable_rank"
    ) -> None:
        if max_columns < 2:
            raise ValueError(f"`max_columns` must be >= 2, got {max_columns}.")
        self._max_columns = max_columns
        self._measure = measure
        self._stride = 1  # readings per column
        self._filled = 0  # readings in the last column
        self._columns: list[tuple[int, dict[str, float]]] = []
        self._names: dict[str, None] = {}

    def append(self, step: int, readings: Iterable[Reading]) -> None:
        """Add the readings of one optimizer step, later than all before it."""
        cells: dict[str, float] = {
            r.name: getattr(r, self._measure) if r.failure is None else math.nan for r in readings
        }
        self._names.update(dict.fromkeys(cells))
        if self._columns and self._filled < self._stride:
            self._columns[-1] = _merged(self._columns[-1], (step, cells))
            self._filled += 1
            return
        self._columns.append((step, cells))
        self._filled = 1
        if len(self._columns) > self._max_columns:
            pairs = [self._columns[i : i + 2] for i in range(0, len(self._columns), 2)]
            self._filled += self._stride if len(pairs[-1]) == 2 else 0
            self._columns = [_merged(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
            self._stride *= 2

    def grid(self) -> HeatMapGrid:
        """Return what was kept, as rows of layers and columns of steps."""
        return HeatMapGrid(
            names=tuple(self._names),
            steps=tuple(step for step, _ in self._columns),
            rows=tuple(
                tuple(cells.get(name) for _, cells in self._columns) for name in self._names
            ),
        )


def _merged(
    left: tuple[int, dict[str, float]], right: tuple[int, dict[str, float]]
) -> tuple[int, dict[str, float]]:
    """Join two neighbouring columns; a failure (NaN) on either side stays."""
    kept = {name: value for name, value in left[1].items() if math.isnan(value)}
    return left[0], {**left[1], **right[1], **kept}
