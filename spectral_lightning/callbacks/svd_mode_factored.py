"""Mode switching of layers whose minor directions are trained as a product of two factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.actuators import ProtectedPart, carry_moments, first_moments, share_moments
from spectral_lightning.callbacks.svd_mode_gradients import GradientModeLayer
from spectral_lightning.callbacks.svd_mode_layer import ModeLayer, Share, trained_by
from spectral_lightning.control import Mode
from spectral_lightning.nn import FactoredLinear
from spectral_lightning.spectra import SingularTriplets, Target, VectorCache

FACTORED = ("factored", "legacy")
CARRIED = (torch.optim.SGD, torch.optim.Adam, torch.optim.Muon)
"""Optimizers whose running means `carry_moments` knows, besides `MuonAdamW`; AdamW is an Adam."""
Protection = Literal["gradients", "two_sided", "left", "right", "block", "factored", "legacy"]


@dataclass(slots=True)
class FactoredModeLayer(ModeLayer):
    """A `FactoredLinear` under mode switching.

    In low-rank mode the optimizer trains the factors; the base, which holds the principal part,
    keeps receiving the exact gradient but is not stepped. The factors alone can still move the
    principal part: only projected ones cannot.
    """

    is_protected: bool = True
    """Whether factors, gradients and momentum are kept out of the principal subspaces; False as in
    the original."""
    held: tuple[Tensor, Tensor] | None = None
    """Gradient of the base in this step, and the norm of that of ``B`` before clipping."""

    @property
    def module(self) -> FactoredLinear:
        """The layer itself."""
        assert isinstance(self.target.module, FactoredLinear)
        return self.target.module

    @override
    def begin_fit(self) -> None:
        """Begin in full mode with one whole weight, unless a checkpoint says otherwise."""
        if self.part is None:
            self.module.merge_()
            share_moments(self.optimizer, self.module)

    @override
    def before_step(self) -> None:
        """Take the base's gradient away, and the protected part out of the factors'."""
        if self.part is None:
            return
        gradient, self.module.weight.grad = self.module.weight.grad, None
        B, A = self.module.left_factor, self.module.right_factor
        self._project([B.grad], [A.grad])
        if gradient is not None and B.grad is not None:
            self.held = gradient, torch.linalg.vector_norm(B.grad)

    @override
    def after_step(self) -> None:
        """Keep the factors out of the protected part, and average the base's gradient along.

        It is scaled as clipping has scaled that of ``B``: a norm clips all gradients by one factor.
        """
        held, self.held = self.held, None
        grad = self.module.left_factor.grad
        if held is not None and grad is not None:
            gradient, norm = held
            scale = torch.linalg.vector_norm(grad) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            if bool(torch.isfinite(gradient).all() & torch.isfinite(scale)):
                carry_moments(self.optimizer, self.module, gradient * scale)
        if self.part is not None:
            self._project([self.module.left_factor], [self.module.right_factor])
            self.num_protected += 1

    @override
    def protect(self, vectors: VectorCache, share: Share) -> None:
        """Split the weight anew, or make it one again; its value stays as it is."""
        assert self.analysis is not None
        self.module.merge_()
        self.part = None
        if self.state.mode is Mode.LOW_RANK and self.state.rank is not None:
            k = self.size - self.state.rank
            left, values, right = share(vectors.all(self.target.name))
            self.module.split_(left[:, k:], values[k:], right[:, k:])
            weight = self.module.spectral_weight()
            self.part = ProtectedPart(weight, left[:, :k], right[:, :k], "two_sided")
        share_moments(self.optimizer, self.module)
        self.remove_momentum()

    @override
    def remove_momentum(self) -> None:
        """Keep the factors' running means out of the protected part."""
        B, A = self.module.left_factor, self.module.right_factor
        self._project(first_moments(self.optimizer, B), first_moments(self.optimizer, A))

    @torch.no_grad()
    def _project(self, lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]) -> None:
        """Take the principal directions out of what is stored like ``B`` and like ``A``."""
        if self.part is None or not self.is_protected:
            return
        U, V = self.part.left, self.part.right
        for B in lefts:
            if B is not None:
                B.sub_(U @ (U.mT @ B))
        for A in rights:
            if A is not None:
                A.sub_((A @ V) @ V.mT)


def layer_of(
    target: Target, optimizers: Sequence[Optimizer], protection: Protection, step: int
) -> ModeLayer | str:
    """What to keep of a layer, or why it cannot be protected in this way."""
    optimizer = trained_by(target, optimizers)
    if isinstance(optimizer, str):
        return optimizer
    is_factored = isinstance(target.module, FactoredLinear)
    if protection == "factored" or protection == "legacy":
        if not is_factored:
            return "is no linear layer that could be factored"
        if not isinstance(optimizer, CARRIED) and type(optimizer).__name__ != "MuonAdamW":
            return f"is trained by {type(optimizer).__name__}, whose means cannot be carried along"
        if isinstance(target.module.weight, DTensor):
            return f"is sharded, which `protection={protection!r}` cannot be; take 'two_sided'"
        return FactoredModeLayer(
            target, optimizer, "two_sided", step, is_protected=protection == "factored"
        )
    if is_factored:
        return "is a FactoredLinear, which needs `protection='factored'`"
    if protection == "gradients":
        return GradientModeLayer(target, optimizer, "right", step)
    return ModeLayer(target, optimizer, protection, step)


def layers_of(
    targets: Mapping[str, Target],
    optimizers: Sequence[Optimizer],
    protection: Protection,
    step: int,
) -> dict[str, ModeLayer]:
    """What to keep of each layer that can be switched; the others are named with the reason."""
    layers = {}
    for name, target in targets.items():
        found = layer_of(target, optimizers, protection, step)
        if isinstance(found, ModeLayer):
            layers[name] = found
        else:
            rank_zero_info(f"SVDModeSwitch: {name} always trains as it is, since it {found}.")
    return layers


def of_rank_zero(trainer: pl.Trainer, triplets: SingularTriplets) -> SingularTriplets:
    """Triplets of rank 0 on all ranks: decompositions may differ in their last digits."""
    if trainer.world_size == 1:
        return triplets
    found = trainer.strategy.broadcast([part.cpu() for part in triplets])
    return SingularTriplets(*(part.to(triplets.values.device) for part in found))
