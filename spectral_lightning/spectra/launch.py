"""Measurements on their way from a device to the host."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """Measurements of one step, made on one device."""

    step: int
    names: tuple[str, ...]
    table: Tensor  # (len(names), len(FIELDS)) on the host once `ready` has passed
    ready: Any  # torch.cuda.Event, or None where the copy is complete already

    def on_host(self) -> Tensor:
        """Return the table, waiting for the device if it is still at work."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.table


def sent(step: int, names: tuple[str, ...], table: Tensor) -> Launch:
    """Send a table to the host, without waiting for it."""
    if not table.is_cuda:
        return Launch(step, names, table, None)
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    host.copy_(table, non_blocking=True)
    return Launch(step, names, host, torch.cuda.current_stream(table.device).record_event())
