"""The one shared cache of readings of a training run.

Lives here: joining needs, measuring each matrix once per step however many ask, the packed copy
to the host, what a checkpoint keeps. Does not live here: Trainer and hooks (callbacks).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from spectral_lightning.linalg.null import gaussian_condition_number, gaussian_stable_rank
from spectral_lightning.spectra.launch import Launch, sent
from spectral_lightning.spectra.needs import Need, due_norms, due_spectra
from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.spectrum import exact_spectrum
from spectral_lightning.spectra.target import Target
from spectral_lightning.spectra.tracker import FIELDS, SMALLEST, Tracker, is_measured
from spectral_lightning.spectra.vectors import VectorCache

_Spectrum = tuple[int, float, float, tuple[float, ...]]


class SpectrumCache(Mapping[str, Reading]):
    """Latest reading of every weight matrix, measured once per optimizer step for all consumers.

    As a mapping it gives the latest *delivered* readings. `measure` launches the measurements of a
    step and delivers those launched before: consumers act on readings that are one optimizer step
    old, the same on every device and rank, and on an accelerator nothing waits but the exact
    spectra at their slower cadence. `flush` delivers what is still on its way.

    Reading a weight never changes it, and no random number is drawn from a global generator.

    Args:
        seed: Seed of the private generators.
        wait: Whether to wait for residuals on the host (`Tracker`); None waits on a CPU only.

    Attributes:
        num_decompositions: Number of matrix measurements made (spectral norms and exact spectra
            each count one per matrix), so that the bill of several consumers can be checked.
        delivered_step: Optimizer step of the newest readings delivered; None before the first.
        vectors: Singular vectors on request.
    """

    def __init__(self, *, seed: int = 0, wait: bool | None = None) -> None:
        self.num_decompositions = 0
        self._seed = seed
        self._wait = wait
        self._targets: dict[str, Target] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._needs: list[Need] = []
        self._trackers: list[Tracker] = []
        self._pending: list[Launch] = []
        self._arriving: dict[str, _Spectrum] = {}
        self._rows: dict[str, tuple[int, list[float]]] = {}
        self._spectra: dict[str, _Spectrum] = {}
        self._failures: dict[str, str] = {}
        self._done: dict[tuple[str, str], int] = {}
        self._step: int | None = None
        self._before: int | None = None
        self.delivered_step: int | None = None
        self.vectors = VectorCache(self._targets, seed=seed)

    @override
    def __getitem__(self, name: str) -> Reading:
        step, row = self._rows[name]
        return self._reading(name, step, row)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    @override
    def __len__(self) -> int:
        return len(self._rows)

    @property
    def targets(self) -> Mapping[str, Target]:
        """All matrices by name."""
        return self._targets

    @property
    def failures(self) -> Mapping[str, str]:
        """Why the latest delivered measurement failed, for the matrices where it did."""
        return self._failures

    def num_passes(self, name: str) -> int:
        """Passes over the matrix that its latest delivered spectral norm took."""
        return int(self._rows[name][1][4])

    def declare(self, need: Need, targets: Iterable[Target]) -> None:
        """Join a consumer's need to what is measured from now on.

        Args:
            need: Which matrices are needed, and how often.
            targets: Where these matrices are found; those known already stay as they are.
        """
        fresh = [target for target in targets if target.name not in self._targets]
        self._targets.update({target.name: target for target in fresh})
        self._shapes.update({target.name: target.shape for target in fresh})
        for group in _grouped(fresh):
            seed = self._seed + len(self._trackers)
            self._trackers.append(Tracker(group, seed=seed, wait=self._wait))
        assert need.names <= self._targets.keys(), "a need names a matrix that is not a target"
        self._needs.append(need)

    def measure(
        self, step: int, *, everything: bool = False, all_spectra: bool = False
    ) -> list[str]:
        """Measure what is due after an optimizer step and deliver what was measured before.

        The second call for a step costs nothing: consumers need not know of each other.

        Args:
            step: Number of optimizer steps done (`trainer.global_step`).
            everything: Whether to take all spectral norms that anybody needs, due or not.
            all_spectra: Whether to take all exact spectra that anybody needs, due or not.

        Returns:
            Names whose spectral norm was launched by this call.
        """
        if step != self._step:
            self.flush()
            self._before, self._step = step - 1 if self._step is None else self._step, step
        due = due_norms(self._needs, step, None if everything else self._before)
        norms = self._not_done("norm", due, step)
        due = due_spectra(self._needs, step, None if all_spectra else self._before)
        spectra = self._not_done("spectrum", due, step)
        self._launch(norms, step)
        for name in sorted(spectra):
            self._arriving[name] = (step, *exact_spectrum(self._targets[name].measured()))
        self.num_decompositions += len(norms) + len(spectra)
        return sorted(norms)

    def flush(self) -> None:
        """Deliver all measurements, waiting for the device if it is still at work."""
        for launch in self._pending:
            rows = dict(zip(launch.names, launch.on_host().tolist(), strict=True))
            for name, row in rows.items():
                self._rows[name] = (launch.step, row)
                self._failures.pop(name, None)
                if not is_measured(row):
                    self._failures[name] = self._why(name, row)
            for tracker in self._trackers:
                tracker.settle(rows)
            self.delivered_step = launch.step
        self._pending.clear()
        self._spectra.update(self._arriving)
        self._arriving.clear()

    def forget(self, name: str) -> None:
        """Say that a weight was written to outside the optimizer.

        Its warm start is not trusted any more, and it can be measured again within the step.
        """
        for kind in ("norm", "spectrum"):
            self._done.pop((kind, name), None)
        self.vectors.forget(name)
        for tracker in self._trackers:
            if name in tracker.names:
                tracker.forget(name)

    def state_dict(self) -> dict[str, Any]:
        """Warm starts, and readings delivered or on their way, as plain containers and tensors."""
        pending = [
            {"step": p.step, "names": list(p.names), "rows": p.on_host().tolist()}
            for p in self._pending
        ]
        return {
            "trackers": [tracker.state_dict() for tracker in self._trackers],
            "vectors": self.vectors.state_dict(),
            "rows": {name: [step, row] for name, (step, row) in self._rows.items()},
            "spectra": {name: list(value) for name, value in self._spectra.items()},
            "arriving": {name: list(value) for name, value in self._arriving.items()},
            "failures": dict(self._failures),
            "done": [[kind, name, step] for (kind, name), step in self._done.items()],
            "pending": pending,
            "steps": [self._before, self._step],
            "delivered_step": self.delivered_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint left off; matrices that are no more are left out."""
        for tracker in self._trackers:
            for saved in state["trackers"]:
                if not set(saved["names"]).isdisjoint(tracker.names):
                    tracker.load_state_dict(saved)
        self.vectors.load_state_dict(state["vectors"])
        known = self._targets.keys()
        self._rows = {n: (s, list(r)) for n, (s, r) in state["rows"].items() if n in known}
        self._spectra = _known_spectra(state["spectra"], self._shapes)
        self._arriving = _known_spectra(state["arriving"], self._shapes)
        self._failures = {n: why for n, why in state["failures"].items() if n in known}
        self._done = {(kind, n): step for kind, n, step in state["done"] if n in known}
        self._before, self._step = state["steps"]
        self.delivered_step = state["delivered_step"]
        self._pending = []
        for saved in state["pending"]:
            kept = [i for i, name in enumerate(saved["names"]) if name in known]
            table = torch.tensor([saved["rows"][i] for i in kept], dtype=torch.float64)
            names = tuple(saved["names"][i] for i in kept)
            self._pending.append(Launch(saved["step"], names, table, None))

    def _not_done(self, kind: str, names: set[str], step: int) -> set[str]:
        fresh = {name for name in names if self._done.get((kind, name)) != step}
        self._done.update({(kind, name): step for name in fresh})
        return fresh

    def _launch(self, due: Collection[str], step: int) -> None:
        """Measure, and send what was measured on each device to the host in one packed table."""
        names: dict[torch.device, list[str]] = defaultdict(list)
        tables: dict[torch.device, list[Tensor]] = defaultdict(list)
        for tracker in self._trackers if due else ():
            index = [i for i, name in enumerate(tracker.names) if name in due]
            if index:
                tables[tracker.device].append(tracker.measure(index))
                names[tracker.device] += [tracker.names[i] for i in index]
        empty = [name for name in sorted(due) if 0 in self._shapes[name]]
        if empty:
            unknown = torch.full((len(empty), len(FIELDS)), math.nan, dtype=torch.float64)
            tables[unknown.device].append(unknown)
            names[unknown.device] += empty
        for device, parts in tables.items():
            self._pending.append(sent(step, tuple(names[device]), torch.cat(parts)))

    def _why(self, name: str, row: Sequence[float]) -> str:
        known, now = self._shapes[name], self._targets[name].shape
        if 0 in known:
            return f"the weight is empty, of shape {known}"
        if now != known:
            return f"the weight has changed its shape from {known} to {now}"
        if row[3] < SMALLEST:
            return f"the weight is zero (or below {SMALLEST} in norm), which has no stable rank"
        return "the weight has a NaN or infinite entry (or entries beyond 1e17)"

    def _reading(self, name: str, step: int, row: Sequence[float]) -> Reading:
        norm, low, high, frobenius, _ = row
        shape = self._shapes[name]
        stable_rank = (frobenius / norm) ** 2 if is_measured(row) else math.nan
        null = math.nan if 0 in shape else gaussian_stable_rank(*shape)
        at, condition, rank, values = self._spectra.get(name, (None, None, None, None))
        relative = condition  # None, infinite, or NaN as for an empty weight
        if self._targets[name].product is not None:
            relative = None  # a Gaussian matrix has no such rank
        elif condition is not None and math.isfinite(condition):
            relative = condition / gaussian_condition_number(*shape)
        return Reading(
            name=name,
            step=step,
            shape=shape,
            spectral_norm=norm,
            spectral_norm_interval=(low, high),
            frobenius_norm=frobenius,
            stable_rank=stable_rank,
            relative_stable_rank=stable_rank / null,
            condition_number=condition,
            relative_condition_number=relative,
            effective_rank=rank,
            values=values,
            spectrum_step=at,
            trainable=self._targets[name].trainable,
            failure=self._failures.get(name),
        )


def _grouped(targets: list[Target]) -> list[list[Target]]:
    """Targets that one tracker can follow, without the empty ones."""
    groups: dict[tuple[Any, ...], list[Target]] = defaultdict(list)
    for target in targets:
        if 0 not in target.shape:
            seen = target.measured(padded=True)
            groups[target.measured_shape, seen.dtype, seen.device].append(target)
    return list(groups.values())


def _known_spectra(saved: dict[str, Any], known: Iterable[str]) -> dict[str, _Spectrum]:
    return {n: (*saved[n][:3], tuple(saved[n][3])) for n in known if n in saved}
