"""One weight matrix of a model: where it is stored, how it is read and edited.

A target holds its module, not its tensor: the parameter may be re-registered by a strategy after
discovery.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized


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
        tensor = self.stored() if stored is None else stored.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if tensor.device.type == "mps":
            tensor = tensor.cpu()
        return self._part_of(tensor)

    @contextmanager
    def editing(self, stored: Tensor | None = None) -> Iterator[Tensor]:
        """The weight, shape ``(m, n)``, for edits in place; only where there is a `parameter`.

        A sharded one is gathered, and each rank keeps its shard of the result: all ranks have to
        make the same edit.

        Args:
            stored: Tensor stored like the parameter to edit instead, such as its gradient.
        """
        tensor = self.stored() if stored is None else stored.detach()
        if isinstance(tensor, DTensor):
            whole = tensor.full_tensor()
            yield self._part_of(whole)
            edited = distribute_tensor(
                whole, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            tensor.to_local().copy_(edited.to_local())
        elif tensor.device.type == "mps" or not tensor.is_contiguous():  # as in channels_last
            whole = tensor.cpu() if tensor.device.type == "mps" else tensor
            whole = whole.clone(memory_format=torch.contiguous_format)
            yield self._part_of(whole)
            tensor.copy_(whole)
        else:
            yield self._part_of(tensor)

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
