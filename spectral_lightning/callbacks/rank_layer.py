"""What `RankAdaptation` keeps of a layer: its controller's memory, what is measured, what fades."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer

from spectral_lightning.actuators import (
    GrowthProbe,
    Moments,
    best_components,
    fresh_rows,
    gathered_factors,
    grow_,
    grow_averages_,
    regauge_,
    regauge_averages_,
)
from spectral_lightning.control import RankState
from spectral_lightning.nn import LowRankLinear
from spectral_lightning.spectra import LayerSize, Target

Shrink = Literal["fade", "cut"]


@dataclass(slots=True)
class Fade:
    """Components on their way out."""

    keep: int
    """Rank when they are gone."""
    begun: int
    """Optimizer steps done when they began to fade."""


@dataclass(slots=True)
class RankLayer:
    """One low-rank layer under rank adaptation."""

    target: Target
    optimizer: Optimizer | None
    state: RankState = field(default_factory=RankState)
    moment: Tensor | None = None
    """Sum of ``(h, 1) (h, 1)^T`` over the inputs of one optimizer step: second moments, sums and
    number of the hidden activations ``h = V x``; None while it is not measured."""
    probe: GrowthProbe | None = None
    fade: Fade | None = None
    averages: Sequence[LowRankLinear] = ()
    """Averaged copies of the layer, which follow its changes."""

    @property
    def module(self) -> LowRankLinear:
        """The layer itself."""
        assert isinstance(self.target.module, LowRankLinear)
        return self.target.module

    @property
    def size(self) -> LayerSize:
        """Shape, capacity and rank."""
        return LayerSize(self.target.shape, self.module.capacity, self.module.rank)

    def watch_inputs(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        """Add the hidden activations of a training batch to the moment; a forward pre-hook."""
        if not torch.is_grad_enabled():  # validation in between
            return
        layer = self.module
        (x,) = args or kwargs.values()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _, right = gathered_factors(layer)
            hidden = linear(x.reshape(-1, x.shape[-1]).to(right.dtype), right)
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
            found = hidden.mT @ hidden
            self.moment = found if self.moment is None else self.moment + found

    def end_probe(self) -> None:
        """Make the probes unused components again."""
        if self.probe is not None:
            self.probe.end_(self.module)
            self.probe = None

    def shrink(self, found: Any, moments: Moments) -> None:
        """Keep the components that were found, and complete them if some hold nothing."""
        self._regauge(found, moments)
        missing = found.of_left.shape[1] - self.module.rank
        if missing:
            self.grow(fresh_rows(self.module, missing))

    def grow(self, rows: Tensor) -> None:
        """Add components that read these inputs and write nothing yet."""
        grow_averages_(self.averages, self.module, rows)
        grow_(self.module, self.optimizer, rows)

    def begin_fade(self, found: Any, keep: int, step: int) -> None:
        """Order all components, and let those behind the first `keep` fade from now on."""
        self._regauge(found, "carry")
        self.fade = Fade(min(keep, self.module.rank), step)

    def _regauge(self, found: Any, moments: Moments) -> None:
        regauge_averages_(self.averages, self.module, found)
        regauge_(self.module, self.optimizer, found, moments=moments)

    def advance_fade(self, step: int, num_steps: int) -> bool:
        """Fade a little more.

        Returns:
            Whether the components are gone.
        """
        fade, layer = self.fade, self.module
        assert fade is not None
        left = max(0.0, 1 - (step - fade.begun) / num_steps)
        layer.gate[fade.keep : layer.rank] = left
        return left == 0

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the layer, as plain containers and CPU tensors."""
        fade, moment = self.fade, self.moment
        return {
            "state": asdict(self.state),
            "moment": None if moment is None else moment.to("cpu", copy=True),
            "probe": None if self.probe is None else self.probe.state_dict(),
            "fade": None if fade is None else asdict(fade),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the layer of then."""
        self.state = RankState(**saved["state"])
        device = self.module.gate.device
        self.moment = None if saved["moment"] is None else saved["moment"].to(device)
        if saved["probe"] is not None:
            self.probe = GrowthProbe.from_state_dict(self.module, saved["probe"])
        self.fade = None if saved["fade"] is None else Fade(**saved["fade"])


def components_of(layer: RankLayer, keep: int, moment: Tensor | None, shrink: Shrink) -> Any:
    """What `RankLayer.shrink` or `RankLayer.begin_fade` needs, the same on all ranks or shared."""
    if shrink == "cut":
        return best_components(layer.module, keep, moment=moment)
    return best_components(layer.module, layer.module.rank, moment=moment, is_balanced=False)
