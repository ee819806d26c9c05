"""Layers whose weight has a form that can be changed while training, and StableMax."""

from spectral_lightning.nn.capacity import CapacityFit, fitted_state
from spectral_lightning.nn.conversion import (
    compact,
    factorize,
    low_rank_from_linear,
    merge,
    merged_state,
    with_capacity,
)
from spectral_lightning.nn.factored import FactoredLinear, add_factors
from spectral_lightning.nn.functional import log_stablemax, stablemax, symlog
from spectral_lightning.nn.input_moments import input_moments
from spectral_lightning.nn.low_rank import LowRankLinear

__all__ = [
    "CapacityFit",
    "FactoredLinear",
    "LowRankLinear",
    "add_factors",
    "compact",
    "factorize",
    "fitted_state",
    "input_moments",
    "log_stablemax",
    "low_rank_from_linear",
    "merge",
    "merged_state",
    "stablemax",
    "symlog",
    "with_capacity",
]
