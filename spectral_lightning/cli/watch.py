"""`spectral watch`: alerts and summary of a run with mode switching."""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import spectral_lightning
from spectral_lightning.cli import errors
from spectral_lightning.cli.options import CommandParser

if TYPE_CHECKING:  # torch is not imported before the arguments are known to be right
    from rich.console import Console

    from spectral_lightning.dashboards.mode_alerts import Alert, ModeWatch
    from spectral_lightning.spectra import ModeEvent

_DESCRIPTION = """\
Report what a run with mode switching did and where its layers stand, from the event file
svd_mode.jsonl that the callback SVDModeSwitch writes.
"""
_EPILOG = """\
RUN_DIR is the event file, the folder with it, or a folder above: then the event file below it
that was changed last is taken, and named. All thresholds are those that the run itself wrote.

alerts:
  CRITICAL  in full mode, a danger condition is met, or all optimal conditions are
  WARNING   in full mode, a danger condition is missed by less than the margin, or an optimal
            one is while another one is met; an analysis was skipped
  INFO      a switch of mode, a change of rank; a measure moved towards a threshold in five
            analyses in a row, and on a straight line gets there within 20 intervals of analysis

The margin and the distance to danger (SAFE above 0.1, CLOSE above 0.05, else DANGER) are absolute,
in the measure's own units.

exit status: 0 if no layer (of --layers) was critical at its latest analysis, 1 if one was, 2 for a
mistake in the arguments. The same holds for --follow, which an interrupt (Ctrl-C) or a SIGTERM
ends with the summary.

examples:
  spectral watch runs/x
  spectral watch runs/x --follow --quiet
  spectral watch runs/x/svd_mode.jsonl --layers "*.c_q" --json
"""
_STYLES = {"CRITICAL": "red", "WARNING": "yellow"}


def run(args: list[str]) -> int:
    """Write alerts and summary of a run to standard output.

    Args:
        args: Options, as ``spectral watch --help`` lists them.

    Returns:
        Exit status: 0 if no layer was critical at its latest analysis, 1 if one was, 2 for a
        mistake that one sentence explains.
    """
    return errors.answered(_watch, _parser().parse(args, required=["RUN_DIR"]))


def _parser() -> CommandParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser("spectral watch", _DESCRIPTION, epilog=_EPILOG, formatter_class=layout)
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", nargs="?", help="the run's folder or event file")
    add("--follow", action="store_true", help="wait for more, also for the file itself")
    add("--interval", type=float, default=2.0, help="seconds between two looks (default 2)")
    add("--layers", metavar="GLOB", action="append", help="only these, by name; may be repeated")
    add(
        "--warn-margin",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="how near to a threshold is near, as a share of it (default 0.1)",
    )
    add("--quiet", action="store_true", help="of the alerts only the critical ones")
    add("--summary-only", action="store_true", help="no alerts")
    add("--json", action="store_true", help="write one JSON document instead")
    return parser


def _watch(options: argparse.Namespace) -> int:
    if not (math.isfinite(options.interval) and options.interval > 0):
        raise ValueError(f"`interval` must be finite and > 0, got {options.interval}.")
    if not (math.isfinite(options.warn_margin) and options.warn_margin >= 0):
        raise ValueError(f"`warn-margin` must be finite and >= 0, got {options.warn_margin}.")
    if options.json and options.follow:
        raise ValueError("`json` must not be given with `follow`: a document is written once.")
    watcher = _follow(options) if options.follow else _report(options)
    return 1 if any(layer.is_critical for layer in watcher.watch.layers.values()) else 0


def _report(options: argparse.Namespace) -> "_Watcher":
    """Report on the file as it is."""
    watcher = _Watcher(options)
    alerts = watcher.look()
    if watcher.file is None:
        raise ValueError(_no_file(options.run_dir))
    watcher.require_layers()
    if not options.json:
        watcher.show(alerts)
        watcher.summarize()
        return watcher
    from spectral_lightning.dashboards.mode_summary import mode_document

    settings = {
        "spectral_lightning": spectral_lightning.__version__,
        "file": str(watcher.file),
        "layers": options.layers or ["*"],
        "warn_margin": options.warn_margin,
    }
    shown = [alert for alert in alerts if watcher.is_shown(alert)]
    document = {"settings": settings, **mode_document(watcher.watch, shown)}
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return watcher


def _follow(options: argparse.Namespace) -> "_Watcher":
    """Show alerts as they come, until a signal asks for the summary."""
    with _stop_signals() as stopped:
        watcher = _Watcher(options)
        watcher.show(watcher.look())
        if watcher.file is None:
            _note(f"waiting for an event file at or below {options.run_dir}")
        while not stopped(options.interval):
            watcher.show(watcher.look())
        watcher.show(watcher.look())  # what a run wrote that ended at the same signal
    watcher.summarize()
    return watcher


class _Watcher:
    """One event file, and what was made of it so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.file: Path | None = None
        self._options = options
        self._stamp: tuple[int, ...] = ()
        self._events: list[ModeEvent] = []
        self.watch = self._new_watch()

    def look(self) -> "list[Alert]":
        """Read the file if it changed, and return the alerts of what is new in it."""
        from spectral_lightning.spectra import read_mode_events

        try:
            if self.file is None:
                self.file = _find(Path(self._options.run_dir))
            if self.file is None:
                return []
            stat = self.file.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if stamp == self._stamp:
                return []
            events = read_mode_events(self.file)
        except FileNotFoundError:  # set aside by a new run that has not written yet
            return []
        self._stamp = stamp
        return self._take(events)

    def require_layers(self) -> None:
        """Refuse a pattern that fits no layer of the file."""
        from spectral_lightning.spectra import ModeSettings
        from spectral_lightning.spectra.names import some_names

        layers = (event.layer for event in self._events if not isinstance(event, ModeSettings))
        names = sorted(set(layers))
        for glob in self._options.layers or []:
            if names and not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"`layers` must match at least one layer, got {glob!r}; the layers of the file"
                    f" are {some_names(names, none='')}."
                )

    def is_shown(self, alert: "Alert") -> bool:
        """Whether the options ask for an alert."""
        if self._options.summary_only:
            return False
        return not self._options.quiet or alert.level == "CRITICAL"

    def show(self, alerts: "Sequence[Alert]") -> None:
        """Write alerts, one line each."""
        from rich.text import Text

        for alert in filter(self.is_shown, alerts):
            line = f"{alert.level:<8} step {alert.step} {alert.layer}: {alert.text}"
            plain = line.encode("ascii", "backslashreplace").decode()
            _console().print(Text(plain, _STYLES.get(alert.level, "")), soft_wrap=True)

    def summarize(self) -> None:
        """Write the tables."""
        from rich.text import Text

        from spectral_lightning.dashboards.mode_summary import measures_table, mode_table

        console = _console()
        if self.file is not None:
            console.print(Text(str(self.file)), soft_wrap=True)
        console.print(mode_table(self.watch))
        if (measures := measures_table(self.watch)) is not None:
            console.print()
            console.print(measures)

    def _take(self, events: "list[ModeEvent]") -> "list[Alert]":
        """Return the alerts of what is new; a file that was cut is taken from the beginning."""
        pairs = zip(self._events, events, strict=False)
        num_old = next(
            (index for index, (old, new) in enumerate(pairs) if old != new),
            min(len(self._events), len(events)),
        )
        if num_old < len(self._events):
            _note(f"the file was cut: {num_old} of {len(self._events)} events are left")
            self.watch = self._new_watch()
            self._alerts_of(events[:num_old])
        self._events = events
        return self._alerts_of(events[num_old:])

    def _alerts_of(self, events: "Sequence[ModeEvent]") -> "list[Alert]":
        from spectral_lightning.spectra import ModeSettings

        globs = self._options.layers or ["*"]
        return [
            alert
            for event in events
            if isinstance(event, ModeSettings) or any(fnmatchcase(event.layer, g) for g in globs)
            for alert in self.watch.update(event)
        ]

    def _new_watch(self) -> "ModeWatch":
        from spectral_lightning.dashboards.mode_alerts import ModeWatch

        return ModeWatch(self._options.warn_margin)


def _find(path: Path) -> Path | None:
    """The event file that a path means, None if there is none (yet)."""
    from spectral_lightning.spectra import MODE_EVENTS_FILE

    if path.is_file():
        return path
    if (path / MODE_EVENTS_FILE).is_file():
        return path / MODE_EVENTS_FILE
    below = path.rglob(MODE_EVENTS_FILE) if path.is_dir() else ()
    found = [file for file in below if file.is_file()]
    newest = max(found, key=lambda file: file.stat().st_mtime_ns, default=None)
    if newest is not None:
        which = "the only one" if len(found) == 1 else f"the newest of {len(found)} event files"
        _note(f"reading {newest}, {which} below {path}")
    return newest


def _no_file(path: str) -> str:
    has = "has no event file svd_mode.jsonl in it or below" if Path(path).is_dir() else "is missing"
    return (
        f"`RUN_DIR` must be an event file or a folder with one, but {path} {has}. The callback"
        " SVDModeSwitch writes it; `--follow` waits for it."
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[float], bool]]:
    """Turn an interrupt and a SIGTERM into the answer of a function that waits for them."""
    queue: SimpleQueue[int] = SimpleQueue()  # the one whose `put` a signal handler may call

    def stopped(seconds: float) -> bool:
        try:
            queue.get(timeout=seconds)
        except Empty:
            return False
        return True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: queue.put(number)) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}.\n")
    sys.stderr.flush()
