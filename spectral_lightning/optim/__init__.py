"""Optimizers, parameter groups and learning-rate schedules, without Lightning."""

from spectral_lightning.optim.groups import parameter_groups
from spectral_lightning.optim.muon_adamw import MuonAdamW
from spectral_lightning.optim.orthogonal_classes import (
    Orthogonal,
    OrthogonalAdamW,
    OrthogonalSGD,
    orthogonal,
    orthogonal_groups,
)
from spectral_lightning.optim.orthogonal_optimizer import OrthogonalOptimizer
from spectral_lightning.optim.role_adamw import RoleAdamW
from spectral_lightning.optim.schedules import WarmupConstantWarmdown

__all__ = [
    "MuonAdamW",
    "Orthogonal",
    "OrthogonalAdamW",
    "OrthogonalOptimizer",
    "OrthogonalSGD",
    "RoleAdamW",
    "WarmupConstantWarmdown",
    "orthogonal",
    "orthogonal_groups",
    "parameter_groups",
]
