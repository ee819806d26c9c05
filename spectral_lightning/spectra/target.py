"""One weight matrix of a model: where it is stored, how it is read and edited.

A target holds its module, not its tensor: the parameter may be re-registered by a strategy after
discovery.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.nn.utils.parametrize import is_parametrized

from spectral_lightning.linalg import product_core, whole_tensor


class Product(Protocol):
    """A module whose weight is ``U V``, such as `LowRankLinear`."""

    @property
    def capacity(self) -> int:
        """Most components that it can have."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Active factors ``U``, shape ``(m, rank)``, and ``V``, shape ``(rank, n)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One weight matrix of a model, as ``(m, n) = (out_features, in_features)``."""

    name: str
    """Unique name: the module's, with wrappers left out, then the part, e.g. ``attn.qkv.q``."""
    module: nn.Module
    """Module that owns the weight."""
    attribute: str = "weight"
    """Attribute of the module that holds the weight; a method is called."""
    transposed: bool = False
    """True for layers that store ``(in_features, out_features)``, like Hugging Face's Conv1D."""
    expert: int | None = None
    """Index in a stack of experts, for a weight of shape ``(experts, m, n)``."""
    rows: tuple[int, int] | None = None
    """First and one-past-last row of a part of a fused projection."""

    def stored(self) -> Tensor:
        """The module's tensor as it is stored now, whole and detached.

        A parametrized weight is computed as in evaluation: in training, torch's own
        `spectral_norm` would move its buffers at every look.
        """
        own = self.module._parameters.get(self.attribute)
        if own is not None:
            return own.detach()
        with torch.no_grad(), _in_evaluation(self.parametrization):
            value = getattr(self.module, self.attribute)
            tensor: Tensor = value() if callable(value) else value
        return tensor.detach()

    @property
    def parametrization(self) -> nn.Module | None:
        """What `torch.nn.utils.parametrize` computes the weight by; None for a plain weight."""
        if not is_parametrized(self.module, self.attribute):
            return None
        owners: nn.ModuleDict = self.module.parametrizations  # type: ignore[assignment]
        return owners[self.attribute]

    def matrix(self, stored: Tensor | None = None) -> Tensor:
        """The weight as it is now: a detached view of shape ``(m, n)`` wherever one is possible.

        A sharded parameter (DTensor) is gathered: every rank gets the whole matrix. A weight on
        an Apple GPU, which has no float64, is copied to the CPU.

        Args:
            stored: Tensor stored like the parameter to see instead, such as its gradient.
        """
        return self._part_of(gathered(self.stored() if stored is None else stored.detach()))

    @property
    def product(self) -> "Product | None":
        """The module, if its weight is a product of thin factors, which need not be formed."""
        is_product = callable(getattr(self.module, "factors", None))
        return cast("Product", self.module) if is_product else None

    def measured(self, *, padded: bool = False) -> Tensor:
        """A matrix with the singular values of the weight: the weight itself, or a product's core.

        Args:
            padded: Whether the core is padded with zeros to the shape `measured_shape`, which it
                has whatever the rank of the product.
        """
        product = self.product
        if product is None:
            return self.matrix()
        with torch.no_grad():
            left, right = map(gathered, product.factors())
        core = product_core(left, right)
        m, n = self.measured_shape
        rest = (n - core.shape[1], m - core.shape[0])
        return pad(core, (0, rest[0], 0, rest[1])) if padded else core

    @property
    def measured_shape(self) -> tuple[int, int]:
        """Shape of what is measured at the largest rank."""
        (m, n), product = self.shape, self.product
        most = max(m, n) if product is None else product.capacity
        return (min(m, most), min(n, most))

    @contextmanager
    def editing(self, stored: Tensor | None = None) -> Iterator[Tensor]:
        """The weight, shape ``(m, n)``, for edits in place; only where there is a `parameter`.

        A sharded one is gathered, and each rank keeps its shard of the result: all ranks have to
        make the same edit.

        Args:
            stored: Tensor stored like the parameter to edit instead, such as its gradient.
        """
        with whole_tensor(self.stored() if stored is None else stored) as whole:
            yield self._part_of(whole)

    def _part_of(self, tensor: Tensor) -> Tensor:
        """View of the target's matrix in the whole tensor."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        tensor = tensor.flatten(1)
        if self.transposed:
            tensor = tensor.mT
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the matrix."""
        product = self.product
        if product is not None:
            left, right = product.factors()
            return (left.shape[0], right.shape[1])
        m, *rest = self.stored().shape[1 if self.expert is not None else 0 :]
        n = torch.Size(rest).numel()
        if self.transposed:
            m, n = n, m
        return (m if self.rows is None else self.rows[1] - self.rows[0], n)

    @property
    def parameter(self) -> nn.Parameter | None:
        """Parameter that `editing` edits; None where the weight is computed from others."""
        return self.module._parameters.get(self.attribute)

    @property
    def trainable(self) -> bool:
        """False if no parameter behind the weight takes gradients."""
        own = self.module._parameters.get(self.attribute)
        owner = self.parametrization or self.module
        parameters = owner.parameters() if own is None else [own]
        return any(parameter.requires_grad for parameter in parameters)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (DTensor); an Apple GPU's, which has no float64, on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if whole.device.type == "mps" else whole


@contextmanager
def _in_evaluation(module: nn.Module | None) -> Iterator[None]:
    training = [] if module is None else [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
