"""Products in full precision, whatever the training run has switched on for its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FULL = ("none", "ieee")  # "none" is the default, which is full precision for products


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep products of float32 tensors in float32 within a block, and put everything back after.

    Inside autocast a product is computed in half precision; with
    ``torch.set_float32_matmul_precision("medium")`` in TF32 on a GPU, and in bfloat16 on a CPU that
    has it. A spectral norm is then wrong by up to 1e-3, far outside its interval. Products with a
    few vectors wait for memory, not for arithmetic, so full precision costs nothing.

    The two settings are those of the process, so other threads see them too while the block runs.

    Args:
        device: Where the products are computed.

    Yields:
        Nothing.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    reduced = [(b, b.fp32_precision) for b in backends if b.fp32_precision not in _FULL]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        for backend, setting in reduced:
            backend.fp32_precision = setting
