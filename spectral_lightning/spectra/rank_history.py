"""Ranks of layers over the time of a run, in one form for our events and for older logs.

Lives here: the form, and how events of ours are put into it. Does not live here: files
(`rank_events`, `rank_logs`), tables and pictures (`dashboards`).
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from spectral_lightning.spectra.names import some_names
from spectral_lightning.spectra.rank_events import (
    LayerSize,
    RankCheck,
    RankEvent,
    RankSettings,
    RankSummary,
    SkippedCheck,
)
from spectral_lightning.spectra.run_files import strict

Unit = Literal["epoch", "step"]
"""What a time of a run counts: epochs or optimizer steps."""


class RankPoint(NamedTuple):
    """The rank of a layer from a time on."""

    at: int
    """Step or epoch."""
    rank: int
    """Rank from then on."""
    target: float | None = None
    """Rank that the controller aimed at; None if it is not known."""
    null_target: float | None = None
    """Target that it would have for untrained random factors; None if it is not known."""


class RankChange(NamedTuple):
    """One change of one layer's rank."""

    at: int
    """Step or epoch."""
    layer: str
    """Name of the layer."""
    old_rank: int
    """Rank before."""
    new_rank: int
    """Rank after."""
    change: float
    """What was added to the rank; in v18's logs before it was clipped to the bounds."""


class RankSpread(NamedTuple):
    """Ranks of all layers at one time."""

    lowest: float
    """Smallest rank."""
    mean: float
    """Mean rank."""
    highest: float
    """Largest rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankHistory:
    """Ranks and losses over the time of one run."""

    source: str
    """``"events"`` for ours, otherwise the script that wrote the log, as ``"v10"``."""
    unit: Unit = "step"
    """What the times of ranks count."""
    loss_unit: Unit = "step"
    """What the times of losses and spreads count."""
    ranks: Mapping[str, Sequence[RankPoint]] = field(default_factory=dict)
    """Ranks by layer, in the order of time; none in logs of v13 and v14."""
    changes: Sequence[RankChange] = ()
    """Changes of rank, in the order of the file."""
    spread: Mapping[int, RankSpread] = field(default_factory=dict)
    """Ranks over all layers by time, where a log has them; none in our events."""
    train_losses: Mapping[int, float] = field(default_factory=dict)
    """Finite training losses by time."""
    val_losses: Mapping[int, float] = field(default_factory=dict)
    """Finite validation losses by time; none in our events."""
    sizes: Mapping[str, LayerSize] = field(default_factory=dict)
    """Sizes by layer, as of the latest settings; none in older logs."""
    settings: RankSettings | None = None
    """Settings of the run, the latest; None in older logs."""
    summary: RankSummary | None = None
    """Numbers of parameters at the end; None if the run has not ended, or does not say."""
    floor: float | None = None
    """Rank at which the controller stops, see `controller_floor`; None if it is not known."""
    begins: Sequence[int] = ()
    """Steps at which the run began or was resumed, ascending; none in older logs."""
    notes: Sequence[str] = ()
    """Sentences on what is missing and on what was inferred."""

    @classmethod
    def of(cls, events: Iterable[RankEvent]) -> "RankHistory":
        """Sort the events of a run by layer.

        Args:
            events: Events of one run, in the order of its file.
        """
        ranks: dict[str, list[RankPoint]] = {}
        changes: list[RankChange] = []
        losses: dict[int, float | None] = {}
        settings: list[RankSettings] = []
        skipped: list[str] = []
        summary: RankSummary | None = None
        for event in events:
            if isinstance(event, RankSettings):
                settings.append(event)
                for name, size in event.layers.items():
                    # Of a resumed run the checks know better: a component may still be fading.
                    ranks.setdefault(name, [RankPoint(event.step, size.rank)])
            elif isinstance(event, RankCheck):
                aims = (strict(event.target), strict(event.null_target))
                point = RankPoint(event.step, event.next_rank, *aims)
                ranks.setdefault(event.layer, []).append(point)
                losses[event.step] = event.loss
                if event.resizes:
                    changes.append(_change(event))
            elif isinstance(event, SkippedCheck):
                skipped.append(event.layer)
            else:
                summary = event
        return cls(
            source="events",
            ranks=ranks,
            changes=changes,
            train_losses=finite(losses),
            sizes={name: size for event in settings for name, size in event.layers.items()},
            settings=settings[-1] if settings else None,
            summary=summary,
            floor=controller_floor(settings[-1].settings) if settings else None,
            begins=sorted({event.step for event in settings}),
            notes=_skip_notes(skipped),
        )

    def ranks_at(self, at: int) -> dict[str, int]:
        """Return each layer's rank at a time; before its first point, that of the point."""
        return {
            name: found[max(bisect_right(found, at, key=lambda point: point.at) - 1, 0)].rank
            for name, found in self.ranks.items()
        }

    def num_active(self, at: int) -> int | None:
        """Return the entries of all factors at their ranks; None if a layer's size is unknown."""
        if not self.sizes.keys() >= self.ranks.keys():
            return None
        return sum(rank * sum(self.sizes[name].shape) for name, rank in self.ranks_at(at).items())


def controller_floor(settings: Mapping[str, Any]) -> float | None:
    """Return the rank at which a controller stops a layer that it would shrink further.

    The smallest rank, and above it the dead band, in which differences to the target are ignored:
    a layer that comes to rest there would have come there with any lower target.

    Args:
        settings: Settings of a controller. The smallest rank is ``rank_min``, or ``min_rank`` as
            in v18; the dead band is ``change_threshold``, none if it is missing. Those of its
            ``clock`` count as its own.

    Returns:
        The rank; None if there is no smallest rank.

    Example:
        >>> controller_floor({"change_threshold": 2.0, "clock": {"rank_min": 8}})
        10.0
    """
    clock = settings.get("clock")
    merged = {**settings, **(clock if isinstance(clock, Mapping) else {})}
    smallest = merged.get("rank_min", merged.get("min_rank"))
    return None if smallest is None else float(smallest + (merged.get("change_threshold") or 0.0))


def finite(numbers: Mapping[int, float | None]) -> dict[int, float]:
    """Return the numbers that were measured and are finite, ascending by time."""
    known = {at: value for at, value in numbers.items() if value is not None}
    return {at: known[at] for at in sorted(known) if math.isfinite(known[at])}


def _change(check: RankCheck) -> RankChange:
    old, new = check.rank, check.next_rank
    return RankChange(check.step, check.layer, old, new, float(new - old))


def _skip_notes(layers: Sequence[str]) -> list[str]:
    if not layers:
        return []
    names = some_names(dict.fromkeys(layers), none="")
    count = "1 check was" if len(layers) == 1 else f"{len(layers)} checks were"
    return [f"{count} skipped, of {names}."]
