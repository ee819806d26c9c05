"""How far a stable rank is from where it should be."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthyRange:
    """Band of the relative stable rank in which a layer counts as healthy.

    The stable rank relative to a Gaussian matrix of the shape is 1 for random weights, up to 4 for
    (semi-)orthogonal ones, and falls as a layer's energy gathers in few directions. The defaults
    are wide enough for ordinary pretrained layers. Of the 59 matrices of four pretrained models
    (all-MiniLM-L6-v2, Silero VAD and two sizes of CREPE, without embeddings, measured by
    scripts/choose_scan.py) the lowest is at 0.014 and the highest at 1.24, half of them between
    0.16 and 0.50. The floor lies below all of them, the ceiling halfway (in logarithms) between
    random and orthogonal. An output layer in its first training steps may lie below.

    Raises:
        ValueError: If the bounds are not ``0 < floor < ceiling``, both finite.
    """

    floor: float = 0.01
    """Lower end, dimensionless."""
    ceiling: float = 2.0
    """Upper end, dimensionless."""

    def __post_init__(self) -> None:
        if not 0 < self.floor < self.ceiling < math.inf:
            raise ValueError(
                "`floor` and `ceiling` must be finite, with 0 < floor < ceiling, got"
                f" {self.floor} and {self.ceiling}."
            )

    def offset(self, relative_stable_rank: float) -> float:
        """Signed distance to the range: the larger of ``log(floor / x)`` and ``log(x / ceiling)``.

        Args:
            relative_stable_rank: Stable rank ``x`` relative to a Gaussian matrix, positive.

        Returns:
            Natural logarithm of the factor by which the range is missed; negative inside, where it
            says how far the nearer end is. NaN for NaN.

        Example:
            >>> healthy = HealthyRange(floor=0.5, ceiling=2.0)
            >>> [round(healthy.offset(x), 3) for x in (0.25, 1.0, 4.0)]
            [0.693, -0.693, 0.693]
        """
        if math.isnan(relative_stable_rank):
            return math.nan
        logarithm = math.log(relative_stable_rank)
        return max(math.log(self.floor) - logarithm, logarithm - math.log(self.ceiling))
