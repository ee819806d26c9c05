"""Warning of a gradient norm that is out of line with those before."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplosionState:
    """Memory of one watch; plain numbers, so that a checkpoint holds it as it is."""

    num_readings: int = 0
    """Finite norms so far."""
    mean: float = 0.0
    """Running mean of the logarithm of the norm."""
    variance: float = 0.0
    """Running variance of the logarithm of the norm."""
    is_alarmed: bool = False
    """Whether the last norm was too large."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class ExplosionWatch:
    """Compare each gradient norm with the running mean and deviation of its logarithm.

    The norms of a healthy run are spread about evenly in the logarithm, and drift over orders of
    magnitude. The alarm is given above ``mean + num_deviations * max(deviation, min_deviation)``;
    a norm beyond that enters the mean as if it were there, so that one spike does not hide the
    next, and a new level is soon the usual one.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> watch, state = ExplosionWatch(warmup=3), ExplosionState()
        >>> for norm in (1.0, 1.2, 0.9, 1.1, 1e6):
        ...     state = watch.update(state, norm)
        >>> state.is_alarmed
        True
    """

    num_deviations: float = 6.0
    """Deviations above the mean that are still usual."""
    min_deviation: float = 0.4
    """Least deviation of the logarithm that is reckoned with: 11 times the mean is always usual."""
    decay: float = 0.98
    """Weight of the past in the running mean, in (0, 1)."""
    warmup: int = 20
    """First norms, of which none is too large."""

    def __post_init__(self) -> None:
        for name in ("num_deviations", "min_deviation"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` must be positive and finite, got {getattr(self, name)}."
                )
        if not 0 < self.decay < 1:
            raise ValueError(f"`decay` must be in (0, 1), got {self.decay}.")
        if self.warmup < 1:
            raise ValueError(f"`warmup` must be >= 1, got {self.warmup}.")

    def threshold(self, state: ExplosionState) -> float:
        """Largest norm that is usual; infinite in the warm-up."""
        if state.num_readings < self.warmup:
            return math.inf
        deviation = max(math.sqrt(state.variance), self.min_deviation)
        return math.exp(state.mean + self.num_deviations * deviation)

    def update(self, state: ExplosionState, norm: float) -> ExplosionState:
        """Take one gradient norm into account.

        Args:
            state: State that the last update returned.
            norm: Norm, >= 0; infinite and NaN ones are too large, zeros change nothing.

        Returns:
            The next state, alarmed if the norm was too large.
        """
        if norm == 0:
            return state
        limit = self.threshold(state)
        if not math.isfinite(norm):
            return replace(state, is_alarmed=True)
        x = math.log(min(norm, limit))
        # The plain mean at first, the exponential one from then on.
        weight = max(1 / (state.num_readings + 1), 1 - self.decay)
        off = x - state.mean
        return ExplosionState(
            num_readings=state.num_readings + 1,
            mean=state.mean + weight * off,
            variance=(1 - weight) * (state.variance + weight * off**2),
            is_alarmed=norm > limit,
        )
