"""Which matrices are measured, when, and the one shared cache of readings."""

from spectral_lightning.spectra.cache import SpectrumCache
from spectral_lightning.spectra.history import HistoryStep, HistoryWriter, read_history
from spectral_lightning.spectra.needs import Need
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.targets import Discovery, Target, find_targets
from spectral_lightning.spectra.timeline import HeatMapGrid, HeatMapTimeline

__all__ = [
    "Discovery",
    "HeatMapGrid",
    "HeatMapTimeline",
    "HistoryStep",
    "HistoryWriter",
    "Need",
    "Reading",
    "SpectrumCache",
    "Target",
    "find_targets",
    "read_history",
]
