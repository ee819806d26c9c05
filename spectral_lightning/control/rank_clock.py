"""When the rank of a layer is looked at, and when and how far it may move.

Lives here: warm-up, cool-down, freeze, quanta, bounds, and the lazy interval. Does not live here:
which rank is wanted.
"""

import math
from dataclasses import dataclass, replace

from spectral_lightning.control.ranks import RankReading, RankState, RankVerdict

TURN_INTERVALS = 50
"""Shortest intervals for which a change that took the one before back is recent. Set by hand."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class RankClock:
    """When a layer is looked at, and when and how far its rank may move. In optimizer steps.

    The interval between two checks is lazy: it lengthens while a layer's target stays where it is,
    and shortens when the target moves or the rank has to, always inside
    ``[interval, interval_max]``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    warmup_steps: int = 500
    """Steps before the first change, as in v13 of the original."""
    cooldown_steps: int = 200
    """Fewest steps between two changes of a layer: as many as new components need to prove
    themselves, and as fading out takes. Set by hand."""
    freeze_after: int | None = None
    """Step from which on no rank changes; None for never."""
    quantum: int = 8
    """Ranks are multiples of it, or a bound: 8 half-precision numbers fill the 128 bits that tensor
    cores align to."""
    max_step: int = 32
    """Largest change at once, at least `quantum`. Set by hand: what a controller may drop is
    limited by energy."""
    rank_min: int = 8
    """Smallest rank, as in v10; a layer with less capacity has that instead."""
    rank_max: int | None = None
    """Largest rank; None for the layer's capacity."""
    interval: int = 100
    """First and shortest interval between two checks, at least 1. Set by hand."""
    interval_max: int = 1000
    """Longest, as in v13; as short as `interval` for checks at equal distances."""
    interval_growth: float = 1.5
    """Factor by which it lengthens, at least 1, as in v13."""
    interval_decay: float = 0.7
    """Factor by which it shortens, in (0, 1], as in v13."""
    calm: float = 0.05
    """Relative change of the target since the last check below which a layer is calm. By hand."""
    moving: float = 0.15
    """The same above which it is moving, at least `calm`. Set by hand."""

    def __post_init__(self) -> None:
        floors = {
            "warmup_steps": 0,
            "cooldown_steps": 0,
            "quantum": 1,
            "rank_min": 1,
            "interval": 1,
        }
        for name, least in floors.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ValueError(f"`freeze_after` must be >= 0 or None, got {self.freeze_after}.")
        for name, least_name in {"max_step": "quantum", "interval_max": "interval"}.items():
            least, value = getattr(self, least_name), getattr(self, name)
            if value < least:
                raise ValueError(f"`{name}` must be >= {least_name}={least}, got {value}.")
        if self.rank_max is not None and self.rank_max < self.rank_min:
            raise ValueError(
                f"`rank_max` must be >= rank_min={self.rank_min} or None, got {self.rank_max}."
            )
        if not 1 <= self.interval_growth < math.inf:
            raise ValueError(
                f"`interval_growth` must be >= 1 and finite, got {self.interval_growth}."
            )
        if not 0 < self.interval_decay <= 1:
            raise ValueError(f"`interval_decay` must be in (0, 1], got {self.interval_decay}.")
        if not 0 <= self.calm <= self.moving:
            raise ValueError(
                f"`calm` and `moving` must satisfy 0 <= calm <= moving, got {self.calm} and"
                f" {self.moving}."
            )

    def is_due(self, state: RankState, step: int) -> bool:
        """Whether a layer is to be checked; the first time after `interval`, frozen never again."""
        interval = self.interval if state.interval is None else state.interval
        return not self._is_frozen(step) and step - (state.checked or 0) >= interval

    def hold(self, state: RankState, step: int) -> RankVerdict | None:
        """Why a rank may not change now; None if it may."""
        if step < self.warmup_steps:
            return RankVerdict.WARMUP
        if self._is_frozen(step):
            return RankVerdict.FROZEN
        recent = state.changed is not None and step - state.changed < self.cooldown_steps
        return RankVerdict.COOLING if recent else None

    def has_just_turned(self, state: RankState, step: int) -> bool:
        """Whether a change took the one before back less than 50 shortest intervals ago."""
        return state.turned is not None and step - state.turned < TURN_INTERVALS * self.interval

    def bounds(self, capacity: int) -> tuple[int, int]:
        """Smallest and largest rank of a layer."""
        high = capacity if self.rank_max is None else min(self.rank_max, capacity)
        return min(self.rank_min, capacity), high

    def move(self, rank: int, wanted: float, capacity: int) -> int:
        """Rank that comes nearest to the wanted one, without going below it on the way down.

        Args:
            rank: Present rank.
            wanted: Wanted rank, not NaN.
            capacity: Most components of the layer.

        Returns:
            The present rank, or a multiple of `quantum` or a bound, at most `max_step` away from
            it and on the side of the wanted one. A rank outside its bounds is led back to them.

        Example:
            >>> clock = RankClock(quantum=8, max_step=16)
            >>> [clock.move(64, wanted, 128) for wanted in (3.0, 50.0, 57.0, 60.0, 65.0, 100.0)]
            [48, 56, 64, 64, 72, 80]
        """
        low, high = self.bounds(capacity)
        wanted = min(max(wanted, low), high)
        goal = min(self.round_up(wanted), high) if wanted > low else low
        if (goal - rank) * (wanted - rank) <= 0:  # rounding does not turn a change around
            return rank
        if goal > rank + self.max_step:
            return (rank + self.max_step) // self.quantum * self.quantum
        return max(goal, self.round_up(rank - self.max_step)) if goal < rank else goal

    def neighbour(self, rank: int, direction: int, capacity: int) -> int:
        """Next rank up (1) or down (-1): a multiple of `quantum` or a bound; the same if none."""
        low, high = self.bounds(capacity)
        if direction > 0:
            return max(rank, min((rank // self.quantum + 1) * self.quantum, high))
        return min(rank, max(self.round_up(rank) - self.quantum, low))

    def round_up(self, rank: float) -> int:
        """Smallest multiple of `quantum` that is not below a rank."""
        return math.ceil(rank / self.quantum) * self.quantum

    def tick(
        self, state: RankState, reading: RankReading, target: float, rank: int, verdict: RankVerdict
    ) -> RankState:
        """State after a check.

        Args:
            state: State before, with the controller's own memory of this check.
            reading: Reading.
            target: Target that the reading asks for.
            rank: Rank from now on.
            verdict: Why.
        """
        interval = self._next_interval(state, reading.step, target, verdict)
        held = replace(state, target=target, checked=reading.step, interval=interval)
        if rank == reading.rank:
            return held
        direction = 1 if rank > reading.rank else -1
        reverses = direction * state.direction < 0
        return replace(
            held,
            changed=reading.step,
            votes=0,
            direction=direction,
            turned=reading.step if reverses else state.turned,
            num_reversals=state.num_reversals + 1 if reverses else 0,
            num_changes=state.num_changes + 1,
        )

    def _is_frozen(self, step: int) -> bool:
        return self.freeze_after is not None and step >= self.freeze_after

    def _next_interval(
        self, state: RankState, step: int, target: float, verdict: RankVerdict
    ) -> int:
        now = self.interval if state.interval is None else state.interval
        if state.target is None or step < self.warmup_steps:
            return now
        change = abs(target - state.target) / max(abs(state.target), 1.0)
        acts = verdict in {RankVerdict.GROWN, RankVerdict.SHRUNK, RankVerdict.VOTING}
        if acts or change > self.moving:
            return max(self.interval, int(self.interval_decay * now))
        if change < self.calm and verdict is not RankVerdict.COOLING:
            # Rounded up: an interval of 1 would never lengthen otherwise.
            return math.ceil(min(self.interval_max, self.interval_growth * now))
        return now
