"""Keep one positive reading inside a band: smoothing, hysteresis, dwell and a severity law.

Lives here: when to act on a layer and how strongly. Does not live here: where the band comes from
(calibration), and what acting means (actuators).
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Range that a positive, dimensionless reading should stay in.

    Raises:
        ValueError: If the floor is negative, not finite, or not below the ceiling.
    """

    floor: float = 0.0
    """Smallest healthy value; 0 for none."""
    ceiling: float = math.inf
    """Largest healthy value; infinite for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"`floor` must be >= 0 and finite, got {self.floor}.")
        if not self.floor < self.ceiling:
            raise ValueError(
                f"`floor` must be below `ceiling`, got {self.floor} and {self.ceiling}."
            )

    def distance(self, log_value: float) -> float:
        """Signed distance of ``log(value)`` to the band: negative below, positive above, else 0."""
        below = log_value - _log(self.floor) if self.floor > 0 else 0.0
        above = log_value - _log(self.ceiling) if self.ceiling < math.inf else 0.0
        return min(below, 0.0) + max(above, 0.0)


class ThermostatVerdict(StrEnum):
    """What to do about a layer, and why."""

    INSIDE = "the reading is inside its band"
    BELOW = "the reading is below its floor"
    ABOVE = "the reading is above its ceiling"
    DWELLING = "the last switch is too recent"
    NOT_FINITE = "the reading is not a number, so nothing is done"


@dataclass(frozen=True, kw_only=True, slots=True)
class ThermostatState:
    """Memory of one thermostat; plain numbers, so that a checkpoint holds it as it is."""

    smoothed: float | None = None
    """Exponential mean of the logarithm of the reading, which is clipped far outside the band;
    None before the first."""
    side: int = 0
    """-1 while it acts against a reading below, 1 against one above, 0 while it is off."""
    dwelt: int | None = None
    """Readings since the last switch; None if there was none."""
    severity: float = 0.0
    """Squared distance to the band over `saturation`, in [0, 1]."""
    strength: float = 0.0
    """Strength asked of the actuator; 0 while it is off."""
    num_switches: int = 0
    """How often it was switched on."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class Thermostat:
    """Two-sided thermostat with hysteresis for a positive reading.

    Works on the exponential mean of the reading's logarithm. It switches on when that leaves the
    band, and off when it is back inside by the factor ``1 + hysteresis``; between two switches lie
    at least `dwell` readings. While on, the strength is
    ``strength * (1 + multiplier * severity)``, with ``severity = min(1, distance / saturation)^2``:
    monotone and continuous in the distance, and mild for what has strayed a little.

    Raises:
        ValueError: If a setting is out of its range.
    """

    strength: float = 5.0
    """Strength at the edge of the band, per unit of learning rate."""
    multiplier: float = 10.0
    """How much stronger it gets with full severity (as ``max_severity_multiplier`` of ASSR)."""
    saturation: float = 3.0
    """Distance to the band, in natural logarithm units, at which the severity is 1: a reading 20
    times below its floor. A spike of 10 times the spectral norm brings the excess of a stable rank
    100 times down, from some 3 times its floor."""
    hysteresis: float = 0.1
    """Fraction by which a reading has to be inside again before it is left alone."""
    dwell: int = 20
    """Fewest readings between two switches."""
    smoothing: float = 0.5
    """Weight of the past in the exponential mean, in [0, 1); 0 takes each reading as it is."""

    def __post_init__(self) -> None:
        for name in ("strength", "multiplier", "hysteresis"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be >= 0 and finite, got {getattr(self, name)}.")
        if not 0 < self.saturation < math.inf:
            raise ValueError(f"`saturation` must be positive and finite, got {self.saturation}.")
        if self.dwell < 0:
            raise ValueError(f"`dwell` must be >= 0, got {self.dwell}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {self.smoothing}.")

    def update(
        self, state: ThermostatState, band: Band, value: float
    ) -> tuple[ThermostatState, ThermostatVerdict]:
        """Decide after one reading.

        Args:
            state: State that the last update returned.
            band: Range the reading should stay in.
            value: Reading, >= 0; infinite counts as far above, 0 as far below, NaN changes
                nothing.

        Returns:
            The next state, and the verdict.
        """
        if math.isnan(value):
            return state, ThermostatVerdict.NOT_FINITE
        smoothed = self._smoothed(state, band, value)
        distance = band.distance(smoothed)
        side = (distance > 0) - (distance < 0)
        wanted = side or self._held(state, band, smoothed)
        dwelt = None if state.dwelt is None else state.dwelt + 1
        switches = wanted != state.side
        dwelling = switches and dwelt is not None and dwelt < self.dwell
        if dwelling:
            wanted = state.side
        severity = min(1.0, abs(distance) / self.saturation) ** 2 if side == wanted else 0.0
        strength = self.strength * (1 + self.multiplier * severity) if wanted else 0.0
        new = replace(
            state,
            smoothed=smoothed,
            side=wanted,
            dwelt=0 if switches and not dwelling else dwelt,
            severity=severity if wanted else 0.0,
            strength=strength,
            num_switches=state.num_switches + (switches and not dwelling and wanted != 0),
        )
        if dwelling:
            return new, ThermostatVerdict.DWELLING
        verdicts = (ThermostatVerdict.INSIDE, ThermostatVerdict.ABOVE, ThermostatVerdict.BELOW)
        return new, verdicts[wanted]

    def _smoothed(self, state: ThermostatState, band: Band, value: float) -> float:
        """Next exponential mean; what is far off is clipped, so that it is soon forgotten."""
        low, high = self._limits(band)
        new = min(max(_log(value), low), high)
        old = new if state.smoothed is None else state.smoothed
        return self.smoothing * old + (1 - self.smoothing) * new

    def _limits(self, band: Band) -> tuple[float, float]:
        """Where readings are clipped, in logarithms: finite, and past all that makes a difference.

        Where a bound is missing, readings on that side are inside: clipped far enough from the
        other bound to switch off there.
        """
        reach, margin = 2 * self.saturation, math.log1p(self.hysteresis)
        floor, ceiling = _log(band.floor), _log(band.ceiling)
        if math.isinf(floor) and math.isinf(ceiling):
            return -1.0, 1.0
        low = ceiling - margin if math.isinf(floor) else floor
        high = floor + margin if math.isinf(ceiling) else ceiling
        return low - reach, high + reach

    def _held(self, state: ThermostatState, band: Band, smoothed: float) -> int:
        """Side that stays on because the reading, though inside, is not yet inside by enough."""
        margin = math.log1p(self.hysteresis)
        if state.side < 0 and smoothed < _log(band.floor) + margin:
            return -1
        if state.side > 0 and smoothed > _log(band.ceiling) - margin:
            return 1
        return 0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
