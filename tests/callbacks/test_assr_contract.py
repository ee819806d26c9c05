from typing import Any, ClassVar

import pytest

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import CalibrationWindow, Regulator
from spectral_lightning.testing.contracts import CallbackContract, MeasurementContract

# Bands that the readings of the tiny task leave at once, so that steps are really taken.
ACTING = Regulator(calibration="static", floor=2.0, condition_ceiling=1.5)


@pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")
class TestActing(CallbackContract):
    callback_class = ASSR
    init_args: ClassVar[dict[str, Any]] = {
        "regulator": ACTING,
        "spectrum_every_n_steps": 2,
        "table_rows": 3,
    }
    yaml_args: ClassVar = {
        "regulator": {"calibration": "static", "floor": 2.0, "condition_ceiling": 1.5}
    }


@pytest.mark.filterwarnings("ignore:ASSR has not acted on .* before they were calibrated")
@pytest.mark.filterwarnings("ignore:ASSR acts on .* layers in half precision")
class TestHealthy(MeasurementContract):
    """Inside its bands a run is bitwise the run without ASSR."""

    callback_class = ASSR
    init_args: ClassVar[dict[str, Any]] = {
        "regulator": Regulator(first_step=1, num_steps=2, window=CalibrationWindow(ratio=0.01)),
        "spectrum_every_n_steps": 2,
        "table_rows": 3,
    }
    yaml_args: ClassVar = {
        "regulator": {"first_step": 1, "num_steps": 2, "window": {"ratio": 0.01}}
    }
