"""In-place edits of weights, each of which states which reading it moves, and which way."""

from spectral_lightning.actuators.apply import add_, relative_size
from spectral_lightning.actuators.decay import add_frobenius_decay_
from spectral_lightning.actuators.factored import carry_moments, share_moments
from spectral_lightning.actuators.growth import GrowthProbe
from spectral_lightning.actuators.protection import ProtectedPart, first_moments
from spectral_lightning.actuators.resize import (
    Moments,
    best_components,
    fresh_rows,
    gathered_factors,
    grow_,
    regauge_,
    shrink_,
)
from spectral_lightning.actuators.spectral import (
    SpectralUpdate,
    condition_update,
    legacy_l2_update,
    log_stable_rank_update,
    lower_stable_rank_update,
    spectral_cap_update,
)
from spectral_lightning.linalg import Side

__all__ = [
    "GrowthProbe",
    "Moments",
    "ProtectedPart",
    "Side",
    "SpectralUpdate",
    "add_",
    "add_frobenius_decay_",
    "best_components",
    "carry_moments",
    "condition_update",
    "first_moments",
    "fresh_rows",
    "gathered_factors",
    "grow_",
    "legacy_l2_update",
    "log_stable_rank_update",
    "lower_stable_rank_update",
    "regauge_",
    "relative_size",
    "share_moments",
    "shrink_",
    "spectral_cap_update",
]
