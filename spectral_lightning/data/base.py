"""What data modules share: loaders, ranks, and where a run resumes.

Which text becomes which tokens is decided by each data module and its preparation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from spectral_lightning.data.shards import TokenShard
from spectral_lightning.data.windows import ResumableLoader, TokenWindows, WindowSampler


class PreparedDataModule(pl.LightningDataModule, ABC):
    """Base of data modules whose data are prepared once: override `open_folder` and `items`.

    `prepare_data` of the child leaves the data in a folder of its cache and sets `folder` to its
    name, which `setup` sends to all ranks. Training items come in a new order each epoch, drawn
    from `seed`, in full batches, and continue inside an epoch after a resume; evaluation keeps the
    reading order and counts every item once.

    Args:
        sequence_len: Length of an item in tokens.
        batch_size: Items per batch and rank.
        seed: Chooses the order of the training items.
        num_workers: Processes that load batches.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self, *, sequence_len: int, batch_size: int, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("sequence_len", sequence_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < low:
                raise ValueError(f"`{name}` must be >= {low}, got {value}.")
        self.sequence_len = sequence_len
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.folder: str | None = None
        self._train_loader: ResumableLoader | None = None
        self._train_state: dict[str, Any] = {}

    @abstractmethod
    def open_folder(self, folder: str) -> None:
        """Open what `prepare_data` made.

        Args:
            folder: Name of the folder in the cache.
        """

    @abstractmethod
    def items(self, split: str) -> Dataset[Any]:
        """Return the items of one split.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``; the last two also have an item without
                any target at index `EMPTY`.

        Raises:
            RuntimeError: If `setup` has not run.
        """

    @override
    def setup(self, stage: str) -> None:
        """Open what `prepare_data` made, on every rank.

        Raises:
            RuntimeError: If `prepare_data` has not run.
        """
        if stage == TrainerFn.FITTING:
            self._train_state, self._train_loader = {}, None
        # Only the process that prepared the data knows the name of its folder.
        if self.trainer is not None:
            self.folder = self.trainer.strategy.broadcast(self.folder)
        if self.folder is None:
            raise RuntimeError("`prepare_data` must be called before `setup`.")
        self.open_folder(self.folder)

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of full batches that continues where a resumed run left off."""
        items = self.items("train")
        sampler = WindowSampler(
            items, batch_size=self.batch_size, shuffle=True, seed=self.seed, **self._ranks()
        )
        loader = ResumableLoader(items, sampler=sampler, **self.loader_options())
        loader.load_state_dict(self._train_state)
        self._train_state, self._train_loader = {}, loader
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return a loader over the validation data in reading order."""
        return self._evaluation_loader("valid")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return a loader over the test data, or over the validation data if there are none."""
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader for testing."""
        return self._evaluation_loader("test")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data as plain numbers.

        Lightning keeps a loader's own state as well, but restores it only if nothing has asked
        for the number of training steps before, which most learning-rate schedules do.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position in the training data; ignored when a run only evaluates."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        # Sharded strategies restore after the loader was made, the others before.
        if self._train_loader is None:
            self._train_state = state_dict
        else:
            self._train_loader.load_state_dict(state_dict)

    def loader_options(self) -> dict[str, Any]:
        """Return what all loaders have in common, as arguments of `DataLoader`."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A private generator: a loader without one draws a number from the global source.
            "generator": torch.Generator(),
        }

    def _ranks(self) -> dict[str, int]:
        """Return which share of the data this process takes; all of it without a Trainer."""
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return options or {}

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        items = self.items(split)
        sampler = WindowSampler(items, batch_size=self.batch_size, shuffle=False, **self._ranks())
        return DataLoader(items, sampler=sampler, **self.loader_options())


class WindowedDataModule(PreparedDataModule):
    """Base of data modules that cut streams of tokens into windows: override `open_tokens`.

    The items are windows of ``sequence_len + 1`` tokens; evaluation counts every token once.
    Arguments and errors are those of `PreparedDataModule`.
    """

    _shards: Mapping[str, TokenShard] = MappingProxyType({})

    @abstractmethod
    def open_tokens(self, folder: str) -> Mapping[str, TokenShard]:
        """Open what `prepare_data` made.

        Args:
            folder: Name of the folder in the cache.

        Returns:
            Streams by name: ``train``, ``valid`` and, where a test text exists, ``test``.
        """

    @override
    def open_folder(self, folder: str) -> None:
        """Open the tokens.

        Raises:
            ValueError: If the training text is shorter than one window.
        """
        shards = self.open_tokens(folder)
        num_tokens = len(shards["train"])
        if num_tokens <= self.sequence_len:
            raise ValueError(
                f"`sequence_len` must be at most {num_tokens - 1} for this text of {num_tokens}"
                f" tokens, got {self.sequence_len}."
            )
        self._shards = shards

    @override
    def items(self, split: str) -> TokenWindows:
        """Return the windows of one split, those of the validation text for a missing test."""
        shards = self._opened()
        shard = shards.get(split, shards["valid"])
        return TokenWindows(shard, self.sequence_len, full=split == "train")

    def _opened(self) -> Mapping[str, TokenShard]:
        if not self._shards:
            raise RuntimeError("`setup` must be called before the data are used.")
        return self._shards
