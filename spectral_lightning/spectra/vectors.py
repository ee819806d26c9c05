"""Singular vectors of single matrices, for those who act on them.

Lives here: warm starts of the blocks that are asked for. Does not live here: the per-step values of
all matrices, which need fewer vectors and never both sides (the tracker).
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype
from spectral_lightning.linalg.triplets import (
    SingularTriplets,
    leading_singular_triplets,
    singular_triplets,
    smallest_singular_triplets,
)
from spectral_lightning.spectra.target import Target

COLD_PASSES = 4
"""Passes over a matrix without a warm start: a Krylov space of 4 blocks. Set by hand."""
WARM_PASSES = 1
"""Passes over a matrix with one: a step of block power iteration."""


class VectorCache:
    """Singular vectors on request, of the weights as they are at that moment.

    Costs nothing until it is asked, then ``2 num_passes + 1`` products per request; keeps ``k n``
    numbers for each matrix and each ``k`` that was asked for. Never waits for the device, except
    for the smallest triplets and for more than 32 leading ones. Draws no random number from a
    global generator.

    Args:
        targets: All matrices by name; may grow.
        seed: Seed of the private generators, one per matrix and equal on all ranks.
    """

    def __init__(self, targets: Mapping[str, Target], *, seed: int = 0) -> None:
        self._targets = targets
        self._seed = seed
        self._starts: dict[str, dict[int, Tensor]] = {}

    def leading(self, name: str, k: int) -> SingularTriplets:
        """Leading triplets of a matrix.

        Args:
            name: Name of the matrix.
            k: Number of triplets; fewer are returned if the smaller side is shorter.

        Returns:
            Triplets in the compute dtype on the device of the weight; NaN if it is not finite.
        """
        weight = self._targets[name].matrix()
        k = min(k, *weight.shape)
        start, passes = self._starts.get(name, {}).get(k), WARM_PASSES
        if start is None or start.shape[1] != weight.shape[1]:
            start, passes = self._random(name, k, weight), COLD_PASSES
        found, following = leading_singular_triplets(
            weight, start.to(weight.device), num_passes=passes
        )
        self._starts.setdefault(name, {})[k] = following
        return found

    def all(self, name: str) -> SingularTriplets:
        """All triplets of a matrix, by a full decomposition that waits for the device.

        Raises:
            ValueError: If the matrix is not finite.
        """
        return singular_triplets(self._targets[name].matrix())

    def smallest(self, name: str, k: int) -> SingularTriplets:
        """Smallest triplets of a matrix, by a full decomposition that waits for the device."""
        weight = self._targets[name].matrix()
        return smallest_singular_triplets(weight, min(k, *weight.shape))

    def forget(self, name: str) -> None:
        """Start anew with a matrix that was overwritten."""
        self._starts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Warm starts by name and number of triplets, as CPU tensors."""
        return {
            name: {k: start.to("cpu", copy=True) for k, start in starts.items()}
            for name, starts in self._starts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the warm starts of the matrices that are still there."""
        self._starts = {n: dict(starts) for n, starts in state.items() if n in self._targets}

    def _random(self, name: str, k: int, weight: Tensor) -> Tensor:
        seed = zlib.crc32(f"{self._seed}/{name}".encode())
        generator = torch.Generator(weight.device).manual_seed(seed)
        rows = torch.empty(k, weight.shape[1], dtype=compute_dtype(weight), device=weight.device)
        return rows.normal_(std=1 / math.sqrt(weight.shape[1]), generator=generator)
