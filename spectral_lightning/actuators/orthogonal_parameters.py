"""Which parameters have gradients worth making orthogonal, and what of them is one vector."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectral_lightning.actuators.orthogonal import Granularity, check_projection

_LORA = re.compile(r"(^|\.)lora_")
_BIAS = re.compile(r"(^|[._])bias$")


class OrthogonalParameter(NamedTuple):
    """A parameter that is projected."""

    parameter: nn.Parameter
    granularity: Granularity
    """What of it is one vector."""


def orthogonal_parameters(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    granularity: Granularity = "tensor",
    everything: bool = False,
    rename: Callable[[str], str] = str,
) -> dict[str, OrthogonalParameter]:
    """Choose the parameters of a model to project, by module type and by name.

    Left out are parameters of normalisation layers, biases and other vectors, whose length is not
    the scale of a matrix, and LoRA's factors ``A`` and ``B``, as scaling them does not scale the
    weight ``W + B A``. Embeddings are projected row by row, so that only rows that were looked up
    change, and stacks of experts one by one. A parameter that several modules share is taken
    once, under its first name; an embedding that is the output head too has a gradient in every
    row, and is projected as other matrices.

    Args:
        model: Any module.
        layers: Glob, or several, over names of layers or parameters, such as ``"model.blocks.*"``.
        exclude: The same of what is left out.
        granularity: What of other parameters is one vector.
        everything: Leave out nothing that `layers` selects, and treat all alike, as in the paper.
        rename: Makes the names that globs match of a parameter's own.

    Returns:
        Parameters by name, frozen ones included, in the model's order.

    Raises:
        ValueError: If a glob matches no parameter, or `granularity` is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> {name: kind for name, (_, kind) in orthogonal_parameters(model).items()}
        {'0.weight': 'row', '2.weight': 'tensor'}
    """
    check_projection([granularity], 1.0)
    wanted, unwanted = _globs(layers), _globs(exclude)
    globs = {*wanted, *unwanted}
    unused = set(globs)
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    chosen: dict[str, OrthogonalParameter] = {}
    names = {rename(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in names.items():
        hits = {glob for glob in globs if _matches(glob, name)}
        unused -= hits
        if not hits.intersection(wanted) or hits.intersection(unwanted):
            continue
        kind = granularity_of(name, parameter, owners[parameter], granularity, everything)
        if kind is not None:
            chosen[name] = OrthogonalParameter(parameter, kind)
    if unused:
        glob = min(unused)
        argument = "layers" if glob in wanted else "exclude"
        raise ValueError(
            f"`{argument}` must match at least one parameter, got {glob!r}; the model has"
            f" {', '.join(list(names)[:3]) or 'none'}{', ...' if len(names) > 3 else ''}."
        )
    return chosen


def granularity_of(
    name: str,
    parameter: Tensor,
    owners: Sequence[nn.Module] = (),
    granularity: Granularity = "tensor",
    everything: bool = False,
) -> Granularity | None:
    """What of a parameter is one vector; None if it is left out.

    Args:
        name: Its name; empty if it is not known.
        parameter: Parameter.
        owners: Modules that it belongs to, as far as they are known.
        granularity: Answer for matrices.
        everything: Whether that is the answer for all parameters.
    """
    if not parameter.is_floating_point() or parameter.numel() < 2:
        return None
    if everything:
        return granularity
    if parameter.ndim < 2 or _LORA.search(name) or _BIAS.search(name):
        return None
    if any("Norm" in type(owner).__name__ for owner in owners):
        return None
    if owners and all(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
        return "row"
    if owners and parameter.ndim == 3 and not isinstance(owners[0], _ConvNd):
        return "row"
    return granularity


def _globs(globs: str | Sequence[str]) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)


def _matches(glob: str, name: str) -> bool:
    """Whether a glob selects a parameter, or the layer that it belongs to."""
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)
