"""Files of a run: events as JSON lines, and files that a later run must not overwrite."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Event(Protocol):
    """Something that happened after a number of optimizer steps."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventFormat(Generic[E]):
    """How events of one kind of file are written."""

    what: str
    """What the file holds, in the plural, for messages."""
    fields: Callable[[E], dict[str, Any]]
    """Plain values of an event; what strict JSON cannot hold becomes ``null``."""
    parse: Callable[[dict[str, Any]], E]
    """The event of such values."""

    def read(self, path: Path) -> Iterator[tuple[E, int]]:
        """Yield each complete line's event with the offset of the byte behind it.

        A last line without its line break is still being written, and is left out.

        Raises:
            ValueError: If a line is not an event; the message has its number.
            OSError: If the file cannot be read.
        """
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    event = self.parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"`{path}` must be a file of {self.what}, but its line {number} is not one"
                        f" ({type(error).__name__}: {error}). Delete the line or move the file"
                        " away."
                    ) from error
                yield event, end


class EventWriter(Generic[E]):
    """Append events to a file; each is on disk when `append` returns.

    Args:
        path: File to append to; missing folders are made.
        form: How its events are written.
        last: Optimizer step up to which a file that is there is continued: what a killed run wrote
            behind it is cut off. None sets the file aside as another run's.

    Raises:
        ValueError: If the file to continue is not of this form.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: str | Path, form: EventFormat[E], *, last: int | None) -> None:
        self.path, self._form = Path(path), form
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if last is None:
            set_aside(self.path)
            return
        end = 0
        for event, behind in form.read(self.path):
            if event.step > last:
                break
            end = behind
        os.truncate(self.path, end)

    def append(self, *events: E) -> None:
        """Add one line for each event."""
        texts = [
            json.dumps(strict(self._form.fields(event)), allow_nan=False, separators=(",", ":"))
            for event in events
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in texts)


def strict(value: Any) -> Any:
    """Replace numbers that strict JSON cannot hold by None, at any depth.

    Example:
        >>> strict({"settings": [1.0, math.inf]})
        {'settings': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def set_aside(path: Path) -> None:
    """Rename another run's file to the first free numbered name, as ``<name>.1.<suffix>``."""
    number = 1
    while (free := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(free)
