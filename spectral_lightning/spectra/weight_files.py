"""The files that make up a model, and their tensors one at a time.

Lives here: what a path stands for, and reading in bounded memory. The formats live in
`weight_formats`; which tensors are weight matrices is decided in `weight_matrices`.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from spectral_lightning.spectra.weight_formats import StoredTensor, open_weights

_MOST_MAPPED = 32 * 2**20
"""Bytes read from a mapped file before it is opened anew, which gives the pages read so far back.
Set by hand: an opening takes about a millisecond, reading that much ten or more."""
_FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What a folder of Hugging Face's is searched for, in this order."""
_CHECKPOINTS = ("*.ckpt", "*.pt", "*.pth", "*.bin")


def list_tensors(path: str | Path) -> tuple[StoredTensor, ...]:
    """List the tensors of a model without reading them.

    Args:
        path: A checkpoint of Lightning or a state dict (``.ckpt``, ``.pt``, ``.pth``, ``.bin``), a
            ``.safetensors`` file, or a folder of Hugging Face's with one of these, whole or in
            shards. Of a checkpoint only the state dict counts, not the optimizer's state.

    Returns:
        The tensors in the order of the files.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If a folder holds no weights, a shard is missing, two files hold a tensor of
            the same name, or a file cannot be read (`open_weights`).
    """
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(Path(path)):
        with open_weights(file) as opened:
            tensors = opened.tensors()
        for tensor in tensors:
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise ValueError(
                    f"`path` must hold one model, but `{tensor.name}` stands both in"
                    f" {other.file.name} and in {file.name} of {path}; give one of the files."
                )
    return tuple(found.values())


def read_tensors(wanted: Iterable[tuple[StoredTensor, int | None]]) -> Iterator[Tensor]:
    """Read tensors one at a time.

    At most 32 MiB of a file or one tensor, whichever is more, stay resident besides what the caller
    holds on to; but for files in the format that `torch.save` had before version 1.6, which are
    read whole.

    Args:
        wanted: Tensors, those of one file in a row, each with an index to read one entry of its
            first dimension, or None to read all of it.

    Yields:
        The tensors on the CPU, in the dtype they are stored in; they may be views of the file.

    Raises:
        ValueError: If a file cannot be read any more (`open_weights`).
    """
    for file, group in groupby(wanted, key=lambda item: item[0].file):
        left = deque(group)
        while left:
            with open_weights(file) as opened:
                mapped = 0
                while left and (mapped < _MOST_MAPPED or not opened.mapped):
                    stored, index = left.popleft()
                    mapped += _num_bytes(stored, index)
                    yield opened.read(stored.name, index)


def _num_bytes(stored: StoredTensor, index: int | None) -> int:
    shape = stored.shape if index is None else stored.shape[1:]
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return prod(shape) * dtype.itemsize


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"`path` must be an existing file or folder, got {path}.")
    for pattern in _FOLDER_FILES:
        files = sorted(path.glob(pattern))
        if files and files[0].suffix == ".json":
            return _shards(files[0])
        if files:
            return files
    if (path / "meta.pt").is_file() or (path / ".metadata").is_file():
        raise ValueError(
            f"`path` must be a file of weights or a folder of Hugging Face's, but {path} is a"
            " sharded checkpoint; join it first: `python -m"
            f" lightning.pytorch.utilities.consolidate_checkpoint {path}`."
        )
    others = sorted(file.name for pattern in _CHECKPOINTS for file in path.glob(pattern))
    hint = f"; give one of its files, such as {others[0]}" if others else ""
    raise ValueError(
        f"`path` must be a file of weights or a folder with model.safetensors or pytorch_model.bin"
        f" (whole or in shards), but {path} has neither{hint}."
    )


def _shards(index: Path) -> list[Path]:
    """Files that an index of shards names."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"An index of shards must hold a `weight_map` of names to files, but {index} does not."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"A model in shards must be complete, but {len(missing)} of the {len(files)} files that"
            f" {index} names do not exist{f', such as {missing[0]}' if missing else ''}."
        )
    return files
