"""Layers whose weight has a form that can be changed while training."""

from spectral_lightning.nn.conversion import (
    compact,
    factorize,
    fitted_state,
    low_rank_from_linear,
    merge,
    with_capacity,
)
from spectral_lightning.nn.factored import FactoredLinear, add_factors
from spectral_lightning.nn.input_moments import input_moments
from spectral_lightning.nn.low_rank import LowRankLinear

__all__ = [
    "FactoredLinear",
    "LowRankLinear",
    "add_factors",
    "compact",
    "factorize",
    "fitted_state",
    "input_moments",
    "low_rank_from_linear",
    "merge",
    "with_capacity",
]
