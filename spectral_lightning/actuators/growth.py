"""Measuring whether a low-rank layer needs components that it does not have.

Lives here: probes, which cost a few columns and leave the function alone. Does not live here:
what follows from the measurement (`control`), and adding components (`resize`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.actuators.resize import fresh_rows, gathered_factors
from spectral_lightning.linalg import orthonormalize, singular_triplets, whole_tensor
from spectral_lightning.nn import LowRankLinear


class GrowthProbe:
    """Unused components of a layer as probes for the part of its gradient that it cannot follow.

    To first order a layer ``W = U V`` moves within ``dU V + U dV``. Of the gradient ``G`` that
    leaves out ``(I - P_U) G (I - P_V)``, with the projections onto the spans of ``U`` and ``V``. A
    probe reads random inputs ``R`` outside of the span of ``V`` and writes nothing (its columns of
    ``U`` are zero), so that the function stays as it is and backpropagation delivers ``G R^T`` as
    the gradient of those columns: averaged over ranks, accumulated and unscaled like any other.
    `take_` keeps it, and takes it away before the optimizer or clipping sees it.

    Args:
        layer: Layer with a capacity above its rank.
        num: Probes, cut at what the capacity leaves.
        rows: Inputs that the layer's unused components read already, as of an earlier
            `state_dict`; None for random ones.
        seed: Seed of the random ones.

    Raises:
        ValueError: If the layer has no unused component.
    """

    def __init__(
        self, layer: LowRankLinear, num: int, *, rows: Tensor | None = None, seed: int = 0
    ) -> None:
        free = min(num, layer.capacity - layer.rank)
        if free < 1:
            raise ValueError(
                f"`layer` must have a capacity above its rank, got {layer.capacity} and"
                f" {layer.rank}."
            )
        left, _ = gathered_factors(layer)
        is_new = rows is None
        if rows is None:
            generator = torch.Generator().manual_seed(seed)
            rows = fresh_rows(layer, free, generator=generator)
        self.rows = rows.to(left)
        self.outputs = orthonormalize(left)
        """Basis of what the layer writes, shape ``(m, rank)``."""
        self.total = torch.zeros(left.shape[0], len(rows), dtype=left.dtype, device=left.device)
        self.energy = torch.zeros((), dtype=torch.float64, device=left.device)
        self.num_steps = 0
        layer.set_probes(len(rows))
        if is_new:
            with torch.no_grad():
                with whole_tensor(layer.right_factor) as right:
                    right[self._span(layer)] = self.rows.to(right.dtype)
                with whole_tensor(layer.left_factor) as left:
                    left[:, self._span(layer)] = 0

    @torch.no_grad()
    def take_(self, layer: LowRankLinear) -> None:
        """Keep the gradient of this optimizer step's probes, and take it away.

        Args:
            layer: The layer, whose gradients are complete; those of the probes become zero.
        """
        if layer.left_factor.grad is None:
            return
        span = self._span(layer)
        with whole_tensor(layer.left_factor.grad) as whole:
            found = whole[:, span].to(self.total.dtype)
            found = found - self.outputs @ (self.outputs.mT @ found)
            self.total += found
            self.energy += torch.linalg.vector_norm(found).double().square()
            whole[:, span] = 0
        self.num_steps += 1

    @torch.no_grad()
    def end_(self, layer: LowRankLinear) -> None:
        """Make the probes unused components again."""
        _clear_unused_(layer)

    def lift(self) -> Tensor:
        """Growth lift: energy of the sum of the gradients over the sum of their energies.

        Returns:
            0-d, float64, in ``[0, num_steps]``: 1 on average for unrelated gradients, the number of
            steps for one that stayed the same; NaN if there was none.
        """
        return torch.linalg.vector_norm(self.total).double().square() / self.energy

    def directions(self) -> Tensor:
        """Inputs that the averaged gradient wants to be read, most wanted first.

        Returns:
            Rows, shape ``(probes, in_features)``: combinations of the probes.

        Raises:
            ValueError: If the gradients were not finite.
        """
        return singular_triplets(self.total).right.mT @ self.rows

    def state_dict(self) -> dict[str, Any]:
        """All as plain numbers and CPU tensors."""
        tensors = {n: getattr(self, n) for n in ("rows", "outputs", "total", "energy")}
        saved: dict[str, Any] = {n: part.to("cpu", copy=True) for n, part in tensors.items()}
        return {**saved, "num_steps": self.num_steps}

    @classmethod
    def from_state_dict(
        cls, layer: LowRankLinear, saved: Mapping[str, Any]
    ) -> "GrowthProbe | None":
        """Go on with a saved window, on a layer with the factors of then.

        Args:
            layer: Layer, perhaps of another capacity than then.
            saved: As of `state_dict`.

        Returns:
            The probe; None if the capacity has no room for all of it any more, which ends it.
        """
        if len(saved["rows"]) > layer.capacity - layer.rank:
            _clear_unused_(layer)
            return None
        probe = cls(layer, len(saved["rows"]), rows=saved["rows"])
        for name in ("outputs", "total", "energy"):
            setattr(probe, name, saved[name].to(probe.total.device))
        probe.num_steps = saved["num_steps"]
        return probe

    def _span(self, layer: LowRankLinear) -> slice:
        return slice(layer.rank, layer.rank + len(self.rows))


@torch.no_grad()
def _clear_unused_(layer: LowRankLinear) -> None:
    with whole_tensor(layer.right_factor) as right:
        right[layer.rank :] = 0
    layer.set_probes(0)
