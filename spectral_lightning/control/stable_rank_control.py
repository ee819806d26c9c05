"""Rank by stable rank: the rule that adaptive low-rank training began with, kept as it was."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from spectral_lightning.control.rank_clock import RankClock
from spectral_lightning.control.rank_control import LayerRankController, Proposal
from spectral_lightning.control.ranks import RankReading, RankState, RankVerdict

Rounding = Literal["nearest", "truncate"]

V10_CLOCK = RankClock(
    warmup_steps=0,
    cooldown_steps=0,
    quantum=1,
    max_step=4,
    interval=200,
    interval_max=200,
)
"""One update per epoch of 200 steps, and nothing else that holds a rank."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class StableRankController(LayerRankController):
    """Let a layer's rank follow a multiple of its stable rank ``||W||_F^2 / ||W||_2^2``.

    The target ``safety_factor * stable rank``, clipped to the bounds, is smoothed by an exponential
    mean that starts at the initial rank. The rank follows the mean by at most ``clock.max_step``,
    once the two differ by `change_threshold`.

    Kept for comparison: the stable rank is dominated by the largest value and does not say what
    truncation costs. Untrained random factors have a low one already, so their target belongs
    beside each real one (`target`). And the dead band stops a falling rank up to `change_threshold`
    above the floor, where it looks like a measured rank (`layers_at_floor`).

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> reading = RankReading(step=200, shape=(8, 8), rank=2, capacity=8, values=[2.0, 1.0])
        >>> StableRankController().target(reading)
        1.875
    """

    clock: RankClock = V10_CLOCK
    """When ranks may change; by default as in v10, whose ``max_rank`` is the layer's capacity."""
    safety_factor: float = 1.5
    """Target rank per unit of stable rank, as in v10."""
    ema_decay: float = 0.8
    """Weight of the past in the exponential mean, in [0, 1), as in v10."""
    change_threshold: float = 2.0
    """Difference to the rank from which on the mean is followed, as in v10."""
    rounding: Rounding = "nearest"
    """How the difference becomes a whole number of components: ``"nearest"``, halves to even, as in
    v10, or ``"truncate"``, but at least one component, as in v18."""

    def __post_init__(self) -> None:
        if not 0 < self.safety_factor < math.inf:
            raise ValueError(
                f"`safety_factor` must be positive and finite, got {self.safety_factor}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")
        if not 0 <= self.change_threshold < math.inf:
            raise ValueError(
                f"`change_threshold` must be >= 0 and finite, got {self.change_threshold}."
            )
        if self.rounding not in get_args(Rounding):
            raise ValueError(
                f"`rounding` must be one of {', '.join(get_args(Rounding))}, got {self.rounding!r}."
            )

    def target(self, reading: RankReading) -> float:
        """`safety_factor` times the stable rank."""
        largest = max(reading.values)
        return self.safety_factor * sum((value / largest) ** 2 for value in reading.values)

    def _propose(self, state: RankState, reading: RankReading, target: float) -> Proposal:
        low, high = self.clock.bounds(reading.capacity)
        past = float(reading.rank) if state.smoothed is None else state.smoothed
        clipped = max(low, min(target, high))
        smoothed = self.ema_decay * past + (1.0 - self.ema_decay) * clipped
        new = replace(state, smoothed=smoothed)
        delta = smoothed - reading.rank
        if abs(delta) < self.change_threshold:
            return Proposal(new, reading.rank, RankVerdict.IN_DEADBAND)
        return Proposal(new, reading.rank + self._step(delta), RankVerdict.SETTLED)

    def _step(self, delta: float) -> int:
        most = self.clock.max_step
        if self.rounding == "truncate":
            return int(math.copysign(max(1, min(most, abs(delta))), delta))
        return int(max(-most, min(most, round(delta))))
