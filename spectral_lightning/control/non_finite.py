"""What to do about optimizer steps that would write NaN or infinity into weights."""

from dataclasses import dataclass, replace
from enum import StrEnum


class SkipVerdict(StrEnum):
    """What becomes of an optimizer step, and why."""

    FINE = "loss and gradient are finite"
    LEFT_TO_SCALER = "the gradient overflowed, so the gradient scaler skips the step"
    SKIP = "loss or gradient is not finite"
    GIVE_UP = "too many steps in a row were skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipState:
    """Counts of a run; plain numbers, so that a checkpoint holds it as it is."""

    num_skipped: int = 0
    """Steps skipped so far."""
    in_a_row: int = 0
    """Steps skipped since the last one that was taken."""


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class SkipPolicy:
    """Skip steps that are not finite, and give up when they do not stop.

    Raises:
        ValueError: If `max_skips_in_a_row` is negative.
    """

    max_skips_in_a_row: int = 10
    """Steps that may be skipped one after the other; the next one gives up."""

    def __post_init__(self) -> None:
        if self.max_skips_in_a_row < 0:
            raise ValueError(f"`max_skips_in_a_row` must be >= 0, got {self.max_skips_in_a_row}.")

    def update(
        self, state: SkipState, *, is_finite: bool, is_overflow: bool = False
    ) -> tuple[SkipState, SkipVerdict]:
        """Decide about one optimizer step.

        Args:
            state: State that the last update returned.
            is_finite: Whether loss and gradient are finite, on all ranks.
            is_overflow: Whether a gradient scaler will lower its scale for it, which may help.

        Returns:
            The next state, and the verdict.

        Example:
            >>> policy, state = SkipPolicy(max_skips_in_a_row=1), SkipState()
            >>> for _ in range(2):
            ...     state, verdict = policy.update(state, is_finite=False)
            >>> state.in_a_row, verdict.name
            (2, 'GIVE_UP')
        """
        if is_finite:
            return replace(state, in_a_row=0), SkipVerdict.FINE
        if is_overflow:
            return state, SkipVerdict.LEFT_TO_SCALER
        state = SkipState(num_skipped=state.num_skipped + 1, in_a_row=state.in_a_row + 1)
        is_too_many = state.in_a_row > self.max_skips_in_a_row
        return state, SkipVerdict.GIVE_UP if is_too_many else SkipVerdict.SKIP
