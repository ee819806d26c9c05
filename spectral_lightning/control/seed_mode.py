"""The decision rules of the adaptive SVD that this library started from, kept as they were.

Kept for comparison: they ignore the level that chance alone reaches (``sqrt(k / m)`` for the
principal alignment), so that once a layer has switched they take noise for danger and never switch
back. `CalibratedPolicy` does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from spectral_lightning.control.modes import (
    Mode,
    ModePolicy,
    ModeReading,
    ModeState,
    ModeVerdict,
    PolicyCondition,
    is_finite,
    require_size,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedThresholds:
    """When the original switches.

    Raises:
        ValueError: If a threshold is negative or not finite.
    """

    danger: float = 0.4
    """Principal alignment above which gradients are said to clobber."""
    safe: float = 0.6
    """Minor alignment above which low-rank mode is said to lose nothing."""
    stable: float = 0.1
    """Subspace angle below which the principal subspace is said to be stable, radians."""
    reconstruction: float = 0.01
    """Reconstruction error below which the principal part is said to hold all."""

    def __post_init__(self) -> None:
        for name in ("danger", "safe", "stable", "reconstruction"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be >= 0 and finite, got {value}.")


PRESETS = {
    "conservative": SeedThresholds(),
    "phase1": SeedThresholds(danger=0.3, safe=0.5, stable=0.15),
}
"""Both sets that the original was run with: before and after its thresholds were relaxed."""


class SeedRank(NamedTuple):
    """Next rank, and the original's words for why."""

    rank: int
    rationale: str


def seed_next_rank(
    values: Sequence[float],
    previous: Sequence[float] | None,
    rank: int,
    *,
    rank_min: int = 8,
    fixed_cutoff: bool = False,
) -> SeedRank:
    """Number of minor directions by the original's rule (``determine_next_r``).

    With earlier values: a fifth more if the smallest ``min(rank, size // 4)`` values changed by
    more than 10 %, else a fifth less. Without: the smallest of what lies behind the largest
    relative gap, what 99.9 % of the energy leave, and half of all.

    Args:
        values: All singular values, descending, at least 4.
        previous: Those of the analysis before; None at the first. Another number of values counts
            as none.
        rank: Minor directions now.
        rank_min: Fewest.
        fixed_cutoff: Whether the gap behind value ``i`` leaves ``size - i - 1`` minor directions;
            the original counts one more.

    Returns:
        Rank in ``[min(rank_min, size - 1), size - 1]``, and why.

    Raises:
        ValueError: If there are fewer than 4 values.

    Example:
        >>> seed_next_rank([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], 3, rank_min=1).rank
        2
    """
    size = len(values)
    require_size(size)
    if previous is not None and len(previous) == size:
        count = min(rank, size // 4)
        change = _distance(values[-count:], previous[-count:]) / (_norm(previous[-count:]) + 1e-10)
        if change > 0.1:
            chosen = SeedRank(max(rank, int(1.2 * rank)), "changing rapidly, keep/increase r")
        else:
            chosen = SeedRank(int(0.8 * rank), "stable, decrease r")
    else:
        ratios = [a / (b + 1e-10) for a, b in pairwise(values)]
        cutoff = size - ratios.index(max(ratios)) - fixed_cutoff
        energy = size - _held_by(values, 0.999)
        chosen = SeedRank(min(cutoff, energy, size // 2), "Initial r based on spectral structure")
    lowest = min(rank_min, size - 1)
    return chosen._replace(rank=max(lowest, min(chosen.rank, size - 1)))


def seed_decision(
    step: int,
    thresholds: SeedThresholds,
    *,
    subspace_angle: float,
    principal_alignment: float,
    minor_alignment: float,
    reconstruction_error: float,
    warmup_steps: int = 10,
) -> tuple[bool | None, ModeVerdict]:
    """Whether to train in low-rank mode, by the original's rule (``should_use_lowrank_training``).

    Returns:
        True for low-rank mode, False for full mode, None to keep the mode; and the reason.
    """
    if step < warmup_steps:
        return False, ModeVerdict.WARMUP
    is_safe = reconstruction_error < thresholds.reconstruction
    if principal_alignment > thresholds.danger:
        return True, ModeVerdict.CLOBBERING
    if subspace_angle < thresholds.stable and minor_alignment > thresholds.safe and is_safe:
        return True, ModeVerdict.OPTIMAL
    if not is_safe:
        return False, ModeVerdict.UNSAFE
    return None, ModeVerdict.CONTINUE


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class SeedPolicy(ModePolicy):
    """The original's policy: thresholds on raw alignments, rank by fifths.

    Decides at the rank of now and switches with the next one, as the original did.

    Raises:
        ValueError: If the preset is unknown or a number is out of its range.
    """

    preset: str = "conservative"
    """Name of its thresholds: ``"conservative"`` or ``"phase1"``."""
    warmup_steps: int = 10
    """Optimizer steps without a decision."""
    initial_principal: int = 10
    """Principal directions before the first switch (a quarter of all in very small matrices)."""
    rank_min: int = 8
    """Fewest minor directions."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        for name, least in {"warmup_steps": 0, "initial_principal": 1, "rank_min": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")

    @property
    def thresholds(self) -> SeedThresholds:
        """Thresholds of the preset."""
        return PRESETS[self.preset]

    @property
    def needs_all_values(self) -> bool:
        """True: the rank rule looks at the smallest values."""
        return True

    @property
    def conditions(self) -> tuple[PolicyCondition, ...]:
        """The four thresholds."""
        limits = self.thresholds
        return (
            PolicyCondition("principal_alignment", "danger", True, limits.danger),
            PolicyCondition("subspace_angle", "optimal", False, limits.stable),
            PolicyCondition("minor_alignment", "optimal", True, limits.safe),
            PolicyCondition("reconstruction_error", "optimal", False, limits.reconstruction),
        )

    def most_principal(self, size: int) -> int:
        """All but the fewest minor directions."""
        return size - min(self.rank_min, size - 1)

    def num_principal(
        self, state: ModeState, values: Sequence[float], frobenius_norm: float, size: int
    ) -> int:
        """Those that the present rank leaves."""
        return size - self._rank(state, size)

    def update(self, state: ModeState, reading: ModeReading) -> tuple[ModeState, ModeVerdict]:
        """Decide after one reading.

        Args:
            state: State that the last update returned.
            reading: Reading with all singular values.

        Returns:
            The next state, and the reason.
        """
        if reading.previous_values is None or reading.subspace_angle is None:
            return state, ModeVerdict.INITIAL
        if not is_finite(reading):
            return state, ModeVerdict.CONTINUE
        rank = self._rank(state, reading.size)
        wants, verdict = seed_decision(
            reading.step,
            self.thresholds,
            subspace_angle=reading.subspace_angle,
            principal_alignment=reading.principal_alignment,
            minor_alignment=reading.minor_alignment,
            reconstruction_error=reading.reconstruction_error,
            warmup_steps=self.warmup_steps,
        )
        following = state.mode if wants is None else Mode.LOW_RANK if wants else Mode.FULL
        if following is Mode.LOW_RANK:
            values, previous = reading.values, reading.previous_values
            rank = seed_next_rank(values, previous, rank, rank_min=self.rank_min).rank
        switches = following is not state.mode
        new = replace(state, mode=following, num_switches=state.num_switches + switches)
        return replace(new, rank=rank if following is Mode.LOW_RANK else state.rank), verdict

    def _rank(self, state: ModeState, size: int) -> int:
        require_size(size)
        if state.rank is not None:
            return state.rank
        rank = size - self.initial_principal
        return rank if rank >= self.rank_min else size - max(1, size // 4)


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    return math.dist(first, second)


def _held_by(values: Sequence[float], energy: float) -> int:
    """Leading values that hold a share of the energy, as the original counts them."""
    total = sum(value * value for value in values)
    held, count = 0.0, 0
    for value in values:
        held += value * value
        count += held < energy * total
    return count + 1
