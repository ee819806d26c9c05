"""What a run with mode switching did, on disk: one JSON line per event.

The file is strict JSON, one object per line; a NaN or an infinity is written as ``null``:

    {"event": "settings", "step": 0, "policy": "SeedPolicy", "conditions": [...], ...}
    {"event": "analysis", "step": 20, "layer": "blocks.0.attn.c_q", "mode": "full", ...}
    {"event": "skipped", "step": 40, "layer": "blocks.0.attn.c_q", "reason": "..."}

The keys are the fields of `ModeSettings`, `LayerAnalysis` and `SkippedAnalysis`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from spectral_lightning.spectra.run_files import EventFormat, EventWriter

MODE_EVENTS_FILE = "svd_mode.jsonl"
"""Name of the file in a run's folder."""


class Condition(NamedTuple):
    """One threshold of a policy, with the measure that it is compared with."""

    measure: str
    """Key of `LayerAnalysis.measures`."""
    role: str
    """``"danger"``: meeting it alone calls for protection. ``"optimal"``: meeting all of this role
    does. ``"release"``: meeting one of this role ends the protection."""
    above: bool
    """Whether it is met by values above the threshold, or below it."""
    threshold: float
    """In the measure's own units."""

    def is_met(self, value: float | None) -> bool:
        """Whether a value meets it; one that was not measured does not."""
        if value is None:
            return False
        return value > self.threshold if self.above else value < self.threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeSettings:
    """How a run decides; written when it begins, and again when it is resumed."""

    event: ClassVar[str] = "settings"
    step: int
    """Optimizer steps done."""
    every_n_steps: int
    """Optimizer steps between two analyses of a layer."""
    policy: str
    """Class of the policy."""
    protection: str
    """What is protected in low-rank mode."""
    conditions: tuple[Condition, ...]
    """The policy's thresholds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAnalysis:
    """One analysis of one layer, and what was decided."""

    event: ClassVar[str] = "analysis"
    step: int
    """Optimizer steps done when the gradient was complete."""
    layer: str
    """Name of the layer."""
    mode: str
    """Mode during the step: ``"full"`` or ``"lowrank"``."""
    rank: int
    """Number of minor singular directions, free to move in low-rank mode."""
    num_principal: int
    """Number of principal ones, that low-rank mode protects."""
    next_mode: str
    """Mode from the next step on."""
    next_rank: int
    """Number of minor directions from the next step on."""
    verdict: str
    """Reason of the decision."""
    loss: float | None
    """Training loss of the step's last micro-batch; None if the training step returned none."""
    measures: Mapping[str, float | None]
    """What was measured, by name; None for what could not be."""

    @property
    def switches(self) -> bool:
        """Whether the mode changes."""
        return self.mode != self.next_mode


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedAnalysis:
    """An analysis that could not be made."""

    event: ClassVar[str] = "skipped"
    step: int
    """Optimizer steps done."""
    layer: str
    """Name of the layer."""
    reason: str
    """Why."""


ModeEvent = ModeSettings | LayerAnalysis | SkippedAnalysis
_KINDS: dict[str, type[ModeEvent]] = {
    kind.event: kind for kind in (ModeSettings, LayerAnalysis, SkippedAnalysis)
}


class ModeEventWriter(EventWriter[ModeEvent]):
    """Append events to a file; each is on disk when `append` returns.

    Opening an existing file at step 0 sets it aside as another run's; at a later step the run
    goes on in it, and what a killed run wrote at that step or behind it is cut off.

    Args:
        path: File to append to; missing folders are made.
        step: Optimizer steps done when the run begins or is resumed.

    Raises:
        ValueError: If the file to continue is not one of mode events.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: str | Path, *, step: int = 0) -> None:
        super().__init__(path, _FORMAT, last=None if step == 0 else step - 1)


def read_mode_events(path: str | Path) -> list[ModeEvent]:
    """Return the events of a run, in the order of the file.

    A last line without its line break is still being written, and is left out.

    Args:
        path: File written by `ModeEventWriter`.

    Raises:
        ValueError: If a line is not an event; the message has its number.
        OSError: If the file cannot be read.
    """
    return [event for event, _ in _FORMAT.read(Path(path))]


def _fields(event: ModeEvent) -> dict[str, Any]:
    data = {"event": event.event, **asdict(event)}
    if isinstance(event, ModeSettings):
        data["conditions"] = [condition._asdict() for condition in event.conditions]
    return data


def _parse(data: dict[str, Any]) -> ModeEvent:
    kind = _KINDS[data.pop("event")]
    if kind is ModeSettings:
        data["conditions"] = tuple(Condition(**condition) for condition in data["conditions"])
    return kind(**data)


_FORMAT: EventFormat[ModeEvent] = EventFormat(what="mode events", fields=_fields, parse=_parse)
