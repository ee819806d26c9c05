from typing import ClassVar

from spectral_lightning.callbacks import SpectralMonitor
from spectral_lightning.testing.contracts import MeasurementContract


class TestSpectralMonitor(MeasurementContract):
    callback_class = SpectralMonitor
    init_args: ClassVar = {"spectrum_every_n_steps": 2, "table_rows": 3}
