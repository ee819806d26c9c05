"""Readings of matrices that are seen once: no warm start, and a tolerance far below a monitor's.

Lives here: which kernel measures a matrix of which size, and how many are measured together. What
follows a weight while it moves lives in `tracker`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype
from spectral_lightning.linalg.exact import singular_values
from spectral_lightning.linalg.intervals import spectral_norm_interval
from spectral_lightning.linalg.lanczos import leading_triplets
from spectral_lightning.linalg.null import gaussian_condition_number, gaussian_stable_rank
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.spectrum import exact_spectrum

EXACT_SIDE = 128
"""Matrices with a side of at most this get all their singular values, which takes a third of the
time of the leading ones of a random matrix, and as long or half as long again where they decay.
Chosen by scripts/choose_scan.py."""
NUM_VECTORS = 3
"""Vectors in the random start. Chosen by scripts/choose_scan.py: 2 are up to a sixth faster, with
a worst error five times as large; 1 is slower."""
RTOL, MAX_RESIDUAL = 2e-7, 1e-3
"""Tolerances of `leading_triplets`. Chosen by scripts/choose_scan.py: ten times the `rtol` is no
faster, and where leading values nearly agree the worst error of a spectral norm grows from 1e-7 to
3e-6; a stable rank is off by twice that."""
MOST_PASSES = 128
"""Passes after which a matrix gets all its singular values instead. Set by hand: a 5632 x 2048
Gaussian matrix takes about 35."""
ALONE_BYTES, TOGETHER_BYTES = 16 * 2**20, 64 * 2**20
"""Matrices of up to the first size wait until those waiting reach the second, and those of one
shape are measured together. Chosen by scripts/choose_scan.py: 384 x 384 then takes a fifth of the
time, 1024 x 1024 half, 1024 x 4096 four fifths."""
_SMALLEST, _LARGEST = 1e-12, 1e15
"""Frobenius norms between which no square of a float32 entry that matters is lost."""


class _Numbers(NamedTuple):
    """What is measured of one matrix."""

    spectral_norm: float
    interval: tuple[float, float]
    frobenius_norm: float
    condition_number: float | None = None
    effective_rank: float | None = None


def cold_readings(
    weights: Iterable[tuple[str, Tensor]], *, full: bool = False
) -> Iterator[Reading]:
    """Measure matrices that are handed over one by one.

    The spectral norm comes from a few products with the matrix (`leading_triplets`, from a random
    start), or from all singular values where the matrix is small or has not converged. It and the
    stable rank equal those of a float64 decomposition to 1e-5. Beside a float32 copy of the largest
    matrix at most 64 MiB of smaller ones are held.

    Args:
        weights: Names and matrices, shape ``(m, n)``, floating-point, non-empty, on the CPU
            (with `full`, on any device that has float64).
        full: Whether all singular values are computed, for condition number and effective rank:
            ``O(m n min(m, n))``, in float64 (`singular_values`).

    Yields:
        One reading for each matrix, of step 0, not always in the order given. A matrix with a NaN
        or infinite entry and a zero one give a reading with `failure`.

    Example:
        >>> (reading,) = cold_readings([("fc", torch.diag(torch.tensor([4.0, 3.0])))])
        >>> reading.spectral_norm, round(reading.stable_rank, 4)
        (4.0, 1.5625)
    """
    waiting: defaultdict[tuple[torch.Size, torch.dtype], list[tuple[str, Tensor]]]
    waiting, held = defaultdict(list), 0
    for name, weight in weights:
        matrix = weight.detach().to(compute_dtype(weight)).contiguous()
        del weight
        if matrix.nbytes > ALONE_BYTES:
            yield from _readings([(name, matrix)], full)
            continue
        waiting[matrix.shape, matrix.dtype].append((name, matrix))
        held += matrix.nbytes
        if held > TOGETHER_BYTES - ALONE_BYTES:
            for group in waiting.values():
                yield from _readings(group, full)
            waiting.clear()
            held = 0
    for group in waiting.values():
        yield from _readings(group, full)


def _readings(group: Sequence[tuple[str, Tensor]], full: bool) -> list[Reading]:
    """Readings of matrices of one shape and dtype."""
    matrices = [matrix for _, matrix in group]
    if full or min(matrices[0].shape) <= EXACT_SIDE:
        numbers = [_exact(matrix, full) for matrix in matrices]
    else:
        numbers = _iterated(matrices)
    return [
        _reading(name, matrix, found) for (name, matrix), found in zip(group, numbers, strict=True)
    ]


def _iterated(matrices: Sequence[Tensor]) -> list[_Numbers]:
    (m, n), dtype = matrices[0].shape, matrices[0].dtype
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrices), NUM_VECTORS, n, dtype=dtype, generator=generator)
    found = leading_triplets(
        matrices, start, rtol=RTOL, max_residual=MAX_RESIDUAL, max_passes=MOST_PASSES
    )
    norm = found.values[:, 0]
    low, high = spectral_norm_interval(norm, found.residual, num_terms=max(m, n), dtype=dtype)
    columns = (norm, low, high, found.frobenius_norm, found.num_passes)
    numbers = []
    for matrix, row in zip(matrices, zip(*(c.tolist() for c in columns), strict=True), strict=True):
        value, below, above, frobenius, passes = row
        if _SMALLEST <= frobenius <= _LARGEST and passes < MOST_PASSES:
            numbers.append(_Numbers(value, (below, above), frobenius))
        else:
            numbers.append(_exact(matrix, full=False))
    return numbers


def _exact(matrix: Tensor, full: bool) -> _Numbers:
    condition, rank = (math.nan, math.nan) if full else (None, None)
    if not bool(torch.isfinite(matrix).all()):
        return _Numbers(math.nan, (math.nan, math.nan), math.nan, condition, rank)
    if full:
        condition, rank, spectrum = exact_spectrum(matrix)
        values = torch.tensor(spectrum, dtype=torch.float64)
    else:
        values = singular_values(matrix).double()
    low, high = spectral_norm_interval(
        values[:1], torch.zeros(1), num_terms=max(matrix.shape), dtype=matrix.dtype
    )
    frobenius: float = torch.linalg.vector_norm(values).item()
    return _Numbers(values[0].item(), (low.item(), high.item()), frobenius, condition, rank)


def _reading(name: str, matrix: Tensor, found: _Numbers) -> Reading:
    m, n = matrix.shape
    failure = None
    if not math.isfinite(found.frobenius_norm):
        failure = "the weight has a NaN or infinite entry"
    elif found.frobenius_norm == 0:
        failure = "the weight is zero, which has no stable rank"
    norm, condition = found.spectral_norm, found.condition_number
    stable_rank = math.nan if failure else (found.frobenius_norm / norm) ** 2
    relative = condition
    if condition is not None and math.isfinite(condition):
        relative = condition / gaussian_condition_number(m, n)
    return Reading(
        name=name,
        step=0,
        shape=(m, n),
        spectral_norm=norm,
        spectral_norm_interval=found.interval,
        frobenius_norm=found.frobenius_norm,
        stable_rank=stable_rank,
        relative_stable_rank=stable_rank / gaussian_stable_rank(m, n),
        condition_number=condition,
        relative_condition_number=relative,
        effective_rank=found.effective_rank,
        spectrum_step=None if condition is None else 0,
        failure=failure,
    )
