"""In-place edits of weights, each of which states which reading it moves, and which way."""

from spectral_lightning.actuators.apply import add_, relative_size
from spectral_lightning.actuators.factored import carry_moments, share_moments
from spectral_lightning.actuators.protection import ProtectedPart, first_moments
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
    "ProtectedPart",
    "Side",
    "SpectralUpdate",
    "add_",
    "carry_moments",
    "condition_update",
    "first_moments",
    "legacy_l2_update",
    "log_stable_rank_update",
    "lower_stable_rank_update",
    "relative_size",
    "share_moments",
    "spectral_cap_update",
]
