"""Rows of all ranks, with gradients: what a loss over the whole batch is computed from.

Every rank returns a loss whose **mean over the ranks** is the loss of the whole batch: a mean over
its own rows, or a number that is the same on all ranks. `gather_rows` adds up the gradients of all
ranks, so that DDP's mean of the gradients is that of one process with the whole batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

Group = Any  # a ProcessGroup, which builds of torch without torch.distributed do not have


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """Rows of all ranks, in the order of the ranks; in a single process, the rows themselves.

    One collective forward and one backward, which adds up the gradients of all ranks. It is not
    one of PyTorch's own functions with gradients, whose names differ between 2.9 and 2.13.
    Differentiable once.

    Args:
        rows: Shape ``(B, ...)``, the same on all ranks; see `check_same_on_all_ranks`.
        group: Ranks that share the batch; None for all.

    Returns:
        Shape ``(num_ranks * B, ...)``.
    """
    if num_ranks(group) == 1:
        return rows
    return _Gather.apply(rows, group)  # type: ignore[no-untyped-call]


def num_ranks(group: Group = None) -> int:
    """Number of ranks that share the batch; 1 in a single process."""
    return dist.get_world_size(group) if _is_distributed() else 1


def rank_in(group: Group = None) -> int:
    """Index of this process among the ranks that share the batch."""
    return dist.get_rank(group) if _is_distributed() else 0


def check_same_on_all_ranks(device: torch.device, group: Group = None, **sizes: int) -> None:
    """Refuse sizes that differ between the ranks, for which gathering would hang.

    One collective of a few numbers, which the host waits for; none in a single process.

    Args:
        device: Device of what is to be gathered.
        group: Ranks that share the batch; None for all.
        sizes: Numbers by name.

    Raises:
        ValueError: If the ranks differ in any; the same on every rank.
    """
    if num_ranks(group) == 1:
        return
    own = torch.tensor([list(sizes.values())], dtype=torch.int64, device=device)
    for name, values in zip(sizes, gather_rows(own, group).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"Batches must have the same {name.replace('_', ' ')} on all ranks, got {values};"
                " use `drop_last=True`, and one source of data for all ranks at a time."
            )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    @override
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        size = num_ranks(group)
        gathered = rows.new_empty(size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(size)), rows.contiguous(), group)
        return gathered

    @override
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(num_ranks(ctx.group))[rank_in(ctx.group)], None
