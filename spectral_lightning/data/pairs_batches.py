"""Tokenized rows of texts on disk, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from spectral_lightning.data.shards import ShardInfo, ShardWriter, TokenShard

EvalKind = Literal["retrieval", "sts"]
"""What a set measures: whether the positive is found, or whether scores are ranked alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """What the loader at the same position evaluates."""

    name: str
    """Name for logs: ``pairs`` and ``scored`` for held-out rows, else the user's."""
    kind: EvalKind
    """``"retrieval"``: find the positive among all texts that are not anchors; ``"sts"``: batches
    have ``scores``."""
    num_rows: int
    """Rows that count, over all ranks."""


class RowPart(NamedTuple):
    """Rows with equally many texts, of one source in training."""

    texts: npt.NDArray[np.int64]
    """Numbers of the texts, shape ``(rows, k)``: anchor, positive, hard negatives."""
    scores: npt.NDArray[np.float32] | None = None
    """Scores in [0, 1], shape ``(rows,)``."""


class TextTable:
    """Tokenized texts, each kept once.

    Args:
        folder: Where `write_texts` has left them.
        info: What the shard holds.
    """

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        self.shard = TokenShard(folder / "texts.bin", info)
        self.ids: npt.NDArray[np.int64] = np.load(folder / "ids.npy")
        self._starts: npt.NDArray[np.int64] = np.load(folder / "starts.npy")

    def read(self, number: int) -> Tensor:
        """Return the token ids of one text, shape ``(length,)``, int64."""
        return self.shard.read(int(self._starts[number]), int(self._starts[number + 1]))


class TextWriter:
    """Write tokenized texts into a folder, as a context manager.

    Args:
        folder: An existing folder.
        num_ids: Number of token ids of the tokenizer.
    """

    def __init__(self, folder: Path, num_ids: int) -> None:
        self._folder = folder
        self._shard = ShardWriter(folder / "texts.bin", torch.zeros(num_ids))
        self._starts = [0]

    def append(self, tokens: Sequence[int]) -> None:
        """Add one text."""
        self._shard.append(tokens)
        self._starts.append(self._starts[-1] + len(tokens))

    def finish(self, ids: Sequence[int]) -> ShardInfo:
        """Close the files and return what they hold.

        Args:
            ids: 63-bit id of each text, equal for equal texts.
        """
        self._shard.__exit__()
        np.save(self._folder / "starts.npy", np.array(self._starts, dtype=np.int64))
        np.save(self._folder / "ids.npy", np.array(ids, dtype=np.int64))
        return self._shard.info()


class PairBatches(Dataset[dict[str, Tensor]]):
    """Batches of rows, padded on the right to the longest text of the batch.

    Args:
        table: The texts.
        parts: The rows; a batch has rows of one part.
        pad_id: Token that fills up; nothing attends to it.
        multiple: The length is rounded up to a multiple of this, but not above `max_length`.
        max_length: Largest number of tokens of a text.
        is_training: Leave out ``valid``, the mark of rows that count.
    """

    def __init__(
        self,
        table: TextTable,
        parts: Sequence[RowPart],
        *,
        pad_id: int,
        multiple: int,
        max_length: int,
        is_training: bool,
    ) -> None:
        self.table = table
        self.parts = tuple(parts)
        self.pad_id = pad_id
        self.multiple = multiple
        self.max_length = max_length
        self.is_training = is_training
        self._firsts = np.cumsum([0, *(len(part.texts) for part in parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def text_ids(self) -> list[npt.NDArray[np.int64]]:
        """Return the ids of the texts of each part, shape ``(rows, k)``."""
        return [self.table.ids[part.texts] for part in self.parts]

    @override
    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of some rows; ``~row`` asks for a row that does not count."""
        wanted = np.atleast_1d(np.asarray(index, dtype=np.int64))
        rows = np.where(wanted < 0, ~wanted, wanted)
        number = int(np.searchsorted(self._firsts, rows[0], side="right")) - 1
        part, rows = self.parts[number], rows - self._firsts[number]
        texts = part.texts[rows]
        ids, mask = self._padded(texts)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "text_ids": torch.from_numpy(self.table.ids[texts]),
        }
        if part.scores is not None:
            batch["scores"] = torch.from_numpy(part.scores[rows])
        if not self.is_training:
            batch["valid"] = torch.from_numpy(wanted >= 0)
        return batch

    def _padded(self, texts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, each ``(rows, k, length)``, int64."""
        tokens = [self.table.read(text) for text in texts.flatten().tolist()]
        longest = max(map(len, tokens))
        length = min(longest + -longest % self.multiple, max(self.max_length, longest))
        ids = torch.full((len(tokens), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        return ids.view(*texts.shape, length), mask.view(*texts.shape, length)
