"""What ranks a run's layers came to, by type of layer, as a table and as plain values."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.table import LayerName, compact, plain_table
from spectral_lightning.spectra.names import some_names
from spectral_lightning.spectra.rank_history import RankHistory, RankPoint
from spectral_lightning.spectra.run_files import strict

_NUMBERS = (
    "layers",
    "mean\nrank",
    "min",
    "max",
    "capa-\ncity",
    "target",
    "null\ntarget",
    "at\nfloor",
)
_LIKE_RANDOM = 0.1  # set by hand: one draw of random factors differs from the next by far less
_CAPTION_WIDTH = 60  # a caption is as wide as its table


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeRanks:
    """Latest ranks of the layers of one type."""

    type: str
    """See `projection_type`."""
    layers: tuple[str, ...]
    """Names of the layers, in the order of the model."""
    mean: float
    """Mean rank."""
    lowest: int
    """Smallest rank."""
    highest: int
    """Largest rank."""
    share: float | None
    """Mean of rank over capacity, in [0, 1]; None if capacities are not known."""
    target: float | None
    """Mean of the layers' latest targets; None if there are none."""
    null_target: float | None
    """Mean of the targets for untrained random factors; None if there are none."""
    at_floor: tuple[str, ...]
    """Layers at the controller's floor; none if it is not known."""

    @property
    def is_like_random(self) -> bool:
        """Whether the target is within 10 % of that for untrained random factors."""
        if self.target is None or not self.null_target:
            return False
        return abs(self.target / self.null_target - 1) <= _LIKE_RANDOM


def projection_type(name: str) -> str:
    """Return the part of a layer's name that it shares with its counterparts in other blocks.

    That is the last part, with the numbers behind it if it ends in such.

    Example:
        >>> projection_type("blocks.3.attn.c_q"), projection_type("blocks.3.mlp.0")
        ('c_q', 'mlp.0')
    """
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdecimal()), default=0)
    return ".".join(parts[last:])


def rank_types(history: RankHistory, *, floor: float | None = None) -> list[TypeRanks]:
    """Sort the layers of a run by type.

    Args:
        history: Ranks of the run; of older logs `read_rank_log` gives them.
        floor: Largest rank that counts as the controller's floor; None for that of the run's
            settings, as `controller_floor` finds it.

    Returns:
        One entry per type, in the order of the model; empty if no layer's rank is known.
    """
    floor = history.floor if floor is None else floor
    names: dict[str, list[str]] = {}
    for name in history.ranks:
        names.setdefault(projection_type(name), []).append(name)
    return [_summed_up(kind, layers, history, floor) for kind, layers in names.items()]


def rank_table(
    history: RankHistory, *, floor: float | None = None, title: str = "Ranks by type of layer"
) -> Table | None:
    """Return the latest ranks of each type of layer, what was aimed at, and what is no finding.

    A rank at the controller's floor, and a target like that of random factors, tell of the
    controller rather than of the layer; both are said in the caption. Fits a terminal of 80
    columns. Print it with ``rich.console.Console().print(table)``.

    Args:
        history: Ranks of the run.
        floor: See `rank_types`.
        title: Title of the table.

    Returns:
        Table with a caption; None if no layer's rank is known.
    """
    types = rank_types(history, floor=floor)
    if not types:
        return None
    table = plain_table(title, _NUMBERS)
    table.columns[0].header = "type"
    table.min_width = _CAPTION_WIDTH
    floor = history.floor if floor is None else floor
    for found in types:
        style = "yellow" if found.at_floor or found.is_like_random else None
        table.add_row(LayerName(found.type), *_cells(found, floor), style=style)
    every = _summed_up("all", list(history.ranks), history, floor)
    if len(types) > 1:
        table.add_section()
        table.add_row(LayerName(every.type), *_cells(every, floor))
    table.caption = Text("\n".join(_caption(types, every, history, floor)))
    return table


def rank_document(history: RankHistory, *, floor: float | None = None) -> dict[str, Any]:
    """Return what the table shows, and each layer, as plain values that strict JSON can hold.

    Args:
        history: Ranks of the run.
        floor: See `rank_types`.

    Returns:
        ``run`` (source, time, floor, changes), ``parameters`` (None where not known), ``types`` and
        ``layers``, both in the order of the model, and ``notes``.
    """
    types = rank_types(history, floor=floor)
    changes = [change.new_rank - change.old_rank for change in history.changes]
    document = {
        "run": {
            "source": history.source,
            "unit": history.unit,
            "at": _end(history),
            "floor": history.floor if floor is None else floor,
            "num_shrinks": sum(change < 0 for change in changes),
            "num_growths": sum(change > 0 for change in changes),
        },
        "parameters": _parameters(history),
        "types": [{**asdict(found), "is_like_random": found.is_like_random} for found in types],
        "layers": [
            _layer_row(name, history, at_floor=name in found.at_floor)
            for found in types
            for name in found.layers
        ],
        "notes": list(history.notes),
    }
    plain: dict[str, Any] = strict(document)
    return plain


def _summed_up(
    kind: str, layers: Sequence[str], history: RankHistory, floor: float | None
) -> TypeRanks:
    ranks = {name: history.ranks[name][-1].rank for name in layers}
    aims = [aim for name in layers if (aim := _aim(history, name)) is not None]
    shares = [
        rank / history.sizes[name].capacity for name, rank in ranks.items() if name in history.sizes
    ]
    return TypeRanks(
        type=kind,
        layers=tuple(layers),
        mean=fmean(ranks.values()),
        lowest=min(ranks.values()),
        highest=max(ranks.values()),
        share=_mean(shares),
        target=_mean([aim.target for aim in aims]),
        null_target=_mean([aim.null_target for aim in aims]),
        at_floor=tuple(name for name in layers if floor is not None and ranks[name] <= floor),
    )


def _aim(history: RankHistory, name: str) -> RankPoint | None:
    """Return the latest point of a layer that has a target."""
    points = reversed(history.ranks[name])
    return next((point for point in points if point.target is not None), None)


def _mean(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def _cells(found: TypeRanks, floor: float | None) -> list[str]:
    return [
        str(len(found.layers)),
        f"{found.mean:.1f}",
        str(found.lowest),
        str(found.highest),
        "-" if found.share is None else f"{found.share:.0%}",
        compact(found.target),
        compact(found.null_target),
        "-" if floor is None else str(len(found.at_floor)),
    ]


def _caption(
    types: Sequence[TypeRanks], every: TypeRanks, history: RankHistory, floor: float | None
) -> list[str]:
    lines = [f"Ranks at {history.unit} {_end(history)}; capacity: mean share of it that is used."]
    if floor is None:
        lines.append("The controller's smallest rank is not known, so no floor is flagged.")
    elif every.at_floor:
        lines.append(
            f"{len(every.at_floor)} of {len(every.layers)} layers are at the controller's floor"
            f" (rank <= {floor:g}): that says something about the controller, not about the layer."
        )
    else:
        lines.append(f"No layer is at the controller's floor (rank <= {floor:g}).")
    if every.null_target is not None:
        lines.append("null target: what untrained random factors of the same rank would get.")
    like_random = [found.type for found in types if found.is_like_random]
    if like_random:
        lines.append(
            f"Target within {_LIKE_RANDOM:.0%} of the null target, so that by itself it says"
            f" nothing of what was learned: {some_names(like_random, none='')}."
        )
    numbers = _parameters(history)
    if numbers is not None:
        lines.append(
            f"Parameters of factors: {numbers['active']:,} active of {numbers['stored']:,} stored,"
            f" {numbers['dense']:,} if dense."
        )
        if numbers["other"] is not None:
            lines.append(f"Other parameters of the model: {numbers['other']:,}.")
    return [*lines, *history.notes]


def _parameters(history: RankHistory) -> dict[str, int | None] | None:
    active = history.num_active(_end(history)) if history.ranks else None
    if active is None:
        return None
    sizes = [history.sizes[name] for name in history.ranks]
    return {
        "active": active,
        "stored": sum(size.capacity * sum(size.shape) for size in sizes),
        "dense": sum(math.prod(size.shape) for size in sizes),
        "other": None if history.summary is None else history.summary.num_other,
    }


def _end(history: RankHistory) -> int:
    """Return the time of the latest rank, or of the latest spread where no layer has one."""
    return max([*(found[-1].at for found in history.ranks.values()), *history.spread], default=0)


def _layer_row(name: str, history: RankHistory, *, at_floor: bool) -> dict[str, Any]:
    size, aim = history.sizes.get(name), _aim(history, name)
    return {
        "layer": name,
        "type": projection_type(name),
        "rank": history.ranks[name][-1].rank,
        "first_rank": history.ranks[name][0].rank,
        "shape": None if size is None else list(size.shape),
        "capacity": None if size is None else size.capacity,
        "target": None if aim is None else aim.target,
        "null_target": None if aim is None else aim.null_target,
        "at_floor": at_floor,
    }
