"""One layer's spectral numbers at one optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What was measured of one weight matrix at one optimizer step.

    Numbers are Python floats in the weight's own units unless said otherwise. A reading whose
    `failure` is set holds NaN in every number that could not be computed (a zero weight has norms,
    but no stable rank): a failed computation has no value.
    Numbers measured at the slower cadence (`condition_number`, relative or not, `effective_rank`,
    `values`) are None until the first exact spectrum and then keep the values of `spectrum_step`.
    """

    name: str
    """Name of the layer, e.g. ``blocks.0.attn.c_q``."""
    step: int
    """Optimizer step (`trainer.global_step`) after which the weight was read."""
    shape: tuple[int, int]
    """Shape ``(m, n)`` of the matrix."""
    spectral_norm: float
    """Largest singular value ``||W||_2``; an estimate from below."""
    spectral_norm_interval: tuple[float, float]
    """Bounds ``(low, high)`` that hold the true spectral norm."""
    frobenius_norm: float
    """``||W||_F``."""
    stable_rank: float
    """``||W||_F^2 / ||W||_2^2``, dimensionless, in ``[1, min(m, n)]``."""
    relative_stable_rank: float
    """Stable rank divided by that of a Gaussian matrix of this shape, dimensionless."""
    condition_number: float | None = None
    """``sigma_max / sigma_min``, dimensionless, infinite for a singular matrix."""
    relative_condition_number: float | None = None
    """Condition number divided by that of a Gaussian matrix of this shape, dimensionless."""
    effective_rank: float | None = None
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    values: tuple[float, ...] | None = None
    """Singular values, descending, from the last exact spectrum."""
    spectrum_step: int | None = None
    """Optimizer step of the last exact spectrum."""
    trainable: bool = True
    """False for a layer whose weight is frozen."""
    failure: str | None = None
    """Why nothing could be measured, as one sentence; None for a good reading."""
