"""Warning of a positive reading that goes to zero, before it is there."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

_NUM_RECENT = 5  # smoothed readings that a trend is read from


class CollapseVerdict(StrEnum):
    """What a reading says about the run."""

    LEARNING = "too few readings to tell"
    HEALTHY = "the reading is where it should be"
    FALLING = "the reading falls, and is about to be too low"
    COLLAPSED = "the reading is too low"
    NOT_FINITE = "the reading is not a number, so nothing is concluded"


@dataclass(frozen=True, kw_only=True, slots=True)
class CollapseState:
    """Memory of one watch; plain numbers, so that a checkpoint holds it as it is."""

    num_readings: int = 0
    """Finite readings so far."""
    smoothed: float = 0.0
    """Exponential mean of the logarithm of the reading."""
    best: float = -math.inf
    """Highest `smoothed` since the first readings."""
    recent: tuple[tuple[int, float], ...] = ()
    """Step and `smoothed` of the latest readings."""
    is_alarmed: bool = False
    """Whether a warning has been given and the reading has not recovered since."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class CollapseWatch:
    """Compare a positive reading with the best the run has had, and with where it is heading.

    Works on the exponential mean of the reading's logarithm. The alarm is given when that falls
    below `level` times its best, or below `floor`; and earlier, when it is below `onset` times its
    best, would reach the level within `horizon` steps if it went on like this, and does not slow
    down: what settles on a new value slows down in the logarithm, what goes to zero does not.
    One alarm, until the reading is back above `onset`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> watch, state = CollapseWatch(), CollapseState()
        >>> for step in range(0, 600, 50):
        ...     state, verdict = watch.update(state, step, math.exp(-step / 100))
        ...     if state.is_alarmed:
        ...         break
        >>> step, verdict.name
        (200, 'FALLING')
    """

    level: float = 0.1
    """Share of the best so far below which the reading counts as collapsed."""
    onset: float = 0.7
    """Share of the best so far below which a trend counts, and above which an alarm ends."""
    floor: float = 1e-3
    """Reading that is too low whatever the run had before."""
    horizon: int = 200
    """Steps ahead that the trend is followed."""
    warmup: int = 3
    """First readings, which only make up what later ones are compared with."""
    smoothing: float = 0.5
    """Weight of the past in the exponential mean, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.level < self.onset < 1:
            raise ValueError(
                "`level` and `onset` must be in (0, 1), with level < onset, got"
                f" {self.level} and {self.onset}."
            )
        if not 0 < self.floor < math.inf:
            raise ValueError(f"`floor` must be positive and finite, got {self.floor}.")
        if self.horizon < 0 or self.warmup < 1:
            raise ValueError(
                f"`horizon` must be >= 0 and `warmup` >= 1, got {self.horizon} and {self.warmup}."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {self.smoothing}.")

    def threshold(self, state: CollapseState) -> float:
        """Reading below which the run counts as collapsed."""
        return max(self.level * math.exp(state.best), self.floor)

    def update(
        self, state: CollapseState, step: int, value: float
    ) -> tuple[CollapseState, CollapseVerdict]:
        """Take one reading into account.

        Args:
            state: State that the last update returned.
            step: Optimizer steps done, more than at the last reading.
            value: Reading, >= 0; NaN changes nothing.

        Returns:
            The next state, and the verdict.
        """
        if not math.isfinite(value):
            return state, CollapseVerdict.NOT_FINITE
        new = math.log(max(value, self.floor * self.level))  # what is lower is as bad
        past = state.smoothed if state.num_readings else new
        smoothed = self.smoothing * past + (1 - self.smoothing) * new
        state = replace(
            state,
            num_readings=state.num_readings + 1,
            smoothed=smoothed,
            recent=(*state.recent, (step, smoothed))[-_NUM_RECENT:],
        )
        if state.num_readings < self.warmup:
            return state, CollapseVerdict.LEARNING
        state = replace(state, best=max(state.best, *(x for _, x in state.recent)))
        if smoothed < math.log(self.threshold(state)):
            return replace(state, is_alarmed=True), CollapseVerdict.COLLAPSED
        if smoothed > state.best + math.log(self.onset):
            return replace(state, is_alarmed=False), CollapseVerdict.HEALTHY
        if state.is_alarmed or self._is_falling(state):
            return replace(state, is_alarmed=True), CollapseVerdict.FALLING
        return state, CollapseVerdict.HEALTHY

    def _is_falling(self, state: CollapseState) -> bool:
        """Whether the trend leads to the threshold within the horizon, and does not slow down."""
        if len(state.recent) < _NUM_RECENT:
            return False
        (first, high), _, (middle, half), _, (last, low) = state.recent
        before, now = (high - half) / (middle - first), (half - low) / (last - middle)
        ahead = low - now * self.horizon
        return 0 < 0.9 * before <= now and ahead < math.log(self.threshold(state))
