"""Going on with other capacities: what a checkpoint holds of low-rank layers and their optimizers.

Lives here: states cut or padded to the shapes of now. Does not live here: a layer with another
capacity (`conversion`), and changes of rank.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_lightning.nn.low_rank import LowRankLinear


def fitted_state(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose low-rank layers have the capacities of a model's.

    Args:
        model: Model that is to load it.
        state_dict: State dict of the same model with other capacities.

    Raises:
        ValueError: If a saved rank is above the model's capacity.
    """
    found = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            found |= module.fitted(state_dict, f"{name}." if name else "")
    return found


class CapacityFit:
    """Fits a checkpoint to the capacities of a model: its own state, and later its optimizers'.

    An optimizer's state does not say which shapes its parameters had, and PyTorch loads any: it
    fails at the next step. So the shapes of the model's state, which comes first, are kept.

    Args:
        model: Model that loads checkpoints.

    Example:
        >>> layer = LowRankLinear(6, 4, rank=2, capacity=4)
        >>> optimizer, fit = torch.optim.SGD(layer.parameters(), momentum=0.9), CapacityFit(layer)
        >>> handle = optimizer.register_load_state_dict_pre_hook(fit.optimizer_state)
        >>> state = LowRankLinear(6, 4, rank=2, capacity=3).state_dict()
        >>> fit.model_state(state)["left_factor"].shape
        torch.Size([4, 4])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shapes: dict[str, torch.Size] = {}

    def model_state(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the model, fitted as by `fitted_state`; its shapes are kept."""
        tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return fitted_state(self._model, state_dict)

    def optimizer_state(
        self, optimizer: Optimizer, state_dict: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """An optimizer's state of then, with each factor's part cut or padded with zeros like it.

        For ``optimizer.register_load_state_dict_pre_hook``. Components behind the rank have no
        state but zeros, so that the run goes on as if nothing had changed.

        Args:
            optimizer: Optimizer of the model's parameters that is to load it.
            state_dict: What it saved with the model's state that was fitted last.

        Returns:
            The state to load; None where its groups are not the optimizer's, which PyTorch refuses.

        Raises:
            ValueError: If a factor has changed its shape, and a tensor of its state has neither
                the old one nor one element.
        """
        own = [group["params"] for group in optimizer.param_groups]
        saved = [group["params"] for group in state_dict["param_groups"]]
        if list(map(len, own)) != list(map(len, saved)):
            return None
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        states = dict(state_dict["state"])
        for parameter, key in zip(chain(*own), chain(*saved), strict=True):
            name = names.get(parameter, "")
            old = self._shapes.get(name, parameter.shape)
            if key in states and old != parameter.shape:
                states[key] = {
                    part: _fitted(value, old, parameter.shape, f"`{part}` of `{name}`")
                    for part, value in states[key].items()
                }
        return {**state_dict, "state": states}


def _fitted(value: Any, old: torch.Size, new: torch.Size, what: str) -> Any:
    """A tensor of the old shape cut or padded to the new one; counts stay as they are."""
    if not isinstance(value, Tensor) or value.shape == new or value.numel() == 1:
        return value
    if value.shape != old:
        capacity = next(size for size, other in zip(old, new, strict=True) if size != other)
        raise ValueError(
            f"The optimizer's state must have the factor's shape {tuple(old)} to follow it to"
            f" {tuple(new)}, but {what} is {tuple(value.shape)}; go on with the checkpoint's"
            f" `capacity`, {capacity}, or load its weights alone and start a new optimizer."
        )
    kept = tuple(slice(min(sizes)) for sizes in zip(old, new, strict=True))
    made = value.new_zeros(new)
    made[kept] = value[kept]
    return made
