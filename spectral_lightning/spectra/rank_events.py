"""What a run whose layers change rank did, on disk: one JSON line per event.

The file is strict JSON, one object per line; a NaN or an infinity is written as ``null``:

    {"event": "settings", "step": 0, "controller": "StableRankController", "layers": {...}, ...}
    {"event": "check", "step": 200, "layer": "blocks.0.attn.c_q", "rank": 64, "next_rank": 60, ...}
    {"event": "skipped", "step": 400, "layer": "blocks.0.attn.c_q", "reason": "..."}
    {"event": "summary", "step": 600, "num_stored": 3538944, "num_active": 980992, ...}

The keys are the fields of `RankSettings`, `RankCheck`, `SkippedCheck` and `RankSummary`. The step
is always the number of optimizer steps; a change of rank is the difference of two keys, so it
cannot be taken for one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from spectral_lightning.spectra.run_files import EventFormat, EventWriter

RANK_EVENTS_FILE = "rank_events.jsonl"
"""Name of the file in a run's folder."""


class LayerSize(NamedTuple):
    """Size of a layer whose weight is a product of two thin factors."""

    shape: tuple[int, int]
    """Shape ``(m, n)`` of the weight, outputs first."""
    capacity: int
    """Components that are stored, the largest rank the layer can have."""
    rank: int
    """Active components."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSettings:
    """How a run chooses ranks; written when it begins, and again when it is resumed."""

    event: ClassVar[str] = "settings"
    step: int
    """Optimizer steps done."""
    every_n_steps: int
    """Optimizer steps between two checks of a layer."""
    controller: str
    """Class of the controller."""
    settings: Mapping[str, Any]
    """The controller's settings: numbers, words, truth values, None, and lists or dicts of them."""
    resize: str
    """How ranks are changed, and what becomes of the optimizer's state."""
    layers: Mapping[str, LayerSize]
    """The layers by name, in the order of the model, with their ranks at this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCheck:
    """One check of one layer, and the rank that was chosen."""

    event: ClassVar[str] = "check"
    step: int
    """Optimizer steps done."""
    layer: str
    """Name of the layer."""
    rank: int
    """Rank up to this step."""
    next_rank: int
    """Rank from this step on."""
    target: float | None = None
    """Rank that the controller aims at; None if it has no such number."""
    null_target: float | None = None
    """Target that it would have for untrained random factors of this rank; None if unknown."""
    verdict: str
    """Reason of the decision."""
    growth: float | None = None
    """Growth lift: how persistently the gradient asks for what the layer cannot follow at its rank;
    1 is noise, ``N`` a gradient that stayed the same over ``N`` steps. None if not measured."""
    stable_rank: float | None = None
    """Stable rank of the weight before the decision, dimensionless; None if it was not measured."""
    energy_kept: float | None = None
    """Share of the energy, of outputs or of the weight, that a smaller rank keeps, in [0, 1]; None
    if the rank was not made smaller."""
    loss: float | None = None
    """Training loss of the step's last micro-batch; None if the training step returned none."""
    milliseconds: float | None = None
    """Time that the check and the resize took; None if it was not taken."""

    @property
    def resizes(self) -> bool:
        """Whether the rank changes."""
        return self.rank != self.next_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedCheck:
    """A check that could not be made."""

    event: ClassVar[str] = "skipped"
    step: int
    """Optimizer steps done."""
    layer: str
    """Name of the layer."""
    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSummary:
    """Numbers of parameters when a run ends."""

    event: ClassVar[str] = "summary"
    step: int
    """Optimizer steps done."""
    num_stored: int
    """Entries of the factors of all low-rank layers, at their capacity."""
    num_active: int
    """Entries of the factors of all low-rank layers, at their rank."""
    num_dense: int
    """Entries of the matrices that the factors stand for."""
    num_other: int | None = None
    """Parameters of the model beside the factors, embeddings and biases for example; None if they
    were not counted."""


RankEvent = RankSettings | RankCheck | SkippedCheck | RankSummary
_KINDS: dict[str, type[RankEvent]] = {
    kind.event: kind for kind in (RankSettings, RankCheck, SkippedCheck, RankSummary)
}


class RankEventWriter(EventWriter[RankEvent]):
    """Append events to a file; each is on disk when `append` returns.

    Opening an existing file at step 0 sets it aside as another run's; at a later step the run
    goes on in it, and what a killed run wrote behind that step is cut off. Ranks change after the
    optimizer step and before a checkpoint is written, so the events of `step` itself stay.

    Args:
        path: File to append to; missing folders are made.
        step: Optimizer steps done when the run begins or is resumed.

    Raises:
        ValueError: If the file to continue is not one of rank events.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: str | Path, *, step: int = 0) -> None:
        super().__init__(path, _FORMAT, last=step or None)


def read_rank_events(path: str | Path) -> list[RankEvent]:
    """Return the events of a run, in the order of the file.

    A last line without its line break is still being written, and is left out.

    Args:
        path: File written by `RankEventWriter`.

    Raises:
        ValueError: If a line is not an event; the message has its number.
        OSError: If the file cannot be read.
    """
    return [event for event, _ in _FORMAT.read(Path(path))]


def _fields(event: RankEvent) -> dict[str, Any]:
    data = {"event": event.event, **asdict(event)}
    if isinstance(event, RankSettings):
        data["layers"] = {name: size._asdict() for name, size in event.layers.items()}
    return data


def _parse(data: dict[str, Any]) -> RankEvent:
    kind = _KINDS[data.pop("event")]
    if kind is RankSettings:
        data["layers"] = {
            name: LayerSize(**size | {"shape": tuple(size["shape"])})
            for name, size in data["layers"].items()
        }
    return kind(**data)


_FORMAT: EventFormat[RankEvent] = EventFormat(what="rank events", fields=_fields, parse=_parse)
