"""Mode switching: principal directions that updates erode are protected until the danger is over.

Lives here: hooks. Does not live here: what is measured (`spectra.mode_measures`), the decision
(`control`), the protection (`actuators.protection`), what is kept of a layer (`svd_mode_layer`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.actuators import ProtectedPart
from spectral_lightning.callbacks.base import SpectralCallback, other_callbacks, shared_layers
from spectral_lightning.callbacks.svd_mode_checks import (
    check_settings,
    refuse_overlap,
    refuse_thawed,
    require_protection,
    warn_of_writers,
)
from spectral_lightning.callbacks.svd_mode_factored import (
    FACTORED,
    Protection,
    layers_of,
    of_rank_zero,
)
from spectral_lightning.callbacks.svd_mode_layer import (
    NOT_FINITE,
    SMALLEST_SIZE,
    ModeLayer,
)
from spectral_lightning.callbacks.svd_mode_log import ModeLog
from spectral_lightning.control import CalibratedPolicy, ModePolicy, ModeState
from spectral_lightning.nn import add_factors
from spectral_lightning.spectra import (
    LayerAnalysis,
    Target,
    find_targets,
    is_due,
)
from spectral_lightning.spectra.mode_measures import on_host, vectors_on_host


class SVDModeSwitch(SpectralCallback):
    """Protect what a layer has learned while updates erode it, and let it train freely otherwise.

    Every `every_n_steps` optimizer steps each layer's weight, gradient and applied update are
    analysed, and the policy chooses its mode. In *full* mode the layer trains as without this
    callback, to the bit. In *low-rank* mode its principal part stays as it is: it is taken out of
    the gradient before the optimizer's step (before clipping), out of the momentum at each switch,
    and put back into the weight at the end of the step, whatever the optimizer does. The weight
    stays one dense parameter of the same shape, so a switch changes no function, no graph and no
    optimizer, and checkpoints load into the plain model. Only the two protections by factors add
    parameters, and leave by `FactoredLinear.to_linear`.

    Events go to ``svd_mode.jsonl`` in the logger's folder (`spectral watch` reads it) and the
    numbers to the loggers under ``svd/<measure>/<layer>``.

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*.attn.*"``.
        every_n_steps: Optimizer steps between two analyses of a layer, at least 1; 20 as in the
            original's runs.
        policy: When to switch; None for ``CalibratedPolicy()``.
        protection: What low-rank mode keeps. ``"gradients"``: what the layer makes of the inputs
            that its gradients read most while it was in full mode; the default for what it did in
            scripts/svd_retention.py. Of the weight's own singular directions, ``"block"``: how the
            principal inputs reach the principal outputs, ``"left"``: all that reaches the principal
            outputs, ``"right"``: all that reads the principal inputs, ``"two_sided"``: both.
            ``"factored"`` and ``"legacy"`` make each linear layer a `FactoredLinear` before the
            optimizer is built, and train two factors in low-rank mode: kept out of the principal
            subspaces, or, as in the original, not, which protects nothing.
        refresh: Whether the principal directions, and how many they are, are chosen anew from the
            weight at each analysis in low-rank mode. If not, those of the switch stay protected
            until the layer returns to full mode.
        embeddings: Whether embedding tables take part.
        splits: Fused projections to take apart: glob to ``{part: number of output rows}``.

    Raises:
        TypeError: If `policy` is no policy.
        ValueError: If `every_n_steps` is below 1 or `protection` is unknown.

    References:
        MiLoRA (Wang et al. 2024, https://arxiv.org/abs/2406.09044) trains minor directions only;
        OSFT (Nayak et al. 2025, https://arxiv.org/abs/2504.07097) projects gradients away from
        principal ones.

    Example:
        >>> switch = SVDModeSwitch("model.blocks.*.attn.*", every_n_steps=20)
        >>> trainer = pl.Trainer(callbacks=[switch], logger=False, barebones=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        every_n_steps: int = 20,
        policy: ModePolicy | None = None,
        protection: Protection = "gradients",
        refresh: bool = True,
        embeddings: bool = False,
        splits: dict[str, dict[str, int]] | None = None,
    ) -> None:
        super().__init__(layers, every_n_steps, None, embeddings, splits)
        self.policy = CalibratedPolicy() if policy is None else policy
        check_settings(self.policy, protection)
        self.protection = protection
        self.refresh = refresh
        self._layers: dict[str, ModeLayer] = {}
        self._frozen: dict[str, Target] = {}
        self._saved: dict[str, Any] | None = None
        self._log: ModeLog | None = None
        self._loss: float | None = None
        self._handles: list[Any] = []

    @property
    def modes(self) -> dict[str, ModeState]:
        """Mode and rank of each layer by name, once training has begun."""
        return {name: layer.state for name, layer in self._layers.items()}

    @property
    def parts(self) -> dict[str, ProtectedPart]:
        """Protected parts of the layers that are in low-rank mode, by name."""
        return {n: layer.part for n, layer in self._layers.items() if layer.part is not None}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._layers, self._saved, self._log = {}, None, None
        if self.protection in FACTORED:  # also to evaluate a checkpoint
            targets = find_targets(pl_module, self.layers, splits=self.splits).targets
            modules = {target.module for target in targets if target.rows is None}
            add_factors(pl_module, modules)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        others = other_callbacks(self, trainer)
        switches = [other for other in others if isinstance(other, SVDModeSwitch)]
        targets = self.spectra.targets
        refuse_overlap(
            [targets[name] for name in self.names],
            [targets[name] for switch in switches for name in switch.names],
        )
        warn_of_writers(self.names, [other for other in others if other not in switches])
        step, found = trainer.global_step, {name: targets[name] for name in self.names}
        self._layers = layers_of(found, trainer.optimizers, self.protection, step)
        self._frozen = {name: target for name, target in found.items() if not target.trainable}
        if not self._layers:
            rank_zero_warn(
                "SVDModeSwitch has no effect: no optimizer trains a layer that `layers` selects and"
                f" that is at least {SMALLEST_SIZE} x {SMALLEST_SIZE}."
            )
        if self._saved is not None:
            require_protection(self._saved["protection"], self.protection)
            saved, self._saved = self._saved["layers"], None
            for name in shared_layers("SVDModeSwitch", set(saved), set(self._layers)):
                self._layers[name].load_state_dict(saved[name])
        for layer in self._layers.values():
            layer.refresh = self.refresh
            layer.begin_fit()
        self._watch(trainer.optimizers)
        self._log = ModeLog(trainer, self.every_n_steps, self.policy, self.protection)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        refuse_thawed(trainer.model, self._frozen)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer
        step = trainer.global_step
        stepped = [
            layer
            for layer in self._layers.values()
            if layer.optimizer is optimizer and layer.parameter.grad is not None
        ]
        due = [layer for layer in stepped if is_due(self.every_n_steps, step, layer.analysed)]
        if due:
            self._begin(due, step)
        for layer in stepped:
            layer.before_step()

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
        if any(layer.analysis is not None for layer in self._layers.values()):
            # Lightning has divided the loss of each micro-batch by their number.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._loss = float(loss) * scale if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pending = [layer for layer in self._layers.values() if layer.analysis is not None]
        if pending:
            self._finish(trainer, pending)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._log is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log.draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._log is not None:
            self._log.draw(trainer)
            self._log = None
        self._watch([])

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._watch([])

    @override
    def state_dict(self) -> dict[str, Any]:
        layers = {name: layer.state_dict() for name, layer in self._layers.items()}
        if self._saved is not None:  # loaded, and not yet taken up
            layers = self._saved["layers"]
        return {**super().state_dict(), "layers": layers, "protection": self.protection}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = state_dict

    def _watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow the steps of some optimizers, and of no others."""
        for handle in self._handles:
            handle.remove()
        self._handles = [o.register_step_post_hook(self._stepped) for o in optimizers]

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Put protected parts back before anybody sees the weights; not if a scaler skips."""
        for layer in self._layers.values():
            if layer.optimizer is optimizer:
                layer.after_step()

    def _begin(self, due: Sequence[ModeLayer], step: int) -> None:
        """Analyse weights and gradients; their numbers come to the host for all together."""
        heads: list[Tensor] = []
        begun: list[ModeLayer] = []
        for layer in due:
            layer.analysed = step
            head = layer.begin(step, self.spectra.vectors, self.policy)
            if head is None:
                self._skip(layer, step, NOT_FINITE)
            else:
                begun.append(layer)
                heads.append(head)
        measures = [
            layer.measure_intent(numbers, self.policy)
            for layer, numbers in zip(begun, vectors_on_host(heads), strict=True)
        ]
        for layer, numbers in zip(begun, on_host(measures), strict=True):
            assert layer.analysis is not None
            layer.analysis.numbers = numbers

    def _finish(self, trainer: pl.Trainer, pending: Sequence[ModeLayer]) -> None:
        """Measure what the step did, decide, and carry it out; the same on all ranks."""
        effects = on_host([layer.measure_effect() for layer in pending])
        analyses: list[LayerAnalysis] = []
        for layer, effect in zip(pending, effects, strict=True):
            assert layer.analysis is not None
            found = layer.analysis
            found.numbers = {**found.numbers, **effect}
            if trainer.world_size > 1:
                shared = (found.numbers, found.values, found.num_principal, self._loss)
                shared = trainer.strategy.broadcast(shared)
                found.numbers, found.values, found.num_principal, self._loss = shared
            reason = layer.why_not()
            if reason is not None:
                self._skip(layer, found.step, reason)
                layer.analysis = None
                continue
            analyses.append(layer.decide(self.policy, self._loss))
            if self.refresh or analyses[-1].switches:
                layer.protect(self.spectra.vectors, partial(of_rank_zero, trainer))
            layer.end(self.policy)
        if self._log is not None:
            self._log.analysed(trainer, analyses)

    def _skip(self, layer: ModeLayer, step: int, reason: str) -> None:
        layer.num_skipped += 1
        if self._log is not None:
            self._log.skipped(layer.target.name, step, reason)
