"""Mode switching: principal directions that updates erode are protected until the danger is over.

Lives here: hooks. Does not live here: what is measured (`spectra.mode_measures`), the decision
(`control`), the protection (`actuators.protection`), what is kept of a layer (`svd_mode_layer`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from spectral_lightning.actuators import ProtectedPart
from spectral_lightning.callbacks.base import SpectralCallback, shared_layers
from spectral_lightning.callbacks.svd_mode_checks import (
    check_settings,
    refuse_overlap,
    refuse_thawed,
)
from spectral_lightning.callbacks.svd_mode_factored import FACTORED, Protection, layer_of
from spectral_lightning.callbacks.svd_mode_layer import (
    NOT_FINITE,
    SMALLEST_SIZE,
    ModeLayer,
)
from spectral_lightning.callbacks.svd_mode_log import ModeLog
from spectral_lightning.control import CalibratedPolicy, ModePolicy, ModeState
from spectral_lightning.nn import factorize
from spectral_lightning.spectra import (
    Condition,
    LayerAnalysis,
    ModeSettings,
    SingularTriplets,
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
    the gradient before the optimizer's step (before clipping), out of the momentum once, and put
    back into the weight after the step, whatever the optimizer does. The weight stays one dense
    parameter of the same shape, so a switch changes no function, no graph and no optimizer, and
    checkpoints load into the plain model.

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
            if self.protection in FACTORED:
                targets = find_targets(pl_module, self.layers, splits=self.splits).targets
                modules = {target.module for target in targets if target.rows is None}
                factorize(pl_module, modules)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        refuse_overlap(self.names, [c.names for c in _others(self, trainer)])
        self._layers, self._frozen = {}, {}
        for name in self.names:
            target = self.spectra.targets[name]
            found = layer_of(target, trainer.optimizers, self.protection, trainer.global_step)
            if isinstance(found, ModeLayer):
                self._layers[name] = found
                continue
            if not target.trainable:
                self._frozen[name] = target
            rank_zero_info(f"SVDModeSwitch: {name} always trains as it is, since it {found}.")
        if not self._layers:
            rank_zero_warn(
                "SVDModeSwitch has no effect: no optimizer trains a layer that `layers` selects and"
                f" that is at least {SMALLEST_SIZE} x {SMALLEST_SIZE}."
            )
        if self._saved is not None:
            saved, self._saved = self._saved["layers"], None
            for name in shared_layers("SVDModeSwitch", set(saved), set(self._layers)):
                self._layers[name].load_state_dict(saved[name])
        self._log = ModeLog(trainer, self._settings(trainer.global_step))

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
            self._loss = float(loss) if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer in self._layers.values():
            layer.after_step()
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

    @override
    def state_dict(self) -> dict[str, Any]:
        layers = {name: layer.state_dict() for name, layer in self._layers.items()}
        return {**super().state_dict(), "layers": layers}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = state_dict

    def _begin(self, due: Sequence[ModeLayer], step: int) -> None:
        """Analyse weights and gradients; two copies to the host for all layers together."""
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

        def share(triplets: SingularTriplets) -> SingularTriplets:
            """Decompositions may differ in their last digits from rank to rank."""
            if trainer.world_size == 1:
                return triplets
            found = trainer.strategy.broadcast([part.cpu() for part in triplets])
            device = triplets.values.device
            return SingularTriplets(*(part.to(device) for part in found))

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
            analyses.append(layer.decide(self.policy, self._loss, refresh=self.refresh))
            if self.refresh or analyses[-1].switches:
                layer.protect(self.spectra.vectors, share)
            layer.end(self.policy)
        if self._log is not None:
            self._log.analysed(trainer, analyses)

    def _skip(self, layer: ModeLayer, step: int, reason: str) -> None:
        layer.num_skipped += 1
        if self._log is not None:
            self._log.skipped(layer.target.name, step, reason)

    def _settings(self, step: int) -> ModeSettings:
        return ModeSettings(
            step=step,
            every_n_steps=self.every_n_steps,
            policy=type(self.policy).__name__,
            protection=self.protection,
            conditions=tuple(Condition(*condition) for condition in self.policy.conditions),
        )


def _others(own: SVDModeSwitch, trainer: pl.Trainer) -> list[SVDModeSwitch]:
    """The other instances in a Trainer."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, SVDModeSwitch) and c is not own]
