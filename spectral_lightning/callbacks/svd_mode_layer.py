"""What `SVDModeSwitch` keeps of a layer: its mode, its protected part, the analysis under way."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_lightning.actuators import ProtectedPart, Side, first_moments
from spectral_lightning.control import Mode, ModePolicy, ModeReading, ModeState
from spectral_lightning.nn import FactoredLinear
from spectral_lightning.spectra import LayerAnalysis, SingularTriplets, Target, VectorCache
from spectral_lightning.spectra.mode_measures import (
    Measures,
    PrincipalWeight,
    effect_measures,
    intent_measures,
    principal_weight,
    rotation_measures,
    spectrum_measures,
)

NO_STEP = "the optimizer took no step"
NOT_FINITE = "the gradient or the weight has a NaN or infinite entry"
ZERO = "the gradient or the weight is zero"


Share = Callable[[SingularTriplets], SingularTriplets]

SMALLEST_SIZE = 4
"""Smallest ``min(m, n)`` that can be split into principal and minor directions."""


@dataclass(slots=True)
class Analysis:
    """An analysis under way: begun with the gradient, ended after the optimizer's step."""

    step: int
    triplets: SingularTriplets
    before: Tensor
    """The weight before the step."""
    principal: PrincipalWeight | None = None
    """The same, with the principal directions that the policy has chosen."""
    num_principal: int = 0
    values: list[float] = field(default_factory=list)
    total: float = 0.0
    """Root of what the squares of all values would add up to."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What has been measured, on the host."""


@dataclass(slots=True)
class ModeLayer:
    """One layer under mode switching."""

    target: Target
    optimizer: Optimizer
    side: Side
    analysed: int
    """Optimizer step of the latest analysis that was due."""
    state: ModeState = field(default_factory=ModeState)
    part: ProtectedPart | None = None
    previous_values: list[float] | None = None
    previous_basis: Tensor | None = None
    num_skipped: int = 0
    num_protected: int = 0
    """Optimizer steps taken in low-rank mode."""
    refresh: bool = True
    """Whether each analysis in low-rank mode chooses the principal directions anew."""
    analysis: Analysis | None = None

    @property
    def size(self) -> int:
        """``min(m, n)``."""
        return min(self.target.shape)

    @property
    def parameter(self) -> nn.Parameter:
        """Parameter whose gradient is that of the weight."""
        parameter = parameter_of(self.target)
        assert parameter is not None
        return parameter

    def begin_fit(self) -> None:
        """Begin with the weight as the fit finds it."""

    def before_step(self) -> None:
        """Take the protected part out of the gradient."""
        gradient = self.parameter.grad
        if self.part is not None and gradient is not None:
            with self.target.editing(gradient) as matrix:
                self.part.remove_(matrix)

    def after_step(self) -> None:
        """Put the protected part back into the weight, within the optimizer's step."""
        if self.part is not None:
            with self.target.editing() as weight:
                self.part.restore_(weight)
            self.num_protected += 1

    def begin(self, step: int, vectors: VectorCache, policy: ModePolicy) -> Tensor | None:
        """Decompose the weight.

        Returns:
            Its Frobenius norm (or another `total`) and its leading singular values, on the device;
            None for a weight that is not finite.
        """
        weight = self.target.matrix()
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
        if not bool(torch.isfinite(norm)):
            return None
        if self.part is not None and not self.refresh and not policy.needs_all_values:
            seen = weight.to(self.part.right.dtype) @ self.part.right  # judged is what is protected
            sizes = torch.linalg.vector_norm(seen, dim=0)
            triplets = SingularTriplets(self.part.left, sizes, self.part.right)
        else:
            triplets = self.triplets(vectors, policy)
        self.analysis = Analysis(step, triplets, weight.clone())
        return torch.cat([self.total(norm).reshape(1), triplets.values.double()])

    def total(self, weight_norm: Tensor) -> Tensor:
        """Root of what the squares of all values would add up to."""
        return weight_norm

    def triplets(self, vectors: VectorCache, policy: ModePolicy) -> SingularTriplets:
        """Principal directions, most important first: as many as the policy might choose."""
        if policy.needs_all_values:
            return vectors.all(self.target.name)
        return vectors.leading(self.target.name, policy.most_principal(self.size))

    def basis(self, triplets: SingularTriplets) -> Tensor:
        """The vectors whose turning is reported."""
        return triplets.left

    def measure_intent(self, numbers: Sequence[float], policy: ModePolicy) -> Measures:
        """Choose the principal directions, and measure weight and gradient."""
        found, gradient = self.analysis, self.parameter.grad
        assert found is not None
        assert gradient is not None
        found.total, *found.values = numbers
        k = policy.num_principal(self.state, found.values, found.total, self.size)
        triplets, k = found.triplets, min(k, len(found.values))
        if self.part is not None and not self.refresh:
            k = self.part.num_principal
        found.num_principal = k
        total = torch.full_like(triplets.values[0], found.total, dtype=torch.float64)
        found.principal = principal_weight(found.before, triplets, k)
        measures = spectrum_measures(triplets, total, k, self.size)
        measures["weight_norm"] = found.principal.norm
        measures |= intent_measures(self.target.matrix(gradient), found.principal, self.side)
        if self.previous_basis is not None and self.previous_basis.shape[1] >= k:
            previous = self.previous_basis.to(triplets.left.device)
            measures |= rotation_measures(previous, self.basis(triplets), k)
        return measures

    def measure_effect(self) -> Measures:
        """Measure the step that the optimizer has taken since `begin`."""
        found, weight = self.analysis, self.target.matrix()
        assert found is not None
        assert found.principal is not None
        before = found.principal.matrix
        measures = effect_measures(weight.to(before.dtype) - before, found.principal, self.side)
        if self.part is not None:
            measures["protected_change"] = self.part.change(weight)
        return measures

    def why_not(self) -> str | None:
        """Why the numbers of the analysis say nothing; None if they do."""
        assert self.analysis is not None
        numbers = self.analysis.numbers
        if not all(math.isfinite(numbers[name]) for name in ("gradient_norm", "update_norm")):
            return NOT_FINITE
        if numbers["gradient_norm"] == 0 or numbers["weight_norm"] == 0:
            return ZERO
        return NO_STEP if numbers["update_norm"] == 0 else None

    def decide(self, policy: ModePolicy, loss: float | None) -> LayerAnalysis:
        """Let the policy decide; `protect` carries it out."""
        assert self.analysis is not None
        found, old = self.analysis, self.state
        self.state, verdict = policy.update(old, _reading(found, self))
        if self.part is not None and self.state.mode is Mode.LOW_RANK and not self.refresh:
            self.state = replace(self.state, rank=self.size - self.part.num_principal)
        rank = self.size - found.num_principal
        return LayerAnalysis(
            step=found.step,
            layer=self.target.name,
            mode=str(old.mode),
            rank=rank,
            num_principal=found.num_principal,
            next_mode=str(self.state.mode),
            next_rank=rank if self.state.rank is None else self.state.rank,
            verdict=str(verdict),
            loss=loss,
            measures=dict(found.numbers),
        )

    def protect(self, vectors: VectorCache, share: Share) -> None:
        """Protect the principal directions of now, or none, as the state says.

        The weight itself stays as it is; what momentum there is in the protected part, of then or
        of now, is taken out.

        Args:
            vectors: Singular vectors of the weight as it is now, for those who need more of them.
            share: Makes tensors those of rank 0.
        """
        assert self.analysis is not None
        self.remove_momentum()  # such as an L2 penalty has left there
        if self.state.mode is Mode.FULL or self.state.rank is None:
            self.part = None
            return
        k, triplets = self.size - self.state.rank, share(self.analysis.triplets)
        weight = self.target.matrix()
        self.part = ProtectedPart(weight, triplets.left[:, :k], triplets.right[:, :k], self.side)
        self.remove_momentum()

    def remove_momentum(self) -> None:
        """Take the protected part out of the optimizer's running means."""
        part = self.part
        if part is None:
            return
        for moment in first_moments(self.optimizer, self.parameter):
            with self.target.editing(moment) as matrix:
                part.remove_(matrix)

    def end(self, policy: ModePolicy) -> None:
        """Keep what the next analysis compares with."""
        assert self.analysis is not None
        found, self.analysis = self.analysis, None
        keep = len(found.values)
        if policy.needs_all_values:  # of many, only as many vectors as will be looked at
            keep = policy.num_principal(self.state, found.values, found.total, self.size)
        self.previous_values = found.values
        self.previous_basis = self.basis(found.triplets)[:, :keep].clone()

    def state_dict(self) -> dict[str, Any]:
        """All but the analysis under way, as plain containers and CPU tensors."""
        left = self.previous_basis
        return {
            "analysed": self.analysed,
            "state": asdict(self.state) | {"mode": str(self.state.mode)},
            "part": None if self.part is None else self.part.state_dict(),
            "previous_values": self.previous_values,
            "previous_basis": None if left is None else left.to("cpu", copy=True),
            "num_skipped": self.num_skipped,
            "num_protected": self.num_protected,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state; the protection is that of the checkpoint."""
        for name in ("analysed", "num_skipped", "num_protected", "previous_values"):
            setattr(self, name, saved[name])
        self.previous_basis = saved["previous_basis"]
        self.state = ModeState(**{**saved["state"], "mode": Mode(saved["state"]["mode"])})
        if saved["part"] is not None:
            self.part = ProtectedPart.from_state_dict(saved["part"], self.target.matrix().device)


def _reading(found: Analysis, layer: ModeLayer) -> ModeReading:
    """What a policy looks at; the effect only in full mode, as protection takes it away."""
    numbers, is_full = found.numbers, layer.state.mode is Mode.FULL
    return ModeReading(
        step=found.step,
        size=layer.size,
        num_principal=found.num_principal,
        values=found.values,
        previous_values=layer.previous_values,
        subspace_angle=numbers.get("subspace_angle"),
        principal_alignment=numbers["principal_alignment"],
        minor_alignment=numbers["minor_alignment"],
        reconstruction_error=numbers["reconstruction_error"],
        intent_lift=numbers["intent_lift"],
        intent_erosion=numbers["intent_erosion"],
        effect_lift=numbers["effect_lift"] if is_full else None,
        effect_erosion=numbers["effect_erosion"] if is_full else None,
    )


def parameter_of(target: Target) -> nn.Parameter | None:
    """Parameter that gets the gradient of a target's whole weight; None if there is none."""
    if isinstance(target.module, FactoredLinear):
        return target.module.get_parameter("weight")
    return target.parameter


def trained_by(target: Target, optimizers: Iterable[Optimizer]) -> Optimizer | str:
    """The optimizer that trains a layer, or why the layer cannot be switched."""
    parameter = parameter_of(target)
    if parameter is None:
        return "has a weight that is computed from others"
    if min(target.shape) < SMALLEST_SIZE:
        return f"has fewer than {SMALLEST_SIZE} rows or columns"
    if not target.trainable:
        return "is frozen"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(own is parameter for own in group["params"]):
                return optimizer
    return "is trained by no optimizer"
