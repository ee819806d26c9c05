"""From dense layers to low-rank ones and back, for whole models."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectral_lightning.linalg import energy_rank, singular_triplets, truncation
from spectral_lightning.nn.input_moments import linear_layers
from spectral_lightning.nn.low_rank import LowRankLinear

Inputs = Mapping[str, Tensor]
"""``E[x x^T]`` of the inputs of layers, by name, shape ``(n, n)``, any scale."""


def factorize(
    model: nn.Module,
    layers: str | Iterable[str] = "*",
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    inputs: Inputs | None = None,
    **options: Any,
) -> dict[str, int]:
    """Put low-rank layers in place of a model's linear layers, before an optimizer is built.

    Exactly one of `rank`, `energy` and `budget` says how many components each layer gets. Each
    layer is the best of its rank: for its weight, or with `inputs` for its outputs.

    Args:
        model: Model; overwritten.
        layers: Glob, or several, over the names of its ``nn.Linear`` modules.
        rank: The same for all, cut at ``min(m, n)``.
        energy: Share in (0, 1] of the squared values that each layer keeps at least.
        budget: Share in (0, 1] of the parameters of these layers' weights that all together may
            keep; what buys the most energy per parameter, as a share of its layer's, comes first.
        inputs: Second moments of the inputs, as of `input_moments`, for all or some of the layers.
        **options: Further arguments of `LowRankLinear`, such as ``capacity`` or ``mode``.

    Returns:
        The rank of each converted layer, by name.

    Raises:
        ValueError: If not exactly one of the three is given, one is out of its range, or no linear
            layer matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> factorize(model, "0", rank=3)
        {'0': 3}
    """
    found = linear_layers(model, layers)
    inputs = {} if inputs is None else inputs
    ranks = _ranks(found, inputs, rank, energy, budget)
    made = {
        name: low_rank_from_linear(linear, ranks[name], inputs=inputs.get(name), **options)
        for name, linear in found.items()
    }
    for name, linear in found.items():  # all, or none if one is refused
        replace_module(model, linear, made[name])
    return ranks


def merge(model: nn.Module) -> list[str]:
    """Put plain linear layers in place of all that hold factors; the function stays the same.

    Args:
        model: Model; overwritten.

    Returns:
        Names of the layers converted: `LowRankLinear`, `FactoredLinear`, and what else has methods
        `to_linear` and `spectral_weight`.
    """
    return _convert(model, _holds_factors, _to_linear)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict that the model would have after `merge`; the model stays as it is.

    Args:
        model: Any module.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if name and _holds_factors(module):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            plain = _to_linear(module).state_dict()
            state |= {f"{name}.{key}": value for key, value in plain.items()}
    return state


def compact(model: nn.Module) -> list[str]:
    """Store only the active components of all low-rank layers; the function stays the same.

    Not for a model in training: the parameters are new ones, which optimizers do not know.

    Args:
        model: Model; overwritten.

    Returns:
        Names of the layers converted.
    """
    return _convert(model, lambda module: isinstance(module, LowRankLinear), with_capacity)


def low_rank_from_linear(
    linear: nn.Linear, rank: int, *, inputs: Tensor | None = None, **options: Any
) -> LowRankLinear:
    """The best low-rank layer in place of a linear one.

    Args:
        linear: Layer to replace.
        rank: Components.
        inputs: ``E[x x^T]`` of the layer's inputs, shape ``(n, n)``, any scale: the outputs' mean
            squared error is smallest then. None: the weight's is.
        **options: Further arguments of `LowRankLinear`.

    Returns:
        The layer, on the same device, trainable if the old one was.

    Raises:
        ValueError: If the weight or `inputs` is not finite, or an argument out of its range.
    """
    weight = linear.weight.detach()
    made = _on_meta(linear.in_features, linear.out_features, rank, linear.bias, options)
    made.to_empty(device=weight.device).to(weight.dtype)
    left, right, _ = _truncated(weight, rank, inputs)
    with torch.no_grad():
        made.left_factor.zero_()[:, :rank] = left
        made.right_factor.zero_()[:rank] = right
        made.set_rank(rank)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
    for parameter in made.parameters():
        parameter.requires_grad_(linear.weight.requires_grad)
    return made.train(linear.training)


def with_capacity(layer: LowRankLinear, capacity: int | None = None) -> LowRankLinear:
    """A layer with the same function and parameters of another capacity.

    Args:
        layer: Layer to copy.
        capacity: At least its rank; None for its rank, which stores nothing that is not used.

    Returns:
        The layer.

    Raises:
        ValueError: If `capacity` is below the rank or above ``min(m, n)``.
    """
    options = {name: getattr(layer, name) for name in ("mode", "init", "gain", "quantum")}
    options["capacity"] = layer.rank if capacity is None else capacity
    made = _on_meta(layer.in_features, layer.out_features, layer.rank, layer.bias, options)
    made.to_empty(device=layer.left_factor.device).to(layer.left_factor.dtype)
    made.load_state_dict(layer.state_dict())
    for own, other in zip(made.parameters(), layer.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return made.train(layer.training)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in place of another wherever a model holds it."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)


def _on_meta(
    n: int, m: int, rank: int, bias: Tensor | None, options: Mapping[str, Any]
) -> LowRankLinear:
    """A layer without values, which draws no random numbers."""
    return LowRankLinear(n, m, rank, bias is not None, **{**options, "device": "meta"})


def _holds_factors(module: nn.Module) -> bool:
    return hasattr(module, "to_linear") and hasattr(module, "spectral_weight")


def _to_linear(module: Any) -> nn.Module:
    made: nn.Module = module.to_linear()
    return made


def _convert(
    model: nn.Module, is_due: Callable[[nn.Module], bool], made_of: Callable[[Any], nn.Module]
) -> list[str]:
    found = {n: m for n, m in model.named_modules() if is_due(m)}
    for module in found.values():
        replace_module(model, module, made_of(module))
    return list(found)


def _truncated(weight: Tensor, rank: int, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced factors ``(m, rank)`` and ``(rank, n)``, and all values, of a dense weight."""
    if inputs is None:
        U, S, V = singular_triplets(weight)
        roots = S[:rank].sqrt()
        return U[:, :rank] * roots, (V[:, :rank] * roots).mT, S
    n = weight.shape[1]
    if tuple(inputs.shape) != (n, n):
        raise ValueError(f"`inputs` must have shape ({n}, {n}), got {tuple(inputs.shape)}.")
    dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
    identity = torch.eye(n, dtype=dense.dtype, device=dense.device)
    found = truncation(dense, identity, rank, inputs)
    return dense @ found.of_left, found.of_right.mT, found.values


def _ranks(
    found: Mapping[str, nn.Linear],
    inputs: Inputs,
    rank: int | None,
    energy: float | None,
    budget: float | None,
) -> dict[str, int]:
    if sum(option is not None for option in (rank, energy, budget)) != 1:
        raise ValueError(
            "exactly one of `rank`, `energy` and `budget` must be given, got"
            f" rank={rank}, energy={energy}, budget={budget}."
        )
    sizes = {name: min(linear.weight.shape) for name, linear in found.items()}
    if rank is not None:
        if rank < 1:
            raise ValueError(f"`rank` must be >= 1, got {rank}.")
        return {name: min(rank, size) for name, size in sizes.items()}
    for option, value in {"energy": energy, "budget": budget}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"`{option}` must be in (0, 1], got {value}.")
    values = {
        name: _truncated(linear.weight.detach(), sizes[name], inputs.get(name))[2]
        for name, linear in found.items()
    }
    if energy is not None:
        return {name: max(1, int(energy_rank(v, energy))) for name, v in values.items()}
    assert budget is not None
    return _within_budget(found, values, budget)


def _within_budget(
    found: Mapping[str, nn.Linear], values: Mapping[str, Tensor], budget: float
) -> dict[str, int]:
    """Greedy by energy per parameter; one component each comes first."""
    shapes = {name: linear.weight.shape for name, linear in found.items()}
    costs = {name: m + n for name, (m, n) in shapes.items()}
    free = budget * sum(m * n for m, n in shapes.values()) - sum(costs.values())
    if free < 0:
        least = sum(costs.values()) / sum(m * n for m, n in shapes.values())
        raise ValueError(f"`budget` must be at least {least:.4f} for rank 1, got {budget}.")
    offers: list[tuple[float, str]] = []
    for name, found_values in values.items():
        energies = found_values.double().square()
        shares = energies / energies.sum().clamp_min(1e-300)
        offers += [(share / costs[name], name) for share in shares[1:].tolist()]
    ranks = dict.fromkeys(found, 1)
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        if costs[name] <= free:
            free -= costs[name]
            ranks[name] += 1
    return ranks
