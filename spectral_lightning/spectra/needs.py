"""What consumers of readings ask for, and which steps that makes due."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One consumer's declared need; needs of all consumers are joined and computed once.

    Raises:
        ValueError: If an interval is below 1.
    """

    names: frozenset[str]
    """Names of the matrices."""
    every_n_steps: int = 1
    """Optimizer steps between two spectral norms."""
    spectrum_every_n_steps: int | None = None
    """Optimizer steps between two exact spectra; None for never."""

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "spectrum_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")


def due_norms(needs: Iterable[Need], step: int, before: int | None) -> set[str]:
    """Matrices whose spectral norm somebody wants at an optimizer step (`is_due`)."""
    return {n for need in needs if is_due(need.every_n_steps, step, before) for n in need.names}


def due_spectra(needs: Iterable[Need], step: int, before: int | None) -> set[str]:
    """Matrices whose exact spectrum somebody wants at an optimizer step (`is_due`)."""
    slow = [need for need in needs if is_due(need.spectrum_every_n_steps, step, before)]
    return {name for need in slow for name in need.names}


def is_due(interval: int | None, step: int, before: int | None) -> bool:
    """Whether a multiple of an interval was reached since an earlier optimizer step.

    A step is not asked to be a multiple itself: several optimizers, or several optimizer steps in
    one batch, make the count of steps jump.

    Args:
        interval: Optimizer steps between two times; None or 0 for never.
        step: Optimizer steps done.
        before: Optimizer steps done when this was last asked, or last due; None for the first
            time, which is always due.

    Returns:
        Whether it is due.

    Example:
        >>> [step for before, step in [(0, 2), (2, 4), (4, 6)] if is_due(3, step, before)]
        [4, 6]
    """
    if not interval:
        return False
    return before is None or step // interval > before // interval
