"""The exact spectrum of one matrix and the numbers read off it."""

import math

import torch
from torch import Tensor

from spectral_lightning.linalg.condition import condition_number
from spectral_lightning.linalg.exact import singular_values
from spectral_lightning.linalg.measures import effective_rank

_GRAM_CONDITION = 1e6
"""Up to here the smallest of `singular_values` is accurate to 0.1 % (its docstring)."""


def exact_spectrum(weight: Tensor) -> tuple[float, float, tuple[float, ...]]:
    """Measure all singular values of a matrix; waits for the device.

    Args:
        weight: Matrix, shape ``(m, n)``.

    Returns:
        Condition number (infinite for a singular matrix, NaN if it could not be certified),
        effective rank, and the singular values, descending. For an empty matrix and one with a
        NaN or infinite entry: NaN, NaN and no values.

    Example:
        >>> exact_spectrum(torch.diag(torch.tensor([4.0, 2.0])))[0]
        2.0
    """
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        return math.nan, math.nan, ()
    values = singular_values(weight).double()
    largest, smallest = values[0].item(), values[-1].item()
    condition = largest / smallest if smallest > 0 else math.inf
    if condition > _GRAM_CONDITION:
        try:
            condition = condition_number(weight).item()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            condition = math.nan
    return condition, effective_rank(values).item(), tuple(values.tolist())
