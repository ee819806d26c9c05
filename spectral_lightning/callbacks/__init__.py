"""Lightning callbacks: which reading, which decision, which action; nothing else."""

from spectral_lightning.callbacks.assr import ASSR
from spectral_lightning.callbacks.base import SpectralCallback
from spectral_lightning.callbacks.monitor import SpectralMonitor

__all__ = ["ASSR", "SpectralCallback", "SpectralMonitor"]
