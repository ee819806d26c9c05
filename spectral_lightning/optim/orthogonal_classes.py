"""Orthogonal optimizers: made of any other, by name for configurations, and their groups."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from spectral_lightning.actuators import MAX_GAIN, Granularity, Project, orthogonal_parameters
from spectral_lightning.optim.groups import parameter_groups
from spectral_lightning.optim.orthogonal_optimizer import (
    KEY,
    OrthogonalOptimizer,
    orthogonal_settings,
)

_CLASSES: dict[type[Optimizer], type[Any]] = {}


class Orthogonal(Optimizer):
    """Any optimizer with orthogonal gradients, for configuration files; see `OrthogonalOptimizer`.

    In YAML, in the place of an optimizer::

        class_path: spectral_lightning.optim.Orthogonal
        init_args:
          optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
          project: update

    Args:
        params: Parameters, or groups of them.
        optimizer: Makes an optimizer of them, which is then turned into an `orthogonal` one.
        project: As of `OrthogonalOptimizer`, and so are the rest.
        granularity: What is one vector.
        rescale: Whether norms are kept.
        max_gain: Largest factor of that.
        everything: Whether all parameters are projected alike.
        exclude: Globs over names of parameters that are left out.
    """

    # No default for `optimizer`: jsonargparse would carry its arguments over to another class.
    def __new__(  # type: ignore[misc]  # noqa: D102
        cls,
        params: Iterable[Any],
        optimizer: Callable[[Iterable[Any]], Optimizer],
        project: Project = "grad",
        granularity: Granularity = "tensor",
        rescale: bool = True,
        max_gain: float = MAX_GAIN,
        everything: bool = False,
        exclude: Sequence[str] = (),
    ) -> OrthogonalOptimizer:
        settings = orthogonal_settings(project, granularity, rescale, max_gain, everything, exclude)
        made: Any = optimizer(params)
        made.__class__ = orthogonal(type(made))
        made._patch_step_function()  # hooks on steps are a matter of the class
        made.begin(settings)
        return made

    def __init__(self, params: Iterable[Any], optimizer: Any, **kwargs: Any) -> None:
        """Say that the arguments are those above; never called."""


def orthogonal(optimizer_class: type[Optimizer]) -> type[OrthogonalOptimizer]:
    """Make a class of optimizers that project gradients or steps, from any other.

    It is a subclass of both, takes the arguments of `optimizer_class` in the same order, and those
    of `OrthogonalOptimizer` by name. Calls with the same class return the same class.

    Args:
        optimizer_class: Class of an optimizer that steps without calling a closure.

    Raises:
        TypeError: If its steps need a closure, as those of LBFGS, which would compute gradients
            that nobody projects.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = orthogonal(SGD)([weight], 0.5, rescale=False)
        >>> weight.grad = torch.tensor([[1.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data  # moved at a right angle to (3, 4)
        tensor([[2.6800, 4.2400]])
        >>> isinstance(optimizer, SGD)
        True
    """
    if issubclass(optimizer_class, OrthogonalOptimizer):
        return optimizer_class
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"`optimizer_class` must step without a closure, got {optimizer_class.__name__}, whose"
            " steps compute gradients anew, which nobody would project; use SGD, AdamW or the like."
        )
    if optimizer_class not in _CLASSES:
        name = f"Orthogonal{optimizer_class.__name__}"
        members = {"__module__": __name__, "__doc__": OrthogonalOptimizer.__doc__}
        _CLASSES[optimizer_class] = type(name, (OrthogonalOptimizer, optimizer_class), members)
    return _CLASSES[optimizer_class]


OrthogonalAdamW: Any = orthogonal(AdamW)
OrthogonalSGD: Any = orthogonal(SGD)


def orthogonal_groups(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    granularity: Granularity = "tensor",
    everything: bool = False,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups by role, and by how they are projected.

    Module types and names are known here, which an optimizer does not see: normalisation layers,
    biases and LoRA's factors are left out, and embeddings are projected row by row.

    Args:
        model: Any module with a trainable parameter.
        layers: Globs over names of layers or parameters that are projected.
        exclude: The same of what is left out.
        granularity: What of matrices is one vector.
        everything: Leave out nothing that `layers` selects, and treat all alike, as in the paper.

    Returns:
        The groups of `parameter_groups`, those of several kinds split, each with the key
        ``orthogonal``.

    Raises:
        ValueError: If a glob matches nothing, or no parameter is trainable.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> [(group["name"], group["orthogonal"]) for group in orthogonal_groups(model)]
        [('embedding', 'row'), ('head', 'tensor'), ('vector', 'off')]
    """
    chosen = orthogonal_parameters(
        model, layers, exclude, granularity=granularity, everything=everything
    )
    kinds: dict[nn.Parameter, str] = dict(chosen.values())
    groups = []
    for group in parameter_groups(model):
        split: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            split.setdefault(kinds.get(parameter, "off"), []).append(parameter)
        for kind, params in split.items():
            name = group["name"] if len(split) == 1 else f"{group['name']}_{kind}"
            groups.append({**group, "params": params, "name": name, KEY: kind})
    return groups
