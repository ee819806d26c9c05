"""Rank by energy: shrink what holds none, grow where the gradient keeps asking for more."""

import math
from dataclasses import dataclass, replace

from spectral_lightning.control.rank_control import LayerRankController, Proposal
from spectral_lightning.control.ranks import RankReading, RankState, RankVerdict, energy_rank


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class EnergyController(LayerRankController):
    """Keep as many components as hold nearly all of a layer's energy, in both directions.

    A layer shrinks if what is left holds at least ``energy + hysteresis``. The spectrum of ``U V``
    cannot tell that components are missing, so a layer grows, by a quantum, only if none of its
    quanta is free (without the last one less than `energy` would be left) and its averaged gradient
    keeps pointing outside of what the factors reach. Without a growth lift it only shrinks.

    Either takes `patience` checks in a row, outside of warm-up and cool-down. A change that takes
    the last one back takes twice as many; if that one did so too, growing takes 8 times as many and
    shrinking 32 times, because what was dropped and came back was needed. Not for ever: once that
    is 50 shortest intervals ago, the need may have changed, and twice as many are enough.

    Energy is counted relative to what the layer has. A flat spectrum of more than ``quantum /
    (1 - energy - hysteresis)`` components (533 by default) counts as having a free quantum, because
    any of its quanta holds next to nothing of the whole.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> values = [1.0] * 12 + [0.01] * 4
        >>> reading = RankReading(step=0, shape=(64, 64), rank=16, capacity=32, values=values)
        >>> EnergyController().target(reading)
        12.0
    """

    energy: float = 0.98
    """Share of the energy that the layer needs, in (0, 1), as in v9 and v13 of the original."""
    hysteresis: float = 0.005
    """Share that has to be left over before anything is dropped; set by hand."""
    growth_threshold: float = 2.0
    """Growth lift from which on components are missing, at least 1: at 2, half of the energy
    outside is more than noise. Set by hand."""
    patience: int = 2
    """Checks in a row that a change takes, at least 1; set by hand."""

    def __post_init__(self) -> None:
        if not (self.energy > 0 and self.hysteresis >= 0 and self.energy + self.hysteresis < 1):
            raise ValueError(
                "`energy` and `hysteresis` must satisfy 0 < energy <= energy + hysteresis < 1, got"
                f" {self.energy} and {self.hysteresis}."
            )
        if not 1 <= self.growth_threshold < math.inf:
            raise ValueError(
                f"`growth_threshold` must be >= 1 and finite, got {self.growth_threshold}."
            )
        if self.patience < 1:
            raise ValueError(f"`patience` must be >= 1, got {self.patience}.")

    def target(self, reading: RankReading) -> float:
        """Components that hold `energy`, or a quantum more than there are if some are missing."""
        needed = energy_rank(reading.values, self.energy)
        is_full = self.clock.round_up(needed) >= reading.rank
        lift = 0.0 if reading.growth is None else reading.growth
        if is_full and lift >= self.growth_threshold:
            return float(reading.rank + self.clock.quantum)
        return float(needed)

    def _propose(self, state: RankState, reading: RankReading, target: float) -> Proposal:
        wanted = target
        if target <= reading.rank:
            wanted = float(energy_rank(reading.values, self.energy + self.hysteresis))
        moved = self.clock.move(reading.rank, wanted, reading.capacity)
        direction = (moved > reading.rank) - (moved < reading.rank)
        if direction == 0 or self.clock.hold(state, reading.step) is not None:
            return Proposal(replace(state, votes=0), wanted, RankVerdict.SETTLED)
        votes = direction + (state.votes if state.votes * direction > 0 else 0)
        voted = replace(state, votes=votes)
        if abs(votes) < self.patience * self._caution(state, reading.step, direction):
            return Proposal(voted, reading.rank, RankVerdict.VOTING)
        return Proposal(voted, wanted, RankVerdict.SETTLED)

    def _caution(self, state: RankState, step: int, direction: int) -> int:
        """How many times `patience` a change takes. Set by hand: see the class."""
        if direction * state.direction >= 0:
            return 1
        if state.num_reversals == 0 or not self.clock.has_just_turned(state, step):
            return 2
        return 8 if direction > 0 else 32
