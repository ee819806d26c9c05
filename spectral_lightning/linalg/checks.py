"""Input rules shared by the kernels: which dtype is computed in, and what is refused."""

import torch
from jaxtyping import Float
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype a kernel computes in: float32 for half precision and float32, float64 kept.

    LAPACK and cuSOLVER have no half-precision kernels, and singular values read in bfloat16
    carry two digits.

    Args:
        weight: Floating-point tensor of any shape.

    Returns:
        ``torch.float32`` or ``torch.float64``.

    Example:
        >>> compute_dtype(torch.zeros(2, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.promote_types(weight.dtype, torch.float32)


def require_matrix(weight: Tensor, name: str = "weight") -> None:
    """Refuse what is not a non-empty floating-point matrix or batch of matrices.

    Looks at shape and dtype only, so it never waits for the device.

    Args:
        weight: Tensor to check, shape ``(*batch, m, n)`` with ``m, n >= 1``.
        name: Name of the argument in the message.

    Raises:
        ValueError: If the tensor has fewer than two dimensions, holds no element, or is not of a
            floating-point dtype.
    """
    if weight.ndim < 2:
        raise ValueError(
            f"`{name}` must have at least two dimensions (*batch, m, n), got shape"
            f" {tuple(weight.shape)}; reshape it to a matrix first."
        )
    if weight.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(weight.shape)}.")
    if not weight.is_floating_point():
        raise ValueError(
            f"`{name}` must have a floating-point dtype, got {weight.dtype}; cast it first."
        )


def require_finite(weight: Float[Tensor, "*batch m n"], name: str = "weight") -> Tensor:
    """Refuse NaN and infinity, and return the largest magnitude that was looked for on the way.

    One pass over the weight without a copy. Waits for the device.

    Args:
        weight: Tensor to check, shape ``(*batch, m, n)``.
        name: Name of the argument in the message.

    Returns:
        Largest absolute entry of each matrix, shape ``(*batch, 1, 1)``, in the weight's dtype.

    Raises:
        ValueError: If an entry is NaN or infinite.

    Example:
        >>> require_finite(torch.tensor([[3.0, -4.0]]))
        tensor([[4.]])
    """
    largest: Tensor = torch.linalg.vector_norm(weight, float("inf"), dim=(-2, -1), keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(
            f"`{name}` must be finite, got NaN or infinity in a tensor of shape"
            f" {tuple(weight.shape)}; look for the step at which it diverged."
        )
    return largest
