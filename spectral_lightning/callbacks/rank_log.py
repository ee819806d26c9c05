"""Where `RankAdaptation` tells what it does: the run's event file, loggers, warnings."""

import sys
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console

from spectral_lightning.callbacks.base import boards, num_batches
from spectral_lightning.callbacks.rank_layer import RankLayer
from spectral_lightning.control import RankController, RankDecision, RankReading
from spectral_lightning.dashboards.rank_figure import write_rank_figure
from spectral_lightning.dashboards.rank_report import rank_table
from spectral_lightning.spectra import (
    RANK_EVENTS_FILE,
    RankCheck,
    RankEvent,
    RankEventWriter,
    RankHistory,
    RankSettings,
    RankSummary,
    SkippedCheck,
    null_product_values,
    read_rank_events,
)


class RankLog:
    """Events of one fit.

    Args:
        trainer: Trainer; the file is written on rank 0 if a logger has a folder.
        settings: How ranks are chosen; the file begins with it.
        controller: Who chooses them.
        layers: The layers that take part.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        settings: RankSettings,
        controller: RankController,
        layers: Mapping[str, RankLayer],
    ) -> None:
        self._controller, self._layers = controller, layers
        self._writer: RankEventWriter | None = None
        self._events: list[RankEvent] = []
        self._warned: set[str] = set()
        self._x = num_batches(trainer)
        log_dir = trainer.log_dir  # asks all ranks
        is_real = trainer.loggers and not getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and is_real and log_dir is not None:
            self._writer = RankEventWriter(Path(log_dir) / RANK_EVENTS_FILE, step=settings.step)
        self._append(settings)

    def checked(
        self,
        trainer: pl.Trainer,
        readings: Mapping[str, RankReading],
        decisions: Mapping[str, RankDecision],
        kept: Mapping[str, float],
        loss: float | None,
        milliseconds: float,
    ) -> None:
        """Write the checks of one step to the file and the loggers."""
        values: dict[str, float] = {}
        null_targets = self._null_targets(readings)
        for name, decision in decisions.items():
            reading = readings[name]
            found = RankCheck(
                step=reading.step,
                layer=name,
                rank=reading.rank,
                next_rank=decision.rank,
                target=decision.target,
                null_target=null_targets.get(name),
                verdict=str(decision.verdict),
                growth=reading.growth,
                stable_rank=_stable_rank(reading),
                energy_kept=kept.get(name),
                loss=loss,
                milliseconds=milliseconds / max(1, len(readings)),
            )
            self._append(found)
            numbers = {
                "rank": float(decision.rank),
                "target": decision.target,
                "null_target": found.null_target,
                "growth": found.growth,
            }
            values |= {f"rank/{m}/{name}": v for m, v in numbers.items() if v is not None}
        self._x = num_batches(trainer)
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=self._x)

    def skipped(self, skipped: Mapping[str, str], step: int) -> None:
        """Write skipped checks to the file, and warn of a layer's first."""
        for name, reason in skipped.items():
            self._append(SkippedCheck(step=step, layer=name, reason=reason))
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"RankAdaptation skips the check of {name} at step {step}: {reason} Its rank"
                    " stays, and further ones are only counted."
                )

    def draw(self, trainer: pl.Trainer) -> None:
        """Write the picture of the run so far to TensorBoard."""
        if self._writer is None:
            return
        for board in boards(trainer):
            write_rank_figure(board, read_rank_events(self._writer.path), step=self._x)

    def end(self, trainer: pl.Trainer, module: pl.LightningModule, *, print_table: bool) -> None:
        """Write how many parameters there are in the end, and the last picture; print the ranks."""
        if not trainer.is_global_zero or not self._layers:
            return
        fading = [name for name, layer in self._layers.items() if layer.fade is not None]
        if fading:
            rank_zero_info(
                f"RankAdaptation ends while components of {len(fading)} layers fade, such as"
                f" {fading[0]}: they count as active. The controller's clock should stop"
                " (`freeze_after`) `fade_steps` before the end."
            )
        modules = [layer.module for layer in self._layers.values()]
        costs = [module.in_features + module.out_features for module in modules]
        factors = {id(f) for m in modules for f in (m.left_factor, m.right_factor)}
        summary = RankSummary(
            step=trainer.global_step,
            num_stored=sum(c * m.capacity for c, m in zip(costs, modules, strict=True)),
            num_active=sum(c * m.rank for c, m in zip(costs, modules, strict=True)),
            num_dense=sum(m.in_features * m.out_features for m in modules),
            num_other=sum(p.numel() for p in module.parameters() if id(p) not in factors),
        )
        self._append(summary)
        self.draw(trainer)
        events = self._events if self._writer is None else read_rank_events(self._writer.path)
        table = rank_table(RankHistory.of(events)) if print_table else None
        if table is not None:
            Console(file=sys.stdout).print(table)

    def _append(self, event: RankEvent) -> None:
        """Keep an event, in the file if there is one."""
        if self._writer is None:
            self._events.append(event)
        else:
            self._writer.append(event)

    def _null_targets(self, readings: Mapping[str, RankReading]) -> dict[str, float]:
        """What the controller would want of untrained random factors of these ranks."""
        nulls = {
            name: RankReading(
                step=reading.step,
                shape=reading.shape,
                rank=reading.rank,
                capacity=reading.capacity,
                values=null_product_values(reading.shape, reading.rank),
            )
            for name, reading in readings.items()
        }
        return self._controller.targets(nulls)


def _stable_rank(reading: RankReading) -> float | None:
    """Stable rank of what the controller saw."""
    energies = [value**2 for value in reading.values]
    return sum(energies) / energies[0] if energies and energies[0] > 0 else None
