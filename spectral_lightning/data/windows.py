"""Windows of a token stream, the order in which they are seen, and a loader that can resume.

The sampler and the loader know windows by their number only, so they serve any other dataset too.

Training sees every window once per epoch in an order drawn from the seed and the epoch;
evaluation sees them in reading order. Both are sharded over ranks by their own sampler: Lightning
leaves a `DistributedSampler` alone, and would otherwise inject one that always shuffles.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from spectral_lightning.data.shards import TokenShard

IGNORED = -1
"""Fills the windows of an evaluation where the text has ended; never a target."""

EMPTY = -1
"""Index of an empty item: what ranks that run short in an evaluation ask their dataset for."""


class TokenWindows(Dataset[Tensor]):
    """Cut a token stream into windows of ``sequence_len + 1`` tokens.

    Consecutive windows share one token, so that every token but the very first is a target. The
    last window is filled up with `IGNORED`, or, with ``full=True``, starts earlier and repeats
    some tokens of the one before it.

    Args:
        shard: The stream, of at least 2 tokens, with ``full`` of at least ``sequence_len + 1``.
        sequence_len: Number of targets per window.
        full: Never yield `IGNORED`.
    """

    def __init__(self, shard: TokenShard, sequence_len: int, *, full: bool) -> None:
        self.shard = shard
        self.sequence_len = sequence_len
        self.full = full

    def __len__(self) -> int:
        return -(-(len(self.shard) - 1) // self.sequence_len)

    @override
    def __getitem__(self, index: int) -> Tensor:
        """Return one window, shape ``(sequence_len + 1,)``, int64; -1 asks for an empty one."""
        size = self.sequence_len + 1
        if index == EMPTY:
            return torch.full((size,), IGNORED)
        start = index * self.sequence_len
        if self.full:
            start = min(start, len(self.shard) - size)
        tokens = self.shard.read(start, min(start + size, len(self.shard)))
        if len(tokens) == size:
            return tokens
        return torch.nn.functional.pad(tokens, (0, size - len(tokens)), value=IGNORED)


class WindowSampler(DistributedSampler[int]):
    """Choose the windows that one rank sees, and in which order.

    With `shuffle`, the order is a permutation drawn from ``(seed, epoch)`` alone, filled up with
    its own beginning until every rank has only full batches: each window is seen at least once
    per epoch and all ranks take equally many steps. Without, it is the reading order, and ranks
    that run short get empty windows, so that nothing is counted twice and no rank waits.

    Args:
        windows: The windows to choose from; without `shuffle` they must have one at index `EMPTY`.
        batch_size: Windows per batch and rank.
        shuffle: Permute and fill up (training), or keep the order (evaluation).
        seed: Chooses the permutations.
        num_replicas: Number of ranks that see different windows.
        rank: This rank.
    """

    def __init__(
        self,
        windows: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(windows, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        step = num_replicas * (batch_size if shuffle else 1)
        num_windows = len(windows)  # type: ignore[arg-type]
        self.total_size = -(-num_windows // step) * step
        self.num_samples = self.total_size // num_replicas
        self.batch_size = batch_size
        self.start = 0  # windows of this epoch, over all ranks, that were already seen

    @override
    def __iter__(self) -> Iterator[int]:
        num_windows = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            # A seed sequence mixes both numbers: seed 0 in epoch 1 is not seed 1 in epoch 0.
            order = np.random.default_rng((self.seed, self.epoch)).permutation(num_windows)
            order = np.resize(order, self.total_size)
        else:
            order = np.full(self.total_size, EMPTY)
            order[:num_windows] = np.arange(num_windows)
        yield from map(int, order[self.start + self.rank :: self.num_replicas])


class ResumableLoader(DataLoader[Any]):
    """A loader over a `WindowSampler` that continues inside an epoch.

    Its state is the epoch and the number of windows that were handed out, the same on all ranks,
    so that a run resumes with exactly the batches it would have seen, also with workers and with
    another number of ranks. Worker processes run ahead; only batches that were handed out count.

    Lightning may replace the sampler (`overfit_batches`); then there is no position to keep.
    """

    _epoch = 0
    _windows = 0
    _resume: tuple[int, int] | None = None

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning calls `iter` before it sets a resumed run's epoch, and
        # a worker would start on the wrong permutation. Nothing runs here before the first batch.
        sampler = self.sampler
        if not isinstance(sampler, WindowSampler):
            yield from super().__iter__()
            return
        epoch, windows = self._resume or (sampler.epoch, 0)
        sampler.start = windows if epoch == sampler.epoch else 0
        self._epoch, self._windows, self._resume = sampler.epoch, sampler.start, None
        for batch in super().__iter__():
            self._windows += sampler.batch_size * sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain numbers; empty if the sampler was replaced."""
        sampler = self.sampler
        if not isinstance(sampler, WindowSampler):
            return {}
        return {
            "epoch": self._epoch,
            "windows": self._windows,
            "num_windows": len(sampler.dataset),  # type: ignore[arg-type]
            "seed": sampler.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out when the state was taken.

        Warns:
            UserWarning: If the state belongs to another text, sequence length or seed; the epoch
                then starts from its first batch.
        """
        sampler = self.sampler
        if not state_dict or not isinstance(sampler, WindowSampler):
            return
        epoch, windows = state_dict["epoch"], state_dict["windows"]
        fits = {key: state_dict[key] for key in ("num_windows", "seed")}
        if fits != {key: self.state_dict()[key] for key in fits}:
            warnings.warn(
                "The checkpoint was written for another text, sequence length or seed, so the"
                " training data start from the beginning of the epoch.",
                stacklevel=2,
            )
            windows = 0
        if windows >= sampler.total_size:
            epoch, windows = epoch + 1, 0
        sampler.set_epoch(epoch)
        # Another number of ranks may not divide the position: rather repeat a window than skip it.
        windows -= windows % sampler.num_replicas
        self._epoch, self._windows, self._resume = epoch, windows, (epoch, windows)
