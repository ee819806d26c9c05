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


def due_norms(needs: Iterable[Need], step: int | None) -> set[str]:
    """Matrices whose spectral norm somebody wants at an optimizer step, or at any for None."""
    return {n for need in needs if _due(need.every_n_steps, step) for n in need.names}


def due_spectra(needs: Iterable[Need], step: int | None) -> set[str]:
    """Matrices whose exact spectrum somebody wants at an optimizer step, or at any for None."""
    return {n for need in needs if _due(need.spectrum_every_n_steps, step) for n in need.names}


def _due(interval: int | None, step: int | None) -> bool:
    return interval is not None and (step is None or step % interval == 0)
