"""In-place edits of weights, each of which states which reading it moves, and which way."""

from spectral_lightning.actuators.apply import add_, relative_size
from spectral_lightning.actuators.averages import (
    follow_gates_,
    grow_averages_,
    regauge_averages_,
)
from spectral_lightning.actuators.decay import add_frobenius_decay_
from spectral_lightning.actuators.factored import carry_moments, share_moments
from spectral_lightning.actuators.growth import GrowthProbe
from spectral_lightning.actuators.orthogonal import (
    MAX_GAIN,
    Granularity,
    check_projection,
    project_,
)
from spectral_lightning.actuators.orthogonal_parameters import (
    OrthogonalParameter,
    granularity_of,
    orthogonal_parameters,
)
from spectral_lightning.actuators.orthogonal_update import (
    Project,
    decay_conflict,
    project_update_,
)
from spectral_lightning.actuators.protection import ProtectedPart, first_moments
from spectral_lightning.actuators.regauge import Moments, regauge_
from spectral_lightning.actuators.resize import (
    best_components,
    component_values,
    fresh_rows,
    gathered_factors,
    grow_,
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
from spectral_lightning.actuators.update_bound import bound_update_, copied_factors
from spectral_lightning.linalg import Side

__all__ = [
    "MAX_GAIN",
    "Granularity",
    "GrowthProbe",
    "Moments",
    "OrthogonalParameter",
    "Project",
    "ProtectedPart",
    "Side",
    "SpectralUpdate",
    "add_",
    "add_frobenius_decay_",
    "best_components",
    "bound_update_",
    "carry_moments",
    "check_projection",
    "component_values",
    "condition_update",
    "copied_factors",
    "decay_conflict",
    "first_moments",
    "follow_gates_",
    "fresh_rows",
    "gathered_factors",
    "granularity_of",
    "grow_",
    "grow_averages_",
    "legacy_l2_update",
    "log_stable_rank_update",
    "lower_stable_rank_update",
    "orthogonal_parameters",
    "project_",
    "project_update_",
    "regauge_",
    "regauge_averages_",
    "relative_size",
    "share_moments",
    "shrink_",
    "spectral_cap_update",
]
