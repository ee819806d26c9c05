"""Lightning callbacks: which reading, which decision, which action; nothing else."""

from typing import TYPE_CHECKING, Any

from spectral_lightning.callbacks.assr import ASSR
from spectral_lightning.callbacks.assr_v15 import (
    SpectralHealth,
    analyze_layer,
    auto_calibrate,
    compute_condition_number,
    compute_spectral_health,
    compute_stable_rank,
    compute_stable_rank_ratio,
    legacy_assr,
    print_spectral_report,
)
from spectral_lightning.callbacks.base import SpectralCallback
from spectral_lightning.callbacks.checkpoint_backup import CheckpointBackup
from spectral_lightning.callbacks.embedding_health import EmbeddingHealth
from spectral_lightning.callbacks.monitor import SpectralMonitor
from spectral_lightning.callbacks.named_checkpoints import FinalCheckpoint
from spectral_lightning.callbacks.non_finite_guard import NonFiniteGuard
from spectral_lightning.callbacks.orthogonal_gradient import OrthogonalGradient
from spectral_lightning.callbacks.rank_adaptation import RankAdaptation
from spectral_lightning.callbacks.softmax_collapse import SoftmaxCollapse
from spectral_lightning.callbacks.svd_mode import SVDModeSwitch
from spectral_lightning.callbacks.target_progress import TargetProgress
from spectral_lightning.callbacks.throughput import Throughput
from spectral_lightning.callbacks.update_bound import UpdateBound
from spectral_lightning.control import ASSRConfig

if TYPE_CHECKING:
    from spectral_lightning.callbacks.transformers_trainer import SpectralTrainerCallback

__all__ = [
    "ASSR",
    "ASSRConfig",
    "CheckpointBackup",
    "EmbeddingHealth",
    "FinalCheckpoint",
    "NonFiniteGuard",
    "OrthogonalGradient",
    "RankAdaptation",
    "SVDModeSwitch",
    "SoftmaxCollapse",
    "SpectralCallback",
    "SpectralHealth",
    "SpectralMonitor",
    "SpectralTrainerCallback",
    "TargetProgress",
    "Throughput",
    "UpdateBound",
    "analyze_layer",
    "auto_calibrate",
    "compute_condition_number",
    "compute_spectral_health",
    "compute_stable_rank",
    "compute_stable_rank_ratio",
    "legacy_assr",
    "print_spectral_report",
]


def __getattr__(name: str) -> Any:
    """Import what needs `transformers` only when it is asked for."""
    if name == "SpectralTrainerCallback":
        from spectral_lightning.callbacks.transformers_trainer import SpectralTrainerCallback

        return SpectralTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
