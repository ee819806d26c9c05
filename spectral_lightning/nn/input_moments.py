"""What linear layers read: second moments of their inputs, over some batches."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_moments(
    model: nn.Module,
    layers: str | Iterable[str],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Second moments ``E[x x^T]`` of what linear layers read, over some batches.

    Args:
        model: Model, in the mode it is to be measured in.
        layers: Glob, or several, over the names of its ``nn.Linear`` modules.
        batches: Batches to run.
        run: Runs the model on a batch; None for ``model(batch)``.

    Returns:
        Moments by name, shape ``(n, n)``, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If no linear layer matches, or there is no batch.
    """
    found, sums = linear_layers(model, layers), dict[str, Tensor]()
    counts = dict.fromkeys(found, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            (x,) = args or kwargs.values()
            x = x.reshape(-1, x.shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = sums.get(name, 0) + x.mT @ x
            counts[name] += len(x)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in found.items()
    ]
    try:
        for batch in batches:
            model(batch) if run is None else run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return {name: total / counts[name] for name, total in sums.items()}


def linear_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, nn.Linear]:
    """Plain linear layers of a model by name.

    Args:
        model: Model to search.
        layers: Glob, or several, over names.

    Raises:
        ValueError: If none matches, or one shares its weight with another module.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    known = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    found = {n: m for n, m in known.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    if not found:
        raise ValueError(
            f"`layers` must match a plain nn.Linear, got {patterns} for a model with"
            f" {len(known)}, such as {min(known, default=None)!r}."
        )
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    for name, linear in found.items():
        if len(owners[id(linear.weight)]) > 1:
            raise ValueError(
                f"`layers` must leave out what shares its weight with another module, got {name!r}."
            )
    return found
