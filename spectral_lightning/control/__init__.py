"""Pure decisions: numbers in, verdict out. Standard library only."""

from spectral_lightning.control.assr_v15 import ASSRConfig, calibrated_config
from spectral_lightning.control.calibrated_mode import CalibratedPolicy, ScheduledPolicy
from spectral_lightning.control.calibration import CalibrationWindow, is_calm, static_band
from spectral_lightning.control.energy_control import EnergyController
from spectral_lightning.control.modes import (
    Mode,
    ModePolicy,
    ModeReading,
    ModeState,
    ModeVerdict,
    PolicyCondition,
)
from spectral_lightning.control.rank_budget import BudgetAllocator
from spectral_lightning.control.rank_clock import RankClock
from spectral_lightning.control.rank_control import LayerRankController, RankController
from spectral_lightning.control.ranks import (
    RankDecision,
    RankReading,
    RankState,
    RankVerdict,
    energy_rank,
    energy_shares,
    layers_at_floor,
)
from spectral_lightning.control.regulator import (
    LayerReading,
    LayerVerdict,
    Regulator,
    RegulatorState,
)
from spectral_lightning.control.scheduled_rank import ScheduledController
from spectral_lightning.control.seed_mode import (
    SeedPolicy,
    SeedRank,
    SeedThresholds,
    seed_decision,
    seed_next_rank,
)
from spectral_lightning.control.stable_rank_control import StableRankController
from spectral_lightning.control.thermostat import (
    Band,
    Thermostat,
    ThermostatState,
    ThermostatVerdict,
)

__all__ = [
    "ASSRConfig",
    "Band",
    "BudgetAllocator",
    "CalibratedPolicy",
    "CalibrationWindow",
    "EnergyController",
    "LayerRankController",
    "LayerReading",
    "LayerVerdict",
    "Mode",
    "ModePolicy",
    "ModeReading",
    "ModeState",
    "ModeVerdict",
    "PolicyCondition",
    "RankClock",
    "RankController",
    "RankDecision",
    "RankReading",
    "RankState",
    "RankVerdict",
    "Regulator",
    "RegulatorState",
    "ScheduledController",
    "ScheduledPolicy",
    "SeedPolicy",
    "SeedRank",
    "SeedThresholds",
    "StableRankController",
    "Thermostat",
    "ThermostatState",
    "ThermostatVerdict",
    "calibrated_config",
    "energy_rank",
    "energy_shares",
    "is_calm",
    "layers_at_floor",
    "seed_decision",
    "seed_next_rank",
    "static_band",
]
