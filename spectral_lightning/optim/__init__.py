"""Optimizers, parameter groups and learning-rate schedules, without Lightning."""

from spectral_lightning.optim.groups import parameter_groups
from spectral_lightning.optim.muon_adamw import MuonAdamW
from spectral_lightning.optim.schedules import WarmupConstantWarmdown

__all__ = ["MuonAdamW", "WarmupConstantWarmdown", "parameter_groups"]
