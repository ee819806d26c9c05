"""ASSR: a thermostat that keeps the spectrum of every weight matrix in its healthy range."""

import sys
from dataclasses import replace
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from spectral_lightning.callbacks.assr_layer import (
    Counts,
    Layer,
    check_kinds,
    has_failed,
    kept_waiting,
    sampled,
    sensors,
    why_left_alone,
)
from spectral_lightning.callbacks.assr_messages import Messages, what_is_odd
from spectral_lightning.callbacks.assr_steps import Actuator, Stepper
from spectral_lightning.callbacks.base import (
    SpectralCallback,
    log_interval,
    num_batches,
    shared_layers,
)
from spectral_lightning.callbacks.step_sizes import StepSizes
from spectral_lightning.control import Regulator, ThermostatVerdict
from spectral_lightning.dashboards import Interventions, interventions_scalars, interventions_table
from spectral_lightning.spectra import Target, is_due


class ASSR(SpectralCallback):
    """Keep stable rank and condition number of every layer inside their bands while training.

    At every optimizer step each layer's stable rank (and at the slower cadence its condition
    number, without its smallest tenth of values) is compared with the layer's own band. Where it
    has left it, the actuator moves the weight back, after the optimizer's step and apart from it:
    nothing enters loss or gradients, nothing is done where the optimizer took no step, and a step
    takes ``min(1, lr * strength)`` of what is missing, at most `max_relative_step` of the weight's
    norm. Layers inside their bands are not touched: the run is then bitwise the run without ASSR.

    Readings come from the Trainer's shared cache, as those of a `SpectralMonitor` beside it. They
    are acted on one optimizer step later, by rules that give the same on all ranks; nothing waits
    for the device but the exact spectra. Values go to the loggers under
    ``assr/<measure>/<layer>``.

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*.mlp.*"``.
        actuator: ``"log_stable_rank"`` climbs the gradient of the stable rank, and can lower it
            too; ``"spectral_cap"`` lowers only the singular values that are too large;
            ``"legacy_l2"`` shrinks the whole weight as ASSR v1.5 did, which moves neither reading.
            The default is what did best in scripts/assr_stress.py.
        regulator: Bands, their calibration, and the thermostat; None for ``Regulator()``.
        max_relative_step: Largest ``||step||_F / ||W||_F`` of one step, in (0, 1]; with the default
            a spike of 10 times the spectral norm is gone within 200 steps
            (scripts/assr_healing.py).
        num_vectors: Singular directions that a step acts on, at least 1; computed only in layers
            that are acted on. Set by hand (`--num_vectors` of scripts/assr_stress.py tries others).
        sample_ratio: Fraction of the layers looked at in a step, in (0, 1]. Less than 1 saves
            nothing, as all are measured; drawn privately, the same on all ranks.
        every_n_steps: Optimizer steps between two readings, at least 1.
        spectrum_every_n_steps: Optimizer steps between two exact spectra, which the condition
            number needs; None for no condition number.
        log_every_n_steps: Optimizer steps between two entries in loggers; None takes the Trainer's.
        embeddings: Whether embedding tables take part.
        splits: Fused projections to take apart: glob to ``{part: number of output rows}``.
        table_rows: Layers in the table printed at the end of fit; 0 for no table.

    Raises:
        TypeError: If `layers` are no globs, or `regulator` is no `Regulator`.
        ValueError: If an argument is out of its range, or the actuator cannot do what the bands
            ask for.

    References:
        ASSR v1.5, "auto-calibrated stochastic spectral regularization", whose promise this keeps by
        other means.

    Example:
        >>> assr = ASSR(regulator=Regulator(calibration="static", floor=0.1))
        >>> trainer = pl.Trainer(callbacks=[assr], logger=False, barebones=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        actuator: Actuator = "log_stable_rank",
        regulator: Regulator | None = None,
        max_relative_step: float = 0.05,
        num_vectors: int = 8,
        sample_ratio: float = 1.0,
        every_n_steps: int = 1,
        spectrum_every_n_steps: int | None = 100,
        log_every_n_steps: int | None = None,
        embeddings: bool = False,
        splits: dict[str, dict[str, int]] | None = None,
        table_rows: int = 10,
    ) -> None:
        super().__init__(layers, every_n_steps, spectrum_every_n_steps, embeddings, splits)
        self.actuator = actuator
        self.regulator = Regulator() if regulator is None else regulator
        self.max_relative_step = max_relative_step
        self.num_vectors = num_vectors
        self.sample_ratio = sample_ratio
        self.log_every_n_steps = log_every_n_steps
        self.table_rows = table_rows
        self._check()
        # The other actuators cannot lower a stable rank.
        two_sided = self.regulator.two_sided and actuator == "log_stable_rank"
        self._rule = replace(self.regulator, two_sided=two_sided)
        self._layers: dict[str, Layer] = {}
        self._idle: dict[str, Target] = {}
        self._saved: dict[str, Any] | None = None
        self._sizes = StepSizes()
        hysteresis = self.regulator.thermostat.hysteresis
        self._stepper = Stepper(actuator, num_vectors, max_relative_step, hysteresis)
        self._counts = Counts()
        self._messages = Messages()
        self._logged = 0

    def _check(self) -> None:
        check_kinds(self.layers, self.regulator)
        if self.actuator not in get_args(Actuator):
            raise ValueError(
                f"`actuator` must be one of {', '.join(get_args(Actuator))}, got {self.actuator!r}."
            )
        if self.actuator != "log_stable_rank" and self.regulator.ceiling is not None:
            raise ValueError(
                "`ceiling` needs an actuator that can lower the stable rank, got"
                f" {self.actuator!r}; take 'log_stable_rank' or leave the ceiling out."
            )
        if self.spectrum_every_n_steps is None and self.regulator.condition_ceiling is not None:
            raise ValueError(
                "`condition_ceiling` needs exact spectra, got `spectrum_every_n_steps` None; give"
                " an interval such as 100."
            )
        for name in ("max_relative_step", "sample_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {getattr(self, name)}.")
        for name, least in {"num_vectors": 1, "table_rows": 0, "log_every_n_steps": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}.")

    @property
    def interventions(self) -> dict[str, Interventions]:
        """What has been done to each layer so far; waits for the device."""
        return {name: layer.interventions() for name, layer in self._layers.items()}

    @property
    def assr_stats(self) -> dict[str, float]:
        """Counts of this fit, under the names of ASSR v1.5."""
        return self._counts.as_v15()

    def get_assr_summary(self) -> dict[str, Any]:
        """Summary of this fit, under the names of ASSR v1.5."""
        return self._counts.summary(num_layers=len(self._layers), config=self.regulator)

    def reset_assr_stats(self) -> None:
        """Set the counts to 0."""
        self._counts = Counts()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._layers, self._saved, self._messages = {}, None, Messages()
            self.reset_assr_stats()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._logged = trainer.global_step
        self._sizes.watch(trainer.optimizers)
        self._layers, self._idle = {}, {}
        for name in self.names:
            target = self.spectra.targets[name]
            reason = why_left_alone(target, self._sizes)
            if reason is None:
                self._layers[name] = Layer(target)
            else:
                self._idle[name] = target
                rank_zero_info(f"ASSR: {name} is measured but left alone, since it {reason}.")
        self._messages.begin(self._layers)
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None

    @override
    def on_readings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self._take_up()
        waiting = [layer for layer in self._layers.values() if layer.state.bands is None]
        spectrum_is_due = is_due(self.spectrum_every_n_steps, step, self._acted)
        odd: dict[str, list[str]] = {}
        for name in sampled(self._layers, self.sample_ratio, step):
            layer, reading = self._layers[name], self.spectra[name]
            layer.reading = reading
            seen = sensors(reading, spectrum_is_due=spectrum_is_due)
            layer.state, verdict = self._rule.update(layer.state, step, seen)
            layer.verdict = kept_waiting(layer.verdict, verdict)
            layer.num_skipped += has_failed(reading)
            if (what := what_is_odd(layer, reading)) is not None:
                odd.setdefault(what, []).append(name)
        self._messages.odd(odd, step)
        new = [layer for layer in waiting if layer.state.bands is not None]
        still = [layer for layer in waiting if layer.state.bands is None and layer.is_readable]
        if new and not still:
            self._messages.calibrated(self._layers, step)

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        acted = False
        for layer in self._layers.values():
            if layer.verdict is None or not layer.is_outside:
                self.spectra.vectors.forget(layer.target.name)  # soon stale
                continue
            parameter = layer.target.parameter
            rate = None if parameter is None else self._sizes.of(parameter)
            if rate is not None:
                acted |= self._act(layer, rate)
        self._counts.steps += 1
        self._counts.steps_acted += acted
        self._sizes.clear()
        if is_due(log_interval(trainer, self.log_every_n_steps), trainer.global_step, self._logged):
            self._logged = trainer.global_step
            self._log(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._sizes.close()
        if not getattr(trainer, "fast_dev_run", False):
            self._messages.end(self._layers, self.regulator)
        if self.table_rows and trainer.is_global_zero and self._layers:
            table = interventions_table(list(self.interventions.values()), self.table_rows)
            Console(file=sys.stdout).print(table)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._sizes.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
            "counts": self._counts.state_dict(),
            "said": sorted(self._messages.said),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = state_dict

    def _restore(self, saved: dict[str, Any]) -> None:
        known = shared_layers("ASSR", set(saved["layers"]), set(self.names))
        for name in known & set(self._layers):
            layer = self._layers[name]
            layer.load_state_dict(saved["layers"][name])
            layer.state = self._rule.adopted(layer.state)
            layer.verdict = layer.verdict if layer.state.bands else None
        self._counts.load_state_dict(saved["counts"])
        self._messages.said = set(saved["said"])

    def _take_up(self) -> None:
        """Regulate layers that are trained from now on, such as those just unfrozen."""
        for name, target in list(self._idle.items()):
            if why_left_alone(target, self._sizes) is None:
                self._layers[name] = Layer(self._idle.pop(name))
                rank_zero_info(f"ASSR: {name} is trained from now on, and regulated.")

    def _act(self, layer: Layer, rate: float | Tensor) -> bool:
        """Carry out the verdict on a layer; whether a step was taken."""
        assert layer.verdict is not None
        vectors, acted = self.spectra.vectors, False
        if layer.verdict.stable_rank is not ThermostatVerdict.NOT_FINITE:
            acted = self._stepper.against_stable_rank(layer, vectors, rate)
            self._counts.rank += acted
        if layer.verdict.condition_number is not None:
            layer.verdict = layer.verdict._replace(condition_number=None)  # once per spectrum
            interval = self.spectrum_every_n_steps or 1
            if self._stepper.against_condition_number(layer, vectors, rate, interval):
                self._counts.condition += 1
                acted = True
        return acted

    def _log(self, trainer: pl.Trainer) -> None:
        """Write what is done to each layer to the loggers."""
        if not trainer.loggers or not self._layers:
            return
        values: dict[str, float] = {"assr/steps_acted": self._counts.steps_acted}
        values |= interventions_scalars(self.interventions.values())
        for logger in trainer.loggers:
            logger.log_metrics(values, step=num_batches(trainer))
