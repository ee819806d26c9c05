"""Keeping a part of a weight as it is while an optimizer trains the rest.

Lives here: taking that part out of gradients and momentum, and putting it back into the weight.
Does not live here: when a layer is protected, and which directions count as principal.
"""

from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_lightning.linalg import PrincipalPart, Side, principal_part

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
"""Optimizer states that are a running mean of gradients, and so steer the next update: those of
`torch.optim` (SGD, Muon; Adam and its relatives) and of this library."""


class ProtectedPart:
    """The principal part of a weight ``W``, and how to keep it.

    For bases ``U`` and ``V`` of ``k`` orthonormal columns each it keeps

    - ``"two_sided"``: ``U^T W`` and ``W V``, so that singular triplets in their span stay such,
    - ``"left"``: ``U^T W``, all that reaches the principal outputs,
    - ``"right"``: ``W V``, all that reads the principal inputs,
    - ``"block"``: ``U^T W V``, only how principal inputs reach principal outputs.

    What is kept is what the weight has at construction, exactly; the bases need not be its singular
    vectors to the last digit. Where half precision stores the weight, kept means to its rounding.

    Args:
        weight: Weight, shape ``(m, n)``.
        left: Basis ``U``, shape ``(m, k)``, orthonormal columns.
        right: Basis ``V``, shape ``(n, k)``, orthonormal columns.
        side: What is kept.

    Raises:
        ValueError: If `side` is unknown, or the shapes do not fit together.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, side: Side) -> None:
        if side not in get_args(Side):
            raise ValueError(f"`side` must be one of {', '.join(get_args(Side))}, got {side!r}.")
        self.left, self.right, self.side = left.clone(), right.clone(), side
        self._kept = self._part_of(weight)

    @property
    def num_principal(self) -> int:
        """Protected directions ``k``."""
        return self.left.shape[1]

    @torch.no_grad()
    def remove_(self, matrix: Tensor) -> None:
        """Take the part out of a gradient or a momentum in place, shape ``(m, n)``."""
        found = self._part_of(matrix).matrix(self.left, self.right)
        matrix.copy_(matrix.to(found.dtype) - found)

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        """Put the part back into the weight in place, whatever an optimizer has done to it."""
        lost = self._kept.minus(self._part_of(weight)).matrix(self.left, self.right)
        weight.copy_(weight.to(lost.dtype) + lost)

    def change(self, weight: Tensor) -> Tensor:
        """How far the weight's part has moved: ``||now - kept||_F / ||kept||_F``, 0-d tensor."""
        return self._part_of(weight).minus(self._kept).norm() / self._kept.norm()

    def state_dict(self) -> dict[str, Any]:
        """The part as CPU tensors."""
        tensors = {"left": self.left, "right": self.right, **self._kept._asdict()}
        saved = {n: None if t is None else t.to("cpu", copy=True) for n, t in tensors.items()}
        return {**saved, "side": self.side}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The part that `state_dict` described."""
        part = cls.__new__(cls)
        tensors = {n: t.to(device) for n, t in state.items() if isinstance(t, Tensor)}
        part.left, part.right, part.side = tensors["left"], tensors["right"], state["side"]
        part._kept = PrincipalPart(tensors.get("rows"), tensors.get("columns"))
        return part

    def _part_of(self, matrix: Tensor) -> PrincipalPart:
        return principal_part(matrix, self.left, self.right, self.side)


def first_moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Running means of a parameter's gradients, stored like the parameter.

    Empty before the optimizer's first step, and for optimizers without momentum. Second moments
    have no direction, and stay.
    """
    state = optimizer.state.get(parameter, {})
    found = (state.get(name) for name in FIRST_MOMENTS)
    return [moment for moment in found if isinstance(moment, Tensor)]
