"""What turns any optimizer into one whose gradients, or steps, are orthogonal to the weights."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.actuators import (
    MAX_GAIN,
    Granularity,
    Project,
    check_projection,
    decay_conflict,
    granularity_of,
    project_,
    project_update_,
)

KEY = "orthogonal"
"""Key of parameter groups: a granularity, or ``"off"``; groups without it follow their role."""


class OrthogonalSettings(NamedTuple):
    """Arguments of `OrthogonalOptimizer`."""

    project: Project
    granularity: Granularity
    rescale: bool
    max_gain: float
    everything: bool
    exclude: tuple[str, ...]


class OrthogonalOptimizer(Optimizer):
    r"""What `orthogonal` adds to an optimizer.

    ``step(closure)`` calls the closure once, projects the gradients, and then does the optimizer's
    own step without a closure. The projection is the last thing that happens to a gradient: after
    unscaling, accumulation and clipping of any kind, also under Lightning, which calls all of them
    in the closure. A norm that was clipped stays so. Learning-rate schedules, parameter groups and
    checkpoints are those of the optimizer itself; checkpoints of either kind load into the other.

    A group's key ``orthogonal`` says what of its parameters is one vector, or ``"off"``;
    `orthogonal_groups` sets it. Groups without it leave out vectors, biases and LoRA's factors, the
    latter two if parameters have names (``model.named_parameters()``), and project those of role
    ``embedding`` (`parameter_groups`) row by row. What does not say its role is no embedding.

    Gradients that are orthogonal make steps so only for SGD: averages of gradients, and Adam's
    division, turn steps towards the weights again. ``project="update"`` projects the step itself,
    weight decay included, and holds a copy of the weights while it does.

    Args:
        params: Parameters, or groups of them.
        args: Further arguments of the optimizer, in its own order.
        project: ``"grad"`` (the paper), ``"update"`` (what a step adds to the weights), ``"both"``.
        granularity: One vector is each ``"tensor"`` (the paper), each ``"row"``, or all tensors of
            a step together (``"global"``).
        rescale: Whether the norm of what is projected is kept.
        max_gain: Largest factor of that, at least 1; infinite in the paper.
        everything: Project all parameters alike, vectors and embeddings too, as in the paper.
        exclude: Globs over names of parameters that are left out, if they have names.
        kwargs: Further arguments of the optimizer.

    Raises:
        ValueError: If an argument is out of its range, or a strategy has flattened the parameters
            (FSDP1, DeepSpeed).

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability".
        https://arxiv.org/abs/2501.04697
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        project: Project = "grad",
        granularity: Granularity = "tensor",
        rescale: bool = True,
        max_gain: float = MAX_GAIN,
        everything: bool = False,
        exclude: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        settings = orthogonal_settings(project, granularity, rescale, max_gain, everything, exclude)
        super().__init__(params, *args, **kwargs)
        self.begin(settings)

    def begin(self, settings: OrthogonalSettings) -> None:
        """Check the parameters; the optimizer has been built."""
        self._orthogonal, self._num_chosen = settings, 0
        for group in self.param_groups:
            _refuse_flattened(group["params"])
        if settings.exclude and not any(group.get("param_names") for group in self.param_groups):
            raise ValueError(
                "`exclude` must be empty unless parameters have names, got"
                f" {settings.exclude[0]!r}; pass `model.named_parameters()`."
            )
        chosen = [parameter for parameter, _ in self._chosen()]
        self._num_chosen = len(chosen)
        conflict = decay_conflict(self, chosen, settings.project)
        if conflict is not None:
            warnings.warn(conflict, stacklevel=3)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; a key ``orthogonal`` says how they are projected.

        Raises:
            ValueError: If it is unknown, or the parameters were flattened by a strategy.
        """
        kind = param_group.get(KEY, "off")
        if kind not in ("off", *get_args(Granularity)):
            allowed = ", ".join(("off", *get_args(Granularity)))
            raise ValueError(f"A group's `{KEY}` must be one of {allowed}, got {kind!r}.")
        super().add_param_group(param_group)
        _refuse_flattened(self.param_groups[-1]["params"])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of one that is not orthogonal."""
        kept = [{k: group[k] for k in (KEY, "role") if k in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update({key: group.get(key, value) for key, value in own.items()})

    @override
    def __getstate__(self) -> dict[str, Any]:
        extra = {"_orthogonal": self._orthogonal, "_num_chosen": self._num_chosen}
        return {**super().__getstate__(), **extra}

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once.

        Args:
            closure: Recomputes the loss and its gradients, called once before the projection.

        Returns:
            The closure's loss, or None without closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = self._orthogonal
        chosen = [(p, p.grad, kind) for p, kind in self._chosen() if p.grad is not None]
        if not chosen:
            self._own_step()
            return loss
        parameters, gradients, kinds = (list(column) for column in zip(*chosen, strict=True))
        options: dict[str, Any] = {"rescale": settings.rescale, "max_gain": settings.max_gain}
        if settings.project != "update":
            project_(gradients, parameters, kinds, **options)
        updates = settings.project != "grad"
        before = [parameter.detach().clone() for parameter in parameters] if updates else []
        self._own_step()
        if updates:
            project_update_(parameters, before, kinds, **options)
        return loss

    def _own_step(self) -> None:
        """The optimizer's own step, without hooks: those on this one run around it already."""
        step = super().step
        function: Any = getattr(step, "__func__", step)
        if getattr(function, "hooked", False):
            function.__wrapped__(self)
        else:
            step()

    def _chosen(self) -> list[tuple[Tensor, Granularity]]:
        """Parameters to project, and what of each is one vector."""
        chosen: list[tuple[Tensor, Granularity]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for parameter, name in zip(group["params"], names, strict=True):
                kind = self._kind(group, parameter, name)
                if kind is not None:
                    chosen.append((parameter, kind))
        if self._num_chosen and not chosen:
            raise RuntimeError(
                f"{type(self).__name__} must step parameters in the model's shapes, but has none"
                " left to project, as where DeepSpeed flattens them; use ModelParallelStrategy"
                " (FSDP2) or DDP."
            )
        return chosen

    def _kind(self, group: dict[str, Any], parameter: Tensor, name: str) -> Granularity | None:
        settings = self._orthogonal
        kind = group.get(KEY)
        if kind == "off" or any(fnmatchcase(name, glob) for glob in settings.exclude):
            return None
        everything = settings.everything or kind is not None
        if kind is None:
            is_table = group.get("role") == "embedding" and not everything
            kind = "row" if is_table else settings.granularity
        return granularity_of(name, parameter, (), kind, everything)


def orthogonal_settings(
    project: Project,
    granularity: Granularity,
    rescale: bool,
    max_gain: float,
    everything: bool,
    exclude: Sequence[str],
) -> OrthogonalSettings:
    """Check the arguments of `OrthogonalOptimizer`.

    Raises:
        ValueError: If one is out of its range.
    """
    if project not in get_args(Project):
        allowed = ", ".join(get_args(Project))
        raise ValueError(f"`project` must be one of {allowed}, got {project!r}.")
    check_projection([granularity], max_gain)
    return OrthogonalSettings(project, granularity, rescale, max_gain, everything, tuple(exclude))


def _refuse_flattened(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "ds_id"):
            raise ValueError(
                "`params` must keep the shapes of the model, got parameters that FSDP1 or DeepSpeed"
                " has flattened; use ModelParallelStrategy (FSDP2) or DDP."
            )
