"""Watch the spectra of all weight matrices: loggers, history, dashboards, a table at the end."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from typing_extensions import override

from spectral_lightning.callbacks.base import SpectralCallback, boards, log_interval, num_batches
from spectral_lightning.dashboards import (
    MEASURES,
    worst_layers_table,
    write_heat_map,
    write_histograms,
    write_layout,
)
from spectral_lightning.spectra import HeatMapMeasure, HistoryWriter, Reading, is_due

_NUM_NAMED = 3  # layers that a warning names


class SpectralMonitor(SpectralCallback):
    """Measure every weight matrix at every optimizer step, and show what happens to them.

    Per layer: spectral norm with an interval that holds the true value, stable rank (raw, and
    relative to a Gaussian matrix of the same shape), Frobenius norm; at the slower cadence the
    exact spectrum with condition number (raw and relative likewise) and effective rank. The run
    itself is not changed: losses and weights are bitwise those of a run without the monitor.

    Values go to all loggers of the Trainer every `log_every_n_steps` under
    ``spectral/<measure>/<layer>``, their minimum, median and maximum over the layers under
    ``spectral/<measure>/{min,median,max}``; the latter also to `trainer.callback_metrics` (for
    `EarlyStopping`), as often, and there one optimizer step late. TensorBoard gets a Custom
    Scalars layout, histograms of the singular values, and after each validation and at the end a
    heat map of layers by steps. The same readings stand in ``spectral_history.jsonl`` beside the
    logs (`read_history`).

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*.mlp.*"``.
        every_n_steps: Optimizer steps between two readings, at least 1.
        spectrum_every_n_steps: Optimizer steps between two exact spectra; None for never.
        log_every_n_steps: Optimizer steps between two entries in loggers and history; None takes
            the Trainer's `log_every_n_steps`.
        embeddings: Whether embedding tables are measured too.
        splits: Fused projections to take apart: glob to ``{part: number of output rows}``, e.g.
            ``{"*.c_attn": {"q": 768, "k": 768, "v": 768}}``.
        table_rows: Layers in the table printed at the end of fit; 0 for no table.
        heat_map: What the heat map in TensorBoard shows of each reading.

    Raises:
        ValueError: If an interval is below 1, `table_rows` is negative or `heat_map` is unknown.

    Example:
        >>> monitor = SpectralMonitor(layers="*.mlp.*", every_n_steps=10)
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False, barebones=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        every_n_steps: int = 1,
        spectrum_every_n_steps: int | None = 100,
        log_every_n_steps: int | None = None,
        embeddings: bool = False,
        splits: dict[str, dict[str, int]] | None = None,
        table_rows: int = 10,
        heat_map: HeatMapMeasure = "relative_stable_rank",
    ) -> None:
        super().__init__(layers, every_n_steps, spectrum_every_n_steps, embeddings, splits)
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"`log_every_n_steps` must be >= 1, got {log_every_n_steps}.")
        if table_rows < 0:
            raise ValueError(f"`table_rows` must be >= 0, got {table_rows}.")
        if heat_map not in (allowed := get_args(HeatMapMeasure)):
            raise ValueError(f"`heat_map` must be one of {', '.join(allowed)}, got {heat_map!r}.")
        self.log_every_n_steps = log_every_n_steps
        self.table_rows = table_rows
        self.heat_map = heat_map
        self._history: HistoryWriter | None = None
        self._failed: set[str] = set()
        self._measured: set[str] = set()
        self._logged: int | None = None
        self._announced = False  # whether `callback_metrics` have the aggregates yet
        self._x: dict[int, int] = {}  # optimizer steps not yet acted on, on the loggers' axis

    @property
    def readings(self) -> Mapping[str, Reading]:
        """Latest reading of each layer by name; complete once `fit` has ended."""
        return {name: self.spectra[name] for name in self.names if name in self.spectra}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._failed, self._measured = set(), set()
            self._logged, self._announced = None, False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The weights of now are those after the last batch; loggers count batches from 0.
        self._x = {trainer.global_step: num_batches(trainer) - 1}
        log_dir = trainer.log_dir  # asks all ranks
        if not trainer.is_global_zero:
            return
        if trainer.loggers and log_dir is not None and not getattr(trainer, "fast_dev_run", False):
            path = Path(log_dir) / "spectral_history.jsonl"
            step = trainer.global_step
            self._history = HistoryWriter(path, step=step, heat_map=self.heat_map)
        measures = [m for m in MEASURES if self.spectrum_every_n_steps or m not in _SLOW]
        for board in boards(trainer):
            write_layout(board, self.names, measures)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._x.setdefault(trainer.global_step, num_batches(trainer))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_readings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self._x = {s: x for s, x in self._x.items() if s >= step}
        self._warn_of_failures(step)
        is_logged = self._is_logged(trainer, step)
        if is_logged:
            self._log(trainer, step)
        if (is_logged or not self._announced) and not getattr(trainer, "barebones", False):
            for name, value in _aggregates(self.readings.values()).items():
                pl_module.log(name, value, logger=False, rank_zero_only=False)
                self._announced = True

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        step = self.spectra.delivered_step
        if step is not None:
            self._warn_of_failures(step)
            if step != self._logged:
                self._log(trainer, step)
        self._draw(trainer)
        self._close()
        if self.table_rows and trainer.is_global_zero:
            readings = list(self.readings.values())
            Console(file=sys.stdout).print(worst_layers_table(readings, self.table_rows))

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._history is not None:  # no gap in the history of a run resumed from here
            self._history.flush()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "logged": self._logged,
            "failed": sorted(self._failed),
            "measured": sorted(self._measured),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._logged = state_dict["logged"]
        self._failed = set(state_dict["failed"])
        self._measured = set(state_dict["measured"])

    def _is_logged(self, trainer: pl.Trainer, step: int) -> bool:
        intervals = (log_interval(trainer, self.log_every_n_steps), self.spectrum_every_n_steps)
        return self._logged is None or any(is_due(n, step, self._logged) for n in intervals)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        """Write the delivered readings to the history, loggers and TensorBoard."""
        self._logged = step
        readings = [r for r in self.readings.values() if r.step == step]
        if self._history is not None:
            self._history.append(readings)
        x = self._x.get(step, step - 1)
        if x < 0:
            return  # the initial weights stand before the first batch on the loggers' axis
        values = {**_scalars(readings), **_aggregates(readings)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=x)
        spectra = {r.name: r.values for r in readings if r.spectrum_step == step}
        for board in boards(trainer) if spectra else ():
            write_histograms(board, spectra, step=x)

    def _warn_of_failures(self, step: int) -> None:
        """Warn once of each layer that could not be measured; one that starts at zero is usual."""
        failures = self.spectra.failures
        fresh = [
            name
            for name in self.names
            if name in failures
            and name not in self._failed
            and (name in self._measured or self.spectra[name].frobenius_norm != 0)
        ]
        self._measured.update(name for name in self.names if name not in failures)
        if fresh:
            self._failed.update(fresh)
            more = f" and {len(fresh) - _NUM_NAMED} more" if len(fresh) > _NUM_NAMED else ""
            rank_zero_warn(
                f"SpectralMonitor could not measure {', '.join(fresh[:_NUM_NAMED])}{more} at step"
                f" {step}: {failures[fresh[0]]}. Training goes on; the readings carry `failure`."
            )

    def _draw(self, trainer: pl.Trainer) -> None:
        if self._history is None:
            return
        grid = self._history.timeline.grid()
        for board in boards(trainer):
            x = max(0, *self._x.values())
            write_heat_map(board, grid.names, grid.steps, grid.rows, step=x, measure=self.heat_map)

    def _close(self) -> None:
        if self._history is not None:
            self._history.close()
            self._history = None


_SLOW = ("condition_number", "relative_condition_number", "effective_rank")


def _fresh(reading: Reading) -> dict[str, float]:
    """What was measured of a layer at the reading's own step; nothing if that failed."""
    if reading.failure is not None:
        return {}
    measures = [m for m in MEASURES if m not in _SLOW or reading.spectrum_step == reading.step]
    values = {measure: getattr(reading, measure) for measure in measures}
    return {measure: value for measure, value in values.items() if value is not None}


def _scalars(readings: Iterable[Reading]) -> dict[str, float]:
    """Per-layer values for loggers."""
    values: dict[str, float] = {}
    for reading in readings:
        for measure, value in _fresh(reading).items():
            values[f"spectral/{measure}/{reading.name}"] = value
        if reading.failure is None:
            low, high = reading.spectral_norm_interval
            values[f"spectral/spectral_norm_low/{reading.name}"] = low
            values[f"spectral/spectral_norm_high/{reading.name}"] = high
    return values


def _aggregates(readings: Iterable[Reading]) -> dict[str, float]:
    """Smallest, median and largest value over the layers, for each measure."""
    values: dict[str, list[float]] = defaultdict(list)
    for reading in readings:
        for measure, value in _fresh(reading).items():
            values[measure].append(value)
    found: dict[str, float] = {}
    for measure, all_layers in values.items():
        found[f"spectral/{measure}/min"] = min(all_layers)
        found[f"spectral/{measure}/median"] = statistics.median(all_layers)
        found[f"spectral/{measure}/max"] = max(all_layers)
    return found
