"""The data module for language models: any text in, windows of tokens out."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer
from torch import Tensor
from typing_extensions import override

from spectral_lightning.data.base import WindowedDataModule
from spectral_lightning.data.preparation import (
    PreparedText,
    TextSettings,
    load_text,
    prepare_text,
)
from spectral_lightning.data.shards import TokenShard
from spectral_lightning.data.sources import Sources, open_sources
from spectral_lightning.data.tokenizer import check_vocab_size, parse_tokenizer


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/spectral_lightning``, by default ``~/.cache/spectral_lightning``."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "spectral_lightning"


class TextDataModule(WindowedDataModule):
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
        super().__init__(
            sequence_len=sequence_len, batch_size=batch_size, seed=seed, num_workers=num_workers
        )
        check_vocab_size(vocab_size)
        if not 0 < valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {valid_fraction}.")
        self.source = source
        self.vocab_size = vocab_size
        self.valid_source = valid_source
        self.test_source = test_source
        self.valid_fraction = valid_fraction
        self.tokenizer_file = tokenizer
        self.text_column = text_column
        self.config_name = config_name
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._text: PreparedText | None = None

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
        self.folder = text.folder.name
        train, valid = text.shards["train"].info, text.shards["valid"].info
        rank_zero_info(
            f"Text: {train.num_tokens:,} training tokens of {train.num_documents:,} documents"
            f" ({train.num_bytes / train.num_tokens:.2f} bytes per token), {valid.num_tokens:,}"
            f" validation tokens of {valid.num_documents:,} documents."
        )

    @override
    def open_tokens(self, folder: str) -> Mapping[str, TokenShard]:
        """Open the tokens of all splits."""
        self._text = load_text(self.cache_dir / "text" / folder)
        return self._text.shards

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
