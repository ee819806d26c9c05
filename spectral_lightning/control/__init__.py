"""Pure decisions: numbers in, verdict out. Standard library only."""

from spectral_lightning.control.assr_v15 import ASSRConfig, calibrated_config
from spectral_lightning.control.calibrated_mode import CalibratedPolicy, ScheduledPolicy
from spectral_lightning.control.calibration import CalibrationWindow, is_calm, static_band
from spectral_lightning.control.modes import (
    Mode,
    ModePolicy,
    ModeReading,
    ModeState,
    ModeVerdict,
    PolicyCondition,
)
from spectral_lightning.control.regulator import (
    LayerReading,
    LayerVerdict,
    Regulator,
    RegulatorState,
)
from spectral_lightning.control.seed_mode import (
    SeedPolicy,
    SeedRank,
    SeedThresholds,
    seed_decision,
    seed_next_rank,
)
from spectral_lightning.control.thermostat import (
    Band,
    Thermostat,
    ThermostatState,
    ThermostatVerdict,
)

__all__ = [
    "ASSRConfig",
    "Band",
    "CalibratedPolicy",
    "CalibrationWindow",
    "LayerReading",
    "LayerVerdict",
    "Mode",
    "ModePolicy",
    "ModeReading",
    "ModeState",
    "ModeVerdict",
    "PolicyCondition",
    "Regulator",
    "RegulatorState",
    "ScheduledPolicy",
    "SeedPolicy",
    "SeedRank",
    "SeedThresholds",
    "Thermostat",
    "ThermostatState",
    "ThermostatVerdict",
    "calibrated_config",
    "is_calm",
    "seed_decision",
    "seed_next_rank",
    "static_band",
]
