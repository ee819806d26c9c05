"""Which matrices are measured, when, and the one shared cache of readings."""

from spectral_lightning.linalg import SingularTriplets
from spectral_lightning.spectra.cache import SpectrumCache
from spectral_lightning.spectra.health import HealthyRange
from spectral_lightning.spectra.history import HistoryStep, HistoryWriter, read_history
from spectral_lightning.spectra.mode_events import (
    MODE_EVENTS_FILE,
    Condition,
    LayerAnalysis,
    ModeEvent,
    ModeEventWriter,
    ModeSettings,
    SkippedAnalysis,
    read_mode_events,
)
from spectral_lightning.spectra.needs import Need, is_due
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.scan import ScannedLayer, ScanReport, ScanStatus, scan_model
from spectral_lightning.spectra.target import Target
from spectral_lightning.spectra.targets import Discovery, find_targets
from spectral_lightning.spectra.timeline import HeatMapGrid, HeatMapMeasure, HeatMapTimeline
from spectral_lightning.spectra.vectors import VectorCache

__all__ = [
    "MODE_EVENTS_FILE",
    "Condition",
    "Discovery",
    "HealthyRange",
    "HeatMapGrid",
    "HeatMapMeasure",
    "HeatMapTimeline",
    "HistoryStep",
    "HistoryWriter",
    "LayerAnalysis",
    "ModeEvent",
    "ModeEventWriter",
    "ModeSettings",
    "Need",
    "Reading",
    "ScanReport",
    "ScanStatus",
    "ScannedLayer",
    "SingularTriplets",
    "SkippedAnalysis",
    "SpectrumCache",
    "Target",
    "VectorCache",
    "find_targets",
    "is_due",
    "read_history",
    "read_mode_events",
    "scan_model",
]
