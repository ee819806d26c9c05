"""Pure decisions: numbers in, verdict out. Standard library only."""

from spectral_lightning.control.assr_v15 import ASSRConfig, calibrated_config
from spectral_lightning.control.calibration import CalibrationWindow, is_calm, static_band
from spectral_lightning.control.regulator import (
    LayerReading,
    LayerVerdict,
    Regulator,
    RegulatorState,
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
    "CalibrationWindow",
    "LayerReading",
    "LayerVerdict",
    "Regulator",
    "RegulatorState",
    "Thermostat",
    "ThermostatState",
    "ThermostatVerdict",
    "calibrated_config",
    "is_calm",
    "static_band",
]
