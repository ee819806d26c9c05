"""The data module for one plain file of words, integers or characters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tokenizers import Tokenizer
from torch import Tensor
from typing_extensions import override

from spectral_lightning.data.base import WindowedDataModule
from spectral_lightning.data.shards import TokenShard
from spectral_lightning.data.text import default_cache_dir
from spectral_lightning.data.token_preparation import (
    TokenFile,
    TokenFileSettings,
    load_token_file,
    prepare_token_file,
)
from spectral_lightning.data.units import detect_unit
from spectral_lightning.data.vocabulary import UNKNOWN, type_bytes

_VOCABULARY_KEY = "vocabulary"


class TokenFileDataModule(WindowedDataModule):
    """Windows of whole words, integers or characters from one file.

    For the files that the scripts of adaptive-low-rank-training take as ``--data-file``. Batches
    are those of `TextDataModule`: one tensor ``(batch_size, sequence_len + 1)``, int64, inputs
    ``[:, :-1]``, targets ``[:, 1:]``, targets of -1 ignored; every training window once per epoch
    in an order drawn from `seed`, and a resumed run sees exactly the batches it would have seen.
    The file is one stream without document boundaries, and what is held out is its end.

    Losses are nats per token, so those of words, integers and characters do not compare. Bits per
    byte do, except for integers, which have none: characters stand for the file's exact text;
    words for the text with each run of white space written as one space, and ``<unk>`` counts
    neither above nor below the line, so the share of ``<unk>`` has to be told along.

    The vocabulary is kept beside the ids in `cache_dir` and in checkpoints; a run refuses to go on
    with another one.

    Args:
        source: Plain UTF-8 text, also packed as ``.xz`` or ``.gz``.
        unit: What one token is. ``"word"``: a run of characters without white space; ``"int"``: a
            non-negative integer, which is its own id; ``"char"``: a character, as versions 13, 17
            and 18 of the original read. ``"auto"`` takes characters if the text is one single
            word, else integers if the first 50 words are such, else words; the characters of
            ordinary text must be asked for.
        vocabulary: ``"train"`` has the words or characters of the training part and ``<unk>`` for
            all others. ``"all"`` has those of the whole text, as the original: the vocabulary
            then leaks which words the validation text uses. Ids are ranks in sorted order either
            way. No effect on integers, where ids are given and all count.
        sequence_len: Targets per window; like the next two defaults from version 10.
        batch_size: Windows per batch and rank.
        valid_fraction: Share of the tokens, at the end of `source`, that is held out.
        valid_source: Text for validation and testing, read in the unit of `source`, in place of a
            part of it.
        seed: Chooses the order of the training windows.
        num_workers: Processes that load batches. Reading windows is cheap, so 0 is a good choice.
        tokenizer: Vocabulary of another run as JSON (``Tokenizer.save``). None builds one.
        cache_dir: Folder for ids and vocabularies, by default that of `default_cache_dir`.

    Raises:
        ValueError: If an argument is outside its range; later, in `prepare_data`, if the text
            cannot be read in its unit, and in `setup`, if it is shorter than a window.
        FileNotFoundError: In `prepare_data`, if a file does not exist.
    """

    def __init__(
        self,
        source: str,
        unit: Literal["auto", "word", "int", "char"] = "auto",
        *,
        vocabulary: Literal["train", "all"] = "train",
        sequence_len: int = 256,
        batch_size: int = 32,
        valid_fraction: float = 0.01,
        valid_source: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            sequence_len=sequence_len, batch_size=batch_size, seed=seed, num_workers=num_workers
        )
        if unit not in ("auto", "word", "int", "char"):
            raise ValueError(f"`unit` must be 'auto', 'word', 'int' or 'char', got {unit!r}.")
        if vocabulary not in ("train", "all"):
            raise ValueError(f"`vocabulary` must be 'train' or 'all', got {vocabulary!r}.")
        if not 0 < valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {valid_fraction}.")
        if tokenizer is not None and vocabulary == "all":
            rank_zero_warn("`vocabulary` has no effect when a `tokenizer` is given.")
        self.source = source
        self.unit = unit
        self.vocabulary = vocabulary
        self.valid_fraction = valid_fraction
        self.valid_source = valid_source
        self.tokenizer_file = tokenizer
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._text: TokenFile | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; prepares the data if need be, so that a config can link to it."""
        return self._prepared().tokenizer.get_vocab_size()

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary; prepares the data if need be."""
        return self._prepared().tokenizer

    @property
    def token_bytes(self) -> Tensor | None:
        """Bytes of UTF-8 text per token id, shape ``(vocab_size,)``, int64; None for integers."""
        text = self._prepared()
        return type_bytes(text.tokenizer, text.unit)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids: characters joined, words and integers with spaces."""
        return self.tokenizer.decode(ids)

    @override
    def prepare_data(self) -> None:
        """Number the tokens, or find them in the cache. Lightning calls this once per node."""
        self._prepared()

    @override
    def setup(self, stage: str) -> None:
        """Open the tokens that `prepare_data` made, on every rank.

        Raises:
            RuntimeError: If `prepare_data` has not run.
            ValueError: If the training or the validation text is shorter than a window.
        """
        super().setup(stage)
        shards = self._opened()
        train, valid = len(shards["train"]), len(shards["valid"])
        if valid > self.sequence_len:
            return
        needed = f"at least {self.sequence_len + 1} tokens (`sequence_len` + 1)"
        if self.valid_source is not None:
            raise ValueError(f"`valid_source` must hold {needed}, got {valid}.")
        raise ValueError(
            f"`valid_fraction` must leave {needed} of the {train + valid} for validation, got"
            f" {self.valid_fraction}, which leaves {valid}. Raise it, lower `sequence_len` or give"
            " `valid_source`."
        )

    @override
    def open_tokens(self, folder: str) -> Mapping[str, TokenShard]:
        """Open the tokens of both parts."""
        self._text = load_token_file(self._cache() / folder)
        return self._text.shards

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary as JSON and the position in the training text."""
        return {**super().state_dict(), _VOCABULARY_KEY: self.tokenizer.to_str()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position in the training text.

        Raises:
            ValueError: If the checkpoint was written with another vocabulary.
        """
        position = {key: value for key, value in state_dict.items() if key != _VOCABULARY_KEY}
        if state_dict[_VOCABULARY_KEY] != self.tokenizer.to_str():
            raise ValueError(
                f"`source` must have the vocabulary of the checkpoint, got {self.source}, whose"
                f" {self.vocab_size} tokens are not the same. Write that of the checkpoint,"
                f" `torch.load(path)['{type(self).__name__}']['{_VOCABULARY_KEY}']`, to a file and"
                " give `tokenizer`."
            )
        super().load_state_dict(position)

    def _prepared(self) -> TokenFile:
        if self._text is None:
            self._text = text = prepare_token_file(self._settings(), self._cache())
            self.folder = text.folder.name
            train, valid = len(text.shards["train"]), len(text.shards["valid"])
            rank_zero_info(
                f"Text: {train:,} training and {valid:,} validation tokens of unit '{text.unit}',"
                f" {text.num_unknown['valid'] / max(valid, 1):.2%} of the latter {UNKNOWN};"
                f" {text.tokenizer.get_vocab_size():,} ids."
            )
        return self._text

    def _cache(self) -> Path:
        return self.cache_dir / "tokens"

    def _settings(self) -> TokenFileSettings:
        source = _existing(self.source, "source")
        valid_source = content = None
        if self.valid_source is not None:
            valid_source = _existing(self.valid_source, "valid_source")
        if self.tokenizer_file is not None:
            path = _existing(self.tokenizer_file, "tokenizer")
            content = path.read_text(encoding="utf-8")
        return TokenFileSettings(
            source=source,
            unit=detect_unit(source, "source") if self.unit == "auto" else self.unit,
            vocabulary=self.vocabulary,
            valid_source=valid_source,
            valid_fraction=self.valid_fraction,
            tokenizer=content,
        )


def _existing(name: str, argument: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}` must be an existing file, got {name}.")
    return path
