"""A run of ours in the log formats of the scripts that this library was modelled on.

For tools that are made for those logs. Lives here: writing lines. Does not live here: reading them
(`rank_logs`), and our own format (`rank_events`).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from spectral_lightning.spectra.rank_events import (
    RankCheck,
    RankEvent,
    RankSettings,
)
from spectral_lightning.spectra.rank_history import RankHistory
from spectral_lightning.spectra.run_files import strict

Script = Literal["v10", "v13", "v15", "v18"]
"""Scripts whose logs can be written."""
_V18_SPREAD = ("r_min", "r_mean", "r_max")
_Row = dict[str, Any]


class EpochLosses(NamedTuple):
    """What the line of an epoch says beside the ranks."""

    epoch: int
    """Number of the epoch."""
    step: int
    """Optimizer steps done at its end."""
    train_loss: float | None = None
    """Mean training loss; None if it is not known."""
    val_loss: float | None = None
    """Validation loss at its end; None if it is not known."""
    seconds: float | None = None
    """Time that it took; None if it was not taken."""


def rank_log_lines(
    events: Iterable[RankEvent],
    script: Script,
    epochs: Sequence[EpochLosses] = (),
    *,
    num_other: int | None = None,
) -> list[str]:
    """Write a run of ours as one of the scripts would have logged it.

    Keys that the events do not hold are left out. Layers have their own names; v10's ranks, which
    it logs without names, come in the order of the layers. Two faults of the scripts are not
    copied: ``params_millions`` of v10 is the number of parameters at that time, of factors at
    their rank, not the first number on every line; and in v18 the key ``step`` of a change is the
    optimizer step, and what was added to the rank is ``change``.

    Args:
        events: Events of one run, in the order of its file, with at least one layer's rank.
        script: Whose format to write.
        epochs: Losses at the ends of epochs; without any, v10 and v13 have no lines.
        num_other: Parameters beside the factors, for v10; None takes it from the run's summary.

    Returns:
        Lines of strict JSON with their line breaks; NaN and infinities are written as ``null``.

    Raises:
        ValueError: If `script` is unknown, no layer has a rank, or v10's number of parameters
            is not known.
    """
    if script not in _WRITERS:
        raise ValueError(f"`script` must be one of {', '.join(_WRITERS)}, got {script!r}.")
    run = _Run(events, num_other)
    rows = sorted(_WRITERS[script](run, epochs), key=lambda timed: timed[0])
    return [json.dumps(strict(row), allow_nan=False) + "\n" for _, row in rows]


class _Run:
    """The events of a run, and what they say at a step."""

    def __init__(self, events: Iterable[RankEvent], num_other: int | None) -> None:
        self.events = list(events)
        self.history = RankHistory.of(self.events)
        if not self.history.ranks:
            raise ValueError("`events` must hold the rank of at least one layer, got none.")
        summary = self.history.summary
        self._num_other = summary.num_other if num_other is None and summary else num_other

    def spread(self, step: int, keys: Sequence[str]) -> _Row:
        """Lowest, mean and highest rank of all layers under the keys of a format."""
        ranks = self.history.ranks_at(step).values()
        return dict(zip(keys, (min(ranks), sum(ranks) / len(ranks), max(ranks)), strict=True))

    def num_parameters(self, step: int) -> int:
        """Parameters of the model, with factors at their rank."""
        num_active = self.history.num_active(step)
        if self._num_other is None or num_active is None:
            raise ValueError(
                "`num_other` must be given for v10 unless the events hold it in a summary, and the"
                f" sizes of all layers in their settings, got {self._num_other} and"
                f" {len(self.history.sizes)} sizes of {len(self.history.ranks)} layers."
            )
        return self._num_other + num_active


def _v10(run: _Run, epochs: Sequence[EpochLosses]) -> list[tuple[int, _Row]]:
    return [
        (
            found.step,
            {
                "epoch": found.epoch,
                "train_loss": found.train_loss,
                "val_loss": found.val_loss,
                **run.spread(found.step, ("rank_min", "rank_avg", "rank_max")),
                "ranks": list(run.history.ranks_at(found.step).values()),
                "params_millions": run.num_parameters(found.step) / 1e6,
                "time_sec": found.seconds,
            },
        )
        for found in epochs
    ]


def _v13(run: _Run, epochs: Sequence[EpochLosses]) -> list[tuple[int, _Row]]:
    return [
        (
            found.step,
            {
                "epoch": found.epoch,
                "global_step": found.step,
                "train_loss": found.train_loss,
                "val_loss": found.val_loss,
                **run.spread(found.step, ("rank_min", "rank_avg", "rank_max")),
                "epoch_time_sec": found.seconds,
            },
        )
        for found in epochs
    ]


def _v15(run: _Run, epochs: Sequence[EpochLosses]) -> list[tuple[int, _Row]]:
    rows = []
    interval = None
    for event in run.events:
        if isinstance(event, RankSettings):
            interval = event.every_n_steps
        elif isinstance(event, RankCheck) and event.resizes:
            lost = None if event.energy_kept is None else 1 - event.energy_kept
            row = {
                "type": "rank_update",
                "step": event.step,
                "layer": event.layer,
                "old_rank": event.rank,
                "new_rank": event.next_rank,
                "spectral_rank": event.target,
                "tail_energy": lost,
                "svd_interval": interval,
                "svals_len": event.rank,
            }
            rows.append((event.step, row))
    return [*rows, *((at, {"type": "epoch", **row}) for at, row in _v13(run, epochs))]


def _v18(run: _Run, epochs: Sequence[EpochLosses]) -> list[tuple[int, _Row]]:
    rows: list[tuple[int, _Row]] = []
    checks: dict[int, list[RankCheck]] = {}
    resize = ""
    for event in run.events:
        if isinstance(event, RankCheck):
            checks.setdefault(event.step, []).append(event)
        elif isinstance(event, RankSettings):
            resize = event.resize
            start = {
                "type": "run_start",
                "step": event.step,
                "args": {"controller": event.controller, **event.settings},
                "rank_update_every": event.every_n_steps,
                "rank_stats": run.spread(event.step, _V18_SPREAD),
            }
            rows.append((event.step, start))
    for step, found in checks.items():
        rows += [(step, row) for row in _v18_update(run, step, found, resize)]
    for epoch in epochs:
        if epoch.val_loss is not None:
            losses = {"val_loss": epoch.val_loss, "val_ppl": _perplexity(epoch.val_loss)}
            rows.append((epoch.step, {"type": "eval", "step": epoch.step, **losses}))
    if (end := run.history.summary) is not None:
        rows.append((end.step, {"type": "run_end", "step": end.step}))
    return rows


def _v18_update(run: _Run, step: int, checks: Sequence[RankCheck], resize: str) -> Iterator[_Row]:
    """Yield the lines of the checks of one step: the loss, the changes, their sum."""
    loss = next((check.loss for check in checks if check.loss is not None), None)
    if loss is not None:
        spread = run.spread(step, _V18_SPREAD)
        ppl = _perplexity(loss)
        yield {"type": "train_step", "step": step, "loss": loss, "ppl": ppl, **spread}
    for check in checks:
        if check.resizes:
            yield _v18_change(check)
    times = [check.milliseconds for check in checks if check.milliseconds is not None]
    yield {
        "type": "rank_update",
        "step": step,
        "changed_layers": sum(check.resizes for check in checks),
        "total_layers": len(run.history.ranks),
        "resize_method": resize,
        "took_sec": sum(times) / 1e3 if times else None,
    }


def _v18_change(check: RankCheck) -> _Row:
    return {
        "type": "rank_change",
        "step": check.step,
        "layer": check.layer,
        "old_rank": check.rank,
        "new_rank": check.next_rank,
        "change": check.next_rank - check.rank,
        "stable_rank": check.stable_rank,
        "raw_target": check.target,
        "delta": None if check.target is None else check.target - check.rank,
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # the largest double is about e ** 709


_WRITERS: Mapping[Script, Callable[[_Run, Sequence[EpochLosses]], list[tuple[int, _Row]]]] = {
    "v10": _v10,
    "v13": _v13,
    "v15": _v15,
    "v18": _v18,
}
