"""Arithmetic of remainders: a whole problem that fits into one batch, and is easy to memorise."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

Operation = Literal["add", "subtract", "multiply"]

_ANSWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
}


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of symbols and what they give, taken out of memory a batch at a time.

    Args:
        pairs: Shape ``(N, 2)``, int64.
        answers: Shape ``(N,)``, int64.
    """

    def __init__(self, pairs: Tensor, answers: Tensor) -> None:
        self.pairs, self.answers = pairs, answers

    def __len__(self) -> int:
        return len(self.pairs)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index], self.answers[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch at once, which loaders prefer to single items."""
        return self.pairs[indices], self.answers[indices]


class ModularArithmetic(pl.LightningDataModule):
    """Pairs of remainders with their sum, difference or product, a part of them held out.

    All ``modulus ** 2`` pairs are cut into a training and a validation part by a seeded
    permutation. A batch is ``(pairs, answers)`` of shapes ``(B, 2)`` and ``(B,)``, int64; without
    `batch_size` it is the whole part, divided over the ranks. Testing uses the validation part.

    Args:
        operation: ``add``, ``subtract`` or ``multiply``.
        modulus: Number of remainders, at least 2; 113 as in Prieto et al. (2025).
        train_fraction: Share of the pairs to train on, above 0 and below 1.
        batch_size: Pairs per training batch and rank, in a new order each epoch; None for all.
        seed: Chooses the training pairs and their order.

    Raises:
        ValueError: If an argument is outside its range.

    References:
        Power et al. (2022), "Grokking". https://arxiv.org/abs/2201.02177
        Prieto et al. (2025), "Grokking at the edge of numerical stability".
        https://arxiv.org/abs/2501.04697

    Example:
        >>> data = ModularArithmetic("add", modulus=5)
        >>> pairs, answers = next(iter(data.train_dataloader()))
        >>> pairs.shape, bool((pairs.sum(1) % 5 == answers).all())
        (torch.Size([10, 2]), True)
    """

    def __init__(
        self,
        operation: Operation = "add",
        modulus: int = 113,
        train_fraction: float = 0.4,
        batch_size: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if operation not in get_args(Operation):
            allowed = ", ".join(get_args(Operation))
            raise ValueError(f"`operation` must be one of {allowed}, got {operation!r}.")
        if modulus < 2:
            raise ValueError(f"`modulus` must be >= 2, got {modulus}.")
        num_train = int(train_fraction * modulus**2) if 0 < train_fraction < 1 else 0
        if num_train < 1:
            raise ValueError(
                "`train_fraction` must be above 0 and below 1 and give a pair to train on, got"
                f" {train_fraction} of {modulus**2} pairs."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1 or None, got {batch_size}.")
        self.operation, self.modulus, self.batch_size = operation, modulus, batch_size
        self._order = torch.Generator().manual_seed(seed)
        numbers = torch.arange(modulus)
        pairs = torch.cartesian_prod(numbers, numbers)
        answers = _ANSWERS[operation](pairs[:, 0], pairs[:, 1]) % modulus
        chosen = torch.randperm(len(pairs), generator=self._order)
        train, valid = chosen[:num_train], chosen[num_train:]
        self.train_pairs = Pairs(pairs[train], answers[train])
        self.valid_pairs = Pairs(pairs[valid], answers[valid])

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return _loader(self.train_pairs, self.batch_size, self._order)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return _loader(self.valid_pairs)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.val_dataloader()


def _loader(
    pairs: Pairs, batch_size: int | None = None, order: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        pairs,
        batch_size=batch_size or len(pairs),
        shuffle=batch_size is not None,
        generator=order,
        collate_fn=_as_it_is,  # `Pairs` gives whole batches
    )


def _as_it_is(batch: Any) -> Any:
    return batch
