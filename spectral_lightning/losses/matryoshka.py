"""Losses of nested prefixes: an embedding that can be cut and still be used."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectral_lightning.losses.in_batch import unit_rows


def prefix(representation: Tensor, dim: int) -> Tensor:
    """The first numbers of each row, at length 1 again.

    Args:
        representation: Shape ``(..., D)``.
        dim: Numbers to keep, at most ``D``.

    Returns:
        Shape ``(..., dim)``, at least float32.

    Raises:
        ValueError: If the rows are shorter.

    Example:
        >>> import torch
        >>> prefix(torch.tensor([[3.0, 4.0, 5.0]]), 2)
        tensor([[0.6000, 0.8000]])
    """
    if not 1 <= dim <= representation.shape[-1]:
        raise ValueError(
            f"A prefix must have between 1 and {representation.shape[-1]} dimensions, those of the"
            f" representation, got {dim}."
        )
    return unit_rows(representation[..., :dim])


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Weighted sum of one loss over prefixes of its representations.

    With `num_dims_per_step`, each step takes that many in turn, chosen by its number alone, so that
    ranks agree and a resumed run goes on alike. Their weights are scaled such that the mean over a
    round of steps is the whole sum.

    Args:
        dims: Sizes of the prefixes, at least 1 each, none twice.
        weights: Weight of each; None for 1 each, from the paper.
        num_dims_per_step: Prefixes that a step takes; None for all.

    Raises:
        ValueError: If a setting is outside its range.

    References:
        Kusupati et al. (2022), "Matryoshka representation learning", equation 1 (the sum).
        https://arxiv.org/abs/2205.13147

    Example:
        >>> import torch
        >>> nested = Matryoshka(dims=(2, 1), weights=(0.5, 0.25))
        >>> nested(torch.sum, torch.tensor([[3.0, 4.0]]))  # 0.5 * (0.6 + 0.8) + 0.25 * 1
        tensor(0.9500)
    """

    dims: tuple[int, ...]
    """Sizes of the prefixes, at least 1 each, none twice."""
    weights: tuple[float, ...] | None = None
    """Weight of each; None for 1 each."""
    num_dims_per_step: int | None = None
    """Prefixes that a step takes; None for all."""

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1 or len(set(self.dims)) < len(self.dims):
            raise ValueError(f"`dims` must be different sizes, at least 1 each, got {self.dims}.")
        if self.weights is not None and (
            len(self.weights) != len(self.dims)
            or not all(0 < weight < float("inf") for weight in self.weights)
        ):
            raise ValueError(
                f"`weights` must be {len(self.dims)} finite numbers > 0, one for each of `dims`,"
                f" got {self.weights}."
            )
        num = self.num_dims_per_step
        if num is not None and not 1 <= num <= len(self.dims):
            raise ValueError(f"`num_dims_per_step` must be in [1, {len(self.dims)}], got {num}.")

    def at(self, step: int) -> dict[int, float]:
        """Prefixes of a step, and the weight of each.

        Example:
            >>> one = Matryoshka(dims=(64, 32), num_dims_per_step=1)
            >>> one.at(0), one.at(1), one.at(2)
            ({64: 2.0}, {32: 2.0}, {64: 2.0})
        """
        size = len(self.dims)
        num = self.num_dims_per_step or size
        chosen = [(step * num + i) % size for i in range(num)]
        return {self.dims[i]: self._all_weights[i] * size / num for i in sorted(chosen)}

    def top(self) -> "Matryoshka":
        """The largest prefix alone, with the weight of all, so that other losses keep theirs."""
        return Matryoshka(dims=(max(self.dims),), weights=(sum(self._all_weights),))

    def __call__(
        self, loss: Callable[..., Tensor], *representations: Tensor, step: int = 0
    ) -> Tensor:
        """Return the sum.

        Args:
            loss: Called with the prefixes of all representations, once per size.
            representations: Shape ``(..., D)`` each.
            step: Number of the step.
        """
        losses = [
            weight * loss(*(prefix(rows, dim) for rows in representations))
            for dim, weight in self.at(step).items()
        ]
        return sum(losses[1:], losses[0])

    @property
    def _all_weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.dims)
