"""Orthogonal gradients: what of a gradient points along the weights is taken out.

Lives here: hooks and logs. Does not live here: the projection, and the choice of parameters
(`actuators`).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.actuators import (
    MAX_GAIN,
    Granularity,
    OrthogonalParameter,
    Project,
    check_projection,
    decay_conflict,
    orthogonal_parameters,
    project_,
    project_update_,
)
from spectral_lightning.callbacks.optimizer_hooks import OptimizerCallback
from spectral_lightning.spectra.targets import clean_name


class OrthogonalGradient(OptimizerCallback):
    """Make gradients orthogonal to the weights, for any optimizer.

    The projection is on the whole gradient of an optimizer step, accumulated, unscaled and reduced,
    before clipping. Clipping by norm does not turn it; clipping by value does, and is refused: the
    optimizers of `spectral_lightning.optim.orthogonal` project after it. Which parameters take
    part is chosen by module type and name (`actuators.orthogonal_parameters`): no normalisation
    layers, biases and other vectors, no factors of LoRA, and of embeddings only rows looked up.

    Orthogonal gradients make steps so only with SGD: averages of gradients, and Adam's division,
    turn steps towards the weights again. ``project="update"`` projects the step itself, weight
    decay included, when the optimizer is done; it holds a copy of the weights during its step.

    Loggers get ``orthogonal/cos/<layer>``, the cosine of the descent direction, minus the gradient,
    to the weight before the projection, and ``orthogonal/update_cos/<layer>``, that of the update:
    positive where the weight would have grown. The host waits for the device only to log.

    Args:
        layers: Glob, or several, over names of layers or parameters, such as ``"model.blocks.*"``.
        exclude: The same of what is left out.
        project: ``"grad"`` (the paper), ``"update"`` (what a step adds to the weights), ``"both"``.
        granularity: One vector is each ``"tensor"`` (the paper), each ``"row"``, or all tensors of
            an optimizer together (``"global"``).
        rescale: Whether the norm of what is projected is kept.
        max_gain: Largest factor of that, at least 1; infinite in the paper.
        everything: Project all parameters alike, vectors and embeddings too, as in the paper.

    Raises:
        ValueError: If an argument is out of its range. When training begins: if gradients are
            clipped by value, the strategy flattens parameters, or a glob matches nothing.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability".
        https://arxiv.org/abs/2501.04697

    Example:
        >>> callback = OrthogonalGradient("model.blocks.*", project="update")
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, barebones=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        exclude: str | list[str] | None = None,
        project: Project = "grad",
        granularity: Granularity = "tensor",
        rescale: bool = True,
        max_gain: float = MAX_GAIN,
        everything: bool = False,
    ) -> None:
        super().__init__()
        if project not in get_args(Project):
            allowed = ", ".join(get_args(Project))
            raise ValueError(f"`project` must be one of {allowed}, got {project!r}.")
        check_projection([granularity], max_gain)
        self.layers, self.exclude, self.project = layers, exclude, project
        self.granularity, self.rescale, self.max_gain = granularity, rescale, max_gain
        self.everything = everything
        self._chosen: dict[str, OrthogonalParameter] = {}
        self._before: dict[str, Tensor] = {}
        self._cosines: dict[tuple[str, Sequence[str]], Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that take part, once training has begun."""
        return tuple(self._chosen)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse_flat(type(trainer.strategy).__mro__, pl_module)
            by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
            if by_value and self.project != "update":
                raise ValueError(
                    'OrthogonalGradient must not be followed by `gradient_clip_algorithm="value"`,'
                    " which turns gradients towards the weights again; clip by norm, or use an"
                    " optimizer such as spectral_lightning.optim.OrthogonalAdamW, which projects"
                    " after clipping."
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not later: after a validation FSDP2 shows whole parameters that no optimizer has.
        _refuse_flat((), trainer.strategy.model)
        self._chosen = orthogonal_parameters(
            pl_module,
            self.layers,
            self.exclude or (),
            granularity=self.granularity,
            everything=self.everything,
            rename=clean_name,
        )
        parameters = [parameter for parameter, _ in self._chosen.values()]
        if not any(parameter.requires_grad for parameter in parameters):
            rank_zero_warn(
                "OrthogonalGradient has no effect: `layers` selects no trainable parameter but such"
                " as are left out; give other layers, or `everything=True`."
            )
        for optimizer in trainer.optimizers:
            conflict = decay_conflict(optimizer, parameters, self.project)
            if conflict is not None:
                rank_zero_warn(f"OrthogonalGradient: {conflict}")
        self._follow(trainer.optimizers)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stepped = [
            name
            for name, (parameter, _) in self._chosen.items()
            if parameter.grad is not None and id(parameter) in known
        ]
        if self.project != "update" and stepped:
            weights = [self._chosen[name].parameter for name in stepped]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            cosines = project_(gradients, weights, self._kinds(stepped), **self._options())
            self._cosines["cos", tuple(stepped)] = -cosines
        self._before = {}
        if self.project != "grad":
            self._before = {n: self._chosen[n].parameter.detach().clone() for n in stepped}

    @override
    def _hooks(self, optimizer: Optimizer) -> list[Any]:
        is_needed = self.project != "grad"
        return [optimizer.register_step_post_hook(self._stepped)] if is_needed else []

    @override
    def _forget(self) -> None:
        self._before, self._cosines = {}, {}

    @override
    def _taken(self) -> list[tuple[list[str], Tensor]]:
        found, self._cosines = self._cosines, {}
        return [
            ([f"orthogonal/{kind}/{name.removesuffix('.weight')}" for name in stepped], cosines)
            for (kind, stepped), cosines in found.items()
        ]

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Project the update; the copies are gone where a step is made of several."""
        before, self._before = self._before, {}
        if before:
            names = tuple(before)
            weights = [self._chosen[name].parameter for name in names]
            cosines = project_update_(
                weights, list(before.values()), self._kinds(names), **self._options()
            )
            self._cosines["update_cos", names] = cosines

    def _kinds(self, names: Iterable[str]) -> list[Granularity]:
        return [self._chosen[name].granularity for name in names]

    def _options(self) -> dict[str, Any]:
        return {"rescale": self.rescale, "max_gain": self.max_gain}


def _refuse_flat(strategies: Collection[type], model: Any) -> None:
    """Refuse strategies that train flat pieces of parameters.

    Raises:
        ValueError: If it is one of them.
    """
    names = {cls.__name__ for cls in strategies}
    found = names & {"DeepSpeedStrategy", "FSDPStrategy"}
    if not found and any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        found = {"FullyShardedDataParallel"}
    if found:
        raise ValueError(
            f"OrthogonalGradient must see weights and gradients in their shapes, which {min(found)}"
            " flattens; use ModelParallelStrategy (FSDP2) or DDP."
        )
