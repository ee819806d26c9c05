"""Warm-started spectral norms of all matrices of one shape.

Lives here: the warm start, its random probe, how many passes to spend. Does not live here: the
algebra (linalg), and which step is measured (the cache).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype
from spectral_lightning.linalg.intervals import spectral_norm_interval
from spectral_lightning.linalg.lanczos import LeadingTriplets, leading_triplets
from spectral_lightning.spectra.target import Target

FIELDS = ("spectral_norm", "low", "high", "frobenius_norm", "passes")
"""Columns of the table that `Tracker.measure` returns."""

RTOL = 5e-4
"""Wanted relative error of a spectral norm. Chosen by scripts/choose_tracking.py: p99.9 of the
true error is 4e-4, at 1.01 passes per reading once the first steps are over."""
PROBE = 0.1
"""Length of the fresh random direction mixed into the last tracked vector at every reading.
scripts/choose_tracking.py finds 0 to 0.3 equal on a real run; it is kept for directions that start
from nothing."""
FIRST_PASSES = 16
"""Most passes for a matrix without a warm start. Set by hand; with it the first readings of a 30 M
Llama are off by at most 6e-6 (scripts/bench_accuracy.py)."""
WARM_PASSES = 16
"""Most passes for a matrix with a warm start. Set by hand: 8 left errors of 2e-3 after a first hot
step, 16 left 9e-4."""
COLD_RTOL, COLD_RESIDUAL, COLD_VECTORS = 5e-5, 0.01, 6
"""Tolerances and block size without a warm start: tighter than warm ones, since a start without
the leading direction looks converged to the second value. Of 7,200 Gaussian matrices none did, from
2 to 6 random vectors alike (scripts/choose_tracking.py); 6 leave a margin that costs nothing."""
WHOLE_SPACE = 32
"""Matrices with a side of at most this are projected on that whole side, which is exact."""
SMALLEST = 1e-16
"""Frobenius norm below which squares of float32 entries lose digits; such a weight is as zero."""
FIXED_PASSES = 2
"""Passes where the host must not wait for residuals (anything but a CPU), when all is well."""
HURRIED_PASSES = 4
"""The same when the last residuals that reached the host were large."""


def is_measured(row: Sequence[float]) -> bool:
    """Whether a row of the table (`FIELDS`) holds numbers: the weight was finite and not zero."""
    return all(map(math.isfinite, row)) and row[3] >= SMALLEST


class Tracker:
    """Follow the spectral norms of ``L`` matrices of one shape as the weights move.

    Keeps ``k`` right vectors per matrix: the leading one, and next ones whose last carries a fresh
    random component, so that a direction that overtakes is found. Memory: ``k n`` numbers per
    matrix between readings; during one, a few times ``k (m + n)`` per pass, plus one
    float32 copy of one half-precision matrix.

    On a CPU every matrix gets passes until its own residual says that it has converged. Elsewhere
    the number of passes follows the residuals of earlier readings (`settle`), so that the host
    never waits. Matrices without a warm start are measured apart, from a larger random block.

    Args:
        targets: Matrices of one shape, dtype and device.
        num_vectors: Vectors to track, clipped to the smaller dimension; at least 2 are needed to
            catch a direction that overtakes.
        seed: Seed of the private generator of start and probe vectors.
        wait: Whether to wait for residuals on the host; None waits on a CPU only.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        num_vectors: int = 2,
        seed: int = 0,
        wait: bool | None = None,
    ) -> None:
        weight = targets[0].measured(padded=True)
        self.names = [target.name for target in targets]
        self.dtype = compute_dtype(weight)
        self.device = weight.device
        self.hurry = True
        self._targets = list(targets)
        self._shape = m, n = targets[0].measured_shape
        self._wait = self.device.type == "cpu" if wait is None else wait
        self._flipped = m <= WHOLE_SPACE and m < n
        self._n = m if self._flipped else n
        self._exact = self._n <= WHOLE_SPACE
        self._k = 0 if self._exact else min(num_vectors, m, n)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._start = self._random(len(targets), self._k)
        self._cold = set(range(len(targets)))

    def measure(self, index: Sequence[int]) -> Tensor:
        """Measure some of the matrices.

        Args:
            index: Positions in `names`, ascending.

        Returns:
            Table of shape ``(len(index), len(FIELDS))``, float64, on the device of the weights.
        """
        cold = [i for i in index if i in self._cold]
        warm = [i for i in index if i not in self._cold]
        self._cold.difference_update(index)
        if not (cold and warm):
            return self._table(index, cold=bool(cold))
        rows = dict(zip(cold, self._table(cold, cold=True).unbind(), strict=True))
        rows.update(zip(warm, self._table(warm, cold=False).unbind(), strict=True))
        return torch.stack([rows[i] for i in index])

    def settle(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Learn from readings that have reached the host what the next ones need.

        Where intervals were wide, more passes; where a weight was zero or not finite, a new start.

        Args:
            rows: Rows of the table by name; names of other matrices are passed over.
        """
        mine = {i: rows[name] for i, name in enumerate(self.names) if name in rows}
        if mine:
            self.hurry = any(row[2] - row[1] > 10 * RTOL * row[0] for row in mine.values())
            self._cold.update(i for i, row in mine.items() if not is_measured(row))

    def forget(self, name: str) -> None:
        """Stop trusting the warm start of a matrix that was written to outside the optimizer."""
        self._cold.add(self.names.index(name))

    def state_dict(self) -> dict[str, Any]:
        """Warm starts and generator state, as plain containers and CPU tensors."""
        return {
            "names": self.names,
            "start": self._start.to("cpu", copy=True),
            "generator": self._generator.get_state(),
            "cold": sorted(self._cold),
            "hurry": self.hurry,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the warm starts of the matrices that are still there, by name."""
        shape = self._start.shape[1:]
        if state["start"].shape[1:] != shape or state["start"].dtype != self.dtype:
            return  # measured with other settings: a cold start is right, only slower
        saved = {name: i for i, name in enumerate(state["names"])}
        for i, name in enumerate(self.names):
            if name in saved:
                self._start[i] = state["start"][saved[name]].to(self.device)
                keep = self._cold.add if saved[name] in state["cold"] else self._cold.discard
                keep(i)
        self.hurry = state["hurry"]
        if len(state["generator"]) == len(self._generator.get_state()):  # same kind of device
            self._generator.set_state(state["generator"])

    def _table(self, index: Sequence[int], *, cold: bool) -> Tensor:
        found = self._find([self._weight(i) for i in index], index, cold)
        start = found.next_start[:, : self._k]
        if len(index) == len(self.names):
            self._start.copy_(start)
        else:  # not by an index tensor, whose way to an accelerator makes the host wait
            for i, rows in zip(index, start.unbind(), strict=True):
                self._start[i].copy_(rows)
        norm = found.values[:, 0]
        low, high = spectral_norm_interval(
            norm, found.residual, num_terms=max(self._shape), dtype=self.dtype
        )
        columns = [norm, low, high, found.frobenius_norm, found.num_passes.double()]
        return torch.stack(columns, dim=1)

    def _weight(self, i: int) -> Tensor:
        weight = self._targets[i].measured(padded=True)
        if weight.shape != self._shape:  # changed since discovery: a failed reading, not a crash
            weight = torch.full(self._shape, math.nan, dtype=self.dtype, device=self.device)
        return weight.mT if self._flipped else weight

    def _find(self, weights: list[Tensor], index: Sequence[int], cold: bool) -> LeadingTriplets:
        if self._exact:
            basis = torch.eye(self._n, dtype=self.dtype, device=self.device)
            return leading_triplets(weights, basis.expand(len(index), -1, -1), num_passes=1)
        most = max(COLD_VECTORS, self._k)
        start = self._random(len(index), most) if cold else self._probed(index)
        if not self._wait:
            passes = FIRST_PASSES if cold else HURRIED_PASSES if self.hurry else FIXED_PASSES
            return leading_triplets(weights, start, num_passes=passes)
        if cold:
            return leading_triplets(
                weights, start, rtol=COLD_RTOL, max_residual=COLD_RESIDUAL, max_passes=FIRST_PASSES
            )
        return leading_triplets(weights, start, rtol=RTOL, max_passes=WARM_PASSES)

    def _probed(self, index: Sequence[int]) -> Tensor:
        """Warm starts with a fresh random component in the last vector."""
        whole = len(index) == len(self.names)
        start = self._start.clone() if whole else torch.stack([self._start[i] for i in index])
        start[:, -1:] += PROBE * self._random(len(index), 1)
        return start

    def _random(self, num_matrices: int, num_rows: int) -> Tensor:
        rows = torch.empty(num_matrices, num_rows, self._n, dtype=self.dtype, device=self.device)
        return rows.normal_(std=1 / math.sqrt(self._n), generator=self._generator)
