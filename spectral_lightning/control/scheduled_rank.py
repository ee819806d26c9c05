"""Rank by a schedule, whatever is measured."""

from dataclasses import dataclass

from spectral_lightning.control.rank_clock import RankClock
from spectral_lightning.control.rank_control import LayerRankController, Proposal
from spectral_lightning.control.ranks import RankReading, RankState, RankVerdict

SCHEDULE_CLOCK = RankClock(warmup_steps=0, cooldown_steps=0, interval_max=100)
"""Checks at equal distances: the schedule has a warm-up of its own, and nothing to wait for."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class ScheduledController(LayerRankController):
    """Lead all layers from one rank to another along a cubic, as AdaLoRA leads its budget.

    ``initial_rank`` for ``initial_steps``, then ``target + (initial - target) (1 - t)^3`` with
    ``t`` from 0 to 1, and ``target_rank`` in the last ``final_steps``. The cubic removes most while
    there is much, and lets the last components go slowly. The control to compare others with: it
    reaches their ranks and knows nothing of the layers.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Zhang et al. (2023), "AdaLoRA", sec. 3.3, https://arxiv.org/abs/2303.10512, in the
        continuous form of its code, in which the cubic starts where the first phase ends.

    Example:
        >>> schedule = ScheduledController(initial_rank=64, target_rank=8, total_steps=100)
        >>> [schedule.rank_at(step) for step in (0, 50, 100)]
        [64.0, 15.0, 8.0]
    """

    clock: RankClock = SCHEDULE_CLOCK
    """Bounds, quanta and the distance of checks."""
    initial_rank: int
    """Rank of the first phase, at least 1."""
    target_rank: int
    """Rank of the last phase: a multiple of ``clock.quantum`` or a bound, inside the bounds."""
    total_steps: int
    """Optimizer steps of the training."""
    initial_steps: int = 0
    """Optimizer steps of the first phase."""
    final_steps: int = 0
    """Optimizer steps of the last phase; the three phases fit into `total_steps`."""

    def __post_init__(self) -> None:
        for name, least in {"initial_rank": 1, "initial_steps": 0, "final_steps": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")
        if self.total_steps <= self.initial_steps + self.final_steps:
            raise ValueError(
                "`total_steps` must be above initial_steps + final_steps ="
                f" {self.initial_steps + self.final_steps}, got {self.total_steps}."
            )
        clock = self.clock
        low, high = clock.rank_min, clock.rank_max
        if self.target_rank < low or (high is not None and self.target_rank > high):
            raise ValueError(
                f"`target_rank` must be in the clock's bounds [{low}, {high or 'capacity'}], got"
                f" {self.target_rank}."
            )
        if self.target_rank % clock.quantum and self.target_rank not in {low, high}:
            raise ValueError(
                f"`target_rank` must be a multiple of clock.quantum={clock.quantum}, got"
                f" {self.target_rank}; a quantum of 1 allows every rank."
            )

    def rank_at(self, step: int) -> float:
        """Scheduled rank after some optimizer steps."""
        span = self.total_steps - self.initial_steps - self.final_steps
        left = 1 - min(max((step - self.initial_steps) / span, 0.0), 1.0)
        return self.target_rank + (self.initial_rank - self.target_rank) * left**3

    def target(self, reading: RankReading) -> float:
        """The scheduled rank: of the reading, only the step counts."""
        return self.rank_at(reading.step)

    def _propose(self, state: RankState, reading: RankReading, target: float) -> Proposal:
        return Proposal(state, target, RankVerdict.SETTLED)
