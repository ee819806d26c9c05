"""Rank adaptation: low-rank layers whose rank follows what they need, up and down.

Lives here: hooks. Does not live here: the decision (`control`), the resize and the growth probes
(`actuators`), what is kept of a layer (`rank_layer`), what is told (`rank_log`).
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from spectral_lightning.actuators import (
    GrowthProbe,
    Moments,
    add_frobenius_decay_,
    follow_gates_,
)
from spectral_lightning.callbacks.base import SpectralCallback, other_callbacks, shared_layers
from spectral_lightning.callbacks.rank_average import averages_of
from spectral_lightning.callbacks.rank_checks import check_settings, refuse_overlap
from spectral_lightning.callbacks.rank_layer import RankLayer, Shrink
from spectral_lightning.callbacks.rank_log import RankLog
from spectral_lightning.callbacks.rank_reading import (
    optimizer_of,
    read_layers,
)
from spectral_lightning.callbacks.rank_resizing import RankResizing
from spectral_lightning.control import (
    EnergyController,
    RankController,
)
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.spectra import RankSettings, is_due


class RankAdaptation(SpectralCallback):
    """Let the rank of each `LowRankLinear` follow what it needs, while it trains.

    Every `every_n_steps` optimizer steps the layers that the controller finds due are measured: the
    exact spectrum of ``U V`` from its thin factors, weighted by the layer's inputs, and the growth
    lift, how persistently the gradient asks for what the factors cannot follow. A layer then keeps
    its best components, which fade over or are cut, or gets new ones that begin without effect. The
    optimizer's running means follow; parameters, their shapes and the optimizer stay the same
    objects, so that nothing else in the run notices.

    Ranks live in the layers' buffers and thus in checkpoints. Events go to ``rank_events.jsonl`` in
    the logger's folder and the numbers to the loggers under ``rank/<measure>/<layer>``.

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*"``; of what it selects,
            low-rank layers take part.
        controller: When to change which rank; None for ``EnergyController()``.
        every_n_steps: Optimizer steps between two checks, at least 1; the controller may wait
            longer. 100 is the shortest interval of its clock.
        shrink: ``"fade"``: what goes is turned down over `fade_steps`, while the rest learns to do
            without. ``"cut"``: it goes at once.
        fade_steps: Optimizer steps that fading takes, at least 1. Set by hand.
        moments: What becomes of the optimizer's running means when ranks change: ``"carry"``,
            ``"carry_second"`` (first moments begin at zero) or ``"reset"``.
        weigh_outputs: Whether components are counted by how much they make the layer's outputs
            vary, and dropped such that those change least, which takes the inputs of one optimizer
            step. If not, and in layers of ``mode="masked"``, where watching inputs would make
            `torch.compile` start anew, by what they add to the weight.
        probes: Unused components that measure the growth lift; 0 for none. Set by hand.
        probe_steps: Optimizer steps over which they do, before each check, at least 2. Set by hand.
        frobenius_decay: Strength of ``strength / 2 ||U V||_F^2`` in the gradient, in place of an
            optimizer's weight decay, which favours low rank by itself.
        print_table: Whether to print the ranks by type of layer at the end of fit.

    Raises:
        TypeError: If `controller` is no rank controller.
        ValueError: If an argument is outside its range.

    References:
        Wang et al. (2024), "SVD-LLM", sec. 3.1 (components judged by outputs).
        https://arxiv.org/abs/2403.07378 Robert et al. (2025), "LDAdam", sec. 3.2 (moments).
        https://arxiv.org/abs/2410.16103

    Example:
        >>> adaptation = RankAdaptation("model.blocks.*", every_n_steps=100)
        >>> trainer = pl.Trainer(callbacks=[adaptation], logger=False, barebones=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        controller: RankController | None = None,
        every_n_steps: int = 100,
        shrink: Shrink = "fade",
        fade_steps: int = 50,
        moments: Moments = "carry_second",
        weigh_outputs: bool = True,
        probes: int = 8,
        probe_steps: int = 16,
        frobenius_decay: float = 0.0,
        print_table: bool = True,
    ) -> None:
        super().__init__(layers, every_n_steps)
        self.controller = EnergyController() if controller is None else controller
        check_settings(
            self.controller,
            shrink,
            moments,
            fade_steps=fade_steps,
            probes=probes,
            probe_steps=probe_steps,
            frobenius_decay=frobenius_decay,
        )
        self.shrink, self.fade_steps, self.moments = shrink, fade_steps, moments
        self.weigh_outputs = weigh_outputs
        self.probes, self.probe_steps = probes, probe_steps
        self.frobenius_decay = frobenius_decay
        self.print_table = print_table
        self._layers: dict[str, RankLayer] = {}
        self._resizing = RankResizing(shrink, fade_steps, moments)
        self._checked = self._last = 0
        self._saved: dict[str, Any] | None = None
        self._log: RankLog | None = None
        self._handles: list[Any] = []
        self._stride = 1  # optimizer steps per batch, more than one with several optimizers
        self._loss: Tensor | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer by name, once training has begun."""
        return {name: layer.module.rank for name, layer in self._layers.items()}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._layers, self._saved, self._log = {}, None, None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._checked = self._last = trainer.global_step
        self._stride = len(trainer.optimizers)
        others = other_callbacks(self, trainer)
        refuse_overlap(self.names, [o for o in others if isinstance(o, RankAdaptation)])
        targets = [self.spectra.targets[name] for name in self.names]
        self._layers = {
            target.name: RankLayer(
                target,
                optimizer_of(target.module, trainer.optimizers),
                averages=averages_of(trainer, target.module),
            )
            for target in targets
            if isinstance(target.module, LowRankLinear) and target.trainable
        }
        if not self._layers:
            rank_zero_warn(
                "RankAdaptation has no effect: `layers` selects no trainable LowRankLinear; make"
                " some with `spectral_lightning.nn.factorize` before training."
            )
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self._checked = saved["checked"]
            names = shared_layers("RankAdaptation", set(saved["layers"]), set(self._layers))
            for name in names:
                self._layers[name].load_state_dict(saved["layers"][name])
        settings = RankSettings(
            step=trainer.global_step,
            every_n_steps=self.every_n_steps,
            controller=type(self.controller).__name__,
            settings=self.controller.settings,
            resize=str(self._resizing),
            layers={name: layer.size for name, layer in self._layers.items()},
        )
        self._log = RankLog(trainer, settings, self.controller, self._layers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        after = trainer.global_step + self._stride
        if self._handles or not self.weigh_outputs or not self._is_check(after):
            return
        for layer in self._due(after).values():
            if layer.module.mode == "sliced":  # a hook would have the graph of others made anew
                hook = layer.module.register_forward_pre_hook(layer.watch_inputs, with_kwargs=True)
                self._handles.append(hook)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer
        for layer in self._layers.values():
            if layer.optimizer is not optimizer:
                continue
            if layer.probe is not None:
                layer.probe.take_(layer.module)
            if self.frobenius_decay > 0:
                add_frobenius_decay_(layer.module, self.frobenius_decay)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self._is_check(trainer.global_step):
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._loss = loss.detach() * scale
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, faded = trainer.global_step, set[str]()
        self._stride, self._last = max(1, step - self._last), step
        for name, layer in self._layers.items():
            if layer.fade is not None and self._resizing.advance_fade(trainer, layer, step):
                self.spectra.forget(name)
                faded.add(name)
        if self._is_check(step):
            self._check(trainer, step, faded)
            self._checked = step
        self._probe(step)
        for layer in self._layers.values():
            follow_gates_(layer.averages, layer.module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._log is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log.draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._release()
        if self._log is not None:
            self._log.end(trainer, pl_module, print_table=self.print_table)
            self._log = None

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
            "checked": self._checked,
        }
        return {**super().state_dict(), **(own if self._saved is None else self._saved)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = {name: state_dict[name] for name in ("layers", "checked")}

    def _is_check(self, step: int) -> bool:
        return step > self._checked and is_due(self.every_n_steps, step, self._checked)

    def _due(self, step: int) -> dict[str, RankLayer]:
        found = {
            name: layer
            for name, layer in self._layers.items()
            if layer.fade is None and self.controller.is_due(layer.state, step)
        }
        # What is shared is shared by all at once, when nothing fades that is not free yet.
        return {} if self.controller.is_global and len(found) < len(self._layers) else found

    def _check(self, trainer: pl.Trainer, step: int, faded: Collection[str]) -> None:
        """Measure what is due, decide for all at once, and carry it out; the same on all ranks.

        What has just faded has not been watched, and waits for the next check.
        """
        start = time.perf_counter()
        self._unhook()
        due = {name: layer for name, layer in self._due(step).items() if name not in faded}
        if not due or (self.controller.is_global and len(due) < len(self._layers)):
            return
        readings, skipped, loss = read_layers(trainer, step, due, self._loss)
        states = {name: layer.state for name, layer in self._layers.items()}
        decisions = self.controller.update(states, readings)
        kept: dict[str, float] = {}
        is_deferred = False
        for name, decision in list(decisions.items()):
            layer, grows = self._layers[name], decision.rank > readings[name].rank
            if grows and kept and self.controller.is_global and self.shrink == "fade":
                # What it is to grow by is not free before the others have faded: asked again then.
                decisions[name] = decision._replace(rank=readings[name].rank)
                is_deferred = True
                continue
            layer.state = decision.state
            if name in skipped:
                del decisions[name]
                continue
            if decision.rank == readings[name].rank:
                continue
            self.spectra.forget(name)
            share = self._resizing.carry_out(trainer, layer, readings[name], decision.rank)
            if share is not None:
                kept[name] = share
        for layer in due.values():
            layer.moment = None
            layer.end_probe()
            if is_deferred:
                layer.state = replace(layer.state, interval=self.controller.clock.interval)
        if self._log is not None:
            milliseconds = 1e3 * (time.perf_counter() - start)
            self._log.checked(trainer, readings, decisions, kept, loss, milliseconds)
            self._log.skipped(skipped, step)

    def _probe(self, step: int) -> None:
        """Begin the probes of the layers whose next check is near."""
        if not self.probes or not self._is_check(step + self.probe_steps):
            return
        due = self._due(step + self.probe_steps)
        for number, (name, layer) in enumerate(self._layers.items()):
            if name in due and layer.probe is None and layer.module.capacity > layer.module.rank:
                seed = 100_003 * step + number
                layer.probe = GrowthProbe(layer.module, self.probes, seed=seed)

    def _release(self) -> None:
        """Leave nothing behind in the model that only this callback would look after."""
        self._unhook()
        for layer in self._layers.values():
            if layer.probe is not None:
                layer.module.set_probes(0)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
