"""Token streams on disk: flat files of token ids, opened as memory maps.

A shard is one file of little-endian unsigned integers without a header; what it holds is recorded
in a `ShardInfo`, which `preparation` keeps beside it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CHECK_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What a shard holds; plain values, so that it goes into JSON as a dict."""

    dtype: str
    """NumPy name of the integer type, ``"<u2"`` or ``"<u4"``."""
    num_tokens: int
    """Length of the stream."""
    num_bytes: int
    """Bytes of raw UTF-8 text that the stream stands for."""
    num_documents: int
    """Documents in the stream."""
    checksum: int
    """CRC-32 of the file."""


class ShardWriter:
    """Write documents one after the other into a shard.

    Args:
        path: File to create.
        token_bytes: Bytes per token id, shape ``(vocab_size,)``; its length decides the width:
            2 bytes per token up to 65,536 ids, else 4.
    """

    def __init__(self, path: Path, token_bytes: Tensor) -> None:
        self._file = path.open("wb")
        self._dtype = "<u2" if len(token_bytes) <= 1 << 16 else "<u4"
        self._token_bytes = token_bytes.numpy()
        self._num_tokens = self._num_bytes = self._num_documents = self._checksum = 0

    def append(self, tokens: Sequence[int]) -> int:
        """Add one document and return the number of text bytes its tokens stand for."""
        ids = np.array(tokens, dtype=self._dtype)
        content = ids.tobytes()
        num_bytes = int(self._token_bytes[ids].sum())
        self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self._num_tokens += len(ids)
        self._num_bytes += num_bytes
        self._num_documents += 1
        return num_bytes

    def info(self) -> ShardInfo:
        """Return what was written so far."""
        return ShardInfo(
            dtype=self._dtype,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            num_documents=self._num_documents,
            checksum=self._checksum,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class TokenShard:
    """A stream of token ids that is read from disk on demand.

    Opened on first use and again after unpickling, so loader workers share the pages and never
    receive a copy.

    Args:
        path: File written by `ShardWriter`.
        info: What the file holds.

    Raises:
        ValueError: If the file's size does not fit `info`.
    """

    def __init__(self, path: Path, info: ShardInfo) -> None:
        self.path = path
        self.info = info
        self._tokens: npt.NDArray[Any] | None = None
        if (reason := self.damage(deep=False)) is not None:
            raise ValueError(f"The token shard is damaged: {reason}. Prepare the data again.")

    def __len__(self) -> int:
        return self.info.num_tokens

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}

    def read(self, start: int, stop: int) -> Tensor:
        """Return tokens ``start`` to ``stop`` (exclusive), int64, on the CPU."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, dtype=self.info.dtype, mode="r")
        return torch.from_numpy(self._tokens[start:stop].astype(np.int64))

    def damage(self, *, deep: bool) -> str | None:
        """Compare the file with what was written.

        Args:
            deep: Also read the whole file and compare its checksum (about 1 s per GB).

        Returns:
            What is wrong, or None.
        """
        if not self.path.is_file():
            return f"{self.path} is missing"
        expected = self.info.num_tokens * np.dtype(self.info.dtype).itemsize
        if (size := self.path.stat().st_size) != expected:
            return f"{self.path} has {size} bytes instead of {expected}"
        if deep and _checksum(self.path) != self.info.checksum:
            return f"{self.path} does not match its checksum"
        return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHECK_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
