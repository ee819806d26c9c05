"""What the picture of mode switching shows, as numbers over steps; draws nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np

from spectral_lightning.dashboards.mode_findings import ModeHistory
from spectral_lightning.spectra.mode_events import (
    Condition,
    LayerAnalysis,
    ModeEvent,
    ModeSettings,
)

_LOW_RANK = "lowrank"


class Series(NamedTuple):
    """One number of one layer over the steps of a run."""

    steps: np.ndarray
    """Optimizer steps, ascending."""
    values: np.ndarray
    """Finite, in the number's own units."""
    is_low: np.ndarray
    """Whether each was found in low-rank mode."""


@dataclass(frozen=True, slots=True)
class ModeSeries:
    """The events of a run, by layer."""

    settings: ModeSettings | None
    """The latest; None if there are none."""
    layers: Mapping[str, Sequence[LayerAnalysis]]
    """Analyses of each layer that was analysed or skipped, in the order of steps."""
    skipped: Mapping[str, Sequence[int]]
    """Steps at which an analysis could not be made, of the layers that have such."""
    begins: Sequence[int]
    """Steps at which the run began or was resumed, ascending; no event is before the first."""
    end: float
    """Step up to which the last decisions are shown: one interval behind the last event."""

    @classmethod
    def of(cls, events: Sequence[ModeEvent]) -> "ModeSeries":
        """Sort the events of a run.

        Args:
            events: Events of one run, at least one, in any order but that of the settings.
        """
        history = ModeHistory(events)
        settings = [event for event in events if isinstance(event, ModeSettings)]
        steps = sorted({event.step for event in events})
        widths = [max(steps[-1] - steps[-2], 1) if len(steps) > 1 else 1]
        if settings:
            widths.append(min(settings[-1].every_n_steps, steps[-1] - steps[0]))
        skipped: dict[str, list[int]] = {}
        for event in history.skipped:
            skipped.setdefault(event.layer, []).append(event.step)
        return cls(
            settings=settings[-1] if settings else None,
            layers={
                name: sorted(found, key=lambda analysis: analysis.step)
                for name, found in history.layers.items()
            },
            skipped=skipped,
            begins=sorted({steps[0], *(event.step for event in settings)}),
            end=float(steps[-1] + max(widths)),
        )

    @property
    def conditions(self) -> Sequence[Condition]:
        """Thresholds of the latest settings."""
        return () if self.settings is None else self.settings.conditions

    def losses(self) -> dict[int, float]:
        """Training loss by step, where there is one."""
        analyses = chain.from_iterable(self.layers.values())
        losses = {a.step: a.loss for a in analyses if a.loss is not None}
        return {step: losses[step] for step in sorted(losses) if math.isfinite(losses[step])}

    def measure(self, name: str) -> dict[str, Series]:
        """Values of a measure by layer; those that are None or not finite are left out."""
        series = {}
        for layer, analyses in self.layers.items():
            values = np.array([a.measures.get(name) for a in analyses], dtype=float)
            steps = np.array([a.step for a in analyses], dtype=float)
            is_low = np.array([a.mode == _LOW_RANK for a in analyses], dtype=bool)
            good = np.isfinite(values)
            if good.any():
                series[layer] = Series(steps[good], values[good], is_low[good])
        return series

    def relative_ranks(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Steps and, from each on, rank over ``min(m, n)``, by layer that was analysed.

        First the rank at the first analysis, then that of each decision, and the last once more at
        the end of the picture.
        """
        ranks = {}
        for layer, analyses in self.layers.items():
            if analyses:
                first, last = analyses[0], analyses[-1]
                steps = [first.step, *(a.step for a in analyses), self.end]
                numbers = [first.rank, *(a.next_rank for a in analyses), last.next_rank]
                size = first.rank + first.num_principal
                ranks[layer] = (np.array(steps, dtype=float), np.array(numbers) / size)
        return ranks

    def shares_low_rank(self, edges: np.ndarray) -> np.ndarray:
        """Share of each column's steps that each layer was in low-rank mode.

        Args:
            edges: Steps at which columns begin and the last one ends, ascending.

        Returns:
            Array of shape ``(len(layers), len(edges) - 1)``, in [0, 1].
        """
        rows = [self._spent_low_rank(analyses, edges) for analyses in self.layers.values()]
        shares: np.ndarray = np.diff(rows, axis=1) / np.diff(edges)
        return shares

    def _spent_low_rank(self, analyses: Sequence[LayerAnalysis], until: np.ndarray) -> np.ndarray:
        modes: dict[float, str] = {}
        for begin in self.begins:  # a resumed run goes on in the mode that its next analysis tells
            found = next((analysis.mode for analysis in analyses if analysis.step >= begin), None)
            modes |= {} if found is None else {begin: found}
        modes |= {analysis.step: analysis.next_mode for analysis in analyses}
        steps = sorted(modes)
        is_low = [modes[step] == _LOW_RANK for step in steps]
        spent = np.cumsum(np.diff([*steps, self.end]) * is_low)
        return np.interp(until, [*steps, self.end], [0.0, *spent])


def watched(conditions: Sequence[Condition]) -> list[Condition]:
    """Return one condition for each measure that decides on protection.

    Those of danger, or if there are none, the optimal ones.
    """
    for role in ("danger", "optimal"):
        first: dict[str, Condition] = {}
        for condition in conditions:
            if condition.role == role:
                first.setdefault(condition.measure, condition)
        if first:
            return list(first.values())
    return []


def furthest(numbers: Sequence[tuple[Mapping[str, np.ndarray], bool]], most: int) -> list[str]:
    """Return the layers that go furthest, for each number in turn.

    Args:
        numbers: The values of a number by layer, and whether far is above, or below.
        most: Most layers to return.
    """
    orders = []
    for values, above in numbers:
        extremes = {layer: (found if above else -found).max() for layer, found in values.items()}
        orders.append(sorted(extremes, key=extremes.__getitem__, reverse=True))
    turns = dict.fromkeys(chain.from_iterable(zip_longest(*orders)))
    return [layer for layer in turns if layer is not None][:most]
