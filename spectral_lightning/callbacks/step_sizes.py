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
        self._optimizers: list[Optimizer] = []
        self._rates: dict[int, float | Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the steps of some optimizers from now on."""
        self.close()
        self._optimizers = list(optimizers)
        self._handles = [o.register_step_post_hook(self._stepped) for o in self._optimizers]

    def close(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self._rates = [], [], {}

    def of(self, parameter: nn.Parameter) -> float | Tensor | None:
        """Learning rate of a parameter's last step; None if it was not stepped since `clear`."""
        return self._rates.get(id(parameter))

    def why_not(self, parameter: nn.Parameter) -> str | None:
        """Why no optimizer will step a parameter at a known rate; None if one will."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(own is parameter for own in group["params"]):
                    if group["lr"] is None:
                        return "is trained by an optimizer without a learning rate"
                    return None
        return "is trained by no optimizer"

    def clear(self) -> None:
        """Forget the steps taken so far."""
        self._rates.clear()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            rate = group["lr"]
            if rate is None:
                continue
            if isinstance(rate, Tensor):
                rate = rate.detach().clone()
            if skipped is not None:
                rate = torch.where(skipped > 0, torch.zeros_like(skipped), rate)
            self._rates.update({id(p): rate for p in group["params"] if p.grad is not None})
