"""Readings on disk: one JSON line per optimizer step.

The file is strict JSON (no bare ``NaN`` or ``Infinity``), one object per line:

    {"step": 12, "layers": {"blocks.0.fc": {"shape": [64, 16], "spectral_norm": 2.5, ...}}}

The keys of a layer are the fields of `Reading`. A NaN is written as ``null`` and an infinity as
the string ``"inf"`` or ``"-inf"``. What does not change from line to line is written when it
changes: the shape, and the numbers of the exact spectrum with their `spectrum_step`. Left out are
``trainable`` while it is true and ``failure`` while there is none. A line takes about 250 bytes
per layer.

The file holds one run: how a killed run goes on in it is told at `HistoryWriter`.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from spectral_lightning.spectra.reading import Reading
from spectral_lightning.spectra.run_files import set_aside
from spectral_lightning.spectra.timeline import HeatMapMeasure, HeatMapTimeline

_FLUSH_SECONDS = 10.0  # how much of a killed run's history may be missing
_FLUSH_BYTES = 1 << 20  # bounds the memory of runs with very short steps
_FAST = ("spectral_norm", "frobenius_norm", "stable_rank", "relative_stable_rank")
_SLOW_NUMBERS = ("condition_number", "relative_condition_number", "effective_rank")


class _Slow(NamedTuple):
    """The part of a reading that is written only when it changes."""

    shape: tuple[int, int]
    condition_number: float | None = None
    relative_condition_number: float | None = None
    effective_rank: float | None = None
    values: tuple[float, ...] | None = None
    spectrum_step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryStep:
    """All readings of one optimizer step."""

    step: int
    """Optimizer step after which the weights were read."""
    readings: dict[str, Reading]
    """Reading of each layer that was measured at this step, by the layer's name."""


class HistoryWriter:
    """Append readings to a JSONL file, at little cost to the training step.

    Lines are collected in memory and appended to the file every ten seconds, every MiB, and at
    `close`; a killed process loses at most that much. Between two writes no file is open. When
    the disk refuses a write, one warning says so and the run goes on without history.

    Opening an existing file continues it at `step`: lines of later steps and a half-written last
    line, as a killed run leaves them behind its last checkpoint, are cut off. At step 0 nothing
    can be continued, so an existing file belongs to another run and is set aside as
    ``<name>.1.jsonl`` (or the next free number).

    Args:
        path: File to append to; missing folders are made.
        step: Optimizer step from which the run goes on; 0 for a new run.
        heat_map: Measure that `timeline` keeps.

    Raises:
        ValueError: If `step` is negative, or if the file to continue is not such a history.
        OSError: If the file cannot be read or its folder cannot be made.

    Example:
        >>> from tempfile import mkdtemp
        >>> reading = Reading(
        ...     name="fc", step=3, shape=(2, 2), spectral_norm=2.0, frobenius_norm=2.0,
        ...     spectral_norm_interval=(2.0, 2.0), stable_rank=1.0, relative_stable_rank=0.71,
        ... )
        >>> with HistoryWriter(Path(mkdtemp()) / "history.jsonl") as writer:
        ...     writer.append([reading])
        >>> read_history(writer.path)[0].readings["fc"] == reading
        True
    """

    def __init__(
        self, path: str | Path, *, step: int = 0, heat_map: HeatMapMeasure = "relative_stable_rank"
    ) -> None:
        if step < 0:
            raise ValueError(f"`step` must be >= 0, got {step}.")
        self.path = Path(path)
        self.timeline = HeatMapTimeline(measure=heat_map)
        self._written: dict[str, _Slow] = {}
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._start, self._last_step = step, -1
        self._refused = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._resume(step) if step > 0 else set_aside(self.path)

    def append(self, readings: Iterable[Reading]) -> None:
        """Add one line with the readings of one optimizer step.

        The step from which a run was resumed is measured a second time, on the same weights; if
        the file has it already, the first line stays. No readings, no line.

        Args:
            readings: Readings of distinct layers, all of the same step, later than the last.

        Raises:
            ValueError: If the readings are of several steps, or not later than the last line.
        """
        readings = list(readings)
        steps = sorted({reading.step for reading in readings})
        if not steps or steps == [self._start] == [self._last_step]:
            return
        if len(steps) > 1:
            raise ValueError(f"`readings` must be of one optimizer step, got steps {steps}.")
        if steps[0] <= self._last_step:
            raise ValueError(
                f"`readings` must be of a step later than the last line's {self._last_step}, got"
                f" step {steps[0]}."
            )
        self._last_step = steps[0]
        self.timeline.append(self._last_step, readings)
        if self._refused:
            return
        layers = {reading.name: _encode(reading, self._written) for reading in readings}
        data = {"step": self._last_step, "layers": layers}
        line = json.dumps(data, allow_nan=False, separators=(",", ":"))
        self._pending.append(line.encode() + b"\n")
        self._pending_bytes += len(line)
        late = time.monotonic() - self._last_flush >= _FLUSH_SECONDS
        if late or self._pending_bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected lines to the file."""
        self._last_flush = time.monotonic()
        lines, self._pending, self._pending_bytes = self._pending, [], 0
        if not lines:
            return
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            self._refused = True
            warnings.warn(
                f"The history of readings ends at {self.path}: {error}. Training goes on.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Write what is left; safe to call again, and after an exception in the run."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _resume(self, step: int) -> None:
        """Cut off what lies behind `step` and take up what the kept lines say."""
        end = 0
        for entry, line_end in _lines(self.path):
            if entry.step > step:
                break
            end, self._last_step = line_end, entry.step
            self.timeline.append(entry.step, entry.readings.values())
            self._written.update((name, _slow(r)) for name, r in entry.readings.items())
        os.truncate(self.path, end)


def read_history(path: str | Path) -> list[HistoryStep]:
    """Return the readings of a run, one entry per optimizer step, in the order of the file.

    A last line without its line break was cut off when the run was killed, and is left out.

    Args:
        path: File written by `HistoryWriter`.

    Returns:
        One `HistoryStep` per line, with the readings exactly as they were written.

    Raises:
        ValueError: If a line is not one of a history; the message has its number.
        OSError: If the file cannot be read.
    """
    return [entry for entry, _ in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[HistoryStep, int]]:
    """Yield each complete line of a history with the offset of the byte behind it."""
    end = 0
    carried: dict[str, _Slow] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                data = json.loads(line)
                step = int(data["step"])
                readings = {
                    name: _decode(name, step, fields, carried)
                    for name, fields in data["layers"].items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"`{path}` must be a history of readings, but its line {number} is not one"
                    f" ({type(error).__name__}: {error}). Delete the line or move the file away."
                ) from error
            yield HistoryStep(step=step, readings=readings), end


def _slow(reading: Reading) -> _Slow:
    return _Slow(*(getattr(reading, key) for key in _Slow._fields))


def _same_spectrum(left: _Slow, right: _Slow) -> bool:
    # Cheap at every step: unchanged values are the same object. A NaN from a checkpoint is not.
    pairs = zip(left[1:], right[1:], strict=True)
    return all(a is b or a == b or (a != a and b != b) for a, b in pairs)


def _encode(reading: Reading, written: dict[str, _Slow]) -> dict[str, Any]:
    """Return the JSON fields of a reading that `written` does not hold, and enter them there."""
    fields: dict[str, Any] = {key: _to_json(getattr(reading, key)) for key in _FAST}
    fields["spectral_norm_interval"] = [_to_json(bound) for bound in reading.spectral_norm_interval]
    slow = _slow(reading)
    last = written.get(reading.name)
    written[reading.name] = slow
    if last is None or last.shape != slow.shape:
        fields["shape"] = list(slow.shape)
    if not _same_spectrum(slow, last or _Slow(slow.shape)):
        fields["spectrum_step"] = slow.spectrum_step
        numbers = {key: getattr(slow, key) for key in _SLOW_NUMBERS}
        fields |= {key: _to_json(value) for key, value in numbers.items() if value is not None}
        if slow.values is not None:
            fields["values"] = [_to_json(value) for value in slow.values]
    if not reading.trainable:
        fields["trainable"] = False
    if reading.failure is not None:
        fields["failure"] = reading.failure
    return fields


def _decode(name: str, step: int, fields: dict[str, Any], carried: dict[str, _Slow]) -> Reading:
    """Return the reading of a layer's JSON fields and of what earlier lines said."""
    last = carried.get(name)
    m, n = fields["shape"] if last is None or "shape" in fields else last.shape
    slow = (last or _Slow((m, n)))._replace(shape=(m, n))
    if "spectrum_step" in fields:
        values = fields.get("values")
        slow = slow._replace(
            condition_number=_optional(fields, "condition_number"),
            relative_condition_number=_optional(fields, "relative_condition_number"),
            effective_rank=_optional(fields, "effective_rank"),
            values=None if values is None else tuple(map(_from_json, values)),
            spectrum_step=fields["spectrum_step"],
        )
    carried[name] = slow
    low, high = fields["spectral_norm_interval"]
    fast: dict[str, Any] = {key: _from_json(fields[key]) for key in _FAST}
    return Reading(
        name=name,
        step=step,
        spectral_norm_interval=(_from_json(low), _from_json(high)),
        trainable=fields.get("trainable", True),
        failure=fields.get("failure"),
        **fast,
        **slow._asdict(),
    )


def _to_json(value: float) -> float | str | None:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _from_json(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _optional(fields: dict[str, Any], key: str) -> float | None:
    return _from_json(fields[key]) if key in fields else None
