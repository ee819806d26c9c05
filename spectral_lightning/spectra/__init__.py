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
from spectral_lightning.spectra.null_products import null_product_values
from spectral_lightning.spectra.rank_events import (
    RANK_EVENTS_FILE,
    LayerSize,
    RankCheck,
    RankEvent,
    RankEventWriter,
    RankSettings,
    RankSummary,
    SkippedCheck,
    read_rank_events,
)
from spectral_lightning.spectra.rank_history import RankChange, RankHistory, RankPoint, RankSpread
from spectral_lightning.spectra.rank_log_lines import EpochLosses, rank_log_lines
from spectral_lightning.spectra.rank_logs import read_rank_log
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.scan import ScannedLayer, ScanReport, ScanStatus, scan_model
from spectral_lightning.spectra.target import Target
from spectral_lightning.spectra.targets import Discovery, find_targets
from spectral_lightning.spectra.timeline import HeatMapGrid, HeatMapMeasure, HeatMapTimeline
from spectral_lightning.spectra.vectors import VectorCache

__all__ = [
    "MODE_EVENTS_FILE",
    "RANK_EVENTS_FILE",
    "Condition",
    "Discovery",
    "EpochLosses",
    "HealthyRange",
    "HeatMapGrid",
    "HeatMapMeasure",
    "HeatMapTimeline",
    "HistoryStep",
    "HistoryWriter",
    "LayerAnalysis",
    "LayerSize",
    "ModeEvent",
    "ModeEventWriter",
    "ModeSettings",
    "Need",
    "RankChange",
    "RankCheck",
    "RankEvent",
    "RankEventWriter",
    "RankHistory",
    "RankPoint",
    "RankSettings",
    "RankSpread",
    "RankSummary",
    "Reading",
    "ScanReport",
    "ScanStatus",
    "ScannedLayer",
    "SingularTriplets",
    "SkippedAnalysis",
    "SkippedCheck",
    "SpectrumCache",
    "Target",
    "VectorCache",
    "find_targets",
    "is_due",
    "null_product_values",
    "rank_log_lines",
    "read_history",
    "read_mode_events",
    "read_rank_events",
    "read_rank_log",
    "scan_model",
]
