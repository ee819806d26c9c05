"""Finding out, without an accelerator, whether code would wait for one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# Operators whose result the host reads, or whose shape or error code depends on values.
_WAITING = {
    *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "where", "masked_select"),
    *("_unique2", "unique_dim", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_eigvals"),
}


class RefuseHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise where an operator would make the host wait if the tensors were on an accelerator.

    Covers reading a value (`item`, `bool`), shapes that depend on values (`nonzero`, a boolean
    mask as index), and decompositions that check an error code. Not covered: copies between
    devices, and `tolist` and `numpy` of a CPU tensor, which go past the dispatcher.

    Example:
        >>> with RefuseHostSync():
        ...     torch.ones(2).sum().item()
        Traceback (most recent call last):
        AssertionError: aten._local_scalar_dense.default makes the host wait for the device
    """

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func).split(".")[1]
        waits = name in _WAITING and not (name == "where" and len(args) == 3)
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [part for part in args[1] if isinstance(part, Tensor)]
            waits = waits or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        if waits:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
