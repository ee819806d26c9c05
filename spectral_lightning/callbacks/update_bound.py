"""Update bound: no optimizer step moves the weight of a low-rank layer further than allowed.

Lives here: hooks. Does not live here: the bound itself (`actuators`).
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.actuators import bound_update_, copied_factors
from spectral_lightning.callbacks.optimizer_hooks import OptimizerCallback
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.spectra import find_targets


class UpdateBound(OptimizerCallback):
    """Keep what each optimizer step adds to a low-rank weight within a spectral norm.

    The weight ``W = U V`` of a `LowRankLinear` moves by ``dU V + U dV + dU dV``: steps that are
    small in the factors are large in the weight where the factors are large. After each step,
    ``dU`` and ``dV`` are scaled down such that ``||dW||_2 <= max_update_norm``
    (`actuators.bound_update_`); steps that are small enough stay to the bit. The bound is on all
    that the optimizer does to the factors, weight decay included, whatever its kind; its running
    means are not touched. What others do to a weight between the steps, such as a change of rank,
    is not bounded.

    Hooks into the optimizers themselves, so that a step that a gradient scaler skips is none, and
    nothing is kept in checkpoints. Holds a copy of the active factors during each step, whose
    forward and backward pass Lightning makes part of it; never waits for the device but to log.
    Loggers get ``update_bound/scale/<layer>``: the smallest scale since the last entry, 1 if
    nothing was scaled.

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*"``; of what it selects,
            low-rank layers take part.
        max_update_norm: Largest ``||dW||_2`` of one optimizer step, > 0, in the weight's own units.

    Raises:
        ValueError: If `max_update_norm` is outside its range.

    References:
        Janson, Oyallon and Belilovsky (2026), "Stabilizing native low-rank LLM pretraining".
        https://arxiv.org/abs/2602.12429

    Example:
        >>> bound = UpdateBound("model.blocks.*", max_update_norm=0.1)
        >>> trainer = pl.Trainer(callbacks=[bound], logger=False, barebones=False)
    """

    def __init__(self, layers: str | list[str] = "*", *, max_update_norm: float) -> None:
        super().__init__()
        if not (math.isfinite(max_update_norm) and max_update_norm > 0):
            raise ValueError(f"`max_update_norm` must be finite and > 0, got {max_update_norm}.")
        self.layers = layers
        self.max_update_norm = max_update_norm
        self._layers: dict[str, LowRankLinear] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._scales: dict[str, Tensor] = {}
        self._depth = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers whose updates are bounded, once training has begun."""
        return tuple(self._layers)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        targets = find_targets(pl_module, self.layers).targets
        self._layers = {t.name: t.module for t in targets if isinstance(t.module, LowRankLinear)}
        if not any(target.trainable for target in targets if target.name in self._layers):
            rank_zero_warn(
                "UpdateBound has no effect: `layers` selects no trainable LowRankLinear; make some"
                " with `spectral_lightning.nn.factorize` before training."
            )
        super().on_train_start(trainer, pl_module)
        self._follow(trainer.optimizers)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._depth = 0  # a step that was broken off has not ended
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _hooks(self, optimizer: Optimizer) -> list[Any]:
        return [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._stepped),
        ]

    @override
    def _forget(self) -> None:
        self._before, self._scales, self._depth = {}, {}, 0

    @override
    def _taken(self) -> list[tuple[list[str], Tensor]]:
        found, self._scales = self._scales, {}
        return [([f"update_bound/scale/{name}"], scale) for name, scale in found.items()]

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the factors; of a step inside another's, as of a subclass, the outer one counts."""
        if not self._depth:
            self._before = {name: copied_factors(layer) for name, layer in self._of(optimizer)}
        self._depth += 1

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Bound the step before anybody sees the weights."""
        self._depth -= 1
        if self._depth:
            return
        begun, self._before = self._before, {}
        for name, before in begun.items():
            scale = bound_update_(self._layers[name], before, self.max_update_norm).amin()
            smallest = self._scales.get(name)
            self._scales[name] = scale if smallest is None else scale.minimum(smallest)

    def _of(self, optimizer: Optimizer) -> Iterator[tuple[str, LowRankLinear]]:
        """The layers that an optimizer steps, also if it got them in the course of training."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._layers.items():
            factors = (layer.left_factor, layer.right_factor)
            if any(id(factor) in known and factor.requires_grad for factor in factors):
                yield name, layer
