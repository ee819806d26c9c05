"""The spectral health of a model on disk, without building or training it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from torch import Tensor

from spectral_lightning.spectra.cold import cold_readings
from spectral_lightning.spectra.health import HealthyRange
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.weight_files import list_tensors, read_tensors
from spectral_lightning.spectra.weight_matrices import StoredMatrix, select_matrices

_RANK_ONE = 1 + 1e-5
"""Stable rank up to which a matrix counts as rank one: the accuracy of a reading, and ten times
what rounding to bfloat16 adds to a matrix of rank one."""


class ScanStatus(StrEnum):
    """What a reading says of a layer, the worst first."""

    FAILED = "not finite"
    ZERO = "zero"
    RANK_ONE = "rank one"
    BELOW = "below"
    ABOVE = "above"
    HEALTHY = "inside"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedLayer:
    """One weight matrix of a model on disk."""

    reading: Reading
    """Its numbers."""
    stored_shape: tuple[int, ...]
    """Shape of the tensor it is stored in."""
    dtype: str
    """Torch's name of the dtype it is stored in."""
    offset: float
    """Signed distance of the relative stable rank to the healthy range (`HealthyRange.offset`); NaN
    for a layer that has none, never above 0 for one row or column, which can have no other."""
    status: ScanStatus
    """Where it stands."""

    @property
    def distance(self) -> float:
        """Distance to the healthy range, a natural logarithm; 0 inside, NaN where `offset` is."""
        return 0.0 if self.offset <= 0 else self.offset


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanReport:
    """What was measured of a model on disk."""

    layers: tuple[ScannedLayer, ...]
    """Layers without numbers first, then those of rank one, then by distance, largest first."""
    skipped: Mapping[str, str]
    """Tensors of two or more dimensions that were not measured, each with the reason."""
    num_vectors: int
    """Tensors of fewer dimensions in the files."""
    healthy: HealthyRange
    """The range that distances are measured to."""


def scan_model(
    path: str | Path,
    layers: str | Sequence[str] = "*",
    *,
    embeddings: bool = False,
    full: bool = False,
    healthy: HealthyRange | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScanReport:
    """Measure every weight matrix of a model on disk.

    Reads one tensor at a time, in memory bounded by the largest matrix and its float32 copy
    (`cold_readings`, `read_tensors`).

    Args:
        path: File or folder, as in `list_tensors`.
        layers: Glob, or several, over names, as in `select_matrices`.
        embeddings: Whether embedding tables are measured.
        full: Whether all singular values are computed, for condition number and effective rank.
        healthy: Range that distances are measured to. Defaults to ``HealthyRange()``.
        progress: Called after each layer with the number of layers done and of all.

    Returns:
        The readings, worst layer first.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If the files cannot be read, or nothing in them is selected.
    """
    healthy = healthy or HealthyRange()
    found = select_matrices(list_tensors(path), layers, embeddings=embeddings)
    matrices = {matrix.name: matrix for matrix in found.matrices}
    scanned = []
    for reading in cold_readings(_read(found.matrices), full=full):
        matrix = matrices[reading.name]
        offset = _offset(reading, healthy)
        scanned.append(
            ScannedLayer(
                reading=reading,
                stored_shape=matrix.stored.shape,
                dtype=matrix.stored.dtype,
                offset=offset,
                status=_status(reading, offset, healthy),
            )
        )
        if progress is not None:
            progress(len(scanned), len(matrices))
    return ScanReport(
        layers=tuple(sorted(scanned, key=_severity)),
        skipped=found.skipped,
        num_vectors=found.num_vectors,
        healthy=healthy,
    )


def _read(matrices: Sequence[StoredMatrix]) -> Iterator[tuple[str, Tensor]]:
    tensors = read_tensors((matrix.stored, matrix.expert) for matrix in matrices)
    for matrix in matrices:
        yield matrix.name, next(tensors).reshape(matrix.shape)


def _offset(reading: Reading, healthy: HealthyRange) -> float:
    offset = healthy.offset(reading.relative_stable_rank)
    # A vector's stable rank is 1 whatever it holds, up to four times that of a random matrix.
    return min(offset, 0.0) if min(reading.shape) == 1 else offset


def _status(reading: Reading, offset: float, healthy: HealthyRange) -> ScanStatus:
    if reading.failure is not None:
        return ScanStatus.ZERO if reading.frobenius_norm == 0 else ScanStatus.FAILED
    if min(reading.shape) > 1 and reading.stable_rank <= _RANK_ONE:
        return ScanStatus.RANK_ONE
    if offset <= 0:
        return ScanStatus.HEALTHY
    below = reading.relative_stable_rank < healthy.floor
    return ScanStatus.BELOW if below else ScanStatus.ABOVE


def _severity(layer: ScannedLayer) -> tuple[int, float]:
    """Key by which the worst layer comes first."""
    broken = (ScanStatus.FAILED, ScanStatus.ZERO, ScanStatus.RANK_ONE)
    if layer.status in broken[:2]:
        return broken.index(layer.status), 0.0
    return 2 if layer.status in broken else 3, -layer.offset
