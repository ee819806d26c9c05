"""Pure decisions: numbers in, verdict out. Standard library only."""

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
    "Band",
    "CalibrationWindow",
    "LayerReading",
    "LayerVerdict",
    "Regulator",
    "RegulatorState",
    "Thermostat",
    "ThermostatState",
    "ThermostatVerdict",
    "is_calm",
    "static_band",
]
