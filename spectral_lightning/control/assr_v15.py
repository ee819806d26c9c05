"""Settings and laws of ASSR v1.5, kept for those who have used it, and to compare against.

Lives here: its numbers, as they were. Does not live here: measuring (it took the sensors from
random parts of each matrix; this project measures all of it), and what replaces these laws
(`Regulator`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spectral_lightning.control.regulator import Regulator
from spectral_lightning.control.thermostat import Thermostat

_SQUARE_NULL = 4.0
"""One over the ratio of stable rank to side of a large square Gaussian matrix."""
_HALF_WAY = math.log(2) / math.sqrt(0.5)
"""Saturation with which the severity of `Thermostat` is 1/2 at half the floor, as that of v1.5."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class ASSRConfig:
    """Settings of ASSR v1.5 under their names, with its defaults.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> ASSRConfig(stable_rank_floor=0.1).condition_ceiling
        500.0
    """

    base_lambda: float = 1e-4
    """Weight of the L2 penalty at severity 0."""
    stable_rank_floor: float = 0.25
    """Stable rank over ``min(m, n)`` below which a layer counted as collapsed. A random square
    matrix is at 0.25 itself."""
    condition_ceiling: float = 500.0
    """Condition number above which a layer counted as ill-conditioned."""
    sample_ratio: float = 0.1
    """Fraction of the layers looked at in a check."""
    sample_freq: int = 1
    """Optimizer steps between two checks."""
    max_severity_multiplier: float = 10.0
    """The penalty's weight is up to ``1 + max_severity_multiplier`` times `base_lambda`."""
    subsample_limit: int | None = 1024
    """Side of the random part of a matrix that was measured; None for all of it."""
    log_interventions: bool = False
    """Whether each intervention was printed."""

    def __post_init__(self) -> None:
        limit = self.subsample_limit
        rules = {
            "base_lambda": (0 <= self.base_lambda < math.inf, ">= 0 and finite"),
            "stable_rank_floor": (0 < self.stable_rank_floor < 1, "in (0, 1)"),
            "condition_ceiling": (1 < self.condition_ceiling < math.inf, "above 1 and finite"),
            "sample_ratio": (0 < self.sample_ratio <= 1, "in (0, 1]"),
            "sample_freq": (self.sample_freq >= 1, ">= 1"),
            "max_severity_multiplier": (
                0 <= self.max_severity_multiplier < math.inf,
                ">= 0 and finite",
            ),
            "subsample_limit": (limit is None or limit >= 64, ">= 64, or None"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)}.")

    def severity(self, stable_rank_ratio: float, condition_number: float) -> float | None:
        """Severity of a layer's readings by the law of v1.5.

        ``(floor - ratio) / floor`` for a stable rank below its floor; only otherwise
        ``(condition / ceiling - 1) / 10``, at most 1, for a condition number above its ceiling.

        Args:
            stable_rank_ratio: Stable rank over ``min(m, n)``, in (0, 1].
            condition_number: Condition number, >= 1; infinite for a singular matrix.

        Returns:
            Severity in [0, 1]; None if neither threshold is crossed, or both readings are NaN.

        Example:
            >>> config = ASSRConfig()
            >>> [config.severity(*x) for x in ((0.125, 10.0), (0.5, 3000.0), (0.5, 10.0))]
            [0.5, 0.5, None]
        """
        if stable_rank_ratio < self.stable_rank_floor:
            below = (self.stable_rank_floor - stable_rank_ratio) / self.stable_rank_floor
            return min(max(below, 0.0), 1.0)
        if condition_number > self.condition_ceiling:
            return min((condition_number / self.condition_ceiling - 1) / 10, 1.0)
        return None

    def penalty_weight(self, stable_rank_ratio: float, condition_number: float) -> float:
        """Weight ``lambda`` of ``||W||_F^2`` in the loss of v1.5; 0 for a healthy layer.

        Args:
            stable_rank_ratio: As in `severity`.
            condition_number: As in `severity`.

        Returns:
            ``base_lambda * (1 + max_severity_multiplier * severity)``, or 0.

        Example:
            >>> round(ASSRConfig().penalty_weight(0.125, 10.0), 6)
            0.0006
        """
        severity = self.severity(stable_rank_ratio, condition_number)
        if severity is None:
            return 0.0
        return self.base_lambda * (1 + self.max_severity_multiplier * severity)

    def num_sampled(self, num_layers: int) -> int:
        """Layers that one check looked at, of all."""
        return max(1, int(num_layers * self.sample_ratio))

    def regulator(self) -> Regulator:
        """Regulator that answers a low stable rank about as v1.5 did; for ``legacy_l2``.

        What is kept: no calibration in training, no smoothing, no hysteresis, no dwell, and the
        penalty's weight at the floor, in large layers also at half of it and at rank one. Elsewhere
        the severity of `Thermostat` goes with the square of a logarithm, that of v1.5 linearly.
        What is not: the floor holds for the stable rank relative to a random matrix of the shape,
        as a square layer's would; v1.5 judged wide and tall layers up to 4 times more mildly. The
        condition number is left alone: the ceiling of v1.5 fires on most healthy square layers
        that it was meant for, and an L2 penalty cannot change a condition number.

        Returns:
            The regulator. Its strength is spread over the steps between two checks.
        """
        return Regulator(
            calibration="static",
            floor=_SQUARE_NULL * self.stable_rank_floor,
            thermostat=Thermostat(
                strength=self.base_lambda / self.sample_freq,
                multiplier=self.max_severity_multiplier,
                saturation=_HALF_WAY,
                hysteresis=0.0,
                dwell=0,
                smoothing=0.0,
            ),
        )


class Tier(NamedTuple):
    """What ASSR v1.5 chose by the size of a model."""

    sample_ratio: float
    """Fraction of the layers in a check."""
    sample_freq: int
    """Optimizer steps between two checks."""
    subsample_limit: int
    """Side of the part of a matrix that was measured."""
    base_lambda: float
    """Weight of the penalty at severity 0."""


_TIERS = (
    (100e6, Tier(0.10, 1, 1024, 1e-4)),
    (500e6, Tier(0.05, 2, 768, 5e-5)),
    (2e9, Tier(0.02, 5, 512, 2e-5)),
    (math.inf, Tier(0.01, 10, 384, 1e-5)),
)


def tier(num_parameters: int) -> Tier:
    """Tier of a model by its number of parameters, frozen ones included.

    Example:
        >>> tier(1_100_000_000).sample_ratio
        0.02
    """
    return next(found for limit, found in _TIERS if num_parameters < limit)


def thresholds(
    stable_rank_ratios: Sequence[float],
    condition_numbers: Sequence[float],
    percentile: float = 10.0,
) -> tuple[float, float]:
    """Thresholds of v1.5 from the readings of a model's layers.

    Args:
        stable_rank_ratios: Stable ranks over ``min(m, n)``, at least one.
        condition_numbers: Condition numbers; infinite ones are left out.
        percentile: Percentile of the stable ranks, and from above of the condition numbers, in
            [0, 100].

    Returns:
        ``0.8`` of the percentile of the ratios, clamped to [0.05, 0.4], and ``1.5`` times that of
        the condition numbers (500 if all are infinite), at least 100.

    Raises:
        ValueError: If there is no ratio, or `percentile` is out of its range.

    Example:
        >>> thresholds([0.25, 0.25], [math.inf])
        (0.2, 750.0)
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` must be in [0, 100], got {percentile}.")
    if not stable_rank_ratios:
        raise ValueError("`stable_rank_ratios` must hold at least one value, got none.")
    finite = [value for value in condition_numbers if math.isfinite(value)] or [500.0]
    floor = min(max(_percentile(stable_rank_ratios, percentile) * 0.8, 0.05), 0.4)
    return floor, max(100.0, _percentile(finite, 100 - percentile) * 1.5)


def calibrated_config(
    num_parameters: int,
    stable_rank_ratios: Sequence[float],
    condition_numbers: Sequence[float],
    percentile: float = 10.0,
) -> ASSRConfig:
    """Settings that v1.5 calibrates to from these readings (`tier` and `thresholds`).

    Args:
        num_parameters: Parameters of the model.
        stable_rank_ratios: As in `thresholds`.
        condition_numbers: As in `thresholds`.
        percentile: As in `thresholds`.

    Returns:
        The settings.
    """
    floor, ceiling = thresholds(stable_rank_ratios, condition_numbers, percentile)
    return ASSRConfig(
        stable_rank_floor=floor, condition_ceiling=ceiling, **tier(num_parameters)._asdict()
    )


def _percentile(values: Sequence[float], percentile: float) -> float:
    """Percentile with linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percentile / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
