"""Mode switching that protects what a layer makes of the inputs that its gradients have read."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from spectral_lightning.callbacks.svd_mode_layer import ModeLayer
from spectral_lightning.control import Mode, ModePolicy
from spectral_lightning.spectra import SingularTriplets, VectorCache
from spectral_lightning.spectra.mode_measures import gradient_triplets, input_triplets

DECAY = 0.9
"""Weight of the past in the running mean over analyses: about ten of them count. Set by hand."""


@dataclass(slots=True)
class GradientModeLayer(ModeLayer):
    """A layer whose principal directions are the inputs that its gradients read in full mode.

    In low-rank mode they stay those of before, whatever the gradients are then.
    """

    inputs: tuple[Tensor, Tensor] | None = None
    """Values, shape ``(k,)``, and vectors, shape ``(n, k)``, of the gradients' second moment."""

    @override
    def total(self, weight_norm: Tensor) -> Tensor:
        """1: squares of values are shares of the gradients' energy."""
        return torch.ones_like(weight_norm)

    @override
    def triplets(self, vectors: VectorCache, policy: ModePolicy) -> SingularTriplets:
        """In full mode, take a new gradient into account."""
        gradient, weight = self.parameter.grad, self.target.matrix()
        assert gradient is not None
        matrix = self.target.matrix(gradient)
        norm = torch.linalg.vector_norm(matrix)
        if self.state.mode is Mode.FULL and bool(torch.isfinite(norm) & (norm > 0)):
            seed, k = zlib.crc32(self.target.name.encode()), policy.most_principal(self.size)
            past = self.inputs  # of a policy with fewer directions, it is no start
            found = gradient_triplets(
                matrix,
                weight,
                past if past is not None and len(past[0]) == k else None,
                k,
                decay=DECAY,
                generator=torch.Generator(matrix.device).manual_seed(seed),
            )
            self.inputs = found.values, found.right
            return found
        if self.inputs is None:  # the gradient says nothing, and the analysis will be skipped
            return ModeLayer.triplets(self, vectors, policy)
        return input_triplets(weight, *self.inputs)

    @override
    def basis(self, triplets: SingularTriplets) -> Tensor:
        """The inputs."""
        return triplets.right

    @override
    def state_dict(self) -> dict[str, Any]:
        inputs = self.inputs
        saved = None if inputs is None else [part.to("cpu", copy=True) for part in inputs]
        return {**ModeLayer.state_dict(self), "inputs": saved}

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        ModeLayer.load_state_dict(self, saved)
        if saved["inputs"] is not None:
            device = self.target.matrix().device
            values, vectors = (part.to(device) for part in saved["inputs"])
            self.inputs = values, vectors
