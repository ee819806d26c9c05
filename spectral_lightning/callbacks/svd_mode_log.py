"""Where `SVDModeSwitch` tells what it does: the run's event file, loggers, warnings."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from spectral_lightning.callbacks.base import boards, num_batches
from spectral_lightning.control import Mode, ModePolicy
from spectral_lightning.dashboards.mode_figure import write_mode_figure
from spectral_lightning.spectra import (
    MODE_EVENTS_FILE,
    Condition,
    LayerAnalysis,
    ModeEventWriter,
    ModeSettings,
    SkippedAnalysis,
    read_mode_events,
)


class ModeLog:
    """Events of one fit.

    Args:
        trainer: Trainer; the file is written on rank 0 if a logger has a folder.
        every_n_steps: Optimizer steps between two analyses.
        policy: Policy, whose thresholds the file begins with.
        protection: What is protected.
    """

    def __init__(
        self, trainer: pl.Trainer, every_n_steps: int, policy: ModePolicy, protection: str
    ) -> None:
        self._writer: ModeEventWriter | None = None
        self._warned: set[str] = set()
        self._x = num_batches(trainer)
        log_dir = trainer.log_dir  # asks all ranks
        is_real = trainer.loggers and not getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and is_real and log_dir is not None:
            settings = ModeSettings(
                step=trainer.global_step,
                every_n_steps=every_n_steps,
                policy=type(policy).__name__,
                protection=protection,
                conditions=tuple(Condition(*condition) for condition in policy.conditions),
            )
            path = Path(log_dir) / MODE_EVENTS_FILE
            self._writer = ModeEventWriter(path, step=settings.step)
            self._writer.append(settings)

    @property
    def path(self) -> Path | None:
        """The event file; None where there is none."""
        return None if self._writer is None else self._writer.path

    def analysed(self, trainer: pl.Trainer, analyses: Sequence[LayerAnalysis]) -> None:
        """Write the analyses of one step to the file and the loggers."""
        if self._writer is not None:
            self._writer.append(*analyses)
        values: dict[str, float] = {}
        for found in analyses:
            numbers = dict(found.measures)
            numbers["mode"] = float(found.next_mode == Mode.LOW_RANK)
            numbers["rank"] = float(found.next_rank)
            values |= {f"svd/{m}/{found.layer}": v for m, v in numbers.items() if v is not None}
        self._x = num_batches(trainer)
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=self._x)

    def draw(self, trainer: pl.Trainer) -> None:
        """Write the picture of the run so far to TensorBoard."""
        if self._writer is None:
            return
        for board in boards(trainer):
            write_mode_figure(board, read_mode_events(self._writer.path), step=self._x)

    def skipped(self, layer: str, step: int, reason: str) -> None:
        """Write a skipped analysis to the file, and warn of a layer's first."""
        if self._writer is not None:
            self._writer.append(SkippedAnalysis(step=step, layer=layer, reason=reason))
        if layer not in self._warned:
            self._warned.add(layer)
            rank_zero_warn(
                f"SVDModeSwitch skips the analysis of {layer} at step {step}, as {reason}; its mode"
                " stays, and further ones are only counted."
            )
