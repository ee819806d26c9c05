"""The tensors of one file: safetensors, and what `torch.save` and Lightning write.

Lives here: the two formats, and what can be wrong with a file. Which files make up a model lives in
`weight_files`.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectral_lightning.spectra.names import some_names

Result = TypeVar("Result")

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Where a checkpoint may keep its state dict: Lightning's key first, then those of others."""
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# All of these were seen when files were cut or overwritten at random places.
_UNREADABLE = (RuntimeError, ValueError, LookupError, EOFError, OSError, pickle.UnpicklingError)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a model's files, not read yet."""

    name: str
    """Name in the file, e.g. ``blocks.0.attn.c_q.weight``."""
    shape: tuple[int, ...]
    """Shape as it is stored."""
    dtype: str
    """Torch's name of the dtype, e.g. ``bfloat16``; the format's own where torch has none."""
    file: Path
    """File that holds it."""
    storage: tuple[int, int, int] | None = None
    """Equal for the tensors of one file that share their memory; None where none can."""


class SafetensorsFile:
    """An open safetensors file.

    Args:
        file: Where it is.
        handle: What `safe_open` gave.
    """

    mapped = True
    """Whether tensors are views of the file, whose pages stay resident while it is open."""

    def __init__(self, file: Path, handle: Any) -> None:
        self._file = file
        self._handle = handle

    def tensors(self) -> list[StoredTensor]:
        """List the tensors from the header alone."""
        found = []
        for name in self._handle.keys():  # noqa: SIM118 - a handle is no mapping
            part = self._handle.get_slice(name)
            dtype = str(part.get_dtype())
            found.append(
                StoredTensor(
                    name=name,
                    shape=tuple(part.get_shape()),
                    dtype=_TORCH_NAMES.get(dtype, dtype),
                    file=self._file,
                )
            )
        return found

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension."""
        if index is None:
            whole: Tensor = self._handle.get_tensor(name)
            return whole
        entry: Tensor = self._handle.get_slice(name)[index]
        return entry


class TorchFile:
    """The state dict of a file that `torch.save` wrote.

    Args:
        file: Where it is.
        content: What `torch.load` gave.
        mapped: Whether its tensors are views of the file.

    Raises:
        ValueError: If there is no state dict in it.
    """

    def __init__(self, file: Path, content: object, *, mapped: bool) -> None:
        self.mapped = mapped
        self._file = file
        self._tensors = _state_dict(file, content)

    def tensors(self) -> list[StoredTensor]:
        """List the tensors of the state dict."""
        return [self._stored(name, tensor) for name, tensor in self._tensors.items()]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or one entry of its first dimension."""
        tensor = self._tensors[name].detach()
        return tensor if index is None else tensor[index]

    def _stored(self, name: str, tensor: Tensor) -> StoredTensor:
        dtype, storage = str(tensor.dtype).removeprefix("torch."), None
        if tensor.layout != torch.strided:
            dtype = f"sparse {dtype}"
        elif tensor.numel() > 0:
            start = tensor.untyped_storage().data_ptr()
            storage = (start, int(tensor.storage_offset()), tensor.numel())
        return StoredTensor(
            name=name, shape=tuple(tensor.shape), dtype=dtype, file=self._file, storage=storage
        )


WeightFile = SafetensorsFile | TorchFile


@contextmanager
def open_weights(file: Path) -> Iterator[WeightFile]:
    """Open a file of weights; its suffix says whether it is safetensors.

    Args:
        file: An existing file.

    Yields:
        The open file. Tensors that it gave stay valid afterwards.

    Raises:
        ValueError: If the file is empty, damaged, of another format or holds no state dict, or if
            it holds objects that are not loaded because they could run any program.
    """
    if file.stat().st_size == 0:
        raise ValueError(f"A file of weights must not be empty, but {file} is.")
    if file.suffix == ".safetensors":
        with _explained_safetensors(file, lambda: safe_open(file, framework="pt")) as handle:
            yield SafetensorsFile(file, handle)
    else:
        with file.open("rb") as start:
            mapped = start.read(4) == b"PK\x03\x04"  # a zip file: what torch.save writes since 1.6
        yield TorchFile(file, _loaded(file, mapped), mapped=mapped)


def _explained_safetensors(file: Path, load: Callable[[], Result]) -> Result:
    try:
        return load()
    except SafetensorError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"A safetensors file must be complete, but {file} is cut off, damaged or of another"
            f" format ({reason})."
        ) from error


def _loaded(file: Path, mapped: bool) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a file's own old or odd contents
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except _UNREADABLE as error:
        text = " ".join(str(error).split())
        is_pickle = mapped or "Unsupported operand" not in text  # an opcode, as text has by chance
        if is_pickle and ("Unsupported" in text or "TorchScript" in text):
            found = re.search(r"GLOBAL (\S+)", text)
            what = f" ({found.group(1)})" if found else ""
            raise ValueError(
                f"A checkpoint must hold tensors and plain containers only, but {file} holds other"
                f" objects{what}, which are not loaded because they could run any program. Convert"
                " it where it was written:"
                " `safetensors.torch.save_model(model, 'model.safetensors')`."
            ) from error
        raise ValueError(
            f"A checkpoint must be complete, but {file} is cut off, damaged or no checkpoint at"
            " all."
        ) from error


def _state_dict(file: Path, content: object) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name; optimizer states and other contents are left alone."""
    parts: list[Any] = [content]
    if isinstance(content, Mapping):
        nested = [content.get(key) for key in _STATE_DICT_KEYS]
        parts = [nested[0], content, *nested[1:]]  # Lightning's key is clear, the others are words
    for part in parts:
        found = _tensors(part)
        if found:
            return found
    has = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        has = f"the keys {some_names(list(map(str, content)), none='of nothing')}"
    raise ValueError(f"A checkpoint must hold a state dict, but {file} holds {has}.")


def _tensors(part: object) -> dict[str, Tensor]:
    if not isinstance(part, Mapping):
        return {}
    return {str(name): value for name, value in part.items() if isinstance(value, Tensor)}
