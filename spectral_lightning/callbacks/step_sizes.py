"""How large a step each optimizer has just taken: its learning rates, and whether it stepped."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class StepSizes:
    """Learning rate of each parameter in the optimizer step just taken.

    Hooks into the optimizers themselves: they know the rate that the step really used, and a step
    that a gradient scaler skips never reaches them. An optimizer that handles the scaler itself
    (fused ones) says so by ``found_inf``, which then makes the rate 0, on the device.
    """

    def __init__(self) -> None:
        self._groups: dict[int, tuple[int, int]] = {}
        self._rates: dict[tuple[int, int], float | Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the steps of some optimizers from now on."""
        self.close()
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    self._groups[id(parameter)] = (id(optimizer), index)
            self._handles.append(optimizer.register_step_post_hook(self._stepped))

    def close(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._groups, self._rates = [], {}, {}

    def of(self, parameter: nn.Parameter) -> float | Tensor | None:
        """Learning rate of a parameter's last step; None if it was not stepped since `clear`."""
        key = self._groups.get(id(parameter))
        return None if key is None else self._rates.get(key)

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether any of the optimizers trains the parameter."""
        return id(parameter) in self._groups

    def clear(self) -> None:
        """Forget the steps taken so far."""
        self._rates.clear()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        for index, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                rate = rate.detach().clone()
            if skipped is not None:
                rate = torch.where(skipped > 0, torch.zeros_like(skipped), rate)
            self._rates[id(optimizer), index] = rate
