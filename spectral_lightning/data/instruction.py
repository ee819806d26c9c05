"""The data module for supervised fine-tuning: instructions in, padded batches of tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spectral_lightning.data.base import PreparedDataModule
from spectral_lightning.data.instruction_formats import Format
from spectral_lightning.data.instruction_preparation import (
    IGNORED,
    Example,
    InstructionExamples,
    PreparedInstructions,
    load_instructions,
    prepare_instructions,
)
from spectral_lightning.data.instruction_records import open_records
from spectral_lightning.data.sources import Sources
from spectral_lightning.data.text import default_cache_dir


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    """Put examples of different lengths into one batch, as a `DataLoader`'s ``collate_fn``.

    What is padding is known from the lengths, never from a token's id: the end-of-sequence token
    often doubles as padding and still has to be trained on and attended to.
    """

    pad_id: int
    """Token that fills up the inputs; nothing attends to it or is trained on it."""
    multiple: int = 1
    """The length is rounded up to a multiple of this."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return ``attention_mask``, ``input_ids`` and ``labels``, each ``(batch, length)``."""
        ids, labels = (list(column) for column in zip(*examples, strict=True))
        attended = [torch.ones_like(example) for example in ids]
        return {
            "attention_mask": self._pad(attended, 0),
            "input_ids": self._pad(ids, self.pad_id),
            "labels": self._pad(labels, IGNORED),
        }

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.multiple
        return torch.nn.functional.pad(padded, (0, missing), value=value)


class InstructionDataModule(PreparedDataModule):
    """Instructions and chats for fine-tuning any Hugging Face causal language model.

    A batch is a dict of int64 tensors ``attention_mask``, ``input_ids`` and ``labels``, each
    ``(batch_size, length)``, padded on the right to the longest example of the batch; it goes
    into a model as it is, which shifts the labels itself. Labels are -100 on padding and, with
    `mask_prompt`, on everything but the answers: in a chat every turn of the assistant is trained
    on and nothing else. The token that ends an answer is trained on too.

    Alpaca records are written into the two standard prompts, chats by the tokenizer's own chat
    template or, without one, by ``spectral_lightning.data.PLAIN_CHAT_TEMPLATE``; pairs are taken as
    they are. An answer that does not fit is cut at `sequence_len`, without its end-of-sequence
    token; an example whose prompt leaves no room for any of it is left out, and so is one without
    an answer. Both are counted and reported.

    Training examples come in a new order each epoch, drawn from `seed`; the last batch is filled
    with examples from the start of the order. A run resumes inside an epoch with exactly the
    batches it would have seen. Evaluation keeps the order of the file and counts every example
    once. Tokens are made once and kept in `cache_dir`.

    Args:
        source: A ``.json``, ``.jsonl``, ``.csv`` (each also ``.xz`` or ``.gz``) or ``.parquet``
            file, a folder written by a dataset's ``save_to_disk``, or the name of a Hugging Face
            dataset.
        tokenizer: Name or folder for ``AutoTokenizer.from_pretrained``, usually that of the model,
            or a ready tokenizer. One without a padding token is padded with its end-of-sequence
            token; no token is ever added to it.
        format: What the columns mean. ``"alpaca"``: ``instruction``, ``input``, ``output``, also
            Dolly's ``context`` and ``response``; ``"chat"``: ``messages`` or, as ShareGPT has it,
            ``conversations``; ``"text-pairs"``: ``prompt`` or ``question`` and ``completion``,
            ``response`` or ``answer``. ``"auto"`` goes by the names of the columns.
        sequence_len: Largest number of tokens of an example. Like the next default chosen here,
            for answers of a few paragraphs and a small model.
        batch_size: Examples per batch and rank.
        mask_prompt: Train on the answers alone; False trains on every token.
        pad_to_multiple_of: Round the length of a batch up to a multiple of this, which must divide
            `sequence_len`; 8 suits tensor cores. None does not.
        valid_fraction: Expected share of examples to hold out, chosen by their content alone, so
            copies of an example stay together. Has no effect where validation data exist.
        valid_source: Data for validation, named like `source`; a Hugging Face dataset brings its
            ``validation`` split. None holds out a part of `source`.
        seed: Chooses the order of the training examples.
        num_workers: Processes that load batches. Reading is cheap, so 0 is a good choice.
        config_name: Configuration of a Hugging Face dataset.
        cache_dir: Folder for tokens, by default that of `default_cache_dir`.

    Raises:
        ValueError: If an argument is outside its range; later, in `prepare_data`, if the data or
            the tokenizer do not support what is asked of them.
        FileNotFoundError: In `prepare_data`, if a path does not exist.

    References:
        Taori et al. (2023), "Stanford Alpaca". https://github.com/tatsu-lab/stanford_alpaca
    """

    def __init__(
        self,
        source: str,
        tokenizer: str | PreTrainedTokenizerBase,
        *,
        format: Format = "auto",
        sequence_len: int = 1024,
        batch_size: int = 8,
        mask_prompt: bool = True,
        pad_to_multiple_of: int | None = None,
        valid_fraction: float = 0.05,
        valid_source: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        config_name: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            sequence_len=sequence_len, batch_size=batch_size, seed=seed, num_workers=num_workers
        )
        if format not in get_args(Format):
            raise ValueError(f"`format` must be one of {get_args(Format)}, got {format!r}.")
        if not 0 < valid_fraction < 1:
            raise ValueError(f"`valid_fraction` must be in (0, 1), got {valid_fraction}.")
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        if multiple < 1 or sequence_len % multiple != 0:
            raise ValueError(
                f"`pad_to_multiple_of` must divide `sequence_len` = {sequence_len}, got {multiple}."
            )
        self.source = source
        self.format: Format = format
        self.mask_prompt = mask_prompt
        self.pad_to_multiple_of = multiple
        self.valid_fraction = valid_fraction
        self.valid_source = valid_source
        self.config_name = config_name
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._tokenizer = tokenizer
        self._data: PreparedInstructions | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loads it if need be.

        Raises:
            ValueError: If it cannot be loaded.
        """
        if isinstance(self._tokenizer, str):
            self._tokenizer = _load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """Token that fills up the inputs: that for padding, else the end-of-sequence token."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next(token for token in ids if token is not None)

    @override
    def prepare_data(self) -> None:
        """Tokenize the data, or find them in the cache. Lightning calls this once per node.

        Does nothing when the data are open already, as in a test after training.

        Warns:
            UserWarning: If examples are left out.
        """
        if self._data is not None:
            return
        data = prepare_instructions(
            self._sources(),
            self.tokenizer,
            sequence_len=self.sequence_len,
            valid_fraction=self.valid_fraction,
            cache_dir=self._cache(),
        )
        self.folder = data.folder.name
        num_examples = data.num_examples + sum(data.left_out.values())
        for reason, number in data.left_out.items():
            rank_zero_warn(f"Left out {number:,} of {num_examples:,} examples {reason}.")
        train, valid = data.shards["train"].info, data.shards["valid"].info
        rank_zero_info(
            f"Instructions: {train.num_documents:,} training examples of"
            f" {train.num_tokens / train.num_documents:.0f} tokens on average,"
            f" {valid.num_documents:,} validation examples; the answers of {data.num_cut:,} of them"
            f" are cut at `sequence_len` = {self.sequence_len}."
        )

    @override
    def open_folder(self, folder: str) -> None:
        """Open the tokens of all splits."""
        self._data = load_instructions(self._cache() / folder)

    @override
    def items(self, split: str) -> InstructionExamples:
        """Return the examples of one split, those for validation where there are none for testing.

        Raises:
            RuntimeError: If `setup` has not run.
        """
        if self._data is None:
            raise RuntimeError("`setup` must be called before the data are used.")
        shards = self._data.shards
        shard = shards.get(split, shards["valid"])
        return InstructionExamples(shard, mask_prompt=self.mask_prompt, pad_id=self.pad_id)

    @override
    def loader_options(self) -> dict[str, Any]:
        """Return what all loaders have in common, as arguments of `DataLoader`."""
        collate = PaddedBatch(pad_id=self.pad_id, multiple=self.pad_to_multiple_of)
        return {**super().loader_options(), "collate_fn": collate}

    def _cache(self) -> Path:
        return self.cache_dir / "instructions"

    def _sources(self) -> Sources:
        sources = open_records(self.source, self.format, config_name=self.config_name)
        if self.valid_source is None:
            return sources
        valid = open_records(
            self.valid_source,
            self.format,
            config_name=self.config_name,
            argument="valid_source",
        )
        return replace(sources, valid=valid.valid or valid.train)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    # Slow to import, and a ready tokenizer does not need it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            "`tokenizer` must be a folder or a name that `AutoTokenizer.from_pretrained` can load,"
            f" got {name} ({str(error).splitlines()[0]}). Without a network, give the folder where"
            " its `save_pretrained` has left it."
        ) from error
