"""A linear layer whose weight is a sum: a dense base and a product of two factors."""

from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from spectral_lightning.nn.conversion import replace_module


class FactoredLinear(nn.Linear):
    """Linear layer ``x (W + B A)^T + b``, of which either ``W`` or ``B A`` is trained.

    The form in which the adaptive SVD that this library started from trains a layer's minor
    singular directions. All three matrices exist from the start, at a fixed size, so that wrappers
    (DDP, FSDP), optimizers and `torch.compile` never see a change: in full mode both factors are
    zero, and so are their gradients; in low-rank mode `split_` has put the principal part of the
    weight into ``W`` and the rest into ``B A``, and whoever trains has to take ``W.grad``, which is
    the exact gradient of the whole weight, away before the optimizer's step.

    The product is formed outside autocast, in the parameters' own precision.

    Args:
        in_features: Size of the inputs.
        out_features: Size of the outputs.
        bias: Whether there is an additive bias.
        max_rank: Most columns of ``B``; None for one less than the smaller side.
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        ValueError: If `max_rank` is not in ``[1, min(in_features, out_features)]``.

    Attributes:
        left_factor: ``B``, shape ``(out_features, max_rank)``, zero at first.
        right_factor: ``A``, shape ``(max_rank, in_features)``, zero at first.
    """

    left_factor: nn.Parameter
    right_factor: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        max_rank: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        size = min(in_features, out_features)
        rank = max(1, size - 1) if max_rank is None else max_rank
        if not 1 <= rank <= size:
            raise ValueError(f"`max_rank` must be in [1, {size}], got {rank}.")
        device, dtype = self.weight.device, self.weight.dtype
        shapes = {"left_factor": (out_features, rank), "right_factor": (rank, in_features)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    @classmethod
    def from_linear(cls, linear: nn.Linear, max_rank: int | None = None) -> Self:
        """A layer with the very parameters of a linear layer, and factors of zero."""
        weight = linear.weight
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            max_rank,
            device="meta",
            dtype=weight.dtype,
        )
        made.weight, made.bias = weight, linear.bias
        for name in ("left_factor", "right_factor"):
            shape = getattr(made, name).shape
            factor = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
            setattr(made, name, nn.Parameter(factor, requires_grad=weight.requires_grad))
        return made.train(linear.training)

    def spectral_weight(self) -> Tensor:
        """The whole weight ``W + B A``, shape ``(out_features, in_features)``."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight, self.left_factor, self.right_factor)

    @property
    def W(self) -> Tensor:
        """The whole weight, under the original's name."""
        return self.spectral_weight()

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Apply the whole weight, shape ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.spectral_weight(), self.bias)

    @torch.no_grad()
    def split_(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        """Put a part of the weight, given by its singular triplets, into the factors.

        ``B = U sqrt(S)`` and ``A = sqrt(S) V^T``, unused columns zero; ``W`` takes up the rest, so
        that the whole stays as it is to rounding.

        Args:
            left: ``U``, shape ``(out_features, r)`` with ``r <= max_rank``, orthonormal columns.
            values: ``S``, shape ``(r,)``.
            right: ``V``, shape ``(in_features, r)``, orthonormal columns.

        Raises:
            ValueError: If there are more triplets than columns.
        """
        rank, most = len(values), self.left_factor.shape[1]
        if rank > most:
            raise ValueError(f"`values` must be at most max_rank = {most} values, got {rank}.")
        whole, root = self.spectral_weight(), values.sqrt()
        self.left_factor.zero_()[:, :rank] = left * root
        self.right_factor.zero_()[:rank] = (right * root).mT
        self.weight.copy_(whole - self.left_factor @ self.right_factor)

    @torch.no_grad()
    def merge_(self) -> None:
        """Put the whole weight into ``W``; the factors become zero."""
        self.weight.copy_(self.spectral_weight())
        self.left_factor.zero_()
        self.right_factor.zero_()

    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, for export."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.spectral_weight().detach().clone())
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made.train(self.training)


def add_factors(model: nn.Module, modules: Collection[nn.Module]) -> list[str]:
    """Make `FactoredLinear` layers of a model's linear layers, before an optimizer is built.

    The parameters stay the same objects, and the function the same.

    Args:
        model: Model; overwritten.
        modules: The layers to convert; what is no plain ``nn.Linear`` stays.

    Returns:
        Names of the layers converted.
    """
    converted = []
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module in modules:
            replace_module(model, module, FactoredLinear.from_linear(module))
            converted.append(name)
    return converted
