"""Where a layer's band comes from: its own readings in a warm-up window, or a null value.

Lives here: robust statistics of a window of readings. Does not live here: which steps are in it.
"""

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spectral_lightning.control.thermostat import Band


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class CalibrationWindow:
    """Turn the readings of one layer in a warm-up window into its band.

    In logarithms, with median ``m`` and median absolute deviation ``d``: the floor is the smaller
    of ``m + log(ratio)`` and ``m - num_deviations * d``, the ceiling the larger of their mirror
    images. Nothing is clamped to absolute values: what is usual for the layer is healthy.

    Raises:
        ValueError: If a setting is out of its range.
    """

    ratio: float = 0.3
    """Fraction of the median below which (or one over it, above which) a reading is unhealthy, in
    (0, 1). Set by hand; scripts/assr_healing.py shows that a healthy run is then left alone."""
    num_deviations: float = 6.0
    """Median absolute deviations that a reading may stray in any case, >= 0."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"`ratio` must be in (0, 1), got {self.ratio}.")
        if not 0 <= self.num_deviations < math.inf:
            raise ValueError(f"`num_deviations` must be >= 0, got {self.num_deviations}.")

    def band(self, readings: Sequence[float]) -> Band | None:
        """Band of one layer.

        Args:
            readings: Values in the window; those that are not positive, normal and finite are left
                out.

        Returns:
            The band, or None if no reading can be used.
        """
        logs = [math.log(value) for value in readings if sys.float_info.min <= value < math.inf]
        if not logs:
            return None
        median = statistics.median(logs)
        deviation = statistics.median(abs(value - median) for value in logs)
        reach = max(-math.log(self.ratio), self.num_deviations * deviation)
        return Band(floor=_exp(median - reach), ceiling=_exp(median + reach))


def static_band(null: float, *, ratio: float, ceiling: float = math.inf) -> Band:
    """Band that needs no readings: a fraction of the value of a random matrix of the shape.

    Args:
        null: Value of a Gaussian matrix, in the reading's own unit; 1 for relative readings.
        ratio: Floor as a fraction of it.
        ceiling: Ceiling as a multiple of it; infinite for none.

    Returns:
        The band.
    """
    return Band(floor=ratio * null, ceiling=ceiling * null)


def is_calm(sides: Iterable[int], *, max_duty: float) -> bool:
    """Whether at most a fraction `max_duty` of the thermostats is on."""
    on = [side != 0 for side in sides]
    return sum(on) <= max_duty * len(on)


def _exp(logarithm: float) -> float:
    """Exponential; infinite where `math.exp` would overflow."""
    return math.exp(logarithm) if logarithm < math.log(sys.float_info.max) else math.inf
