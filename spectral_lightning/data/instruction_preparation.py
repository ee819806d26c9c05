"""From instruction data to token ids in the cache, once per data, tokenizer and length.

A shard holds the examples one after the other, each token as ``4 * id + 2 * first + answer``:
whether it opens an example and whether it belongs to an answer.
"""

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from spectral_lightning.data.cache import fill_folder
from spectral_lightning.data.chat import UnusableDialogueError
from spectral_lightning.data.instruction_encoding import DialogueEncoder, EncodedDialogue
from spectral_lightning.data.instruction_formats import read_dialogue
from spectral_lightning.data.shards import ShardInfo, ShardWriter, TokenShard
from spectral_lightning.data.sources import Sources
from spectral_lightning.data.splits import DocumentSplits
from spectral_lightning.data.windows import EMPTY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of tokens that are not trained on; what losses in `torch` and `transformers` leave out."""

_LAYOUT = 1  # of the cache folder; a new number leaves old folders alone
_INDEX = "index.json"
_SCAN_TOKENS = 1 << 22
_FIRST, _ANSWER, _ID = 2, 1, 4


class Example(NamedTuple):
    """One dialogue."""

    ids: Tensor
    """Token ids, shape ``(length,)``, int64."""
    labels: Tensor
    """The same, or `IGNORED` for tokens that are not trained on."""


class InstructionExamples(Dataset[Example]):
    """The examples of one split.

    Args:
        shard: Where they are kept.
        mask_prompt: Train on the answers alone.
        pad_id: The one token of the item at index `EMPTY`.
    """

    def __init__(self, shard: TokenShard, *, mask_prompt: bool, pad_id: int) -> None:
        self.shard = shard
        self.mask_prompt = mask_prompt
        self.pad_id = pad_id
        self._starts = _starts(shard)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @override
    def __getitem__(self, index: int) -> Example:
        """Return one example; -1 asks for one of a single token that is not trained on."""
        if index == EMPTY:
            return Example(torch.tensor([self.pad_id]), torch.tensor([IGNORED]))
        values = self.shard.read(*self._starts[index : index + 2].tolist())
        ids = values // _ID
        if not self.mask_prompt:
            return Example(ids, ids)
        return Example(ids, ids.masked_fill(values & _ANSWER == 0, IGNORED))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedInstructions:
    """Tokenized instruction data in the cache."""

    folder: Path
    """Where they are kept."""
    shards: dict[str, TokenShard]
    """Examples by split: ``train``, ``valid`` and, where there are test data, ``test``."""
    left_out: dict[str, int]
    """How many examples are missing, by reason."""
    num_cut: int
    """How many examples have lost their end to the sequence length."""

    @property
    def num_examples(self) -> int:
        """How many examples there are in all splits together."""
        return sum(shard.info.num_documents for shard in self.shards.values())


def prepare_instructions(
    sources: Sources,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_len: int,
    valid_fraction: float,
    cache_dir: Path,
) -> PreparedInstructions:
    """Tokenize instruction data, or find them in the cache.

    Args:
        sources: Dialogues, as documents that `read_dialogue` reads.
        tokenizer: The tokenizer.
        sequence_len: Largest number of tokens of an example.
        valid_fraction: Expected share to hold out where no validation data are given.
        cache_dir: Folder for the results; created if missing.

    Raises:
        ValueError: If the data are empty, a split is or becomes empty, or the cache cannot be
            written.

    Warns:
        UserWarning: If the cache was damaged, or training examples were left out because they
            stand in the evaluation data as well.
    """
    encoder = DialogueEncoder(tokenizer, sequence_len)
    parts = [
        source and source.fingerprint() for source in (sources.train, sources.valid, sources.test)
    ]
    content = [_LAYOUT, parts, _tokenizer_digest(tokenizer), sequence_len, valid_fraction]
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    folder = cache_dir / key

    def build(building: Path) -> None:
        _build(DocumentSplits(sources, valid_fraction), encoder, building)

    fill_folder(folder, build, _damage)
    return load_instructions(folder)


def load_instructions(folder: Path) -> PreparedInstructions:
    """Open what `prepare_instructions` left in a folder."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return PreparedInstructions(
        folder=folder,
        shards={
            name: TokenShard(folder / f"{name}.bin", ShardInfo(**info))
            for name, info in index["shards"].items()
        },
        left_out=index["left_out"],
        num_cut=index["num_cut"],
    )


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of everything the tokenizer saves, its chat template included."""
    digest = hashlib.blake2b(digest_size=16)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"|{path.name} {path.stat().st_size}|".encode() + path.read_bytes())
    return digest.hexdigest()


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder, or None."""
    try:
        shards = load_instructions(folder).shards
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder} cannot be read ({error})"
    reasons = (shard.damage(deep=True) for shard in shards.values())
    return next((reason for reason in reasons if reason is not None), None)


def _build(splits: DocumentSplits, encoder: DialogueEncoder, folder: Path) -> None:
    num_values = _ID * (max(encoder.tokenizer.get_vocab().values()) + 1)
    left_out: Counter[str] = Counter()
    found: Counter[str] = Counter()
    writers: dict[str, ShardWriter] = {}
    num_cut = 0
    with ExitStack() as stack:
        for split, document in splits:
            found[split] += 1
            try:
                example = encoder.encode(read_dialogue(document))
            except UnusableDialogueError as error:
                left_out[str(error)] += 1
                continue
            if split not in writers:
                writer = ShardWriter(folder / f"{split}.bin", torch.zeros(num_values))
                writers[split] = stack.enter_context(writer)
            writers[split].append(_packed(example))
            num_cut += example.is_cut
        for name, number in found.items():
            if name not in writers:
                raise ValueError(
                    f"The {name} data must hold an example to train on, but all {number} are"
                    f" examples {' or '.join(left_out)}."
                )
        shards = {split: asdict(writer.info()) for split, writer in writers.items()}
    index: dict[str, Any] = {"shards": shards, "left_out": dict(left_out), "num_cut": num_cut}
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _packed(example: EncodedDialogue) -> list[int]:
    values = [
        _ID * token + _ANSWER * answer
        for token, answer in zip(example.ids, example.is_answer, strict=True)
    ]
    values[0] += _FIRST
    return values


def _starts(shard: TokenShard) -> Tensor:
    """Return where each example starts, and the end of the last one."""
    starts = [
        begin + torch.nonzero(shard.read(begin, min(begin + _SCAN_TOKENS, len(shard))) & _FIRST)
        for begin in range(0, len(shard), _SCAN_TOKENS)
    ]
    return torch.cat([*starts, torch.tensor([[len(shard)]])]).flatten()
