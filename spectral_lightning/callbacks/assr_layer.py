"""What ASSR keeps of a layer, and the counts that sum up a run."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.callbacks.step_sizes import StepSizes
from spectral_lightning.control import (
    LayerReading,
    LayerVerdict,
    Regulator,
    RegulatorState,
    ThermostatVerdict,
)
from spectral_lightning.dashboards import Interventions
from spectral_lightning.spectra import Reading, Target
from spectral_lightning.spectra.tracker import SMALLEST

RANK_ONE = 1e-5
"""Excess of a float32 stable rank over 1 up to which a layer counts as of rank one."""

QUANTILE = 0.1
"""Smallest values left out of the condition number, as a fraction of all: in a square matrix the
very smallest one is a lottery (Edelman 1988), and says nothing of the layer."""


def num_left_out(count: int) -> int:
    """How many of the smallest singular values are left out of the condition number."""
    return math.ceil(QUANTILE * count) if count > 1 else 0


@dataclass(slots=True)
class Layer:
    """One layer under ASSR."""

    target: Target
    state: RegulatorState = field(default_factory=RegulatorState)
    verdict: LayerVerdict | None = None
    """Latest verdict; None before the first, while calibrating, and where it is not looked at."""
    reading: Reading | None = None
    """Reading that the verdict is about."""
    applied: Tensor | None = None
    """Sum of ``||step||_F / ||W||_F`` of all steps taken, 0-d, on the layer's device."""
    num_interventions: int = 0
    """Steps taken."""
    num_skipped: int = 0
    """Readings that failed."""

    @property
    def is_outside(self) -> bool:
        """Whether a thermostat of the layer is on."""
        return self.state.rank.side != 0 or self.state.condition.side != 0

    @property
    def is_readable(self) -> bool:
        """Whether the latest reading could be taken."""
        return self.reading is not None and self.reading.failure is None

    @property
    def is_rank_one(self) -> bool:
        """Whether all but the leading singular value are rounding."""
        return self.reading is not None and self.reading.stable_rank < 1 + RANK_ONE

    def add_applied(self, size: Tensor) -> None:
        """Count a step of a relative size."""
        size = size.double()
        self.applied = size if self.applied is None else self.applied + size
        self.num_interventions += 1

    def interventions(self) -> Interventions:
        """What has been done to the layer so far; waits for the device."""
        bands, rank, condition = self.state.bands, self.state.rank, self.state.condition
        relative = None if self.reading is None else self.reading.relative_stable_rank
        return Interventions(
            name=self.target.name,
            relative_stable_rank=relative,
            floor=None if bands is None else bands[0].floor,
            side=rank.side or condition.side,
            severity=max(rank.severity, condition.severity),
            strength=max(rank.strength, condition.strength),
            num_interventions=self.num_interventions,
            num_skipped=self.num_skipped,
            applied=0.0 if self.applied is None else self.applied.item(),
        )

    def state_dict(self) -> dict[str, Any]:
        """State as plain containers."""
        return {
            "state": self.state.to_dict(),
            "verdict": self.verdict and [verdict and str(verdict) for verdict in self.verdict],
            "reading": None if self.reading is None else asdict(replace(self.reading, values=None)),
            "applied": 0.0 if self.applied is None else self.applied.item(),
            "num_interventions": self.num_interventions,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.state = RegulatorState.from_dict(state["state"])
        if state["verdict"] is not None:
            rank, condition = state["verdict"]
            known = None if condition is None else ThermostatVerdict(condition)
            self.verdict = LayerVerdict(ThermostatVerdict(rank), known)
        self.reading = None if state["reading"] is None else Reading(**state["reading"])
        device = self.target.stored().device
        if state["num_interventions"]:
            self.applied = torch.tensor(state["applied"], dtype=torch.float64, device=device)
        self.num_interventions = state["num_interventions"]
        self.num_skipped = state["num_skipped"]


@dataclass(slots=True)
class Counts:
    """Counts of a run."""

    rank: int = 0
    """Steps taken against a stable rank outside its band, over all layers."""
    condition: int = 0
    """Steps taken against a condition number above its ceiling, over all layers."""
    steps: int = 0
    """Optimizer steps seen."""
    steps_acted: int = 0
    """Optimizer steps with at least one step of ours."""

    def as_v15(self) -> dict[str, float]:
        """Counts under the names of ASSR v1.5; `total_reg_loss` is 0: nothing enters the loss."""
        return {
            "rank_int": self.rank,
            "cond_int": self.condition,
            "total_int": self.rank + self.condition,
            "total_reg_loss": 0.0,
            "steps_with_int": self.steps_acted,
        }

    def summary(self, *, num_layers: int, config: Any) -> dict[str, Any]:
        """Summary under the names of ASSR v1.5."""
        return {
            "rank_interventions": self.rank,
            "condition_interventions": self.condition,
            "total_interventions": self.rank + self.condition,
            "steps_with_intervention": self.steps_acted,
            "intervention_rate": self.steps_acted / self.steps if self.steps else 0.0,
            "total_reg_loss": 0.0,
            "avg_reg_loss_per_step": 0.0,
            "num_linear_layers": num_layers,
            "config": config,
        }

    def state_dict(self) -> dict[str, int]:
        """Counts by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from saved counts."""
        for part in fields(self):
            setattr(self, part.name, state[part.name])


def sensors(reading: Reading, *, spectrum_is_due: bool) -> LayerReading:
    """What a regulator looks at; NaN for what could not be measured.

    Spectra that others asked for in between are passed over: decisions do not depend on them.
    """
    if reading.failure is not None:
        return LayerReading(math.nan, 1.0, math.nan)
    fresh = spectrum_is_due and reading.spectrum_step == reading.step
    return LayerReading(
        reading.relative_stable_rank,
        reading.stable_rank / reading.relative_stable_rank,
        reading.frobenius_norm,
        _quantile_condition(reading.values) if fresh and reading.values else None,
    )


def sampled(layers: Mapping[str, Layer], ratio: float, step: int) -> list[str]:
    """Layers to look at after a step; drawn from the step alone, so the same on all ranks."""
    names = list(layers)
    if ratio == 1:
        return names
    for layer in layers.values():
        layer.verdict = None
    count = max(1, int(ratio * len(names)))
    return random.Random(step).sample(names, min(count, len(names)))


def kept_waiting(old: LayerVerdict | None, new: LayerVerdict | None) -> LayerVerdict | None:
    """New verdict, with an old one on the condition number that has not been carried out yet."""
    if old is None or new is None or new.condition_number is not None:
        return new
    return new._replace(condition_number=old.condition_number)


def has_failed(reading: Reading) -> bool:
    """Whether a weight could not be measured for a reason other than being zero.

    One that starts at zero, as in LoRA or the last projections of a GPT, soon moves by itself.
    """
    return reading.failure is not None and not reading.frobenius_norm < SMALLEST


def _quantile_condition(values: Sequence[float]) -> float:
    """Condition number without the smallest values (`QUANTILE`)."""
    smallest = values[len(values) - 1 - num_left_out(len(values))]
    return values[0] / smallest if smallest > 0 else math.inf


def why_left_alone(target: Target, sizes: StepSizes) -> str | None:
    """Why a layer that is measured is not acted on; None if it is."""
    parameter = target.parameter
    if parameter is None:
        return "has a weight that is computed from others"
    return "is frozen" if not target.trainable else sizes.why_not(parameter)


def check_kinds(layers: object, regulator: object) -> None:
    """Refuse settings of another kind, such as those of ASSR v1.5.

    Raises:
        TypeError: If `layers` are no globs, or `regulator` is no `Regulator`.
    """
    if not isinstance(layers, str | list | tuple):
        raise TypeError(
            f"`layers` must be one or more globs, got {layers!r}; settings of ASSR v1.5 go into"
            " `legacy_assr(config)`."
        )
    if not isinstance(regulator, Regulator):
        raise TypeError(
            f"`regulator` must be a Regulator, got {regulator!r}; settings of ASSR v1.5 have one by"
            " `config.regulator()`."
        )
