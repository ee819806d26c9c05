"""A run as it stands on disk: scalars, samples, configuration, mode events, checkpoints.

Lives here: reading. Does not live here: comparing two runs (`pairs`), and judging (`phases`).
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spectral_lightning.spectra.mode_events import MODE_EVENTS_FILE, ModeEvent, read_mode_events

METRICS_FILE = "metrics.csv"
"""Name of CSVLogger's file in a run's folder."""
CONFIG_FILES = ("config.yaml", "hparams.yaml")
"""Names of the files with a run's settings, the fullest first."""
_EVENT_FILES = "events.out.tfevents.*"
_accumulator: Any = EventAccumulator  # untyped
_SAMPLES = "samples/"  # `LanguageModeling` writes its samples below it
# Of all else that event files hold, one entry per tag: scalars are what is compared.
_SIZES = {"scalars": 0, "tensors": 1, "images": 1, "histograms": 1, "compressedHistograms": 1}


class Scalar(NamedTuple):
    """One logged number."""

    step: int
    """Step on the loggers' axis, which counts optimizer steps from 0."""
    value: float
    """The number; may be NaN or infinite."""
    wall_time: float | None
    """Seconds since 1970 at which it was logged; None where the logs do not say (CSV)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a run has left in its folder."""

    folder: Path
    """The folder that holds the logs."""
    scalars: Mapping[str, tuple[Scalar, ...]]
    """Logged numbers by tag, in ascending order of their steps, each step once."""
    starts: tuple[float, ...]
    """Seconds since 1970 at which the run was started or resumed; empty for CSV."""
    samples: Mapping[str, str]
    """Latest text sample of each tag."""
    config: Mapping[str, Any] | None
    """Settings by dotted key; lists are values. None if there is no file of them."""
    config_file: str
    """Name of the file with the settings, or what is wrong with it."""
    events: tuple[ModeEvent, ...] | None
    """Events of mode switching; None if there is no file of them."""
    checkpoints: tuple[Path, ...]
    """Checkpoints below the folder that are not empty."""

    def values(self, tag: str) -> dict[int, float]:
        """Return the numbers of a tag by step; empty if it was not logged."""
        return {scalar.step: scalar.value for scalar in self.scalars.get(tag, ())}

    def last_step(self, tags: Iterable[str]) -> int | None:
        """Return the last step at which one of some tags was logged; None if none was."""
        return max(
            (self.scalars[tag][-1].step for tag in tags if tag in self.scalars), default=None
        )


def run_folder(path: str | Path) -> Path:
    """Find the logs of a run.

    Args:
        path: Folder with event files of TensorBoard or a ``metrics.csv``, or one with folders
            ``version_N``, of which the newest is taken.

    Returns:
        The folder that holds the logs.

    Raises:
        ValueError: If there are none; an older version is never taken for the newest.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"`{path}` must be the folder of a run, got no folder.")
    if _has_logs(path):
        return path
    versions = {
        int(folder.name.removeprefix("version_")): folder
        for folder in path.glob("version_*")
        if folder.name.removeprefix("version_").isdecimal() and folder.is_dir()
    }
    if not versions:
        raise ValueError(
            f"`{path}` must hold event files of TensorBoard or a {METRICS_FILE}, or folders"
            " version_N that do, got neither."
        )
    newest = versions[max(versions)]
    if not _has_logs(newest):
        raise ValueError(
            f"`{newest}`, the newest version, must hold event files of TensorBoard or a"
            f" {METRICS_FILE}, got neither; name another version."
        )
    return newest


def read_run(path: str | Path) -> RunRecord:
    """Read what a run has left on disk.

    Where a resumed run has logged steps again, the later numbers count. Where both loggers were
    used, those of TensorBoard do, because they say when they were logged.

    Args:
        path: Folder of the run, as `run_folder` takes it.

    Returns:
        The record. Only the mode events may be without any logs of numbers.

    Raises:
        ValueError: If there are no logs, or a file is not what it should be.
        OSError: If a file cannot be read.
    """
    folder = run_folder(path)
    board = _Board(folder)
    table = _read_csv(folder / METRICS_FILE)
    scalars = {tag: _without_repeats(found) for tag, found in (table | board.scalars).items()}
    if not scalars:
        raise ValueError(f"`{folder}` must hold logs with at least one number, got none.")
    config, config_file = _read_config(folder)
    events = folder / MODE_EVENTS_FILE
    return RunRecord(
        folder=folder,
        scalars=scalars,
        starts=tuple(board.starts),
        samples=board.samples,
        config=config,
        config_file=config_file,
        events=tuple(read_mode_events(events)) if events.is_file() else None,
        checkpoints=tuple(sorted(filter(_is_checkpoint, folder.rglob("*.ckpt")))),
    )


class _Board:
    """All event files of a folder, in the order in which they were begun."""

    def __init__(self, folder: Path) -> None:
        self.scalars: dict[str, list[Scalar]] = {}
        self.starts: list[float] = []
        self.samples: dict[str, str] = {}
        # One accumulator per file, because each is one start of the run.
        files = [
            _accumulator(str(file), size_guidance=_SIZES) for file in folder.glob(_EVENT_FILES)
        ]
        filled = [file for file in files if any(file.Reload().Tags().values())]
        for file in sorted(filled, key=lambda file: file.FirstEventTimestamp()):
            self._take(file)

    def _take(self, file: Any) -> None:
        tags = file.Tags()
        self.starts.append(file.FirstEventTimestamp())
        for tag in tags["scalars"]:
            found = self.scalars.setdefault(tag, [])
            found += [Scalar(x.step, x.value, x.wall_time) for x in file.Scalars(tag)]
        for tag in tags["tensors"]:
            if tag.startswith(_SAMPLES):
                texts = file.Tensors(tag)[-1].tensor_proto.string_val
                self.samples[tag] = b"\n".join(texts).decode(errors="replace")


def _has_logs(folder: Path) -> bool:
    return any(folder.glob(_EVENT_FILES)) or (folder / METRICS_FILE).is_file()


def _is_checkpoint(path: Path) -> bool:
    # A sharded checkpoint is a folder.
    return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0


def _read_csv(path: Path) -> dict[str, list[Scalar]]:
    found: dict[str, list[Scalar]] = {}
    if not path.is_file():
        return found
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"`{path}` must have a column named step, got {reader.fieldnames}.")
        for row in reader:
            try:
                step = int(float(row.pop("step") or "nan"))
                # An empty cell was not logged; None is missing from a line cut short.
                numbers = {tag: float(cell) for tag, cell in row.items() if tag and cell}
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"`{path}` must hold numbers, but its line {reader.line_num} does not: {error}."
                ) from error
            for tag, value in numbers.items():
                found.setdefault(tag, []).append(Scalar(step, value, None))
    return found


def _without_repeats(scalars: Iterable[Scalar]) -> tuple[Scalar, ...]:
    """Drop what a resumed run has logged again, given in the order of writing."""
    kept: list[Scalar] = []
    for scalar in scalars:
        while kept and kept[-1].step >= scalar.step:
            kept.pop()
        kept.append(scalar)
    return tuple(kept)


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, str]:
    for name in CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return None, f"a {name} that is not plain YAML"
        if isinstance(settings, dict) and settings:  # Lightning leaves an empty hparams.yaml
            return dict(_flattened(settings)), name
    return None, f"no {CONFIG_FILES[0]}"


def _flattened(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
