"""The data module for language models: any text in, windows of tokens out."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from spectral_lightning.data.preparation import (
    PreparedText,
    TextSettings,
    load_text,
    prepare_text,
)
from spectral_lightning.data.sources import Sources, open_sources
from spectral_lightning.data.tokenizer import check_vocab_size, parse_tokenizer
from spectral_lightning.data.windows import ResumableLoader, TokenWindows, WindowSampler


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/spectral_lightning``, by default ``~/.cache/spectral_lightning``."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "spectral_lightning"


class TextDataModule(pl.LightningDataModule):
    """Windows of tokens from any text, for training and evaluating language models.

    A batch is one tensor ``tokens`` of shape ``(batch_size, sequence_len + 1)``, int64: inputs are
    ``tokens[:, :-1]``, targets ``tokens[:, 1:]``, and targets of -1 are ignored. Every document
    opens with the token ``<|bos|>``, documents follow each other in one stream, and a window may
    start anywhere in it. Tokenizer and tokens are made once and kept in `cache_dir`.

    Training windows come in a new order each epoch, drawn from `seed`; the last window overlaps
    the one before it and the last batch is filled with windows from the start of the order, so
    all batches are full and every token is seen. A run resumes inside an epoch with exactly the
    batches it would have seen. Evaluation keeps the reading order and counts every token once:
    the last window is filled with -1.

    Args:
        source: Text to train on. None is the documentation that ships with CPython; else a
            ``.txt``, ``.jsonl`` (either also ``.xz`` or ``.gz``) or ``.parquet`` file, a folder,
            a pattern such as ``"books/*.txt"``, a list of these, or the name of a Hugging Face
            dataset or a folder written by its ``save_to_disk``.
        vocab_size: Number of token ids, at least 257; with `tokenizer` its exact size. The
            default, like the next three, is chosen here for 2 MB of text and a laptop.
        sequence_len: Targets per window.
        batch_size: Windows per batch and rank.
        valid_source: Text for validation, named like `source`; a Hugging Face dataset brings its
            ``validation`` split. None holds out a part of `source`.
        test_source: Text for testing, a Hugging Face dataset brings its ``test`` split. None
            tests on the validation text.
        valid_fraction: Expected share of documents to hold out, chosen by their content alone, so
            copies of a document stay together. Has no effect where a validation text exists.
        seed: Chooses the order of the training windows.
        num_workers: Processes that load batches. Reading windows is cheap, so 0 is a good choice.
        tokenizer: JSON file of a byte-level tokenizer (``Tokenizer.save``) that has ``<|bos|>``.
            None trains one on the training documents.
        text_column: Field of a JSON Lines record, or column of a Parquet file or dataset.
        config_name: Configuration of a Hugging Face dataset, e.g. ``"wikitext-2-raw-v1"``.
        cache_dir: Folder for tokens and tokenizers, by default that of `default_cache_dir`.

    Raises:
        ValueError: If an argument is outside its range; later, in `prepare_data`, if the text
            does not support what is asked of it.
        FileNotFoundError: In `prepare_data`, if a path does not exist.
    """

    def __init__(
        self,
        source: str | list[str] | None = None,
        *,
        vocab_size: int = 4096,
        sequence_len: int = 256,
        batch_size: int = 16,
        valid_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        valid_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
        text_column: str = "text",
        config_name: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_vocab_size(vocab_size)
        for name, value, low in (
            ("sequence_len", sequence_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < low:
                raise ValueError(f"`{name}` must be >= {low}, got {value}.")
        if not 0 < valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {valid_fraction}.")
        self.source = source
        self.vocab_size = vocab_size
        self.sequence_len = sequence_len
        self.batch_size = batch_size
        self.valid_source = valid_source
        self.test_source = test_source
        self.valid_fraction = valid_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer_file = tokenizer
        self.text_column = text_column
        self.config_name = config_name
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._text: PreparedText | None = None
        self._folder: str | None = None
        self._train_loader: ResumableLoader | None = None
        self._train_state: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, after `setup`."""
        return self._prepared().tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of raw UTF-8 text per token id, shape ``(vocab_size,)``, int64; 0 for specials."""
        return self._prepared().token_bytes

    @override
    def prepare_data(self) -> None:
        """Tokenize the text, or find it in the cache. Lightning calls this once per node.

        Does nothing when the text is open already, as in a test after training.
        """
        if self._text is not None:
            return
        text = prepare_text(self._sources(), self._settings(), self.cache_dir / "text")
        self._folder = text.folder.name
        train, valid = text.shards["train"].info, text.shards["valid"].info
        rank_zero_info(
            f"Text: {train.num_tokens:,} training tokens of {train.num_documents:,} documents"
            f" ({train.num_bytes / train.num_tokens:.2f} bytes per token), {valid.num_tokens:,}"
            f" validation tokens of {valid.num_documents:,} documents."
        )

    @override
    def setup(self, stage: str) -> None:
        """Open the tokens that `prepare_data` made, on every rank.

        Raises:
            RuntimeError: If `prepare_data` has not run.
            ValueError: If the training text is shorter than one window.
        """
        if stage == TrainerFn.FITTING:
            self._train_state, self._train_loader = {}, None
        # Only the process that prepared the text knows the name of its folder.
        if self.trainer is not None:
            self._folder = self.trainer.strategy.broadcast(self._folder)
        if self._folder is None:
            raise RuntimeError("`prepare_data` must be called before `setup`.")
        self._text = load_text(self.cache_dir / "text" / self._folder)
        num_tokens = len(self._text.shards["train"])
        if num_tokens <= self.sequence_len:
            raise ValueError(
                f"`sequence_len` must be at most {num_tokens - 1} for this text of {num_tokens}"
                f" tokens, got {self.sequence_len}."
            )

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of full batches that continues where a resumed run left off."""
        windows = TokenWindows(self._prepared().shards["train"], self.sequence_len, full=True)
        sampler = WindowSampler(
            windows, batch_size=self.batch_size, shuffle=True, seed=self.seed, **self._ranks()
        )
        loader = ResumableLoader(windows, sampler=sampler, **self._loader_options())
        loader.load_state_dict(self._train_state)
        self._train_state, self._train_loader = {}, loader
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader over the validation text in reading order."""
        return self._evaluation_loader("valid")

    @override
    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader over the test text, or over the validation text if there is none."""
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader for testing."""
        return self._evaluation_loader("test")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training text as plain numbers.

        Lightning keeps a loader's own state as well, but restores it only if nothing has asked
        for the number of training steps before, which most learning-rate schedules do.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position in the training text; ignored when a run only evaluates."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        # Sharded strategies restore after the loader was made, the others before.
        if self._train_loader is None:
            self._train_state = state_dict
        else:
            self._train_loader.load_state_dict(state_dict)

    def _prepared(self) -> PreparedText:
        if self._text is None:
            raise RuntimeError("`setup` must be called before the data are used.")
        return self._text

    def _sources(self) -> Sources:
        """Open the training text and whatever is named for evaluation."""

        def opened(source: str | list[str] | None, argument: str) -> Sources:
            return open_sources(
                source,
                text_column=self.text_column,
                config_name=self.config_name,
                argument=argument,
            )

        sources = opened(self.source, "source")
        if self.valid_source is not None:
            valid = opened(self.valid_source, "valid_source")
            sources = replace(sources, valid=valid.valid or valid.train)
        if self.test_source is not None:
            test = opened(self.test_source, "test_source")
            sources = replace(sources, test=test.test or test.train)
        return sources

    def _settings(self) -> TextSettings:
        content = None
        if self.tokenizer_file is not None:
            path = Path(self.tokenizer_file).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"`tokenizer` must be an existing file, got {path}.")
            content = path.read_text(encoding="utf-8")
            size = parse_tokenizer(content, str(path)).get_vocab_size()
            if size != self.vocab_size:
                raise ValueError(
                    f"`vocab_size` must be {size}, the size of the tokenizer {path}, got"
                    f" {self.vocab_size}."
                )
        return TextSettings(
            vocab_size=self.vocab_size, valid_fraction=self.valid_fraction, tokenizer=content
        )

    def _ranks(self) -> dict[str, int]:
        """Return which share of the data this process takes; all of it without a Trainer."""
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return options or {}

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # A private generator: a loader without one draws a number from the global source.
            "generator": torch.Generator(),
        }

    def _evaluation_loader(self, split: str) -> DataLoader[Tensor]:
        shards = self._prepared().shards
        windows = TokenWindows(shards.get(split, shards["valid"]), self.sequence_len, full=False)
        sampler = WindowSampler(windows, batch_size=self.batch_size, shuffle=False, **self._ranks())
        return DataLoader(windows, sampler=sampler, **self._loader_options())
