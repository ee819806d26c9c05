"""Tensors as they are stored by strategies and devices, made whole for one edit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def whole_tensor(stored: Tensor) -> Iterator[Tensor]:
    """The whole of a tensor, contiguous, on a device that has float64, for edits in place.

    A sharded tensor (DTensor) is gathered, and each rank keeps its shard of the result: all ranks
    have to make the same edit.

    Args:
        stored: Tensor, any shape; overwritten with what the caller makes of the whole.

    Yields:
        The tensor itself where that is possible, else a copy that is written back.
    """
    tensor = stored.detach()
    if isinstance(tensor, DTensor):
        whole = tensor.full_tensor()
        yield whole
        edited = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(edited.to_local())
    elif tensor.device.type == "mps" or not tensor.is_contiguous():  # as in channels_last
        whole = tensor.cpu() if tensor.device.type == "mps" else tensor
        whole = whole.clone(memory_format=torch.contiguous_format)
        yield whole
        tensor.copy_(whole)
    else:
        yield tensor
