"""Which tensors of a model's files are weight matrices, by name, shape and dtype alone.

Lives here: the same choice as in `targets`, where no module says what a tensor means. Fused
projections are not taken apart: nothing in a file says where one part ends.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from spectral_lightning.spectra.names import some_names
from spectral_lightning.spectra.targets import clean_name
from spectral_lightning.spectra.weight_formats import StoredTensor

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_EMBEDDING = re.compile(r"embed|^(.*_)?embs?(_.*)?$|^(wte|wpe|shared)$", re.IGNORECASE)
_PROJECTION = re.compile(r"proj|dense|linear|mapping", re.IGNORECASE)
_NO_WEIGHT = re.compile(r"(^|_)(bias|mask|cached)$")
_IN_PARTS = re.compile(r"(^|\.)parametrizations\.|(^|\.|_)weight_(g|v|orig|mask)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMatrix:
    """One weight matrix of a model's files, not read yet."""

    name: str
    """The tensor's name without ``.weight`` and wrappers, as a monitor names the layer; for a stack
    of experts followed by the expert's number."""
    stored: StoredTensor
    """The tensor it is stored in."""
    expert: int | None = None
    """Index in a stack of experts, for a tensor of shape ``(experts, m, n)``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the matrix, with convolutions flattened to ``(out, in * kernel)``."""
        m, *rest = self.stored.shape if self.expert is None else self.stored.shape[1:]
        return m, prod(rest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was found in the files of a model."""

    matrices: tuple[StoredMatrix, ...]
    """Matrices to measure, in the order of the files."""
    skipped: Mapping[str, str]
    """Tensors of two or more dimensions that are not measured, each with the reason."""
    num_vectors: int
    """Tensors of fewer dimensions (biases, scales of norms, counters)."""


def select_matrices(
    tensors: Iterable[StoredTensor],
    layers: str | Sequence[str] = "*",
    *,
    embeddings: bool = False,
) -> Selection:
    """Find the weight matrices among the tensors of a model's files.

    Measured is every floating-point tensor of two dimensions, as it is stored (Hugging Face's
    Conv1D is ``(in, out)``, with the same singular values), and of three to five dimensions as a
    convolution; a three-dimensional one whose name holds "experts" is a stack of matrices. Tensors
    that share their memory are measured once, under the first name.

    Args:
        tensors: Tensors, as `list_tensors` returns them.
        layers: Glob, or several, over names such as ``"blocks.*.mlp.*"``; what is not selected is
            neither measured nor listed as skipped.
        embeddings: Whether embedding tables are measured, which the name tells: one that holds
            "embed", or is ``wte``, ``wpe`` or ``shared``.

    Returns:
        The matrices, and what was skipped and why.

    Raises:
        ValueError: If a glob selects nothing, or there is no matrix at all.

    Example:
        >>> from pathlib import Path
        >>> def stored(name, *shape):
        ...     return StoredTensor(name=name, shape=shape, dtype="float32", file=Path("model.pt"))
        >>> tensors = [stored("wte.weight", 9, 4), stored("fc.weight", 8, 4), stored("fc.bias", 8)]
        >>> found = select_matrices(tensors)
        >>> [(matrix.name, matrix.shape) for matrix in found.matrices], list(found.skipped)
        ([('fc', (8, 4))], ['wte'])
    """
    tensors = list(tensors)
    matrices: list[StoredMatrix] = []
    skipped: dict[str, str] = {}
    owners: dict[tuple[object, ...], str] = {}
    for name, tensor in _by_short_name(tensors).items():
        reason = _unfit(name, tensor, embeddings)
        if reason is None and tensor.storage is not None:
            owner = owners.setdefault((tensor.file, *tensor.storage), name)
            reason = None if owner == name else f"shares its memory with {owner}"
        if reason is None:
            matrices += _matrices(name, tensor)
        else:
            skipped[name] = reason
    globs = [layers] if isinstance(layers, str) else list(layers)
    _require_matches(globs, [matrix.name for matrix in matrices], skipped)
    return Selection(
        matrices=tuple(matrix for matrix in matrices if _selected(matrix.name, globs)),
        skipped={name: reason for name, reason in skipped.items() if _selected(name, globs)},
        num_vectors=sum(len(tensor.shape) < 2 for tensor in tensors),
    )


def _by_short_name(tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of two or more dimensions by the name that is shown."""
    taken = {tensor.name for tensor in tensors}
    named = {}
    for tensor in tensors:
        if len(tensor.shape) >= 2:
            short = clean_name(tensor.name).removesuffix(".weight")
            named[tensor.name if short in taken or short in named else short] = tensor
    return named


def _unfit(name: str, tensor: StoredTensor, embeddings: bool) -> str | None:
    """Why a tensor of two or more dimensions is not measured; None if it is."""
    num_dims = len(tensor.shape)
    if tensor.dtype not in _DTYPES:
        return f"is stored as {tensor.dtype}, which is quantised or not real"
    if 0 in tensor.shape:
        return f"is of shape {tensor.shape}, which is empty"
    if num_dims > 5:
        return f"is of shape {tensor.shape}, whose meaning is unknown"
    if _NO_WEIGHT.search(name.rpartition(".")[-1]):
        return "is a bias, mask or table by its name"
    if _IN_PARTS.search(name):
        return "is part of a reparametrized weight, which is not stored whole"
    if num_dims <= 3 and not embeddings and _is_embedding(name):
        return "is an embedding table by its name (measured with `embeddings`)"
    return None


def _is_embedding(name: str) -> bool:
    """Whether the last part of a name that is no number speaks of an embedding table."""
    words = [part for part in name.split(".") if not part.isdecimal()]
    last = words[-1] if words else ""
    return bool(_EMBEDDING.search(last)) and not _PROJECTION.search(last)


def _matrices(name: str, tensor: StoredTensor) -> list[StoredMatrix]:
    if len(tensor.shape) == 3 and "experts" in name:
        return [
            StoredMatrix(name=f"{name}.{index}", stored=tensor, expert=index)
            for index in range(tensor.shape[0])
        ]
    return [StoredMatrix(name=name, stored=tensor)]


def _selected(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _require_matches(
    globs: Sequence[str], names: Sequence[str], skipped: Mapping[str, str]
) -> None:
    for glob in globs:
        if any(fnmatchcase(name, glob) for name in names):
            continue
        hint = next((f"{n} {why}" for n, why in skipped.items() if fnmatchcase(n, glob)), None)
        has = some_names(names, none="no weight matrices that can be measured")
        raise ValueError(
            f"`layers` must match at least one weight matrix, got {glob!r};"
            f" {hint or f'the model has {has}'}."
        )
