"""Losses: cross-entropies that keep their digits, and the terms of embedding models."""

from spectral_lightning.losses.cross_entropy import (
    CrossEntropy,
    cross_entropy,
    stablemax_cross_entropy,
)
from spectral_lightning.losses.embedding_terms import (
    alignment_loss,
    bridge_loss,
    cosent_loss,
    renyi_entropy,
    softmax_entropy,
    triplet_loss,
)
from spectral_lightning.losses.info_nce import info_nce
from spectral_lightning.losses.linear_cross_entropy import linear_cross_entropy
from spectral_lightning.losses.matryoshka import Matryoshka, prefix
from spectral_lightning.losses.spectra import SpectraLoss, SpectraTerms
from spectral_lightning.losses.temperature import CosineTemperature, LearnableTemperature

__all__ = [
    "CosineTemperature",
    "CrossEntropy",
    "LearnableTemperature",
    "Matryoshka",
    "SpectraLoss",
    "SpectraTerms",
    "alignment_loss",
    "bridge_loss",
    "cosent_loss",
    "cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "prefix",
    "renyi_entropy",
    "softmax_entropy",
    "stablemax_cross_entropy",
    "triplet_loss",
]
