"""What cosines are divided by: on a schedule, or learned."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override


@dataclass(frozen=True, kw_only=True)
class CosineTemperature:
    """Hold a temperature, then lower it on half a cosine.

    Args:
        start: Temperature at first, above 0; from Spectra-NSA, as are all defaults.
        end: Temperature from the last step on, above 0, and the one to validate at.
        hold_fraction: Share of the steps before the fall, in ``[0, 1]``.

    Raises:
        ValueError: If a setting is outside its range.

    References:
        Cangi (2025), Spectra-NSA. https://github.com/Daniele-Cangi/Spectra-NSA

    Example:
        >>> temperature = CosineTemperature()
        >>> [round(temperature(step, 100), 4) for step in (0, 20, 60, 100)]
        [0.07, 0.07, 0.06, 0.05]
    """

    start: float = 0.07
    """Temperature at first, above 0."""
    end: float = 0.05
    """Temperature from the last step on, above 0, and the one to validate at."""
    hold_fraction: float = 0.2
    """Share of the steps before the fall, in ``[0, 1]``."""

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be finite and > 0, got {value}.")
        if not 0 <= self.hold_fraction <= 1:
            raise ValueError(f"`hold_fraction` must be in [0, 1], got {self.hold_fraction}.")

    @property
    def validation(self) -> float:
        """Temperature of validation, which never changes, so that its losses can be compared."""
        return self.end

    def __call__(self, step: int, num_steps: int) -> float:
        """Temperature of an optimizer step.

        Args:
            step: Optimizer steps made so far.
            num_steps: Optimizer steps of the whole run, at least 1.

        Raises:
            ValueError: If `num_steps` is below 1.
        """
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be >= 1, got {num_steps}.")
        held = self.hold_fraction * num_steps
        if step <= held:
            return self.start
        done = min((step - held) / (num_steps - held), 1.0) if held < num_steps else 1.0
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


class LearnableTemperature(nn.Module):
    """A temperature that is learned, as a logarithm within bounds.

    The parameter itself is put back within the bounds at each call, so that its gradient lives on
    there, and no rate of decay should be given to it.

    Args:
        start: Temperature at first, within the bounds; from Radford et al. 2021, section 2.5.
        lowest: Lower bound, above 0; from the same place (a scale of at most 100).
        highest: Upper bound; chosen here.
        validation: Temperature of validation, which never changes; that of `CosineTemperature`.

    Raises:
        ValueError: If a setting is outside its range.

    References:
        Radford et al. (2021), "Learning transferable visual models from natural language
        supervision", section 2.5. https://arxiv.org/abs/2103.00020

    Example:
        >>> round(LearnableTemperature()().item(), 4)
        0.07
    """

    def __init__(
        self,
        start: float = 0.07,
        lowest: float = 0.01,
        highest: float = 1.0,
        validation: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 < lowest <= start <= highest < math.inf:
            raise ValueError(
                "`lowest`, `start` and `highest` must be > 0 and in this order, got"
                f" {lowest}, {start} and {highest}."
            )
        if not 0 < validation < math.inf:
            raise ValueError(f"`validation` must be finite and > 0, got {validation}.")
        self.validation = validation
        self.start, self.lowest, self.highest = start, lowest, highest
        self.log_temperature = nn.Parameter(torch.tensor(math.log(start)))

    @override
    def forward(self) -> Tensor:
        """Return the temperature, a scalar."""
        with torch.no_grad():
            self.log_temperature.clamp_(math.log(self.lowest), math.log(self.highest))
        return self.log_temperature.exp()

    def settings(self) -> dict[str, float]:
        """Return the arguments that this was made with."""
        names = ("start", "lowest", "highest", "validation")
        return {name: getattr(self, name) for name in names}

    @override
    def extra_repr(self) -> str:
        return f"lowest={self.lowest:g}, highest={self.highest:g}"
