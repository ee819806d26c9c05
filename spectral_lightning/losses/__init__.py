"""Losses that keep their digits where a model is very sure of itself."""

from spectral_lightning.losses.cross_entropy import (
    CrossEntropy,
    cross_entropy,
    stablemax_cross_entropy,
)
from spectral_lightning.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["CrossEntropy", "cross_entropy", "linear_cross_entropy", "stablemax_cross_entropy"]
