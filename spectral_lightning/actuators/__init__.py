"""In-place edits of weights, each of which states which reading it moves, and which way."""

from spectral_lightning.actuators.apply import add_, relative_size
from spectral_lightning.actuators.spectral import (
    SpectralUpdate,
    condition_update,
    legacy_l2_update,
    log_stable_rank_update,
    lower_stable_rank_update,
    spectral_cap_update,
)

__all__ = [
    "SpectralUpdate",
    "add_",
    "condition_update",
    "legacy_l2_update",
    "log_stable_rank_update",
    "lower_stable_rank_update",
    "relative_size",
    "spectral_cap_update",
]
